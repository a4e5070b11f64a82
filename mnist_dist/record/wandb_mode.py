"""Whether W&B is on, and for which server: from `--wandb`, the environment and wandb's settings files.

wandb's settings files are the user's (~/.config/wandb/settings, or in WANDB_CONFIG_DIR) and that of the working
directory (wandb/settings), which anyone may have put there. The latter may switch W&B off, and name entity, project
and group; it does not choose the server, the way to it, or a key.
"""

from __future__ import annotations

import configparser
import contextlib
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from mnist_dist.disk.files import MEGABYTE, read_limited
from mnist_dist.text import cause

Mode = Literal["online", "offline", "disabled"]
ANSWER_SECONDS = 4.0  # for the W&B server's first answer
ON = ("1", "true", "yes", "on", "t", "y")  # of WANDB_DISABLED
MODES: dict[str, Mode] = {"online": "online", "run": "online", "shared": "online", "offline": "offline",
                          "dryrun": "offline", "disabled": "disabled"}  # what wandb calls its modes
OF_A_FOLDER = {"mode", "disabled", "entity", "project", "run_group", "run_notes", "run_tags", "run_name",
               "run_job_type"}


def settings_of_user() -> dict[str, str]:
    """What wandb's settings file of the user says."""
    try:
        folder = Path(os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb").expanduser()
    except RuntimeError:  # no home
        return {}
    return _read(folder / "settings")


def settings_of_folder() -> dict[str, str]:
    """What wandb's settings file of the working directory says."""
    return _read(Path(".wandb" if Path(".wandb").exists() else "wandb", "settings"))


def _read(path: Path) -> dict[str, str]:
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read_string(read_limited(path.resolve(), MEGABYTE).decode())
        return dict(parser["default"]) if parser.has_section("default") else {}
    except (OSError, ValueError, configparser.Error):
        return {}


def mode_asked(asked: str, warn: Callable[[str], None]) -> Mode:
    """The mode that the user wants: `--wandb`, and for "auto" all of wandb's ways to switch it off."""
    if asked != "auto":
        return MODES[asked]
    if os.environ.get("WANDB_DISABLED", "").strip().lower() in ON:  # wandb no longer reads it
        return "disabled"
    for source, name in (("WANDB_MODE", os.environ.get("WANDB_MODE")),
                         ("mode in wandb/settings", settings_of_folder().get("mode")),
                         ("mode in the user's settings of wandb", settings_of_user().get("mode"))):
        if name:
            if name not in MODES:
                warn(f"W&B: {source} is {name!r:.40}, and must be one of {', '.join(MODES)}; continuing offline")
            return MODES.get(name, "offline")
    return "online"


def wandb_mode(asked: str, warn: Callable[[str], None]) -> Mode:
    """The mode to start wandb in: as `mode_asked`, but offline without a key, or if no server answers. Sends no key."""
    mode = mode_asked(asked, warn)
    if mode == "disabled":
        return mode
    # wandb reports its own errors to the same server, and at exit waits ten seconds for one that hangs
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    try:
        import wandb  # noqa: F401
    except ImportError:
        warn("wandb is not installed: this run is not tracked there (pip install wandb)")
        return "disabled"
    if mode == "offline":
        return mode
    try:
        settings = trusted_settings(warn)
        has_key = key_of(settings) is not None
    except Exception as error:  # wandb raises many kinds, of pydantic too
        warn(f"W&B could not be set up ({_one_line(error)}); continuing offline")
        return "offline"
    if not has_key:
        if asked == "online":
            warn("W&B: no API key is configured (wandb login); continuing offline")
        return "offline"
    question = urllib.request.Request(f"{settings.base_url}/graphql", data=b'{"query": "{ __typename }"}',
                                      headers={"Content-Type": "application/json"})
    try:
        urllib.request.urlopen(question, timeout=ANSWER_SECONDS).close()
    except urllib.error.HTTPError:
        pass  # an answer, of whatever kind
    except (OSError, ValueError) as error:
        warn(f"W&B: {settings.base_url} does not answer ({cause(error)}); continuing offline")
        return "offline"
    return "online"


def trusted_settings(warn: Callable[[str], None] = lambda line: None) -> Any:
    """wandb's settings, in which the file of the working directory has no say but in `OF_A_FOLDER`. wandb.init takes
    them. `warn` gets a line if the file has said anything else.
    """
    import wandb

    settings = wandb.setup().settings
    of_user, ignored = settings_of_user(), []
    for name in sorted(settings_of_folder().keys() - OF_A_FOLDER):
        if not hasattr(settings, name) or f"WANDB_{name.upper()}" in os.environ:  # the environment comes after the file
            continue
        trusted = of_user.get(name, getattr(type(settings)(), name))
        if trusted != getattr(settings, name):
            ignored.append(name)
            setattr(settings, name, trusted)
    if ignored:
        warn(f"W&B: wandb/settings of the working directory has {', '.join(ignored)}: ignored; only the environment "
             "and the user's settings of wandb may have that")
    return settings


def leave_environment(folder: Path) -> None:
    """From now on wandb finds none of its variables in this process, and keeps its own files below `folder`: so it
    starts whatever was in them.
    """
    import wandb

    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        del os.environ[name]
    os.environ |= {f"WANDB_{name}_DIR": str(folder) for name in ("CONFIG", "CACHE", "DATA", "ARTIFACT")}
    os.environ["WANDB_ERROR_REPORTING"] = "false"
    with contextlib.suppress(Exception):
        wandb.teardown()  # forgets settings of which it has read a part


def key_of(settings: Any) -> str | None:
    """The API key for the server of these settings: from the environment, or from the user's netrc file."""
    from netrc import NetrcParseError, netrc
    from urllib.parse import urlsplit

    if settings.api_key:
        return settings.api_key
    try:
        login = netrc().authenticators(urlsplit(settings.base_url).hostname or "")
    except (OSError, NetrcParseError):
        return None
    return login[2] if login else None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__

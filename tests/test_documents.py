"""The documents are short, and what they name is there: links, commands, options, files, benchmarks, functions."""

from __future__ import annotations

import re
import shlex

import pytest
from support import ROOT

from mnist_dist.cli import build_parser, parse

DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
README = (ROOT / "README.md").read_text()


def prose(text):
    """The text without code, tables, pictures, headings and the targets of links."""
    text = re.sub(r"```.*?```", "", text, flags=re.S)
    text = re.sub(r"!\[[^]]*\]\([^)]*\)", "", text)
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", text)
    return "\n".join(line for line in text.splitlines() if not line.startswith(("|", "#")))


def test_the_readme_has_at_most_900_words_and_25_in_a_sentence():
    assert len(README.split()) <= 900
    sentences = re.split(r"(?<=[.?!:])\s+|\n\n|\n- |\n\d+\. ", prose(README))
    assert [sentence for sentence in sentences if len(sentence.split()) > 25] == []


@pytest.mark.parametrize(("name", "most"), [("performance.md", 1500), ("studies.md", 1800)])
def test_a_document_is_short(name, most):
    assert len((ROOT / "docs" / name).read_text().split()) <= most


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_leads_somewhere(document):
    text = re.sub(r"```.*?```", "", document.read_text(), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        path = (document.parent / name) if name else document
        assert path.exists(), target
        if anchor:
            heads = [re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-")
                     for head in re.findall(r"(?m)^#+ (.*)$", path.read_text())]
            assert anchor in heads, f"{target}: {heads}"


def test_every_command_of_the_readme_is_one():
    words = [line.split("#")[0] for block in re.findall(r"```\n(.*?)```", README, re.S) for line in block.splitlines()]
    words += re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", README, flags=re.S))
    parsed = 0
    for line in words:
        if line.strip().startswith("mnist-dist ") and "[" not in line and "--help" not in line:
            parse(shlex.split(line)[1:])
            parsed += 1
        elif line.strip().startswith("./launch/"):
            assert (ROOT / line.split()[0]).exists()
            parsed += 1
    assert parsed >= 10
    commands = next(action.choices for action in build_parser()._actions if action.dest == "command")
    assert [name for name in commands if f"mnist-dist {name}" not in README] == []


def flags_of_all_commands():
    """The options of every command, of the benchmarks and of the scripts in launch/."""
    commands = next(action.choices for action in build_parser()._actions if action.dest == "command")
    flags = {flag for command in commands.values() for action in command._actions for flag in action.option_strings}
    sources = [*(ROOT / "benchmarks").rglob("*.py"), *(ROOT / "launch").iterdir(), *(ROOT / "examples").iterdir()]
    return flags.union(*(re.findall(r"--[a-z][a-z-]+", path.read_text()) for path in sources if path.is_file()))


OURS = ("mnist-dist ", "python train.py", "python -m mnist_dist", "python -m benchmarks", "./launch/qualify.sh", "--")
OF_OTHERS = {"--nnodes", "--partition", "--exclusive"}  # of torchrun and SLURM, named alone


@pytest.mark.parametrize("document", [path for path in DOCUMENTS if path.name not in ("lab-log.md", "CHANGELOG.md")],
                         ids=lambda path: path.name)
def test_what_a_document_names_is_there(document):
    """Options and commands of ours, modules, tests and benchmarks. The lab log is of earlier days."""
    text, flags = document.read_text(), flags_of_all_commands()
    ours = [piece for block in re.findall(r"```\n(.*?)```", text, re.S) for piece in block.splitlines()]
    ours += re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.S))
    pieces = [piece.partition(" -- ")[0] for piece in map(str.strip, ours) if piece.startswith(OURS)]
    named = {flag for piece in pieces for flag in re.findall(r"(?<!\S)--[a-z][a-z-]*[a-z](?![\w-])", piece)}
    unknown = named - flags - OF_OTHERS
    assert not unknown
    for path in re.findall(r"(?<![\w/.])((?:[a-z_]+/)+[a-z_]+\.(?:py|sh))", text):
        assert (ROOT / path).exists() or (ROOT / "mnist_dist" / path).exists(), path
    for name in re.findall(r"python -m benchmarks\.(\w+)", text):
        assert (ROOT / "benchmarks" / f"{name}.py").exists(), name


def test_the_functions_that_the_architecture_names_are_there():
    """`Class.method`, `function` beside the file that has it, and files of the package."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    sources = {path: path.read_text() for path in (ROOT / "mnist_dist").rglob("*.py")}
    code = "\n".join(sources.values())
    named = re.findall(r"`([A-Z]\w+)\.(\w+)`", text)
    assert len(named) >= 10
    for kind, method in named:
        (owner,) = [source for source in sources.values() if re.search(rf"^class {kind}\b", source, re.M)]
        assert re.search(rf"\bdef {method}\(", owner), f"{kind}.{method}"
    for name in re.findall(r"`([a-z]+(?:_[a-z]+)+)`", text):
        assert re.search(rf"\b{name}\b", code) or any(path.stem == name for path in sources), name

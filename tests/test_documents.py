"""The documents: the README is short, its sentences too, and every link and command leads somewhere."""

from __future__ import annotations

import re
import shlex

import pytest
from support import ROOT

from mnist_dist.cli import build_parser, parse

DOCUMENTS = [ROOT / "README.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]
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

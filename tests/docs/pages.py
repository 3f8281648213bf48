"""Pages of the guide as data: their commands, files, links and options."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
COMMENT = re.compile(r"<!-- (\w+): (.*?) -->\n$")
CODE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    """A fenced block, and the `<!-- key: value -->` right above it.

    `fails`: the block's exit code is this one, and each line of the ```text block behind it is on its stderr.
    `file`: the block is the content of this file, which is there before any command runs.
    """

    page: Path
    line: int
    kind: str
    text: str
    key: str = ""
    value: str = ""


def blocks(page: Path) -> list[Block]:
    text, found = page.read_text(encoding="utf-8"), []
    for fence in FENCE.finditer(text):
        comment = COMMENT.search(text[: fence.start()])
        key, value = (comment[1], comment[2]) if comment else ("", "")
        found.append(Block(page, text.count("\n", 0, fence.start()) + 1, fence[1], fence[2], key, value))
    return found


def setup(page: Path) -> list[str]:
    """What `<!-- setup: … -->` at the head of a page says must be there."""
    found = re.search(r"<!-- setup: (.*?) -->", page.read_text(encoding="utf-8"))
    return found[1].split(", ") if found else []


def script(page: Path) -> str:
    """All commands of a page as one shell script; a block that fails is named on stderr."""
    lines = ["set -eu", HELPERS]
    found = blocks(page)
    for block, after in pairwise([*found, None]):
        assert block is not None
        where = f"{page.name}:{block.line}"
        if block.kind == "sh" and block.key == "fails":
            lines += [f"code=0; (\n{block.text}) 2> stderr.txt || code=$?", f"failed {block.value} $code {where}"]
            shown = after.text.splitlines() if after and after.kind == "text" else []
            lines += [f"said {shlex.quote(line)} {where}" for line in shown]
        elif block.kind == "sh":
            lines += [f"echo '--- {where}' >&2", block.text]
    return "\n".join(lines) + "\n"


HELPERS = r"""
failed() { [ "$1" = "$2" ] || { cat stderr.txt >&2; echo "$3: exit code $2, not $1" >&2; exit 1; }; }
said() { grep -qF -- "$1" stderr.txt || { cat stderr.txt >&2; echo "$2: not said: $1" >&2; exit 1; }; }
"""


def commands(page: Path) -> Iterator[tuple[int, list[str]]]:
    """Every `weft …` of a page, in blocks and in running text: its line, and its words from the verb on."""
    text = page.read_text(encoding="utf-8")
    for block in blocks(page):
        if block.kind in ("sh", "console"):
            for command in re.sub(r"\\\n", " ", block.text).splitlines():
                if found := re.match(r"\s*(?:\$ )?(?:torchrun.* -m )?weft (.*)", command):
                    yield block.line, re.sub(r"\s#.*", "", found[1]).split()
    for code in CODE.finditer(FENCE.sub(lambda fence: "\n" * fence[0].count("\n"), text)):
        if code[1].startswith("weft "):
            yield text.count("\n", 0, code.start()) + 1, code[1].split()[1:]


def options(page: Path) -> set[str]:
    """Options that stand alone in running text."""
    prose = FENCE.sub("", page.read_text(encoding="utf-8"))
    return {found for code in CODE.findall(prose) for found in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", code)}


def anchors(page: Path) -> set[str]:
    """What a link can point at inside of a page, by GitHub's rule."""
    prose = FENCE.sub("", page.read_text(encoding="utf-8"))
    heads = re.findall(r"^#+ (.*)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower().replace("`", "")).replace(" ", "-") for head in heads}

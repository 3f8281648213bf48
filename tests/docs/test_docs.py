"""The guide is true: its links lead somewhere, its options and settings exist, what is generated is new."""

from __future__ import annotations

import importlib.util
import re
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from pages import LINK, PAGES, ROOT, Block, anchors, blocks, commands, options

FOREIGN_OPTIONS = {
    "--help",
    "--nproc-per-node",
    "--nnodes",
    "--rdzv-backend",
    "--rdzv-endpoint",
    "--plain-steps",
    "--repeats",
    "--section",
    "--rows",
}
"""Of every command, of torchrun and of the benchmarks."""
ids = [str(page.relative_to(ROOT)) for page in PAGES]


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_blocks_have_a_known_kind(page: Path) -> None:
    """Nothing that looks like a command escapes by a misspelt fence."""
    for block in blocks(page):
        assert block.kind in ("sh", "console", "text", "toml", "json", "python"), f"{page.name}:{block.line}"
        assert block.key in ("", "file", "fails", "setup"), f"{page.name}:{block.line}"
        words = block.text.split()
        runs = block.kind == "text" and words[0] == "weft" and words[1] in verbs()
        assert not runs, f"{page.name}:{block.line}: a command is fenced as ```sh, or ```console if it cannot be run"


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_toml_is_accepted(page: Path, tmp_path: Path) -> None:
    """As settings of a run, or as a cluster where it says how many GPUs there are."""
    from weft.config.load import make_config, merge
    from weft.plan.machine import read_cluster

    for block in tomls(page):
        values = tomllib.loads(block.text)
        if "gpus" in values:
            (tmp_path / "cluster.toml").write_text(block.text, encoding="utf-8")
            read_cluster(str(tmp_path / "cluster.toml"))
        else:
            tree: dict[str, Any] = merge({"model": {"preset": "gpt2-124m"}}, values)
            make_config(tree)


def tomls(page: Path) -> list[Block]:
    return [block for block in blocks(page) if block.kind == "toml"]


# -- links and options ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        assert path.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(path), f"{page.name} links to {target}; there: {sorted(anchors(path))}"


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_proofs_exist(page: Path) -> None:
    written = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "tests").rglob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", page.read_text(encoding="utf-8"))
    assert not [name for name in named if f"def {name}(" not in written]


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_files_named_in_passing_exist(page: Path) -> None:
    """`serve/cut/group.py`: of the repository, or of the package, where its first folder is one of theirs."""
    roots = (ROOT, ROOT / "src" / "weft")
    ours = {folder.name for root in roots for folder in root.iterdir() if folder.is_dir()}
    for name in re.findall(r"`(\w+/[\w/.-]+\.(?:py|json|md|toml))`", page.read_text(encoding="utf-8")):
        there = name.partition("/")[0] not in ours or any((root / name).exists() for root in roots)
        assert there, f"{page.name} names {name}"


def test_every_page_is_in_the_table_of_contents() -> None:
    listed = set(LINK.findall((ROOT / "docs" / "README.md").read_text(encoding="utf-8")))
    assert {page.name for page in PAGES if page.parent.name == "docs"} - {"README.md"} <= listed


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_commands_and_options_exist(page: Path) -> None:
    known = verbs()
    for line, words in commands(page):
        where = f"{page.name}:{line}: weft {' '.join(words)}"
        name = next((name for name in (" ".join(words[:2]), words[0]) if name in known), None)
        assert name is not None or words[0].startswith("--"), f"{where}: no such command"
        given = {word.partition("=")[0] for word in words if word.startswith("--") and word != "--"}
        assert given <= known[name or ""] | {"--help"}, f"{where}: no option {given - known[name or '']}"
    unknown = options(page) - set().union(*known.values()) - FOREIGN_OPTIONS
    assert not unknown, f"{page.name} names {sorted(unknown)}"


def verbs() -> dict[str, set[str]]:
    """Each command, "" for weft itself → its options."""
    import typer.main

    from weft.cli.app import app

    found: dict[str, set[str]] = {}

    def walk(command: Any, name: str) -> None:
        found[name] = {word for option in command.params for word in (*option.opts, *option.secondary_opts)}
        for child, inside in getattr(command, "commands", {}).items():
            walk(inside, f"{name} {child}".strip())

    walk(typer.main.get_command(app), "")
    found["export"] |= found["export huggingface"]  # which may be left out
    return found


def test_every_command_is_in_the_guide() -> None:
    named = {" ".join(words[:2]) for page in PAGES for _, words in commands(page)}
    named |= {words[0] for page in PAGES for _, words in commands(page)}
    assert not {verb for verb in verbs() if verb} - named


# -- what is generated ------------------------------------------------------------------------------------------------


SCHEDULES = [f"schedules/{path.name}" for path in sorted((ROOT / "docs" / "schedules").glob("*.svg"))]


@pytest.mark.parametrize(
    ("name", "page"),
    [
        ("make_settings", "settings.md"),
        ("make_picture", "layouts.svg"),
        ("make_features", "features.md"),
        ("make_plan", "plan.svg"),
        *(("make_schedules", it) for it in SCHEDULES),
    ],
)
def test_generated_parts_are_new(name: str, page: str) -> None:
    """`python docs/make_settings.py` and the others of its kind bring them up to date."""
    path = ROOT / "docs" / page
    assert path.read_text(encoding="utf-8") == module(name).made(path), f"run: python docs/{name}.py"


def module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    loaded = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded

"""The guide is true: its commands run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from pages import PAGES, ROOT, blocks, script, setup
from warm import warm_weft

TEXTS = 60
"""Files of the fixtures' text: enough documents that each part of a split has one."""
COMMANDS = [page for page in PAGES if any(block.kind == "sh" for block in blocks(page))]


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with warm_weft(tmp_path_factory.mktemp("warm")) as folder:
        yield folder


@pytest.fixture(scope="session")
def fixtures(warm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What pages may ask for in `<!-- setup: … -->`: small stand-ins for what `make demo` leaves behind.

    nothing      nothing
    text         a folder with some Python files
    demo         demo/tokenizer and demo/stdlib, as examples/demo.toml names them
    demo/tp2     a run of examples/demo.toml, of 12 steps, with two checkpoints
    """
    folder = tmp_path_factory.mktemp("fixtures")
    (folder / "text").mkdir()
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    for module in [path for path in modules if 5_000 < path.stat().st_size < 40_000][:TEXTS]:
        shutil.copy(module, folder / "text")
    link(folder)
    vocab = tomllib.loads((ROOT / "examples" / "demo.toml").read_text(encoding="utf-8"))["model"]["vocab"]
    shell(
        folder,
        f"""set -eu
        weft data tokenizer text --vocab {vocab} --out demo/tokenizer
        weft data prepare text --tokenizer demo/tokenizer --out demo/stdlib --workers 1
        weft train examples/demo.toml --run demo/tp2 --layout tp2 --steps 12 --batch 4 \
            --set schedule.warmup=2 --set checkpoint.every=6 --set log.every=1 --set train.eval_every=6
        """,
        warm,
    )
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", COMMANDS, ids=lambda page: page.name)
def test_commands_run(page: Path, fixtures: Path, warm: Path, tmp_path: Path) -> None:
    """Those of the README as whoever comes first runs them; all others as `warm.py` has them."""
    link(tmp_path)
    for name in setup(page):
        found = [*fixtures.glob("demo/stdlib.*"), fixtures / "demo/tokenizer"] if name == "demo" else [fixtures / name]
        for source in found if name != "nothing" else []:
            copy(source, tmp_path / source.relative_to(fixtures))
    for block in blocks(page):
        if block.key == "file":
            (tmp_path / block.value).write_text(block.text, encoding="utf-8")
    shell(tmp_path, script(page), *(() if page.name == "README.md" else (warm,)))


def copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copy(source, target)


def link(folder: Path) -> None:
    """What a page's commands see of the repository."""
    for name in ("examples", "scripts", "benchmarks"):
        (folder / name).symlink_to(ROOT / name)


def shell(folder: Path, commands: str, *first: Path) -> None:
    """`first`: before all other folders of the PATH."""
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    path = ":".join(map(str, [*first, Path(sys.executable).parent, os.environ["PATH"]]))
    environment |= {"PATH": path, "COLUMNS": "100"}
    done = subprocess.run(
        ["sh", "-c", commands], cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"

"""The rules of the house: who may import whom, and what must stay light."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from weft.cli.app import JOURNEY, Verbs, app

SOURCE = Path(__file__).parents[2] / "src" / "weft"
FORBIDDEN = {
    "models": "parallel train cli launch verify serve data checkpoint plan export exact tune profile",
    "config": "parallel train cli launch verify serve data checkpoint plan export exact tune profile",
    "plan": "parallel train cli launch verify serve data checkpoint export exact tune profile",
    "data": "parallel train cli launch verify serve checkpoint plan export models exact tune profile",
    "checkpoint": "parallel train cli launch verify serve data plan export exact tune profile",
    "parallel": "train cli launch verify serve data plan export exact tune profile",
    "launch": "parallel train cli verify serve data plan export models exact tune profile",
    "serve": "train cli launch verify data plan export exact tune profile",
    "train": "cli verify serve export exact tune",
    "export": "cli train verify parallel exact tune profile",
    "exact": "cli verify serve data export tune profile",
    "profile": "parallel train cli launch verify serve data checkpoint export exact tune",
    "tune": "cli serve export exact",
    "prompt": "parallel train cli launch verify plan export exact tune profile",
    "verify": "cli exact tune profile",
}
"""Arrows point down only. Room → rooms that it never imports."""


@pytest.mark.parametrize("room", sorted(FORBIDDEN))
def test_arrows_point_down(room: str) -> None:
    wrong = [
        f"{file.relative_to(SOURCE)} imports {name}"
        for file in (SOURCE / room).rglob("*.py")
        for name in imports(file)
        if name.startswith("weft.") and name.split(".")[1] in FORBIDDEN[room].split()
    ]
    assert not wrong


@pytest.mark.parametrize(
    ("room", "above"),
    {"kernels": "requests schedule steps cut", "requests": "schedule steps cut", "schedule": "steps cut"}.items(),
)
def test_arrows_point_down_in_the_engine(room: str, above: str) -> None:
    wrong = [
        f"{file.relative_to(SOURCE)} imports {name}"
        for file in (SOURCE / "serve" / room).glob("*.py")
        for name in imports(file)
        if name.startswith(tuple(f"weft.serve.{other}" for other in (*above.split(), "engine", "server")))
    ]
    assert not wrong


def imports(file: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 or file.parent.name == "data", f"{file}: relative import"
            found.append(node.module or "")
    return found


@pytest.mark.parametrize("module", ["weft.cli.app", "weft.config.load", "weft.plan.show.report", "weft.data.loader"])
def test_loads_without_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_help_lists_the_verbs_in_the_journeys_order() -> None:
    group = typer.main.get_command(app)
    assert isinstance(group, Verbs)
    assert sorted(JOURNEY) == sorted(group.commands)
    shown = re.findall(r"^. ([a-z][a-z-]*) ", CliRunner().invoke(app, ["--help"]).output, re.MULTILINE)
    assert shown == list(JOURNEY)


def test_help_imports_nothing_heavy() -> None:
    heavy = "'pydantic', 'numpy', 'torch', 'rich.live', 'tokenizers', 'matplotlib'"
    code = (
        "import sys; from weft.cli import app\n"
        "try: app.app(['--help'])\nexcept SystemExit: pass\n"
        f"sys.exit(str([name for name in ({heavy}) if name in sys.modules] or ''))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert not done.stderr.strip(), done.stderr


@pytest.mark.parametrize("file", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_a_file_fits_in_a_reading(file: Path) -> None:
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 300


def test_what_is_locked_is_what_is_tested() -> None:
    """requirements.lock has all that weft runs on but torch, in the versions of constraints.txt, each with digests."""
    root = SOURCE.parents[1]
    entries = re.split(r"\n(?=\w)", re.sub(r"#.*\n", "", (root / "requirements.lock").read_text(encoding="utf-8")))
    locked = dict(entry.split(" ", 1)[0].split("==") for entry in entries)
    assert all(re.search(r"--hash=sha256:[0-9a-f]{64}", entry) for entry in entries)
    tested = dict(re.findall(r"^([\w-]+)==(\S+)", (root / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE))
    assert {name: version for name, version in locked.items() if tested.get(name, version) != version} == {}
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    needed = [*project["project"]["dependencies"], *project["build-system"]["requires"]]
    assert {re.split(r"[><=]", one)[0] for one in needed} - locked.keys() == {"torch"}

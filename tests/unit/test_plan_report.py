"""`weft train … --dry-run`: what it prints can be trained with, and nothing heavy is loaded for it."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest

from weft.config.load import load_config, make_config
from weft.config.tree import Config
from weft.plan.show.report import large, print_plan
from weft.plan.show.words import describe, ranks

LARGE = {
    "model": "llama3-405b",
    "layout": "dp2.fsdp8.tp8.sp.pp8.stages16-16-16-16-16-16-16-14.mb1.full.bf16",
    "train": {"global_batch": 256, "seq": 8192},
    "data": {"paths": ["runs/a \"b\"", "c\\d"], "weights": [0.5, 0.5]},
}  # fmt: skip


def printed(config: Config) -> str:
    out = io.StringIO()
    print_plan(config, out)
    return out.getvalue()


@pytest.mark.parametrize("tree", [LARGE, {"model": "gpt2-124m"}, {"model": "mistral-7b", "layout": "tp2.pp2"}])
def test_a_printed_plan_is_a_config_file(tree: dict, tmp_path: Path) -> None:
    config = make_config(tree)
    (tmp_path / "plan.toml").write_text(printed(config), encoding="utf-8")
    read = load_config([tmp_path / "plan.toml"])
    assert read.train.seq == config.seq
    assert read == config.model_copy(update={"train": config.train.model_copy(update={"seq": config.seq})})


def test_the_plan_tells_sizes_memory_and_layout() -> None:
    text = printed(make_config(LARGE))
    for part in (
        "1,024 processes", "405,853,388,800", "2,097,152 a step", "largest process (stage 0 of 8)", "optimizer",
        "total", "8 stages of 14 to 16 blocks", "16 micro-batches of 1", "30.4 % of the step",
    ):  # fmt: skip
        assert part in text, part
    assert max(map(len, text.splitlines())) <= 120


def test_ranks_of_an_axis_are_those_of_the_mesh() -> None:
    torch = pytest.importorskip("torch")
    layout = make_config(LARGE).layout
    grid = torch.arange(layout.world).reshape(8, 2, 8, 8)  # pp, dp, fsdp, tp
    assert ranks(layout, "pp").startswith(f"ranks 0, {grid[1, 0, 0, 0]}, … {grid[-1, 0, 0, 0]}, ")
    assert ranks(layout, "dp").startswith(f"ranks 0, {grid[0, 1, 0, 0]}, ")
    assert ranks(layout, "fsdp").startswith(f"ranks 0, {grid[0, 0, 1, 0]}, … {grid[0, 0, -1, 0]}, ")
    assert ranks(layout, "tp").startswith("ranks 0, 1, … 7, ")


def test_every_part_of_a_layout_is_explained() -> None:
    names = [name for name, _ in describe(make_config(LARGE))]
    assert names == ["pp8", "1f1b", "dp2", "fsdp8", "tp8", "sp", "batch", "full", "bf16"]
    assert [name for name, _ in describe(make_config({"model": "gpt2-124m"}))] == ["single", "batch"]


def test_large_numbers_in_words() -> None:
    assert [large(x) for x in (1.5e9, 5.293e18, 9.9e23)] == ["1.50 G", "5.29 E", "990 Z"]
    assert [f"{large(x)}B/s" for x in (12, 2590, 1.17e8)] == ["12 B/s", "2.59 kB/s", "117 MB/s"]


def test_no_torch() -> None:
    """How long it takes: benchmarks/startup.py."""
    arguments = ["train", "--model", "llama3-405b", "--layout", LARGE["layout"], "--batch", "256", "--seq", "8192"]
    code = (
        "import sys\n"
        "from weft.cli.app import app\n"
        f"app({[*arguments, '--dry-run']!r}, standalone_mode=False)\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "llama" in done.stdout

"""Real processes for tests: forked from this warm interpreter, on gloo. 8 ranks take seconds, not half a minute."""

from __future__ import annotations

import faulthandler
import fcntl
import gc
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # or each forked process would: more work than all else that it does
import torch.distributed as dist

from forking import count_gpus
from weft.config.layout import Layout
from weft.config.load import make_config
from weft.config.tree import Config
from weft.models.decoder import Decoder
from weft.parallel.weave import compile_blocks
from weft.train.step import train_step
from weft.train.training import build
from weft.verify.layout import LayoutReport, compare
from weft.verify.trace import record, step_rows

Compared = Callable[[Config], LayoutReport]
"""The fixture of conftest.py."""

MODELS = {
    "gpt2": {"family": "gpt2", "num_layers": 4, "hidden": 32, "num_heads": 4, "vocab": 67, "max_seq": 32},
    "llama": {
        "family": "llama", "num_layers": 4, "hidden": 32, "num_heads": 8, "num_kv_heads": 4, "head_dim": 8,
        "ffn": 48, "vocab": 67, "max_seq": 32,
    },
    "qwen3": {
        "family": "qwen3", "num_layers": 4, "hidden": 32, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16,
        "ffn": 48, "vocab": 67, "max_seq": 32, "tied": True, "sliding_window": 5,
    },
    "mixtral": {
        "family": "mixtral", "num_layers": 4, "hidden": 32, "num_heads": 4, "num_kv_heads": 2, "ffn": 24, "vocab": 67,
        "max_seq": 32, "experts": {"num_experts": 4, "per_token": 2},
    },
    "deepseek": {
        "family": "deepseek_v3", "num_layers": 4, "hidden": 32, "num_heads": 4, "ffn": 48, "vocab": 67, "max_seq": 32,
        "latent": {"q_rank": 12, "kv_rank": 16, "nope_dim": 6, "rope_dim": 4, "value_dim": 8},
        "yarn": {"factor": 4, "original_max_seq": 8, "mscale": 0.7, "mscale_all_dim": 1.2},
        "experts": {
            "num_experts": 8, "per_token": 2, "ffn": 12, "dense_layers": 1, "shared": 1, "scores": "sigmoid",
            "groups": 4, "top_groups": 2, "scaling": 2.5,
        },
    },
}  # fmt: skip


count_gpus()


def make(model: str, layout: str, /, **over: object) -> Config:
    """Settings of a small run whose gradients are all well above rounding."""
    tree: dict = {
        "model": {**MODELS[model], "init_std": 0.1},
        "layout": layout,
        "train": {"steps": 10, "global_batch": _batch(Layout.parse(layout)), "seq": 16},
        "optimizer": {"lr": 1e-3},
    }
    for section, values in over.items():
        tree[section] = {**tree.get(section, {}), **values}  # type: ignore[dict-item]
    return make_config(tree)


def _batch(layout: Layout) -> int:
    """16 sequences; 8 where many processes compute in fp32 and have their micro-batches: enough to fill a pipeline."""
    small = layout.world >= 4 and layout.precision == "fp32" and layout.micro_batch is not None
    return 8 if small and layout.num_micro_batches(8) >= 2 * layout.pp else 16


def run_forked(world: int, work: Callable[[int], None], *, timeout: float = 120.0) -> None:
    """Call `work(rank)` in `world` processes that share a gloo group; the first error of any comes back."""
    torch.set_num_threads(1)  # a child of a parent with threads would hang
    with tempfile.TemporaryDirectory() as folder:
        pids = [_fork(rank, world, work, Path(folder)) for rank in range(world)]
        ended = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        failed = [rank for rank, code in enumerate(ended) if code]
        errors = [(Path(folder) / f"error-{rank}").read_text() for rank in failed]
    if errors:
        causes = [error for error in errors if "gloo" not in error] or errors
        codes = ", ".join(f"{rank}: {ended[rank]}" for rank in failed)
        raise AssertionError(f"ranks failed (exit status, or minus the signal: {codes})\n{causes[0]}")


def _fork(rank: int, world: int, work: Callable[[int], None], folder: Path) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code, error = 1, (folder / f"error-{rank}").open("w")
    gc.disable()  # it is gone in seconds; and what it has of its parent, a look for garbage would copy
    try:
        faulthandler.enable(error)  # a signal's stack, where no exception is raised
        if "torch._inductor.compile_fx" in sys.modules:
            _compile_in_turn(folder / "turn")
        store = dist.FileStore(str(folder / "store"), world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
        work(rank)
        dist.destroy_process_group()
        code = 0
    except BaseException:  # noqa: BLE001 (told to the parent)
        error.write(traceback.format_exc())
        error.flush()
    finally:
        os._exit(code)
    return pid


@cache
def warm_compiler() -> None:
    """Have torch's compiler here, and used once on blocks as they are: a forked process then has all that it learns at its
    first use (which instructions the CPU has, how to call g++, a hash of torch's source, its patterns, which function a
    line is of), half of what a small block costs. It learns no patterns if an earlier run left its graph on disk."""
    torch.set_num_threads(1)
    torch._inductor.config.compile_threads = 1  # a pool of threads would not be there in a forked process
    torch.hub.tqdm.monitor_interval = 0  # nor would its thread
    model = Decoder(make("llama", "single").model)
    compile_blocks(model.blocks)
    with torch._functorch.config.patch(enable_autograd_cache=False):
        model(torch.arange(16)[None]).sum().backward()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def _compile_in_turn(turn: Path) -> None:
    """One process after another: whoever has the graph of one before finds what that one compiled."""
    from torch._inductor import compile_fx

    inner = compile_fx._compile_fx_inner

    def alone(*arguments: Any, **settings: Any) -> Any:
        with turn.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            return inner(*arguments, **settings)

    compile_fx._compile_fx_inner = alone


def trace(config: Config, folder: Path, steps: int = 2) -> Path:
    """A trace of the config's run, made by as many processes as its layout takes."""
    folder.mkdir(parents=True)
    if config.layout.compile:
        warm_compiler()
    run_forked(config.layout.world, lambda rank: record(config, steps, folder, torch.device("cpu")))
    return folder


def losses(config: Config, folder: Path, steps: int = 50) -> list[float]:
    """Of so many steps over the same batch, which the model learns by heart: a curve with somewhere to go."""

    def work(rank: int) -> None:
        training = build(config, torch.device("cpu"))
        rows = step_rows(training, None, 1)
        found = [
            train_step(training.woven, training.optimizer, training.scaler, rows, lr=1e-3, clip_norm=1.0).loss
            for _ in range(steps)
        ]
        if rank == 0:
            (folder / "losses.json").write_text(json.dumps(found))

    run_forked(config.layout.world, work)
    return json.loads((folder / "losses.json").read_text())


def against_one_process(config: Config, folder: Path, steps: int = 2) -> LayoutReport:
    """Compare a layout with one process in the same precision."""
    single = config.model_copy(update={"layout": type(config.layout)(precision=config.layout.precision)})
    reference = trace(single, folder / "one", steps)
    return compare((single, reference), (config, trace(config, folder / "cut", steps)))

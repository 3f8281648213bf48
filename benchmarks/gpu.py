"""Claim: weft computes on a GPU what it computes on a CPU, fits where its plan says, and trains fast there.

    python benchmarks/gpu.py                      # every section, in at most nine minutes on an H100 or H200
    python benchmarks/gpu.py --section blocks --minutes 4

It needs a CUDA GPU, torch, numpy and pydantic, and no installation: weft is taken from this checkout. Sections:

    parity  small GPT-2- and Llama-like models: every output, gradient and update of a GPU run against a CPU run in fp32
            (TF32 off), by `weft verify`'s own bounds; bf16 and fp16 against the same CPU run, by the bounds of those
    blocks  whole bf16 training steps of a model of Llama 3 8B's blocks, as many of them as the plan says fit: step time,
            tokens/s, MFU against the datasheet (attention's scores in full, and causal), peak memory against the plan
    gpt2    GPT-2 124M in bf16, seq 1024, beside a plain PyTorch loop at its best (fused AdamW, autocast, sdpa) around
            transformers' model, or where that is not installed, one written by hand; eager and compiled, taking turns
    parts   forward and backward of parts alone: a layer of experts (grouped products), the widest matrix in bf16 and in
            fp8, head and loss from whole logits and in chunks, attention by each of torch's kernels: time, TFLOP/s, memory
    serve   decoding with the engine, Llama 3 8B's sizes in bf16, one text and many: plain, and compiled in CUDA graphs:
            share of memory bandwidth, tokens/s, time to the first token, cold start, and whether the texts are the same
    peers   forward and backward of four Llama 3 8B blocks beside Megatron-Core's GPTModel, where it is installed; its
            weights and gradients are bf16, weft's fp32, computed with as bf16. No update on either side

Times are of CUDA events, after warm-up. A ratio is the peer's seconds over weft's, of neighbours in time: above 1 weft is
faster. Memory is torch.cuda.max_memory_allocated of the steps against the plan's tensors; `error` is (planned − measured)
/ measured. Each section is a process of its own, so that what one does to the GPU ends with it, and is stopped when its
time is over. Results lie in $OUT, or benchmarks/results, after each row; a row that failed says why.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1] / "src"), str(Path(__file__).parent)]
NEEDED = ("torch", "numpy", "pydantic")
if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
    sys.exit(f"benchmarks/gpu.py needs {', '.join(NEEDED)}; not installed here: {', '.join(missing)}")

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import common  # noqa: E402
import gpu_parts as parts  # noqa: E402
import gpu_peers as peers  # noqa: E402
import gpu_serve as serving  # noqa: E402
from gpu_sizes import GPU, TINY, Sizes  # noqa: E402
from gpu_verbs import CLUSTER, verbs  # noqa: E402
from weft.config.load import make_config  # noqa: E402
from weft.config.tree import Config  # noqa: E402
from weft.launch.process import start_process, stop_process  # noqa: E402
from weft.models.shape import Shape  # noqa: E402
from weft.parallel.woven import Rows  # noqa: E402
from weft.plan.machine import read_cluster  # noqa: E402
from weft.plan.memory.moments import layout_memory  # noqa: E402
from weft.plan.numbers import Job  # noqa: E402
from weft.plan.plan import Plan  # noqa: E402
from weft.train.hardware import peak_flops  # noqa: E402
from weft.train.metrics import memory_used  # noqa: E402
from weft.train.step import train_step  # noqa: E402
from weft.train.training import Training, build  # noqa: E402
from weft.verify.layout import KINDS, compare  # noqa: E402
from weft.verify.trace import record  # noqa: E402

LR, CLIP = 3e-4, 1.0
GIB = 2**30
SHARE_OF_MEMORY = 0.88
"""Of the free memory, what the plan may fill: the allocator's blocks and cuBLAS's workspaces need some too."""
ROWS_NEED = {"parity": 10.0, "verbs": 8.0, "blocks": 15.0, "gpt2": 30.0, "parts": 5.0, "serve": 15.0, "peers": 20.0}
"""Seconds that a row of a section takes at least; compiling comes on top. With less left it is not begun."""
COMPILING = 20.0
SHARES = {"parity": 0.2, "verbs": 0.2, "blocks": 0.2, "gpt2": 0.14, "parts": 0.06, "serve": 0.15, "peers": 0.05}
"""Of the time; what a section leaves over is there for those after it."""


@dataclass
class Section:
    """The rows of one section, on disk after each."""

    name: str
    device: torch.device
    sizes: Sizes
    folder: Path
    deadline: float  # of time.monotonic
    tiny: bool
    only: str = ""  # of rows, those whose names this is found in
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)

    def row(self, name: str, work: Callable[[], dict[str, Any]], *, compiles: bool = False) -> dict[str, Any]:
        """Do the work of one row unless the time is over. What it raises is written down, and the rest goes on."""
        if not re.search(self.only, name):
            return {}
        left, needed = self.deadline - time.monotonic(), ROWS_NEED[self.name] + compiles * COMPILING
        began = time.monotonic()
        if left < needed and not self.tiny:
            found: dict[str, Any] = {"skipped": f"{left:.0f} s were left of the time, {needed:.0f} are needed"}
        else:
            try:
                found = work()
            except Exception as error:  # noqa: BLE001  whatever it is, it is this row's result
                text = f"{type(error).__name__}: {error}"
                found = {"failed": text[:2000], "trace": traceback.format_exc()[-4000:]}
        clear(self.device)
        self.rows[name] = found | {"seconds": round(time.monotonic() - began, 1)}
        print(f"{self.name:7} {name:34} {told(found)}", flush=True)
        common.write(f"gpu_{self.name}", {"rows": self.rows}, folder=self.folder)
        return found


def told(row: dict[str, Any]) -> str:
    """A row in a line."""
    if "failed" in row:
        return "FAILED: " + row["failed"].strip().splitlines()[0][:150]
    return f"skipped: {row['skipped']}" if "skipped" in row else row["told"]


def clear(device: torch.device) -> None:
    """Nothing of one row is there for the next: compiled functions are counted, and torch refuses too many."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# -- parity -----------------------------------------------------------------------------------------------------------

PLAIN = ("single", "mb2", "full", "selective", "compile", "bf16", "bf16.offloadweights", "fp16", "bf16.compile")
PARITY = {
    ("gpt2", "adamw"): PLAIN,
    ("llama", "adamw"): (*PLAIN, "chunked", "offload", "bf16.offload", "offloadoptimizer", "fp8", "fp8row"),
    ("llama", "muon"): ("single", "bf16"),
    ("mixtral", "adamw"): ("single", "full", "compile"),
    ("deepseek_v3", "adamw"): ("single", "compile", "bf16"),
}
"""Layouts of each model and optimizer."""
UNREHEARSED = {"bf16.compile", "verbs"}


def parity(section: Section) -> None:
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    with TemporaryDirectory() as temp:
        for (family, optimizer), layouts in PARITY.items():
            name, make = f"{family} {optimizer}", partial(settings, section, section.sizes.small[family], optimizer)
            reference = (Path(temp) / name, make("single"))
            found = section.row(f"{name} on the CPU", partial(trace, *reference, torch.device("cpu")))
            if "told" not in found:
                continue
            for layout in layouts:
                if section.tiny and layout in UNREHEARSED:
                    continue
                folder, config = Path(temp) / f"{name} {layout}", make(layout)
                work = partial(parity_row, section, reference, (folder, config))
                section.row(f"{name} {layout}", work, compiles=config.layout.compile)


def settings(section: Section, shape: Shape, optimizer: str, layout: str) -> Config:
    train = {"global_batch": section.sizes.small_batch, "seq": section.sizes.small_seq, "steps": 10}
    return make_config({"model": shape, "layout": layout, "train": train, "optimizer": {"kind": optimizer}})


def trace(folder: Path, config: Config, device: torch.device) -> dict[str, Any]:
    folder.mkdir()
    record(config, 2, folder, device)
    return {"told": "two steps, every tensor written"}


def parity_row(section: Section, reference: tuple[Path, Config], side: tuple[Path, Config]) -> dict[str, Any]:
    trace(*side, section.device)
    report = compare((reference[1], reference[0]), (side[1], side[0]))
    worst = {kind: report.worst(kind)[0] for kind in KINDS if report.worst(kind)}
    kind, most = max(worst.items(), key=lambda pair: pair[1].error / pair[1].bound)
    shutil.rmtree(side[0])
    verdict = "right" if report.right else f"WRONG, first in {report.first_wrong()}"
    return {
        "told": f"{verdict}; nearest its bound: {kind} of {most.name}, {most.error:.1e} of {most.bound:.0e}",
        "right": report.right,
        "first_wrong": report.first_wrong(),
        "compared": len(report.differences),
        "worst": {kind: vars(difference) for kind, difference in worst.items()},
    }


# -- blocks -----------------------------------------------------------------------------------------------------------

BLOCKS = ("bf16", "bf16.compile", "selective.bf16", "full.bf16", "full.bf16.compile")


def blocks(section: Section) -> None:
    for batch, seq in section.sizes.block_runs:
        limit = free_memory(section.device) * SHARE_OF_MEMORY
        layers = fitting(section.sizes, batch, seq, limit)
        for layout in BLOCKS:  # with as many layers as the first one needs: the times can be compared
            while True:
                compiled = "compile" in layout
                name = f"{layers} blocks, {batch} × {seq} {layout}"
                found = section.row(name, partial(block_row, section, layers, batch, seq, layout), compiles=compiled)
                if "OutOfMemoryError" not in found.get("failed", "") or layers <= 1:
                    break
                layers -= 1


def fitting(sizes: Sizes, batch: int, seq: int, limit: float) -> int:
    """The most layers that the plan puts into `limit` bytes, trained in plain bf16; at least one."""
    fits = [n for n in range(1, sizes.most_layers + 1) if planned(block_config(sizes, n, batch, seq, "bf16")) <= limit]
    return max(fits, default=1)


def block_config(sizes: Sizes, layers: int, batch: int, seq: int, layout: str) -> Config:
    shape = sizes.block.model_copy(update={"num_layers": layers})
    return make_config({"model": shape, "layout": layout, "train": {"global_batch": batch, "seq": seq}})


def planned(config: Config) -> int:
    """Bytes of tensors on the GPU at the fullest moment."""
    return layout_memory(config, "cuda")[0].peak.tensors


def block_row(section: Section, layers: int, batch: int, seq: int, layout: str) -> dict[str, Any]:
    device, sizes = section.device, section.sizes
    config = block_config(sizes, layers, batch, seq, layout)
    plan = layout_memory(config, "cuda")[0].peak
    step = weft_step(filled(config, device), random_tokens(config, device))
    began = time.perf_counter()
    step()
    first = time.perf_counter() - began
    for _ in range(sizes.warmup - 1):
        step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = [timed(step, device) for _ in range(sizes.steps)]
    used, median, tokens = memory_used(device), statistics.median(seconds), batch * seq
    peak = peak_flops(device, "bf16")
    mfu = {
        name: config.model.flops_per_token(seq, causal=causal) * tokens / median / peak.flops
        for name, causal in (("full", False), ("causal", True))
    }
    error = plan.tensors / used - 1
    foretold = expected_seconds(section, config)
    return {
        "told": f"{median * 1e3:.0f} ms, {tokens / median:.0f} tokens/s, MFU {mfu['full']:.1%} "
        f"({mfu['causal']:.1%} causal), {used / GIB:.1f} GiB, plan {plan.tensors / GIB:.1f} ({error:+.1%}); "
        + ", ".join(f"{name} foretold {seconds * 1e3:.0f} ms" for name, seconds in foretold.items()),
        "foretold_s": foretold,
        "layers": layers,
        "batch": batch,
        "seq": seq,
        "parameters": config.model.num_params,
        "step_s": common.spread(seconds, 5),
        "first_step_s": round(first, 2),
        "tokens_per_s": round(tokens / median, 1),
        "mfu": {name: round(share, 4) for name, share in mfu.items()},
        "peak": str(peak),
        "measured_gib": round(used / GIB, 3),
        "planned_gib": round(plan.tensors / GIB, 3),
        "error": round(error, 4),
        "moment": plan.moment,
        "terms_gib": {name: round(size / GIB, 3) for name, size in vars(plan).items() if name != "moment" and size},
        "reserved_gib": round(torch.cuda.max_memory_reserved(device) / GIB, 3) if device.type == "cuda" else None,
    }


def expected_seconds(section: Section, config: Config) -> dict[str, float]:
    """What the plan says of a step: on the preset of this GPU, and on the measured machine, where that was done before."""
    clusters = {}
    name = torch.cuda.get_device_name(section.device).lower() if section.device.type == "cuda" else "laptop-cpu"
    if preset := next((one for one in ("h200", "h100", "laptop-cpu") if one in name), None):
        clusters[preset] = read_cluster(preset, 1)
    if (section.folder / CLUSTER).exists():
        clusters["measured"] = read_cluster(str(section.folder / CLUSTER), 1)
    job = Job(seq=config.seq, global_batch=config.train.global_batch)
    return {name: Plan.of(config.model, config.layout, job, cluster).seconds for name, cluster in clusters.items()}


def filled(config: Config, device: torch.device) -> Training:
    """With weights drawn on the device: two billion of the reproducible ones take a CPU a minute."""
    training = build(config, device, fill=False)
    for weight in training.woven.weights:
        if weight.data.dim() > 1:
            weight.data.normal_(std=config.model.init_std)
        else:
            weight.data.fill_(0.0 if weight.name.endswith("bias") else 1.0)
    return training


def random_tokens(config: Config, device: torch.device) -> Tensor:
    """[B, T + 1], of the whole batch of a step."""
    stream = torch.Generator().manual_seed(0)
    size = (config.train.global_batch, config.seq + 1)
    return torch.randint(config.model.vocab, size, generator=stream).to(device)


def weft_step(training: Training, tokens: Tensor) -> peers.Step:
    rows = Rows(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())

    def step() -> float:
        return train_step(training.woven, training.optimizer, training.scaler, rows, lr=LR, clip_norm=CLIP).loss

    return step


def timed(step: Callable[[], object], device: torch.device) -> float:
    """Seconds of one step."""
    if device.type != "cuda":
        began = time.perf_counter()
        step()
        return time.perf_counter() - began
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    start.record()
    step()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) / 1e3


def free_memory(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else GIB


# -- beside others ----------------------------------------------------------------------------------------------------


def gpt2(section: Section) -> None:
    """Compiled first: it is the claim."""
    for layout in ("bf16.compile", "bf16"):
        section.row(f"124M {layout}", partial(gpt2_row, section, layout), compiles="compile" in layout)


def gpt2_row(section: Section, layout: str) -> dict[str, Any]:
    sizes, device = section.sizes, section.device
    train = {"global_batch": sizes.gpt2_batch, "seq": sizes.gpt2.max_seq}
    config = make_config({"model": sizes.gpt2, "layout": layout, "train": train})
    tokens = random_tokens(config, device)
    peer, model = peers.gpt2_peer(sizes.gpt2, plain=section.tiny and config.layout.compile)
    loop = peers.plain_loop(model, tokens, compiled=config.layout.compile, lr=LR, clip=CLIP)
    found = beside(section, {"weft": weft_step(filled(config, device), tokens), "peer": loop})
    count = tokens.shape[0] * (tokens.shape[1] - 1)
    return against(section, peer, found, count, config.model.flops_per_token(config.seq, causal=True))


def parts_section(section: Section) -> None:
    shape, mixture, device = section.sizes.block, section.sizes.mixture, section.device
    for tokens in section.sizes.part_tokens:
        section.row(
            f"experts, {tokens}", partial(part_row, section, lambda t=tokens: parts.experts(mixture, t, device))
        )
        for kind in ("bf16", "fp8", "fp8row", "bf16.compile", "fp8.compile", "fp8row.compile"):
            make = partial(parts.linear, shape, tokens, device, kind)
            section.row(f"matrix, {tokens} {kind}", partial(part_row, section, make), compiles="compile" in kind)
        for kind in ("whole", "chunked"):
            make = partial(parts.loss, shape, tokens, device, kind)
            section.row(f"loss, {tokens} {kind}", partial(part_row, section, make))
        for backend in parts.BACKENDS:
            make = partial(parts.attention, shape, tokens, device, backend)
            section.row(f"attention, {tokens} {backend}", partial(part_row, section, make))


def part_row(section: Section, make: Callable[[], parts.Part]) -> dict[str, Any]:
    device, part = section.device, make()
    for _ in range(section.sizes.warmup):
        part.work()
    held = memory_used(device)
    if device.type == "cuda":
        held = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    seconds = [timed(part.work, device) for _ in range(section.sizes.steps)]
    rate, peak = part.flops / statistics.median(seconds), peak_flops(device, "bf16")
    more = max(0, memory_used(device) - held)
    return {
        "told": f"{statistics.median(seconds) * 1e3:.2f} ms, {rate / 1e12:.0f} TFLOP/s, {rate / peak.flops:.1%} of bf16's "
        f"peak, {more / GIB:.2f} GiB beside what stays",
        "pass_s": common.spread(seconds, 6),
        "flops_per_s": rate,
        "share_of_bf16_peak": round(rate / peak.flops, 4),
        "peak": str(peak),
        "memory_gib": round(more / GIB, 4),
    }


def peer_section(section: Section) -> None:
    for package in ("megatron-core", "torchtitan", "transformer-engine", "transformers"):
        version = peers.installed(package)
        section.row(package, partial(dict, told=version or "not installed", version=version))
    if peers.installed("megatron-core") is None:
        section.row("megatron-core pass", partial(dict, skipped="megatron-core is not installed"))
        return
    for layout in ("bf16", "bf16.compile"):
        section.row(f"megatron-core pass, weft {layout}", partial(pass_row, section, layout))


def pass_row(section: Section, layout: str) -> dict[str, Any]:
    sizes, device = section.sizes, section.device
    batch, seq = sizes.block_runs[0]
    shape = sizes.block.model_copy(update={"num_layers": sizes.peer_layers, "vocab": sizes.peer_vocab})
    config = make_config({"model": shape, "layout": layout, "train": {"global_batch": batch, "seq": seq}})
    tokens = random_tokens(config, device)
    name, other = peers.megatron_pass(shape, tokens)
    woven = filled(config, device).woven
    rows = Rows(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    found = beside(section, {"weft": lambda: woven.train_pass(rows, 1 / (batch * seq)).item(), "peer": other})
    return against(section, name, found, batch * seq, shape.flops_per_token(seq, causal=True))


def beside(section: Section, sides: dict[str, peers.Step]) -> dict[str, list[float]]:
    """Seconds of each side's steps, taking turns, after warm-up."""
    for _ in range(section.sizes.warmup):
        for step in sides.values():
            step()
    return common.alternate(
        {name: partial(timed, step, section.device) for name, step in sides.items()}, section.sizes.rounds
    )


def against(
    section: Section, peer: str, seconds: dict[str, list[float]], tokens: int, flops_per_token: float
) -> dict[str, Any]:
    peak = peak_flops(section.device, "bf16")
    ratio = common.spread([b / a for a, b in zip(seconds["weft"], seconds["peer"], strict=True)])
    rates = {name: common.spread([tokens / s for s in times], 1) for name, times in seconds.items()}
    shares = {name: round(rate["median"] * flops_per_token / peak.flops, 4) for name, rate in rates.items()}
    return {
        "told": f"{ratio['median']:.2f} × {peer} ({ratio['min']:.2f} to {ratio['max']:.2f}); "
        f"{rates['weft']['median']:.0f} tokens/s, peer {rates['peer']['median']:.0f}; "
        f"causal MFU {shares['weft']:.1%}, {shares['peer']:.1%}",
        "peer": peer,
        "ratio": ratio,
        "tokens_per_s": rates,
        "mfu_causal": shares,
        "peak": str(peak),
    }


SECTIONS: dict[str, Callable[[Section], None]] = {
    "parity": parity,
    "verbs": verbs,
    "blocks": blocks,
    "gpt2": gpt2,
    "parts": parts_section,
    "serve": serving.serve,
    "peers": peer_section,
}


# -- the command ------------------------------------------------------------------------------------------------------


def run_section(options: argparse.Namespace, folder: Path) -> None:
    if options.tiny:  # a rehearsal: traced as ever, but no C++ to wait for
        torch.set_num_threads(1)
        torch.compile = partial(torch.compile, backend="aot_eager")
    deadline = time.monotonic() + 60 * options.minutes
    process = start_process(options.device)
    sizes = TINY if options.tiny else GPU
    section = Section(options.section, process.device, sizes, folder, deadline, options.tiny, options.rows)
    try:
        SECTIONS[options.section](section)
    finally:
        stop_process()


def run_all(options: argparse.Namespace, folder: Path) -> bool:
    """Each section in a process of its own; the results of all in one file, after each. Whether all of them ran."""
    began, planned_share = time.monotonic(), 0.0
    found: dict[str, Any] = {}
    for name, share in SHARES.items():
        if options.tiny and name in UNREHEARSED:
            continue
        planned_share += share
        left = began + 60 * options.minutes * planned_share - time.monotonic()
        part = folder / f"gpu_{name}.json"
        part.unlink(missing_ok=True)
        ended = child(name, max(left, 1.0), options)
        rows = json.loads(part.read_text(encoding="utf-8"))["rows"] if part.exists() else {}
        found[name] = {"ended": ended, "rows": rows}
        path = common.write("gpu", {"minutes": options.minutes, "sections": found}, folder=folder)
        part.unlink(missing_ok=True)
    print()
    for name, part_found in found.items():
        for row, values in part_found["rows"].items():
            print(f"{name:7} {row:34} {told(values)}")
        if part_found["ended"] != "whole":
            print(f"{name:7} {part_found['ended']}")
    print(f"{time.monotonic() - began:.0f} s; written: {common.shown(path)}")
    return all(part_found["ended"] == "whole" for part_found in found.values())


def child(name: str, seconds: float, options: argparse.Namespace) -> str:
    """How the process of one section ended."""
    command = [sys.executable, __file__, "--section", name, "--minutes", str(seconds / 60), "--device", options.device]
    command += ["--tiny"] * options.tiny
    try:
        # its rows end by themselves when the time is over; this is for one that hangs
        done = subprocess.run(command, timeout=seconds + 25, check=False)
    except subprocess.TimeoutExpired:
        return f"STOPPED: was not through after {seconds + 25:.0f} s"
    return "whole" if done.returncode == 0 else f"FAILED: its process ended with {done.returncode}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--section", choices=SECTIONS, help="one alone")
    parser.add_argument(
        "--rows", default="", help="with --section: those whose names this is found in, a pattern of re"
    )
    parser.add_argument("--minutes", type=float, default=8.5, help="rows that no longer fit are skipped")
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("there is no CUDA GPU here: nothing to measure")
        return
    if shutil.which("git") is None:  # a copy of the checkout on a bare machine
        common.commit = lambda: "unknown"
    folder = Path(os.environ["OUT"]) if os.environ.get("OUT") else common.RESULTS
    if options.section:
        run_section(options, folder)
    elif not run_all(options, folder):
        sys.exit(1)


if __name__ == "__main__":
    main()

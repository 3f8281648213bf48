"""Claim: one process of weft trains at least as fast as a plain PyTorch loop around transformers' model.

    python benchmarks/train_speed.py                      # both models, fp32 and bf16; about ten minutes on a CPU
    python benchmarks/train_speed.py --models llama --precisions bf16 --compile

Both sides train a model of the same shape on the same tokens, whole steps: forward, backward, clipping, AdamW.

    weft     what `weft train` runs in each step: weft.train.step.train_step, layout `single` or `bf16`
    plain    model(input_ids, labels=labels).loss, backward, clip_grad_norm_, torch.optim.AdamW as it comes; bf16 by
             torch.autocast over fp32 weights; transformers' own settings (sdpa), its dropout set to 0 as in weft
    compile  the layout with `compile`, and torch.compile(model) of the peer (rows of their own, with --compile)

The sides take turns; a ratio is the peer's seconds over weft's, of two steps that were neighbours in time: above 1 weft is
faster. `cpu_ratio` is the same of CPU seconds, the fairer figure where other work shares the cores. `share_of_peak` is
causal model FLOPs over what one square matmul of the precision reaches here with as many threads (train/hardware.py).
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from common import alternate, shown, spread, write
from weft.config.load import make_config
from weft.launch.process import start_process, stop_process
from weft.models.huggingface import config_from_shape
from weft.models.shape import Shape
from weft.parallel.woven import Rows
from weft.train.hardware import peak_flops
from weft.train.step import train_step
from weft.train.training import build

SHAPES = {
    "gpt2": Shape(family="gpt2", num_layers=12, hidden=768, num_heads=12, vocab=50257, max_seq=1024),
    "llama": Shape(num_layers=12, hidden=768, num_heads=12, num_kv_heads=4, ffn=2048, vocab=32000, max_seq=1024),
}
LR, CLIP = 3e-4, 1.0
Step = Callable[[], float]


def by_weft(shape: Shape, layout: str, tokens: Tensor) -> Step:
    batch, seq = tokens.shape[0], tokens.shape[1] - 1
    config = make_config({"model": shape, "layout": layout, "train": {"global_batch": batch, "seq": seq}})
    training = build(config, tokens.device)
    rows = Rows(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())

    def step() -> float:
        return train_step(training.woven, training.optimizer, training.scaler, rows, lr=LR, clip_norm=CLIP).loss

    return step


def by_transformers(shape: Shape, precision: str, compiled: bool, tokens: Tensor) -> Step:
    """The labels are shifted inside of the model; the last token of each row has none, as in weft's targets."""
    settings = config_from_shape(shape) | dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
    kind = settings.pop("model_type")
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **settings))
    model = model.to(tokens.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    run = torch.compile(model) if compiled else model
    low = precision != "fp32"

    def step() -> float:
        with torch.autocast(tokens.device.type, dtype=torch.bfloat16, enabled=low):
            loss = run(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


class Clock:
    """Wall and CPU seconds of each step of one side."""

    def __init__(self, step: Step) -> None:
        self.step, self.cpu, self.losses = step, list[float](), list[float]()

    def __call__(self) -> float:
        wall, cpu = time.perf_counter(), time.process_time()
        self.losses.append(self.step())
        self.cpu.append(time.process_time() - cpu)
        return time.perf_counter() - wall


def compare(shape: Shape, precision: str, compiled: bool, options: argparse.Namespace, device: torch.device) -> dict:
    """One row of the table."""
    stream = torch.Generator().manual_seed(0)
    tokens = torch.randint(shape.vocab, (options.batch, options.seq + 1), generator=stream).to(device)
    layout = (
        ".".join(filter(None, (precision if precision != "fp32" else "", "compile" if compiled else ""))) or "single"
    )
    peer_tokens = tokens[:, :-1].contiguous()  # it shifts them itself: one target fewer a row
    sides: dict[str, Callable[[], float]] = {
        "weft": Clock(by_weft(shape, layout, tokens)),
        "plain": Clock(by_transformers(shape, precision, compiled, peer_tokens)),
    }
    first = {name: side() for name, side in sides.items()}
    walls = alternate(sides, options.rounds)
    peak = peak_flops(device, precision)  # type: ignore[arg-type]
    count = options.batch * options.seq
    row: dict[str, Any] = {"layout": layout, "first_step_s": {name: round(wall, 2) for name, wall in first.items()}}
    for name, seconds in walls.items():
        rate = [count / wall for wall in seconds]
        row[f"{name}_tokens_per_s"] = spread(rate, 1)
        share = [r * shape.flops_per_token(options.seq, causal=True) / peak.flops for r in rate]
        row[f"{name}_share_of_peak"] = spread(share)
    row["ratio"] = spread([b / a for a, b in zip(walls["weft"], walls["plain"], strict=True)])
    cpu = {name: side.cpu[1:] for name, side in sides.items() if isinstance(side, Clock)}
    row["cpu_ratio"] = spread([b / a for a, b in zip(cpu["weft"], cpu["plain"], strict=True)])
    row["peak"] = str(peak)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--compile", action="store_true", help="also both sides compiled")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="of a CPU; all cores by default")
    parser.add_argument("--layers", type=int, help="fewer blocks, for a quick look")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    process = start_process("auto")
    rows = {}
    for name in options.models:
        shape = SHAPES[name].model_copy(update={"num_layers": options.layers} if options.layers else {})
        for precision in options.precisions:
            for compiled in (False, True) if options.compile else (False,):
                rows[f"{name} {precision}{' compile' * compiled}"] = row = compare(
                    shape, precision, compiled, options, process.device
                )
                gc.collect()
                ratio, cpu, share = row["ratio"], row["cpu_ratio"], row["weft_share_of_peak"]
                print(
                    f"{name:6} {row['layout']:14} {ratio['median']:.2f} × plain ({ratio['min']:.2f} to "
                    f"{ratio['max']:.2f}), {cpu['median']:.2f} in CPU seconds; {row['weft_tokens_per_s']['median']:.0f} "
                    f"tokens/s, {share['median']:.0%} of the peak",
                    flush=True,
                )
    stop_process()
    given = {"batch": options.batch, "seq": options.seq, "rounds": options.rounds, "layers": options.layers}
    print(f"written: {shown(write('train_speed', {'input': given, 'rows': rows}, ('torch', 'transformers')))}")


if __name__ == "__main__":
    main()

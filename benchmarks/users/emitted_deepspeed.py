"""A program of a user of DeepSpeed: transformers' model, DeepSpeed's engine, a JSON. It knows nothing of weft.

    torchrun --standalone --nproc-per-node 2 emitted_deepspeed.py FOLDER...

emitted.py starts it, with the Python of an environment that has DeepSpeed. In each folder are settings, model/, and
tokens: a safetensors file with inputs and targets of every step, S B T. Its out/ gets told.json and the weights at the
end, as transformers saves them; or why there are none.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.utils import safe_get_full_fp32_param
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from turns import take_turns


def train(settings: Path, folder: Path, tokens: Path, out: Path) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    for dropout in (module for module in model.modules() if isinstance(module, torch.nn.Dropout)):
        dropout.p = 0.0
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=str(settings))
    micro, passes = engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps()
    told: dict[str, list[float]] = {"losses": [], "rates": [], "norms": []}
    steps = load_file(tokens)
    for inputs, targets in zip(steps["inputs"], steps["targets"], strict=True):
        told["rates"].append(engine.get_lr()[0])
        total = torch.zeros(())
        for number in range(passes):
            start = (rank * passes + number) * micro
            own = slice(start, start + micro)
            logits = engine(input_ids=inputs[own], use_cache=False).logits
            loss = F.cross_entropy(logits.float().flatten(0, 1), targets[own].flatten())
            engine.backward(loss)
            engine.step()
            total += loss.detach()
        dist.all_reduce(total)
        told["losses"].append(total.item() / passes / world)
        norm = engine.get_global_grad_norm()
        told["norms"] += [float(norm)] if norm is not None else []
    weights = {name: whole(parameter).clone() for name, parameter in model.named_parameters()}
    if rank == 0:
        save_file(weights, out / "model.safetensors")
        (out / "config.json").write_text((folder / "config.json").read_text(encoding="utf-8"), encoding="utf-8")
        (out / "told.json").write_text(json.dumps(told), encoding="utf-8")
    dist.barrier()


def whole(parameter: Any) -> torch.Tensor:
    """In fp32, of wherever the engine keeps it."""
    found = safe_get_full_fp32_param(parameter)
    return (parameter if found is None else found).detach().float().cpu()


def main(folders: list[Path]) -> None:
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo", verbose=False)
    take_turns(train, folders)


if __name__ == "__main__":
    main([Path(word) for word in sys.argv[1:]])

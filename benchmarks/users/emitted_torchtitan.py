# ruff: noqa: E402 (torchtitan looks for its device when it is imported)
"""A program of a user of torchtitan 0.2: its Trainer, with data and a flavor of one's own. It knows nothing of weft.

    torchrun --standalone --nproc-per-node 2 emitted_torchtitan.py FOLDER...

emitted.py starts it, with the Python of an environment that has torchtitan. In each folder are settings, model/, and
tokens: a safetensors file with inputs and targets of every step, S B T. Its out/ gets told.json and the weights at the
end, as torchtitan saves them for Hugging Face; or why there are none.

torchtitan trains on GPUs: what asks for one is told here that the CPU is the device.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

torch._utils._get_available_device_type = lambda: "cpu"
os.environ["LOCAL_RANK"] = "0"  # there is one CPU

import torchtitan.models.llama3 as llama3
import torchtitan.models.qwen3 as qwen3
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule
from torchtitan.components import metrics
from torchtitan.config import ConfigManager
from torchtitan.distributed import utils as distributed
from torchtitan.protocols.train_spec import _extra_train_specs, get_train_spec, register_train_spec
from torchtitan.tools import utils
from torchtitan.train import Trainer
from turns import take_turns

SPECS = {"llama3": llama3, "qwen3": qwen3}


class Monitor:
    """Of a device without memory of its own."""

    device_name = "CPU"

    def get_peak_stats(self) -> Any:
        return SimpleNamespace(max_reserved_gib=0.0, max_reserved_pct=0.0, max_active_gib=0.0, max_active_pct=0.0)

    def reset_peak_stats(self) -> None:
        pass


class Told(metrics.MetricsProcessor):
    """Keeps what the Trainer logs."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.told: dict[str, list[float]] = {"losses": [], "rates": [], "norms": []}

    def should_log(self, step: int) -> bool:
        return True

    def log(self, step: int, loss: float, most: float, norm: float, extra_metrics: Any = None) -> None:
        self.told["losses"].append(float(loss))
        self.told["rates"].append(float(extra_metrics["lr"]))
        self.told["norms"].append(norm)
        self.data_loading_times.clear()


class Batches:
    """Each replica's rows of every step, a local batch at a time."""

    def __init__(self, file: Path, world: int, rank: int, local: int) -> None:
        self.steps, self.world, self.rank, self.local = load_file(file), world, rank, local

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        for inputs, targets in zip(self.steps["inputs"], self.steps["targets"], strict=True):
            own = len(inputs) // self.world
            for start in range(self.rank * own, (self.rank + 1) * own, self.local):
                rows = slice(start, start + self.local)
                yield {"input": inputs[rows]}, targets[rows]

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class Kept(Trainer):
    def __init__(self, job_config: Any) -> None:
        super().__init__(job_config)
        for module in (module for part in self.model_parts for module in part.modules()):
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)  # gloo has no sum of products


def add_flavor(settings: Path) -> None:
    """As the remark asks for it."""
    asked = re.search(r'yours to add: (\w+)_args\["(\w+)"\] = (.*)', settings.read_text(encoding="utf-8"))
    assert asked is not None
    name, flavor, arguments = asked.groups()
    words = vars(SPECS[name]) | vars(sys.modules[f"torchtitan.models.{name}.model.args"])
    getattr(SPECS[name], f"{name}_args")[flavor] = eval(arguments, words)


def train(settings: Path, folder: Path, tokens: Path, out: Path) -> None:
    def batches(dp_world_size: int, dp_rank: int, tokenizer: Any, job_config: Any) -> Batches:
        return Batches(tokens, dp_world_size, dp_rank, job_config.training.local_batch_size)

    add_flavor(settings)
    config = ConfigManager().parse_args([
        f"--job.config_file={settings}", f"--job.dump_folder={out}", f"--model.hf_assets_path={folder}",
        "--checkpoint.enable", "--checkpoint.initial_load_in_hf", "--checkpoint.last_save_in_hf",
        f"--checkpoint.initial_load_path={folder}",
    ])  # fmt: skip
    _extra_train_specs.clear()
    spec = replace(
        get_train_spec(config.model.name),
        build_dataloader_fn=batches, build_tokenizer_fn=None, build_metrics_processor_fn=Told,
    )  # fmt: skip
    register_train_spec(config.model.name, spec)
    trainer = Kept(config)
    trainer.train()
    if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:  # it has the last stage
        (out / "told.json").write_text(json.dumps(trainer.metrics_processor.told), encoding="utf-8")
    trainer.close()


def main(folders: list[Path]) -> None:
    torch.set_num_threads(1)
    metrics.build_device_memory_monitor = Monitor
    utils.get_peak_flops = lambda _: 1.0
    distributed.set_pg_timeouts = lambda timeout, parallel_dims: None
    torch.distributed.init_process_group("gloo")
    take_turns(train, folders)


if __name__ == "__main__":
    main([Path(word).resolve() for word in sys.argv[1:]])

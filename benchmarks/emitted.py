"""Claim: what `weft plan layouts --emit` writes is run by that system as weft runs it.

    python -m venv others
    others/bin/pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu
    others/bin/pip install deepspeed==0.19.8 transformers ninja torchtitan==0.2.2
    python benchmarks/emitted.py --python others/bin/python              # six minutes on two cores
    python benchmarks/emitted.py --python others/bin/python --only tp2   # rows of such names, anew

Each row of emitted_cases.py is a small model that weft has trained for two steps, and settings of a run of twelve more from
that checkpoint on. weft trains it, as `weft train` does, over two or four processes; and the other system does, over as
many, from the file that weft has written (rows "read": from a file as others write it, which `weft plan read` has read for
weft), from the same weights, on the same batches: emitted_deepspeed.py and emitted_torchtitan.py, in users/, are its users'
programs, and know nothing of weft.

rate, of the warm-up and later: the largest difference of a step's learning rate, over the peak. loss: the largest
difference of a step, over weft's. Then weft trains once more, on one process, at the rates that the other system told, with
decay of norms and biases as that has it, and with what else its remarks say: what is left is all that they do not. loss,
norm: of the gradients, before clipping; weights: the distance between both ends over the way that weft's went.

Not part of `make test`: DeepSpeed compiles its optimizer on the first run, which takes minutes. If that is killed, a `lock`
stays in a folder of ~/.cache/torch_extensions, on which the next run waits for ever: remove it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from common import ROOT, measured, shown, write
from emitted_cases import BATCH, CASES, STEPS, Case, settings
from weft.checkpoint.region import Region
from weft.checkpoint.weights import WeightsFolder
from weft.config.layout import Layout
from weft.config.load import load_config
from weft.config.toml import config_toml
from weft.config.tree import Config
from weft.data.indexed import IndexedWriter, token_dtype
from weft.launch.local import launch
from weft.launch.process import Process, start_process, stop_process
from weft.plan.emit import systems
from weft.train.data import open_loader
from weft.train.log import read_log
from weft.train.schedule import learning_rate
from weft.train.step import train_step
from weft.train.trainer import Trainer
from weft.train.training import build


@dataclass(frozen=True)
class Trained:
    """What a run told of each step, and where its weights lie at the end."""

    losses: list[float]
    rates: list[float]
    norms: list[float]
    weights: Path


def make_starts(folder: Path, cases: list[Case], process: Process) -> None:
    """Weights to begin with: a checkpoint of two steps of weft, which is a folder as Hugging Face has it."""
    for model in {case.model for case in cases}:
        here = folder / f"starting-{model}"
        here.mkdir()
        config = settings(Case("weft", "single", model, {"kind": "constant"}), here, None)
        config = config.model_copy(update={"train": config.train.model_copy(update={"steps": 2})})
        train(config, process)
        shutil.copytree(end_of(config), folder / f"start-{model}")


def end_of(config: Config) -> Path:
    return max(Path(config.run).glob("checkpoints/step-*")) / "model"


def work(files: list[str]) -> int:
    """One process of weft: what `weft train` does with each file of settings."""
    configs = [load_config([file]) for file in files]
    torch.set_num_threads(1)
    process = start_process("cpu", layout=configs[0].layout)
    for config in configs:
        train(config, process)
    stop_process()
    return 0


def train(config: Config, process: Process) -> None:
    Path(config.run).mkdir(exist_ok=True)
    with Trainer(config, process) as trainer:
        trainer.train()


def weft_told(config: Config) -> Trained:
    log = read_log(config.run)
    return Trained(*([line[name] for line in log] for name in ("loss", "lr", "grad_norm")), end_of(config))


def weft_at(
    config: Config, rates: list[float], empty_steps: int
) -> tuple[list[float], list[float], dict[Region, Tensor]]:
    """weft on one process, at these rates, with decay of norms and biases: losses, norms, weights at the end."""
    alone = Layout.parse(f"single.{config.layout.precision}".removesuffix(".fp32"))
    training = build(config.model_copy(update={"layout": alone}), torch.device("cpu"))
    loader = open_loader(config, "train", check_tokens=False)
    training.optimizer.updates = empty_steps
    for group in training.optimizer.adamw.param_groups:
        group["weight_decay"] = config.optimizer.weight_decay
    losses, norms = [], []
    for step, rate in enumerate(rates):
        rows = training.take(loader.batch(step * config.train.global_batch, training.rows))
        found = train_step(
            training.woven, training.optimizer, training.scaler, rows, lr=rate, clip_norm=config.optimizer.clip_norm
        )
        if not found.finite:
            training.scaler.overflowed(found.loss)
        losses.append(found.loss)
        norms.append(found.grad_norm)
    return losses, norms, {piece.region: piece.data.clone() for piece in training.woven.pieces()}


def prepare(case: Case, folder: Path) -> Config:
    """A row's folder: config.toml for weft; settings, tokens and model for the other system."""
    folder.mkdir()
    config = settings(case, folder, folder.parent / f"start-{case.model}")
    (folder / "config.toml").write_text(config_toml(config), encoding="utf-8")
    written = json.dumps(case.read) if case.read else systems.write(config, case.system).text
    (folder / "settings").write_text(written, encoding="utf-8")
    loader = open_loader(config, "train", check_tokens=False)
    batches = [loader.batch(step * BATCH, range(BATCH)) for step in range(STEPS)]
    words = {"inputs": "tokens", "targets": "targets"}
    arrays = {name: np.stack([getattr(batch, word) for batch in batches]) for name, word in words.items()}
    save_file({name: torch.as_tensor(x).long().contiguous() for name, x in arrays.items()}, folder / "tokens")
    (folder / "model").symlink_to(folder.parent / f"start-{case.model}")
    (folder / "out").mkdir()
    return config


def others(system: str, world: int, folders: list[Path], python: str, logs: Path) -> None:
    """The other system's runs, one after the other in one launch."""
    program = Path(__file__).parent / "users" / f"emitted_{system}.py"
    launch = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world), str(program)]
    path = f"{Path(python).absolute().parent}{os.pathsep}{os.environ['PATH']}"  # as in the activated environment
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "PATH": path}
    with (logs / f"{system}-{world}.log").open("w", encoding="utf-8") as log:
        subprocess.run([*launch, *map(str, folders)], stdout=log, stderr=log, env=environment)


def told(folder: Path) -> Trained:
    """Of the other system. Raises ValueError: its run failed."""
    for file in sorted(folder.glob("out/failed*")):
        raise ValueError(file.read_text(encoding="utf-8").strip())
    if not (folder / "out/told.json").is_file():
        raise ValueError("nothing came back")
    found = json.loads((folder / "out/told.json").read_text(encoding="utf-8"))
    [weights] = {file.parent for file in folder.glob("out/**/*.safetensors") if "sharded" not in str(file)}
    if not (weights / "config.json").exists():
        shutil.copy(folder / "model/config.json", weights)
    return Trained(found["losses"], found["rates"], found["norms"], weights)


def compare(case: Case, folder: Path, config: Config) -> dict[str, float | None]:
    theirs, ours = told(folder), weft_told(config)
    losses, norms, weights = weft_at(config, theirs.rates, case.empty_steps)
    peak, warmup = config.optimizer.lr, max(4, config.schedule.warmup)
    own = [learning_rate(step + 1, config.schedule, peak=peak, steps=config.train.steps) for step in range(STEPS)]
    rates = [abs(one - two) / peak for one, two in zip(own, theirs.rates, strict=True)]
    return {
        "rate_warming": max(rates[:warmup]),
        "rate_later": max(rates[warmup:]),
        "loss_as_it_is": apart(theirs.losses, ours.losses[:STEPS]),
        "loss": apart(theirs.losses, losses),
        "norm": apart(theirs.norms, norms) if theirs.norms else None,
        "weights": far(weights, theirs.weights, folder / "model"),
        "first_loss": ours.losses[0],
        "last_loss": ours.losses[STEPS - 1],
    }


def apart(theirs: list[float], ours: list[float]) -> float:
    return max(abs(one - two) / two for one, two in zip(theirs, ours, strict=True))


def far(weights: dict[Region, Tensor], there: Path, start: Path) -> float:
    """Distance of both ends over the way that ours went."""
    apart = way = 0.0
    with WeightsFolder.open(there) as theirs, WeightsFolder.open(start) as first:
        for region, ours in weights.items():
            apart += float((theirs.read(region, torch.float32) - ours).double().square().sum())
            way += float((first.read(region, torch.float32) - ours).double().square().sum())
    return float((apart / way) ** 0.5)


def write_tokens(folder: Path) -> None:
    """The bytes of the guide."""
    with IndexedWriter(folder / "tokens", token_dtype(256)) as writer:
        for file in sorted((ROOT / "docs").glob("*.md")):
            writer.add(list(file.read_bytes()))


HEAD = f"{'':56} {'rate: warm-up':>13} {'later':>8} {'loss':>8} | at its rates: {'loss':>8} {'norm':>8} {'weights':>8}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, help="of the environment that has the other systems")
    parser.add_argument("--logs", type=Path, help="folder for what the other systems print")
    parser.add_argument(
        "--only", default="", help="rows whose name this expression finds; the others stay as run before"
    )
    options = parser.parse_args()
    chosen = [case for case in CASES if re.search(options.only, case.name)]
    if not chosen:
        parser.error(f"--only {options.only}: no row has such a name. There are {', '.join(c.name for c in CASES)}")
    torch.set_num_threads(1)
    process = start_process("cpu", layout=Layout())
    rows, failed = {}, {}
    with TemporaryDirectory() as temp:
        root = Path(temp)
        write_tokens(root)
        make_starts(root, chosen, process)
        configs = [prepare(case, root / str(number)) for number, case in enumerate(chosen)]
        for world in {config.layout.world for config in configs}:
            alike = [number for number, config in enumerate(configs) if config.layout.world == world]
            files = [str(root / str(number) / "config.toml") for number in alike]
            launch(world, "emitted:work", files, logs=root / "logs", env={"PYTHONPATH": os.pathsep.join(sys.path)})
            for system in {chosen[number].system for number in alike}:
                folders = [root / str(number) for number in alike if chosen[number].system == system]
                others(system, world, folders, options.python, options.logs or root)
        print(HEAD)
        for number, (case, config) in enumerate(zip(chosen, configs, strict=True)):
            try:
                rows[case.name] = row = compare(case, root / str(number), config)
            except ValueError as error:
                failed[case.name] = str(error)
                print(f"{case.name:56} {error}", flush=True)
                continue
            line = f"{case.name:56} {row['rate_warming']:13.1%} {row['rate_later']:8.1%} {row['loss_as_it_is']:8.0e} |"
            norm = "-" if row["norm"] is None else f"{row['norm']:.0e}"
            print(f"{line}              {row['loss']:8.0e} {norm:>8} {row['weights']:8.0e}", flush=True)
    stop_process()
    if options.only:
        before = measured("emitted")
        rows = before.get("rows", {}) | rows
        failed = {name: why for name, why in before.get("failed", {}).items() if name not in rows} | failed
    rows = {case.name: rows[case.name] for case in CASES if case.name in rows and case.name not in failed}
    installed = subprocess.run([options.python, "-c", VERSIONS], capture_output=True, text=True, check=True).stdout
    results = {"command": COMMAND, "others": json.loads(installed), "rows": rows, "failed": failed}
    print(f"written: {shown(write('emitted', results))}")


COMMAND = "python benchmarks/emitted.py --python others/bin/python"
VERSIONS = """import json, importlib.metadata as m
print(json.dumps({n: m.version(n) for n in ("torch", "deepspeed", "torchtitan", "transformers")}))"""


if __name__ == "__main__":
    main()

"""Claim: what `weft plan layouts --emit` writes is run by that system as weft runs it.

    python -m venv others
    others/bin/pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu
    others/bin/pip install deepspeed==0.19.8 transformers ninja torchtitan==0.2.2
    python benchmarks/emitted.py --python others/bin/python              # some twenty minutes on two cores
    python benchmarks/emitted.py --python others/bin/python --only tp2   # rows whose name has this in it, anew

Each row of emitted_cases.py is a small model that weft has trained for two steps and exported, and settings of a run of
twelve more. weft trains it, with `weft train`, over two or four processes; and the other system does, over as many, from
the file that weft has written (rows "read": from a file as others write it, which `weft plan read` has read for weft), from
the same weights, on the same batches: emitted_deepspeed.py and emitted_torchtitan.py are its users' programs, and know
nothing of weft.

rate, of the warm-up and later: the largest difference of a step's learning rate, over the peak. loss: the largest
difference of a step, over weft's. Then weft trains once more, on one process, at the rates that the other system told,
and with the decay of norms and biases that both have: what is left is all that the remarks do not say. loss, norm: of the
gradients, before clipping; weights: the distance between both ends over the way that weft's went.

Not part of `make test`: DeepSpeed compiles its optimizer on the first run, which takes minutes.
"""

from __future__ import annotations

import argparse
import json
import os
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
from weft.config.toml import config_toml
from weft.config.tree import Config
from weft.data.indexed import IndexedWriter, token_dtype
from weft.launch.process import start_process, stop_process
from weft.plan.emit import systems
from weft.train.data import open_loader
from weft.train.log import read_log
from weft.train.schedule import learning_rate
from weft.train.step import train_step
from weft.train.training import build


@dataclass(frozen=True)
class Trained:
    """What a run told of each step, and where its weights lie at the end."""

    losses: list[float]
    rates: list[float]
    norms: list[float]
    weights: Path


def started(model: str, folder: Path) -> Path:
    """Weights to begin with: those of two steps of weft, exported."""
    out = folder / f"start-{model}"
    if not out.exists():
        here = folder / f"starting-{model}"
        here.mkdir()
        config = settings(Case("weft", "single", model, {"kind": "constant"}), here, None)
        config = config.model_copy(update={"train": config.train.model_copy(update={"steps": 2})})
        weft(config, here)
        weft_command("export", str(here / "run"), str(out))
    return out


def weft(config: Config, folder: Path) -> Trained:
    """`weft train`, as it is."""
    (folder / "config.toml").write_text(config_toml(config), encoding="utf-8")
    weft_command("train", str(folder / "config.toml"))
    log = read_log(config.run)
    [weights] = sorted(Path(config.run).glob("checkpoints/step-*"))[-1:]
    return Trained(*([line[name] for line in log] for name in ("loss", "lr", "grad_norm")), weights / "model")


def weft_command(*words: str) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", "weft", *words], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])


def weft_at(config: Config, rates: list[float]) -> tuple[list[float], list[float], dict[Region, Tensor]]:
    """weft on one process, at these rates, with decay of norms and biases: losses, norms, weights at the end."""
    alone = Layout.parse(f"single.{config.layout.precision}".removesuffix(".fp32"))
    training = build(config.model_copy(update={"layout": alone}), torch.device("cpu"))
    loader = open_loader(config, "train", check_tokens=False)
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


def other(case: Case, config: Config, folder: Path, python: str) -> Trained:
    """The other system's run of the same."""
    written = json.dumps(case.read) if case.read else systems.write(config, case.system).text
    (folder / "settings").write_text(written, encoding="utf-8")
    loader = open_loader(config, "train", check_tokens=False)
    batches = [loader.batch(step * BATCH, range(BATCH)) for step in range(STEPS)]
    arrays = {name: np.stack([getattr(batch, word) for batch in batches]) for name, word in WORDS.items()}
    save_file({name: torch.as_tensor(x).long().contiguous() for name, x in arrays.items()}, folder / "tokens")
    out = folder / "out"
    out.mkdir()
    program = Path(__file__).parent / f"emitted_{case.system}.py"
    world = str(config.layout.world)
    launch = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", world, str(program)]
    assert config.train.init_from is not None
    words = [*launch, str(folder / "settings"), config.train.init_from, str(folder / "tokens"), str(out)]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=900)
    if done.returncode or not (out / "told.json").exists():
        raise RuntimeError(f"{done.stdout[-3000:]}{done.stderr[-6000:]}")
    told = json.loads((out / "told.json").read_text(encoding="utf-8"))
    [weights] = {file.parent for file in out.rglob("*.safetensors") if "sharded" not in str(file)}
    if not (weights / "config.json").exists():
        (weights / "config.json").write_text((Path(config.train.init_from) / "config.json").read_text())
    return Trained(told["losses"], told["rates"], told["norms"], weights)


WORDS = {"inputs": "tokens", "targets": "targets"}


def compare(case: Case, folder: Path, python: str) -> dict[str, float]:
    start = started(case.model, folder.parent)
    config = settings(case, folder, start)
    theirs = other(case, config, folder, python)
    ours = weft(config, folder)
    losses, norms, weights = weft_at(config, theirs.rates)
    peak, warmup = config.optimizer.lr, max(4, config.schedule.warmup)
    own = [learning_rate(step + 1, config.schedule, peak=peak, steps=config.train.steps) for step in range(STEPS)]
    rates = [abs(one - two) / peak for one, two in zip(own, theirs.rates, strict=True)]
    return {
        "rate_warming": max(rates[:warmup]),
        "rate_later": max(rates[warmup:]),
        "loss_as_it_is": apart(theirs.losses, ours.losses[:STEPS]),
        "loss": apart(theirs.losses, losses),
        "norm": apart(theirs.norms, norms) if theirs.norms else float("nan"),
        "weights": far(weights, theirs.weights, start),
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
    parser.add_argument("--only", default="", help="rows whose name has this in it; the others stay as run before")
    options = parser.parse_args()
    chosen = [case for case in CASES if options.only in case.name]
    if not chosen:
        parser.error(
            f"--only {options.only}: no row has this in its name. There are {', '.join(c.name for c in CASES)}"
        )
    torch.set_num_threads(1)
    start_process("cpu", layout=Layout())
    rows, failed = {}, {}
    print(HEAD)
    with TemporaryDirectory() as temp:
        write_tokens(Path(temp))
        for number, case in enumerate(chosen):
            folder = Path(temp) / str(number)
            folder.mkdir()
            try:
                rows[case.name] = row = compare(case, folder, options.python)
            except (RuntimeError, ValueError) as error:
                failed[case.name] = str(error).strip().splitlines()[-1]
                print(f"{case.name:56} {error}", flush=True)
                continue
            told = f"{case.name:56} {row['rate_warming']:13.1%} {row['rate_later']:8.1%} {row['loss_as_it_is']:8.0e} |"
            print(f"{told}              {row['loss']:8.0e} {row['norm']:8.0e} {row['weights']:8.0e}", flush=True)
    stop_process()
    if options.only:
        rows = measured("emitted").get("rows", {}) | rows
    rows = {case.name: rows[case.name] for case in CASES if case.name in rows}
    others = subprocess.run([options.python, "-c", VERSIONS], capture_output=True, text=True, check=True).stdout
    print(f"written: {shown(write('emitted', {'others': json.loads(others), 'rows': rows, 'failed': failed}))}")


VERSIONS = """import json, importlib.metadata as m
print(json.dumps({n: m.version(n) for n in ("torch", "deepspeed", "torchtitan", "transformers")}))"""


if __name__ == "__main__":
    main()

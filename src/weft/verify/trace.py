"""A trace: everything that a few training steps compute, on disk as whole tensors, whatever layout computed it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from weft.checkpoint.agreement import Agreement
from weft.checkpoint.region import Piece, Region
from weft.checkpoint.tensors import Entry, TensorFile, create
from weft.config.load import load_config
from weft.config.tree import Config
from weft.data.loader import IGNORED, Batch, Loader, cut
from weft.launch.process import start_process, stop_process
from weft.models.parameters import buffer_sizes, parameter_sizes
from weft.parallel.woven import Rows
from weft.train.data import open_loader
from weft.train.schedule import learning_rate
from weft.train.step import find_gradients, update
from weft.train.training import Training, build
from weft.verify.outputs import OutputRecorder, output_sizes

STEPS = "steps.json"


@dataclass(frozen=True)
class TracedStep:
    """Numbers of one step; its tensors are in `step-N.safetensors`."""

    loss: float
    grad_norm: float
    lr: float
    device: str = "cpu"  # that trained
    copies: dict[str, float] = field(default_factory=dict)  # see strayed


def step_file(folder: Path, step: int) -> Path:
    return folder / f"step-{step}.safetensors"


def main(arguments: list[str]) -> int:
    """Entry of each process: the file with the settings, the number of steps, the folder of the trace."""
    config = load_config(arguments[:1])
    process = start_process(config.train.device, layout=config.layout)
    try:
        record(config, int(arguments[1]), Path(arguments[2]), process.device)
    finally:
        stop_process()
    return 0


def record(config: Config, steps: int, folder: Path, device: torch.device) -> None:
    """Train `steps` steps under the config's layout and write a trace. Every process of the layout calls this.

    `step-0` holds the initial weights; step N's file `grad.<weight>`, after the update `weight.<weight>` and routers'
    `bias.<name>`, and that of step 1 also `output.<module>`: what each part of the model gave, [B, T, D]. Data are the
    config's, or random tokens where it names none.
    """
    training = build(config, device)
    loader = open_loader(config, "train", check_tokens=dist.get_rank() == 0) if config.data.paths else None
    sizes = parameter_sizes(config.model)
    names = {f"weight.{name}": dims for name, dims in sizes.items()}
    write(step_file(folder, 0), names, _pieces(training, "weight"))
    names |= {f"grad.{name}": dims for name, dims in sizes.items()}
    names |= {f"bias.{name}": dims for name, dims in buffer_sizes(config.model).items()}
    traced = []
    for step in range(1, steps + 1):
        rows = step_rows(training, loader, step)
        recorder = OutputRecorder(training) if step == 1 else None
        found = find_gradients(training.woven, training.scaler, rows)
        outputs = recorder.close() if recorder else []
        gradients = _pieces(training, "grad")
        lr = learning_rate(step, config.schedule, peak=config.optimizer.lr, steps=config.train.steps)
        update(
            training.woven,
            training.optimizer,
            training.scaler,
            found,
            lr=lr,
            clip_norm=config.optimizer.clip_norm,
            bias_speed=config.balance.bias_speed,
        )
        entries = names | (output_sizes(config) if recorder else {})
        after = [*_pieces(training, "weight"), *_biases(training)]
        write(step_file(folder, step), entries, [*outputs, *gradients, *after])
        copies = strayed(step_file(folder, step), after)
        traced.append(TracedStep(found.loss, found.grad_norm, lr, device.type, copies))
    if dist.get_rank() == 0:
        (folder / STEPS).write_text(json.dumps([asdict(step) for step in traced]))
    dist.barrier()


class Trace:
    """A trace on disk, read tensor by tensor. A context manager: it holds its files open."""

    def __init__(self, folder: Path) -> None:
        self.steps = [TracedStep(**step) for step in json.loads((folder / STEPS).read_text())]
        self.files = [TensorFile(step_file(folder, step)) for step in range(len(self.steps) + 1)]

    def read(self, step: int, name: str) -> Tensor:
        return self.files[step].read(name)

    def __enter__(self) -> Trace:
        return self

    def __exit__(self, *error: object) -> None:
        for file in self.files:
            file.close()


def write(path: Path, sizes: dict[str, tuple[int, ...]], pieces: Sequence[Piece]) -> None:
    """Every process writes its regions of the tensors of one file, in fp32."""
    if dist.get_rank() == 0:
        create(path, [Entry(name, dims, torch.float32) for name, dims in sizes.items()])
    dist.barrier()
    with TensorFile(path, writable=True) as file:
        for piece in pieces:
            if piece.writes and not piece.region.empty:
                file.write(piece.region.name, piece.data.float(), piece.region.start, piece.region.stop)
    dist.barrier()


def step_rows(training: Training, loader: Loader | None, step: int) -> Rows:
    """This process's rows of step 1, 2, …; random ones where there is no loader."""
    if loader is None:
        return training.take(random_batch(training.config, step, training.rows))
    return training.take(loader.batch((step - 1) * training.config.train.global_batch, training.rows))


def random_batch(config: Config, step: int, rows: range) -> Batch:
    """Some rows of a global batch of random tokens; of documents about 8 tokens long, where the config has their mask.

    The later a row, the fewer targets it has: else a mean of means, over replicas or micro-batches, would pass for the
    mean of all.
    """
    stream = np.random.default_rng((config.train.seed, step))
    size = config.train.global_batch, config.seq + 1
    tokens, chances = stream.integers(config.model.vocab, size=size), stream.random(size)
    documents = (chances < 1 / 8).cumsum(axis=1) if config.data.document_mask else None
    batch = cut(tokens[rows], None if documents is None else documents[rows], np.array(rows))
    if documents is None:
        batch.targets[chances[rows, 1:] < np.linspace(0, 0.5, size[0])[rows, None]] = IGNORED
    return batch


def strayed(path: Path, pieces: Sequence[Piece]) -> dict[str, float]:
    """Tensor that several processes hold → how far any of them is, at most, from what was written. The same everywhere."""
    mine: dict[str, list[float]] = {}
    with TensorFile(path) as file:
        for piece in pieces:
            if not piece.writes and not piece.region.empty:
                written = file.read(piece.region.name, piece.region.start, piece.region.stop)
                apart = float((piece.data.cpu().float() - written).abs().max())
                mine.setdefault(piece.region.name, []).append(apart)
    found: dict[str, list[float]] = {}
    for text in Agreement(dist.group.WORLD).texts(json.dumps(mine)):
        for name, differences in json.loads(text).items():
            found.setdefault(name, []).extend(differences)
    return {name: float(torch.tensor(differences).max()) for name, differences in found.items()}  # NaN is the largest


def _pieces(training: Training, kind: str) -> list[Piece]:
    """Copies of this process's shares of the weights, or of their gradients, under `<kind>.<weight>`."""
    pieces = []
    for weight in training.woven.weights:
        data: Tensor = weight.data if kind == "weight" else weight.grad / training.scaler.scale
        for region, rows in weight.parts:
            named = Region(f"{kind}.{region.name}", region.sizes, region.start, region.stop)
            pieces.append(Piece(named, data[rows].clone(), weight.writes))
    return pieces


def _biases(training: Training) -> list[Piece]:
    """Routers' biases, under `bias.<name>`: whole on every process that has their block."""
    named = training.woven.buffers
    kept = [piece for piece in training.woven.pieces() if piece.region.name in named]
    return [
        Piece(Region.whole(f"bias.{piece.region.name}", piece.region.sizes), piece.data.clone(), piece.writes)
        for piece in kept
    ]

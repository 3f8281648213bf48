"""Proof that two layouts compute the same: loss, what every module gives, every gradient, every updated weight."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from weft.config.layout import Layout
from weft.config.toml import config_toml
from weft.config.tree import Config
from weft.launch.local import launch
from weft.models.parameters import buffer_sizes, parameter_sizes
from weft.train.run import CONFIG
from weft.verify.bounds import (
    BIAS_BOUND,
    BOUNDS,
    EIGHT_BIT_BOUND,
    LOSS_BOUNDS,
    MOVED_BOUND,
    MUON_ROUNDINGS,
    UPDATE_BOUND,
    coarser,
    gradient_error,
    relative,
)
from weft.verify.outputs import heard
from weft.verify.replay import replayed_weights
from weft.verify.trace import Trace, step_file

Progress = Callable[[str, int, int], None]

POLL = 0.2  # seconds

KINDS = {
    "loss": "each step",
    "norm": "all gradients together, each step",
    "output": "each module, first forward pass",
    "gradient": "each weight, each step",
    "weights": "all, over how far they could move",
    "update": "each weight, against a plain optimizer",
    "copy": "what several processes hold, each step",
    "bias": "each router's, each step",
}
"""What is compared, and how the error is counted."""


@dataclass(frozen=True)
class Difference:
    """Of one tensor at one step, or of the loss."""

    kind: str  # one of KINDS
    name: str
    step: int
    error: float  # relative
    bound: float

    @property
    def right(self) -> bool:
        return self.error <= self.bound  # not a number is not right


@dataclass(frozen=True)
class LayoutReport:
    """What was compared of two layouts.

    Attributes:
        modules: whose outputs were compared, in the order of the forward pass.
        parameters: in that order too.
    """

    layouts: tuple[str, str]
    differences: list[Difference]
    modules: list[str]
    parameters: list[str]

    @property
    def right(self) -> bool:
        return all(difference.right for difference in self.differences)

    def worst(self, kind: str, count: int = 1) -> list[Difference]:
        """The largest differences of a kind; what is not a number comes first."""
        found = [difference for difference in self.differences if difference.kind == kind]
        return sorted(found, key=lambda d: -math.inf if math.isnan(d.error) else -d.error)[:count]

    def first_wrong(self) -> str | None:
        """Where the layouts part ways: the first module of the forward pass; if all agree there, what is wrong at the
        earliest step: the weight whose gradient differs, the first counted from the loss backwards; else the first weight
        that was not updated as it should, or that processes hold which do not agree; or the first router's bias."""
        if outputs := self._wrong("output"):
            return f"{min(outputs, key=self.modules.index)} (forward)"
        kinds = [kind for kind in ("gradient", "update", "copy", "bias") if self._wrong(kind)]
        if kinds:
            kind = min(kinds, key=self._first_step)
            wrong = [name for name in self.parameters if name in self._wrong(kind)] or self._wrong(kind)
            return f"{wrong[-1 if kind == 'gradient' else 0]} ({kind})"
        return next((kind for kind in ("norm", "loss", "weights") if self._wrong(kind)), None)

    @property
    def may_be_a_tie(self) -> bool:
        """Whether all is right until a later step's gradients, of a model with experts: where two of them suit a token
        alike, rounding decides which has it, and every gradient behind it is another one."""
        experts = any(".experts." in name for name in self.parameters)
        return experts and self._first_step("gradient") > 1 and not any(map(self._wrong, ("output", "update", "copy")))

    def _wrong(self, kind: str) -> list[str]:
        """Names of what differs at the first step at which something of that kind does."""
        first = self._first_step(kind)
        return [d.name for d in self.differences if d.kind == kind and d.step == first and not d.right]

    def _first_step(self, kind: str) -> int:
        return min((d.step for d in self.differences if d.kind == kind and not d.right), default=0)


class RunFailedError(RuntimeError):
    """A run that was to be compared did not come to its end."""


def verify_layouts(
    config: Config,
    a: Layout,
    b: Layout,
    steps: int,
    folder: Path,
    progress: Progress = lambda what, done, total: None,
) -> LayoutReport:
    """Run `steps` steps of the config's run under each layout, on this machine, and compare all that they compute.

    Args:
        folder: for the traces; they take (2·steps + 1) times the weights in fp32, for each layout.
        progress: is told which layout, the steps that its trace has so far and their total; then what is compared.

    Raises:
        ValueError: a layout does not fit the model or the batch.
        RunFailedError: a run failed; its cause is on stderr.
    """
    sides = []
    for layout in (a, b):  # the second is not to be refused when the first has run
        layout.check(config.model, config.train.global_batch, config.seq)
    for side, layout in (("a", a), ("b", b)):
        cut = config.model_copy(update={"layout": layout})
        where = folder / side
        where.mkdir(parents=True)
        (where / CONFIG).write_text(config_toml(cut))
        arguments = [str(where / CONFIG), str(steps), str(where)]
        with watched(where, steps, progress, f"{side}: {layout}"):
            if launch(layout.world, "weft.verify.trace:main", arguments, logs=where / "logs"):
                raise RunFailedError(f"the run under layout {layout} failed, or was ended")
        sides.append((cut, where))
    return compare(sides[0], sides[1], progress)


@contextmanager
def watched(folder: Path, steps: int, progress: Progress, name: str) -> Iterator[None]:
    """Tells, from a thread, how many steps the trace in `folder` has, as long as the run that writes it goes on."""
    over = threading.Event()

    def watch() -> None:
        last = False
        while not last:
            last = over.wait(POLL)
            progress(name, sum(step_file(folder, step).exists() for step in range(1, steps + 1)), steps)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def compare(
    a: tuple[Config, Path], b: tuple[Config, Path], progress: Progress = lambda what, done, total: None
) -> LayoutReport:
    """Compare the traces of one run under two layouts, tensor by tensor."""
    (config_a, folder_a), (config_b, folder_b) = a, b
    precision = max(config_a.layout.precision, config_b.layout.precision, key=lambda name: BOUNDS[name])
    in_b = heard(config_b.layout, config_b.model)
    modules = [name for name in heard(config_a.layout, config_a.model) if name in in_b]
    with Trace(folder_a) as left, Trace(folder_b) as right:
        kinds = [
            _losses(config_a, left, right, LOSS_BOUNDS[precision]),
            _norms(config_a, left, right, BOUNDS[precision]),
            _outputs(left, right, modules, BOUNDS[precision]),
            _gradients(config_a, left, right, BOUNDS[precision]),
            _weights(config_a, left, right, MOVED_BOUND[precision]),
            _updates(config_a, left),
            _updates(config_b, right),
            _copies(left),
            _copies(right),
            _biases(config_a, left, right) if precision == "fp32" else (),
        ]
        differences: list[Difference] = []
        for number, found in enumerate(kinds):
            progress("comparing", number, len(kinds))
            differences += found
    layouts = (str(config_a.layout), str(config_b.layout))
    return LayoutReport(layouts, differences, modules, list(parameter_sizes(config_a.model)))


def _losses(config: Config, left: Trace, right: Trace, bound: float) -> Iterator[Difference]:
    for step, (one, other) in enumerate(zip(left.steps, right.steps, strict=True), start=1):
        error = abs(one.loss - other.loss) / abs(one.loss)
        yield Difference("loss", "loss", step, error, bound * coarser(config, step))


def _norms(config: Config, left: Trace, right: Trace, bound: float) -> Iterator[Difference]:
    for step, (one, other) in enumerate(zip(left.steps, right.steps, strict=True), start=1):
        error = abs(one.grad_norm - other.grad_norm) / one.grad_norm
        yield Difference("norm", "gradient norm", step, error, bound * coarser(config, step))


def _outputs(left: Trace, right: Trace, modules: list[str], bound: float) -> Iterator[Difference]:
    for name in modules:
        yield Difference(
            "output", name, 1, relative(left.read(1, f"output.{name}"), right.read(1, f"output.{name}")), bound
        )


def _gradients(config: Config, left: Trace, right: Trace, bound: float) -> Iterator[Difference]:
    sizes = parameter_sizes(config.model)
    for step, numbers in enumerate(left.steps, start=1):
        one = numbers.grad_norm / math.sqrt(config.model.num_params)  # one number's share of the whole norm
        drift = coarser(config, step) * apart(left, right, step - 1, sizes)
        for name, dims in sizes.items():
            a, b = (trace.read(step, f"grad.{name}") for trace in (left, right))
            error, more = gradient_error(a, b, one * math.sqrt(math.prod(dims)), drift)
            yield Difference("gradient", name, step, error, bound + more)


def _weights(config: Config, left: Trace, right: Trace, bound: float) -> Iterator[Difference]:
    sizes = parameter_sizes(config.model)
    moved = 0.0
    for step, numbers in enumerate(left.steps, start=1):
        moved += numbers.lr * math.sqrt(config.model.num_params)
        error = apart(left, right, step, sizes, over=moved)
        yield Difference("weights", "all weights", step, error, bound)


def apart(left: Trace, right: Trace, step: int, names: Iterable[str], over: float | None = None) -> float:
    """Norm of the difference of all weights after a step, over their norm or over `over`."""
    difference = size = 0.0
    for name in names:
        a, b = (trace.read(step, f"weight.{name}").double() for trace in (left, right))
        difference, size = difference + float((a - b).square().sum()), size + float(a.square().sum())
    return math.sqrt(difference) / (over or math.sqrt(size))


def _copies(trace: Trace) -> Iterator[Difference]:
    moved = 0.0
    for step, numbers in enumerate(trace.steps, start=1):
        moved += numbers.lr
        for name, difference in numbers.copies.items():
            error = difference / max(float(trace.read(step, name).abs().max()), moved)
            yield Difference("copy", name.partition(".")[2], step, error, UPDATE_BOUND)


def _biases(config: Config, left: Trace, right: Trace) -> Iterator[Difference]:
    for step in range(1, len(left.steps) + 1):
        for name in buffer_sizes(config.model):
            error = relative(left.read(step, f"bias.{name}"), right.read(step, f"bias.{name}"))
            yield Difference("bias", name, step, error, BIAS_BOUND)


def _updates(config: Config, trace: Trace) -> Iterator[Difference]:
    for name, dims in parameter_sizes(config.model).items():
        moved = rounded = 0.0
        for step, (expected, rounding) in enumerate(replayed_weights(config.optimizer, trace, name), start=1):
            moved, rounded = moved + trace.steps[step - 1].lr, rounded + MUON_ROUNDINGS * rounding
            weight = trace.read(step, f"weight.{name}").double()
            size = max(float(expected.abs().max()), moved)
            error = float((weight - expected).abs().max()) / size
            coarse = EIGHT_BIT_BOUND * (step > 1 and config.optimizer.in_8bit(name, dims))
            yield Difference("update", name, step, error, UPDATE_BOUND + (rounded + coarse * moved) / size)

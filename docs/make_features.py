"""Writes features.md, what works with what, from the tests and from what settings refuse: python docs/make_features.py

Nothing here is claimed: a pair works if a test compares a run that has both with one process, and is refused if Config
refuses it. The tests are asked themselves: each is called with a `compared` that notes the settings and runs nothing.
"""

from __future__ import annotations

import inspect
import itertools
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from weft.config.layout import Layout
from weft.config.load import make_config, merge
from weft.config.tree import Config

PAGE = Path(__file__).with_name("features.md")
TESTS = Path(__file__).parents[1] / "tests" / "parallel"
BEGIN = "<!-- Everything from here on is made by docs/make_features.py. -->\n"


@dataclass(frozen=True)
class Feature:
    """Something that a run may have: how to ask for it, and whether one has it."""

    name: str
    layout: dict[str, Any]
    there: Callable[[Config], bool]
    others: dict[str, dict[str, Any]] = field(default_factory=dict)  # settings outside of the layout
    experts: bool = False


def of_layout(name: str, there: Callable[[Any], bool], experts: bool = False, **fields: Any) -> Feature:
    return Feature(name, fields, lambda config: there(config.layout), experts=experts)


def schedule(name: str, **fields: Any) -> Feature:
    return of_layout(name, lambda it: it.pp > 1 and it.schedule == name, pp=2, schedule=name, **fields)


def of_optimizer(name: str, **settings: Any) -> Feature:
    def there(config: Config) -> bool:
        return all(getattr(config.optimizer, key) == value for key, value in settings.items())

    return Feature(name, {}, there, {"optimizer": settings})


FEATURES = [
    of_layout("dp", lambda it: it.dp > 1, dp=2),
    *(of_layout(f"zero{n}", lambda it, n=n: it.fsdp > 1 and it.zero == n, fsdp=2, zero=n) for n in (1, 2, 3)),
    of_layout("hsdp", lambda it: it.dp > 1 and it.fsdp > 1, dp=2, fsdp=2),
    of_layout("tp", lambda it: it.tp > 1, tp=2),
    of_layout("sp", lambda it: it.sp, tp=2, sp=True),
    of_layout("asynctp", lambda it: it.async_tp, tp=2, sp=True, async_tp=True),
    *(
        of_layout(kind, lambda it, kind=kind: it.cp > 1 and it.cp_kind == kind, cp=2, cp_kind=kind)
        for kind in ("allgather", "ring", "ulysses")
    ),
    Feature("experts", {}, lambda config: config.model.experts is not None, experts=True),
    of_layout("ep", lambda it: it.ep > 1, True, ep=2),
    of_layout("etp", lambda it: it.expert_tp > 1 and it.etp is not None, True, etp=2),
    schedule("gpipe"),
    schedule("1f1b"),
    schedule("interleaved", vp=2),
    schedule("bfs", vp=2),
    schedule("zbh1"),
    schedule("zbv"),
    schedule("dualpipev"),
    of_layout("stages", lambda it: bool(it.stages), pp=2, stages=(3, 1)),
    of_layout("mb", lambda it: it.micro_batch is not None, micro_batch=2),
    of_layout("full", lambda it: it.recompute == "full", recompute="full"),
    of_layout("selective", lambda it: it.recompute == "selective", recompute="selective"),
    of_layout("redo", lambda it: it.recompute.startswith("redo"), recompute="redo-mlp"),
    of_layout("offload", lambda it: it.offload, offload=True),
    of_layout("offloadweights", lambda it: it.offload_weights, fsdp=2, offload_weights=True),
    of_layout("offloadoptimizer", lambda it: it.offload_optimizer, offload_optimizer=True),
    of_layout("chunked", lambda it: it.loss == "chunked", loss="chunked"),
    *(
        of_layout(name, lambda it, name=name: it.precision == name, precision=name)
        for name in ("bf16", "fp16", "fp8", "fp8row")
    ),
    Feature(
        "bf16grads",
        {"gradients": "bf16", "precision": "bf16"},
        lambda config: config.layout.gradients == "bf16",
    ),
    of_layout("compile", lambda it: it.compile, compile=True),
    of_optimizer("muon", kind="muon"),
    of_optimizer("8bit", states="8bit"),
    Feature(
        "documents", {}, lambda config: config.data.document_mask, {"data": {"paths": ["x"], "document_mask": True}}
    ),
]
COMPLETIONS: list[dict[str, Any]] = [{}, {"dp": 2}, {"fsdp": 2}, {"dp": 2, "fsdp": 2}, {"etp": 1}, {"tp": 2}]
"""What a pair may need beside itself: processes to deal experts out to."""
MODEL: dict[str, Any] = {
    "family": "llama", "num_layers": 4, "hidden": 64, "num_heads": 4, "num_kv_heads": 4, "ffn": 64, "vocab": 67,
    "max_seq": 32,
}  # fmt: skip
EXPERTS = MODEL | {"family": "mixtral", "experts": {"num_experts": 4, "per_token": 2}}


@dataclass(frozen=True)
class Case:
    """A run that a test compares with one process."""

    test: str
    config: Config
    features: frozenset[str]


# -- what works -------------------------------------------------------------------------------------------------------


def cases() -> Iterator[Case]:
    """Every run that some test of tests/parallel finds right against one process."""
    before = list(sys.path)
    sys.path[:0] = [str(TESTS), str(TESTS.parent)]
    try:
        modules = [import_module(file.stem) for file in sorted(TESTS.glob("test_*.py"))]
    finally:
        sys.path[:] = before
    for module in modules:
        assert Path(str(module.__file__)).parent == TESTS, f"{module.__file__} has the name of a file in {TESTS}"
        for name, function in vars(module).items():
            own = name.startswith("test_") and getattr(function, "__module__", "") == module.__name__
            if own and "compared" in inspect.signature(function).parameters and not hasattr(function, "hypothesis"):
                for config in found_right(function):
                    there = frozenset(feature.name for feature in FEATURES if feature.there(config))
                    yield Case(f"{module.__name__}.{name}", config, there)


def found_right(function: Callable[..., None]) -> Iterator[Config]:
    """Settings that a test calls right, with each of its parameters."""
    needed = inspect.signature(function).parameters
    for parameters in calls(function):
        recorder = Recorder()
        with pytest.MonkeyPatch.context() as patch:
            given = {"compared": recorder, "monkeypatch": patch, "documents": Path("documents")} | parameters
            if set(needed) <= set(given):
                try:
                    function(**{name: given[name] for name in needed})
                except (AssertionError, IndexError):  # it wants to see something wrong found
                    continue
        yield from (report.config for report in recorder.reports if report.asked)


def calls(function: Callable[..., None]) -> Iterator[dict[str, Any]]:
    """The parameters of each call that pytest would make."""
    marks = [mark.args for mark in getattr(function, "pytestmark", []) if mark.name == "parametrize"]
    for values in itertools.product(*(values for _, values in marks)):
        call: dict[str, Any] = {}
        for (names, _), value in zip(marks, values, strict=True):
            call |= {names: value} if isinstance(names, str) else dict(zip(names, value, strict=True))
        yield call


class Recorder:
    """Stands where tests compare runs; all that it is given it calls right."""

    def __init__(self) -> None:
        self.reports: list[Report] = []

    def __call__(self, config: Config) -> Report:
        self.reports.append(Report(config))
        return self.reports[-1]


class Report:
    def __init__(self, config: Config) -> None:
        self.config, self.asked = config, False
        self.layouts = ("single", str(config.layout))

    @property
    def right(self) -> bool:
        self.asked = True
        return True

    def worst(self, kind: str) -> list[Any]:
        return []

    def first_wrong(self) -> None:
        return None


# -- what is refused --------------------------------------------------------------------------------------------------


def exclusive(a: Feature, b: Feature) -> bool:
    """Whether both are values of one setting, or one is but a form of the other."""
    both = [key for key in a.layout.keys() & b.layout.keys() if a.layout[key] != b.layout[key]]
    return bool(both) and not (both == ["precision"] and "bf16grads" in (a.name, b.name))


def refusal(a: Feature, b: Feature) -> str | None:
    """Why no run has both; None: it may."""
    reasons = []
    for completion in COMPLETIONS:
        try:
            make_config(settings(completion, b, a) if b.name == "bf16grads" else settings(completion, a, b))
        except ValueError as error:
            reasons.append(str(error))
        else:
            return None
    return Counter(reasons).most_common(1)[0][0]


def settings(completion: dict[str, Any], *features: Feature) -> dict[str, Any]:
    """A run with these features; where two say something of the same setting, the last one has its way."""
    tree: dict[str, Any] = {
        "model": EXPERTS if any(feature.experts for feature in features) else MODEL,
        "layout": completion,
        "train": {"steps": 10, "global_batch": 16, "seq": 16},
    }
    for feature in features:
        tree = merge(tree, {"layout": feature.layout, **feature.others})
    if "stages" in tree["layout"]:
        processes = Layout(**tree["layout"] | {"stages": ()})
        tree["layout"]["stages"] = (3, 1) if processes.num_stages == 2 else (1,) * processes.num_stages
    return tree


# -- the page ---------------------------------------------------------------------------------------------------------


def made(page: Path = PAGE) -> str:
    """The page as it should be: what is written by hand, then the tables."""
    head, begin, _ = page.read_text(encoding="utf-8").partition(BEGIN)
    assert begin, f"{page} has lost its line {BEGIN!r}"
    found = list(cases())
    signs: dict[tuple[str, str], str] = {}
    proofs, refusals, left = [], [], []
    for a, b in itertools.combinations(FEATURES, 2):
        proved = [case for case in found if {a.name, b.name} <= case.features]
        if proved:
            case = min(proved, key=lambda case: (len(case.features), case.config.layout.world, case.test))
            signs[a.name, b.name] = "✓"
            proofs.append(f"| {a.name} | {b.name} | `{case.config.layout}` | `{case.test}` |")
        elif exclusive(a, b):
            signs[a.name, b.name] = "–"
        elif reason := refusal(a, b):
            signs[a.name, b.name] = "✗"
            refusals.append(f"| {a.name} | {b.name} | {reason} |")
        else:
            signs[a.name, b.name] = "○"
            left.append(f"{a.name} + {b.name}")
    names = [feature.name for feature in FEATURES]
    lines = ["| | " + " | ".join(names[:-1]) + " |", "|---" * len(names) + "|"]
    for row, name in enumerate(names[1:], start=1):
        cells = [signs[other, name] for other in names[:row]] + [""] * (len(names) - 1 - row)
        lines.append(f"| **{name}** | " + " | ".join(cells) + " |")
    counts = {sign: sum(found == sign for found in signs.values()) for sign in "✓✗○–"}
    text = [
        f"\n## The table\n\n{counts['✓']} pairs proved, {counts['✗']} refused, {counts['○']} accepted without a test of "
        f"their own, {counts['–']} that are two values of one setting.\n",
        *lines,
        "\n## Refused, and why\n\n| | | message |\n|---|---|---|",
        *refusals,
        "\n## Accepted, with no test of their own\n\nThe first list to add tests for.\n",
        "; ".join(left) + "." if left else "None.",
        "\n## Proved, by what\n\nOf each pair the tested run with the fewest other features.\n",
        "| | | layout | test |\n|---|---|---|---|",
        *proofs,
    ]
    return head + BEGIN + "\n".join(text) + "\n"


if __name__ == "__main__":
    PAGE.write_text(made(), encoding="utf-8")

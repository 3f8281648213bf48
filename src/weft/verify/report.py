"""How the findings of a proof are shown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from pathlib import Path

    from weft.verify.checkpoint import CheckpointReport
    from weft.verify.continuation import ResumeReport
    from weft.verify.export import ExportReport
    from weft.verify.layout import LayoutReport
    from weft.verify.serve import ServeReport

EQUAL, DIFFERS = Text("equal", "green"), Text("differs", "bold red")


def show_layouts(report: LayoutReport, console: Console, worst: int = 5) -> None:
    """A line for each kind of number that was compared, then the tensors that differ most, then the verdict."""
    from weft.verify.layout import KINDS

    a, b = report.layouts
    table = Table(title=f"{a}  against  {b}", title_justify="left", title_style="bold", box=None, pad_edge=False)
    for heading, justify in (("", "left"), ("compared", "right"), ("worst", "right"), ("bound", "right"), ("", "left")):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    table.add_column("what", style="dim", overflow="fold")
    for kind, meaning in KINDS.items():
        found = [difference for difference in report.differences if difference.kind == kind]
        if found:
            top = report.worst(kind)[0]
            right = all(difference.right for difference in found)
            verdict = Text("equal", "green") if right else Text("differs", "bold red")
            table.add_row(kind, str(len(found)), f"{top.error:.1e}", f"{top.bound:.0e}", verdict, meaning)
    console.print(table)
    console.print()
    console.print(Text("The tensors that differ most", "dim italic"))
    tensors = _table(("gradient of", "left"), ("step", "right"), ("difference", "right"), ("bound", "right"))
    for difference in report.worst("gradient", worst):
        style = "" if difference.right else "bold red"
        cells = (difference.name, str(difference.step), f"{difference.error:.1e}", f"{difference.bound:.0e}")
        tensors.add_row(*cells, style=style)
    console.print(tensors)
    console.print()
    if report.right:
        console.print(Text(f"{b} computes what {a} computes.", "bold green"))
    else:
        words = f"{b} does not compute what {a} computes. They part ways at {report.first_wrong()}."
        console.print(Text(words, "bold red"))
        if report.may_be_a_tie:
            console.print(
                "All was equal at first. Two experts may have suited a token alike, so that rounding chose: see whether it "
                "happens with another seed (--set train.seed=1) too."
            )


def show_resume(report: ResumeReport, console: Console) -> None:
    """Where the run was killed, a line for each kind of number that was compared, and the verdict."""
    from weft.verify.continuation import KINDS

    (a, b), k, death = report.layouts, report.steps, report.death
    doing = f"while saving step {2 * k}" if death.saving else "while training on"
    resumed = "resumed" if report.bitwise else f"resumed under {b}"
    console.print(Text(f"{a}, {2 * k} steps: without a break  against  killed and {resumed}", "bold"))
    console.print(Text(f"SIGKILL {doing}, after step {death.step}; resumed from the checkpoint of step {k}", "dim"))
    if report.deterministic:
        console.print(Text("both with train.deterministic = true, in which a GPU adds in a fixed order", "dim"))
    measured = "differ" if report.bitwise else "worst"
    headings = (("", "left"), ("compared", "right"), (measured, "right"), ("bound", "right"), ("", "left"))
    table = _table(*headings, ("what", "left"))
    for kind, meaning in KINDS.items():
        if found := report.of(kind):
            top = max(found, key=lambda difference: (not difference.right, difference.error))
            error = f"{sum(d.error for d in found):.0f}" if top.bound == 0 else f"{top.error:.1e}"
            bound = "same bits" if top.bound == 0 else f"{top.bound:.0e}"
            verdict = EQUAL if all(difference.right for difference in found) else DIFFERS
            table.add_row(kind, str(len(found)), error, bound, verdict, Text(meaning, "dim"))
    console.print(table)
    console.print()
    wrong = report.first_wrong()
    if wrong is None:
        how = "bit for bit" if report.bitwise else "within the bounds of parity"
        console.print(Text(f"The resumed run is the run without a break, {how}.", "bold green"))
    else:
        where = "the loss" if wrong.name == "loss" else f"{wrong.kind} {wrong.name}"
        words = f"The resumed run is another one. First difference: {where}, step {wrong.step}."
        console.print(Text(words, "bold red"))


def show_checkpoints(reports: Sequence[CheckpointReport], console: Console) -> None:
    """A line for each checkpoint, then every finding."""
    headings = ("step", "layout", "files", "regions", "bytes", "seconds", "")
    table = _table(*((heading, "left" if heading in ("layout", "") else "right") for heading in headings))
    for report in reports:
        verdict = Text("whole", "green") if report.whole else Text("DAMAGED", "bold red")
        counts = [str(report.files), str(report.regions), f"{report.size:,}"] if report.step is not None else ["–"] * 3
        step, layout = str(report.step or "–"), report.layout or "–"
        table.add_row(step, layout, *counts, f"{report.seconds:.1f}", verdict)
    for folder in {report.path.parent for report in reports}:
        console.print(Text(str(folder), "bold"), soft_wrap=True)
    console.print(table)
    if any(report.step is not None for report in reports):
        console.print(Text("Every byte was compared with the sha256 that was written beside it.", "dim"))
    for finding in (finding for report in reports for finding in report.findings):
        console.print(Text(str(finding), "red" if finding.damaging else "yellow"), soft_wrap=True)


def show_export(report: ExportReport, console: Console) -> None:
    """A line for each part that was compared, and the verdict."""
    from weft.verify.export import BOUND

    title = f"{report.folder}: weft's Decoder  against  transformers' {report.model}"
    console.print(Text(title, "bold"), soft_wrap=True)
    console.print(Text(f"{report.num_params:,} parameters, fp32, the same random tokens", "dim"))
    headings = (("output of", "left"), ("norm over norm", "right"), ("largest", "right"), ("bound", "right"))
    table = _table(*headings, ("", "left"))
    for part in report.stages:
        verdict = EQUAL if part.right else DIFFERS
        table.add_row(part.name, f"{part.error:.1e}", f"{part.largest:.1e}", f"{BOUND:.0e}", verdict)
    verdict = EQUAL if report.agreed == report.tokens else DIFFERS
    table.add_row("greedy continuation", f"{report.agreed} of {report.tokens} tokens", "", "all", verdict)
    console.print(table)
    for finding in [*report.misloaded, *(f"passed over, damaged: {finding}" for finding in report.passed_over)]:
        console.print(Text(finding, "yellow"), soft_wrap=True)
    console.print()
    if report.right:
        console.print(Text("transformers computes what weft computes.", "bold green"))
    else:
        words = f"transformers does not compute what weft computes. They part ways at {report.first_wrong()}."
        console.print(Text(words, "bold red"))


def show_serve(report: ServeReport, certificate: Path, console: Console) -> None:
    """Three numbers, their bounds, and the verdict."""
    short = report.dtype.replace("bfloat", "bf").replace("float", "fp")  # as --dtype has it
    console.print(Text(f"{report.folder}: trainer in fp32  against  server in {short}", "bold"), soft_wrap=True)
    where = f"{report.device}, tp {report.tp}, pp {report.pp}" + ", keys and values in 8 bits" * (
        report.cache == "int8"
    )
    console.print(Text(f"{report.tokens} log-probabilities; prompts in parts, shared prefixes, {where}", "dim"))
    table = _table(("log-probabilities", "left"), ("measured", "right"), ("bound", "right"), ("", "left"))
    numbers = (("largest difference", report.largest), ("mean difference", report.mean))
    for (name, value), bound in zip(numbers, report.bounds, strict=True):
        table.add_row(name, f"{value:.1e}", f"{bound:.0e}", EQUAL if value <= bound else DIFFERS)
    verdict = DIFFERS if report.apart else EQUAL
    table.add_row("same most probable token", f"{report.top1:.2%}", "all but ties", verdict)
    console.print(table)
    for finding in report.passed_over:
        console.print(Text(f"passed over, damaged: {finding}", "yellow"), soft_wrap=True)
    console.print()
    words = "The server says what the trainer computes." if report.right else "The server says something else."
    console.print(Text(words, "bold green" if report.right else "bold red"))
    console.print(Text(f"certificate: {certificate}", "dim"), soft_wrap=True)


def _table(*headings: tuple[str, str]) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading, justify in headings:
        table.add_column(heading, justify=justify, overflow="fold")  # type: ignore[arg-type]
    return table

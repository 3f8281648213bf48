"""`weft plan`: what a run will be like, before it is started."""

from __future__ import annotations

import difflib
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from weft.cli.calibrate import calibrate
from weft.cli.exact import exact
from weft.cli.output import Html, writable
from weft.cli.schedule import schedule
from weft.cli.shape import SEQ, length, read_shape
from weft.units import count as number_of

if TYPE_CHECKING:
    from weft.plan.emit.settings import Written


class ModelIsEnough(TyperGroup):
    """`weft plan MODEL` is `weft plan layouts MODEL`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0].startswith("-") and args[0] != "--help":
            raise ValueError(f"weft plan begins with a question or a model, not with {args[0]}: weft plan --help")
        return super().parse_args(ctx, args)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        from weft.presets import preset_names

        named = args[0].endswith(".json") or args[0] in preset_names()
        if not named and args[0] not in self.commands:
            near = difflib.get_close_matches(args[0], [*self.commands, *preset_names()], n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else "`weft models` lists the presets"
            raise ValueError(f"{args[0]!r} is no question (weft plan --help), preset or config.json: {hint}")
        return super().resolve_command(ctx, ["layouts", *args] if named else args)


app = typer.Typer(
    cls=ModelIsEnough,
    help="Say what a run will be like, before it is started. Needs no GPU. weft plan MODEL is weft plan layouts MODEL.",
    epilog="Example: weft plan llama3-70b --cluster h100x512 --batch 1024 --seq 8192",
    no_args_is_help=True,
)


@app.command(epilog="Example: weft plan layouts llama3-70b --cluster h100x512 --batch 1024 --seq 8192 --tokens 15e12")
def layouts(
    model: Annotated[str, typer.Argument(help="A preset (weft models), or any decoder's config.json of Hugging Face.")],
    cluster: Annotated[
        str,
        typer.Option(help="h100x64: a preset and how many GPUs; or a .toml of your own. An unknown name lists them."),
    ],
    batch: Annotated[int, typer.Option(help="Sequences in a step.", min=1)],
    seq: Annotated[int | None, typer.Option(help="Tokens of a sequence.", min=1, show_default=str(SEQ))] = None,
    tokens: Annotated[
        float,
        typer.Option(
            help="Tokens of the whole training: 15e12, or 15T.", parser=number_of, metavar="NUMBER", show_default="1T"
        ),
    ] = 1e12,
    layout: Annotated[str | None, typer.Option(help="Judge this one, instead of looking for the best.")] = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="With --layout: also run one process of it, on tensors without memory.")
    ] = False,
    fp8: Annotated[bool, typer.Option("--fp8", help="Matrix products of 8 bits.")] = False,
    busiest_expert: Annotated[
        float,
        typer.Option(
            help="What the busiest expert is given, in even shares: a run's log says it. 1: all as much.", min=1
        ),
    ] = 1.0,
    what_if: Annotated[
        bool, typer.Option("--what-if", help="Also: larger batches, longer sequences, slower links, a busier expert.")
    ] = False,
    days: Annotated[float | None, typer.Option(help="Also: how many GPUs finish in so many days.")] = None,
    count: Annotated[int, typer.Option(help="Layouts to show.", min=1)] = 10,
    html: Html = None,
    emit: Annotated[
        str | None, typer.Option(help="The best one's settings for weft, megatron, deepspeed, torchtitan or nemo.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="With --emit: into this file, instead of all else on stdout.", callback=writable),
    ] = None,
) -> None:
    """Find the fastest layouts of a model on a cluster that fit into its GPUs, and say why the others lost.

    Predicted from the sizes of the model and the published rates of the GPUs; how near to what others have measured, see
    docs/accuracy.md.
    """
    from rich.console import Console

    from weft.config.layout import Layout
    from weft.config.precision import FP8
    from weft.plan.advice import Question
    from weft.plan.emit.systems import check, fastest, run_of, write
    from weft.plan.machine import read_cluster
    from weft.plan.numbers import WEFT, Job
    from weft.plan.plan import Plan
    from weft.plan.search import search
    from weft.plan.show.findings import show_answers, show_closest, show_plan, show_search
    from weft.plan.show.page import draw_page, draw_plan
    from weft.plan.show.waterfall import slower

    if fp8 and layout is not None:
        raise ValueError(
            f"--fp8 is of a search: say it in --layout {layout} itself, as one of its parts, fp8 or fp8row"
        )
    if days is not None and not 0 < days < math.inf:
        raise ValueError(f"--days {days:g}: name the days that there are, above 0")
    if exact and layout is None:
        raise ValueError("--exact is of one layout: name it with --layout")
    if out is not None and emit is None:
        raise ValueError(f"--out {out}: of which system? Name it with --emit")
    if emit is not None:
        check(emit)
    apart = emit is not None and out is None  # stdout is the settings' alone
    console = Console(stderr=apart)
    console = console if console.is_terminal else Console(stderr=apart, width=160)  # a pipe has no width: cut no column
    shape, machines = read_shape(model, instead=emit is None and not exact), read_cluster(cluster)
    named = Layout.parse(layout) if layout is not None else None
    low = fp8 or (named is not None and named.precision in FP8)
    if low and machines.peak_8bit_tflops <= machines.peak_tflops:
        where = "--fp8" if fp8 else f"--layout {layout}"
        raise ValueError(f"{where}: {machines.title} multiplies 8 bits no faster than 16: leave it out")
    if named is not None and named.compute == "bf16" and machines.precision == "fp16":
        raise ValueError(f"--layout {layout}: {machines.title} multiplies fp16 and no bf16: say fp16 in its place")
    matmul: Literal["16 bit", "fp8"] = "fp8" if low else "16 bit"
    seq = length(seq, shape)
    job = Job(seq=seq, global_batch=batch, tokens=tokens, matmul=matmul, busiest_expert=busiest_expert)
    if named is not None:
        shown: Plan | None = Plan.of(shape, named, job, machines)
    else:
        found = search(shape, job, machines)
        plans = found.best(count)
        show_search(found, plans, console)
        shown = plans[0] if plans else None
    if shown is not None:
        show_plan(shown, console)
        if not shown.fits:
            show_closest(shown, search(shape, job, machines), console)
    if exact and shown is not None:
        from weft.cli.exact import imagined
        from weft.config.load import make_config

        sizes = {"global_batch": batch, "seq": seq, "device": "cuda"}
        imagined(make_config({"model": shape.model_dump(), "layout": shown.layout, "train": sizes}), apart=bool(emit))
    answers = list(Question(shape, job, machines, WEFT, named).answers(shown, days, what_if=what_if))
    if answers:
        show_answers(answers, console)
    if html is not None:
        drawn = draw_plan(shown, model, answers) if named and shown else draw_page(found, plans, model, answers)
        html.write_text(drawn, encoding="utf-8")
        print(f"written: {html}", file=sys.stderr if apart else sys.stdout)
    if emit is not None and named is not None:
        _emit(write(run_of(shape, named, job), emit, machines.per_node), emit, out)
    elif emit is not None:
        chosen, written = fastest(found, emit)
        if shown is not None and chosen.layout != shown.layout:
            line = f"{emit}: the fastest that it can run is {chosen.layout}, which takes {slower(chosen, shown)} time"
            print(line if chosen.sure else f"{line} and fits tightly", file=sys.stderr)
        _emit(written, emit, out)


def _emit(written: Written, system: str, out: Path | None) -> None:
    for remark in written.remarks:
        print(f"{system}: {remark}", file=sys.stderr)
    if out is None:
        print(written.text, end="")
        return
    out.write_text(written.text, encoding="utf-8")
    print(f"written: {out}")


@app.command(epilog="Example: weft plan read pretrain_70b.sh --gpus 512 > run.toml")
def read(
    file: Annotated[Path, typer.Argument(help="Megatron-LM's arguments, or a script with them; or a DeepSpeed JSON.")],
    given: Annotated[
        list[str] | None,
        typer.Argument(help="What the script is started with, and of its environment NAME=VALUE."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="A preset or config.json, if the file does not say.")] = None,
    gpus: Annotated[int | None, typer.Option(help="How many, if the file does not say.", min=1)] = None,
) -> None:
    """Print another system's settings as a config of weft's; what was not understood is named on stderr."""
    from weft.config.toml import config_toml
    from weft.plan.emit.systems import read as read_settings

    config, unknown = read_settings(file, read_shape(model) if model else None, gpus, given or ())
    for argument in unknown:
        print(f"not understood, and left out: {argument}", file=sys.stderr)
    if not config.train.seq:
        print(
            f"the file says no length of sequences: train.seq is the longest of the model, {config.seq}",
            file=sys.stderr,
        )
    print(config_toml(config), end="")


app.command(epilog="Example: weft plan schedule zbv --pp 4 --micro-batches 12 --svg zbv.svg")(schedule)
app.command(epilog="Example: weft plan exact llama3-70b --layout fsdp128.tp8.sp.full.bf16 --batch 128 --seq 8192")(
    exact
)
app.command(epilog="Example: weft plan calibrate --out here.toml")(calibrate)

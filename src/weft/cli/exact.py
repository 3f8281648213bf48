"""`weft plan exact`: one process of a layout, built for real and run for a step on tensors that take no memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from weft.cli.output import Html, writable
from weft.cli.shape import read_shape

if TYPE_CHECKING:
    from weft.config.tree import Config
    from weft.exact.rank import Exact


def exact(
    model: Annotated[
        str,
        typer.Argument(help="A preset (weft models), a Hugging Face config.json, or a config file of weft's (.toml)."),
    ],
    layout: Annotated[str | None, typer.Option(help="fsdp128.tp8.sp.bf16, …; as in the file by default.")] = None,
    batch: Annotated[int | None, typer.Option(help="Sequences in a step.", min=1)] = None,
    seq: Annotated[int | None, typer.Option(help="Tokens of a sequence.", min=1)] = None,
    rank: Annotated[
        int | None, typer.Option(help="Of all processes; by default the first of the fullest stage.")
    ] = None,
    stage: Annotated[int | None, typer.Option(help="Its first process, instead of a rank.", min=0)] = None,
    device: Annotated[str | None, typer.Option(help="Count as on cuda (default) or cpu.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Any setting, as key=value (repeatable).")
    ] = None,
    svg: Annotated[
        Path | None, typer.Option(help="Draw its memory over time into this file.", callback=writable)
    ] = None,
    html: Html = None,
) -> None:
    """Run one process of a layout for a step, without its hardware: memory, messages and FLOPs, as they would be.

    It is the model and the step that `weft train` runs, of any rank among thousands, on tensors that have a size and no
    numbers. Every expert is taken to get as many tokens as any other.
    """
    from weft.config.load import load_config

    if rank is not None and stage is not None:
        raise ValueError(f"--rank {rank} and --stage {stage} both name a process: leave one out")
    if device not in (None, "cpu", "cuda"):
        raise ValueError(f"--device {device} is not known: cuda or cpu")
    short = {"layout": layout, "train.global_batch": batch, "train.seq": seq, "train.device": device}
    given = [(key, value) for key, value in short.items() if value is not None]
    if model.endswith(".toml"):
        config: Config = load_config([model], [*given, *(overrides or [])])
    else:
        config = load_config([], [("model", read_shape(model).model_dump()), *given, *(overrides or [])])
    found = imagined(config, rank, stage)
    if svg is not None or html is not None:
        from weft.exact.picture import draw_page, draw_svg

        for path, draw in ((svg, draw_svg), (html, draw_page)):
            if path is not None:
                path.write_text(draw(found), encoding="utf-8")
                print(f"written: {path}")


def imagined(config: Config, rank: int | None = None, stage: int | None = None, *, apart: bool = False) -> Exact:
    """Run a process and show it. `apart`: on stderr, where stdout is something else's."""
    from rich.console import Console

    from weft.cli.bar import progress_bar
    from weft.exact.rank import imagine_rank
    from weft.exact.report import show

    device: Literal["cpu", "cuda"] = "cpu" if config.train.device == "cpu" else "cuda"
    rank = chosen_rank(config, stage, device) if rank is None else rank
    with progress_bar() as progress:
        found = imagine_rank(config, rank, device, lambda done, total: progress("passes through blocks", done, total))
    console = Console(stderr=apart)
    show(found, console if console.is_terminal else Console(stderr=apart, width=118))
    return found


def chosen_rank(config: Config, stage: int | None, device: Literal["cpu", "cuda"]) -> int:
    """The first rank of a stage; of the one that takes most by the plan, where none is named.

    Raises:
        ValueError: there is no such stage.
    """
    from weft.plan.memory.moments import layout_memory

    layout = config.layout
    if stage is None:
        stage = max(layout_memory(config, device), key=lambda memory: memory.peak.tensors).stage.index
    if stage >= layout.pp:
        raise ValueError(f"--stage {stage}: layout {layout} has stages 0 to {layout.pp - 1}")
    return stage * (layout.world // layout.pp)

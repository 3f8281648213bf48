"""`weft tune`: the plan's best layouts, run for real; the fastest as a config."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from weft.cli.train import Data, LayoutText, Model, Set, Settings, check


def tune(
    settings: Settings = None,
    cluster: Annotated[
        str, typer.Option(help="A cluster file (`weft plan calibrate` makes one), or a preset and a number: h100x8.")
    ] = "cluster.toml",
    model: Model = None,
    layout: LayoutText = None,
    data: Data = None,
    batch: Annotated[int | None, typer.Option(help="Sequences in a step (train.global_batch).")] = None,
    seq: Annotated[int | None, typer.Option(help="Tokens of a sequence (train.seq).")] = None,
    overrides: Set = None,
    top: Annotated[int, typer.Option(help="Layouts to try: the plan's best.", min=1)] = 6,
    steps: Annotated[int, typer.Option(help="Steps of each that count; two more come before.", min=1)] = 5,
    limit: Annotated[float, typer.Option(help="Seconds that one trial may take, its start among them.", min=1)] = 300,
    out: Annotated[Path, typer.Option(help="The config to write; its table goes beside it.")] = Path("tuned.toml"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be tried; run nothing.")] = False,
) -> None:
    """Run the layouts that the plan thinks best for a few steps each, and write the fastest as a config.

    The layout of the settings is tried too, where it takes the whole cluster; its precision, loss, offloading and compile
    are kept. A trial that runs out of memory, crashes or hangs is a row of the table. Ctrl-C leaves what was measured, and
    the same command goes on from there. Without data: random tokens.
    """
    from rich.console import Console

    from weft.config.load import load_config
    from weft.plan.machine import read_cluster
    from weft.plan.report import chosen_device
    from weft.tune.candidates import candidates
    from weft.tune.table import Row, TuneTable, digest, show_table
    from weft.tune.tune import table_file, try_all, write_winner

    if out.suffix != ".toml":
        raise ValueError(f"--out {out}: what is written is a config for `weft train`, a .toml")
    short = {
        "model.preset": model, "layout": layout, "data.paths": data or None, "train.global_batch": batch, "train.seq": seq,
    }  # fmt: skip
    given = [(key, value) for key, value in short.items() if value is not None]
    config = load_config(settings or [], [*given, *(overrides or [])])
    console = Console()
    console = console if console.is_terminal else Console(width=160)
    found = candidates(config, read_cluster(cluster), top, chosen_device(config))
    table = TuneTable.read(table_file(out), digest(config, steps)).planned(found)
    if dry_run:
        show_table(table, console)
        return

    if config.data.paths:
        check(config)

    def told(row: Row, number: int, count: int) -> None:
        line = f"trial {number} of {count}: {row.layout}, predicted {row.predicted_seconds:.4g} s"
        console.print(line, highlight=False)

    try:
        table = try_all(config, table, steps, limit, out, told)
    except KeyboardInterrupt:
        kept = TuneTable.read(table_file(out), table.of)
        show_table(kept if kept.rows else table, console)
        console.print(f"stopped; what was measured is in {table_file(out)}: the same command goes on from there")
        raise typer.Exit(130) from None
    show_table(table, console)
    winner = write_winner(config, table, out)
    console.print(f"written: {out} ({winner.layout}), {table_file(out)}\ntrain it: weft train {out}", highlight=False)

"""`weft tune`: the plan's best layouts, run for real; the fastest as a config."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from weft.cli.options import Data, LayoutText, Model, Set, Settings
from weft.cli.output import writable
from weft.cli.train import check


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
    top: Annotated[int, typer.Option(help="Layouts of the plan to try.", min=1)] = 6,
    steps: Annotated[
        int,
        typer.Option(help="Steps of a first trial that count; two more come before. Later trials are longer.", min=1),
    ] = 5,
    limit: Annotated[float, typer.Option(help="Seconds that one trial may take, its start among them.", min=1)] = 300,
    vary: Annotated[
        bool,
        typer.Option("--vary/--no-vary", help="At the end, change the winner: micro-batch, compile, asynctp."),
    ] = True,
    out: Annotated[
        Path,
        typer.Option(help="The config to write; its table (.json) and picture (.svg) go beside it.", callback=writable),
    ] = Path("tuned.toml"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be tried; run nothing.")] = False,
) -> None:
    """Run the layouts that the plan thinks best for a few steps each, and write the fastest as a config.

    After each trial the plan is corrected by what was measured, and the next layout is the best by that. Then the faster
    half is run again for twice as many steps, and so on; what is left is varied in what no plan knows. The layout of the
    settings is tried too, where it takes the whole cluster; its precision is kept, and loss and offloading where it names
    them. A trial that runs out of memory, crashes or hangs is a row of the table. Ctrl-C leaves what was measured, and the
    same command goes on from there. Without data: random tokens.

    Inside of a Slurm allocation of several nodes (salloc, sbatch) trials run on all of it; --out is on a shared disk then.
    """
    from rich.console import Console

    from weft.config.load import load_config
    from weft.plan.machine import read_cluster
    from weft.plan.show.report import chosen_device
    from weft.tune.candidates import Candidates
    from weft.tune.table import Row, TuneTable, digest, set_aside, show_table
    from weft.tune.tune import Session, picture_file, planned_anew, table_file, write_winner

    if out.suffix != ".toml":
        raise ValueError(f"--out {out}: what is written is a config for `weft train`, a .toml")
    short = {
        "model.preset": model, "layout": layout, "data.paths": data or None, "train.global_batch": batch, "train.seq": seq,
    }  # fmt: skip
    given = [(key, value) for key, value in short.items() if value is not None]
    config = load_config(settings or [], [*given, *(overrides or [])])
    console = Console()
    console = console if console.is_terminal else Console(width=160)
    machines = read_cluster(cluster)
    device = chosen_device(config)
    if device == "cpu" and machines.runs_on == "cuda":
        raise ValueError(
            f"--cluster {cluster} is of GPUs, and trials would run on the CPU: measure this machine with `weft plan "
            'calibrate`, or write device = "cpu" into a cluster file of yours; or, if the nodes have GPUs and this one has '
            "none, set train.device = cuda"
        )
    candidates = Candidates(config, machines, device)
    first = candidates.first(top)
    if layout is not None and candidates.own is None:
        print(
            f"weft: warning: {config.layout} takes {config.layout.world} processes and the cluster has {machines.gpus}: it "
            "is not among those that are tried",
            file=sys.stderr,
        )
    trials_of = digest(config, steps, machines.gpus)
    if config.data.paths and not dry_run:
        check(config, resume=False)
    if not dry_run and (kept := set_aside(table_file(out), trials_of)):
        print(
            f"weft: {table_file(out)} is of another model, batch, data, number of processes or --steps: it is kept as "
            f"{kept}, until that is tuned again",
            file=sys.stderr,
        )
    table = planned_anew(TuneTable.read(table_file(out), trials_of), candidates)
    if dry_run:
        for one in first:
            table = table if table.row(str(one.layout)) else table.with_row(Row.of(one, one.seconds))
        show_table(table, console)
        return

    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False)

    session = Session(config, candidates, table, top, steps, limit, out, say)
    try:
        session.run(vary=vary)
    except KeyboardInterrupt:
        if not table_file(out).exists():
            say("stopped before anything was measured")
            raise typer.Exit(130) from None
        show_table(session.table, console)
        say(f"stopped; what was measured is in {table_file(out)}: the same command goes on from there")
        raise typer.Exit(130) from None
    show_table(session.table, console)
    winner = write_winner(config, session.table, out)
    say(f"written: {out} ({winner.layout}), {table_file(out)}, {picture_file(out)}\ntrain it: weft train {out}")

"""`weft plan calibrate`: measure the machine, for a plan that knows it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from weft.cli.output import writable


def calibrate(
    out: Annotated[
        Path,
        typer.Option(help="The cluster file to write, or with --from-run to change; a .toml.", callback=writable),
    ] = Path("cluster.toml"),
    processes: Annotated[
        int | None, typer.Option(help="At work at once, as in training; by default one a GPU, else one a core.", min=1)
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer sizes: a minute in place of several, and coarser.")
    ] = False,
    from_run: Annotated[
        list[Path] | None,
        typer.Option(help="Measure nothing: fit the file to the log of this finished run (repeatable)."),
    ] = None,
) -> None:
    """Measure products, attention, memory, messages and updates on this machine, and write them as a cluster file.

    `weft plan layouts` and `weft tune` take it as --cluster, and then predict from what was measured. All processes
    work at once while they are measured: what they take from each other is part of the machine. Over several machines:
    torchrun … -m weft.launch.worker weft.tune.calibrate:main auto full FILE.toml
    """
    if out.suffix != ".toml":
        raise ValueError(f"--out {out}: a cluster file ends with .toml, so that --cluster knows it from a preset")
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"--device {device} is not known: auto, cpu or cuda")
    if from_run:
        _refit(out, from_run)
        return
    from weft.launch.local import launch

    count = _processes(processes, device)
    with tempfile.TemporaryDirectory() as logs:
        code = launch(
            count, "weft.tune.calibrate:main", [device, "quick" if quick else "full", str(out)], logs=Path(logs)
        )
    if code:
        raise typer.Exit(code)
    print(f"written: {out}\nplan with it: weft plan layouts MODEL --cluster {out} --batch N")


def _refit(out: Path, runs: list[Path]) -> None:
    from weft.plan.machine import read_cluster
    from weft.plan.show.text import write_cluster
    from weft.plan.time.refit import read_runs, refit

    fit = refit(read_cluster(str(out)), read_runs(runs))
    write_cluster(fit.cluster, out)
    print("\n".join(fit.lines()) + f"\nwritten: {out}")


def _processes(asked: int | None, device: str) -> int:
    """As many as were asked for; else one for each GPU that this process may use, or for each core.

    Raises:
        ValueError: GPUs are to be measured, and there are too few.
    """
    from weft.launch.cores import num_cores

    if device == "cpu":
        return asked or num_cores()
    import torch

    gpus = torch.cuda.device_count()
    if device == "cuda" and gpus < (asked or 1):
        raise ValueError(
            f"--device cuda takes a GPU for each process, and PyTorch {torch.__version__} sees {gpus} here: "
            "give fewer --processes, or --device cpu"
        )
    return asked or gpus or num_cores()

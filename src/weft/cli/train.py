"""`weft train`: from settings to a trained, deployable model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from weft.cli.options import Data, LayoutText, Model, Set, Settings

if TYPE_CHECKING:
    from weft.config.tree import Config
    from weft.profile.request import Request


def train(
    settings: Settings = None,
    model: Model = None,
    layout: LayoutText = None,
    data: Data = None,
    tokenizer: Annotated[str | None, typer.Option(help="Goes into every checkpoint (data.tokenizer).")] = None,
    run: Annotated[str | None, typer.Option(help="Folder of the run (run).")] = None,
    steps: Annotated[int | None, typer.Option(help="train.steps")] = None,
    batch: Annotated[
        int | None, typer.Option(help="Sequences in a step over all processes (train.global_batch).")
    ] = None,
    seq: Annotated[int | None, typer.Option(help="Tokens of a sequence (train.seq).")] = None,
    lr: Annotated[float | None, typer.Option(help="optimizer.lr")] = None,
    seed: Annotated[int | None, typer.Option(help="train.seed")] = None,
    init_from: Annotated[str | None, typer.Option(help="Hugging Face folder to start from (train.init_from).")] = None,
    overrides: Set = None,
    profile: Annotated[
        str | None,
        typer.Option(help="Take a trace of these steps: 10:13, or 3 once the run is warm. See weft profile report."),
    ] = None,
    profile_ranks: Annotated[
        str | None, typer.Option(help="On which ranks: 0,1,4 or all; by default all of one replica, at most 8.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where the run in this folder stands.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print settings, parameters, memory and layout; start nothing.")
    ] = False,
    exact: Annotated[
        bool,
        typer.Option("--exact", help="With --dry-run: also run one process for a step, on tensors without memory."),
    ] = False,
) -> None:
    """Train a model, on as many processes as the layout takes.

    Ctrl-C (or SIGTERM) saves at the end of the step and leaves; --resume goes on. Works under torchrun too:
    torchrun --nproc-per-node 4 -m weft train CONFIG.toml --layout fsdp2.tp2
    """
    from weft.config.load import load_config

    short = {
        "model.preset": model, "layout": layout, "data.paths": data or None, "data.tokenizer": tokenizer, "run": run,
        "train.steps": steps, "train.global_batch": batch, "train.seq": seq, "optimizer.lr": lr, "train.seed": seed,
        "train.init_from": init_from,
    }  # fmt: skip
    given = [(key, value) for key, value in short.items() if value is not None]
    config = load_config(settings or [], [*given, *(overrides or [])])
    if dry_run:
        from weft.plan.show.report import print_plan

        print_plan(config)
        if exact:
            from weft.cli.exact import imagined

            imagined(config, apart=True)
        return
    if exact:
        raise ValueError("--exact is a part of --dry-run: add that")
    request = wanted(config, profile, profile_ranks)
    check(config, resume)
    raise typer.Exit(start(config, resume, request))


def wanted(config: Config, steps: str | None, ranks: str | None) -> Request | None:
    """The request for a trace. Raises: ValueError: it is none of this run's."""
    from weft.profile.request import Request, parse_ranks, parse_steps

    if steps is None:
        if ranks is not None:
            raise ValueError(f"--profile-ranks {ranks}: of which steps? Name them with --profile")
        return None
    first, count = parse_steps(steps)
    if first + count - 1 > config.train.steps:
        raise ValueError(f"--profile {steps}: the run ends with step {config.train.steps}: raise train.steps")
    return Request(first, count, parse_ranks(ranks, config.layout))


def check(config: Config, resume: bool) -> None:
    """Look at all that a checkpoint and a step will need before any process is started: what is wrong is said at once."""
    from weft.models.places import check_expressible
    from weft.train.data import open_loader
    from weft.train.words import check_tokenizer

    check_expressible(config.model)
    if config.train.init_from is not None and not resume:
        check_beginning(Path(config.train.init_from))
    loader = open_loader(config, "train", check_tokens=True)
    check_tokenizer(config, loader)
    if config.train.eval_every:
        open_loader(config, "valid", check_tokens=False)


def check_beginning(path: Path) -> None:
    """
    Raises:
        ValueError: no weights are there; names those of a run or a checkpoint.
    """
    from weft.serve.folder import find_model

    folder, _ = find_model(path)
    if folder != path:
        raise ValueError(f"train.init_from = {path} is no Hugging Face folder: name the one in it, {folder}")


def start(config: Config, resume: bool, request: Request | None) -> int:
    """Claim the run's folder, and train: in processes of our own, or in this one where torchrun has started it."""
    from weft.launch.local import launch
    from weft.profile.request import leave
    from weft.train.run import CONFIG, Run

    folder = Run(Path(config.run))
    if "RANK" in os.environ:
        from weft.train.trainer import run

        if os.environ["RANK"] != "0":
            run(config)
        else:
            with folder.held():
                folder.claim(config, resume)
                leave(request, folder.path)
                run(config)
        return 0
    with folder.held():
        folder.claim(config, resume)
        leave(request, folder.path)
        code = launch(config.layout.world, "weft.train.trainer:main", [str(folder.path / CONFIG)], logs=folder.logs)
    if code == 0:
        finish(folder.path)
    return code


def finish(run: Path) -> None:
    """The picture of the losses, and what to do next."""
    from weft.checkpoint.folder import checkpoints
    from weft.train.curve import draw_curves
    from weft.train.heatmap import draw_routing
    from weft.train.log import ROUTING

    newest = checkpoints(run / "checkpoints")[0]
    picture = draw_curves([run], run / "loss.png")
    if (run / ROUTING).exists():
        print(f"experts    {draw_routing(run, run / 'routing.png')}")
    print(f"losses     {picture}\ncheckpoint {newest}\nprompt it  weft generate {newest} '...'")

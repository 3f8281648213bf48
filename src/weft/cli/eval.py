"""`weft eval`: what a model scores: perplexity of texts, tasks as files, tasks of lm-eval."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from weft.cli.options import Device, Dtype
from weft.cli.prompt import GOES_ON, AtOnce, Key, ModelName, Url


def evaluate(
    checkpoint: Annotated[
        Path | None,
        typer.Argument(metavar="[CHECKPOINT]", help="A checkpoint, a run (its newest) or a Hugging Face directory."),
    ] = None,
    text: Annotated[
        list[Path] | None, typer.Option(help="Perplexity of this text, or of token files by their prefix; repeatable.")
    ] = None,
    window: Annotated[
        int | None, typer.Option(help="Tokens of a text read at once. Default: all that fit.", min=2)
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(help="Slide the window by so many tokens: each has more before it. Default: side by side.", min=1),
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Of each text, the first so many.", min=2)] = None,
    task: Annotated[list[Path] | None, typer.Option(help="A task file (docs/eval.md); repeatable.")] = None,
    lm_eval: Annotated[
        list[str] | None,
        typer.Option(help="A task of EleutherAI's harness, which must be installed; needs --url; repeatable."),
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="For --lm-eval: the served model's folder, checkpoint or run; its tokenizer.")
    ] = None,
    include: Annotated[Path | None, typer.Option(help="For --lm-eval: a folder with tasks of your own.")] = None,
    shots: Annotated[int | None, typer.Option(help="For --lm-eval: examples before each question.", min=0)] = None,
    limit: Annotated[int | None, typer.Option(help="Rows of each task, the first so many.", min=1)] = None,
    url: Url = "",
    model: ModelName = "",
    api_key: Key = "",
    out: Annotated[Path | None, typer.Option(help=f"Write the scores to this JSON file. {GOES_ON}")] = None,
    at_once: AtOnce = 16,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Score a model, in this process or behind a server. Every score comes with its standard error."""
    from rich.console import Console

    from weft.cli.bar import progress_bar
    from weft.cli.scores import make_room, wide, write_json
    from weft.prompt.harness import ask_server, run_lm_eval
    from weft.prompt.open import open_model
    from weft.prompt.perplexity import find_text, perplexity, read_tokens
    from weft.prompt.report import show_measures
    from weft.prompt.task import check_task, read_task, run_task

    if not (text or task or lm_eval):
        raise ValueError("nothing to score: give a --text, a --task or, with --url, an --lm-eval task")
    if lm_eval and not url:
        raise ValueError("--lm-eval asks over HTTP: start `weft serve` on the checkpoint, and give its --url")
    if not text and (window or stride or max_tokens):
        raise ValueError("--window, --stride and --max-tokens are about a --text, and there is none")
    if not (task or lm_eval) and limit:
        raise ValueError(
            "--limit is about a --task or an --lm-eval task, and there is none; for a --text: --max-tokens"
        )
    if lm_eval and tokenizer is None:
        raise ValueError(
            "--lm-eval counts tokens itself: name the served model's folder or checkpoint with --tokenizer"
        )
    if not lm_eval and (tokenizer or include or shots is not None):
        raise ValueError("--tokenizer, --include and --shots are about an --lm-eval task, and there is none")
    make_room(out)
    for path in text or []:
        find_text(path)  # before a model is loaded
    tasks = [read_task(path) for path in task or []]
    for one in tasks:
        check_task(one, limit)
    foreseen, measures = [], []
    with open_model(checkpoint, url, model, api_key, at_once, device, dtype, out) as there:
        with progress_bar() as progress:
            longest = ask_server(tokenizer, there) if tokenizer else None
            for path in text or []:
                name, ids, num_bytes = read_tokens(path, there, max_tokens)
                foreseen.append(perplexity(name, ids, num_bytes, there, window, stride, progress))
            for one in tasks:
                measures += run_task(one, there, limit, progress)
        if lm_eval and tokenizer:
            measures += run_lm_eval(lm_eval, url, there.name, tokenizer, longest, api_key, limit, include, shots)
        show_measures(measures, foreseen, wide(Console()))
        if out is not None:
            texts = [asdict(one) | {"perplexity": one.perplexity} for one in foreseen]
            write_json(out, {"model": there.name, "texts": texts, "tasks": [asdict(one) for one in measures]})

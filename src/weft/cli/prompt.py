"""`weft prompt`: prompts as files; asked, compared, improved, talked with."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from weft.cli.options import Device, Dtype

if TYPE_CHECKING:
    from weft.prompt.file import Prompt, Row
    from weft.prompt.score import Answer

app = typer.Typer(
    help="Prompts as versioned files: run them, compare them with intervals, search for better ones, chat.\n\n"
    "The model is a checkpoint in this process, or behind any OpenAI-compatible server.",
    no_args_is_help=True,
)

PromptFile = Annotated[Path, typer.Argument(metavar="PROMPT", help="A prompt file (`weft prompt new` writes one).")]
Checkpoint = Annotated[
    Path | None,
    typer.Option(help="A checkpoint, a run (its newest) or a Hugging Face directory, asked in this process."),
]
Url = Annotated[str, typer.Option(help="Or an OpenAI-compatible server: http://HOST:PORT/v1.")]
ModelName = Annotated[str, typer.Option(help="The served model; left out: the server's only one.")]
Key = Annotated[str, typer.Option(envvar="OPENAI_API_KEY", help="That the server wants.", show_default=False)]
AtOnce = Annotated[int, typer.Option(help="Requests that the server gets at once.", min=1)]
PriceIn = Annotated[float, typer.Option(help="Price of a million tokens of prompts.", min=0)]
PriceOut = Annotated[float, typer.Option(help="Price of a million new tokens.", min=0)]

GOES_ON = "If this breaks off, the same command goes on from the answers that came (kept in ….part beside it)."


@app.command(epilog="Example: weft prompt run mood.toml --checkpoint runs/small --set text='I laughed all evening.'")
def run(
    prompt: PromptFile,
    checkpoint: Checkpoint = None,
    url: Url = "",
    model: ModelName = "",
    api_key: Key = "",
    values: Annotated[
        list[str] | None, typer.Option("--set", help="A field of the question, name=value; repeatable.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Ask about each row of this file of JSON lines instead.")] = None,
    out: Annotated[
        Path | None, typer.Option(help=f"Write rows and answers to this file, as JSON lines. {GOES_ON}")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be asked; ask nobody.")] = False,
    at_once: AtOnce = 16,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Put a prompt to a model, and read the answers out of what comes back."""
    from weft.cli.bar import progress_bar
    from weft.cli.scores import make_room, write_answers
    from weft.prompt.file import read_prompt, read_rows
    from weft.prompt.open import open_model
    from weft.prompt.score import ask

    asked = read_prompt(prompt)
    if data is not None and values:
        raise ValueError("--set is one question, --data a file of them: give one of the two")
    rows = read_rows(data) if data is not None else [fields(values or [])]
    if dry_run:
        show_asked(asked, rows)
        return
    make_room(out)
    came: dict[int, Answer] = {}
    with open_model(checkpoint, url, model, api_key, at_once, device, dtype, out) as there:
        try:
            with progress_bar() as progress:
                answers, seconds = ask(asked, rows, there, progress, came)
        finally:  # whatever went wrong
            if out is not None and came:
                write_answers(out, asked, rows, came)
    for one in answers:
        if one.answer is None:
            print(f"weft: warning: no answer has its form; the first is {one.reply.texts[0]!r}", file=sys.stderr)
        print(one.answer if one.answer is not None else "")
    tokens, cut = sum(one.reply.new_tokens for one in answers), sum(one.reply.cut for one in answers)
    cut_off = f"; cut off by max_tokens or the context's end: {cut}" if cut else ""
    print(f"{len(rows)} asked, {tokens} new tokens, {seconds:.2f} s{cut_off}", file=sys.stderr)


@app.command(epilog="Example: weft prompt compare zero.toml few.toml --data labelled.jsonl --checkpoint runs/small")
def compare(
    prompts: Annotated[
        list[Path], typer.Argument(metavar="PROMPT...", help="Prompt files; the first is compared with.")
    ],
    data: Annotated[Path, typer.Option(help="Labelled rows, JSON lines.")],
    checkpoint: Checkpoint = None,
    url: Url = "",
    model: ModelName = "",
    api_key: Key = "",
    limit: Annotated[int | None, typer.Option(help="Use the first so many rows.", min=1)] = None,
    price_in: PriceIn = 0,
    price_out: PriceOut = 0,
    out: Annotated[Path | None, typer.Option(help=f"Write every answer and score to this JSON file. {GOES_ON}")] = None,
    at_once: AtOnce = 16,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Score prompts on the same labelled rows: how many are right, how sure that is, what it costs.

    Shares have Wilson's 95 % interval; differences from the first prompt have the paired bootstrap's.
    """
    from rich.console import Console

    from weft.cli.bar import progress_bar
    from weft.cli.scores import make_room, wide, write_json
    from weft.prompt.compare import Price, compare, record
    from weft.prompt.file import read_prompt, read_rows
    from weft.prompt.open import open_model
    from weft.prompt.report import show_compared

    make_room(out)
    variants, rows, price = [read_prompt(path) for path in prompts], read_rows(data)[:limit], Price(price_in, price_out)
    with open_model(checkpoint, url, model, api_key, at_once, device, dtype, out) as there:
        with progress_bar() as progress:
            scored = compare(variants, rows, there, progress)
        show_compared(scored, price, wide(Console()))
        if out is not None:
            write_json(out, record(scored, rows, there, price))


@app.command(
    epilog="Example: weft prompt search mood.toml --data labelled.jsonl --url http://127.0.0.1:8000/v1 --propose 8 "
    "--budget 1000 --out mood-2.toml"
)
def search(
    prompt: PromptFile,
    data: Annotated[Path, typer.Option(help="Labelled rows, JSON lines.")],
    out: Annotated[Path, typer.Option(help=f"Where the best prompt goes, as the next version. {GOES_ON}")],
    budget: Annotated[int, typer.Option(help="Questions that may be asked in all, each vote counted.", min=1)],
    checkpoint: Checkpoint = None,
    url: Url = "",
    model: ModelName = "",
    api_key: Key = "",
    rewrites: Annotated[Path | None, typer.Option(help="A file of instructions to try, one a line.")] = None,
    propose: Annotated[int, typer.Option(help="More instructions, which the model writes.", min=0)] = 0,
    shots: Annotated[
        list[int] | None, typer.Option(help="Examples to try, so many, drawn from the rows; repeatable.", min=0)
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the split of the rows, and of what is drawn.")] = 0,
    price_in: PriceIn = 0,
    price_out: PriceOut = 0,
    at_once: AtOnce = 16,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Improve a prompt: other instructions and other examples compete, half of them drop out each round.

    The score that is told is of rows that were not looked at before the best was chosen.
    """
    from rich.console import Console

    from weft.cli.bar import progress_bar
    from weft.cli.scores import make_room, wide
    from weft.prompt.compare import Price
    from weft.prompt.file import read_prompt, read_rows, write_prompt
    from weft.prompt.open import open_model
    from weft.prompt.report import show_search
    from weft.prompt.search import search

    if out.exists():
        raise ValueError(f"--out {out} is there already: a version, once written, stays; choose another name")
    base, rows, instructions = read_prompt(prompt), read_rows(data), lines_of(rewrites) if rewrites else []
    make_room(out)
    with open_model(checkpoint, url, model, api_key, at_once, device, dtype, out) as there:
        with progress_bar() as progress:
            found = search(
                base, rows, there, budget=budget, instructions=instructions, proposals=propose, shots=shots or (),
                seed=seed, progress=progress,
            )  # fmt: skip
        show_search(found, Price(price_in, price_out), wide(Console()))
        if found.best is not found.base:
            write_prompt(found.best.prompt, out)
            print(f"written: {out}")


@app.command(epilog="Example: weft prompt chat --checkpoint runs/small --temperature 0.7")
def chat(
    prompt: Annotated[
        Path | None, typer.Argument(metavar="[PROMPT]", help="A prompt whose instruction and examples come first.")
    ] = None,
    checkpoint: Checkpoint = None,
    url: Url = "",
    model: ModelName = "",
    api_key: Key = "",
    system: Annotated[str, typer.Option(help="What the model is told before the first turn.")] = "",
    temperature: Annotated[float | None, typer.Option(help="Default: the prompt's, else 0.7.", min=0, max=2)] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Of one answer. Default: the prompt's, else 512.", min=1)
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Talk with a model. Answers come as they are made; Ctrl-C stops one, Ctrl-D ends. /help lists commands.

    A model without a chat template reads the turns as plain text: most continue them, few answer.
    """
    from weft.prompt.chat import COMMANDS, Chat
    from weft.prompt.file import Prompt, PromptSampling, read_prompt
    from weft.prompt.open import open_model

    if prompt is not None and system:
        raise ValueError("--system and a prompt file both say what comes first: give one of the two")
    plain = PromptSampling(temperature=0.7, max_tokens=512)
    instruction = "{{ system }}" if system else ""
    spoken = read_prompt(prompt) if prompt else Prompt(
        name="chat", chat=True, instruction=instruction, question="{{ text }}", sampling=plain
    )  # fmt: skip
    given = {"temperature": temperature, "max_tokens": max_tokens}
    sampling = spoken.sampling.model_copy(update={name: it for name, it in given.items() if it is not None})
    with open_model(checkpoint, url, model, api_key, 1, device, dtype, sure=True) as there:
        talk = Chat(there, spoken.model_copy(update={"sampling": sampling}), {"system": system})
        print(f"{there.name}. {COMMANDS}", file=sys.stderr)
        while not talk.ended:
            try:
                line = input("> ")
            except EOFError:
                break
            except KeyboardInterrupt:
                print()
                continue
            try:
                if line.strip():
                    talk.say(line.strip(), lambda piece: print(piece, end="", flush=True))
            except KeyboardInterrupt:
                print("\n(stopped; the turn is taken back)")
            except ValueError as error:
                print(f"weft: error: {error}", file=sys.stderr)


@app.command(epilog="Example: weft prompt new prompts/mood.toml --kind few-shot")
def new(
    path: Annotated[Path, typer.Argument(metavar="PROMPT", help="The file to write.")],
    kind: Annotated[
        str | None,
        typer.Option(help="plain, few-shot (the default), reasoning (steps, with votes) or structured (JSON)."),
    ] = None,
    parent: Annotated[
        Path | None, typer.Option("--from", help="Write the next version of this prompt instead.")
    ] = None,
) -> None:
    """Write a prompt file to begin with, or the next version of one."""
    from weft.prompt.file import read_prompt, write_prompt
    from weft.prompt.starters import STARTERS

    if kind is not None and kind not in STARTERS:
        raise ValueError(f"--kind {kind}: it must be one of {', '.join(STARTERS)}")
    if kind is not None and parent is not None:
        raise ValueError(f"--kind {kind} is of a new prompt, --from {parent} of one that there is: leave one out")
    if path.exists():
        raise ValueError(f"{path} is there already: a version, once written, stays; choose another name")
    if parent is not None:
        old = read_prompt(parent)
        write_prompt(old.model_copy(update={"version": old.version + 1, "parent": old.id}), path)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        name = json.dumps(path.stem, ensure_ascii=False)[1:-1]  # as TOML has it between quotes, too
        path.write_text(STARTERS[kind or "few-shot"].format(name=name), encoding="utf-8")
    print(f"written: {path}\ntry it: weft prompt run {path} --set text='…' --dry-run")


def fields(values: list[str]) -> Row:
    """name=value texts as a row."""
    row: Row = {}
    for value in values:
        name, equals, text = value.partition("=")
        if not equals or not name.strip():
            raise ValueError(f"--set {value!r}: write it as name=value, where name is what the template calls it")
        row[name.strip()] = text
    return row


def lines_of(path: Path) -> list[str]:
    from weft.config.load import read_text

    if not path.is_file():
        raise ValueError(f"--rewrites: there is no file {path}")
    return [line.strip() for line in read_text(path).splitlines() if line.strip()]


def show_asked(prompt: Prompt, rows: list[Row]) -> None:
    """What a model would be sent for each row."""
    from weft.prompt.score import make_asks

    for number, one in enumerate(make_asks(prompt, rows), start=1):
        print(f"{chr(10) if number > 1 else ''}[{number}/{len(rows)}] {prompt.id}")
        if isinstance(one.prompt, str):
            print(one.prompt)
        else:
            print("\n".join(f"{turn['role']}: {turn['content']}" for turn in one.prompt))

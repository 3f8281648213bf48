"""`weft data`: text to token files, tokenizer training, and a look inside."""

import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Turn text into token files that training reads, train a tokenizer, look inside.",
    no_args_is_help=True,
)

Inputs = Annotated[
    list[Path],
    typer.Argument(
        help="Files (.txt, source code, .jsonl, .gz or .zst of it, .parquet) or folders of them.", show_default=False
    ),
]
Key = Annotated[str, typer.Option(help="The JSON field, or parquet column, that holds the text.")]
Glob = Annotated[
    list[str],
    typer.Option(help="Take only files of folders that match, e.g. '*.py' (repeatable). Default: known text suffixes."),
]


@app.command(epilog="Example: weft data prepare docs/ wiki.jsonl --tokenizer tok/ --out data/wiki")
def prepare(
    inputs: Inputs,
    out: Annotated[Path, typer.Option(help="Prefix of the output: PREFIX.bin, PREFIX.idx, PREFIX.json.")],
    tokenizer: Annotated[Path, typer.Option(help="A tokenizer.json, or a folder with one (any Hugging Face model).")],
    key: Key = "text",
    glob: Glob = [],  # noqa: B006 - typer copies it
    workers: Annotated[
        int | None, typer.Option(help="Processes; the output is the same for any number. Default: one per core.")
    ] = None,
    eod: Annotated[
        str | None,
        typer.Option(help="The token that ends a document, as text or id. Default: what the tokenizer declares."),
    ] = None,
    no_eod: Annotated[bool, typer.Option("--no-eod", help="Do not end documents with a token.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a finished output.")] = False,
) -> None:
    """Encode text into Megatron's .bin/.idx token files, on all cores.

    One document per text file, per JSON line, per parquet row. Killed half-way? Run the same command again: finished
    parts are kept, and the result is the same to the byte.
    """
    from rich.console import Console

    from weft.data.prepare import prepare as run

    try:
        report = run(
            inputs,
            out,
            tokenizer,
            key=key,
            globs=glob,
            workers=workers,
            eod=eod,
            append_eod=not no_eod,
            overwrite=overwrite,
            progress=True,
        )
    except KeyboardInterrupt:
        print("weft: stopped; the same command goes on from the parts that are done", file=sys.stderr)
        raise typer.Exit(130) from None
    facts = {
        "documents": f"{report.documents:,}",
        "tokens": f"{report.tokens:,} ({report.dtype})",
        "text": f"{report.text_bytes / 1e6:,.2f} MB, {report.text_bytes / report.tokens:.2f} bytes a token",
        "speed": f"{report.tokens_per_second:,.0f} tokens/s, workers: {report.workers}, {report.seconds:.1f} s",
    }
    if report.resumed_parts:
        facts["resumed"] = f"{report.resumed_parts} of {report.parts} parts were done before"
    if report.empty:
        facts["left out"] = f"{report.empty:,} empty documents"
    if report.skipped:
        facts["skipped"] = skipped_files(report.skipped)
    facts["written"] = f"{out}.bin, {out}.idx, report in {out}.json"
    Console().print(_table(facts))


@app.command(epilog="Example: weft data tokenizer src/ docs/ --vocab 8192 --out tok")
def tokenizer(
    inputs: Inputs,
    out: Annotated[Path, typer.Option(help="Folder for tokenizer.json; transformers loads it too.")],
    vocab: Annotated[
        int, typer.Option(help="Tokens in the vocabulary, the 256 bytes and the end of document included.")
    ] = 8192,
    key: Key = "text",
    glob: Glob = [],  # noqa: B006 - typer copies it
) -> None:
    """Train a byte-level BPE tokenizer, like GPT-2's, on your own text.

    Any text can be encoded by it, and comes back the same. A few hundred megabytes of text are plenty.
    """
    from rich.console import Console

    from weft.data import corpus
    from weft.data.tokenizer import train_bpe

    skipped: list[str] = []
    pieces = corpus.cut(corpus.find_files(inputs, glob), 1 << 26)
    texts = (text for piece in pieces for text in corpus.read(piece, key, skipped))
    trained = train_bpe(texts, vocab, out, progress=sys.stderr.isatty())
    facts = {"vocabulary": f"{trained.vocab:,}", "end of document": f"id {trained.eod}", "written": str(out)}
    if trained.vocab < vocab:
        facts["note"] = f"the text gave only {trained.vocab:,} of {vocab:,} tokens"
    if skipped:
        facts["skipped"] = skipped_files(skipped)
    Console().print(_table(facts))


@app.command(epilog="Example: weft data inspect data/wiki --tokenizer tok/")
def inspect(
    prefix: Annotated[Path, typer.Argument(help="PREFIX of PREFIX.bin and PREFIX.idx.", show_default=False)],
    tokenizer: Annotated[
        Path | None, typer.Option(help="Decode the first documents with it, and check the ids.")
    ] = None,
    documents: Annotated[int, typer.Option(help="How many documents to show.", min=0)] = 3,
) -> None:
    """Show what a token file holds: sizes, lengths, the first documents."""
    import numpy as np
    from rich.console import Console
    from rich.text import Text

    from weft.data.indexed import IndexedDataset
    from weft.data.tokenizer import load

    data = IndexedDataset(prefix)
    console = Console()
    starts = data.document_starts()
    lengths = np.diff(starts)
    low, median, high = np.percentile(lengths, (0, 50, 100))
    facts = {
        "documents": f"{data.num_documents:,}"
        + (f" in {len(data):,} sequences" if len(data) != data.num_documents else ""),
        "tokens": f"{data.num_tokens:,}",
        "type": f"{data.dtype.name}, {data.bin_path.stat().st_size / 1e6:,.2f} MB",
        "tokens a document": f"{low:,.0f} to {high:,.0f}, median {median:,.0f}, mean {lengths.mean():,.0f}",
        "fingerprint": data.fingerprint()[:16],
    }
    loaded = load(tokenizer) if tokenizer else None
    if loaded:
        data.check_vocab(loaded.vocab)
        ended = int(np.sum(data.tokens[starts[1:][lengths > 0] - 1] == loaded.eod)) if loaded.eod is not None else 0
        facts["ids"] = f"all within the vocabulary of {loaded.vocab:,}"
        facts["end of document"] = f"{ended:,} of {data.num_documents:,} documents end with id {loaded.eod}"
    console.print(_table(facts))
    for number in range(min(documents, data.num_documents)):
        ids = data.tokens[starts[number] : min(starts[number + 1], starts[number] + 60)]
        shown = loaded.decode(ids) if loaded else " ".join(map(str, ids))
        more = " …" if lengths[number] > len(ids) else ""
        console.print(Text(f"\ndocument {number}, {lengths[number]:,} tokens", style="bold"))
        console.print(Text(shown + more))


def skipped_files(told: list[str]) -> str:
    """The first few, each on a line."""
    more = [f"and {len(told) - 3} more"] if len(told) > 3 else []
    return "\n".join([f"{len(told)} file{'s' if len(told) > 1 else ''}", *told[:3], *more])


def _table(facts: dict[str, str]):  # type: ignore[no-untyped-def]
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column()
    table.add_column(overflow="fold")  # a path is whole
    for name, value in facts.items():
        table.add_row(Text(name, style="dim"), Text(value))
    return table

"""Claim: a small model that weft trained learns to learn from the examples in its prompt; it can be watched as it does.

    python benchmarks/in_context.py                          # some minutes on two cores; draws docs/in_context.svg
    python benchmarks/in_context.py --steps 200 --rows 50    # a glance

Every document takes four words that mean nothing and gives each a colour, drawn anew: no document tells anything about
the next, so nothing can be known of a word before its first example, and everything after. A model of two layers is
trained on such documents; what it makes of 0 to 16 examples is asked of each checkpoint through `weft prompt`'s own
scoring. Nobody can do better than to name a word's colour where it was shown, and to guess where it was not: that is the
ceiling.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from common import ROOT, shown, write
from weft.checkpoint.folder import checkpoints, step_of
from weft.prompt.file import Prompt, PromptSampling, Row
from weft.prompt.local import LocalModel
from weft.prompt.score import score
from weft.prompt.statistics import wilson

WORDS = (
    "dax", "wug", "zup", "fep", "kiv", "mib", "tol", "gor", "bik", "lum", "nef", "pim", "rax", "sef", "tiv", "vob",
    "wem", "yat", "zil", "cag", "dof", "fub", "hef", "jop", "kel", "lod", "mur", "nad", "pob", "quz", "riv", "sul",
)  # fmt: skip
COLOURS = ("red", "green", "blue", "white", "black", "grey", "pink", "brown")
NAMED = 4
EXAMPLES = 16
SHOTS = (0, 1, 2, 4, 8, 16)
PICTURE = ROOT / "docs" / "in_context.svg"

SETTINGS = """
[model]
family = "llama"
num_layers = 2
hidden = 64
num_heads = 2
ffn = 160
vocab = {vocab}
max_seq = 72
init_std = 0.12
[data]
paths = ["{folder}/tokens"]
tokenizer = "{folder}/tokenizer"
document_mask = true
[train]
steps = {steps}
global_batch = 16
seq = 66
[optimizer]
lr = 3e-3
[schedule]
kind = "constant"
warmup = 50
[checkpoint]
every = {every}
keep = 1000
[log]
every = 100
tensorboard = false
"""


def document(numbers: random.Random) -> list[tuple[str, str]]:
    """Words and their colours, in this document."""
    colours = {word: numbers.choice(COLOURS) for word in numbers.sample(WORDS, NAMED)}
    return [(word, colours[word]) for word in numbers.choices(list(colours), k=EXAMPLES + 1)]


def documents(count: int, seed: int) -> Iterator[list[tuple[str, str]]]:
    numbers = random.Random(seed)
    return (document(numbers) for _ in range(count))


def make_data(folder: Path, count: int) -> int:
    """A tokenizer of whole words, and token files by `weft data`; the size of the vocabulary."""
    with (folder / "texts.jsonl").open("w", encoding="utf-8") as stream:
        for pairs in documents(count, seed=0):
            text = "".join(f" {word} {colour}" for word, colour in pairs[:EXAMPLES])
            stream.write(json.dumps({"text": text}) + "\n")
    words = ["<|endoftext|>", *(f" {word}" for word in (*WORDS, *COLOURS))]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_next")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(words[:1])
    (folder / "tokenizer").mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))
    weft("data", "prepare", folder / "texts.jsonl", "--tokenizer", folder / "tokenizer", "--out", folder / "tokens")
    return len(words)


def train(folder: Path, vocab: int, steps: int) -> list[Path]:
    """Its checkpoints, oldest first."""
    settings = folder / "settings.toml"
    text = SETTINGS.format(folder=folder, vocab=vocab, steps=steps, every=max(1, steps // 10))
    settings.write_text(text, encoding="utf-8")
    weft("train", settings, "--run", folder / "run")
    return sorted(checkpoints(folder / "run" / "checkpoints"), key=lambda path: step_of(path) or 0)


def weft(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "weft", *map(str, words)], check=True, stdout=sys.stderr)


def cases(count: int) -> list[Row]:
    """Rows to ask about: a document that training never saw; its last word is the question."""
    return [
        {"shown": [{"word": word, "colour": colour} for word, colour in pairs[:-1]],
         "word": pairs[-1][0], "label": pairs[-1][1]}
        for pairs in documents(count, seed=1)
    ]  # fmt: skip


def prompt(shots: int) -> Prompt:
    """The last so many examples of a row, and its question."""
    return Prompt(
        name=f"{shots}-shot",
        question="{% for it in shown[-" + str(shots) + ":] %} {{ it.word }} {{ it.colour }}{% endfor %} {{ word }}"
        if shots else " {{ word }}",
        answer=" {{ label }}",
        sampling=PromptSampling(max_tokens=1),
    )  # fmt: skip


def ceiling(shots: int, rows: Sequence[Row]) -> float:
    """Share that is right on average where a word that was not shown is guessed."""
    known = [any(it["word"] == row["word"] for it in row["shown"][EXAMPLES - shots :]) for row in rows]
    return sum(1 if one else 1 / len(COLOURS) for one in known) / len(rows)


def measure(checkpoint: Path, rows: Sequence[Row]) -> dict[str, Any]:
    """What a checkpoint gets right with each number of examples, with Wilson's 95 % interval."""
    model = LocalModel(checkpoint)
    found = {}
    for shots in SHOTS:
        scored = score(prompt(shots), rows, model)
        found[str(shots)] = {
            "right": sum(scored.right),
            "interval": [round(it, 4) for it in wilson(sum(scored.right), len(rows))],
        }
    return {"step": step_of(checkpoint), "shots": found}


def draw(results: dict[str, Any], path: Path) -> None:
    """Accuracy against the number of examples, and against training steps."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {
        "svg.hashsalt": "weft",
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    from matplotlib import pyplot as plt

    rows, places, line = results["rows"], range(len(SHOTS)), results["checkpoints"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.4, 4.2), layout="constrained", sharey=True)
    ceilings = [results["ceiling"][str(it)] for it in SHOTS]
    left.plot(places, ceilings, color="#6b7280", linestyle=":", label="the best that is possible")
    shades = plt.get_cmap("viridis")
    for number, one in enumerate((line[0], line[len(line) // 4], line[-1])):
        found = [one["shots"][str(it)] for it in SHOTS]
        shares = [it["right"] / rows for it in found]
        errors = [
            [abs(it["interval"][side] - share) for it, share in zip(found, shares, strict=True)] for side in (0, 1)
        ]
        name = f"after {one['step']} steps"
        left.errorbar(places, shares, errors, color=shades(0.85 - number / 3), marker="o", capsize=3, label=name)
    left.set_xticks(places, [str(it) for it in SHOTS])
    left.set(xlabel="examples in the prompt", ylabel="right answers", ylim=(0, 1.02))
    for number, shots in enumerate(SHOTS):
        shares = [one["shots"][str(shots)]["right"] / rows for one in line]
        colour = shades(1 - (number + 1) / (len(SHOTS) + 1))
        right.plot([one["step"] for one in line], shares, marker=".", color=colour, label=f"{shots}-shot")
    right.set(xlabel="training steps")
    left.legend(frameon=False, loc="upper left")
    right.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), reverse=True)
    for axes in (left, right):
        axes.axhline(1 / len(COLOURS), color="#d1d5db", linewidth=1)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=150)
    parser.add_argument("--folder", type=Path, help="keep runs here")
    parser.add_argument("--picture", type=Path, default=PICTURE)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="weft-in-context-") as folder:
        results = run(options.folder or Path(folder), options.steps, options.rows)
    draw(results, options.picture)
    print(f"written: {shown(options.picture)}, {shown(write('in_context', results))}")


def run(folder: Path, steps: int, count: int) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    vocab = make_data(folder, count=steps * 32)
    rows = cases(count)
    ceilings = {str(it): round(ceiling(it, rows), 4) for it in SHOTS}
    found = []
    for checkpoint in train(folder, vocab, steps):
        found.append(measure(checkpoint, rows))
        shares = "  ".join(f"{it}: {found[-1]['shots'][str(it)]['right'] / count:.2f}" for it in SHOTS)
        print(f"step {found[-1]['step']}: {shares}", file=sys.stderr)
    return {"steps": steps, "rows": count, "ceiling": ceilings, "checkpoints": found}


if __name__ == "__main__":
    main()

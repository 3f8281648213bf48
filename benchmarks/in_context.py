"""Claim: a small model that weft trained learns to learn from the examples in its prompt; it can be watched as it does.

    python benchmarks/in_context.py                          # some minutes on two cores; draws docs/in_context.svg
    python benchmarks/in_context.py --steps 200 --rows 50    # a glance

Every document takes four words that mean nothing and gives each a colour, drawn anew: no document tells anything about
the next, so nothing can be known of a word before its first example, and everything after. Models of one and of two
layers are trained on such documents; what they make of 0 to 16 examples is asked of each checkpoint through `weft
prompt`'s own scoring. Nobody can do better than to name a word's colour where it was shown, and to guess where it was not:
that is the ceiling.
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
LAYERS = (2, 1)
PICTURE = ROOT / "docs" / "in_context.svg"

SETTINGS = """
[model]
family = "llama"
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
    """Tokenizer and token files, by `weft data`; the size of the vocabulary."""
    with (folder / "texts.jsonl").open("w", encoding="utf-8") as stream:
        for pairs in documents(count, seed=0):
            text = "".join(f" {word} {colour}" for word, colour in pairs[:EXAMPLES])
            stream.write(json.dumps({"text": text}) + "\n")
    weft("data", "tokenizer", folder / "texts.jsonl", "--vocab", 600, "--out", folder / "tokenizer")
    weft("data", "prepare", folder / "texts.jsonl", "--tokenizer", folder / "tokenizer", "--out", folder / "tokens")
    known = json.loads((folder / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    return len(known)


def train(folder: Path, layers: int, vocab: int, steps: int) -> list[Path]:
    """Its checkpoints, oldest first."""
    settings = folder / "settings.toml"
    text = SETTINGS.format(folder=folder, vocab=vocab, steps=steps, every=max(1, steps // 8))
    settings.write_text(text, encoding="utf-8")
    run = folder / f"layers-{layers}"
    weft("train", settings, "--run", run, "--set", f"model.num_layers={layers}")
    return sorted(checkpoints(run / "checkpoints"), key=lambda path: step_of(path) or 0)


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

    rows, places = results["rows"], range(len(SHOTS))
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.4, 4.2), layout="constrained")
    left.plot(
        places,
        [results["ceiling"][str(it)] for it in SHOTS],
        color="#6b7280",
        linestyle=":",
        label="the best that is possible",
    )
    for layers, colour in zip(LAYERS, ("#3b6fb6", "#c8553d"), strict=True):
        last = results["layers"][str(layers)][-1]["shots"]
        shares = [last[str(it)]["right"] / rows for it in SHOTS]
        errors = [
            [abs(share - last[str(it)]["interval"][side]) for it, share in zip(SHOTS, shares, strict=True)]
            for side in (0, 1)
        ]
        left.errorbar(
            places, shares, errors, color=colour, marker="o", capsize=3, label=f"{layers} layer{'s' * (layers > 1)}"
        )
    left.axhline(1 / len(COLOURS), color="#d1d5db", linewidth=1)
    left.set_xticks(places, [str(it) for it in SHOTS])
    left.set(xlabel="examples in the prompt", ylabel="right answers", ylim=(0, 1.02), title="after training")
    left.legend(frameon=False, loc="upper left")
    shades = plt.get_cmap("viridis")
    for number, shots in enumerate(SHOTS):
        line = results["layers"]["2"]
        right.plot(
            [one["step"] for one in line], [one["shots"][str(shots)]["right"] / rows for one in line], marker=".",
            color=shades(1 - (number + 1) / (len(SHOTS) + 1)), label=f"{shots}-shot",
        )  # fmt: skip
    right.axhline(1 / len(COLOURS), color="#d1d5db", linewidth=1)
    right.set(xlabel="training steps", ylim=(0, 1.02), title="2 layers, while it trains")
    right.legend(frameon=False, loc="upper left")
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=640)
    parser.add_argument("--rows", type=int, default=200)
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
    results: dict[str, Any] = {
        "steps": steps, "rows": count, "ceiling": {str(it): round(ceiling(it, rows), 4) for it in SHOTS}, "layers": {},
    }  # fmt: skip
    for layers in LAYERS:
        curve = []
        for checkpoint in train(folder, layers, vocab, steps):
            curve.append(measure(checkpoint, rows))
            shares = "  ".join(f"{it}: {curve[-1]['shots'][str(it)]['right'] / count:.2f}" for it in SHOTS)
            print(f"layers {layers}, step {curve[-1]['step']}: {shares}", file=sys.stderr)
        results["layers"][str(layers)] = curve
    return results


if __name__ == "__main__":
    main()

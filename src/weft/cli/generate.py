"""`weft generate`: complete prompts from the weights of a checkpoint."""

from __future__ import annotations

import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from weft.cli.options import Device, Dtype

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from weft.serve.requests.request import Output


def generate(
    checkpoint: Path = typer.Argument(help="A checkpoint (step-…), a run (its newest), or a Hugging Face directory."),
    prompts: list[str] = typer.Argument(None, metavar="[PROMPT]...", help="Texts to continue; - reads one from stdin."),
    prompts_file: Path | None = typer.Option(None, help="A file with one more prompt on each line."),
    max_tokens: int = typer.Option(128, help="New tokens of each completion at most."),
    temperature: float = typer.Option(0.0, help="Evens the odds above 1, sharpens below; 0: always the most probable."),
    top_k: int | None = typer.Option(None, help="Choose among this many most probable tokens."),
    top_p: float = typer.Option(1.0, help="Choose among the fewest tokens with this much probability together."),
    seed: int | None = typer.Option(None, help="Makes sampling repeatable."),
    stop: list[str] = typer.Option([], help="A text that ends a completion; may be repeated."),
    num_samples: int = typer.Option(1, help="Completions of each prompt; wants a temperature."),
    adapter: Path | None = typer.Option(None, help="A LoRA adapter of the model's: a directory that peft wrote."),
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Continue texts with a trained model.

    The completion of a single prompt is written as it comes; several are completed together, in one batch.
    """
    from weft.checkpoint.sidecars import read_json
    from weft.cli.serve import find_adapter
    from weft.models.huggingface import shape_from_config
    from weft.serve.about import About
    from weft.serve.config import EngineConfig
    from weft.serve.folder import CONFIG, end_tokens, find_model, load_tokenizer
    from weft.serve.requests.request import Request, Sampling

    texts = read_prompts(prompts or [], prompts_file)
    if num_samples < 1:
        raise ValueError(f"--num-samples is {num_samples}; it must be at least 1")
    if num_samples > 1 and temperature == 0:
        raise ValueError("--num-samples: every sample is the same at temperature 0; set --temperature, 0.8 for one")
    if temperature == 0 and (top_k is not None or top_p != 1):
        raise ValueError("--top-k and --top-p choose by chance, which temperature 0 leaves none of; set --temperature")
    adapters = {"adapter": find_adapter(adapter)} if adapter is not None else {}
    folder, damage = find_model(checkpoint)
    for finding in damage:
        print(f"weft: warning: passed over a damaged checkpoint: {finding}", file=sys.stderr)
    sampling = Sampling(temperature, top_k, top_p, seed, max_tokens, tuple(stop), end_tokens(folder))
    tokenizer = load_tokenizer(folder)
    ids = [tokenizer.encode(text).ids for text in texts]
    config = EngineConfig(max_waiting=len(texts) * num_samples, adapters=adapters)
    shape = shape_from_config(read_json(folder / CONFIG))
    about = About(shape, shape.max_seq, sampling.eos, True, device, config)
    about.check_all(Request("", prompt, sampling, num_samples) for prompt in ids)  # before the weights are read

    from weft.checkpoint.weights import load_decoder
    from weft.serve.engine import Engine
    from weft.serve.generate import generate as run
    from weft.serve.steps.device import pick_device, pick_dtype, room_on

    where = pick_device(device)
    with room_on(where):
        _, model = load_decoder(folder, where, pick_dtype(dtype, where))
        engine = Engine(model, tokenizer, config, sampling.eos)
    start = time.perf_counter()
    tally = Tally(max_tokens)
    outputs = tally.of(run(engine, ids, sampling, num_samples, *adapters))
    alone = len(texts) * num_samples == 1
    show_one(outputs) if alone else show_several(outputs, texts, num_samples)
    seconds, num_tokens = time.perf_counter() - start, tally.tokens.total()
    print(f"{num_tokens} tokens in {seconds:.2f} s, {num_tokens / seconds:.1f} tokens/s", file=sys.stderr)
    if tally.full:
        which = "the text ends" if alone else f"{tally.full} of {len(texts) * num_samples} texts end"
        print(f"the model's context has no more than {shape.max_seq:,} tokens: {which} there", file=sys.stderr)


def read_prompts(prompts: list[str], file: Path | None) -> list[str]:
    """The prompts of the command line, `-` replaced by stdin's text, then the file's lines but for blank ones."""
    from weft.config.load import read_text

    if prompts.count("-") > 1:
        raise ValueError("the prompt - stands twice on the command line, but stdin can be read once")
    texts = [sys.stdin.read().removesuffix("\n") if prompt == "-" else prompt for prompt in prompts]
    if file is not None:
        if not file.is_file():
            raise ValueError(f"--prompts-file: there is no file {file}")
        texts += [line for line in read_text(file).splitlines() if line.strip()]
    if not texts:
        raise ValueError("no prompt: give one behind the checkpoint, - for stdin, or --prompts-file")
    if "" in texts:
        raise ValueError("a prompt is empty; give the model at least one word to continue")
    if any("\udc80" <= letter <= "\udcff" for text in texts for letter in text):  # how Python reads a byte of no text
        raise ValueError("a prompt is not text in UTF-8")
    return texts


class Tally:
    """What is counted while completions come.

    Attributes:
        tokens: new ones of each completion, by its prompt and its number there.
        full: completions that the context's end cut off before they had `most`.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.tokens: Counter[tuple[int, int]] = Counter()
        self.full = 0

    def of(self, outputs: Iterable[tuple[int, Output]]) -> Iterator[tuple[int, Output]]:
        for prompt, output in outputs:
            one = (prompt, output.index)
            self.tokens[one] += len(output.tokens)
            self.full += output.finish == "length" and self.tokens[one] < self.most
            yield prompt, output


def show_one(outputs: Iterable[tuple[int, Output]]) -> None:
    """Write the only completion as it comes."""
    for _, output in outputs:
        print(output.text, end="", flush=True)
    print(flush=True)


def show_several(outputs: Iterable[tuple[int, Output]], prompts: list[str], num_samples: int) -> None:
    """Write each completion under its prompt, all of them at the end."""
    completions = [""] * len(prompts) * num_samples
    for prompt, output in outputs:
        completions[prompt * num_samples + output.index] += output.text
    for place, completion in enumerate(completions):
        title = " ".join(prompts[place // num_samples].split())
        title = title if len(title) <= 60 else f"{title[:29]} … {title[-28:]}"
        print(f"{chr(10) if place else ''}[{place + 1}/{len(completions)}] {title}\n{completion}")

"""Tasks of lm-eval (EleutherAI's lm-evaluation-harness), through a server, by its own command."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from weft.prompt.model import Model
from weft.prompt.task import Measure
from weft.serve.folder import find_model, load_tokenizer

PROBE = "The quick brown fox, 12 345 naïve cafés\n\tdef f(x): return {'a': x}"
"""A text of which tokenizers make different tokens."""


def run_lm_eval(
    tasks: Sequence[str], url: str, model: str, tokenizer: Path, longest: int | None = None, key: str = "",
    limit: int | None = None, include: Path | None = None, shots: int | None = None,
) -> list[Measure]:  # fmt: skip
    """Run lm-eval in a process of its own; its lines are shown on stderr.

    Args:
        tokenizer: folder of the model's own, or its checkpoint or run: lm-eval sends tokens. With another one its scores
            would be wrong, in silence.
        longest: tokens that a text may have; None: lm-eval's own guess, 2047. Longer texts are read in windows.
        include: a folder of more tasks.

    Raises:
        ValueError: lm-eval is not installed, or failed; or it told log-likelihoods that are all 0.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("--lm-eval needs EleutherAI's harness, which is not installed: pip install 'weft[lm-eval]'")
    settings = {
        "model": model, "base_url": f"{url.rstrip('/')}/completions", "tokenizer": find_tokenizer(tokenizer),
        "tokenizer_backend": "huggingface", "num_concurrent": "8", "max_retries": "3",
    }  # fmt: skip
    settings |= {"max_length": longest + 1} if longest else {}  # it keeps one for the new token that it asks for
    with tempfile.TemporaryDirectory(prefix="weft-lm-eval-") as folder:
        command = [
            sys.executable, "-m", "lm_eval", "run", "--model", "local-completions", "--tasks", *tasks,
            "--model_args", ",".join(f"{name}={value}" for name, value in settings.items()), "--output_path", folder,
            "--log_samples",
        ]  # fmt: skip
        command += ["--limit", str(limit)] if limit else []
        command += ["--num_fewshot", str(shots)] if shots is not None else []
        command += ["--include_path", str(include)] if include else []
        environment = os.environ | {"OPENAI_API_KEY": key or "none"}
        done = subprocess.run(command, env=environment, stdout=sys.stderr, check=False)
        if done.returncode:
            raise ValueError(f"lm-eval ended with exit code {done.returncode}; its own lines say why")
        check_samples(Path(folder))
        [results] = Path(folder).rglob("results_*.json")
        return measures(json.loads(results.read_text(encoding="utf-8")))


def find_tokenizer(path: Path) -> Path:
    """The folder that holds tokenizer.json: this one, or that of a checkpoint's or run's model.

    Raises:
        ValueError: there is none.
    """
    if (path / "tokenizer.json").is_file():
        return path
    with suppress(ValueError):
        folder, _ = find_model(path)
        if (folder / "tokenizer.json").is_file():
            return folder
    raise ValueError(f"--tokenizer {path}: there is no tokenizer.json; give the folder of the served model")


def ask_server(tokenizer: Path, model: Model) -> int | None:
    """How many tokens a text may have; None: the server does not say.

    Raises:
        ValueError: the tokenizer is another one than the server's.
    """
    mine = load_tokenizer(find_tokenizer(tokenizer)).encode(PROBE).ids
    try:
        theirs = model.encode(PROBE)
    except ValueError:  # it has no /tokenize
        return None
    if theirs != mine:
        raise ValueError(f"--tokenizer {tokenizer} is not the one of the served model: it makes other tokens of a text")
    with suppress(ValueError):
        return model.longest
    return None


def check_samples(folder: Path) -> None:
    """
    Raises:
        ValueError: every log-likelihood is 0: it was the sum of nothing.
    """
    found = []
    for file in folder.rglob("samples_*.jsonl"):
        for line in file.read_text(encoding="utf-8").rstrip("\n").split("\n"):
            sample = json.loads(line)
            if sample.get("arguments") and len(sample.get("resps", [])) > 1:
                found += [float(one[0][0]) for one in sample["resps"] if isinstance(one[0], list)]
    if found and not any(found):
        raise ValueError(
            "every log-likelihood is 0: the server does not tell log-probabilities of a prompt (echo with logprobs), or "
            "--tokenizer is not the one of the served model"
        )


def measures(results: dict[str, Any]) -> list[Measure]:
    """The scores of lm-eval's results file, with the standard errors that it gives."""
    found = []
    for task, scores in results["results"].items():
        count = results.get("n-samples", {}).get(task, {}).get("effective", 0)
        for name, value in scores.items():
            metric, _, kind = name.partition(",")
            if not isinstance(value, int | float) or metric.endswith("_stderr") or not kind:
                continue
            error = scores.get(f"{metric}_stderr,{kind}")
            known = isinstance(error, int | float)
            found.append(Measure(f"lm-eval {task}", metric, float(value), float(error) if known else math.nan, count))
    return found

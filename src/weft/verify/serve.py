"""Proof that the server says what the trainer computes: log-probabilities of both, and the certificate that they agree."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weft import __version__
from weft.checkpoint.folder import CERTIFICATE, MANIFEST
from weft.checkpoint.weights import load_decoder
from weft.serve.config import EngineConfig
from weft.serve.engine import Engine
from weft.serve.folder import find_model
from weft.serve.requests.request import Request, Sampling, TokenLogprob
from weft.serve.steps.device import pick_device, pick_dtype
from weft.whole import write_whole

BOUNDS = {"float32": (1e-3, 1e-4), "float16": (0.2, 0.02), "bfloat16": (1.0, 0.1)}
"""Largest and mean difference of a log-probability that the server's dtype explains."""

CACHE_BOUNDS = (0.2, 0.02)
"""The same, of keys and values in 8 bits."""

TEXTS, TOKENS, NEW = 4, 192, 16
"""Texts, the tokens of each at most, and how many of them the server chooses itself."""

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class ServeReport:
    """What was compared: the trainer's model in fp32, each text as a whole; and the server, as it serves.

    Attributes:
        folder: the Hugging Face directory.
        weights: digest of what was served.
        tokens: log-probabilities compared, of prompts and of what the server chose.
        largest, mean: absolute difference.
        top1: share of the places where both have the same most probable token.
        apart: places where they do not, and the trainer's two are farther apart than the bound explains.
        passed_over: newer checkpoints that are damaged.
    """

    folder: Path
    weights: str
    dtype: str
    device: str
    tp: int
    pp: int
    cache: str
    tokens: int
    largest: float
    mean: float
    top1: float
    apart: int
    passed_over: list[str]

    @property
    def bounds(self) -> tuple[float, float]:
        found = [BOUNDS[self.dtype], *([CACHE_BOUNDS] if self.cache == "int8" else [])]
        return max(found)

    @property
    def right(self) -> bool:
        return self.largest <= self.bounds[0] and self.mean <= self.bounds[1] and not self.apart


def verify_serve(path: Path, config: EngineConfig | None = None, progress: Progress | None = None) -> ServeReport:
    """Serve random prompts, in parts, in one batch and with shared prefixes; compare every log-probability told.

    Args:
        path: a checkpoint, a run (its newest), or a Hugging Face directory.
        config: dtype, device, tp, pp and cache_dtype count; the rest is set so that little fits into a step.

    Raises:
        ValueError: there is no model there, or the config cannot be.
    """
    progress = progress or (lambda what, done, total: None)
    folder, passed_over = find_model(path)
    config = replace(config or EngineConfig(), max_sequences=TEXTS, step_tokens=48, block_tokens=16)
    device = pick_device(config.device)
    shape, trainer = load_decoder(folder, device, torch.float32)
    length = max(2, min(TOKENS, shape.max_seq - NEW))
    prompts = torch.randint(shape.vocab, (TEXTS, length), generator=torch.Generator().manual_seed(0))
    prompts[1::2, : length // 2] = prompts[::2, : length // 2]  # texts that begin alike
    engine = Engine.load(folder, config)
    try:
        told = serve(engine, prompts.tolist(), lambda done: progress("texts served", done, 2 * TEXTS))
    finally:
        engine.close()
    differences, margins, same = [], [], 0
    dtype = str(pick_dtype(config.dtype, device)).removeprefix("torch.")
    for number, (text, logprobs) in enumerate(told, start=1):
        expected = trainer_logprobs(trainer, text)[-len(logprobs) :]
        ids = torch.tensor([one.token for one in logprobs])
        served = torch.tensor([one.logprob for one in logprobs])
        tops = torch.tensor([one.top[0][0] for one in logprobs])
        differences.append((served - expected.gather(1, ids[:, None])[:, 0]).abs())
        margin = expected.amax(dim=1) - expected.gather(1, tops[:, None])[:, 0]
        same += int((margin == 0).sum())
        margins.append(margin)
        progress("texts compared", number, len(told))
    found = torch.cat(differences)
    report = ServeReport(
        folder, weights_digest(folder), dtype, device.type, config.tp, config.pp, config.cache_dtype, len(found),
        float(found.max()), float(found.mean()), same / len(found), 0, passed_over,
    )  # fmt: skip
    return replace(report, apart=int((torch.cat(margins) > 2 * report.bounds[0]).sum()))


def serve(
    engine: Engine, prompts: list[list[int]], progress: Callable[[int], None]
) -> list[tuple[list[int], list[TokenLogprob]]]:
    """Each text, and what the server told of all its tokens but the first: twice, the second time out of the cache."""
    texts: list[tuple[list[int], list[TokenLogprob]]] = []
    for again in (False, True):
        found = {str(index): (list(prompt), list[TokenLogprob]()) for index, prompt in enumerate(prompts)}
        for name, (prompt, _) in found.items():
            asked = None if again else 1
            engine.add(Request(name, list(prompt), Sampling(max_tokens=NEW), logprobs=1, prompt_logprobs=asked))
        while engine.busy:
            for output in engine.step():
                text, logprobs = found[output.id]
                text.extend(output.tokens)
                logprobs.extend(one for one in output.prompt_logprobs or () if one is not None)
                logprobs.extend(output.logprobs or ())
                if output.finish is not None:
                    texts.append((text, logprobs))
                    progress(len(texts))
    return texts


@torch.inference_mode()
def trainer_logprobs(trainer: Any, text: list[int]) -> Tensor:
    """Of every token but the first, [T - 1, V], on the CPU."""
    device = next(trainer.parameters()).device
    logits: Tensor = trainer(torch.tensor([text[:-1]], device=device))[0]
    return logits.float().log_softmax(dim=-1).cpu()


def weights_digest(folder: Path) -> str:
    """sha256 of what a checkpoint's manifest seals, or of a bare directory's weights."""
    manifest = folder.parent / MANIFEST
    if manifest.is_file():
        return str(json.loads(manifest.read_bytes())["sha256"])
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def write_certificate(report: ServeReport) -> Path:
    """Lay the proof beside the weights, with those for other dtypes and cuts of the same weights; where it lies.

    In a checkpoint it stands outside of what the manifest lists: it was not there when the checkpoint was written.
    """
    checkpoint = report.folder.parent
    path = (checkpoint if (checkpoint / MANIFEST).is_file() else report.folder) / CERTIFICATE
    proofs: list[dict[str, Any]] = []
    if path.is_file():
        kept = json.loads(path.read_text(encoding="utf-8"))
        proofs = kept["proofs"] if kept.get("weights") == report.weights else []
    kind = ("dtype", "device", "tp", "pp", "cache")
    proof = {name: value for name, value in asdict(report).items() if name not in ("folder", "weights", "passed_over")}
    proof |= {"right": report.right, "weft": __version__, "torch": torch.__version__, "machine": platform.machine()}
    proofs = [one for one in proofs if any(one.get(name) != proof[name] for name in kind)] + [proof]
    write_whole(path, json.dumps({"weights": report.weights, "proofs": proofs}, indent=2) + "\n")
    return path

"""Proof that weights are what weft says they are: computed by weft and by transformers, on the same tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weft.checkpoint.weights import load_decoder
from weft.models.decoder import Decoder
from weft.serve.folder import find_model
from weft.serve.generate import complete
from weft.serve.requests.request import Sampling

BOUND = 1e-5
"""Largest difference in fp32, norm over norm."""

BATCH, TOKENS = 2, 64
"""Sequences that are computed, and their tokens at most; the last half is continued once more, greedily."""


@dataclass(frozen=True)
class Stage:
    """A place of the forward pass where both models were listened to: a block, the last norm, or the logits.

    Attributes:
        error: norm of the difference over norm.
        largest: absolute difference of one number.
    """

    name: str
    error: float
    largest: float

    @property
    def right(self) -> bool:
        return self.error <= BOUND  # not a number is not right


@dataclass(frozen=True)
class ExportReport:
    """What was compared.

    Attributes:
        folder: the Hugging Face directory.
        model: transformers' name of the reference.
        stages: in the order of the forward pass; logits last.
        misloaded: tensors that transformers did not find, did not want, or found in another size.
        agreed: tokens, of `tokens`, that both chose alike before the first that differs.
        passed_over: newer checkpoints that are damaged.
    """

    folder: Path
    model: str
    num_params: int
    stages: list[Stage]
    misloaded: list[str]
    agreed: int
    tokens: int
    passed_over: list[str]

    @property
    def right(self) -> bool:
        return not self.misloaded and self.agreed == self.tokens and all(stage.right for stage in self.stages)

    def first_wrong(self) -> str | None:
        if self.misloaded:
            return f"the tensors: {self.misloaded[0]}"
        wrong = next((stage.name for stage in self.stages if not stage.right), None)
        return wrong or (None if self.agreed == self.tokens else f"token {self.agreed + 1} of the continuation")


def verify_export(path: Path) -> ExportReport:
    """Compute a checkpoint, or any Hugging Face directory, by weft's Decoder and by transformers' own model, in fp32.

    Args:
        path: a checkpoint, a run (its newest), or the directory.

    Raises:
        ValueError: there is no model there, or transformers is not installed, does not load it or does not compute it.
    """
    folder, passed_over = find_model(path)
    reference, misloaded = load_reference(folder)
    shape, model = load_decoder(folder, dtype=torch.float32)
    length = min(TOKENS, shape.max_seq)
    tokens = torch.randint(shape.vocab, (BATCH, length), generator=torch.Generator().manual_seed(0))
    try:
        theirs = hear_reference(reference, tokens)
    except RuntimeError as error:  # its kernel for experts takes no rows of 33 numbers, say
        raise ValueError(f"transformers loads {folder}, and does not compute it: {error}") from error
    ours = hear(model, tokens)
    prompts = tokens[:, : max(1, length // 2)]
    chosen = complete(model, prompts.tolist(), Sampling(max_tokens=length - prompts.shape[1]))
    expected = continue_greedily(reference, prompts, length - prompts.shape[1])
    agreed = min(agreement(mine, yours) for mine, yours in zip(chosen, expected, strict=True))
    return ExportReport(
        folder, type(reference).__name__, shape.num_params,
        [stage(name, theirs[name], ours[name]) for name in theirs],
        misloaded, agreed, length - prompts.shape[1], passed_over,
    )  # fmt: skip


def load_reference(folder: Path) -> tuple[Any, list[str]]:
    """transformers' own model of a directory, and the tensors that did not find their place in it."""
    try:
        import transformers
    except ImportError:
        raise ValueError(
            "weft verify export compares with transformers, which is not installed: pip install transformers"
        ) from None
    transformers.logging.disable_progress_bar()
    auto: Any = transformers.AutoModelForCausalLM
    try:
        model, info = auto.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True, output_loading_info=True
        )
    except Exception as error:  # of any kind, where a directory is not whole
        raise ValueError(f"transformers does not load {folder}: {error}") from error
    keys = ("missing_keys", "unexpected_keys", "mismatched_keys")
    return model.eval(), [f"{key.removesuffix('_keys')} {name}" for key in keys for name in sorted(info[key])]


@torch.inference_mode()
def hear(model: Decoder, tokens: Tensor) -> dict[str, Tensor]:
    """What weft's blocks, norm and head give."""
    heard: dict[str, Tensor] = {}

    def listen(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            heard[name] = output

        return hook

    listened = dict(model.named_modules())
    handles = [listened[name].register_forward_hook(listen(name)) for name in stage_names(model.shape.num_layers)]
    logits = model(tokens)
    for handle in handles:
        handle.remove()
    return heard | {"logits": logits}


@torch.inference_mode()
def hear_reference(model: Any, tokens: Tensor) -> dict[str, Tensor]:
    """The same of transformers' model: its last hidden states are those behind the last norm."""
    output = model(tokens, output_hidden_states=True, use_cache=False)
    states = output.hidden_states[1:]
    return dict(zip(stage_names(len(states)), states, strict=True)) | {"logits": output.logits}


def stage_names(num_layers: int) -> list[str]:
    return [*(f"blocks.{index}" for index in range(num_layers - 1)), "norm"]


def stage(name: str, theirs: Tensor, ours: Tensor) -> Stage:
    difference = theirs.double() - ours.double()
    norm = float(theirs.double().norm())
    error = float(difference.norm()) / norm if norm else math.nan
    return Stage(name, error, float(difference.abs().max()))


@torch.inference_mode()
def continue_greedily(model: Any, prompts: Tensor, count: int) -> list[list[int]]:
    """transformers' most probable continuation, by its own loop and cache, whatever settings lie beside the model."""
    import transformers

    if count == 0:
        return [[] for _ in prompts]
    model.generation_config = transformers.GenerationConfig(max_new_tokens=count, do_sample=False, pad_token_id=0)
    both = model.generate(prompts, attention_mask=torch.ones_like(prompts))
    return both[:, prompts.shape[1] :].tolist()


def agreement(a: list[int], b: list[int]) -> int:
    """Tokens before the first that differs."""
    same = [one == other for one, other in zip(a, b, strict=True)]
    return same.index(False) if False in same else len(same)

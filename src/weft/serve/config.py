"""The engine's settings. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

CACHE_DTYPES = ("auto", "int8")

MAX_STRIDE = 256
"""See `EngineConfig.stride`."""

STEP_TOKENS = {"cpu": 512, "cuda": 2048}
"""By device: enough that a step's products are worth their while."""


@dataclass(frozen=True)
class EngineConfig:
    """How much an engine takes on at once, and how.

    Attributes:
        max_sequences: completions that run at once; the others wait.
        max_waiting: requests that may wait; one more is refused.
        step_tokens: tokens of one step at most: every running sequence's next one, then parts of prompts. Less makes
            steps even (a long prompt holds others up less), more reads prompts faster. 0: 512, on a GPU 2,048, and in any
            case what `max_sequences` take.
        block_tokens: tokens of one block of the cache.
        cache_tokens: tokens whose keys and values are kept, of all sequences; None: as many as `cache_bytes` hold.
        cache_bytes: memory of the cache; None: on a GPU `gpu_share` of its memory less the weights, on a CPU 1 GiB; never
            more than `max_sequences` whole contexts need.
        gpu_share: see `cache_bytes`.
        cache_dtype: "auto": keys and values as the model computes them; "int8": in 8 bits with a scale for each token and
            head, so that about twice (of bf16) as many tokens have room. `weft verify serve` shows what that costs.
        max_context: tokens of a prompt and its completion together; None: the model's own.
        prefix_cache: keep the blocks of finished sequences, for prompts that begin alike.
        invariant: what a request gets does not depend, to the bit, on what else the engine does: see `stride`. A batch
            takes as long as its requests one after the other.
        draft_tokens: tokens that speculation guesses each step, by a draft model, or by looking the last few tokens up in
            the text itself; 0: none.
        adapters: LoRA adapters by name, for `Request.adapter`: directories as peft writes them.
        compile: torch.compile the step's code between the attentions, which takes some seconds at the start. On a GPU,
            steps of one token a sequence are CUDA graphs as well, but for models with experts, and with adapters. None: on
            a GPU.
        tp: processes that every matrix is cut over.
        pp: stages that the blocks are dealt out to, each of `tp` processes, for a model that has no room otherwise: they
            compute one after the other, so it is no faster.
        device: as `weft generate --device`.
        dtype: as `weft generate --dtype`.
    """

    max_sequences: int = 64
    max_waiting: int = 256
    step_tokens: int = 0
    block_tokens: int = 16
    cache_tokens: int | None = None
    cache_bytes: int | None = None
    cache_dtype: str = "auto"
    gpu_share: float = 0.9
    max_context: int | None = None
    prefix_cache: bool = True
    invariant: bool = False
    draft_tokens: int = 0
    adapters: Mapping[str, str] = field(default_factory=dict)
    compile: bool | None = None
    tp: int = 1
    pp: int = 1
    device: str = "auto"
    dtype: str = "auto"

    @property
    def world(self) -> int:
        """Processes."""
        return self.tp * self.pp

    def check_draft(self, draft: object) -> None:
        """
        Raises:
            ValueError: there is a draft model (not None), and nothing for it to do.
        """
        if draft is not None and not self.draft_tokens:
            raise ValueError(
                "a draft model speculates draft_tokens ahead, which is 0: set it (--draft-tokens), to 4 for one"
            )

    def on(self, device: str) -> EngineConfig:
        """The same for a kind of device, with nothing left open that depends on it."""
        least = self.max_sequences * (1 + self.draft_tokens) + self.invariant * MAX_STRIDE
        step = self.step_tokens or max(least, STEP_TOKENS.get(device, STEP_TOKENS["cpu"]))
        return replace(self, step_tokens=step, compile=device == "cuda" if self.compile is None else self.compile)

    @property
    def stride(self) -> int:
        """Tokens of a prompt that are computed at once where `invariant`: whole blocks, and at most half a step's.

        There every product of the model has the sizes that a request's own length gives it: each request is computed
        alone, its prompt in strides and the rest token by token, after a preemption too; only whole strides are shared.
        Equal calls on equal numbers give equal bits, which holds of every kernel that does not add up in random order.
        """
        most = min(MAX_STRIDE, self.step_tokens // 2 or MAX_STRIDE)  # left open, it is enough
        return max(self.block_tokens, most // self.block_tokens * self.block_tokens)

    def __post_init__(self) -> None:
        for name in ("max_sequences", "block_tokens", "tp", "pp"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("max_waiting", "draft_tokens"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 or more")
        if 0 < self.step_tokens < self.max_sequences * (1 + self.draft_tokens):
            raise ValueError(
                f"step_tokens is {self.step_tokens}, fewer than {self.max_sequences} sequences of "
                f"{1 + self.draft_tokens} tokens each: raise it, or lower max_sequences"
            )
        if self.invariant and self.draft_tokens:
            raise ValueError(
                "invariant: speculation computes several tokens at once, as many as it guesses; leave one out"
            )
        if self.invariant and 0 < self.step_tokens < self.max_sequences + self.stride:
            raise ValueError(
                f"step_tokens is {self.step_tokens}; where invariant, a step has to hold {self.max_sequences} sequences "
                f"and a stride of {self.stride} tokens of a prompt: raise it, or lower max_sequences"
            )
        for name in ("cache_tokens", "cache_bytes", "max_context"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if bad := [name for name in self.adapters if not name or "\0" in name]:
            raise ValueError(f"adapters: {bad[0]!r} is no name")
        if self.cache_dtype not in CACHE_DTYPES:
            raise ValueError(f"cache_dtype is {self.cache_dtype}; it must be {' or '.join(CACHE_DTYPES)}")
        if not 0 < self.gpu_share <= 1:
            raise ValueError(f"gpu_share is {self.gpu_share}; it must be above 0 and at most 1")

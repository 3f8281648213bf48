"""How large the models of benchmarks/gpu.py are, on a GPU and for a rehearsal."""

from __future__ import annotations

from dataclasses import dataclass

from weft.models.shape import Experts, Latent, Shape


@dataclass(frozen=True)
class Sizes:
    """How large everything is, on a GPU or for a rehearsal on a CPU."""

    small: dict[str, Shape]  # of parity
    small_batch: int
    small_seq: int
    block: Shape  # of blocks and peers; its layers are set there
    most_layers: int
    block_runs: tuple[tuple[int, int], ...]  # sequences of a step, tokens of each
    mixture: Shape  # of parts
    part_tokens: tuple[int, ...]
    peer_layers: int
    peer_vocab: int
    gpt2: Shape
    gpt2_batch: int
    served: Shape
    serve_batches: tuple[int, ...]
    serve_tokens: tuple[int, int]  # of a prompt, and new ones
    contexts: tuple[tuple[int, int], ...]  # sequences, and tokens of each, of attention over the cache
    told: dict[str, Shape]  # of texts on the GPU and on the CPU
    verbs: Shape  # of the commands' run
    verbs_batch: int
    copied: int  # bytes, to measure memory with
    warmup: int
    steps: int
    rounds: int


SMALL = {"num_layers": 4, "hidden": 256, "num_heads": 8, "ffn": 704, "vocab": 2048, "max_seq": 512}
TOLD = {
    "llama": Shape(**SMALL, num_kv_heads=2),
    "gpt2": Shape(**SMALL, family="gpt2"),
    "mistral": Shape(**SMALL, family="mistral", num_kv_heads=2, sliding_window=50),
    "mixtral": Shape(**SMALL, family="mixtral", num_kv_heads=2, experts=Experts(num_experts=4, per_token=2, ffn=352)),
    "deepseek_v2": Shape(
        **SMALL, family="deepseek_v2", latent=Latent(kv_rank=64, nope_dim=32, rope_dim=16, value_dim=32)
    ),
}
GPU = Sizes(
    small={
        "gpt2": Shape(family="gpt2", num_layers=4, hidden=256, num_heads=4, vocab=2049, max_seq=256),
        "llama": Shape(num_layers=4, hidden=256, num_heads=8, num_kv_heads=2, ffn=704, vocab=2048, max_seq=256),
        "mixtral": Shape(
            family="mixtral", num_layers=2, hidden=256, num_heads=8, num_kv_heads=2, ffn=704, vocab=2048, max_seq=256,
            experts=Experts(num_experts=4, per_token=2, ffn=352),
        ),
        "deepseek_v3": Shape(
            family="deepseek_v3", num_layers=2, hidden=256, num_heads=8, ffn=704, vocab=2048, max_seq=256,
            latent=Latent(q_rank=96, kv_rank=64, nope_dim=32, rope_dim=16, value_dim=32),
            experts=Experts(
                num_experts=4, per_token=2, ffn=128, dense_layers=1, shared=1, scores="sigmoid", groups=2, top_groups=1
            ),
        ),
    },
    small_batch=4,
    small_seq=256,
    block=Shape(
        num_layers=1, hidden=4096, num_heads=32, num_kv_heads=8, ffn=14336, vocab=128256, max_seq=8192,
        rope_theta=500_000.0,
    ),
    most_layers=32,
    block_runs=((2, 4096), (1, 8192)),
    mixture=Shape(
        num_layers=1, hidden=4096, num_heads=32, num_kv_heads=8, ffn=14336, vocab=32000, max_seq=8192,
        experts=Experts(num_experts=8, per_token=2, ffn=3584),
    ),
    part_tokens=(8192,),
    peer_layers=4,
    peer_vocab=32000,
    gpt2=Shape(family="gpt2", num_layers=12, hidden=768, num_heads=12, vocab=50257, max_seq=1024),
    gpt2_batch=32,
    served=Shape(
        num_layers=32, hidden=4096, num_heads=32, num_kv_heads=8, ffn=14336, vocab=128256, max_seq=8192,
        rope_theta=500_000.0,
    ),
    serve_batches=(1, 64, 256),
    serve_tokens=(128, 65),
    contexts=((1, 4096), (64, 512), (64, 4096), (256, 512)),
    told=TOLD,
    verbs=Shape(num_layers=8, hidden=768, num_heads=12, num_kv_heads=4, ffn=2048, vocab=4096, max_seq=512),
    verbs_batch=16,
    copied=2**32,
    warmup=3,
    steps=8,
    rounds=8,
)  # fmt: skip
TINY = Sizes(
    small={
        "gpt2": Shape(family="gpt2", num_layers=1, hidden=16, num_heads=2, vocab=64, max_seq=16),
        "llama": Shape(num_layers=3, hidden=32, num_heads=4, num_kv_heads=2, ffn=64, vocab=64, max_seq=16),
        "mixtral": Shape(
            family="mixtral",
            num_layers=1,
            hidden=16,
            num_heads=2,
            num_kv_heads=1,
            ffn=32,
            vocab=64,
            max_seq=16,
            experts=Experts(num_experts=4, per_token=2, ffn=16),
        ),
        "deepseek_v3": Shape(
            family="deepseek_v3",
            num_layers=1,
            hidden=16,
            num_heads=2,
            ffn=32,
            vocab=64,
            max_seq=16,
            latent=Latent(q_rank=12, kv_rank=8, nope_dim=4, rope_dim=4, value_dim=4),
            experts=Experts(num_experts=4, per_token=2, ffn=16, shared=1, scores="sigmoid", groups=2, top_groups=1),
        ),
    },
    small_batch=4,
    small_seq=8,
    block=Shape(num_layers=1, hidden=32, num_heads=4, num_kv_heads=2, ffn=64, vocab=128, max_seq=32),
    most_layers=2,
    block_runs=((2, 16),),
    mixture=Shape(
        num_layers=1,
        hidden=32,
        num_heads=4,
        num_kv_heads=2,
        ffn=64,
        vocab=128,
        max_seq=32,
        experts=Experts(num_experts=4, per_token=2, ffn=16),
    ),
    part_tokens=(16,),
    peer_layers=1,
    peer_vocab=64,
    gpt2=Shape(family="gpt2", num_layers=1, hidden=16, num_heads=2, vocab=64, max_seq=16),
    gpt2_batch=2,
    served=Shape(num_layers=1, hidden=32, num_heads=4, num_kv_heads=2, ffn=64, vocab=128, max_seq=64),
    serve_batches=(1, 3),
    serve_tokens=(8, 4),
    contexts=((1, 32), (3, 16)),
    told={"llama": Shape(num_layers=1, hidden=32, num_heads=4, num_kv_heads=2, ffn=64, vocab=128, max_seq=64)},
    verbs=Shape(num_layers=2, hidden=32, num_heads=4, num_kv_heads=2, ffn=64, vocab=300, max_seq=32),
    verbs_batch=4,
    copied=2**20,
    warmup=1,
    steps=2,
    rounds=2,
)

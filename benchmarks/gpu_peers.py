"""What benchmarks/gpu.py holds weft against: plain PyTorch loops, transformers' GPT-2, Megatron-Core's GPTModel."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from weft.models.huggingface import config_from_shape
from weft.models.shape import Shape

Step = Callable[[], float]


class PlainBlock(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.num_heads
        self.norm1, self.norm2 = nn.LayerNorm(shape.hidden), nn.LayerNorm(shape.hidden)
        self.qkv, self.out = nn.Linear(shape.hidden, 3 * shape.hidden), nn.Linear(shape.hidden, shape.hidden)
        self.up, self.down = nn.Linear(shape.hidden, shape.ffn), nn.Linear(shape.ffn, shape.hidden)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class PlainGPT2(nn.Module):
    """GPT-2 as one would write it by hand, and nothing else. Gives the mean loss."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed, self.positions = nn.Embedding(shape.vocab, shape.hidden), nn.Embedding(shape.max_seq, shape.hidden)
        self.blocks = nn.Sequential(*[PlainBlock(shape) for _ in range(shape.num_layers)])
        self.norm = nn.LayerNorm(shape.hidden)
        for table in (self.embed, self.positions):
            nn.init.normal_(table.weight, std=shape.init_std)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embed(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        logits = F.linear(self.norm(self.blocks(x)), self.embed.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


class TransformersGPT2(nn.Module):
    """transformers' own model and loss, its dropout set to 0 as in weft."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        transformers = importlib.import_module("transformers")
        settings = config_from_shape(shape) | dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
        kind = settings.pop("model_type")
        self.model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **settings))

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """The targets are shifted inside of the model: it is given the tokens for them."""
        return self.model(input_ids=tokens, labels=tokens, use_cache=False).loss


def gpt2_peer(shape: Shape, *, plain: bool = False) -> tuple[str, nn.Module]:
    """transformers' model where it is installed, else (or if asked for) the plain one; under its name."""
    if not plain and importlib.util.find_spec("transformers") is not None:
        return f"transformers {importlib.metadata.version('transformers')}", TransformersGPT2(shape)
    return "plain torch.nn", PlainGPT2(shape)


def plain_loop(model: nn.Module, tokens: Tensor, *, compiled: bool, lr: float, clip: float) -> Step:
    """The loop that everyone writes, at its best: fused AdamW, autocast to bf16 over fp32 weights, sdpa."""
    device = tokens.device
    model = model.to(device).train()
    fused = device.type == "cuda"
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1, fused=fused)
    run = torch.compile(model) if compiled else model
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step() -> float:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = run(inputs, targets)
        loss.backward()
        clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def installed(package: str) -> str | None:
    """Its version."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def megatron_pass(shape: Shape, tokens: Tensor) -> tuple[str, Step]:
    """Forward and backward of Megatron-Core's GPTModel of a Llama's shape, bf16 weights, on one GPU.

    Its layers are Transformer Engine's where that is installed, else its own local ones, whose attention is not fused:
    the name says which.
    """
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel, gpt_layer_specs
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.transformer_config import TransformerConfig

    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # it asks for that
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(1, 1)
    on_gpu = tokens.device.type == "cuda"
    if on_gpu:
        model_parallel_cuda_manual_seed(0)
    config = TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden,
        num_attention_heads=shape.num_heads,
        num_query_groups=shape.num_kv_heads,
        kv_channels=shape.head_dim,
        ffn_hidden_size=shape.ffn,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        normalization="RMSNorm",
        layernorm_epsilon=shape.norm_eps,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bf16=True,
        params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16,
        use_cpu_initialization=not on_gpu,
        gradient_accumulation_fusion=False,
    )
    engine = on_gpu and importlib.util.find_spec("transformer_engine") is not None
    if engine:
        layers, spec = "Transformer Engine's", gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec()
    else:
        layers, spec = "its local", gpt_layer_specs.get_gpt_layer_local_spec(normalization="RMSNorm")
    model = GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=shape.vocab,
        max_sequence_length=shape.max_seq,
        position_embedding_type="rope",
        rotary_base=int(shape.rope_theta),
        share_embeddings_and_output_weights=False,
    )
    model = model.to(device=tokens.device, dtype=torch.bfloat16).train()
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    batch, seq = inputs.shape
    positions = torch.arange(seq, device=tokens.device).expand(batch, seq).contiguous()
    hidden = None if engine else torch.ones(1, 1, seq, seq, dtype=torch.bool, device=tokens.device).triu(1)

    def step() -> float:
        model.zero_grad(set_to_none=True)
        loss = model(inputs, positions, hidden, labels=targets).float().mean()
        loss.backward()
        return loss.item()

    return f"megatron-core {installed('megatron-core')}, {layers} layers", step

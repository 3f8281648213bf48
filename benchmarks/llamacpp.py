"""llama.cpp as a peer, in this process, by xllamacpp: the same weights, of a GPT-2 or a Qwen3 mixture, as a GGUF file.

Prompts go in as ids and come out as ids; a run is compared with weft's own before it is timed.
"""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gguf
import torch
import xllamacpp
from torch import Tensor

from weft.checkpoint.weights import load_decoder
from weft.models.shape import Shape

PLACES = {
    "embed": "token_embd", "positions": "position_embd", "norm": "output_norm", "attention_norm": "attn_norm",
    "attention.out": "attn_output", "mlp_norm": "ffn_norm", "mlp.up": "ffn_up", "mlp.down": "ffn_down",
    "head": "output", "mlp.router": "ffn_gate_inp",
    **{f"attention.{part}": f"attn_{part}" for part in ("q", "k", "v", "q_norm", "k_norm")},
}  # fmt: skip


def write_gguf(folder: Path, file: Path, dtype: str) -> None:
    """Of a Hugging Face directory; matrices in `dtype`, float32 or bfloat16, vectors and routers in fp32."""
    shape, model = load_decoder(folder)
    writer = gguf.GGUFWriter(str(file), "gpt2" if shape.experts is None else "qwen3moe")
    write_settings(writer, shape)
    weights = {name: weight.detach().float() for name, weight in model.named_parameters()}
    for name, weight in weights.items():
        module, leaf = name.rsplit(".", 1)
        prefix = ""
        if module.startswith("blocks."):
            _, index, module = module.split(".", 2)
            prefix = f"blk.{index}."
        if module == "mlp.experts":  # [X·F, D]; there down is [D, F] of each
            assert shape.experts is not None
            each = weight.unflatten(0, (shape.experts.num_experts, -1))
            each = each.mT.contiguous() if leaf == "down" else each
            add(writer, f"{prefix}ffn_{leaf}_exps.weight", each, dtype)
            continue
        if shape.experts is None and module == "attention.q":
            weight = joined(weights, name)
            module = "attn_qkv"
        elif shape.experts is None and module in ("attention.k", "attention.v", "head"):
            continue  # beside q; and the head is the embedding
        add(writer, f"{prefix}{PLACES.get(module, module)}.{leaf}", weight, dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def joined(weights: dict[str, Tensor], q: str) -> Tensor:
    return torch.cat([weights[q.replace("attention.q", f"attention.{part}")] for part in "qkv"])


def add(writer: Any, name: str, weight: Tensor, dtype: str) -> None:
    if weight.dim() == 1 or dtype == "float32" or "position" in name or "gate_inp" in name:
        writer.add_tensor(name, weight.numpy())
        return
    kind = gguf.GGMLQuantizationType.BF16
    writer.add_tensor(name, gguf.quants.quantize(weight.numpy(), kind), raw_dtype=kind)


def write_settings(writer: Any, shape: Shape) -> None:
    writer.add_context_length(shape.max_seq)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.num_layers)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_head_count(shape.num_heads)
    writer.add_layer_norm_eps(shape.norm_eps)
    if shape.experts is not None:
        writer.add_layer_norm_rms_eps(shape.norm_eps)
        writer.add_head_count_kv(shape.num_kv_heads)
        writer.add_key_length(shape.head_dim)
        writer.add_value_length(shape.head_dim)
        writer.add_rope_freq_base(shape.rope_theta)
        writer.add_expert_count(shape.experts.num_experts)
        writer.add_expert_used_count(shape.experts.per_token)
        writer.add_expert_feed_forward_length(shape.experts.ffn)
    writer.add_tokenizer_model("gpt2")  # made-up words: a token's number can be read from its text
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"<{number}>" for number in range(shape.vocab)])
    writer.add_token_types([gguf.TokenType.NORMAL] * shape.vocab)
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(shape.vocab - 1)


class LlamaCpp:
    """Its server, on one thread, with as many slots as there are prompts."""

    def __init__(self, file: Path, slots: int, context: int) -> None:
        settings = xllamacpp.CommonParams()
        settings.model.path = str(file)
        settings.n_parallel, settings.n_ctx, settings.n_predict = slots, slots * context, -1
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
        settings.cpuparams.poll = settings.cpuparams_batch.poll = 0
        settings.warmup, settings.cache_prompt, settings.cache_ram_mib = True, False, 0
        settings.fit_params = False
        self.server = xllamacpp.Server(settings)
        self.pool = ThreadPoolExecutor(slots)

    def run(self, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
        """New tokens of each prompt, all asked at once."""
        return list(self.pool.map(lambda prompt: self._one(prompt, num_tokens), prompts))

    def _one(self, prompt: list[int], num_tokens: int) -> list[int]:
        asked = {
            "prompt": prompt, "n_predict": num_tokens, "temperature": 0, "ignore_eos": True, "cache_prompt": False,
        }  # fmt: skip
        found = self.server.handle_completions(asked)
        return [int(token) for token in re.findall(r"<(\d+)>", found["choices"][0]["text"])]

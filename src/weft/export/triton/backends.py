"""What each of Triton's backends wants to find in a model's folder. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weft.export.triton.pbtxt import Word
from weft.models.shape import Shape
from weft.serve.config import EngineConfig
from weft.serve.triton.repository import IMPORT
from weft.serve.triton.settings import ADAPTERS, FILE, WEIGHTS, settings_table
from weft.serve.triton.tensors import INPUTS, OUTPUTS, Tensor

Table = dict[str, Any]


@dataclass(frozen=True)
class Wanted:
    """What is exported.

    Attributes:
        name: of the model inside of Triton.
        folder: where the model's folder will lie, absolute.
        tp: GPUs, or processes, that it is cut over.
        dtype: of the weights, by torch's name.
        adapters: the rank of each by its name.
        linked: folders elsewhere that it points at, of weights and adapters.
    """

    name: str
    folder: Path
    shape: Shape
    tp: int
    dtype: str = "float32"
    adapters: Mapping[str, int] = field(default_factory=dict)
    linked: Sequence[Path] = ()

    @property
    def weights(self) -> Path:
        return self.folder / "1" / WEIGHTS


@dataclass(frozen=True)
class Written:
    """A model's config, and the text files of its first version."""

    config: Table
    files: dict[str, str]


def weft(wanted: Wanted) -> Written:
    """The Python backend, with weft's engine behind it."""
    config = {
        "name": wanted.name,
        "backend": "python",
        "max_batch_size": 0,  # the engine makes the batch
        "model_transaction_policy": {"decoupled": True},
        "input": [described(tensor, optional=True) for tensor in INPUTS],
        "output": [described(tensor) for tensor in OUTPUTS],
        "instance_group": [ONE_INSTANCE],
    }
    adapters = {name: f"{ADAPTERS}/{name}" for name in wanted.adapters}
    settings = settings_table(EngineConfig(tp=wanted.tp, adapters=adapters))
    code = f'"""Its settings are in {FILE}."""\n\n{IMPORT}\n\n__all__ = ["TritonPythonModel"]\n'
    return Written(config, {"model.py": code, FILE: as_json(settings)})


def vllm(wanted: Wanted) -> Written:
    """https://github.com/triton-inference-server/vllm_backend: it adds inputs and outputs to the config by itself.

    Raises:
        ValueError: vLLM takes no adapters of this model, or of this rank.
    """
    if wanted.adapters and wanted.shape.family == "gpt2":
        raise ValueError("--adapter: vLLM has none for GPT-2: merge it into the model, or use weft")
    config = {
        "name": wanted.name,
        "backend": "vllm",
        "max_batch_size": 0,
        "model_transaction_policy": {"decoupled": True},
        "instance_group": [ONE_INSTANCE],
    }
    engine: Table = {
        "model": str(wanted.weights),
        "dtype": wanted.dtype,  # left to itself, vLLM computes with fp32 weights in 16 bits
        "tensor_parallel_size": wanted.tp,
        "max_model_len": wanted.shape.max_seq,
        "gpu_memory_utilization": 0.9,
    }
    if not wanted.adapters:
        return Written(config, {"model.json": as_json(engine)})
    rank = max(wanted.adapters.values())
    if rank > VLLM_RANKS[-1]:
        raise ValueError(f"--adapter: rank {rank} is more than vLLM takes, {VLLM_RANKS[-1]}: merge it into the model")
    engine |= {
        "enable_lora": True,
        "max_loras": len(wanted.adapters),
        "max_lora_rank": min(one for one in VLLM_RANKS if one >= rank),
    }
    folders = {name: str(wanted.folder / "1" / ADAPTERS / name) for name in wanted.adapters}
    return Written(config, {"model.json": as_json(engine), "multi_lora.json": as_json(folders)})


def tensorrtllm(wanted: Wanted) -> Written:
    """The LLM API of https://github.com/NVIDIA/TensorRT-LLM, in its folder triton_backend/all_models/llmapi.

    Raises:
        ValueError: it has no such model.
    """
    if wanted.shape.family == "gpt2":
        raise ValueError("tensorrtllm: TensorRT-LLM has no GPT-2 since its engines are gone: use vllm, or weft")
    config = {
        "name": wanted.name,
        "backend": "python",
        "instance_group": [{"count": 1, "kind": Word("KIND_CPU")}],  # which GPUs is up to TensorRT-LLM
        "input": [described(tensor, optional=tensor.name != "text_input") for tensor in LLMAPI_INPUTS],
        "output": [described(tensor) for tensor in LLMAPI_OUTPUTS],
    }
    settings = "\n".join((
        "# arguments of tensorrt_llm.LLM",
        f"model: {json.dumps(str(wanted.weights))}",
        "backend: pytorch",
        f"tensor_parallel_size: {wanted.tp}",
        "pipeline_parallel_size: 1",
        f"max_seq_len: {wanted.shape.max_seq}",
        "",
        "# what Triton is told",
        "triton_config:",
        "  max_batch_size: 0",
        "  decoupled: true",
        "",
    ))  # fmt: skip
    return Written(config, {"model.yaml": settings})


def onnxruntime(wanted: Wanted) -> Written:
    """https://github.com/triton-inference-server/onnxruntime_backend: `model.onnx`, a folder where weights lie apart."""
    config = {
        "name": wanted.name,
        "backend": "onnxruntime",
        "max_batch_size": 32,
        "input": [{"name": "input_ids", "data_type": Word("TYPE_INT64"), "dims": [-1]}],
        "output": [{"name": "logits", "data_type": Word("TYPE_FP32"), "dims": [-1, wanted.shape.vocab]}],
        "dynamic_batching": {"max_queue_delay_microseconds": 1000},
        "instance_group": [{"count": 1}],  # on each GPU, or the CPU, where Triton would hold the weights twice
    }
    return Written(config, {})


def aoti(wanted: Wanted) -> Written:
    """https://github.com/triton-inference-server/pytorch_backend, which makes no batches for such a model."""
    config = {
        "name": wanted.name,
        "backend": "pytorch",
        "platform": "torch_aoti",
        "max_batch_size": 0,
        "input": [{"name": "INPUT__0", "data_type": Word("TYPE_INT64"), "dims": [-1, -1]}],
        "output": [{"name": "OUTPUT__0", "data_type": Word("TYPE_FP32"), "dims": [-1, -1, wanted.shape.vocab]}],
        "instance_group": [{"count": 1, "kind": Word("KIND_CPU")}],
    }
    return Written(config, {})


BACKENDS: dict[str, Callable[[Wanted], Written]] = {
    "weft": weft, "vllm": vllm, "tensorrtllm": tensorrtllm, "onnxruntime": onnxruntime, "aoti": aoti,
}  # fmt: skip
GRAPHS = ("onnxruntime", "aoti")
"""Backends that run a graph, which has the weights in it."""
PLAIN = ("vllm", "tensorrtllm")
"""Backends whose files must lie where Triton's own Python, which has no locale, can open them."""
ADAPTING = ("weft", "vllm")
"""Backends that serve adapters beside a model."""

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Adapters' matrices are padded to one of these: `MaxLoRARanks` in vLLM's vllm/config/lora.py."""

ONE_INSTANCE = {"count": 1, "kind": Word("KIND_MODEL")}  # which takes the GPUs that it wants

_SAMPLING = (
    ("best_of", "INT32"), ("temperature", "FP32"), ("top_k", "INT32"), ("top_p", "FP32"), ("frequency_penalty", "FP32"),
    ("presence_penalty", "FP32"), ("max_tokens", "INT32"), ("seed", "UINT64"),
    ("exclude_input_from_output", "BOOL"), ("return_perf_metrics", "BOOL"),
)  # fmt: skip
LLMAPI_INPUTS = (
    Tensor("text_input", "STRING", "the prompt", many=True),
    Tensor("streaming", "BOOL", "a response for each token"),
    *(Tensor(f"sampling_param_{name}", kind, "as in tensorrt_llm.SamplingParams") for name, kind in _SAMPLING),
    Tensor("sampling_param_stop", "STRING", "texts that end it", many=True),
    Tensor("return_finish_reason", "BOOL", "see the outputs"),
    Tensor("return_stop_reason", "BOOL", "see the outputs"),
    Tensor("return_cumulative_logprob", "BOOL", "see the outputs"),
    Tensor("stop", "BOOL", "end the request of this id"),
)
LLMAPI_OUTPUTS = (
    Tensor("text_output", "STRING", "new text", many=True),
    Tensor("finish_reason", "STRING", "why it ended", many=True),
    Tensor("stop_reason", "STRING", "what ended it", many=True),
    Tensor("cumulative_logprob", "FP32", "of the text", many=True),
    *(Tensor(f"kv_cache_{name}", "INT32", "blocks of the cache", many=True)
      for name in ("reused_block", "missed_block", "alloc_new_blocks", "alloc_total_blocks")),
    Tensor("kv_cache_hit_rate", "FP32", "blocks that were there", many=True),
    *(Tensor(f"{name}_time_ns", "INT64", "of the clock")
      for name in ("arrival", "first_scheduled", "first_token", "last_token")),
    Tensor("acceptance_rate", "FP32", "of speculation"),
    Tensor("total_accepted_draft_tokens", "INT32", "of speculation"),
    Tensor("total_draft_tokens", "INT32", "of speculation"),
)  # fmt: skip


def described(tensor: Tensor, optional: bool = False) -> Table:
    table = {"name": tensor.name, "data_type": Word(f"TYPE_{tensor.kind}"), "dims": [-1 if tensor.many else 1]}
    return table | ({"optional": True} if optional else {})


def as_json(table: Table) -> str:
    return json.dumps(table, indent=2) + "\n"

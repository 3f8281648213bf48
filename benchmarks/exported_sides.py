"""vLLM and weft's engine, asked the same: tokens, their log-probabilities and those of the prompts' tokens, texts."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from weft.checkpoint.weights import load_decoder
from weft.serve.config import EngineConfig
from weft.serve.engine import Engine
from weft.serve.folder import load_tokenizer
from weft.serve.requests.request import Request, Sampling

Table = dict[str, Any]

TOKENS = 16
FOR_VLLM = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
"""Else each of its processes wants a NUMA node of its own."""


def ask_vllm(python: str, folders: Sequence[Path], log: Path) -> None:
    """All of them in one process of vLLM's."""
    program = Path(__file__).parent / "users" / "exported_vllm.py"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | FOR_VLLM
    with log.open("a", encoding="utf-8") as file:
        subprocess.run(
            [python, str(program), *map(str, folders)], stdout=file, stderr=file,
            env=environment | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        )  # fmt: skip


def vllm_told(folder: Path) -> Table:
    """Raises ValueError: it could not, in its own words."""
    if not (folder / "told.json").is_file():
        failed = folder / "failed"
        raise ValueError(failed.read_text(encoding="utf-8") if failed.is_file() else "nothing came back")
    told: Table = json.loads((folder / "told.json").read_text(encoding="utf-8"))
    return told


def ask_weft(
    folder: Path, prompts: Sequence[str | list[int]], dtype: torch.dtype, adapters: Mapping[str, str] | None = None
) -> Table:
    """The same in the same words; with the adapter, where there is one."""
    adapters = adapters or {}
    tokenizer = load_tokenizer(folder) if isinstance(prompts[0], str) else None
    engine = Engine(load_decoder(folder, "cpu", dtype)[1], tokenizer, EngineConfig(adapters=adapters))
    for number, prompt in enumerate(prompts):
        ids = tokenizer.encode(prompt).ids if tokenizer is not None else prompt
        engine.add(
            Request(
                str(number), ids, Sampling(max_tokens=TOKENS), adapter=next(iter(adapters), None), logprobs=0,
                prompt_logprobs=0,
            )
        )  # fmt: skip
    told: Table = {name: [[] for _ in prompts] for name in ("tokens", "logprobs", "prompt_logprobs")}
    told["texts"] = [""] * len(prompts)
    while engine.busy:
        for output in engine.step():
            number = int(output.id)
            told["texts"][number] += output.text
            told["tokens"][number] += output.tokens
            told["logprobs"][number] += [one.logprob for one in output.logprobs or ()]
            told["prompt_logprobs"][number] += [one.logprob for one in output.prompt_logprobs or () if one]
    return told

"""What a user of vLLM writes: read models, go on with prompts greedily, tell texts, tokens and log-probabilities.

Each folder has model/, prompts.json (texts, or lists of ids), dtype, and maybe adapter/ and arguments.json, more arguments
of vLLM's. It gets told.json, or failed: why.
"""

from __future__ import annotations

import gc
import json
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams
from vllm.distributed.parallel_state import destroy_distributed_environment, destroy_model_parallel
from vllm.lora.request import LoRARequest

TOKENS = 16


def tell(folder: Path) -> dict[str, Any]:
    prompts = json.loads((folder / "prompts.json").read_text(encoding="utf-8"))
    written = isinstance(prompts[0], str)
    adapter = folder / "adapter" if (folder / "adapter").is_dir() else None
    arguments = {
        "enforce_eager": True,
        "max_num_seqs": 8,
        "kv_cache_memory_bytes": 2**26,
        "skip_tokenizer_init": not written,
        "enable_lora": bool(adapter),
    }
    if (folder / "arguments.json").is_file():
        arguments |= json.loads((folder / "arguments.json").read_text(encoding="utf-8"))
    model = LLM(str(folder / "model"), dtype=(folder / "dtype").read_text(encoding="utf-8"), **arguments)
    sampling = SamplingParams(
        temperature=0,
        max_tokens=TOKENS,
        logprobs=0,
        prompt_logprobs=None if written else 0,
        ignore_eos=True,
        detokenize=written,
    )
    done = model.generate(
        [{"prompt": prompt} if written else {"prompt_token_ids": prompt} for prompt in prompts],
        sampling, use_tqdm=False, lora_request=LoRARequest("adapter", 1, str(adapter)) if adapter else None,
    )  # fmt: skip
    scored = [] if written else done
    return {
        "texts": [one.outputs[0].text for one in done],
        "tokens": [list(one.outputs[0].token_ids) for one in done],
        "prompt_logprobs": [logprobs(one.prompt_token_ids[1:], one.prompt_logprobs[1:]) for one in scored],
        "logprobs": [logprobs(one.outputs[0].token_ids, one.outputs[0].logprobs) for one in done],
    }


def logprobs(tokens: list[int], places: list[dict[int, Any]]) -> list[float]:
    return [place[token].logprob for token, place in zip(tokens, places, strict=True)]


def main() -> None:
    for folder in map(Path, sys.argv[1:]):
        print(folder, flush=True)
        try:
            (folder / "told.json").write_text(json.dumps(tell(folder)), encoding="utf-8")
        except Exception as error:  # noqa: BLE001 (whatever it is, it is told, and the next one has its turn)
            traceback.print_exc()
            (folder / "failed").write_text(f"{type(error).__name__}: {error}", encoding="utf-8")
        with suppress(Exception):
            destroy_model_parallel()
            destroy_distributed_environment()
        gc.collect()


if __name__ == "__main__":
    main()

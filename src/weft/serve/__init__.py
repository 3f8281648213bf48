"""The engine, and what stands before it.

`requests` (what is asked and said) → `schedule` (which tokens a step computes) → `steps` (the model with its cache computes
them, on `kernels` of its own, `cut` over several processes) → `engine.py`, three verbs a step. Around it `loop.py` is a
thread, `apart.py` and `inside.py` a process; `server/` speaks OpenAI's and KServe's protocols; `triton/` puts it into
NVIDIA's server.
"""

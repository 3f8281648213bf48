"""The page beside an exported model: how to start Triton on it, and how to ask it. Torch-free."""

from __future__ import annotations

import json

from weft.export.triton.backends import Wanted
from weft.serve.triton.tensors import INPUTS, OUTPUTS, Tensor

IMAGE = "nvcr.io/nvidia/tritonserver:26.09"
"""NVIDIA's containers; one has not been run by weft's own tests, which have no GPU."""


def readme(wanted: Wanted, backend: str) -> str:
    ways = {"weft": _weft, "vllm": _vllm, "tensorrtllm": _tensorrtllm, "onnxruntime": _onnxruntime, "aoti": _aoti}
    return ways[backend](wanted).strip() + "\n"


def _weft(wanted: Wanted) -> str:
    repository = wanted.folder.parent
    return f"""
# {wanted.name}

A model for NVIDIA's Triton Inference Server: its Python backend, with weft's engine behind it.
`1/model.json` has the engine's settings. `tp` is the number of GPUs, or on a CPU of processes, that the model is cut over,
now {wanted.tp}; weft's `src/weft/serve/config.py` explains it and the others.

## Start

On this machine, with or without GPUs:

```
weft serve-triton {repository}
```

It installs the Triton that pip brings into your cache, once, and starts it so that it works (numpy 1 for its Python
backend, this Python's library, a stub that finds both). It asks each model for a token before it says that
it is ready, and starts again what dies.

In a container ($WEFT is a checkout of weft, or a wheel):

```
docker run --rm --gpus all --shm-size 2g -p 127.0.0.1:8000-8002:8000-8002 -v "$WEFT":/weft {_volumes(wanted)} \\
    {IMAGE}-py3 sh -c 'pip install /weft && weft serve-triton {repository} --triton /opt/tritonserver --host 0.0.0.0'
```

On a Slurm cluster:

{_slurm(wanted, f"srun weft serve-triton {repository} --host 0.0.0.0")}

{_reach()}

## Ask

```
curl localhost:8000/v2/models/{wanted.name}/generate -d '{{"text_input": "Once", "max_tokens": 20}}'
curl -N localhost:8000/v2/models/{wanted.name}/generate_stream \\
    -d '{{"text_input": "Once", "max_tokens": 20, "stream": true}}'
```

Over gRPC: `ModelStreamInfer` (the model is decoupled: `infer` is not for it). A `timeout` in microseconds is the deadline
of the whole request; closing the stream cancels it.

{_table("in", INPUTS)}

{_table("out", OUTPUTS)}
"""


def _vllm(wanted: Wanted) -> str:
    repository = wanted.folder.parent
    start = f"tritonserver --model-repository={repository}"
    names = tuple(wanted.adapters)
    lora = f', "lora_name": "{names[0]}"' if names else ""
    adapters = f", and `lora_name`: {', '.join(names)}" if names else ""
    return f"""
# {wanted.name}

A model for NVIDIA's Triton Inference Server with its vLLM backend. `1/model.json` has vLLM's own engine arguments.
`tensor_parallel_size` is the number of GPUs, or on a CPU of processes, now {wanted.tp}. `dtype` is what vLLM computes in,
now {wanted.dtype}, as the weights are; its own choice, `auto`, is 16 bits for weights of 32, said only in its log.
The weights are named by their path: mount the repository at {repository}, as below, or correct it.
weft has run such a repository, with this backend's own code, on a CPU, with vLLM 0.29 in Triton 2.51. The container and a
GPU have not been tried.

## Start

With vLLM and Triton's vLLM backend installed on this machine: `{start}`. In a container:

```
docker run --rm --gpus all --shm-size 8g -p 127.0.0.1:8000-8002:8000-8002 {_volumes(wanted)} \\
    {IMAGE}-vllm-python-py3 {start}
```

On a CPU vLLM takes `gpu_memory_utilization` of the machine's memory for its cache, and wants a NUMA node for each process.
`VLLM_CPU_KVCACHE_SPACE=4` (GiB) and `VLLM_CPU_OMP_THREADS_BIND='0-3|4-7'` (the cores of each, or `nobind`) say otherwise.

On a Slurm cluster (with pyxis):

{_slurm(wanted, f"srun --container-image={IMAGE}-vllm-python-py3 --container-mounts={_mounts(wanted)} {start}")}

{_reach()}

## Ask

```
curl localhost:8000/v2/models/{wanted.name}/generate \\
    -d '{{"text_input": "Once", "parameters": {{"temperature": 0, "max_tokens": 20{lora}}}}}'
curl -N localhost:8000/v2/models/{wanted.name}/generate_stream \\
    -d '{{"text_input": "Once", "stream": true, "parameters": {{"temperature": 0, "max_tokens": 20{lora}}}}}'
```

`parameters` are vLLM's `SamplingParams`{adapters}. Lists go into `sampling_parameters`, a text with the same as JSON.
One that vLLM refuses is answered with words about `lora_name`; what was wrong with it is in Triton's log.
"""


def _tensorrtllm(wanted: Wanted) -> str:
    repository = wanted.folder.parent
    start = f"tritonserver --model-repository={repository}"
    image = f"{IMAGE}-trtllm-python-py3"
    return f"""
# {wanted.name}

A model for NVIDIA's Triton Inference Server with TensorRT-LLM's LLM API, which reads the weights as they are.
`1/model.yaml` has the arguments of `tensorrt_llm.LLM`; `tensor_parallel_size` is the number of GPUs, now {wanted.tp}.
It names the weights by their path: mount the repository at {repository}, as below, or correct it.
weft wrote these files as TensorRT-LLM documents them, and has not run them: that takes a GPU.

## Two files of NVIDIA's

`model.py` and `helpers.py` belong to the version of TensorRT-LLM that runs them; take them from it, once:

```
docker run --rm --entrypoint python3 {image} -c 'import tensorrt_llm; print(tensorrt_llm.__version__)'
git clone --depth 1 --branch v<that version> https://github.com/NVIDIA/TensorRT-LLM
cp TensorRT-LLM/triton_backend/all_models/llmapi/tensorrt_llm/1/*.py {wanted.folder}/1/
```

## Start

In a container:

```
docker run --rm --gpus all --shm-size 8g -p 127.0.0.1:8000-8002:8000-8002 {_volumes(wanted)} \\
    {image} {start}
```

With TensorRT-LLM and Triton installed on this machine: `{start}`. On a Slurm cluster (with pyxis):

{_slurm(wanted, f"srun --mpi=pmix --container-image={image} --container-mounts={_mounts(wanted)} {start}")}

{_reach()}

## Ask

```
curl localhost:8000/v2/models/{wanted.name}/generate_stream \\
    -d '{{"text_input": "Once", "sampling_param_max_tokens": 20, "streaming": true}}'
```
"""


def _onnxruntime(wanted: Wanted) -> str:
    return f"""
# {wanted.name}

A model for NVIDIA's Triton Inference Server with ONNX Runtime: token ids in, logits of every place out, the whole context
each time. weft has run the graph in ONNX Runtime and compared the logits with its own.

{_graph(wanted, "input_ids", "--gpus all ")}
"""


HERE = """
On this machine: `weft serve-triton {repository}`. The Triton that pip brings has no such backend; weft gives it one in
Python, which runs the graph on the CPU. NVIDIA's own backend is in its container. It has been built from NVIDIA's source
and run on a CPU with such a model, in a Triton from pip; the container has not been run.
"""


def _aoti(wanted: Wanted) -> str:
    return f"""
# {wanted.name}

A model for NVIDIA's Triton Inference Server as a library that PyTorch's AOTInductor compiled for the CPU of the machine
where it was exported: token ids in, logits of every place out, the whole context each time. weft has loaded the library
and compared the logits with its own. A container must have the PyTorch that compiled it, or one that loads its packages,
and Triton 26.05 or newer: its backend takes such a model from 26.03 on, but until 26.04 only one with two inputs.

{_graph(wanted, "INPUT__0", "")}
"""


def _graph(wanted: Wanted, entry: str, gpus: str) -> str:
    repository = wanted.folder.parent
    start = f"tritonserver --model-repository={repository}"
    body = {"inputs": [{"name": entry, "shape": [1, 3], "datatype": "INT64", "data": [1, 2, 3]}]}
    return f"""## Start
{HERE.format(repository=repository)}
In a container, or where Triton is installed with this backend: `{start}`.

```
docker run --rm {gpus}-p 127.0.0.1:8000-8002:8000-8002 {_volumes(wanted)} \\
    {IMAGE}-py3 {start}
```

On a Slurm cluster (with pyxis):

{_slurm(wanted, f"srun --container-image={IMAGE}-py3 --container-mounts={_mounts(wanted)} {start}")}

{_reach()}

## Ask

```
curl localhost:8000/v2/models/{wanted.name}/infer -d '{json.dumps(body)}'
```

A text with a token outside the vocabulary, or of more than {wanted.shape.max_seq} tokens, has NaN for all of its logits;
the other texts of its batch have theirs."""


def _volumes(wanted: Wanted) -> str:
    """What a container has to see, by the same paths, in docker's words."""
    repository = wanted.folder.parent
    return " ".join([f"-v {repository}:{repository}", *(f"-v {one}:{one}:ro" for one in wanted.linked)])


def _mounts(wanted: Wanted) -> str:
    """The same in pyxis' words."""
    return ",".join([str(wanted.folder.parent), *(f"{one}:{one}:ro" for one in wanted.linked)])


def _slurm(wanted: Wanted, command: str) -> str:
    return f"""```
#!/bin/sh
#SBATCH --job-name={wanted.name} --nodes=1 --ntasks=1 --gpus-per-node={wanted.tp} --signal=TERM@60
exec {command}
```"""


def _reach() -> str:
    return "Triton asks nobody for a key: let only those reach its ports who may use the model."


def _table(which: str, tensors: tuple[Tensor, ...]) -> str:
    rows = [f"| `{one.name}` | {one.kind}{', any number' if one.many else ''} | {one.what} |" for one in tensors]
    return "\n".join((f"| {which} | type | |", "|---|---|---|", *rows))

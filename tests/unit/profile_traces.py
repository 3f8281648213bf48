"""Synthetic Kineto traces for tests of the reader: written by hand after the format that libkineto writes, no recording.

Times are in µs, as in the files.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

HOST, GPU = 4242, 0
MAIN, BACKWARD = 4242, 4300
COMPUTE, NCCL = 7, 20


def op(name: str, ts: float, dur: float, tid: int = MAIN, **args: Any) -> dict[str, Any]:
    named = {key.replace("_", " "): value for key, value in args.items()}
    return {"ph": "X", "cat": "cpu_op", "name": name, "pid": HOST, "tid": tid, "ts": ts, "dur": dur, "args": named}


def range_(name: str, ts: float, dur: float, tid: int = MAIN) -> dict[str, Any]:
    return {**op(f"weft:{name}", ts, dur, tid), "cat": "user_annotation"}


def launch(correlation: int, ts: float, tid: int = MAIN) -> dict[str, Any]:
    found = op("cudaLaunchKernel", ts, 3, tid)
    return {**found, "cat": "cuda_runtime", "args": {"correlation": correlation, "cbid": 211}}


def kernel(name: str, ts: float, dur: float, correlation: int, stream: int = COMPUTE, **args: Any) -> dict[str, Any]:
    named = {key.replace("_", " "): value for key, value in args.items()}
    args = {"device": GPU, "stream": stream, "correlation": correlation, **named}
    return {"ph": "X", "cat": "kernel", "name": name, "pid": GPU, "tid": stream, "ts": ts, "dur": dur, "args": args}


def memory(ts: float, size: int, address: int, total: int, tid: int = MAIN) -> dict[str, Any]:
    args = {
        "Total Reserved": 2**30,
        "Total Allocated": total,
        "Bytes": size,
        "Device Id": 0,
        "Device Type": 1,
        "Addr": address,
    }
    return {
        "ph": "i",
        "cat": "cpu_instant_event",
        "s": "t",
        "name": "[memory]",
        "pid": HOST,
        "tid": tid,
        "ts": ts,
        "args": args,
    }


def cuda_step(slower: float = 1.0) -> list[dict[str, Any]]:
    """One step of a GPU, 1,000 µs: a block's forward on the main thread, its backward on autograd's, messages beside.

    Busy on stream 7: gemm 100–300 and 500–600·slower, element-wise 300–350, optimizer 800–880; a copy 20–30.
    NCCL on stream 20: all-gather of fsdp 250–400 (100 hidden by what computes), p2p of pp 700–760.
    """
    back = 100 * slower
    dims = {"Input_Dims": [[1024, 4096], [4096, 4096]], "Input_type": ["c10::BFloat16", "c10::BFloat16"]}
    group: dict[str, Any] = {
        "Process_Group_Name": "3",
        "Process_Group_Description": "mesh_shard",
        "In_msg_nelems": 1000,
        "dtype": "BFloat16",
    }
    stages = {"Process_Group_Name": "9", "Process_Group_Description": "mesh_pp"}
    return [
        range_("clock:1700000000000000000", 0, 1),
        range_("step:7", 0, 1000),
        range_("data", 2, 15),
        range_("op:F:0:0", 40, 160),
        range_("module:blocks.0.mlp", 50, 100),
        op("aten::linear", 60, 40, Sequence_number=11),
        op("aten::mm", 65, 30, Sequence_number=11, Fwd_thread_id=0, **dims),
        launch(1, 70),
        op("aten::silu", 110, 20, Sequence_number=12, Input_Dims=[[1024, 4096]], Input_type=["c10::BFloat16"]),
        launch(2, 115),
        op("autograd::engine::evaluate_function: MmBackward0", 420, 60, BACKWARD, Sequence_number=11, Fwd_thread_id=1),
        op("aten::mm", 430, 30, BACKWARD, **dims),
        launch(3, 440, BACKWARD),
        range_("optimizer", 780, 40),
        op("aten::_fused_adamw_", 785, 20),
        launch(4, 790),
        {**kernel("Memcpy HtoD (Pinned -> Device)", 20, 10, 9), "cat": "gpu_memcpy"},
        kernel("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", 100, 200, 1),
        kernel("void at::native::vectorized_elementwise_kernel<4, silu>", 300, 50, 2),
        kernel("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", 250, 150, 5, NCCL, **group),
        kernel("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NNT", 500, back, 3),
        kernel("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", 700, 60, 6, NCCL, **stages),
        kernel("void at::native::multi_tensor_apply_kernel<FusedAdam>", 800, 80, 4),
        memory(66, 1000, 0xA, 5000),
        memory(112, 2000, 0xB, 7000),
        memory(435, 500, 0xC, 7500, BACKWARD),
        memory(470, -2000, 0xB, 5500, BACKWARD),
    ]


def write(file: Path, events: list[dict[str, Any]], **head: Any) -> Path:
    """A trace, gzipped where its name ends so."""
    devices = [{"id": 0, "name": "NVIDIA H100 80GB HBM3", "totalGlobalMem": 85017622528}]
    document = {
        "schemaVersion": 1,
        "deviceProperties": devices,
        "baseTimeNanoseconds": 0,
        "traceEvents": events,
        **head,
    }
    data = json.dumps(document).encode()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(gzip.compress(data) if file.suffix == ".gz" else data)
    return file

"""The machines that published runs were made on: a row's GPU and interconnect → Cluster."""

from __future__ import annotations

import re
from typing import Any

import nanotron
from weft.plan.machine import Cluster, read_cluster

PRESETS = (
    ("GB300", "gb300"), ("GB200", "gb200"), ("GH200", "gh200"), ("B300", "b300"),
    ("B200", "b200"), ("H200", "h200"),
    ("H100-96", "h100-96gb"), ("H100", "h100"), ("H800", "h100"),
    ("A800", "a100-80gb"), ("A100-40", "a100-40gb"), ("A100", "a100-80gb"), ("V100", "v100-32gb"), ("MI300X", "mi300x"),
    ("MI250X", "mi250x"),
)  # fmt: skip


FP4 = 1.88
"""Times as fast as in 8 bits products are in NVFP4, whose peak is 2 (GB200) and 3 (GB300) times as high."""


def cluster_of(row: dict[str, Any]) -> Cluster:
    preset = next((preset for word, preset in PRESETS if word in row["gpu"].upper()), None)
    if preset is None:
        raise ValueError(f"no cluster file for {row['gpu']}")
    cluster = read_cluster(preset, row["gpus"])
    change: dict[str, Any] = {}
    if nanotron.is_sweep(row):
        # EFA: of 3,200 Gb/s a node two thirds (Ultrascale Playbook, all-reduce over nodes); the wait was fitted
        change |= {"network_gb_per_s": 35, "network_wait_us": 353}
    if "fp4" in str(row.get("precision", "")).lower():
        change["peak_8bit_tflops"] = FP4 * cluster.peak_8bit_tflops
    if "16GB" in row["gpu"]:
        change["memory_gib"] = 16
    if "DGX2" in row["gpu"]:  # DGX-2H: 450 W; 130 TFLOP/s (Megatron-LM 1.0's page), of which it keeps what A100 does
        change |= {"mesh": False, "peak_tflops": 130, "gemm_efficiency": 0.83}
    if domain := row.get("nvlink_domain"):
        change["nvlink_domain"] = domain
    per_node = row.get("gpus_per_node") or cluster.per_node
    if "EFA" in str(row.get("interconnect")):
        change["network_wait_us"] = 350  # of docs/accuracy.md: what vTrain's machine has not, and AWS's has
    if network := _network(str(row.get("interconnect") or "")):
        change["network_gb_per_s"] = network / 8 / per_node
    if "PCI" in row["gpu"].upper():
        # messages take PCIe 4 to the CPU, and 16 GB/s to the other (SimuMax, configs/system/a100_pcie.json)
        change |= {"nvlink_gb_per_s": 25, "halves_gb_per_s": 16}
    if "H800" in row["gpu"] or "A800" in row["gpu"]:
        change["nvlink_gb_per_s"] = 200
    if row["gpu"] == "B200" and "SimuMax" in row.get("source", ""):
        # that machine's products, large ones, have 0.45 to 0.51 of the peak (SimuMax, configs/system/b200_bf16_ceperm.json)
        change["gemm_efficiency"] = 0.496
    if "Omni-Path" in str(row.get("interconnect")):
        # PSM2 opens one adapter for a process, and NCCL sees one: a group leaves a node by one process
        change["adapter_gb_per_s"] = 12.5
        if "A100" in row["gpu"]:  # Jean Zay's: "NVLink 4 inter-gpu connects" (BLOOM's model card), where a DGX has 12
            change["nvlink_gb_per_s"] = 100
    return Cluster.model_validate({**dict(cluster), **change})


def _network(text: str) -> float | None:
    """Gb/s of a node."""
    if match := re.search(r"(\d+)\s*x\s*(?:\w+ )*?(\d+)\s*Gb", text):
        return float(match[1]) * float(match[2])
    if match := re.search(r"inter_node_bandwidth (\d+)", text):
        return float(match[1])
    match = re.search(r"(\d+)\s*Gb(?:ps|/s)?(?: node-node| per node)", text)
    return float(match[1]) if match else None

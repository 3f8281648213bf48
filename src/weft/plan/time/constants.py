"""The few numbers of the time and memory models that no datasheet gives. Torch-free.

They describe what is common to all machines; none belongs to a model, a cluster, a framework or a run. Fitted once to a
part of the published runs (docs/accuracy.md says which) and frozen.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Constants:
    wave: float = 0.911  # of the last wave's idle SMs, how much stays idle
    depth: float = 298  # of k, that filling a tile's buffers costs
    kernel: float = 7.48e-06  # s between two kernels that follow each other
    hbm: float = 0.93  # of the memory bandwidth that large kernels reach
    traffic: float = 1.11  # times what a block's element-wise kernels move, for what is not counted
    flash2: float = (
        0.496  # of the rate of Hopper's own attention kernels, that FlashAttention-2 has (Shah et al. 2024, fig. 5)
    )
    flash1: float = 0.5  # of FlashAttention-2's rate, that FlashAttention of 2022 has (Dao 2023, abstract)
    flash3: float = 1.25  # of Hopper's kernels of 2024, that those of 2025 have
    eager: float = 1.3  # times the traffic of fused element-wise kernels
    host: float = 7.2e-06  # s that the CPU takes to launch one kernel
    blocked: float = 2.4  # times that, where it waits for each kernel to end
    kernels: float = 22  # of one block's forward pass, fused
    eager_kernels: float = 94.4
    tp_kernels: float = 8.88  # more of them under tp
    expert_kernels: float = 262  # more of them where there are experts
    each_expert: float = 11  # and for each that a process has
    split_kernels: float = 0.4  # more of those, where their messages go beside the computation
    graph: float = 0.1  # of the CPU's time for a kernel, in a CUDA graph
    backward_kernels: float = 2.44
    nvlink: float = 0.809  # of NVLink's rate, that a collective reaches
    network: float = 0.647  # of the network's
    network_dealt: float = 0.9  # of it, by kernels made for dealing out tokens (DeepEP's README: 43 to 51 of 50 GB/s)
    hop_nvlink: float = 1.23e-06
    hop_network: float = 1.93e-05
    falloff: float = 0.0321  # of the network's rate, as a power of the number of nodes
    start: float = 6.01e-05  # of a collective
    half: float = 3.22e05  # bytes at which a collective has half its rate
    tp_hidden: float = 0.614  # of tp's messages, where they overlap
    dp_hidden: float = 0.769  # of the computation, that can hide dp's messages
    fsdp_hidden: float = 0.93  # of it, where the next block's weights are gathered ahead
    ep_hidden: float = 0.65  # of experts' messages, where they overlap
    pp_exposed: float = 0.926  # of the stages' messages
    spare: float = 0.3  # of a block's time, what the head can use where its stage has a block less than others
    contention: float = (
        0.909  # of the time that a hidden message would take on NVLink, in which it takes SMs and memory from others
    )
    attention_backward: float = 0.593  # of the forward's efficiency
    short_head: float = 0.72  # of attention's efficiency at a head_dim of 64
    loss: float = 39.4  # bytes moved for each logit
    adam: float = 20  # bytes moved for each parameter of the optimizer
    cpu_adam: float = (
        0.43  # of the CPU's memory bandwidth, that its update reaches (Ren et al. 2021, table of Adam's latency)
    )
    step: float = 0.0107  # s that a step takes beside all that
    straggle: float = 0.00229  # by which a doubling of the GPUs above 8 slows a step
    attention_length: float = 600  # tokens of which half attention's efficiency is reached
    traffic_backward: float = 0.954  # element-wise traffic of backward, of the forward's
    outside: float = 7e08  # bytes of context and workspaces
    communicator: float = 1e08  # bytes of each axis's communicator
    usable: float = 0.92  # of a GPU's memory: the rest is the driver's, and holes
    scores: float = 7.65  # bytes moved for each score, where attention writes them
    quantize: float = 2.44  # bytes moved for each number brought to 8 bits, both ways
    routing: float = 24.1  # times the hidden state is moved for each expert of a token


CONSTANTS = Constants()

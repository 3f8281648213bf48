"""Layout: how many ways each axis of the work is cut. Torch-free."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from weft.config.experts import check_experts
from weft.config.layout_text import parse_part
from weft.config.pipeline import (
    balanced,
    check_count,
    check_pipeline,
    chunks_of,
    default_count,
    placement_of,
    table_of,
)
from weft.config.precision import check_computation, check_fp8
from weft.config.recompute import Recompute
from weft.models.shape import Shape
from weft.schedules.orders import ORDERS, SPLIT
from weft.schedules.sheet import read_sheet
from weft.schedules.table import Schedule


class Layout(BaseModel):
    """One way to spread a model and its batch over processes.

    Its text form joins what differs from the default with dots: `fsdp4.tp2.sp.pp2.bf16`; one process is `single`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    dp: int = Field(1, ge=1, description="replicas of the whole model; each takes its share of the batch")
    fsdp: int = Field(1, ge=1, description="ways that weights, gradients and optimizer states are sharded (ZeRO)")
    zero: Literal[1, 2, 3] = Field(
        3, description="what fsdp shards: 1 optimizer states, 2 gradients too, 3 weights too"
    )
    tp: int = Field(1, ge=1, description="ways that every matrix is cut (tensor parallel)")
    sp: bool = Field(False, description="between the matrices, cut the sequence over the tp axis (sequence parallel)")
    async_tp: bool = Field(
        False, description="under sp, each product and the message beside it go in pieces, one under the other"
    )
    cp: int = Field(1, ge=1, description="ways that every sequence is cut (context parallel)")
    cp_kind: Literal["allgather", "ring", "ulysses"] = Field(
        "allgather",
        description="how cp's attention meets keys and values: gathered at once, passed round, or cut by head instead",
    )
    ep: int = Field(1, ge=1, description="ways that the experts are dealt out (expert parallel), over dp, fsdp, cp, tp")
    etp: int | None = Field(None, ge=1, description="ways that each expert's matrices are cut; unset: as tp")
    pp: int = Field(1, ge=1, description="processes that the blocks are dealt out to (pipeline parallel)")
    vp: int = Field(1, ge=1, description="stages of each of them (virtual pipeline); zbv and dualpipev have 2 always")
    schedule: str = Field(
        "1f1b",
        description="order of the pipeline's work: gpipe, 1f1b, interleaved, bfs, zbh1, zbv, dualpipev, or a .csv file",
    )
    stages: tuple[int, ...] = Field((), description="blocks of each of the pp·vp stages; empty: of about equal work")
    micro_batch: int | None = Field(
        None,
        ge=1,
        description="sequences in one pass of one replica; unset: all of them, with pp enough for 2·pp passes",
    )
    recompute: str = Field(
        "none", description="activations computed again in backward: none, selective, full, and finer forms"
    )
    offload: bool = Field(False, description="what blocks keep for backward waits in the CPU's memory")
    offload_weights: bool = Field(
        False,
        description="weights, their reduced gradients, moments and update are the CPU's; blocks get copies in turn",
    )
    offload_optimizer: bool = Field(False, description="AdamW's moments and its update are the CPU's; weights stay")
    loss: Literal["whole", "chunked"] = Field(
        "whole", description="from logits that exist as a whole, or from those of some positions at a time"
    )
    precision: Literal["fp32", "bf16", "fp16", "fp8", "fp8row"] = Field(
        "fp32", description="of the computation; weights and gradients are kept in fp32 always"
    )
    gradients: Literal["fp32", "bf16"] = Field(
        "fp32", description="what gradients that are reduced are added up in before, and reduced in; after that, fp32"
    )
    compile: bool = Field(False, description="torch.compile each block")

    @model_validator(mode="after")
    def _check(self) -> Layout:
        if self.sp and self.tp == 1:
            raise ValueError("layout.sp cuts the sequence over the tp axis: set layout.tp above 1, or leave sp out")
        if self.zero != 3 and self.fsdp == 1:
            raise ValueError(f"layout.zero = {self.zero} says what fsdp shards: set layout.fsdp above 1")
        check_pipeline(self.schedule, self.pp, self.vp)
        if self.cp_kind != "allgather" and self.cp == 1:
            raise ValueError(f"layout.cp_kind = {self.cp_kind} is a way to cut the sequence: set layout.cp above 1")
        inner, experts = self.fsdp * self.cp * self.tp, self.ep * self.expert_tp
        if self.dp * inner % experts or (inner % experts and experts % inner):
            raise ValueError(
                f"layout.ep·etp = {experts} must divide fsdp·cp·tp = {inner}, or be that times a part of dp = {self.dp}: "
                "experts are dealt out over the processes of a stage. Change layout.ep or layout.etp"
            )
        Recompute.parse(self.recompute)
        check_computation(self)
        if self.stages and len(self.stages) != self.num_stages:
            chunks = f" with {self.num_chunks} stages each" if self.num_chunks > 1 else ""
            raise ValueError(
                f"layout.stages lists {len(self.stages)} stages and layout.pp is {self.pp}{chunks}: "
                "give one number for each"
            )
        if any(blocks < 1 for blocks in self.stages):
            raise ValueError(f"layout.stages = {list(self.stages)}: every stage needs at least one block")
        return self

    @property
    def world(self) -> int:
        """Processes that the layout takes."""
        return self.dp * self.fsdp * self.cp * self.pp * self.tp

    @property
    def replicas(self) -> int:
        """Ways that the batch is cut."""
        return self.dp * self.fsdp

    @property
    def compute(self) -> Literal["fp32", "bf16", "fp16"]:
        """What activations and gradients are; fp8 is what some products take their operands as."""
        return "bf16" if self.precision == "fp8" or self.precision == "fp8row" else self.precision

    @property
    def sharded(self) -> bool:
        """Whether FSDP2 holds the weights: cut, in the CPU's memory, or whole where replicas agree in bf16."""
        agree = self.weight_ways[0] > 1 or self.expert_ways[0] > 1
        return self.fsdp > 1 or self.offload_weights or (self.gradients == "bf16" and agree)

    @property
    def lowered(self) -> bool:
        """Whether a process has whole weights in fp32 beside copies that it computes with."""
        return self.precision != "fp32" and not self.sharded

    @property
    def expert_tp(self) -> int:
        """Ways that each expert's matrices are cut."""
        return self.etp or self.tp

    @property
    def weight_ways(self) -> tuple[int, int]:
        """Copies of each weight (beside those of tp), and ways that each copy is sharded. ZeRO shards over cp too."""
        return (self.dp, self.fsdp * self.cp) if self.fsdp > 1 else (self.dp * self.cp, 1)

    @property
    def expert_ways(self) -> tuple[int, int]:
        """The same of experts, which ep and etp have dealt out already."""
        inner, experts = self.fsdp * self.cp * self.tp, self.ep * self.expert_tp
        shards = max(1, inner // experts) if self.fsdp > 1 else 1
        return self.dp * inner // experts // shards, shards

    @property
    def num_chunks(self) -> int:
        """Stages of each process of a pipeline: runs of blocks that do not follow each other."""
        return chunks_of(self.schedule, self.vp)

    @property
    def num_stages(self) -> int:
        return self.pp * self.num_chunks

    @property
    def place(self) -> tuple[int, ...]:
        """Stage → the process on the pp axis that has it."""
        return placement_of(self.schedule, self.pp, self.vp)

    @property
    def splits_backward(self) -> bool:
        """Whether the schedule puts the gradients of weights off."""
        return self.schedule in SPLIT or (self.schedule not in ORDERS and read_sheet(self.schedule).splits)

    def stages_of(self, index: int) -> list[int]:
        """The stages of one process of the pp axis, in the order of the model."""
        return [stage for stage, where in enumerate(self.place) if where == index]

    def table(self, num_micro_batches: int) -> Schedule:
        """The pipeline's schedule. Raises ValueError where it cannot be made for so many micro-batches."""
        return table_of(self.schedule, self.pp, self.vp, num_micro_batches)

    def stage_blocks(self, shape: Shape) -> list[range]:
        """The blocks of each stage, in order. If not told, processes have about equal work, and the head is work too."""
        sizes = self.stages or balanced(shape, self.place)
        ends = [sum(sizes[: stage + 1]) for stage in range(self.num_stages)]
        return [range(end - size, end) for end, size in zip(ends, sizes, strict=True)]

    def micro_batch_size(self, global_batch: int) -> int:
        """Sequences in one forward pass of one replica."""
        local = global_batch // self.replicas
        if self.micro_batch is not None or self.pp == 1:
            return self.micro_batch or local
        return local // default_count(self.schedule, self.pp, self.vp, local)

    def num_micro_batches(self, global_batch: int) -> int:
        """Forward passes of one replica in one step."""
        return global_batch // self.replicas // self.micro_batch_size(global_batch)

    def check(self, shape: Shape, global_batch: int, seq: int) -> None:
        """Refuse what this model and batch cannot be cut into.

        Raises:
            ValueError: naming the setting to change.
        """
        for name, size in (("num_heads", shape.num_heads), ("num_kv_heads", shape.num_kv_heads), ("ffn", shape.ffn)):
            if size % self.tp:
                raise ValueError(f"layout.tp = {self.tp} does not divide model.{name} = {size}")
        if self.cp_kind == "ulysses" and shape.num_kv_heads // self.tp % self.cp:
            raise ValueError(
                f"layout.cp_kind = ulysses deals heads out over layout.cp = {self.cp}, which does not divide the "
                f"{shape.num_kv_heads // self.tp} kv heads (model.num_kv_heads / layout.tp) of each process: "
                "choose allgather or ring"
            )
        check_experts(self, shape, seq)
        if self.tp > shape.vocab:
            raise ValueError(f"layout.tp = {self.tp} is more than model.vocab = {shape.vocab}")
        if seq % (2 * self.cp) and self.cp > 1:
            raise ValueError(
                f"layout.cp = {self.cp} cuts the sequence into 2·cp parts, two for each process, early and late: that "
                f"does not divide train.seq = {seq}"
            )
        if self.sp and seq // self.cp % self.tp:
            raise ValueError(
                f"layout.sp cuts the sequence {self.cp * self.tp} ways, which does not divide train.seq = {seq}"
            )
        if self.num_stages > shape.num_layers:
            which = f"layout.pp = {self.pp}" if self.num_chunks == 1 else f"layout.pp·vp = {self.num_stages}"
            raise ValueError(f"{which} stages need as many blocks; model.num_layers = {shape.num_layers}")
        if self.stages and sum(self.stages) != shape.num_layers:
            raise ValueError(
                f"layout.stages = {list(self.stages)} adds up to {sum(self.stages)} blocks; "
                f"model.num_layers = {shape.num_layers}"
            )
        if global_batch % self.replicas:
            raise ValueError(
                f"train.global_batch = {global_batch} is not a multiple of dp·fsdp = {self.replicas}: "
                "change it, layout.dp or layout.fsdp"
            )
        local = global_batch // self.replicas
        if local % self.micro_batch_size(global_batch):
            raise ValueError(
                f"layout.micro_batch = {self.micro_batch} does not divide the {local} sequences that each replica has "
                f"of train.global_batch = {global_batch}"
            )
        check_fp8(self, shape, self.micro_batch_size(global_batch) * seq // self.cp)
        if self.pp > 1:
            check_count(self.schedule, self.pp, self.vp, self.num_micro_batches(global_batch))

    def __str__(self) -> str:
        parts = [f"{axis}{getattr(self, axis)}" for axis in ("dp", "fsdp") if getattr(self, axis) > 1]
        parts += [f"zero{self.zero}"] if self.zero != 3 else []
        parts += [f"cp{self.cp}"] if self.cp > 1 else []
        parts += [self.cp_kind] if self.cp_kind != "allgather" else []
        parts += [f"ep{self.ep}"] if self.ep > 1 else []
        parts += [f"etp{self.etp}"] if self.etp is not None else []
        parts += [f"tp{self.tp}"] if self.tp > 1 else []
        parts += ["sp"] if self.sp else []
        parts += ["asynctp"] if self.async_tp else []
        parts += [f"pp{self.pp}"] if self.pp > 1 else []
        parts += [f"vp{self.vp}"] if self.vp > 1 else []
        parts += ["stages" + "-".join(map(str, self.stages))] if self.stages else []
        schedule = self.schedule if self.schedule in ORDERS else f"csv({self.schedule})"
        parts += [schedule] if schedule != "1f1b" else []
        parts += [f"mb{self.micro_batch}"] if self.micro_batch is not None else []
        parts += [self.recompute] if self.recompute != "none" else []
        parts += ["offload"] if self.offload else []
        parts += ["offloadweights"] if self.offload_weights else []
        parts += ["offloadoptimizer"] if self.offload_optimizer else []
        parts += [self.loss] if self.loss != "whole" else []
        parts += [self.precision] if self.precision != "fp32" else []
        parts += ["bf16grads"] if self.gradients == "bf16" else []
        parts += ["compile"] if self.compile else []
        return ".".join(parts) or "single"

    @classmethod
    def parse(cls, text: str) -> Layout:
        """The layout that a text such as `fsdp4.tp2.sp.bf16` stands for.

        Raises:
            ValueError: naming the part that is not understood.
        """
        fields: dict[str, object] = {}
        for part in re.split(r"\.(?![^(]*\))", text.strip()):  # not inside of csv(…)
            name, value = parse_part(part, text)
            if name in fields:
                raise ValueError(f"layout {text!r} sets {name} twice")
            if name:
                fields[name] = value
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            found = error.errors()[0]
            field = f"{'.'.join(map(str, found['loc']))}: " if found["loc"] else ""
            raise ValueError(f"layout {text!r}: {found.get('ctx', {}).get('error', field + found['msg'])}") from None

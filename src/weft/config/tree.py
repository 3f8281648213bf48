"""The settings of a run, as one typed and frozen tree."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from weft.config.layout import Layout
from weft.models.shape import Shape


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class DataConfig(Section):
    paths: tuple[str, ...] = Field((), description="token files made by `weft data prepare`, without .bin/.idx")
    weights: tuple[float, ...] = Field((), description="share of each path in the blend; empty: by their tokens")
    tokenizer: str | None = Field(None, description="tokenizer.json or its folder; copied into every checkpoint")
    split: tuple[float, float, float] = Field((98, 2, 0), description="train, valid, test shares of the documents")
    document_mask: bool = Field(False, description="no attention across documents; positions restart in each")


class OptimizerConfig(Section):
    """AdamW (Loshchilov and Hutter, 2019), or Muon (Jordan et al., 2024; Liu et al., 2025) for the matrices of the blocks
    and AdamW for the rest; norms and biases are not decayed."""

    kind: Literal["adamw", "muon"] = Field(
        "adamw", description="muon: the blocks' matrices by Muon, all else by AdamW, with the same lr and decay"
    )
    lr: float = Field(3e-4, gt=0, description="peak learning rate")
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    states: Literal["fp32", "8bit"] = Field(
        "fp32", description="AdamW's moments of matrices; 8bit: in blocks of 256 numbers with a scale each"
    )
    momentum: float = Field(0.95, ge=0, lt=1, description="of Muon")
    weight_decay: float = Field(0.1, ge=0)
    clip_norm: float = Field(1.0, ge=0, description="largest global gradient norm; 0: no clipping")

    def by_muon(self, name: str, sizes: tuple[int, ...]) -> bool:
        """Whether a parameter is updated by Muon. Routers are not: no row of theirs has to do with the others."""
        return self.kind == "muon" and name.startswith("blocks.") and len(sizes) == 2 and ".router." not in name

    def in_8bit(self, name: str, sizes: tuple[int, ...]) -> bool:
        """Whether AdamW's moments of a parameter take 8 bits a number: those of matrices, where nearly all numbers are."""
        return self.states == "8bit" and len(sizes) == 2 and not self.by_muon(name, sizes)

    def moments(self, name: str, sizes: tuple[int, ...]) -> tuple[str, ...]:
        """What the optimizer keeps of a parameter."""
        return ("momentum",) if self.by_muon(name, sizes) else ("exp_avg", "exp_avg_sq")


class ScheduleConfig(Section):
    kind: Literal["cosine", "linear", "wsd", "constant"] = Field("cosine", description="after warm-up")
    warmup: int = Field(0, ge=0, description="steps from 0 to the peak")
    decay: int = Field(0, ge=0, description="steps of the final descent of wsd; 0: a tenth of the run")
    min_ratio: float = Field(0.1, ge=0, le=1, description="last learning rate over the peak")

    def descent(self, steps: int) -> int:
        """Steps, the last of so many, over which the rate goes from the peak to its end."""
        after_warmup = max(1, steps - self.warmup)
        if self.kind != "wsd":
            return after_warmup
        return min(self.decay or max(1, steps // 10), after_warmup)


class BalanceConfig(Section):
    """How the load of experts is kept even (models/balance.py); for a model that has experts."""

    bias_speed: float = Field(
        1e-3, ge=0, description="what an expert's bias moves in each step, where routers have one; 0: biases stay"
    )
    sequence: float = Field(
        0.0,
        ge=0,
        description="weight of the loss that grows where the tokens of a sequence crowd; DeepSeek-V3 has 1e-4",
    )
    z: float = Field(0.0, ge=0, description="weight of the loss that grows with the router's logits; ST-MoE has 1e-3")
    capacity: float = Field(
        0.0,
        ge=0,
        description="room of an expert, in even shares of a sequence's tokens; the later ones are dropped; 0: no end",
    )


class TrainConfig(Section):
    steps: int = Field(1000, ge=1)
    global_batch: int = Field(8, ge=1, description="sequences in one step, over all processes")
    seq: int = Field(0, ge=0, description="tokens of a sequence; 0: model.max_seq")
    seed: int = Field(0, ge=0, description="of initial weights and of the order of data")
    init_from: str | None = Field(None, description="Hugging Face folder to start from, instead of random weights")
    nonfinite: Literal["stop", "skip"] = Field("stop", description="on a loss or gradient that is not finite")
    eval_every: int = Field(0, ge=0, description="steps between evaluations; 0: never")
    eval_batches: int = Field(8, ge=1, description="global batches in one evaluation")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    attention: Literal["auto", "flash", "cudnn", "efficient"] = Field(
        "auto",
        description="kernel of attention on a GPU; auto: torch chooses; another ends the run where it cannot do it",
    )
    deterministic: bool = Field(
        False,
        description="the same bits at every start on a GPU too, which is slower; not with train.attention = cudnn",
    )
    bucket_mib: int = Field(32, ge=1, description="MiB of a message in which replicas of dp add up their gradients")


class CheckpointConfig(Section):
    every: int = Field(0, ge=0, description="steps between checkpoints; 0: only at the end")
    keep: int = Field(2, ge=1, description="newest checkpoints kept")
    asynchronous: bool = Field(True, description="write in the background; the step waits only for the copy")


class LogConfig(Section):
    every: int = Field(1, ge=1, description="steps between lines")
    routing_every: int = Field(100, ge=1, description="steps between lines of routing.jsonl: the load of every expert")
    tensorboard: bool = True
    view: Literal["auto", "live", "plain", "off"] = Field("auto", description="auto: live on a terminal, else plain")


class Config(Section):
    """A whole run: what `weft train` reads, resolves, prints and stores."""

    run: str = Field("runs/run", description="folder of the run: config, log, checkpoints")
    model: Shape
    layout: Layout = Layout()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    balance: BalanceConfig = BalanceConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    @property
    def seq(self) -> int:
        """Tokens of a training sequence."""
        return self.train.seq or self.model.max_seq

    @model_validator(mode="after")
    def _check(self) -> Config:
        if self.model.positions == "learned" and self.seq > self.model.max_seq:
            raise ValueError(
                f"train.seq = {self.seq} is longer than the {self.model.max_seq} learned positions of the model: "
                "lower train.seq or raise model.max_seq"
            )
        if self.data.weights and len(self.data.weights) != len(self.data.paths):
            raise ValueError(
                f"data.weights has {len(self.data.weights)} numbers for {len(self.data.paths)} data.paths: one for each"
            )
        if self.schedule.warmup >= self.train.steps:
            raise ValueError(
                f"schedule.warmup = {self.schedule.warmup} leaves nothing of train.steps = {self.train.steps}: lower it"
            )
        if self.schedule.warmup + self.schedule.decay > self.train.steps:
            raise ValueError(
                f"schedule.warmup + schedule.decay = {self.schedule.warmup + self.schedule.decay} is more than "
                f"train.steps = {self.train.steps}: lower one of them"
            )
        if self.train.deterministic and self.train.attention == "cudnn":
            raise ValueError(
                "train.deterministic: cuDNN's attention has no backward pass that gives the same bits each time: "
                "set train.attention = flash, or leave it at auto"
            )
        if self.model.experts is None and (self.balance.sequence or self.balance.z or self.balance.capacity):
            raise ValueError("balance is for models with experts, and this one has none: leave the section out")
        if self.balance.capacity and self.layout.cp > 1:
            raise ValueError(
                "balance.capacity drops the later tokens of a sequence, and cp gives each process some early and some "
                "late ones: set layout.cp = 1, or balance.capacity = 0"
            )
        if self.optimizer.states == "8bit" and self.layout.offload_optimizer:
            raise ValueError(
                "optimizer.states = 8bit makes moments small where they are, and layout.offload_optimizer moves fp32 ones "
                "to the CPU: leave one of them out"
            )
        self.layout.check(self.model, self.train.global_batch, self.seq)
        return self

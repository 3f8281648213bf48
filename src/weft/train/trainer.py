"""The loop of a run: from where it stands to its end, with evaluation, log and checkpoints."""

from __future__ import annotations

import math
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch.distributed as dist

from weft.checkpoint.load import load, newest
from weft.config.load import load_config
from weft.config.tree import Config
from weft.launch.process import Process, start_process, stop_process
from weft.parallel.woven import Rows
from weft.train.alike import check_alike
from weft.train.data import open_loader
from weft.train.hardware import peak_flops
from weft.train.log import FILE as LOG
from weft.train.log import RunLog, read_log
from weft.train.metrics import Meter
from weft.train.nonfinite import culprits, describe
from weft.train.profiling import make_capture
from weft.train.run import Run
from weft.train.saves import Saves
from weft.train.schedule import learning_rate
from weft.train.signals import StopRequest
from weft.train.step import Found, eval_step, train_step
from weft.train.training import build
from weft.train.view import Facts, make_view


def main(arguments: list[str]) -> int:
    """Entry of a process that `weft train` started; the one argument is the file with the settings."""
    run(load_config(arguments))
    return 0


def run(config: Config) -> None:
    """Train in this process, one of as many as the layout takes."""
    process = start_process(config.train.device, layout=config.layout)
    try:
        with Trainer(config, process) as trainer:
            trainer.train()
    finally:
        stop_process()


class Trainer:
    """One process's share of a run: made where the run stands, new or resumed.

    Attributes:
        step: the last step that is done.
        samples: consumed so far: the position in the data.
    """

    def __init__(self, config: Config, process: Process) -> None:
        self.config, self.process = config, process
        self.folder = Run(Path(config.run))
        self.step = self.samples = 0
        self.loader = open_loader(config, "train", check_tokens=process.is_main)
        self.valid_loader = open_loader(config, "valid", check_tokens=False) if config.train.eval_every else None
        group = dist.new_group(backend="gloo") if process.world > 1 else None
        check_alike(config, self.loader, group)
        self.saves = Saves(config, self.folder, self.loader, group)
        checkpoint, findings = newest(self.folder.checkpoints, group)
        self.training = build(config, process.device, fill=checkpoint is None)
        if checkpoint is not None:
            self.restore(checkpoint)
        self.open_instruments()
        for finding in findings:
            self.view.note(f"{'skipped a damaged checkpoint: ' * finding.damaging}{finding}")
        if checkpoint is not None:
            done = "" if self.step < config.train.steps else ", nothing left to do: raise train.steps to go on"
            self.view.note(f"resumed from {checkpoint}: step {self.step}, {self.samples} samples seen{done}")

    def train(self) -> None:
        """Train to the last step, or until asked to stop; what is done is saved."""
        last_step, stopped = self.config.train.steps, False
        while self.step < last_step and not stopped:
            self.capture.before(self.step + 1)
            with self.capture.step(self.step + 1):
                found = self.whole_step()
                stopped = found.stop
            with self.meter.waiting("outside"):
                self.capture.after(self.step)
                if found.profile and not stopped:
                    self.capture.take(self.step)
        self.capture.finish()
        if stopped and self.step < last_step:
            self.saves.wait(leaving=True)
            self.view.note(f"asked to stop: step {self.step} is saved; --resume goes on from there")

    # -- one step -----------------------------------------------------------------------------------------------------

    def whole_step(self) -> Found:
        """Data, the step itself, and what is due after it."""
        with self.meter.waiting("data"):
            rows = self.next_rows()
        lr = self.learning_rate()
        found = self.train_step(rows, lr)
        if not found.finite:
            self.on_nonfinite(found, rows)
        self.step, self.samples = self.step + 1, self.samples + self.config.train.global_batch
        self.report(found, lr)  # before the save: a run that dies between the two does this step again
        leaving = found.stop or self.step == self.config.train.steps
        if leaving or self.is_due(self.config.checkpoint.every):
            with self.meter.waiting("checkpoint"):
                self.save(leaving)
        return found

    def next_rows(self) -> Rows:
        return self.training.take(self.loader.batch(self.samples, self.training.rows))

    def learning_rate(self) -> float:
        config = self.config
        return learning_rate(self.step + 1, config.schedule, peak=config.optimizer.lr, steps=config.train.steps)

    def train_step(self, rows: Rows, lr: float) -> Found:
        training = self.training
        return train_step(
            training.woven,
            training.optimizer,
            training.scaler,
            rows,
            lr=lr,
            clip_norm=self.config.optimizer.clip_norm,
            bias_speed=self.config.balance.bias_speed,
            stop_asked=self.stop.requested,
            profile_asked=self.capture.asked,
        )

    def on_nonfinite(self, found: Found, rows: Rows) -> None:
        """Nothing was updated. fp16's scale may be to blame; else stop or skip, and say which samples did it.

        Raises:
            ValueError: the policy is to stop.
        """
        if self.training.scaler.overflowed(found.loss):
            self.view.note(f"step {self.step + 1}: fp16 overflow, loss scale now {self.training.scaler.scale:g}")
            return
        samples = culprits(self.training, rows, self.samples)
        what = describe(self.step + 1, found, samples, self.samples, self.config.train.global_batch)
        if self.config.train.nonfinite == "stop":
            self.saves.keep_all()
            self.save()
            self.saves.wait()  # leaving now would break it off
            raise ValueError(
                f"{what}. Nothing was updated, and what was done before is saved. Look at these samples and at "
                "optimizer.lr; or leave such steps out with --resume --set train.nonfinite=skip"
            )
        self.view.note(f"{what}: skipped")

    def evaluate(self) -> float:
        """Mean loss over the first global batches of the validation part; NaN where they have nothing to predict."""
        assert self.valid_loader is not None
        loss = targets = 0.0
        for index in range(self.config.train.eval_batches):
            batch = self.valid_loader.batch(index * self.config.train.global_batch, self.training.rows)
            batch_loss, batch_targets = eval_step(self.training.woven, self.training.take(batch))
            loss, targets = loss + batch_loss, targets + batch_targets
        return loss / targets if targets else math.nan

    def report(self, found: Found, lr: float) -> None:
        """Log and show the step, evaluated where that is due."""
        valid_loss = None
        if self.is_due(self.config.train.eval_every):
            with self.meter.waiting("outside"):
                valid_loss = self.evaluate()
        metrics = self.meter.finish(
            self.step,
            loss=found.loss,
            lr=lr,
            grad_norm=found.grad_norm,
            skipped=not found.finite,
            valid_loss=valid_loss,
            routing=found.routing,
        )
        last = found.stop or self.step == self.config.train.steps
        if self.is_due(self.config.log.every) or last or valid_loss is not None:
            self.log.write(metrics)
            self.view.step(metrics)
        if found.routing is not None and (self.is_due(self.config.log.routing_every) or last):
            self.log.write_routing(self.step, found.routing)
        self.saves.show()

    def is_due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def save(self, leaving: bool = False) -> None:
        """Save this step; without room on the disk, training goes on.

        Args:
            leaving: no step follows: a failure is an error.
        """
        training, config = self.training, self.config
        state: dict[str, Any] = {
            "layout": str(config.layout),
            "data": self.loader.state(self.samples),
            "data_fingerprint": self.loader.fingerprint(),
            "optimizer_updates": training.optimizer.updates,
            "loss_scaler": training.scaler.state(),
            "config": config.model_dump(mode="json"),
        }
        self.saves.save(self.step, training, state, leaving=leaving)

    def restore(self, checkpoint: Path) -> None:
        """Go on from a checkpoint, whatever layout wrote it.

        Raises:
            ValueError: the data have changed since.
        """
        training = self.training
        moments = training.optimizer.pieces()
        state = load(checkpoint, training.woven.pieces(), moments)
        if state["data_fingerprint"] != self.loader.fingerprint():
            raise ValueError(
                f"the data of {self.folder.path} have changed since {checkpoint.name}: a resumed run would see other "
                "samples. Bring the old files back, or start a new run from the checkpoint's weights with --init-from"
            )
        training.optimizer.take(moments)
        training.optimizer.updates = state["optimizer_updates"]
        training.scaler.restore(state["loss_scaler"])
        self.step = self.saves.step = state["step"]
        self.samples = state["data"]["samples"]

    # -- instruments --------------------------------------------------------------------------------------------------

    def open_instruments(self) -> None:
        config, process = self.config, self.process
        peak = peak_flops(process.device, config.layout.compute)
        has_log = self.step > 0 and (self.folder.path / LOG).exists()
        logged = read_log(self.folder.path, damaged=lambda damage: None) if has_log else []  # RunLog tells of damage
        history = [line for line in logged if line["step"] <= self.step]
        facts = Facts.of(config, world=process.world, peak=peak)
        self.stack = ExitStack()
        self.stop = self.stack.enter_context(StopRequest())
        self.view = self.stack.enter_context(make_view(config.log.view, facts, active=process.is_main, history=history))
        self.saves.view = self.view
        self.log = self.stack.enter_context(
            RunLog(
                self.folder.path,
                start_step=self.step,
                tensorboard=config.log.tensorboard,
                active=process.is_main,
                note=self.view.note,
            )
        )
        self.capture = make_capture(self.folder.path, self.training, self, self.view.note)
        self.capture.begin(self.step)
        self.meter = Meter(
            config,
            world=process.world,
            peak=peak,
            device=process.device,
            start_step=self.step,
            start_tokens=self.samples * config.seq,
        )

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.saves.wait(leaving=True)
                self.saves.checkpointer.close()
        finally:
            self.stack.close()

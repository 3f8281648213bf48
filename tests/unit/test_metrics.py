import pytest
import torch

from weft.config.tree import Config
from weft.models.shape import Shape
from weft.train import hardware
from weft.train.hardware import Peak, datasheet_flops, peak_flops
from weft.train.metrics import Meter, memory_used

SHAPE = Shape(num_layers=2, hidden=8, num_heads=2, ffn=16, vocab=32, max_seq=16)  # type: ignore[call-arg]
CPU = torch.device("cpu")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def make_meter(clock: Clock, **settings: int) -> Meter:
    config = Config.model_validate({"model": SHAPE, "train": {"steps": 10, "global_batch": 4}})
    return Meter(config, world=2, peak=Peak(1e6, "measured", "toy"), device=CPU, clock=clock, **settings)


def test_rates_over_a_window_without_the_first_step() -> None:
    clock = Clock()
    meter = make_meter(clock, window=2)
    seen = []
    for step, seconds in enumerate([100, 1, 3, 5], start=1):
        clock.now += seconds
        seen.append(meter.finish(step, loss=1.0, lr=0.1, grad_norm=2.0))
    assert [metrics.seconds for metrics in seen] == [100, 1, 3, 5]
    assert [metrics.tokens for metrics in seen] == [64, 128, 192, 256]
    assert [metrics.tokens_per_second for metrics in seen] == pytest.approx([0.64, 64, 32, 16])
    assert [metrics.eta for metrics in seen] == pytest.approx([900, 8, 14, 24])


def test_mfu_is_model_flops_over_the_peak_of_all_processes() -> None:
    clock = Clock()
    meter = make_meter(clock)
    clock.now = 2.0
    metrics = meter.finish(1, loss=1.0, lr=0.1, grad_norm=2.0)
    rate = 64 / 2.0
    assert metrics.mfu == pytest.approx(rate * SHAPE.flops_per_token(16, causal=False) / 2e6)
    assert metrics.mfu_causal == pytest.approx(rate * SHAPE.flops_per_token(16, causal=True) / 2e6)
    assert metrics.mfu > metrics.mfu_causal


def test_waits_belong_to_their_step_and_evaluation_is_no_training_time() -> None:
    clock = Clock()
    meter = make_meter(clock)
    with meter.waiting("data"):
        clock.now += 1
    with meter.waiting("outside"):
        clock.now += 50
    with meter.waiting("checkpoint"):
        clock.now += 2
    clock.now += 4
    first = meter.finish(1, loss=1.0, lr=0.1, grad_norm=2.0, valid_loss=3.0)
    assert (first.seconds, first.data_wait, first.checkpoint_wait, first.valid_loss) == (7, 1, 2, 3.0)
    clock.now += 1
    second = meter.finish(2, loss=1.0, lr=0.1, grad_norm=2.0)
    assert (second.seconds, second.data_wait, second.checkpoint_wait, second.valid_loss) == (1, 0, 0, None)


def test_a_resumed_run_drops_its_own_first_step() -> None:
    clock = Clock()
    meter = make_meter(clock, start_step=5, start_tokens=5 * 32)
    clock.now += 100
    assert meter.finish(6, loss=1.0, lr=0.1, grad_norm=2.0).tokens == 5 * 32 + 64  # smaller batches before
    clock.now += 1
    assert meter.finish(7, loss=1.0, lr=0.1, grad_norm=2.0).tokens_per_second == pytest.approx(64)


def test_memory_of_this_process() -> None:
    assert 1e7 < memory_used(CPU) < 1e12


@pytest.mark.parametrize(
    ("name", "bf16", "tf32"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12, 495e12),
        ("NVIDIA H100 PCIe", 756e12, 378e12),
        ("NVIDIA H200", 989e12, 495e12),
        ("NVIDIA B200", 2250e12, 1125e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, 156e12),
        ("NVIDIA A10", 125e12, 62.5e12),
        ("NVIDIA L40S", 362e12, 183e12),
        ("NVIDIA L4", 121e12, 60e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12, 82.6e12),
        ("Tesla T4", 65e12, 8.1e12),
    ],
)
def test_datasheet(name: str, bf16: float, tf32: float) -> None:
    assert datasheet_flops(name, "bf16") == datasheet_flops(name, "fp16") == pytest.approx(bf16)
    assert datasheet_flops(name, "fp32", tf32=True) == pytest.approx(tf32)


@pytest.mark.parametrize("name", ["NVIDIA RTX A4000", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA X1"])
def test_an_unknown_gpu_is_not_taken_for_a_known_one(name: str) -> None:
    assert datasheet_flops(name, "bf16") is None


@pytest.mark.parametrize(("small", "sizes", "flops"), [(1e9, [256], 1e9), (3e10, [256, 1024], 6e10)])
def test_a_slow_cpu_is_not_asked_for_a_large_product(
    small: float, sizes: list[int], flops: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without instructions for bf16 it would take seconds, at the start of every run."""
    asked: list[int] = []

    def matmul(device: str, dtype: torch.dtype, size: int) -> float:
        asked.append(size)
        return small if size == 256 else 2 * small

    monkeypatch.setattr(hardware, "_matmul", matmul)
    assert hardware._measured.__wrapped__("cpu", "bf16", 1) == flops
    assert asked == sizes


def test_the_peak_of_a_cpu_is_measured_once() -> None:
    peak = peak_flops(CPU, "fp32")
    assert peak.source == "measured"
    assert 1e8 < peak.flops < 1e15
    assert peak_flops(CPU, "fp32") == peak
    assert str(peak).endswith("TFLOP/s measured")

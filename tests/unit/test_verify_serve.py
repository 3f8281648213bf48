"""`weft verify serve`: the server's log-probabilities are the trainer's, and the certificate says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from test_verify_cli import call, copied, finished  # noqa: F401 (fixtures)

from weft.serve.config import EngineConfig
from weft.verify.checkpoint import verify_checkpoint
from weft.verify.serve import verify_serve


def test_server_and_trainer_agree_and_a_certificate_says_so(
    copied: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,  # noqa: F811
) -> None:
    assert call(monkeypatch, "serve", copied) == 0
    assert "The server says what the trainer computes." in capsys.readouterr().out
    assert call(monkeypatch, "serve", copied, "--dtype", "bfloat16") == 0
    step = copied / "checkpoints" / "step-00000004"
    certificate = json.loads((step / "parity.json").read_text())
    assert certificate["weights"] == json.loads((step / "manifest.json").read_text())["sha256"]
    exact, rounded = certificate["proofs"]
    assert (exact["dtype"], rounded["dtype"]) == ("float32", "bfloat16")
    assert 0 < exact["largest"] < 1e-5 < rounded["largest"] < 0.2
    assert exact["top1"] == 1
    assert exact["tokens"] == rounded["tokens"] == 4 * (15 + 16) + 4 * 16
    report = verify_checkpoint(step)
    assert report.whole
    assert not report.findings
    assert call(monkeypatch, "serve", copied) == 0
    again = json.loads((step / "parity.json").read_text())["proofs"]
    assert [proof["dtype"] for proof in again] == ["bfloat16", "float32"], "one for each kind"


def test_a_server_of_other_weights_is_found_out(
    copied: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,  # noqa: F811
) -> None:
    from weft.serve import engine

    real = engine.load_decoder

    def changed(*arguments: object, **options: object) -> object:
        shape, model = real(*arguments, **options)  # type: ignore[arg-type]
        with torch.no_grad():
            model.blocks["1"].attention.out.weight.mul_(-1)
        return shape, model

    monkeypatch.setattr(engine, "load_decoder", changed)
    assert call(monkeypatch, "serve", copied) == 1
    assert "The server says something else." in capsys.readouterr().out
    report = verify_serve(copied, EngineConfig())
    assert not report.right
    assert report.largest > 1e-3

"""Saving and loading in one process: what is stored, when it appears, what a failure leaves."""

import errno
import hashlib
import json
import os
import threading
from pathlib import Path

import pytest
import torch

from weft.checkpoint import write
from weft.checkpoint.folder import checkpoints, step_path, unfinished_path
from weft.checkpoint.load import load, newest
from weft.checkpoint.region import Piece, Region
from weft.checkpoint.save import Checkpointer, DiskFullError, SaveError
from weft.checkpoint.tensors import TensorFile
from weft.models.parameters import parameter_sizes
from weft.models.shape import Shape

LLAMA = Shape(num_layers=2, hidden=16, num_heads=4, num_kv_heads=2, ffn=24, vocab=40, max_seq=32)
GPT2 = Shape(family="gpt2", num_layers=2, hidden=16, num_heads=4, vocab=40, max_seq=32)
STATE = {"layout": "single", "data": {"seed": 1, "samples": 64, "global_batch": 8}, "scaler": None}


def numbers(name: str, sizes: tuple[int, ...], step: int) -> torch.Tensor:
    """A tensor that only its name and step decide."""
    seed = int.from_bytes(hashlib.sha256(f"{name} {step}".encode()).digest()[:4], "little")
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed))


def make_pieces(shape: Shape, step: int | None, prefix: str = "") -> list[Piece]:
    """Every tensor whole; zeros where there is no step."""
    regions = [Region.whole(prefix + name, sizes) for name, sizes in parameter_sizes(shape).items()]
    return [Piece(r, torch.zeros(r.sizes) if step is None else numbers(r.name, r.sizes, step)) for r in regions]


def make_optimizer(shape: Shape, step: int | None) -> list[Piece]:
    pieces = make_pieces(shape, step, "exp_avg.") + make_pieces(shape, step, "exp_avg_sq.")
    return [*pieces, Piece(Region.whole("count", ()), torch.tensor(float(step or 0)))]


def save_steps(folder: Path, *steps: int, shape: Shape = LLAMA, **settings) -> None:
    checkpointer = Checkpointer(folder, shape, **settings)
    for step in steps:
        checkpointer.save(step, make_pieces(shape, step), make_optimizer(shape, step), STATE)
    checkpointer.close()


def assert_loads(path: Path, step: int, shape: Shape = LLAMA) -> dict:
    model, optimizer = make_pieces(shape, None), make_optimizer(shape, None)
    state = load(path, model, optimizer)
    for piece, wanted in zip(model + optimizer, make_pieces(shape, step) + make_optimizer(shape, step), strict=True):
        assert torch.equal(piece.data, wanted.data), piece.region.name
    assert state["step"] == step
    return state


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("shape", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_loads_what_was_saved(tmp_path: Path, shape: Shape) -> None:
    save_steps(tmp_path, 3, shape=shape, shard_bytes=4000)
    path, findings = newest(tmp_path)
    assert path == step_path(tmp_path, 3)
    assert findings == []
    state = assert_loads(path, 3, shape)
    assert state["data"] == STATE["data"]
    assert state["versions"].keys() == {"weft", "torch", "python"}
    assert len(list((path / "model").glob("*.safetensors"))) > 1
    assert len(list((path / "optimizer").glob("*.safetensors"))) > 1


def test_background_and_foreground_write_the_same_bytes(tmp_path: Path) -> None:
    save_steps(tmp_path / "a", 1, 2, asynchronous=True)
    save_steps(tmp_path / "b", 1, 2, asynchronous=False)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_stores_the_numbers_of_the_moment_of_the_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()
    start = write._start
    monkeypatch.setattr(write, "_start", lambda path: (go.wait(), start(path)))
    checkpointer = Checkpointer(tmp_path, LLAMA)
    model, optimizer = make_pieces(LLAMA, 5), make_optimizer(LLAMA, 5)
    state = {**STATE, "list": [1]}
    checkpointer.save(5, model, optimizer, state)
    for piece in model + optimizer:
        piece.data.fill_(-1)
    state["list"].append(2)
    assert checkpointer.saved is None
    go.set()
    checkpointer.close()
    assert checkpointer.saved == 5
    assert assert_loads(step_path(tmp_path, 5), 5)["list"] == [1]


def test_one_save_at_a_time_and_the_wait_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = write._start
    monkeypatch.setattr(write, "_start", lambda path: (threading.Event().wait(0.2), start(path)))
    checkpointer = Checkpointer(tmp_path, LLAMA)
    first = checkpointer.save(1, make_pieces(LLAMA, 1), [], STATE)
    second = checkpointer.save(2, make_pieces(LLAMA, 2), [], STATE)
    assert first.waited < 0.1
    assert second.waited > 0.1
    assert checkpointer.saved == 1
    assert checkpointer.wait() > 0.1
    assert checkpointer.saved == 2
    checkpointer.close()


def test_staging_buffers_are_used_again(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, LLAMA)
    addresses = []
    for step in (1, 2):
        checkpointer.save(step, make_pieces(LLAMA, step), [], STATE)
        addresses.append({buffer.data_ptr() for buffer in checkpointer._staging[0]._buffers.values()})
    checkpointer.close()
    assert addresses[0] == addresses[1]


def test_other_dtypes_come_back(tmp_path: Path) -> None:
    region = Region.whole("momentum", (3, 4))
    half = torch.arange(12, dtype=torch.bfloat16).reshape(3, 4)
    checkpointer = Checkpointer(tmp_path, LLAMA)
    checkpointer.save(1, make_pieces(LLAMA, 1), [Piece(region, half)], STATE)
    checkpointer.close()
    back = Piece(region, torch.zeros(3, 4, dtype=torch.bfloat16))
    load(step_path(tmp_path, 1), optimizer=[back])
    assert torch.equal(back.data, half)


def test_tokenizer_lies_beside_the_weights(tmp_path: Path) -> None:
    source = tmp_path / "tokenizer"
    source.mkdir()
    (source / "tokenizer.json").write_text("{}")
    (source / "tokenizer_config.json").write_text('{"model_max_length": 8}')
    save_steps(tmp_path / "a", 1, tokenizer=source)
    save_steps(tmp_path / "b", 1, tokenizer=source / "tokenizer.json", tokens={"eos_token_id": 7})
    for run in ("a", "b"):
        model = step_path(tmp_path / run, 1) / "model"
        assert (model / "tokenizer.json").read_text() == "{}"
        assert (model / "tokenizer_config.json").exists()
    assert json.loads((step_path(tmp_path / "b", 1) / "model/config.json").read_text())["eos_token_id"] == 7


def test_a_step_saved_twice_is_replaced(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, shard_bytes=4000)
    save_steps(tmp_path, 1)
    path, _ = newest(tmp_path)
    assert path is not None
    assert_loads(path, 1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def test_killed_between_the_renames_of_a_replacement(tmp_path: Path) -> None:
    save_steps(tmp_path, 1)
    os.rename(step_path(tmp_path, 1), tmp_path / "step-00000001.replaced.tmp")
    unfinished_path(tmp_path, 1).mkdir()
    checkpointer = Checkpointer(tmp_path, LLAMA)
    assert checkpointer.swept == ["step-00000001.tmp"]
    path, _ = newest(tmp_path)
    assert path is not None
    assert_loads(path, 1)


def test_debris_is_swept(tmp_path: Path) -> None:
    for name in ("step-00000007.tmp", "step-00000003.removed.tmp"):
        (tmp_path / name / "model").mkdir(parents=True)
    assert newest(tmp_path) == (None, [])
    assert Checkpointer(tmp_path, LLAMA).swept == ["step-00000003.removed.tmp", "step-00000007.tmp"]
    assert list(tmp_path.iterdir()) == []


def test_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_steps(tmp_path, 1)
    before = tree(tmp_path)
    monkeypatch.setattr(write, "free_bytes", lambda path: 5000)
    checkpointer = Checkpointer(tmp_path, LLAMA)
    checkpointer.save(2, make_pieces(LLAMA, 2), [], STATE)
    with pytest.raises(DiskFullError, match=r"step 2 was not saved: rank 0: .* has 5,000 bytes of room and .* needed"):
        checkpointer.wait()
    assert tree(tmp_path) == before
    monkeypatch.undo()
    checkpointer.save(3, make_pieces(LLAMA, 3), make_optimizer(LLAMA, 3), STATE)  # training has gone on
    checkpointer.close()
    assert_loads(step_path(tmp_path, 3), 3)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_the_disk_fails_in_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    save_steps(tmp_path, 1)
    before = tree(tmp_path)
    good, calls = TensorFile.write, []

    def fail(self, *args):
        calls.append(args)
        if len(calls) == 20:
            raise OSError(number, os.strerror(number), str(self.path))
        return good(self, *args)

    monkeypatch.setattr(TensorFile, "write", fail)
    checkpointer = Checkpointer(tmp_path, LLAMA)
    checkpointer.save(2, make_pieces(LLAMA, 2), make_optimizer(LLAMA, 2), STATE)
    with pytest.raises(SaveError, match=r"step 2 was not saved: rank 0: .*the older .* are untouched") as caught:
        checkpointer.save(3, make_pieces(LLAMA, 3), [], STATE)
    assert isinstance(caught.value, DiskFullError) == (number != errno.EIO)
    assert (caught.value.step, caught.value.rank) == (2, 0)
    checkpointer.close()  # told once
    assert tree(tmp_path) == before


def test_refuses_what_it_cannot_store(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, LLAMA, asynchronous=False)
    model = make_pieces(LLAMA, 1)
    with pytest.raises(ValueError, match="names its layout"):
        checkpointer.save(1, model, [], {})
    with pytest.raises(ValueError, match="of step 7, and the checkpoint of step 1"):
        checkpointer.save(1, model, [], {**STATE, "step": 7})
    with pytest.raises(ValueError, match="written as JSON: Object of type set"):
        checkpointer.save(1, model, [], {**STATE, "odd": {1}})
    with pytest.raises(SaveError, match=r"of the 640 numbers of model\.embed_tokens\.weight, only 0 were written"):
        checkpointer.save(1, model[1:], [], STATE)
    with pytest.raises(SaveError, match=r"norm\.weight.* were both written"):
        checkpointer.save(1, [*model, model[-2]], [], STATE)
    with pytest.raises(SaveError, match=r"other\.weight \[2\] is no parameter of the model"):
        checkpointer.save(1, [*model, Piece(Region.whole("other.weight", (2,)), torch.zeros(2))], [], STATE)
    assert checkpoints(tmp_path) == []
    with pytest.raises(ValueError, match=r"checkpoint\.keep is 0"):
        Checkpointer(tmp_path, LLAMA, keep=0)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"file cannot hold checkpoints: .*exists: .*; name another folder with `run`"):
        Checkpointer(tmp_path / "file", LLAMA)
    with pytest.raises(ValueError, match=r"data\.tokenizer is .*nowhere"):
        Checkpointer(tmp_path, LLAMA, tokenizer=tmp_path / "nowhere")


def test_loading_another_model_is_refused(tmp_path: Path) -> None:
    save_steps(tmp_path, 1)
    path = step_path(tmp_path, 1)
    with pytest.raises(ValueError, match=r"model holds no positions\.weight: the checkpoint is of another model"):
        load(path, [Piece(Region.whole("positions.weight", (32, 16)), torch.zeros(32, 16))])
    with pytest.raises(ValueError, match=r"embed\.weight is \[40, 16\] and \[41, 16\] is asked for"):
        load(path, [Piece(Region.whole("embed.weight", (41, 16)), torch.zeros(41, 16))])
    with pytest.raises(ValueError, match=r"optimizer holds no momentum"):
        load(path, (), [Piece(Region.whole("momentum", (1,)), torch.zeros(1))])

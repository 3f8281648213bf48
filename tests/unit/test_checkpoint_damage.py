"""Every kind of damage is named, with its place, and an older whole checkpoint is used; nothing is taken silently."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from weft.checkpoint.folder import step_path
from weft.checkpoint.inspection import Finding, read_header
from weft.checkpoint.load import load, newest, read_state
from weft.checkpoint.manifest import DamageError, Manifest, RegionRecord, check_cover, read_manifest
from weft.checkpoint.region import Piece, Region
from weft.checkpoint.retention import retain
from weft.checkpoint.save import Checkpointer, RemovalError
from weft.models.parameters import parameter_sizes
from weft.models.shape import Shape
from weft.verify.checkpoint import verify_checkpoint

SHAPE = Shape(num_layers=1, hidden=8, num_heads=2, ffn=16, vocab=20, max_seq=16)
WEIGHTS = "model/model.safetensors"
MOMENTS = "optimizer/optimizer.safetensors"


def make_pieces(step: int, prefix: str = "") -> list[Piece]:
    sizes = parameter_sizes(SHAPE).items()
    return [Piece(Region.whole(prefix + name, dims), torch.full(dims, float(step))) for name, dims in sizes]


def save(folder: Path, *steps: int, keep: int = 10) -> None:
    checkpointer = Checkpointer(folder, SHAPE, keep=keep, asynchronous=False)
    for step in steps:
        checkpointer.save(step, make_pieces(step), make_pieces(step, "exp_avg."), {"layout": "single"})


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    save(folder, 1, 2)
    return folder


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    """A folder with the checkpoints of steps 1 and 2."""
    return shutil.copytree(saved, tmp_path / "run")


def flip(file: Path, position: int, bit: int = 0) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1 << bit
    file.write_bytes(content)


def skipped(run: Path) -> list[Finding]:
    """The findings, after making sure that step 1 is what remains of the two."""
    path, findings = newest(run)
    assert path == step_path(run, 1)
    assert not verify_checkpoint(step_path(run, 2)).whole
    assert verify_checkpoint(step_path(run, 1)).whole
    return [finding for finding in findings if finding.damaging]


@pytest.mark.parametrize("bit", [0, 7])
def test_flipped_bit(run: Path, bit: int) -> None:
    file = step_path(run, 2) / WEIGHTS
    flip(file, file.stat().st_size - 1, bit)
    (finding,) = skipped(run)
    assert (finding.file, finding.tensor) == (WEIGHTS, "model.norm.weight")
    assert str(finding) == (
        f"{step_path(run, 2)}/{WEIGHTS}, model.norm.weight[0:8]: "
        "its numbers are not those that were written (sha256 differs)"
    )


def test_every_byte_of_a_tensor_file_is_covered(run: Path) -> None:
    file = step_path(run, 2) / MOMENTS
    whole = file.read_bytes()
    header = len(read_header(file))
    for position in {0, 9, header - 1, *range(header, len(whole), 97), len(whole) - 1}:
        flip(file, position)
        findings = verify_checkpoint(step_path(run, 2)).findings
        assert findings, position
        assert all(finding.file == MOMENTS for finding in findings)
        file.write_bytes(whole)


def test_every_small_file_is_covered(run: Path) -> None:
    for name in ("state.json", "model/config.json", "manifest.json"):
        file = step_path(run, 2) / name
        whole = file.read_bytes()
        for position in (0, len(whole) // 2, len(whole) - 3):
            flip(file, position)
            (finding,) = verify_checkpoint(step_path(run, 2)).findings
            assert finding.file == name
            file.write_bytes(whole)


@pytest.mark.parametrize("name", [WEIGHTS, MOMENTS, "state.json", "model/config.json"])
def test_truncated_file(run: Path, name: str) -> None:
    file = step_path(run, 2) / name
    size = file.stat().st_size
    os.truncate(file, size - 3)
    (finding,) = skipped(run)
    assert str(finding).endswith(f"{name}: has {size - 3} bytes where {size} were written")


@pytest.mark.parametrize("name", [WEIGHTS, MOMENTS, "state.json", "manifest.json"])
def test_missing_file(run: Path, name: str) -> None:
    (step_path(run, 2) / name).unlink()
    (finding,) = skipped(run)
    assert finding.file == name
    assert "is missing" in finding.problem


def test_shard_of_another_step(run: Path) -> None:
    shutil.copy(step_path(run, 1) / WEIGHTS, step_path(run, 2) / WEIGHTS)
    findings = skipped(run)
    assert {finding.file for finding in findings} == {WEIGHTS}
    assert len(findings) == len(parameter_sizes(SHAPE))


def test_state_of_another_step(run: Path) -> None:
    shutil.copy(step_path(run, 1) / "state.json", step_path(run, 2) / "state.json")
    (finding,) = skipped(run)
    assert finding.file == "state.json"


def test_whole_checkpoint_under_the_name_of_another_step(run: Path) -> None:
    shutil.rmtree(step_path(run, 2))
    shutil.copytree(step_path(run, 1), step_path(run, 2))
    (finding,) = skipped(run)
    assert "is of step 1: it was copied from another checkpoint than step-00000002" in finding.problem


def test_edited_manifest(run: Path) -> None:
    file = step_path(run, 2) / "manifest.json"
    file.write_text(file.read_text().replace('"layout":"single"', '"layout":"fsdp2"'))
    (finding,) = skipped(run)
    assert "does not match its own sha256: it was edited or damaged" in finding.problem


def test_manifest_that_leaves_numbers_out(run: Path) -> None:
    manifest = read_manifest(step_path(run, 2))
    record = manifest.files[WEIGHTS]
    shorter = record.model_copy(update={"regions": record.regions[1:]})
    sealed = manifest.model_copy(update={"files": {**manifest.files, WEIGHTS: shorter}})
    (step_path(run, 2) / "manifest.json").write_bytes(sealed.to_json())
    (finding,) = skipped(run)
    assert "of the 160 numbers of model.embed_tokens.weight, only 0 were written" in finding.problem


def test_manifest_that_reaches_out_of_the_checkpoint(run: Path) -> None:
    manifest = read_manifest(step_path(run, 2))
    for name in ("../secret", "/etc/hostname", "model\\..\\..\\secret"):
        outside = {**manifest.files, name: manifest.files["state.json"]}
        (step_path(run, 2) / "manifest.json").write_bytes(manifest.model_copy(update={"files": outside}).to_json())
        (finding,) = skipped(run)
        assert "which is outside of the checkpoint" in finding.problem


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000])
def test_manifest_of_rubbish(run: Path, content: bytes) -> None:
    (step_path(run, 2) / "manifest.json").write_bytes(content)
    (finding,) = skipped(run)
    assert finding.file == "manifest.json"


class Poison:
    def __reduce__(self) -> tuple:
        return os._exit, (86,)


def test_a_pickle_is_named_and_never_read(run: Path) -> None:
    for folder in ("", "model", "optimizer"):
        (step_path(run, 2) / folder / ".metadata").write_bytes(pickle.dumps(Poison()))
    (step_path(run, 2) / "model/pytorch_model.bin").write_bytes(pickle.dumps(Poison()))
    path, findings = newest(run)
    assert path == step_path(run, 2)
    names = {".metadata", "model/.metadata", "optimizer/.metadata", "model/pytorch_model.bin"}
    assert {finding.file for finding in findings} == names
    assert not any(finding.damaging for finding in findings)
    assert load(path, make_pieces(0), make_pieces(0, "exp_avg."))["step"] == 2
    report = verify_checkpoint(path)
    assert report.whole
    assert "put here later and is not read" in str(report)


def test_pickles_in_place_of_files_are_never_read(run: Path) -> None:
    for name in ("manifest.json", "state.json", WEIGHTS, MOMENTS):
        (step_path(run, 2) / name).write_bytes(pickle.dumps(Poison()))
        assert skipped(run)


def test_nothing_whole_is_no_fresh_start(run: Path) -> None:
    for step in (1, 2):
        flip(step_path(run, step) / WEIGHTS, -1)
    with pytest.raises(ValueError, match=r"none of the checkpoints in .* is whole, and a run") as told:
        newest(run)
    assert str(told.value).count("model.norm.weight[0:8]") == 2
    shutil.rmtree(step_path(run, 1))
    (step_path(run, 2) / "manifest.json").unlink()
    with pytest.raises(ValueError, match="none of the checkpoints"):
        newest(run)


def test_no_checkpoint_is_a_fresh_start(tmp_path: Path) -> None:
    assert newest(tmp_path) == (None, [])
    assert newest(tmp_path / "absent") == (None, [])


@pytest.mark.parametrize(("version", "told"), [(2, "format 2 and this weft reads up to 1: install a newer weft"),
                                               (0, "format 0 and this weft reads from 1 on")])  # fmt: skip
def test_other_formats_are_refused_not_skipped(run: Path, version: int, told: str) -> None:
    manifest = read_manifest(step_path(run, 2))
    (step_path(run, 2) / "manifest.json").write_bytes(manifest.model_copy(update={"format": version}).to_json())
    for look in (lambda: newest(run), lambda: verify_checkpoint(step_path(run, 2)), lambda: load(step_path(run, 2))):
        with pytest.raises(ValueError, match=told):
            look()


@pytest.mark.parametrize("name", ["manifest.json", "state.json", WEIGHTS])
def test_a_file_that_the_disk_no_longer_gives(run: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bad sector: EIO, whoever asks."""
    bad = step_path(run, 2) / name
    opened = Path.open

    def open_(self: Path, *rest: object, **more: object) -> object:
        if self == bad:
            raise OSError(5, "Input/output error")
        return opened(self, *rest, **more)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", open_)
    (finding,) = skipped(run)
    assert "Input/output error" in str(finding)


def test_state_that_is_gone_or_broken(run: Path) -> None:
    file = step_path(run, 2) / "state.json"
    file.write_text("[]")
    with pytest.raises(DamageError, match="is not a table"):
        read_state(step_path(run, 2))
    file.write_text("{")
    with pytest.raises(DamageError, match="is not JSON"):
        read_state(step_path(run, 2))
    file.unlink()
    with pytest.raises(DamageError, match="is missing; `weft verify checkpoint"):
        read_state(step_path(run, 2))


def test_report(run: Path) -> None:
    report = verify_checkpoint(step_path(run, 2))
    assert (report.step, report.layout, report.findings) == (2, "single", ())
    assert report.regions == 2 * len(parameter_sizes(SHAPE))
    assert str(report).endswith("step-00000002 is whole")
    copy = run / "a copy under another name"
    shutil.copytree(step_path(run, 2), copy)
    assert verify_checkpoint(copy).whole
    flip(copy / WEIGHTS, -1)
    assert str(verify_checkpoint(copy)).endswith("is DAMAGED")
    with pytest.raises(ValueError, match="is not a folder: name one checkpoint"):
        verify_checkpoint(run / "nothing")


def box(start: list[int], stop: list[int], tensor: str = "t") -> RegionRecord:
    return RegionRecord(tensor=tensor, start=start, stop=stop, sha256="0" * 64)


def test_cover() -> None:
    sizes = {"t": (4, 6)}
    check_cover("f", [box([0, 0], [2, 6]), box([2, 0], [4, 1]), box([2, 1], [4, 6])], sizes)
    check_cover("f", [box([], [])], {"t": ()})
    check_cover("f", [], {"t": (0, 3)})
    with pytest.raises(DamageError, match=r"f: t\[0:2, 0:6\] and t\[1:4, 5:6\] were both written"):
        check_cover("f", [box([0, 0], [2, 6]), box([1, 5], [4, 6])], sizes)
    with pytest.raises(DamageError, match="of the 24 numbers of t, only 12 were written"):
        check_cover("f", [box([0, 0], [2, 6])], sizes)
    with pytest.raises(DamageError, match=r"t\[0:5, 0:6\] is not inside of the tensor, whose dims are \[4, 6\]"):
        check_cover("f", [box([0, 0], [5, 6])], sizes)
    with pytest.raises(DamageError, match="is not inside of the tensor"):
        check_cover("f", [box([0], [4])], sizes)
    with pytest.raises(DamageError, match="f has no tensor u"):
        check_cover("f", [box([0], [4], "u")], sizes)


def test_a_hole_cannot_hide_behind_an_overlap() -> None:
    parts = [box([0, 0], [2, 6]), box([0, 0], [1, 6]), box([3, 0], [4, 6])]  # 24 numbers in all, row 2 missing
    with pytest.raises(DamageError, match="were both written"):
        check_cover("f", parts, {"t": (4, 6)})


def test_manifest_round_trip() -> None:
    manifest = Manifest(step=3, layout="tp2", files={})
    assert json.loads(manifest.to_json())["sha256"]


def steps(run: Path) -> list[str]:
    return sorted(path.name for path in run.iterdir())


def test_keeps_the_newest(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 3, 4, keep=2)
    assert steps(tmp_path) == ["step-00000003", "step-00000004"]


def test_damaged_ones_do_not_count(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 3)
    (step_path(tmp_path, 3) / "state.json").unlink()
    save(tmp_path, 4, keep=2)
    assert steps(tmp_path) == ["step-00000002", "step-00000003", "step-00000004"]
    save(tmp_path, 5, keep=2)
    assert steps(tmp_path) == ["step-00000004", "step-00000005"]


def test_never_removes_when_the_new_one_is_not_whole(run: Path) -> None:
    (step_path(run, 2) / WEIGHTS).unlink()
    with pytest.raises(DamageError, match=r"is not whole, so no older one was removed: .*is missing"):
        retain(run, 1, step_path(run, 2))
    assert steps(run) == ["step-00000001", "step-00000002"]


def test_going_back_keeps_the_one_just_saved(tmp_path: Path) -> None:
    save(tmp_path, 1, 8, 9)
    save(tmp_path, 2, keep=2)  # resumed from 1
    assert steps(tmp_path) == ["step-00000002", "step-00000008", "step-00000009"]


def test_a_removal_that_fails_is_told_apart_from_the_save(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("weft.checkpoint.retention.discard", fail)
    with pytest.raises(RemovalError, match=r"step 3 is saved, but older ones .*: .*Permission denied"):
        save(run, 3, keep=1)
    assert newest(run)[0] == step_path(run, 3)

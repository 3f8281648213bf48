"""Checkpoints of several processes: saved under one cut and loaded under another, with deaths and failures between."""

import hashlib
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from weft.checkpoint.folder import checkpoints, step_path
from weft.checkpoint.load import load, newest
from weft.checkpoint.region import Piece, Region
from weft.checkpoint.save import Checkpointer, CheckpointError, DiskFullError, SaveError
from weft.checkpoint.tensors import TensorFile
from weft.models.parameters import parameter_sizes
from weft.models.shape import Shape
from weft.verify.checkpoint import verify_checkpoint

LLAMA = Shape(num_layers=2, hidden=12, num_heads=4, num_kv_heads=2, head_dim=4, ffn=20, vocab=30, max_seq=16)
GPT2 = Shape(family="gpt2", num_layers=2, hidden=12, num_heads=3, vocab=31, max_seq=16)
PATIENCE = 60  # seconds


def start_ranks(world: int, folder: Path, work: Callable[[int, dist.ProcessGroup], None]) -> list[int]:
    """Fork processes that form a gloo group and do the work; their ids."""
    torch.set_num_threads(1)
    store = folder / f"store-{random.getrandbits(40)}"
    pids = []
    for rank in range(world):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons: fork beside torch's idle threads
            pid = os.fork()
        if pid == 0:
            code = 1
            try:
                file = dist.FileStore(str(store), world)
                dist.init_process_group("gloo", store=file, rank=rank, world_size=world, timeout=timedelta(seconds=20))
                assert dist.group.WORLD is not None
                work(rank, dist.group.WORLD)
                code = 0
            except BaseException:  # noqa: BLE001 — a forked child may not return into pytest
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        pids.append(pid)
    return pids


def wait_ranks(pids: list[int]) -> list[int]:
    """Exit statuses; negative: the signal that ended it."""
    codes: dict[int, int] = {}
    end = time.monotonic() + PATIENCE
    while len(codes) < len(pids):
        for pid in set(pids) - codes.keys():
            if time.monotonic() > end:
                os.kill(pid, signal.SIGKILL)
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return [codes[pid] for pid in pids]


def run_ranks(world: int, folder: Path, work: Callable[[int, dist.ProcessGroup], None]) -> None:
    assert wait_ranks(start_ranks(world, folder, work)) == [0] * world


@cache
def numbers(name: str, sizes: tuple[int, ...], step: int) -> torch.Tensor:
    """A tensor that only its name and step decide."""
    seed = int.from_bytes(hashlib.sha256(f"{name} {step}".encode()).digest()[:4], "little")
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed))


def chunk(region: Region, dim: int, index: int, count: int) -> Region:
    """As torch.chunk and FSDP cut: the last may be smaller, or empty."""
    size = region.dims[dim]
    each = math.ceil(size / count)
    return region.narrow(dim, min(size, index * each), min(size, (index + 1) * each))


def cut(region: Region, way: str, rank: int, world: int, order: int) -> tuple[Region, bool] | None:
    """What a rank holds of a tensor, and whether it is the one that writes it."""
    match way:
        case "rows":
            return chunk(region, 0, rank, world), True
        case "columns":
            return (chunk(region, -1, rank, world), True) if len(region.sizes) > 1 else (region, rank == world - 1)
        case "grid":  # two ways of columns, the rest of rows: tp2 with fsdp
            column, row = rank % 2, rank // 2
            if len(region.sizes) > 1:
                return chunk(chunk(region, 1, column, 2), 0, row, world // 2), True
            return chunk(region, 0, row, world // 2), column == 0
        case "stages":
            return (region, True) if order % world == rank else None
        case "replicas":
            return region, order % world == rank
        case "uneven":  # the first holds one row, the last all others, those between nothing
            edges = [0, 1, *[1] * (world - 2), region.sizes[0]]
            return region.narrow(0, edges[rank], max(edges[rank], edges[rank + 1])), True
    raise AssertionError(way)


def make_pieces(shape: Shape, way: str, rank: int, world: int, step: int | None, prefix: str = "") -> list[Piece]:
    pieces = []
    for order, (name, sizes) in enumerate(parameter_sizes(shape).items()):
        part = cut(Region.whole(prefix + name, sizes), way, rank, world, order)
        if part is not None:
            region, writes = part
            dims = region.dims
            data = torch.full(dims, math.nan) if step is None else numbers(prefix + name, sizes, step)[region.slices]
            pieces.append(Piece(region, data, writes))
    return pieces


def make_all(shape: Shape, way: str, rank: int, world: int, step: int | None) -> tuple[list[Piece], list[Piece]]:
    optimizer = [make_pieces(shape, way, rank, world, step, prefix) for prefix in ("exp_avg.", "exp_avg_sq.")]
    return make_pieces(shape, way, rank, world, step), optimizer[0] + optimizer[1]


def save(checkpointer: Checkpointer, shape: Shape, way: str, rank: int, world: int, step: int) -> None:
    checkpointer.save(step, *make_all(shape, way, rank, world, step), {"layout": f"{way}{world}"})


def assert_loads(path: Path, shape: Shape, way: str, rank: int, world: int, step: int) -> None:
    filled, wanted = make_all(shape, way, rank, world, None), make_all(shape, way, rank, world, step)
    assert load(path, *filled)["step"] == step
    for piece, other in zip(filled[0] + filled[1], wanted[0] + wanted[1], strict=True):
        assert torch.equal(piece.data, other.data), (way, rank, piece.region)


WAYS = ["rows", "columns", "grid", "stages", "replicas", "uneven"]


@pytest.mark.parametrize("shape", [LLAMA, GPT2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("world", [2, 3, 4])
def test_saved_under_one_cut_loads_under_every_other(tmp_path: Path, shape: Shape, world: int) -> None:
    ways = WAYS if world % 2 == 0 else [way for way in WAYS if way != "grid"]

    def work(rank: int, group: dist.ProcessGroup) -> None:
        checkpointer = Checkpointer(tmp_path / "run", shape, keep=9, group=group, shard_bytes=6000)
        for step, way in enumerate(ways, start=1):
            save(checkpointer, shape, way, rank, world, step)
        checkpointer.close()
        assert newest(tmp_path / "run", group) == (step_path(tmp_path / "run", len(ways)), [])

    run_ranks(world, tmp_path, work)
    written = []
    for step in range(1, len(ways) + 1):
        path = step_path(tmp_path / "run", step)
        assert verify_checkpoint(path).findings == ()
        for way, other_world in (("rows", 1), ("rows", 3), ("columns", 2), ("uneven", 3), ("grid", 4), ("stages", 2)):
            for rank in range(other_world):
                assert_loads(path, shape, way, rank, other_world, step)
        written.append(sorted(file.name for file in path.rglob("*.*")))
    assert all(names == written[0] for names in written)
    assert not any(name.startswith("rank-") for name in written[0])


def test_the_bytes_do_not_depend_on_the_cut(tmp_path: Path) -> None:
    for way in ("rows", "grid"):

        def work(rank: int, group: dist.ProcessGroup, way: str = way) -> None:
            checkpointer = Checkpointer(tmp_path / way, GPT2, group=group, asynchronous=way == "rows")
            save(checkpointer, GPT2, way, rank, 2, 1)
            checkpointer.close()

        run_ranks(2, tmp_path, work)
    files = [
        {str(file.relative_to(run)): file.read_bytes() for file in run.rglob("*.safetensors")}
        for run in (tmp_path / "rows", tmp_path / "grid")
    ]
    assert files[0] == files[1]


def test_a_folder_that_is_not_shared_is_refused_at_the_start(tmp_path: Path) -> None:
    """Each machine's own disk: no save would ever succeed, and the run would go on without one."""

    def work(rank: int, group: dist.ProcessGroup) -> None:
        (tmp_path / "disk1").mkdir(exist_ok=True)
        with pytest.raises(
            ValueError, match=r"rank 1 it is another folder than on rank 0's; name another folder with `run`"
        ):
            Checkpointer(tmp_path / f"disk{rank}", LLAMA, group=group)

    run_ranks(2, tmp_path, work)
    assert list((tmp_path / "disk0").iterdir()) == []


def test_a_failure_on_one_rank_is_an_error_on_all(tmp_path: Path) -> None:
    run, world = tmp_path / "run", 3

    def work(rank: int, group: dist.ProcessGroup) -> None:
        checkpointer = Checkpointer(run, LLAMA, group=group)
        save(checkpointer, LLAMA, "rows", rank, world, 1)
        checkpointer.wait()
        good = TensorFile.write
        if rank == 2:
            TensorFile.write = lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device"))
        save(checkpointer, LLAMA, "rows", rank, world, 2)
        with pytest.raises(DiskFullError, match=r"step 2 was not saved: rank 2: \[Errno 28\] No space left") as caught:
            checkpointer.wait()
        assert str(caught.value).count("was not saved") == 1
        assert (caught.value.step, caught.value.rank, checkpointer.saved) == (2, 2, 1)
        assert checkpoints(run) == [step_path(run, 1)]
        TensorFile.write = good
        if rank == 1:
            TensorFile.write = lambda *args: (_ for _ in ()).throw(KeyError("a bug"))
        save(checkpointer, LLAMA, "rows", rank, world, 3)
        with pytest.raises(KeyError if rank == 1 else SaveError, match="a bug"):
            checkpointer.wait()
        TensorFile.write = good
        if rank == 2:  # what one process cannot even begin
            checkpointer.save(4, [Piece(Region.whole("odd", (2,)), torch.ones(2))], [], {"layout": "x"})
        else:
            save(checkpointer, LLAMA, "rows", rank, world, 4)
        with pytest.raises(SaveError, match=r"rank 2: odd .* is no parameter of the model"):
            checkpointer.wait()
        save(checkpointer, LLAMA, "rows", rank, world, 5)
        checkpointer.close()
        assert checkpointer.saved == 5

    run_ranks(world, tmp_path, work)
    assert sorted(path.name for path in run.iterdir()) == ["step-00000001", "step-00000005"]


def test_damage_is_found_by_the_rank_that_reads_it_and_told_to_all(tmp_path: Path) -> None:
    run, world = tmp_path / "run", 3

    def work(rank: int, group: dist.ProcessGroup) -> None:
        checkpointer = Checkpointer(run, LLAMA, group=group)
        for step in (1, 2):
            save(checkpointer, LLAMA, "rows", rank, world, step)
        checkpointer.close()
        if rank == 0:
            file = step_path(run, 2) / "optimizer/optimizer.safetensors"
            content = bytearray(file.read_bytes())
            content[-7] ^= 1
            file.write_bytes(content)
        dist.barrier(group)
        path, (finding,) = newest(run, group)
        assert path == step_path(run, 1)
        assert finding.tensor == "exp_avg_sq.norm.weight"
        assert finding.region == "exp_avg_sq.norm.weight[8:12]"  # what rank 2 had written
        dist.barrier(group)
        if rank == 0:
            shutil.rmtree(step_path(run, 1))
        dist.barrier(group)
        with pytest.raises(ValueError, match="a run does not start over by itself"):
            newest(run, group)

    run_ranks(world, tmp_path, work)


def acknowledged(file: Path) -> int:
    return int(file.read_text() or 0) if file.exists() else 0


def test_killed_at_any_moment(tmp_path: Path) -> None:
    """kill -9, 20 times: of both processes or of one; what was acknowledged loads, bit for bit, and saving goes on."""
    run, noted = tmp_path / "run", tmp_path / "acknowledged"
    chance = random.Random(7)

    def work(rank: int, group: dist.ProcessGroup) -> None:
        checkpointer = Checkpointer(run, GPT2, group=group)
        path, findings = newest(run, group)
        assert findings == []
        step = int(path.name.removeprefix("step-")) if path else 0
        if path:
            assert_loads(path, GPT2, "rows", rank, 2, step)
        while True:
            step += 1
            try:
                save(checkpointer, GPT2, "rows", rank, 2, step)
            except CheckpointError as error:  # the other one is dead
                os._exit(9 if "no longer answers" in str(error) else 2)
            if rank == 0 and checkpointer.saved:
                noted.with_suffix(".new").write_text(str(checkpointer.saved))
                noted.with_suffix(".new").rename(noted)

    for kill in range(20):
        before = acknowledged(noted)
        pids = start_ranks(2, tmp_path, work)
        end = time.monotonic() + PATIENCE
        while acknowledged(noted) == before and time.monotonic() < end:
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.08))
        victims = pids if kill % 3 == 0 else [pids[kill % 2]]
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        codes = wait_ranks(pids)
        assert all(code == (-9 if pid in victims else 9) for pid, code in zip(pids, codes, strict=True)), codes
        path, findings = newest(run)  # the debris is still there
        assert path is not None
        assert findings == []
        step = int(path.name.removeprefix("step-"))
        assert step >= acknowledged(noted) > before
        assert_loads(path, GPT2, "columns", kill % 3, 3, step)


@pytest.fixture
def small_disk(tmp_path: Path):
    """A file system of 600 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", disk], capture_output=True)
    if done.returncode:
        pytest.skip("may not mount a small file system here")
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("seen_before", [True, False], ids=["checked before", "met while writing"])
def test_full_disk(tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch, seen_before: bool) -> None:
    run = small_disk / "run"
    monkeypatch.setattr("weft.checkpoint.write._SLACK", 0)
    if not seen_before:
        monkeypatch.setattr("weft.checkpoint.write.free_bytes", lambda path: 1 << 40)

    def fill(checkpointer: Checkpointer, rank: int) -> None:
        for step in range(1, 100):
            save(checkpointer, LLAMA, "rows", rank, 2, step)

    def work(rank: int, group: dist.ProcessGroup) -> None:
        checkpointer = Checkpointer(run, LLAMA, keep=100, group=group)
        with pytest.raises(DiskFullError, match="bytes of room" if seen_before else "No space left on device") as full:
            fill(checkpointer, rank)
        assert 1 < full.value.step < 100
        dist.barrier(group)
        if rank == 0:
            shutil.rmtree(step_path(run, 1))
        dist.barrier(group)
        save(checkpointer, LLAMA, "rows", rank, 2, 100)
        checkpointer.close()
        assert checkpointer.saved == 100
        path, findings = newest(run, group)
        assert (path, findings) == (step_path(run, 100), [])
        assert_loads(step_path(run, full.value.step - 1), LLAMA, "rows", rank, 2, full.value.step - 1)

    run_ranks(2, tmp_path, work)
    assert all(verify_checkpoint(path).whole for path in checkpoints(run))
    assert not list(run.glob("*.tmp"))

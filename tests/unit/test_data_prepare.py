"""`prepare`: the same bytes for any number of workers, after any kill, and nothing written on any error."""

import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from weft.cli.data import app
from weft.data import parts
from weft.data.indexed import IndexedDataset
from weft.data.prepare import Report, prepare
from weft.data.tokenizer import Tokenizer, load, train_bpe

TEXTS = [f"document {k}: " + " ".join(str(k * j) for j in range(k % 40)) + "é" * (k % 3) for k in range(300)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_bpe(TEXTS, 400, tmp_path_factory.mktemp("tok"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """200 lines of JSON, 60 in gzip, 40 text files, an empty one and one that is not UTF-8."""
    root = tmp_path / "in"
    root.mkdir()
    lines = [json.dumps({"text": text}) + "\n" for text in TEXTS]
    (root / "a.jsonl").write_text("".join(lines[:200]))
    (root / "b.jsonl.gz").write_bytes(gzip.compress("".join(lines[200:260]).encode()))
    for k in range(260, 300):
        (root / f"c{k}.txt").write_text(TEXTS[k])
    (root / "d.txt").write_text("")
    (root / "e.txt").write_bytes(b"\xff")
    return root


def files(prefix: Path) -> tuple[bytes, bytes]:
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


def run(folder: Path, out: Path, tokenizer: Tokenizer, workers: int = 1, **options: object) -> Report:
    return prepare([folder], out, tokenizer.path, workers=workers, part_bytes=2000, **options)  # type: ignore[arg-type]


def test_documents_and_report(folder: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    report = run(folder, tmp_path / "out" / "x", tokenizer)
    data = IndexedDataset(tmp_path / "out" / "x")
    assert [data[i].tolist() for i in range(len(data))] == [[*tokenizer.encode(text), 0] for text in TEXTS]
    assert report.documents == data.num_documents == 300
    assert report.tokens == data.num_tokens
    assert report.text_bytes == sum(len(text.encode()) for text in TEXTS)
    assert report.empty == 1
    assert report.skipped == [f"{folder / 'e.txt'}: not UTF-8 at byte 0"]
    assert report.max_token == data.tokens.max()
    assert json.loads((tmp_path / "out" / "x.json").read_text())["tokens"] == report.tokens
    assert data.report()["max_token"] == report.max_token
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["x.bin", "x.idx", "x.json"]


def test_workers_and_parts_do_not_matter(folder: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    run(folder, tmp_path / "one", tokenizer)
    assert run(folder, tmp_path / "two", tokenizer, workers=2).workers == 2
    prepare([folder], tmp_path / "whole", tokenizer.path, workers=1)
    assert files(tmp_path / "one") == files(tmp_path / "two") == files(tmp_path / "whole")


def test_without_end_of_document(folder: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    run(folder, tmp_path / "x", tokenizer, append_eod=False)
    data = IndexedDataset(tmp_path / "x")
    assert data[5].tolist() == tokenizer.encode(TEXTS[5])
    run(folder, tmp_path / "y", tokenizer, eod="7")
    assert IndexedDataset(tmp_path / "y")[5].tolist() == [*tokenizer.encode(TEXTS[5]), 7]


@pytest.mark.parametrize("workers", [1, 2])
def test_resumes_after_sigkill(folder: Path, tmp_path: Path, tokenizer: Tokenizer, workers: int) -> None:
    run(folder, tmp_path / "straight", tokenizer)
    out = tmp_path / "killed"
    slow = f"""
import time
from pathlib import Path
import weft.data.prepare as p
from weft.data import parts
whole = parts.Worker.run
def late(self, number, pieces):
    if number >= 4:
        time.sleep(60)
    return whole(self, number, pieces)
parts.Worker.run = late
if __name__ == "__main__":  # a worker imports this file too, and is slow too
    p.prepare([{str(folder)!r}], {str(out)!r}, {tokenizer.path!r}, workers={workers}, part_bytes=2000)
"""
    script = tmp_path / "slow.py"
    script.write_text(slow)
    process = subprocess.Popen([sys.executable, script])
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("killed.parts/*/0*.json"))) < 4:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    children = _children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    while any(map(_alive, children)):  # workers end with their parent, they do not linger
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert not Path(f"{out}.idx").exists()
    next(tmp_path.glob("killed.parts/*/00001.bin")).write_bytes(b"torn")  # a part that is not whole is done again
    report = run(folder, out, tokenizer)
    assert report.resumed_parts == 3
    assert files(out) == files(tmp_path / "straight")
    assert not Path(f"{out}.parts").exists()


def _children(pid: int) -> list[int]:
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.append(int(status.parent.name))
    return found


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


class Stop(Exception):  # noqa: N818
    pass


def interrupted(folder: Path, out: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, after: int = 3) -> None:
    whole = parts.Worker.run

    def stop(self: parts.Worker, number: int, pieces: object) -> parts.PartReport:
        if number == after:
            raise Stop
        return whole(self, number, pieces)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(parts.Worker, "run", stop)
        with pytest.raises(Stop):
            run(folder, out, tokenizer)


def test_parts_of_another_plan_are_never_used(
    folder: Path, tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = train_bpe(TEXTS, 300, tmp_path / "tok2")
    interrupted(folder, tmp_path / "x", tokenizer, monkeypatch)
    assert run(folder, tmp_path / "x", other).resumed_parts == 0
    changes: list[dict[str, object]] = [{"eod": "7"}, {"append_eod": False}, {"key": "text2", "globs": ["*.txt"]}]
    for number, change in enumerate(changes):
        interrupted(folder, tmp_path / f"y{number}", tokenizer, monkeypatch)
        assert run(folder, tmp_path / f"y{number}", tokenizer, **change).resumed_parts == 0
    interrupted(folder, tmp_path / "z", tokenizer, monkeypatch)
    os.utime(folder / "c260.txt", ns=(0, 0))
    assert run(folder, tmp_path / "z", tokenizer).resumed_parts == 0
    interrupted(folder, tmp_path / "w", tokenizer, monkeypatch)
    assert run(folder, tmp_path / "w", tokenizer).resumed_parts == 3


def test_a_finished_output_is_kept(folder: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    run(folder, tmp_path / "x", tokenizer)
    before = files(tmp_path / "x")
    with pytest.raises(ValueError, match=r"x.idx exists already: choose another --out, or --overwrite"):
        run(folder, tmp_path / "x.bin", tokenizer, eod="7")
    assert files(tmp_path / "x") == before
    run(folder, tmp_path / "x", tokenizer, eod="7", overwrite=True)
    assert files(tmp_path / "x") != before
    (tmp_path / "y.bin").write_bytes(b"somebody's")
    with pytest.raises(ValueError, match=r"y.bin exists already"):
        run(folder, tmp_path / "y", tokenizer)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_line_stops_everything(folder: Path, tmp_path: Path, tokenizer: Tokenizer, workers: int) -> None:
    with open(folder / "a.jsonl", "a") as file:
        file.write("{oops\n")
    with pytest.raises(ValueError, match=r"a.jsonl:201: not a JSON object"):
        run(folder, tmp_path / "x", tokenizer, workers=workers)
    assert not (tmp_path / "x.idx").exists()


def test_refusals(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="--workers must be 1 or more, not 0"):
        run(tmp_path, tmp_path / "x", tokenizer, workers=0)
    with pytest.raises(ValueError, match="no input"):
        prepare([], tmp_path / "x", tokenizer.path)
    (tmp_path / "a.txt").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"hold no text, nothing was written; a file was skipped: .*a.txt"):
        run(tmp_path / "a.txt", tmp_path / "x", tokenizer)
    (tmp_path / "a.txt").write_bytes(b"")
    with pytest.raises(ValueError, match="hold no text, nothing was written: every document is empty"):
        run(tmp_path / "a.txt", tmp_path / "x", tokenizer)
    about = json.loads(Path(tokenizer.path).read_text())
    about["added_tokens"] = []
    about["model"]["vocab"]["nothing"] = about["model"]["vocab"].pop("<|endoftext|>")
    (tmp_path / "tokenizer.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match="names no token that ends a document: give one with --eod, or --no-eod"):
        prepare([tmp_path / "a.txt"], tmp_path / "x", tmp_path)


def test_an_out_that_cannot_be_is_refused_before_the_work(
    folder: Path, tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts.Worker, "run", None)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=r"file.* cannot be made a folder \(Not a directory\): name another place"):
        run(folder, tmp_path / "file" / "deep" / "x", tokenizer)
    with pytest.raises(ValueError, match=r"--out .* is a folder: name the files in it, as .*/text"):
        run(folder, tmp_path, tokenizer)
    with pytest.raises(ValueError, match="--eod 7 and --no-eod"):
        run(folder, tmp_path / "x", tokenizer, eod="7", append_eod=False)


def test_no_text_leaves_nothing(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "a.txt").write_bytes(b"")
    with pytest.raises(ValueError, match="hold no text"):
        run(tmp_path / "a.txt", tmp_path / "x", tokenizer)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_no_bar_where_no_terminal_is(
    folder: Path, tmp_path: Path, tokenizer: Tokenizer, capfd: pytest.CaptureFixture
) -> None:
    prepare([folder], tmp_path / "x", tokenizer.path, workers=1, progress=True)
    assert capfd.readouterr().err == ""


def test_one_writer_at_a_time(folder: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    import fcntl

    (tmp_path / "x.parts").mkdir()
    with open(tmp_path / "x.parts" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another `weft data prepare` is writing this output now"):
            run(folder, tmp_path / "x", tokenizer)


def die(number: int, pieces: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_explained(
    folder: Path, tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "run_part", die)
    with pytest.raises(ValueError, match=r"a worker process was killed.*run the same command again"):
        run(folder, tmp_path / "x", tokenizer, workers=2)


def test_ctrl_c_reaches_no_worker(folder: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Not while it is still being started, when its answer would be a traceback; and it says how to go on."""
    words = ["prepare", str(folder), "--tokenizer", tokenizer.path, "--out", str(tmp_path / "x"), "--workers", "2"]
    code = f"""
import weft.data.prepare as p
whole = p.as_completed
p.PART_BYTES = 2000, 2000
def now(futures):
    print("started", flush=True)
    return whole(futures)
p.as_completed = now
if __name__ == "__main__":  # a worker imports this file too
    from weft.cli.data import app
    app({words})
"""
    (tmp_path / "script.py").write_text(code)
    process = subprocess.Popen(
        [sys.executable, tmp_path / "script.py"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    os.killpg(process.pid, signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert told == "weft: stopped; the same command goes on from the parts that are done\n"


def test_files_that_were_skipped_are_named_whole(tmp_path: Path) -> None:
    """Those that fill the first lines, whatever the terminal's width; of the rest, how many."""
    deep = tmp_path / ("far" * 20) / ("away" * 15)
    deep.mkdir(parents=True)
    for number in range(5):
        (deep / f"{number}.txt").write_bytes(b"\xff")
    (deep / "good.txt").write_text("one two three " * 50)
    words = ["tokenizer", str(tmp_path), "--out", str(tmp_path / "tok"), "--vocab", "260"]
    told = CliRunner(env={"COLUMNS": "60"}).invoke(app, words, catch_exceptions=False).stdout
    whole = re.sub(r"\s", "", told)
    assert all(f"{deep}/{number}.txt:notUTF-8" in whole for number in range(3))
    assert "5files" in whole
    assert "and2more" in whole


def test_command_line(folder: Path, tmp_path: Path) -> None:
    assert isinstance(app, typer.Typer)
    call = CliRunner(env={"COLUMNS": "300"}).invoke
    tok, out = str(tmp_path / "tok"), str(tmp_path / "x")
    result = call(app, ["tokenizer", str(folder), "--out", tok, "--vocab", "300"], catch_exceptions=False)
    assert result.exit_code == 0
    assert "300" in result.stdout
    arguments = ["prepare", str(folder), "--tokenizer", tok, "--out", out, "--workers", "1", "--glob", "*.txt"]
    result = call(app, arguments, catch_exceptions=False)
    assert "40" in result.stdout
    assert "1 empty documents" in result.stdout
    assert "e.txt: not UTF-8" in result.stdout
    result = call(app, ["inspect", out, "--tokenizer", tok], catch_exceptions=False)
    assert "40 of 40 documents end with id 0" in result.stdout
    assert "document 260: 0 260 520" in result.stdout
    assert load(tok).vocab == 300
    with pytest.raises(ValueError, match="exists already"):
        call(app, arguments, catch_exceptions=False)


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("weft.cli.data", "torch numpy tokenizers pyarrow"),
        ("weft.data.loader", "torch"),
        ("weft.data.prepare", "torch"),
    ],
)
def test_imports_stay_light(module: str, heavy: str) -> None:
    code = f"import sys, {module}; sys.exit(any(name in sys.modules for name in {heavy.split()}))"
    subprocess.run([sys.executable, "-c", code], check=True)

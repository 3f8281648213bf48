"""Runs in processes of their own: started, watched, and killed.

    python -m weft.verify.runs CONFIG.toml [--resume]

does what `weft train` does between its settings and its last line.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from weft.config.load import load_config
from weft.config.toml import config_toml
from weft.config.tree import Config
from weft.launch.local import launch
from weft.train.run import CONFIG, Run

POLL = 0.002  # seconds


def main(arguments: Sequence[str]) -> int:
    """The launcher of a run."""
    config = load_config(arguments[:1])
    folder = Run(Path(config.run))
    folder.claim(config, resume="--resume" in arguments)
    return launch(config.layout.world, "weft.train.trainer:main", [str(folder.path / CONFIG)], logs=folder.logs)


class RunProcess:
    """A run as a tree of processes: a launcher, and one process for each rank beyond the first.

    What it prints goes to `<run>.txt`.
    """

    def __init__(self, config: Config, *, resume: bool = False) -> None:
        self.folder = Path(config.run)
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self.output = self.folder.with_name(f"{self.folder.name}.txt")
        settings = self.folder.with_name(f"{self.folder.name}.toml")
        settings.write_text(config_toml(config), encoding="utf-8")
        command = [sys.executable, "-m", "weft.verify.runs", str(settings), *(["--resume"] if resume else [])]
        env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        with open(self.output, "wb") as out:
            self.launcher = subprocess.Popen(
                command, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
            )

    def wait(self, progress: Callable[[int], None], until: Callable[[], bool] = lambda: False) -> bool:
        """Tell `progress` the last logged step until the condition holds, or else the run has ended well.

        Returns:
            Whether it was the condition that ended the wait.

        Raises:
            ValueError: the run refused its settings; in its words.
            RuntimeError: the run failed.
        """
        told = 0.0
        while self.launcher.poll() is None:
            if until():
                return True
            if time.monotonic() > told + 0.1:
                told = time.monotonic()
                progress(logged_steps(self.folder))
            time.sleep(POLL)
        progress(logged_steps(self.folder))
        if code := self.launcher.returncode:
            words = self.output.read_text(encoding="utf-8", errors="replace").strip()
            if code == 2:
                raise ValueError(words.removeprefix("weft: error: "))
            raise RuntimeError(f"the run in {self.folder} failed:\n{words[-4000:]}")
        return until()

    def kill(self) -> None:
        """SIGKILL to every process of the run; returns when none is left."""
        pids = [self.launcher.pid, *_children(self.launcher.pid)]
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.launcher.wait()
        if not Path("/proc").is_dir():
            time.sleep(3)  # where the system does not end them with their launcher, they look after it every second
        while any(_alive(pid) for pid in pids[1:]):
            time.sleep(POLL)

    def __enter__(self) -> RunProcess:
        return self

    def __exit__(self, *error: object) -> None:
        if self.launcher.poll() is None:
            self.kill()


def logged_steps(run: Path) -> int:
    """Lines of a run's log so far."""
    from weft.train.log import FILE  # with torch, which the launcher has no use for

    file = run / FILE
    return file.read_bytes().count(b"\n") if file.exists() else 0


def _children(pid: int) -> list[int]:
    """Processes that one process has started, where the system tells."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ValueError as error:
        print(f"weft: error: {error}", file=sys.stderr)
        sys.exit(2)

"""Training over the nodes of a real Slurm: `examples/train.sbatch`, warned in the middle, goes on by itself."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import slurm_lab
from forked import cut, settings, train

from weft.checkpoint.folder import checkpoints
from weft.config.toml import config_toml
from weft.verify.continuation import compare

SBATCH = Path(__file__).parents[2] / "examples" / "train.sbatch"
USER = """
import subprocess, sys, time
from pathlib import Path

def ask(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout

sbatch, folder = sys.argv[1:]
log = Path(folder) / "cut" / "log.jsonl"
ask("sbatch", f"--chdir={folder}", "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", sbatch, "cut.toml")
while not log.exists() or log.read_text().count("\\n") < 3:
    assert ask("squeue", "--noheader"), "it ended before it was warned"
    time.sleep(0.05)
ask("scancel", "--batch", "--signal=USR1", "1")  # as Slurm does before the time limit
while ask("squeue", "--noheader"):
    time.sleep(0.2)
print(ask("scontrol", "--oneliner", "show", "job", "1"))
"""


@pytest.mark.slow
@pytest.mark.skipif(not slurm_lab.possible(), reason="Slurm is not installed, or this is not root")
def test_a_job_that_is_warned_saves_and_goes_on_from_the_queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = settings(tmp_path / "whole", "fsdp2", train={"steps": 60}, checkpoint={"every": 0})
    train(whole)
    broken = cut(whole, "fsdp2", tmp_path / "cut")
    (tmp_path / "cut.toml").write_text(config_toml(broken))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    lab = tmp_path / "lab"
    done = slurm_lab.around(lab, 2, [sys.executable, "-c", USER, str(SBATCH), str(tmp_path)], timeout=300)
    printed = (tmp_path / "slurm-1.out").read_text()
    assert done.returncode == 0, done.stdout + done.stderr + printed
    assert "JobState=COMPLETED" in done.stdout
    assert "Restarts=1 " in done.stdout
    assert len(checkpoints(tmp_path / "cut" / "checkpoints")) >= 1
    assert [difference for difference in compare(whole, broken, 30) if not difference.right] == [], printed
    for node in ("n1", "n2"):
        assert (lab / f"slurmd-{node}.log").read_text().count("launch task StepId=1.0 ") == 2, "before, and after"

"""A Slurm of its own around one command: munge, a controller, and nodes that have a name, an address, a disk's view and
processes of their own. Real daemons; what a cluster has more is machines.

    unshare --net --mount --pid --fork --mount-proc --kill-child=KILL python slurm_lab.py FOLDER NODES COMMAND ...

For root. Nothing is left behind: all of it ends with the namespaces of `unshare`.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "srun", "salloc", "munged", "ip", "unshare")
NAMESPACES = ["unshare", "--net", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child=KILL"]
NETWORK = "10.77.0"
CONF = """
ClusterName=lab
SlurmctldHost={host}({network}.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
KillWait=3
SchedulerParameters=bf_interval=1,sched_interval=1
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def possible() -> bool:
    """Whether Slurm is installed, and this is a user who may make networks."""
    return os.getuid() == 0 and all(map(shutil.which, PROGRAMS))


def around(folder: Path, nodes: int, command: list[str], timeout: float) -> subprocess.CompletedProcess[str]:
    """Run a command beside a Slurm of so many nodes, n1, n2, …; what the daemons say is in `folder`."""
    whole = [*NAMESPACES, sys.executable, __file__, str(folder), str(nodes), *command]
    return subprocess.run(whole, capture_output=True, text=True, timeout=timeout)


def main(folder: Path, nodes: int, command: list[str]) -> int:
    folder.mkdir(parents=True)
    write_settings(folder, nodes)
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    # the folder of a test is nobody else's, which munged takes by force alone
    parts = {"socket": "socket", "key-file": "key", "log-file": "log", "pid-file": "pid", "seed-file": "seed"}
    run("munged", "--force", *(f"--{option}={folder}/munge.{name}" for option, name in parts.items()))
    run("ip", "link", "set", "lo", "up")
    run("ip", "link", "add", "lab", "type", "bridge")
    run("ip", "addr", "add", f"{NETWORK}.1/24", "dev", "lab")
    run("ip", "link", "set", "lab", "up")
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    start(folder, "slurmctld", ["slurmctld", "-D", "-i"])
    for number in range(1, nodes + 1):
        add_node(folder, number)
    wait_for(nodes)
    return subprocess.run(command).returncode


def write_settings(folder: Path, nodes: int) -> None:
    host = socket.gethostname()
    lines = [f"NodeName=n{n} NodeAddr={NETWORK}.{10 + n} CPUs=2 RealMemory=4000" for n in range(1, nodes + 1)]
    conf = CONF.strip().format(host=host, network=NETWORK, folder=folder).splitlines()
    (folder / "slurm.conf").write_text("\n".join([*conf[:-1], *lines, conf[-1]]) + "\n")
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # nothing uses it; else slurmd looks for one
    names = ["127.0.0.1 localhost", f"{NETWORK}.1 {host}", *(f"{NETWORK}.{10 + n} n{n}" for n in range(1, nodes + 1))]
    (folder / "hosts").write_text("\n".join(names) + "\n")
    (folder / "nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files\n")  # no name server is there


def add_node(folder: Path, number: int) -> None:
    """Its first process begins slurmd, once its end of the cable is there."""
    name = f"n{number}"
    begin = f"""
        hostname {name}
        mount --bind {folder}/hosts /etc/hosts; mount --bind {folder}/nsswitch.conf /etc/nsswitch.conf
        ip link set lo up
        until ip link show eth0 >/dev/null 2>&1; do sleep 0.02; done
        ip addr add {NETWORK}.{10 + number}/24 dev eth0; ip link set eth0 up
        exec slurmd -D -N {name}
    """
    outer = start(folder, name, [*NAMESPACES, "--uts", "sh", "-c", begin])
    children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children")
    while not (inner := children.read_text().split()):
        time.sleep(0.01)
    run("ip", "link", "add", f"to-{name}", "type", "veth", "peer", "name", "eth0", "netns", inner[0])
    run("ip", "link", "set", f"to-{name}", "master", "lab", "up")


def wait_for(nodes: int) -> None:
    end = time.monotonic() + 30
    while time.monotonic() < end:
        idle = subprocess.run(["sinfo", "-h", "-t", "idle", "-o", "%D"], capture_output=True, text=True).stdout
        if idle.strip() == str(nodes):
            return
        time.sleep(0.05)
    sys.exit("the nodes did not come up")


def run(*command: str) -> None:
    subprocess.run(command, check=True)


def start(folder: Path, name: str, command: list[str]) -> subprocess.Popen[bytes]:
    with open(folder / f"{name}.out", "wb") as out:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]))

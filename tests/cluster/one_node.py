"""A Slurm cluster of one node, this machine, for as long as a command runs; no systemd is needed.

    python tests/cluster/one_node.py [--cpus 2] -- make figures PROFILE=smoke \\
        SNAKEMAKE_ARGS="--workflow-profile paper/cluster/slurm"

Needs root and Debian's packages slurmctld, slurmd, slurm-client and munge. All that the daemons write lies in a folder
of its own, which is removed; their logs are printed if the command fails. The exit status is that of the command.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SYSTEM = Path("/etc/slurm/slurm.conf")  # where jobs, whose environment Snakemake clears of Slurm's names, look for it
NEEDED = ("munged", "slurmctld", "slurmd", "sinfo")
CONFIGURATION = """\
ClusterName=one
SlurmctldHost={host}
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={place}/munge.socket
CredType=cred/munge
StateSaveLocation={place}/state
SlurmdSpoolDir={place}/spool
SlurmctldPidFile={place}/slurmctld.pid
SlurmdPidFile={place}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
ReturnToService=2
MinJobAge=300
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory={memory} State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> list[str]:
    """Programs that are not installed; empty where a cluster can start."""
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    return [name for name in NEEDED if not shutil.which(name, path=path)]


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def configure(place: Path, cpus: int) -> dict[str, str]:
    """Write key and configuration; returns the environment in which Slurm's programs find them."""
    for name in ("state", "spool"):
        (place / name).mkdir()
    (place / "munge.key").write_bytes(secrets.token_bytes(1024))
    (place / "munge.key").chmod(0o400)
    host, pages = socket.gethostname().partition(".")[0], os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    text = CONFIGURATION.format(
        host=host, ports=free_ports(2), place=place, cpus=cpus, memory=int(0.9 * pages / 2**20)
    )
    (place / "slurm.conf").write_text(text, encoding="utf-8")
    (place / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n", encoding="utf-8")
    return os.environ | {"SLURM_CONF": str(place / "slurm.conf"), "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}


@contextmanager
def cluster(cpus: int) -> Iterator[dict[str, str]]:
    """A cluster of one node; yields the environment for its programs."""
    if absent := missing():
        raise RuntimeError(f"{', '.join(absent)} missing: apt-get install slurmctld slurmd slurm-client munge")
    if SYSTEM.exists():
        raise RuntimeError(f"this machine belongs to a cluster already, by {SYSTEM}")
    with tempfile.TemporaryDirectory(prefix="slurm-") as name:
        place = Path(name)
        place.chmod(0o755)
        env, running = configure(place, cpus), []
        files = {"socket": "socket", "key-file": "key", "pid-file": "pid", "seed-file": "seed", "log-file": "log"}
        munge = ["munged", "--foreground", "--force", *(f"--{k}={place}/munge.{end}" for k, end in files.items())]
        try:
            for command in (munge, ["slurmctld", "-D"], ["slurmd", "-D"]):
                with open(place / f"{command[0]}.out", "wb") as out:
                    running.append(subprocess.Popen(command, env=env, stdout=out, stderr=out, stdin=subprocess.DEVNULL))
                time.sleep(1)
            wait_until_idle(env, running)
            SYSTEM.symlink_to(place / "slurm.conf")
            yield env
        except BaseException:
            for log in sorted(place.glob("*.out")):
                print(f"== {log.name}\n{log.read_text(errors='replace')[-3000:]}", file=sys.stderr)
            raise
        finally:
            if SYSTEM.is_symlink() and SYSTEM.readlink().is_relative_to(place):
                SYSTEM.unlink()
            for process in reversed(running):
                process.terminate()
            for process in running:
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    process.kill()


def wait_until_idle(env: dict[str, str], running: list[subprocess.Popen[bytes]], seconds: float = 60) -> None:
    """Return when the node takes jobs; `RuntimeError` if a daemon ended or time is up."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if any(process.poll() is not None for process in running):
            break
        state = subprocess.run(["sinfo", "-h", "-o", "%T"], env=env, capture_output=True, text=True, check=False).stdout
        if state.strip() == "idle":
            return
        time.sleep(0.5)
    raise RuntimeError("the cluster did not start")


def main() -> int:
    """Run the command in the cluster."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cpus", type=int, default=os.cpu_count(), help="of the node (all)")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    given = parser.parse_args()
    command = given.command[1:] if given.command[:1] == ["--"] else given.command
    with cluster(given.cpus) as env:
        code = subprocess.run(command, env=env, check=False).returncode
        if code:
            raise SystemExit(code)
    return 0


if __name__ == "__main__":
    sys.exit(main())

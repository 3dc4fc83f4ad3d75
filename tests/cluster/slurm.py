"""A real Slurm of its own for tests: munged, slurmctld and some virtual nodes on this one machine, all gone at the end.

As root each node is a machine as far as Linux can make one: network, host name, processes and /dev/shm of its own, one file system, and
pulling its plug takes everything on it away. Without root the nodes share this machine's, and no plug can be pulled.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
_SEARCH = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))
_START_S = 20.0
_CONF = """
ClusterName=test
SlurmctldHost={host}({address})
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=2,sched_min_interval=0,batch_sched_delay=0
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
SlurmdTimeout=10
KillWait=5
MinJobAge=3600
"""


def missing() -> str | None:
    """Why there can be no Slurm here; None: there can."""
    absent = [name for name in NEEDED if not shutil.which(name, path=_SEARCH)]
    return f"{', '.join(absent)} not installed (Debian: slurmctld slurmd slurm-client munge)" if absent else None


class Slurm:
    """`with Slurm(4) as slurm:`. Programs find it by `SLURM_CONF` in `slurm.environment`."""

    def __init__(self, nodes: int, cpus: int = 4) -> None:
        self.names = [f"node{number + 1}" for number in range(nodes)]
        self._cpus = cpus
        # Short, since a socket's path is; and not to be written by others, or slurmd refuses it.
        self.folder = Path(tempfile.mkdtemp(prefix="zlora-slurm-"))
        self.folder.chmod(0o755)
        self.environment = {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": _SEARCH}
        self._port, self._claim = _free_ports(nodes + 1)
        self._net, self._bridge = f"10.{100 + self._port % 100}.{self._port // 100 % 250}", f"zl{self._port}"
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}
        self.isolated = False

    def __enter__(self) -> Slurm:
        try:
            self.isolated = self._bridged()
            self._configure()
            munge = self.folder / "munge"
            self._daemon(
                *("munged", "--foreground", "--force", f"--key-file={munge}/key", f"--socket={munge}/socket", "--num-threads=2"),
                *(f"--pid-file={munge}/pid", f"--log-file={self.folder}/munged.log", f"--seed-file={munge}/seed"),
            )
            self._wait(lambda: (munge / "socket").exists(), "munged")
            self._daemon("slurmctld", "-D")
            for name in self.names:
                self.boot(name)
            self._wait(lambda: self.up() == set(self.names), "the nodes")
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def run(self, *words: str) -> str:
        """A command of Slurm's; what it prints."""
        done = subprocess.run(words, env={**os.environ, **self.environment}, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout

    def state(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says."""
        words = self.run("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def up(self) -> set[str]:
        done = subprocess.run(
            ["sinfo", "-h", "-N", "-o", "%N %T"], env={**os.environ, **self.environment}, capture_output=True, text=True, timeout=30
        )
        states = (line.split() for line in done.stdout.splitlines())
        return {name for name, state in states if state in ("idle", "mixed", "allocated", "completing")}

    def boot(self, name: str) -> None:
        number = self.names.index(name) + 1
        if not self.isolated:
            self._nodes[name] = self._daemon("slurmd", "-D", "-N", name)
            return
        space, outside = f"{self._bridge}-{name}", f"{self._bridge}-{number}"
        self._clear(space, outside)
        for words in (
            f"ip netns add {space}",
            # A node that is booted again has the address that the others remember.
            f"ip link add {outside} type veth peer name eth0 address 02:00:00:00:00:{number:02x} netns {space}",
            f"ip link set {outside} master {self._bridge} up",
            f"ip -n {space} addr add {self._net}.{number}/24 dev eth0",
            f"ip -n {space} link set eth0 up",
            f"ip -n {space} link set lo up",
        ):
            subprocess.run(words.split(), check=True, capture_output=True)
        # Not `ip netns exec`, which hides /sys/fs/cgroup: slurmd does not start without it.
        inside = (
            f"hostname {name}; mount --bind {self.folder}/hosts /etc/hosts; mount -t tmpfs tmpfs /dev/shm; "
            f"slurmd -N {name}; while :; do sleep 3600 & wait $!; done"
        )
        self._nodes[name] = self._daemon(
            *("nsenter", f"--net=/run/netns/{space}", "unshare", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"),
            *("bash", "-c", inside),
        )

    def pull_the_plug(self, name: str) -> None:
        """The node is gone at once: the others hear nothing any more, not even that connections are closed."""
        assert self.isolated
        self._clear("", f"{self._bridge}-{self.names.index(name) + 1}")
        self._nodes[name].kill()
        self._nodes[name].wait()

    def stop(self) -> None:
        for process in reversed(self._daemons):
            process.kill()
            process.wait()
        if self.isolated:
            for number, name in enumerate(self.names):
                self._clear(f"{self._bridge}-{name}", f"{self._bridge}-{number + 1}")
            self._clear("", self._bridge)
        shutil.rmtree(self.folder, ignore_errors=True)
        self._claim.close()

    def _bridged(self) -> bool:
        if os.geteuid() != 0 or not all(shutil.which(name, path=_SEARCH) for name in ("ip", "nsenter", "unshare")):
            return False
        words = (f"ip link add {self._bridge} type bridge", f"ip addr add {self._net}.254/24 dev {self._bridge}")
        return not any(
            subprocess.run(line.split(), capture_output=True, check=False).returncode for line in (*words, f"ip link set {self._bridge} up")
        )

    def _configure(self) -> None:
        for name in ("state", "munge"):
            (self.folder / name).mkdir()
        (self.folder / "munge").chmod(0o700 if not self.isolated else 0o755)
        key = self.folder / "munge" / "key"
        key.touch(0o600)
        key.write_bytes(os.urandom(128))
        host, own = socket.gethostname().partition(".")[0], f"{self._net}.254" if self.isolated else "127.0.0.1"
        user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
        lines = [_CONF.format(host=host, address=own, port=self._port, user=user, folder=self.folder).strip()]
        for number, name in enumerate(self.names, 1):
            address, machine = (f"{self._net}.{number}", name) if self.isolated else (own, host)
            place = f"NodeHostname={machine} NodeAddr={address} Port={self._port + number}"
            lines.append(f"NodeName={name} {place} CPUs={self._cpus} RealMemory=2000 State=UNKNOWN")
        lines += [
            "PartitionName=debug Nodes=ALL Default=YES PreemptMode=OFF",
            # Its jobs give way to those of `high`, and are asked first.
            "PartitionName=low Nodes=ALL PriorityTier=1 GraceTime=60",
            "PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF",
        ]
        (self.folder / "slurm.conf").write_text("\n".join(lines) + "\n")
        # None is used, yet slurmd looks for one and may die of what it finds.
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        names = [f"{self._net}.{number} {name}" for number, name in enumerate(self.names, 1)]
        (self.folder / "hosts").write_text("\n".join([Path("/etc/hosts").read_text(), f"{own} {host}", *names]) + "\n")

    def _daemon(self, *words: str) -> subprocess.Popen[bytes]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        with (self.folder / "daemons.log").open("ab") as log:
            process = subprocess.Popen(
                words, env={**kept, **self.environment}, stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=_die_with_parent
            )
        self._daemons.append(process)
        return process

    def _wait(self, done: object, what: str) -> None:
        deadline = time.monotonic() + _START_S
        while not done():
            if time.monotonic() > deadline:
                logs = "\n".join(f"{file.name}: {file.read_text(errors='replace')[-500:]}" for file in self.folder.glob("*.log"))
                raise RuntimeError(f"Slurm's start: {what} did not come up\n{logs}")
            time.sleep(0.1)

    def _clear(self, space: str, link: str) -> None:
        words = ([f"ip netns del {space}"] if space else []) + [f"ip link del {link}"]
        for line in words:
            subprocess.run(line.split(), capture_output=True, check=False)


def _die_with_parent() -> None:
    os.setsid()
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def _free_ports(count: int) -> tuple[int, socket.socket]:
    """The first of so many neighbours that nobody listens on; and what keeps another Slurm of these tests off them until it is closed."""
    for first in range(21000 + os.getpid() % 300 * 20, 32000, 20):
        claim = socket.socket(socket.AF_UNIX)
        try:
            # A name without a file: the system gives it once, and takes it back when the process ends.
            claim.bind(f"\0zlora-slurm-{first}")
            for port in range(first, first + count):
                with socket.socket() as trial:
                    trial.bind(("", port))
            return first, claim
        except OSError:
            claim.close()
    raise RuntimeError("no free ports")

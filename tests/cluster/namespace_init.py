"""First process in the namespaces of a node: makes mounts and network, then only reaps. Run as a script by `node.py`.

When it dies, the kernel kills every process of the namespaces (containers too) and takes mounts, interfaces and rules
away: nothing of a node needs cleaning up but its cgroups and its folder.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

# What the kubelet would set for the whole machine. It finds its values there and leaves the machine's alone.
_TUNABLES = {
    "vm/overcommit_memory": "1",
    "vm/panic_on_oom": "0",
    "kernel/panic": "10",
    "kernel/panic_on_oops": "1",
    "kernel/keys/root_maxkeys": "1000000",
    "kernel/keys/root_maxbytes": "25000000",
}


def main() -> None:
    folder, address = Path(sys.argv[1]), sys.argv[2]
    make_mounts(folder)
    make_network(address)
    (folder / "namespaces-ready").touch()
    reap_forever()


def make_mounts(folder: Path) -> None:
    """Volumes of pods need shared mounts; what programs write outside the folder goes into it or into memory."""
    _run("mount", "--make-rshared", "/")
    for target in ("/var/lib", "/var/log"):
        source = folder / target.replace("/", "_").strip("_")
        source.mkdir()
        _run("mount", "--bind", str(source), target)
    _run("mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", "/run")
    for name, value in _TUNABLES.items():
        source = folder / "sysctl" / name
        source.parent.mkdir(parents=True, exist_ok=True)
        source.write_text(f"{value}\n")
        _run("mount", "--bind", str(source), f"/proc/sys/{name}")


def make_network(address: str) -> None:
    """One address of its own (the kubelet refuses loopback) and no way out: no packet of a test leaves the machine."""
    _run("ip", "link", "set", "lo", "up")
    _run("ip", "link", "add", "node0", "type", "veth", "peer", "name", "node1")
    _run("ip", "link", "set", "node0", "up")
    _run("ip", "link", "set", "node1", "up")
    _run("ip", "address", "add", f"{address}/24", "dev", "node0")
    _run("ip", "route", "add", "default", "dev", "node0")
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")


def reap_forever() -> None:
    """Orphans of the namespaces become our children."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    while True:
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            pass
        signal.sigwait({signal.SIGCHLD})


def _run(*command: str) -> None:
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main()

"""Two network namespaces joined by a cable that can be cut without anybody being told: two machines, for tests."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass

NOBODY = "02:00:00:00:00:fe"  # an Ethernet address that no interface has


def unavailable() -> str:
    """Why there can be none here, or the empty string."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need the command ip (iproute2)"
    trial = subprocess.run(["ip", "netns", "add", f"fs{os.getpid()}t"], capture_output=True, text=True)
    if trial.returncode:
        return f"network namespaces are not allowed here: {trial.stderr.strip()}"
    subprocess.run(["ip", "netns", "delete", f"fs{os.getpid()}t"], check=True)
    return ""


@dataclass(frozen=True)
class Machines:
    """Two of them.

    Attributes:
        names: Of their namespaces.
        addresses: Of their interfaces.
    """

    names: tuple[str, str]
    addresses: tuple[str, str] = ("192.0.2.1", "192.0.2.2")  # for documentation: no real machine has them

    def command(self, machine: int, *words: str) -> list[str]:
        """A command that runs on one of them; with `Popen`, its process is the command's own."""
        return ["ip", "netns", "exec", self.names[machine], *words]

    def processes(self, machine: int) -> list[int]:
        """All that run there."""
        done = subprocess.run(["ip", "netns", "pids", self.names[machine]], capture_output=True, text=True, check=True)
        return [int(pid) for pid in done.stdout.split()]

    def end(self, machine: int, deadline_s: float = 10.0) -> None:
        """Kills all that run there, at once, and waits until they are gone."""
        deadline = time.monotonic() + deadline_s
        while (pids := self.processes(machine)) and time.monotonic() < deadline:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)

    def cut(self) -> None:
        """From now on what one sends is taken by nobody: no error, no reset, and the interfaces stay up."""
        for i in (0, 1):
            self._ip(
                i, "neighbour", "replace", self.addresses[1 - i], "lladdr", NOBODY, "dev", "eth0", "nud", "permanent"
            )

    def mend(self) -> None:
        """Undoes `cut`."""
        for i in (0, 1):
            self._ip(i, "neighbour", "delete", self.addresses[1 - i], "dev", "eth0")

    def _ip(self, machine: int, *words: str) -> None:
        subprocess.run(["ip", "-n", self.names[machine], *words], check=True, timeout=10)


@contextlib.contextmanager
def machines() -> Iterator[Machines]:
    """Two machines, alone with each other; nothing of them stays."""
    pair = Machines((f"fs{os.getpid()}a", f"fs{os.getpid()}b"))
    try:
        for name in pair.names:
            subprocess.run(["ip", "netns", "add", name], check=True, timeout=10)
        cable = ["type", "veth", "peer", "name", "eth0", "netns", pair.names[1]]
        pair._ip(0, "link", "add", "eth0", *cable)
        for i, address in enumerate(pair.addresses):
            pair._ip(i, "address", "add", f"{address}/24", "dev", "eth0")
            pair._ip(i, "link", "set", "lo", "up")
            pair._ip(i, "link", "set", "eth0", "up")
        yield pair
    finally:
        for i, name in enumerate(pair.names):
            if os.path.exists(f"/run/netns/{name}"):
                pair.end(i)
                subprocess.run(["ip", "netns", "delete", name], check=True, timeout=10)

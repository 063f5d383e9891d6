"""``fedsim cluster``: what it starts, who may use it, and that nothing of it stays."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from fedsim.engine import address
from fedsim.engine import session as sessions
from fedsim.engine.leftovers import start_time
from tests.cli import QUICK, ROOT, Fedsim, Outcome, process

pytest.importorskip("ray")

LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F"}  # 127.0.0.1 as the kernel writes it, and within IPv6
RUN = [*QUICK, "engine=ray", "engine.address=auto", "engine.workers=2"]


@dataclass
class Place:
    """A machine of its own, as far as clusters go.

    Attributes:
        tmp: The temporary folder, with a short path.
        port: A free port.
    """

    tmp: Path
    port: int

    @property
    def env(self) -> dict[str, str]:
        """For processes."""
        return {"TMPDIR": str(self.tmp)}

    @property
    def folder(self) -> Path:
        """Of the cluster."""
        return self.tmp / f"fedsim-{os.getuid()}" / "cluster"

    @property
    def supervisor(self) -> int:
        """Its process id."""
        return int(json.loads((self.folder / "state.json").read_text())["pid"])

    def fedsim(self, *args: str) -> Outcome:
        """Runs a command."""
        return process(*args, cwd=self.tmp, env=self.env)

    def up(self, *args: str) -> Outcome:
        """Starts a cluster."""
        done = self.fedsim("cluster", "up", f"port={self.port}", *args)
        assert done.status == 0, done.err
        return done

    def left(self) -> list[str]:
        """Files below the temporary folder, but the outputs of runs."""
        found = [str(p.relative_to(self.tmp)) for p in self.tmp.rglob("*") if "runs" not in p.parts]
        return [name for name in found if name != f"fedsim-{os.getuid()}"]


@contextlib.contextmanager
def place() -> Iterator[Place]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    here = Place(Path(tempfile.mkdtemp(prefix="fs", dir="/tmp")), port)  # sockets need a short path
    try:
        yield here
    finally:
        done = here.fedsim("cluster", "down")
        shutil.rmtree(here.tmp)
        assert done.status == 0, done.err


@pytest.fixture
def empty(monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """A place without a cluster."""
    with place() as here:
        monkeypatch.setattr(tempfile, "tempdir", str(here.tmp))
        yield here


@pytest.fixture(scope="module")
def cluster() -> Iterator[Place]:
    """A cluster of two nodes with a CPU each."""
    with place() as here:
        here.up("nodes=2", "cpus=1")
        yield here


def members(pid: int) -> set[int]:
    """The processes of a supervisor's session that are not dead."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, *fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(fields[2]) == pid and state != "Z":
                found.add(int(folder.name))
    return found


def gone(pid: int, seconds: float = 10.0) -> bool:
    """Whether all of them end within so long."""
    deadline = time.monotonic() + seconds
    while members(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not members(pid)


def listening(pids: set[int]) -> set[tuple[str, int]]:
    """Addresses (as the kernel writes them) and ports on which some processes listen."""
    inodes = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").glob("*"):
            with contextlib.suppress(OSError):
                inodes.add(os.readlink(link))
    rows = [r.split() for name in ("tcp", "tcp6") for r in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    places = [r[1].split(":") for r in rows if r[3] == "0A" and f"socket:[{r[9]}]" in inodes]
    return {(address, int(port, 16)) for address, port in places}


# --- mistakes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "needed", "given"),
    [
        ([], "up, down or status", "''"),
        (["upp"], "did you mean 'up'", "'upp'"),
        (["up", "cpus=0"], "cpus must be a whole number > 0", "0"),
        (["up", "nodes=0"], "nodes must be a whole number > 0", "0"),
        (["up", "nodes=1.5"], "nodes must be a whole number > 0", "'1.5'"),
        (["up", "nodes"], "nodes must be a whole number > 0", "''"),
        (["up", "cpus=1", "cpus=2"], "give it once", "cpus="),
        (["up", "port=65536"], "from 1 to 65535", "65536"),
        (["up", "gpus=1"], "it takes nodes=, cpus=, port=", "'gpus=1'"),
        (["down", "nodes=1"], "it takes none", "'nodes=1'"),
    ],
)
def test_a_mistake_ends_in_one_line_and_starts_nothing(
    fedsim: Fedsim, empty: Place, args: list[str], needed: str, given: str
) -> None:
    outcome = fedsim("cluster", *args)
    assert outcome.status == 2 and needed in outcome.line and given in outcome.line
    assert empty.left() == []


def test_a_port_that_is_taken_is_refused(fedsim: Fedsim, empty: Place) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", empty.port))
        other.listen()
        outcome = fedsim("cluster", "up", f"port={empty.port}")
    assert outcome.status == 2 and f"port={empty.port} cannot be used" in outcome.line
    assert empty.left() == []


def test_without_a_cluster_status_fails_and_down_does_not(fedsim: Fedsim, empty: Place) -> None:
    outcome = fedsim("cluster", "status")
    assert outcome.status == 1 and "no cluster is up here" in outcome.line
    outcome = fedsim("cluster", "down")
    assert outcome.status == 0 and outcome.out == "no cluster was up\n"


def test_two_commands_at_once_do_not_meet(fedsim: Fedsim, empty: Place) -> None:
    from fedsim.cluster import _locked

    with _locked():
        outcome = fedsim("cluster", "up")
    assert outcome.status == 2 and "another `fedsim cluster` command is at work" in outcome.line


def test_a_cluster_of_somebody_else_is_not_joined(empty: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, user = empty.folder, os.getuid()
    folder.mkdir(parents=True)
    state = {"pid": os.getpid(), "started": "1", "address": "127.0.0.1:1"}
    (folder / "state.json").write_text(json.dumps(state))
    assert address.own_cluster() is None  # another process has that id now
    (folder / "state.json").write_text(json.dumps(state | {"started": start_time(os.getpid())}))
    assert address.own_cluster() == ("127.0.0.1:1", folder / "token")
    folder.parent.rename(empty.tmp / f"fedsim-{user + 1}")  # found by its name, yet not that user's
    monkeypatch.setattr(os, "getuid", lambda: user + 1)
    assert address.own_cluster() is None
    monkeypatch.undo()


# --- a cluster --------------------------------------------------------------------------------------------


def test_status_counts_nodes_and_cpus_and_says_how_to_join(cluster: Place) -> None:
    done = cluster.fedsim("cluster", "status")
    assert done.status == 0, done.err
    assert f"127.0.0.1:{cluster.port}, 2 nodes, 2 CPUs, " in done.out
    assert f"fedsim engine=ray engine.address=127.0.0.1:{cluster.port}" in done.out


def test_it_listens_on_the_loopback_interface_only(cluster: Place) -> None:
    found = listening(members(cluster.supervisor))
    assert cluster.port in {port for _, port in found}
    assert {address for address, _ in found} <= LOOPBACK


def test_its_token_is_for_its_owner_only(cluster: Place) -> None:
    assert (cluster.folder / "token").stat().st_mode & 0o777 == 0o600
    assert cluster.folder.stat().st_mode & 0o777 == 0o700
    assert cluster.folder.parent.stat().st_mode & 0o777 == 0o700
    assert re.fullmatch("[0-9a-f]{64}", (cluster.folder / "token").read_text())


def test_a_run_finds_it_and_has_the_bits_of_one_process(cluster: Place, fedsim: Fedsim) -> None:
    joined, alone = cluster.fedsim(*RUN), fedsim(*QUICK)
    assert joined.status == 0, joined.err
    hashes = [re.findall(r"_sha256 +([0-9a-f]{64})", done.out) for done in (joined, alone)]
    assert hashes[0] == hashes[1] and len(hashes[0]) == 2


def test_up_twice_is_refused_and_the_first_stays(cluster: Place) -> None:
    supervisor = cluster.supervisor
    done = cluster.fedsim("cluster", "up", "nodes=1")
    assert done.status == 2 and f"a cluster is up already at 127.0.0.1:{cluster.port}" in done.line
    assert cluster.supervisor == supervisor and len(members(supervisor)) > 4


def test_down_leaves_no_process_and_no_file(cluster: Place) -> None:  # the last of this cluster
    supervisor = cluster.supervisor
    done = cluster.fedsim("cluster", "down")
    assert done.status == 0 and done.out == f"the cluster at 127.0.0.1:{cluster.port} is down\n"
    assert gone(supervisor, 1.0) and cluster.left() == []
    again = cluster.fedsim("cluster", "down")
    assert again.status == 0 and again.out == "no cluster was up\n"


# --- faults -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_private_cluster_of_a_run_listens_on_the_loopback_interface_only(empty: Place) -> None:
    code = "from fedsim.engine.session import Session; s = Session('local', 1, 0); print(1, flush=True); input()"
    command, pipe = [sys.executable, "-c", code + "; s.close()"], subprocess.PIPE
    env = {**os.environ, **empty.env, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=env, start_new_session=True, stdin=pipe, stdout=pipe) as run:
        assert run.stdout is not None and run.stdout.readline() == b"1\n"
        found = listening(members(run.pid))
        run.communicate(b"\n")
    assert len(found) > 3 and {address for address, _ in found} <= LOOPBACK
    assert gone(run.pid) and empty.left() == []


@pytest.mark.slow
def test_after_a_killed_supervisor_down_and_up_work(empty: Place) -> None:
    for command in ("down", "up"):
        empty.up()
        supervisor = empty.supervisor
        os.kill(supervisor, signal.SIGKILL)
        time.sleep(0.5)
        done = empty.fedsim("cluster", "status")
        assert done.status == 1 and "lost its supervisor" in done.line
        if command == "up":
            empty.up()
            assert empty.fedsim("cluster", "status").status == 0
        assert empty.fedsim("cluster", "down").status == 0
        assert gone(supervisor, 1.0) and empty.left() == []


@pytest.mark.slow
def test_a_cluster_whose_first_node_dies_clears_itself(empty: Place) -> None:
    empty.up("nodes=2", "cpus=1")
    supervisor = empty.supervisor
    server = next(p for p in members(supervisor) if b"/gcs_server\0" in Path(f"/proc/{p}/cmdline").read_bytes())
    os.kill(server, signal.SIGKILL)
    assert gone(supervisor, 30.0) and empty.left() == []
    assert empty.fedsim("cluster", "status").status == 1


@pytest.mark.slow
def test_a_run_on_it_ends_as_after_ctrl_c_and_can_be_resumed(empty: Place) -> None:
    empty.up("cpus=2")
    command = [sys.executable, "-m", "fedsim.cli", *RUN, "rounds=100000", "checkpoint.seconds=0", "name=a"]
    env = {**os.environ, **empty.env, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=empty.tmp, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as run:
        deadline = time.monotonic() + 30
        while not list(empty.tmp.glob("runs/a/*/metrics.jsonl")) and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(1.0)
        assert empty.fedsim("cluster", "down").status == 0
        assert run.wait(10) == 130
    assert run.stderr is not None
    (folder,) = empty.tmp.glob("runs/a/*")
    rounds = (folder / "metrics.jsonl").read_text().count("\n") + 2
    resumed = empty.fedsim(f"resume={folder}", "engine=inline", f"rounds={rounds}")
    whole = empty.fedsim(*QUICK, f"rounds={rounds}")
    hashes = [re.findall(r"state_sha256 +([0-9a-f]{64})", done.out) for done in (resumed, whole)]
    assert hashes[0] == hashes[1] and len(hashes[0]) == 1, resumed.err + whole.err


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.4, 2.0, 4.0])
def test_ctrl_c_while_it_starts_leaves_nothing(empty: Place, seconds: float) -> None:
    command = [sys.executable, "-m", "fedsim.cli", "cluster", "up", f"port={empty.port}"]
    env = {**os.environ, **empty.env, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=empty.tmp, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as start:
        time.sleep(seconds)
        start.send_signal(signal.SIGINT)
        assert start.wait(20) == 130
    assert empty.left() == []


@pytest.mark.slow
def test_without_the_token_nobody_is_let_in(cluster: Place) -> None:
    if not cluster.folder.exists():
        cluster.up("nodes=2", "cpus=1")
    code = f"import ray; ray.init(address='127.0.0.1:{cluster.port}', logging_level=40)"
    for mode in ({"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}):
        env = {**os.environ, **sessions.LOOPBACK, **mode}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=100)
        assert done.returncode != 0 and "authentication" in done.stderr.lower()

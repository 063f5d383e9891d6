"""What is wrong with a request for Ray is said in one line, soon, and nothing is left of the attempt."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedsim.engine import address as addresses
from fedsim.engine import leftovers
from fedsim.engine import session as sessions
from fedsim.engine.session import Session
from fedsim.errors import ConfigError
from tests.cli import QUICK, Fedsim
from tests.rooms import Room, room, wait_for

pytest.importorskip("ray")

JOIN = [*QUICK, "engine=ray", "engine.workers=1"]


def refused(address: str, within: float = 4.0) -> str:
    """What a session says to an address, and that it says it soon."""
    begin = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        Session(address, 0, 0)
    assert time.monotonic() - begin < within
    return str(caught.value)


@contextlib.contextmanager
def listener(answer: bytes | None) -> Iterator[str]:
    """An address at which somebody answers with these bytes; None: accepts, and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with contextlib.suppress(OSError):
                connection, _ = server.accept()
                with connection:
                    connection.recv(100)
                    if answer is not None:
                        connection.sendall(answer)
                    else:
                        time.sleep(addresses.CONNECT_S + 1)

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        thread.join()


# --- addresses --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "address", ["here", "127.0.0.1", "127.0.0.1:", "127.0.0.1:65536", ":6379", "ray://127.0.0.1:1"]
)
def test_an_address_has_a_host_and_a_port(address: str) -> None:
    assert f"engine.address must be local, auto or host:port, got '{address}'" in refused(address)


def test_where_nobody_listens_it_is_said_at_once() -> None:
    assert "no Ray cluster answers at 127.0.0.1:1 (Connection refused)" in refused("127.0.0.1:1", within=1.0)


def test_where_packets_vanish_it_is_said_after_seconds() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full, contextlib.ExitStack() as stack:
        for _ in range(3):  # more than it queues: the kernel drops what comes then
            line = stack.enter_context(socket.socket())
            line.setblocking(False)
            line.connect_ex(full.getsockname())
        assert "(timed out)" in refused(f"127.0.0.1:{full.getsockname()[1]}")


def test_who_says_nothing_is_no_cluster() -> None:
    with listener(None) as address:
        assert f"no Ray cluster answers at {address} (timed out)" in refused(address)


def test_a_web_server_is_no_cluster() -> None:
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    thread = threading.Thread(target=server.handle_request)
    thread.start()
    address = f"127.0.0.1:{server.server_port}"
    assert f"something answers at {address}, but it is not Ray's head" in refused(address)
    thread.join()
    server.server_close()


def test_who_hangs_up_is_no_cluster() -> None:
    with listener(b"") as address:
        assert "it is not Ray's head" in refused(address)


# --- tokens, Ray itself, folders --------------------------------------------------------------------------


@pytest.mark.parametrize(("token", "needed"), [(None, "No such file"), ("", "is empty")])
def test_a_token_that_is_not_there_is_said_before_ray_aborts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, token: str | None, needed: str
) -> None:
    if token is not None:
        (tmp_path / "token").write_text(token)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    with listener(addresses.HELLO[-9:]) as address:
        said = refused(address)
    assert "RAY_AUTH_MODE=token, but" in said and needed in said and str(tmp_path) in said


def test_without_ray_it_is_said_what_to_install(fedsim: Fedsim, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    outcome = fedsim(*JOIN)
    assert outcome.status == 2 and "engine=ray needs Ray" in outcome.line and "pip install ray" in outcome.line


def test_a_temporary_folder_that_cannot_be_used_is_one_line(
    fedsim: Fedsim, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setattr(leftovers, "user_root", lambda: file)
    outcome = fedsim(*JOIN)
    assert outcome.status == 2 and "set TMPDIR to a folder of your own" in outcome.line and str(file) in outcome.line


def test_a_long_temporary_folder_is_not_used_for_sockets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", f"/tmp/{'x' * 60}")
    assert leftovers.user_root() == Path(f"/tmp/fedsim-{os.getuid()}")


def test_a_worker_must_fit_on_the_machine(fedsim: Fedsim) -> None:
    outcome = fedsim(*JOIN, "engine.cpus_per_worker=100000")
    assert outcome.status == 2 and "need 100000 CPUs, but there are" in outcome.line


# --- a cluster that does not fit --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster() -> Iterator[Room]:
    """A cluster with one CPU."""
    with room() as here:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        done = here.run("cluster", "up", "cpus=1", f"port={port}")
        assert done.status == 0, done.err
        (here.path / "address").write_text(f"127.0.0.1:{port}")
        yield here
        assert here.run("cluster", "down").status == 0


def token_of(here: Room) -> dict[str, str]:
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(here.tmp / f"fedsim-{os.getuid()}" / "cluster" / "token"),
        **sessions.LOOPBACK,
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "needed"),
    [
        ({}, "asks for a token; set RAY_AUTH_MODE=token"),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}, "asks for another token than ours"),
    ],
)
def test_a_wrong_token_is_said_at_once(cluster: Room, environment: dict[str, str], needed: str) -> None:
    address = (cluster.path / "address").read_text()
    with room() as other:  # another temporary folder: the cluster is somebody else's
        begin = time.monotonic()
        done = other.run(*JOIN, f"engine.address={address}", **environment)
        assert time.monotonic() - begin < 15
        assert done.status == 2 and needed in done.line and address in done.line
        assert other.left() == [] and other.runs() == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "needed"),
    [
        (["engine.workers=3"], "need 3 CPUs, but there are 1"),
        (["engine.gpus_per_worker=0.5"], "need 0.5 GPUs, but there are 0"),
    ],
)
def test_a_cluster_that_is_too_small_is_refused(cluster: Room, more: list[str], needed: str) -> None:
    done = cluster.run(*JOIN, "engine.address=auto", *more)
    assert done.status == 2 and needed in done.line and cluster.runs() == []


@pytest.mark.slow
def test_a_cluster_that_others_use_is_waited_for_and_that_is_said(cluster: Room) -> None:
    code = (
        "import ray, sys, time; ray.init(address=sys.argv[1], log_to_driver=False)\n"
        "a = ray.remote(num_cpus=1)(type('A', (), {'f': lambda self: 1})).remote(); ray.get(a.f.remote())\n"
        "print('has it', flush=True); time.sleep(100)"
    )
    address = (cluster.path / "address").read_text()
    with cluster.start(address, code=code, **token_of(cluster)) as other:
        assert other.stdout is not None and other.stdout.readline() == "has it\n"
        with cluster.start(*JOIN, "engine.address=auto") as run:
            assert run.stderr is not None
            said = run.stderr.readline()
            other.kill()
            run.communicate(timeout=60)
    assert "no worker has started yet: 0 of 1 CPUs are free, and each worker needs 1" in said
    assert run.returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize(("key", "value"), [("ray_version", "2.1.0"), ("python_version", "3.7.1")])
def test_other_versions_at_the_other_end_are_named(cluster: Room, key: str, value: str) -> None:
    # What a cluster says of itself is changed, which is all that the driver looks at.
    code = (
        "import json, sys\nfrom ray._raylet import GcsClient\nfrom ray._common.usage import usage_constants as c\n"
        "from ray._private import ray_constants\ngcs = GcsClient(address=sys.argv[1])\n"
        "name, space = c.CLUSTER_METADATA_KEY, ray_constants.KV_NAMESPACE_CLUSTER\n"
        "before = gcs.internal_kv_get(name, space)\nprint(before.decode())\n"
        "new = json.dumps({**json.loads(before), **json.loads(sys.argv[2])}).encode()\n"
        "gcs.internal_kv_put(name, new, True, space)"
    )
    address = (cluster.path / "address").read_text()

    def pretend(values: dict[str, str]) -> dict[str, str]:
        with cluster.start(address, json.dumps(values), code=code, **token_of(cluster)) as process:
            out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        before: dict[str, str] = json.loads(out)
        return before

    before = pretend({key: value})
    try:
        done = cluster.run(*JOIN, "engine.address=auto")
    finally:
        pretend(before)
    assert done.status == 2 and value in done.line and "versions of Ray and Python must be equal" in done.line
    wait_for(lambda: cluster.run("cluster", "status").status == 0, 30)


@pytest.mark.parametrize("flag", ["--dry-run", "--cfg"])
def test_ray_is_not_started_for_a_look(flag: str, fedsim: Fedsim, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr("fedsim.engine.session.Session.__init__", refuse)
    assert fedsim(*QUICK, "engine=ray", flag).status == 0
    assert "engine.workers must be" in fedsim(*QUICK, "engine=ray", "engine.workers=zero", flag).line

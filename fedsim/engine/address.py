"""Which cluster of Ray is meant, whether it is there, and whether it lets us in: Ray itself would try for minutes."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fedsim.engine.leftovers import start_time, user_root
from fedsim.errors import ConfigError, one_line

#: How HTTP/2 begins, and with it gRPC: a fixed text and settings, here none. Both sides send settings first.
HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
CONNECT_S = 2.0  # a cluster that does not answer for so long is not there; Ray itself would try for minutes


def own_cluster() -> tuple[str, Path] | None:
    """Address and file with the token of the cluster that `fedsim cluster up` started, if there is one alive."""
    folder = user_root() / "cluster"
    try:
        if folder.stat().st_uid != os.getuid():
            return None
        state = json.loads((folder / "state.json").read_text())
        alive = bool(state["started"]) and start_time(state["pid"]) == state["started"]
        return (str(state["address"]), folder / "token") if alive else None
    except FileNotFoundError:
        return None


def reachable(address: str) -> str:
    """The address of a cluster that answers.

    Raises:
        ConfigError: It does not.
    """
    found = address
    if address == "auto":
        found = os.environ.get("RAY_ADDRESS", "")
        if not found and (own := own_cluster()) is not None:
            found = own[0]
        if not found:
            file = Path(tempfile.gettempdir()) / "ray" / "ray_current_cluster"
            found = file.read_text().strip() if file.exists() else ""
        if not found:
            raise ConfigError(
                "engine.address=auto: no Ray cluster runs on this machine, and RAY_ADDRESS is not set; start one with "
                "`fedsim cluster up` or `ray start --head`, or set engine.address=local"
            )
    host, _, port = found.rpartition(":")
    if not host or "/" in host or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(f"engine.address must be local, auto or host:port, got {found!r}")
    try:
        with socket.create_connection((host, int(port)), timeout=CONNECT_S) as line:
            line.sendall(HELLO)
            answer = line.recv(9) if "RAY_USE_TLS" not in os.environ else HELLO[-9:]
    except OSError as exc:
        raise ConfigError(
            f"engine.address={address}: no Ray cluster answers at {found} ({exc.strerror or exc}); is it up, and can "
            "this machine reach it?"
        ) from exc
    if answer[3:4] != HELLO[-6:-5]:
        raise ConfigError(_not_ray(found))
    return found


def knock(address: str) -> None:
    """Asks a cluster for its id: what Ray itself would try to get for 20 seconds and more.

    Raises:
        ConfigError: It is no cluster of Ray, or does not let us in.
    """
    mode, file = os.environ.get("RAY_AUTH_MODE"), os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token"
    remedy = "set RAY_AUTH_MODE=token here, and RAY_AUTH_TOKEN_PATH or RAY_AUTH_TOKEN as on its nodes"
    if mode == "token" and not os.environ.get("RAY_AUTH_TOKEN"):  # without one Ray would abort
        try:
            there = bool(Path(file).expanduser().read_text().strip())
        except OSError as exc:
            raise ConfigError(f"RAY_AUTH_MODE=token, but there is no token: {one_line(exc)}; {remedy}") from exc
        if not there:
            raise ConfigError(f"RAY_AUTH_MODE=token, but {file} is empty; {remedy}")
    try:
        from ray._raylet import GcsClient  # type: ignore[attr-defined]
        from ray.exceptions import AuthenticationError, RpcError
    except ImportError:  # versions without tokens
        return
    forget_token()
    try:
        with _without_stderr():
            GcsClient(address=address)
    except AuthenticationError as exc:
        given = "another token than ours" if mode == "token" else "a token"
        raise ConfigError(f"the Ray cluster at {address} asks for {given}; {remedy}") from exc
    except RpcError as exc:
        raise ConfigError(f"{_not_ray(address)} ({one_line(exc)})") from exc


def _not_ray(address: str) -> str:
    return (
        f"something answers at {address}, but it is not Ray's head; engine.address is the address that "
        "`ray start --head` printed, whose port is 6379 unless it was told another"
    )


@contextlib.contextmanager
def _without_stderr() -> Iterator[None]:
    """What libraries write there by themselves is lost; what matters comes as an exception."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def forget_token() -> None:
    """Makes Ray read its settings and its token again: it did so once, perhaps before this session."""
    with contextlib.suppress(ImportError, AttributeError):  # versions without tokens
        from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

        Config.initialize("")
        AuthenticationTokenLoader.instance().reset_cache()

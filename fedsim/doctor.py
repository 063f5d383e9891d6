"""``fedsim doctor``: whether fedsim can run here, what it would find, and how fast this machine is.

Every check is on its own: one that raises is a problem with its reason, and the others still run. Nothing here waits
for a network, except a cluster of Ray that the environment names (two seconds).
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO

from fedsim import config as conf
from fedsim.errors import FedsimError, RunError, one_line
from fedsim.report.text import human_bytes
from fedsim.rundir import REMEDIES

if TYPE_CHECKING:
    from fedsim.datasets.images import Images

LITTLE_MEMORY = 1 << 30  # torch and a small experiment need about half of it
LITTLE_DISK, NO_DISK = 1 << 30, 50 << 20
SECONDS = 0.4  # per measurement
NOISY = 0.15


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes:
        text: With its remedy, where there is something to do.
        status: ``"ok"``; ``"note"``: worth knowing, nothing fails; ``"problem"``: fedsim, or what the user has set up,
            cannot work.
    """

    text: str
    status: Literal["ok", "note", "problem"] = "ok"


def doctor(stream: TextIO | None = None) -> None:
    """Prints a line per check, and a short benchmark (about 3 seconds).

    Args:
        stream: Where to; default: standard output.

    Raises:
        RunError: There is a problem; names the first.
    """
    out = stream or sys.stdout
    problems: list[str] = []
    for name, check in CHECKS:
        for finding in _findings(check):
            print(f"{finding.status:8} {name:11} {finding.text}", file=out, flush=True)
            if finding.status == "problem":
                problems.append(f"{name}: {finding.text}")
    if problems:
        raise RunError(f"{len(problems)} problem{'s' if len(problems) > 1 else ''} here, the first is {problems[0]}")
    print("\nfedsim can run here", file=out, flush=True)


def _findings(check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    try:
        yield from check()
    except FedsimError as exc:
        yield Finding(" ".join(str(exc).split()), "problem")
    except Exception as exc:
        yield Finding(f"the check itself failed ({one_line(exc)})", "problem")


# --- software ---------------------------------------------------------------------------------------------


def _software() -> Iterator[Finding]:
    from fedsim.experiment import versions
    from fedsim.run import _commit

    found = versions()
    commit = _commit()
    yield Finding(f"fedsim {found['fedsim']}" + (f", commit {commit}" if commit else ""))
    yield Finding(f"Python {found['python']}, torch {found['torch']}, numpy {found['numpy']}, hydra {found['hydra']}")
    flwr = _version("flwr")
    yield Finding(f"flwr {flwr}") if flwr else Finding("flwr is not installed; fedsim itself does not need it", "note")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _ray() -> Iterator[Finding]:
    installed, address = _version("ray"), os.environ.get("RAY_ADDRESS")
    if installed is None:
        unused = f"; RAY_ADDRESS={address} has no effect" if address else ""
        yield Finding(f"not installed{unused}; runs happen in one process", "note")
        return
    yield Finding(installed)
    if not address or address in ("auto", "local"):
        return
    host, _, port = address.rpartition("://")[2].rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=2).close()
    except (OSError, ValueError) as exc:
        yield Finding(f"nothing answers at RAY_ADDRESS={address} ({exc}); start the cluster, or unset it", "problem")
    else:
        yield Finding(f"something answers at RAY_ADDRESS={address}")


def _wandb() -> Iterator[Finding]:
    installed = _version("wandb")
    if installed is None:
        yield Finding("not installed: tracker=wandb is not available; pip install wandb", "note")
        return
    from fedsim.tracking.wandb import asked, has_credentials

    mode = asked()
    if mode in ("offline", "disabled"):
        yield Finding(f"{installed}; WANDB_MODE or W&B's settings say {mode}", "note")
    elif has_credentials():
        yield Finding(f"{installed}; credentials were found (not tried: that needs the network)")
    else:
        yield Finding(f"{installed}; no credentials, so tracker=wandb writes offline files; `wandb login`", "note")


# --- hardware ---------------------------------------------------------------------------------------------


def _cores() -> Iterator[Finding]:
    import torch

    here, usable = os.cpu_count() or 1, len(os.sched_getaffinity(0))
    text = f"{usable} of {here} usable"
    limits = [int(quota) / int(period) for quota, period in map(str.split, _cgroup("cpu.max")) if quota != "max"]
    if limits:
        text += f", limited to the time of {min(limits):g} (control group)"
    text += f"; torch: {torch.get_num_threads()} threads, of which a run uses engine.threads=1 unless told otherwise"
    yield Finding(text, "note" if limits and min(limits) < 1 else "ok")
    yield Finding(f"processor: {torch.backends.cpu.get_cpu_capability()}")


def _cgroup(name: str) -> Iterator[str]:
    """What a file says in this process's control group and in all above it (version 2)."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:  # no Linux
        return
    own = next((line[3:] for line in lines if line.startswith("0::")), "/")
    root = Path("/sys/fs/cgroup")
    folder = root / own.strip("/")
    for place in (folder, *folder.parents):
        if place.is_relative_to(root) and (place / name).is_file():
            yield (place / name).read_text().strip()


def _memory() -> Iterator[Finding]:
    lines = Path("/proc/meminfo").read_text().splitlines()
    known = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    total, free = known["MemTotal"], known["MemAvailable"]
    text = f"{human_bytes(total)}, {human_bytes(free)} available"
    limits = [int(limit) for limit in _cgroup("memory.max") if limit != "max"]
    if limits and min(limits) < total:
        text += f", limited to {human_bytes(min(limits))} (control group)"
        free = min(free, *limits)
    little = "; that is little: close other programs" if free < LITTLE_MEMORY else ""
    yield Finding(text + little, "note" if little else "ok")


def _gpus() -> Iterator[Finding]:
    import torch

    driver = _driver()
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for i in range(count):
        p = torch.cuda.get_device_properties(i)
        yield Finding(f"cuda:{i} {p.name}, {human_bytes(p.total_memory)}, driver {driver}, CUDA {torch.version.cuda}")
    if not count and driver:
        yield Finding(
            f"there is one (driver {driver}), but torch {torch.__version__} cannot use it; install torch for CUDA",
            "note",
        )
    elif not count:
        yield Finding("none that torch can use; runs are on the CPU", "note")


def _driver() -> str | None:
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        lines = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return lines[0] if lines else None


# --- places -----------------------------------------------------------------------------------------------


def _run_dir() -> Path:
    return Path(conf.load(conf.CONF / "config.yaml")["run_dir"]).expanduser().absolute()


def _disk() -> Iterator[Finding]:
    for what, folder in (("runs", _run_dir()), ("temporary files", Path(tempfile.gettempdir()))):
        existing = next(p for p in (folder, *folder.parents) if p.exists())
        free = shutil.disk_usage(existing).free
        text = f"{human_bytes(free)} free for {what} ({folder})"
        if free < NO_DISK:
            yield Finding(f"{text}; free some space, or use another disk", "problem")
        else:
            yield Finding(
                text + ("; that is little" if free < LITTLE_DISK else ""), "note" if free < LITTLE_DISK else "ok"
            )


def _writing() -> Iterator[Finding]:
    folder = _run_dir()
    existing = next(p for p in (folder, *folder.parents) if p.exists())
    try:
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=existing) as scratch:
            path = Path(scratch, "lock")
            path.write_bytes(bytes(1 << 16))
            path.replace(Path(scratch, "renamed"))
            yield Finding(f"{folder} can be written to")
            yield _locks(path)
    except OSError as exc:
        remedy = REMEDIES.get(exc.errno or 0, "check the disk")
        yield Finding(f"cannot write to {folder}: {exc.strerror or exc}; {remedy}, with run_dir=<folder>", "problem")


def _locks(path: Path) -> Finding:
    with path.open("w") as first, path.open("w") as second:
        try:
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            if exc.errno not in (errno.ENOLCK, errno.ENOTSUP):
                raise
            return Finding("no locks on this file system; never let two processes use one run directory", "note")
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return Finding("locks work there")
    return Finding("locks there do not keep others out; never let two processes use one run directory", "note")


def _data() -> Iterator[Finding]:
    from fedsim.datasets.images import Images
    from fedsim.plugins import instantiate

    ready, absent = list[str](), list[str]()
    for name, path in conf.options("data").items():
        node = {k: v for k, v in conf.load(path).items() if k not in conf.DATA}
        if "???" in node.values():  # the user names the set
            continue
        source = instantiate(node, "data")
        (absent if isinstance(source, Images) and not _is_here(source) else ready).append(name)
    yield Finding(f"ready without a network: {', '.join(ready)}")
    if absent:
        yield Finding(f"need the Hugging Face hub once, or data.root=<folder>: {', '.join(absent)}", "note")


def _is_here(source: Images) -> bool:
    """Whether a set of the hub was decoded before, or lies in the cache of Hugging Face's library."""
    from fedsim.datasets import cache

    if cache._path(source.path.rpartition("/")[2], source._key(None)).is_file():
        return True
    home = os.environ.get("HF_HOME") or f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/huggingface"
    folder = Path(os.environ.get("HF_DATASETS_CACHE") or f"{home}/datasets").expanduser()
    return (folder / source.path.replace("/", "___").lower() / (source.config or "default")).is_dir()


# --- speed ------------------------------------------------------------------------------------------------


def _speed() -> Iterator[Finding]:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as a worker has
    try:
        for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
            yield from _kernels(device)
        yield _local_steps()
    finally:
        torch.set_num_threads(threads)


def _kernels(device: str) -> Iterator[Finding]:
    import torch
    from torch import nn

    on, wait = ("one thread", _nothing) if device == "cpu" else ("GPU", torch.cuda.synchronize)
    n = 512 if device == "cpu" else 4096
    a, b = (torch.ones(n, n, device=device) for _ in range(2))
    yield _measured(lambda: a @ b, wait, lambda s: f"{2e-9 * n**3 / s:.3g} GFLOP/s, matrices of {n} x {n}, {on}")
    source = torch.ones(16 << 20, device=device)  # 64 MiB: larger than caches
    target = torch.empty_like(source)
    moved = 2 * 4 * source.numel()
    yield _measured(lambda: target.copy_(source), wait, lambda s: f"{1e-9 * moved / s:.3g} GB/s memory, {on}")
    net = nn.Sequential(nn.Conv2d(1, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16 * 144, 10)).to(
        device
    )
    x, y = torch.zeros(32, 1, 28, 28, device=device), torch.zeros(32, dtype=torch.long, device=device)

    def step() -> None:
        net.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()  # type: ignore[no-untyped-call]

    yield _measured(step, wait, lambda s: f"{1e3 * s:.3g} ms per step of a small CNN, 32 images of 28 x 28, {on}")
    one = torch.zeros(1, device=device)

    def many() -> None:
        for _ in range(1000):
            one.add_(1)

    yield _measured(many, wait, lambda s: f"{1e3 * s:.3g} µs to start a kernel, {on}")


def _local_steps() -> Finding:
    from fedsim.clients.local import Local
    from fedsim.clients.visit import Visit
    from fedsim.compose import compose
    from fedsim.engine.worker import lead
    from fedsim.experiment import build

    program = build(compose([])).program
    steps = 0

    def visit() -> None:
        nonlocal steps
        program.network.bind_buffers(program.network.initial_buffers.clone())
        local = Local(program, Visit(0, 1, "train", 1), lead({"w": program.network.initial.clone()}))
        local.train(local.start)
        steps = local.steps

    return _measured(
        visit, _nothing, lambda s: f"{steps / s:,.0f} local steps per second of the default model, one thread"
    )


def _nothing() -> None: ...


def _measured(work: Callable[[], Any], wait: Callable[[], Any], said: Callable[[float], str]) -> Finding:
    """The median time of some work, and how far the middle half of all times lies apart."""
    work()
    wait()
    times: list[float] = []
    end = time.perf_counter() + SECONDS
    while len(times) < 5 or time.perf_counter() < end:
        begin = time.perf_counter()
        work()
        wait()
        times.append(time.perf_counter() - begin)
    low, middle, high = statistics.quantiles(times, n=4)
    spread = (high - low) / 2 / middle
    busy = "; noisy: is something else running here?" if spread > NOISY else ""
    return Finding(f"{said(middle)} (± {100 * spread:.0f} %, {len(times)} times{busy})", "note" if busy else "ok")


CHECKS: tuple[tuple[str, Callable[[], Iterator[Finding]]], ...] = (
    ("software", _software),
    ("cores", _cores),
    ("memory", _memory),
    ("GPU", _gpus),
    ("disk", _disk),
    ("run_dir", _writing),
    ("data", _data),
    ("Ray", _ray),
    ("W&B", _wandb),
    ("speed", _speed),
)

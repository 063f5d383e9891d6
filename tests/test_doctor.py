"""``fedsim doctor``: the right line and the right exit status, also where something is broken."""

from __future__ import annotations

import errno
import fcntl
import io
import os
import re
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import wandb

from fedsim import doctor
from fedsim.config import DATA
from fedsim.errors import RunError
from tests.cli import Fedsim


@pytest.fixture(autouse=True)
def quick(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Short measurements, and nothing of this machine's user."""
    monkeypatch.setattr(doctor, "SECONDS", 0.001)
    for name in [n for n in os.environ if n.startswith(("WANDB", "RAY_", "HF_"))]:
        monkeypatch.delenv(name)
    home = tmp_path_factory.mktemp("home")
    for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "HF_HOME", "FEDSIM_CACHE"):
        monkeypatch.setenv(name, str(home))
    before = sys.exit, sys.excepthook
    yield
    wandb.teardown()
    sys.exit, sys.excepthook = before


def lines(name: str) -> list[str]:
    """What one check says, a line each."""
    (check,) = (c for n, c in doctor.CHECKS if n == name)
    return [f"{f.status} {f.text}" for f in doctor._findings(check)]


def only(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves one check."""
    monkeypatch.setattr(doctor, "CHECKS", tuple(c for c in doctor.CHECKS if c[0] == name))


def test_a_healthy_machine_is_status_0_and_nothing_is_left(fedsim: Fedsim, tmp_path: Path) -> None:
    outcome = fedsim("doctor")
    assert (outcome.status, outcome.err) == (0, ""), outcome.out
    assert os.listdir(tmp_path) == []
    seen = dict.fromkeys(line[9:20].strip() for line in outcome.out.splitlines() if line and line[8] == " ")
    assert {name for name, _ in doctor.CHECKS} <= set(seen)
    assert "fedsim can run here" in outcome.out
    assert re.search(r"GFLOP/s.*\(± \d+ %, \d+ times", outcome.out)


def test_arguments_are_refused(fedsim: Fedsim) -> None:
    outcome = fedsim("doctor", "seed=1")
    assert outcome.status == 2 and "takes no arguments, got 'seed=1'" in outcome.line


def test_a_full_disk_is_a_problem_and_status_1(fedsim: Fedsim, monkeypatch: pytest.MonkeyPatch) -> None:
    only("disk", monkeypatch)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 20))
    outcome = fedsim("doctor")
    assert outcome.status == 1
    assert re.search(r"2 problems here, the first is disk: 1\.0 MiB free for runs .*; free some space", outcome.line)
    assert outcome.out.count("\nproblem") == 1 and "can run here" not in outcome.out


def test_little_disk_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=500 << 20))
    assert all(line.startswith("note 500.0 MiB free") for line in lines("disk"))


def test_a_run_dir_that_cannot_be_made_is_a_problem(
    fedsim: Fedsim, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only("run_dir", monkeypatch)
    (tmp_path / "runs").write_text("a file")
    outcome = fedsim("doctor")
    assert outcome.status == 1 and f"run_dir: cannot write to {tmp_path / 'runs'}: Not a directory" in outcome.line


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_read_only_run_dir_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tmp_path.chmod(0o500)
    assert [line.split(":")[0] for line in lines("run_dir")] == [f"problem cannot write to {tmp_path / 'runs'}"]


def test_locks_are_tried_and_not_assumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert lines("run_dir")[1] == "ok locks work there"
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)  # a file system that only says that it locks
    assert lines("run_dir")[1].startswith("note locks there do not keep others out")

    def refuses(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuses)
    assert lines("run_dir")[1].startswith("note no locks on this file system")


def test_a_check_that_raises_is_a_problem_with_its_reason_and_the_others_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Iterator[doctor.Finding]:
        yield doctor.Finding("before")
        raise ZeroDivisionError("by\nnought")

    monkeypatch.setattr(doctor, "CHECKS", (("one", broken), ("two", lambda: iter([doctor.Finding("fine")]))))
    stream = io.StringIO()
    with pytest.raises(RunError, match=r"^1 problem here, the first is one: .*ZeroDivisionError: by nought"):
        doctor.doctor(stream)
    assert [line.split()[0] for line in stream.getvalue().splitlines()] == ["ok", "problem", "ok"]


def test_gpus_are_listed_or_their_absence_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "_driver", lambda: None)
    assert lines("GPU") == ["note none that torch can use; runs are on the CPU"]
    monkeypatch.setattr(doctor, "_driver", lambda: "555.1")
    (line,) = lines("GPU")
    assert line.startswith("note there is one (driver 555.1), but torch") and "install torch for CUDA" in line
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    properties = SimpleNamespace(name="Card", total_memory=3 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    assert [line.split(", CUDA")[0] for line in lines("GPU")] == [
        f"ok cuda:{i} Card, 3.0 GiB, driver 555.1" for i in (0, 1)
    ]


@pytest.mark.parametrize(
    ("environment", "line"),
    [
        ({}, r"note .*no credentials, so tracker=wandb writes offline files"),
        ({"WANDB_API_KEY": "a" * 40}, r"ok .*credentials were found"),
        ({"WANDB_API_KEY": "abc"}, r"problem the W&B credentials are wrong: .*40\+ characters, has 3"),
        ({"WANDB_MODE": "offline"}, r"note .*WANDB_MODE or W&B's settings say offline"),
        ({"WANDB_MODE": "bogus"}, r"problem W&B's settings are wrong.*WANDB_MODE=bogus"),
    ],
)
def test_what_w_and_b_finds(environment: dict[str, str], line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    (found,) = lines("W&B")
    assert re.match(line, found), found


def test_a_cluster_of_ray_is_asked_only_if_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda _: None)
    assert lines("Ray") == ["note not installed; runs happen in one process"]
    monkeypatch.setattr(doctor, "_version", lambda _: "9.9")
    assert lines("Ray") == ["ok 9.9"]
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", f"ray://{address}")
        (_, line) = lines("Ray")
        assert line.startswith(f"problem nothing answers at RAY_ADDRESS=ray://{address} (")
        server.listen()
        assert lines("Ray")[1] == f"ok something answers at RAY_ADDRESS=ray://{address}"


def test_data_is_ready_where_it_comes_with_fedsim_was_decoded_or_was_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedsim.compose import compose
    from fedsim.datasets import cache
    from fedsim.datasets.images import Images

    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path / "decoded"))
    ready, absent = lines("data")
    assert ready == "ok ready without a network: digits, synthetic" and absent.startswith("note need the")
    assert "images" not in absent  # its name is the user's to give
    (tmp_path / "datasets" / "uoft-cs___cifar10" / "plain_text").mkdir(parents=True)
    node = {k: v for k, v in compose(["data=mnist"])["data"].items() if k not in ("_target_", *DATA)}
    cache.write("mnist", Images(**node)._key(None), {"x": torch.zeros(1)}, {})
    ready, absent = lines("data")
    assert ready == "ok ready without a network: cifar10, digits, mnist, synthetic"
    assert "mnist" not in absent.replace("fashion_mnist", "").replace("femnist", "") and "cifar100" in absent


def test_control_groups_limit_cores_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    said = {"cpu.max": ["50000 100000", "max 100000"], "memory.max": ["max", str(512 << 20)]}
    monkeypatch.setattr(doctor, "_cgroup", lambda name: iter(said[name]))
    assert lines("cores")[0].startswith("note") and "limited to the time of 0.5 (control group)" in lines("cores")[0]
    (memory,) = lines("memory")
    assert memory.startswith("note") and "limited to 512.0 MiB (control group); that is little" in memory


def test_a_measurement_is_the_median_with_the_spread_of_the_middle_half(monkeypatch: pytest.MonkeyPatch) -> None:
    # Work of 1, 2, 3, 4 and 5 seconds: the median is 3, the quartiles 1.5 and 4.5 (of five values, by n + 1).
    durations = iter([9.0, 1.0, 2.0, 3.0, 4.0, 5.0])  # the first is not counted
    now = 0.0

    def work() -> None:
        nonlocal now
        now += next(durations)

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    found = doctor._measured(work, lambda: None, lambda s: f"{s:g} s")
    assert found.text == "3 s (± 50 %, 5 times; noisy: is something else running here?)" and found.status == "note"


def test_the_threads_of_torch_are_as_before() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    assert not [line for line in lines("speed") if line.startswith("problem")]
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)

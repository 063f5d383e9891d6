"""The run directory: files are whole or absent, and one process holds it at a time."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import torch

from fedsim.errors import ConfigError, RunError
from fedsim.rundir import RunDir, dumps, read_metrics, read_summary, replacing, write_atomic

NOW = datetime(2026, 1, 2, 3, 4, 5)


def make(tmp_path: Path) -> RunDir:
    run = RunDir.create(tmp_path, "a", "0123456789abcdef", NOW)
    run.config.write_text("seed: 1\n")
    return run


def test_directory_is_named_after_time_and_config(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "runs", "sweep/fedavg", "0123456789abcdef", NOW)
    assert run.path == tmp_path / "runs/sweep/fedavg/20260102-030405-01234567"
    assert run.checkpoints.is_dir()
    assert run.metrics == run.path / "metrics.jsonl"


def test_two_runs_within_a_second_get_two_directories(tmp_path: Path) -> None:
    paths = [RunDir.create(tmp_path, "a", "f" * 64, NOW).path.name for _ in range(3)]
    assert paths == ["20260102-030405-ffffffff", "20260102-030405-ffffffff-2", "20260102-030405-ffffffff-3"]


@pytest.mark.parametrize("name", ["", "/abs", "../up", "a/../../b", "."])
def test_a_name_that_leaves_the_root_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="`name` must be a relative path"):
        RunDir.create(tmp_path, name, "0" * 64)


def test_a_root_that_is_a_file_is_refused_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot make a run directory in .*file/a.*put the run elsewhere"):
        RunDir.create(tmp_path / "file", "a", "0" * 64)


def test_open_wants_a_run_directory(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is not a run directory: it has no config\.yaml"):
        RunDir.open(tmp_path)
    with pytest.raises(ConfigError, match="is not a directory"):
        RunDir.open(tmp_path / "missing")
    run = make(tmp_path)
    assert RunDir.open(str(run.path)) == run


def test_write_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomic(path, "ä")
    write_atomic(path, b"\x00\x01")
    assert path.read_bytes() == b"\x00\x01"
    assert os.listdir(tmp_path) == ["file"]
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask  # readable like any other file, not 0600


def test_an_error_in_the_middle_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomic(path, "old")
    with pytest.raises(KeyError), replacing(path) as temporary:
        temporary.write_text("ha")
        raise KeyError
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("code, remedy", [(errno.ENOSPC, "free some space"), (errno.EACCES, "check who owns")])
def test_a_disk_that_refuses_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, remedy: str
) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def refuse(_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(RunError) as caught:
        write_atomic(path, "new")
    message = str(caught.value)
    assert str(path) in message and remedy in message and "\n" not in message
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_folder_that_is_gone_is_said(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"cannot write .*the folder is gone"):
        write_atomic(tmp_path / "gone" / "file", "x")


def test_json_has_no_nan_and_keeps_the_order() -> None:
    record = {"round": 3, "b": float("nan"), "a": [float("inf"), 1.5], "n": np.float32(0.5), "t": torch.tensor(7)}
    assert dumps(record) == '{"round": 3, "b": null, "a": [null, 1.5], "n": 0.5, "t": 7}'


def test_json_refuses_what_is_no_number_and_names_it() -> None:
    with pytest.raises(TypeError, match=r"`final\.loss` must be a number.*got Tensor"):
        dumps({"final": {"loss": torch.zeros(3)}})


def test_metrics_survive_a_torn_last_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"round": 1, "x": 0.5}\n{"round": 2, "x": nu')
    assert read_metrics(path) == [{"round": 1, "x": 0.5}]
    path.write_bytes(b'{"round": 1}\n\x00\x00\xff')
    assert read_metrics(tmp_path) == [{"round": 1}]
    path.write_text("")
    assert read_metrics(path) == []


@pytest.mark.parametrize("line", ["{", "[1]", '{"x": 1}', ""])
def test_damage_before_the_last_line_is_refused_with_its_place(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"round": 1}\n' + line + '\n{"round": 3}\n')
    with pytest.raises(ConfigError, match=r"metrics\.jsonl:2: damaged line"):
        read_metrics(path)


def test_reading_what_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"metrics\.jsonl does not exist"):
        read_metrics(tmp_path / "metrics.jsonl")
    with pytest.raises(ConfigError, match=r"summary\.json does not exist"):
        read_summary(tmp_path / "summary.json")


def test_summary_comes_back_and_damage_is_said(tmp_path: Path) -> None:
    run = make(tmp_path)
    run.write_summary({"final": {"test_loss": float("nan")}, "rounds": 3})
    assert read_summary(run.path) == {"final": {"test_loss": None}, "rounds": 3}
    for text in ("{", "[]"):
        run.summary.write_text(text)
        with pytest.raises(ConfigError, match=r"summary\.json is damaged"):
            read_summary(run.path)


def test_a_second_process_is_told_who_holds_the_directory(tmp_path: Path) -> None:
    run = make(tmp_path)
    # The child needs the kernel's lock only; importing nothing of ours keeps this quick.
    code = (
        "import fcntl, os, sys; f = open(sys.argv[1], 'a+'); fcntl.flock(f, fcntl.LOCK_EX); "
        "f.write(f'process {os.getpid()} on there'); f.flush(); print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(run.path / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match=f"is in use by process {child.pid} on there"), run.lock():
            pass
        child.kill()
    with run.lock():  # a killed holder lets go
        assert f"process {os.getpid()} on " in (run.path / ".lock").read_text()
        with pytest.raises(ConfigError, match=f"is in use by process {os.getpid()} on "), run.lock():
            pass
    with run.lock():
        pass


def test_the_holder_removes_what_a_killed_writer_left(tmp_path: Path) -> None:
    run = make(tmp_path)
    leftovers = [run.path / ".summary.json.1-ab.tmp", run.checkpoints / ".last.1-cd.tmp"]
    for path in leftovers:
        path.write_text("half")
    with run.lock():
        assert not any(path.exists() for path in leftovers)
    assert run.config.exists()


def test_a_reader_never_sees_half_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomic(path, json.dumps([0] * 1000))
    with path.open() as reader:  # opened before the replacement: still the whole old file
        write_atomic(path, json.dumps([1] * 1000))
        assert json.load(reader) == [0] * 1000
    assert json.loads(path.read_text()) == [1] * 1000

"""What trackers write, and when."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from fedsim.errors import ConfigError, RunError
from fedsim.rundir import read_metrics
from fedsim.tracking import RunInfo, Status, Trackers
from fedsim.tracking.console import Console
from fedsim.tracking.jsonl import Jsonl


class Clock:
    """Time that moves only when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def record(number: int, **more: Any) -> dict[str, Any]:
    return {"round": number, "clients": 10, "failures": 0, "train_loss": 0.5, **more}


# jsonl


def test_every_round_is_a_line_at_once(tmp_path: Path) -> None:
    tracker = Jsonl()
    tracker.start(RunInfo(tmp_path, rounds=2))
    tracker.log(record(1, test_loss=float("nan")))
    assert (tmp_path / "metrics.jsonl").read_text() == (
        '{"round": 1, "clients": 10, "failures": 0, "train_loss": 0.5, "test_loss": null}\n'
    )
    tracker.log(record(2))
    assert [r["round"] for r in read_metrics(tmp_path)] == [1, 2]
    tracker.finish({}, "finished")


def test_resume_keeps_the_checkpoint_s_rounds_and_drops_later_and_torn_ones(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(record(n)) + "\n" for n in range(1, 6)) + '{"round": 6, "cl')
    tracker = Jsonl()
    tracker.start(RunInfo(tmp_path, rounds=9, keep_rounds=3))
    tracker.log(record(4, again=True))
    tracker.finish({}, "finished")
    assert read_metrics(path) == [record(1), record(2), record(3), record(4, again=True)]


def test_a_new_run_starts_with_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record(1)) + "\n")
    tracker = Jsonl()
    tracker.start(RunInfo(tmp_path, rounds=1))
    assert (tmp_path / "metrics.jsonl").read_text() == ""
    tracker.finish({}, "failed")


def test_lines_lost_before_the_checkpoint_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record(1)) + "\n")
    tracker = Jsonl()
    tracker.start(RunInfo(tmp_path, rounds=9, keep_rounds=3))
    tracker.finish({}, "finished")
    assert "ends with round 1, but the checkpoint holds 3 rounds" in caplog.text


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_ends_the_run_with_a_remedy(tmp_path: Path) -> None:
    tracker = Jsonl()
    tracker.start(RunInfo(tmp_path, rounds=9))
    assert tracker._file is not None
    tracker._file.close()
    tracker._file._file = Path("/dev/full").open("ab", buffering=0)  # noqa: SIM115 - the tracker closes it
    with pytest.raises(RunError, match=r"cannot write to .*metrics.jsonl: No space left.*fedsim resume="):
        tracker.log(record(1))
    tracker.finish({}, "failed")


# several


class Probe:
    """Writes down what it is told; may break."""

    def __init__(self, heard: list[str], name: str, breaks: str = "") -> None:
        self.heard, self.name, self.breaks = heard, name, breaks

    def _hear(self, what: str) -> None:
        self.heard.append(f"{self.name}:{what}")
        if what == self.breaks:
            raise OSError(f"{self.name} broke")

    def start(self, run: RunInfo) -> None:
        self._hear("start")

    def log(self, record: Mapping[str, Any]) -> None:
        self._hear("log")

    def finish(self, summary: Mapping[str, Any], status: Status) -> None:
        self._hear("finish")


def test_finish_reaches_all_once_even_when_one_breaks(tmp_path: Path) -> None:
    heard: list[str] = []
    trackers = Trackers([Probe(heard, "a"), Probe(heard, "b", breaks="finish")])
    trackers.start(RunInfo(tmp_path, rounds=1))
    trackers.log(record(1))
    with pytest.raises(OSError, match="b broke"):
        trackers.finish({}, "finished")
    trackers.finish({}, "failed")
    assert heard == ["a:start", "b:start", "a:log", "b:log", "b:finish", "a:finish"]


def test_only_what_was_started_is_finished(tmp_path: Path) -> None:
    heard: list[str] = []
    trackers = Trackers([Probe(heard, "a"), Probe(heard, "b", breaks="start"), Probe(heard, "c")])
    with pytest.raises(OSError, match="b broke"):
        trackers.start(RunInfo(tmp_path, rounds=1))
    trackers.finish({}, "failed")
    assert heard == ["a:start", "b:start", "a:finish"]


# console

SUMMARY = {
    "final": {"round": 40, "test_accuracy": 0.925, "test_loss": 0.25},
    "best": {"by": "test_accuracy", "round": 38, "test_accuracy": 0.93, "test_loss": 0.24},
    "rounds": 40,
    "totals": {
        "bytes_down": 1536,
        "bytes_up": 3 * 1024**2,
        "virtual_seconds": 3725.0,
        "wall_seconds": 12.34,
        "clients": 4000,
        "steps": 9,
    },
    "params_sha256": "ab" * 32,
    "state_sha256": "cd" * 32,
}


def run_console(
    tmp_path: Path, rounds: int, every: int, seconds: float, keep: int = 0, style: str = "plain"
) -> tuple[list[str], str]:
    stream, clock = io.StringIO(), Clock()
    console = Console(style=style, stream=stream, clock=clock)  # type: ignore[arg-type]
    console.start(RunInfo(tmp_path, rounds, {"strategy": "FedAvg", "data": "digits"}, keep_rounds=keep))
    for number in range(keep + 1, rounds + 1):
        clock.now += seconds
        evaluated = {"test_loss": 0.25, "test_accuracy": 0.925} if number % every == 0 else {}
        console.log(record(number, **evaluated))
    console.finish(SUMMARY, "finished")
    text = stream.getvalue()
    return [line.split("  train")[0] for line in text.splitlines() if "  train" in line], text


def test_a_short_run_has_a_line_per_round(tmp_path: Path) -> None:
    lines, text = run_console(tmp_path, rounds=5, every=1, seconds=0.5)
    assert lines == [f"round {n}/5" for n in range(1, 6)]
    # 10 clients each half a second.
    assert "round 1/5  train loss 0.5000  test loss 0.2500  accuracy 92.50 %  20 clients/s" in text


def test_a_long_quick_run_has_about_twenty_lines(tmp_path: Path) -> None:
    lines, _ = run_console(tmp_path, rounds=1000, every=10, seconds=0.001)
    # A line at round 1, then the first evaluation at least 1000 / 20 rounds after the last line: 60, 110, 160, ...
    assert lines == ["round    1/1000", *(f"round {n:>4}/1000" for n in range(60, 1000, 50)), "round 1000/1000"]


def test_without_evaluations_lines_still_come(tmp_path: Path) -> None:
    lines, _ = run_console(tmp_path, rounds=100, every=1000, seconds=0.001)
    assert lines == ["round   1/100", *(f"round {n:>3}/100" for n in range(11, 100, 10)), "round 100/100"]


def test_a_slow_run_is_never_silent_for_long(tmp_path: Path) -> None:
    lines, _ = run_console(tmp_path, rounds=1000, every=1000, seconds=4.0)
    numbers = [int(line.split()[1].split("/")[0]) for line in lines]
    assert max(b - a for a, b in pairwise(numbers)) == 3  # 12 s: the first to end after 10 s


def test_a_resumed_run_says_so_and_goes_on_counting(tmp_path: Path) -> None:
    lines, text = run_console(tmp_path, rounds=5, every=1, seconds=0.5, keep=3)
    assert lines == ["round 4/5", "round 5/5"]
    assert "resumed after round 3 of 5" in text


def test_header_and_table_hold_what_was_run_and_found(tmp_path: Path) -> None:
    _, text = run_console(tmp_path, rounds=3, every=1, seconds=0.5)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    for expected in (
        "strategy FedAvg",
        "data digits",
        "final test accuracy 92.50 % loss 0.2500",
        "best test accuracy 93.00 % loss 0.2400 (round 38, by test_accuracy)",
        "rounds 40",
        "clients trained 4,000",
        "virtual time 1:02:05",
        "wall time 12.3 s",
        "sent 1.5 KiB down 3.0 MiB up",
        "params_sha256 " + "ab" * 32,
        "state_sha256 " + "cd" * 32,
        f"run directory {tmp_path}",
    ):
        assert expected in lines


@pytest.mark.parametrize("status", ["interrupted", "failed"])
def test_an_unfinished_run_says_where_it_stopped(tmp_path: Path, status: Status) -> None:
    stream, clock = io.StringIO(), Clock()
    console = Console(style="plain", stream=stream, clock=clock)
    console.start(RunInfo(tmp_path, rounds=100))
    for number in range(1, 4):
        console.log(record(number))
    console.finish({}, status)
    lines = stream.getvalue().splitlines()
    assert lines[-2].startswith("round   3/100")  # the last round is always shown
    assert lines[-1] == f"{status} after round 3 of 100; run directory {tmp_path}"


def test_failures_and_nan_are_shown(tmp_path: Path) -> None:
    stream = io.StringIO()
    console = Console(style="plain", stream=stream, clock=Clock())
    console.start(RunInfo(tmp_path, rounds=1))
    console.log(record(1, failures=2, test_loss=float("nan"), test_accuracy=None))
    console.finish({}, "finished")
    assert "test loss nan  accuracy nan  2 failed" in stream.getvalue()


def test_the_bar_reaches_the_end_and_leaves_the_terminal_in_order(tmp_path: Path) -> None:
    _, text = run_console(tmp_path, rounds=7, every=1, seconds=0.5, style="bar")
    assert "7/7" in text
    assert "final test" in text


def test_options_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"tracker\.console\.style must be auto, bar or plain, got 'loud'"):
        Console(style="loud")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"tracker\.console\.interval_s must be > 0, got 0"):
        Console(interval_s=0)


def test_config_group_takes_several_trackers() -> None:
    from hydra import compose, initialize_config_module

    with initialize_config_module("fedsim.conf", version_base="1.3"):
        config = compose(overrides=["+tracker=[console,jsonl]"])
    assert config.tracker.console._target_ == "fedsim.tracking.console.Console"
    assert config.tracker.jsonl._target_ == "fedsim.tracking.jsonl.Jsonl"

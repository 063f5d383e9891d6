"""Fixtures of several test files."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedsim.cli import main
from tests.cli import Fedsim, Outcome


@pytest.fixture
def fedsim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Fedsim]:
    """Runs a command in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FEDSIM_TRACEBACK", raising=False)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def run(*args: str) -> Outcome:
        with pytest.raises(SystemExit) as caught:
            main(args)
        captured = capsys.readouterr()
        return Outcome(int(caught.value.code or 0), captured.out, captured.err)

    yield run
    for number, handler in before.items():
        signal.signal(number, handler)

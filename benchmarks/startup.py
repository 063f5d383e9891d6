"""From the start of the process to what a user waits for.

    python -m benchmarks.startup [--repeats 5]

Times ``fedsim --help``, and the default run up to its first finished round, each in a new process; torch's own import
beside it.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time


def until(command: list[str], line_start: str | None) -> float:
    """Seconds until the process prints a line that begins so, or ends (None)."""
    begin = time.perf_counter()
    with subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        seconds = None
        for line in process.stdout:
            if line_start is not None and seconds is None and line.startswith(line_start):
                seconds = time.perf_counter() - begin
        process.wait()
    return time.perf_counter() - begin if seconds is None else seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = ["-m", "fedsim.cli", f"run_dir={folder}", "rounds=2", "tracker.console.style=plain"]
        rows = {
            "fedsim --help": (["-m", "fedsim.cli", "--help"], None),
            "import torch": (["-c", "import torch"], None),
            "first round": (run, "round 1/"),
        }
        for name, (command, line) in rows.items():
            seconds = [until(command, line) for _ in range(options.repeats)]
            print(f"{name:14} median {statistics.median(seconds):.2f} s, worst {max(seconds):.2f} s", flush=True)


if __name__ == "__main__":
    main()

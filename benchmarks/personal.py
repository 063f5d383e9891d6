"""Personal models on disk: what a round and a checkpoint cost when every client keeps a network of its own.

    python -m benchmarks.personal [--clients 500] [--cohort 10] [--rounds 4] [--model resnet18_gn] [--folder DIR]

Local training of one step a visit (strategy ``local``; 8x8 digits, so that the network is the cost), memory on disk.
Rounds of a cohort come first; then one visit of every client, so that all have a model; then rounds of a cohort again.
Prints of each round its time, the highest memory of the process in it, and of the checkpoint after it the time, the
bytes written, and what would have changed at least: the cohort's own models. At the end, what a restore takes.
All models together must fit on the disk twice.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

from fedsim import rounds
from fedsim.checkpoint import Checkpoints
from fedsim.compose import compose
from fedsim.experiment import build
from fedsim.federation import Federation
from fedsim.memory import Memory
from fedsim.report.text import align, human_bytes
from fedsim.run import _engine


def _highest(reset: bool = False) -> int:
    """The most main memory that this process has had since it was reset, in bytes; where the kernel cannot say that,
    since its start."""
    clear, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if reset and clear.exists():
        clear.write_text("5")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return 1024 * int(lines["VmHWM"].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(clients: int, cohort: int, count: int, model: str, folder: Path) -> list[list[str]]:
    """The rows of the table; the last number of a row is the bytes that a checkpoint wrote."""
    data = ["data=digits", "partition=iid", f"partition.num_clients={clients}", "partition.holdout=0"]
    client = ["client.epochs=null", "client.steps=1", "client.batch_size=4", "client.lr=0.01"]
    part = ["participation=fixed", f"participation.clients_per_round={cohort}"]
    stem = ["model.stem=cifar"] if model.startswith("resnet") else []  # for images this small
    exp = build(compose(["strategy=local", f"model={model}", *stem, *data, *client, *part]))
    each = 4 * exp.program.layout.d
    table = [["round", "clients", "seconds", "highest memory", "checkpoint s", "written", "changed models"]]
    with _engine(exp) as engine:
        memory = Memory(folder / "memory", on_disk=True)
        fed, saved = Federation(exp.program, engine, exp.participation, exp.system, memory), Checkpoints(folder, memory)
        state = rounds.first(fed, exp.info)
        calls = [*[None] * count, list(range(clients)), *[None] * count]
        for number, who in enumerate(calls, start=1):
            _highest(reset=True)
            before = {p: p.stat().st_size for p in folder.rglob("*") if p.is_file()}
            begin = time.perf_counter()
            if who is None:
                state = rounds.following(fed, state, number)
            else:
                fed.begin_round(number)
                fed.train(who, state)
            trained = time.perf_counter()
            saved.save(number, {"state": state, "federation": fed.state()})
            end = time.perf_counter()
            written = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and p not in before)
            visits = len(who or fed.done.who)
            times = f"{trained - begin:.1f}", human_bytes(_highest()), f"{end - trained:.2f}"
            table.append([str(number), str(visits), *times, human_bytes(written), human_bytes(visits * each)])
            print(*table[-1], flush=True)
        begin, latest = time.perf_counter(), saved.load()
        assert latest is not None
        print(f"restored {len(memory)} clients in {time.perf_counter() - begin:.1f} s")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description="Personal models on disk.")
    parser.add_argument("--clients", type=int, default=500)
    parser.add_argument("--cohort", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=4, help="rounds of a cohort before and after the one of all")
    parser.add_argument("--model", default="resnet18_gn")
    parser.add_argument("--folder", type=Path, help="where models are kept meanwhile; default: a temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        table = measure(options.clients, options.cohort, options.rounds, options.model, Path(folder))
    print(align(table))


if __name__ == "__main__":
    main()

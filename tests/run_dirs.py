"""Run directories written by hand, so that what is read of them can be worked out by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedsim.visits import HEADER, LEAST

AVG = "strategy: {_target_: fedsim.strategies.fedavg.FedAvg, server_lr: 1.0}"
PROX = "strategy: {_target_: fedsim.strategies.fedprox.FedProx, server_lr: 1.0, mu: %s}"
DATA = "data: {_target_: fedsim.datasets.digits.Digits, root: null, validation: 0.0}"

#: Client, begin and end in seconds, steps, outcome.
Visit = tuple[int, float, float, int, str]


def make_run(
    path: Path,
    seed: int,
    accuracy: float | None = 0.5,
    config: str = AVG,
    records: Sequence[Mapping[str, Any]] | None = None,
    **summary: Any,
) -> Path:
    """A finished run of five rounds, of ``records`` where they are given."""
    path.mkdir(parents=True)
    strategy = "" if "strategy:" in config else "strategy: {}\n"
    (path / "config.yaml").write_text(
        f"seed: {seed}\nrounds: 5\nname: {path.name}\nrun_dir: {path}\n{strategy}{config}\n"
    )
    (path / ".lock").write_text("process 1 on test\n")
    content = {
        "final": {"test_accuracy": accuracy, "test_loss": 0.5},
        "best": {"by": "test_accuracy", "round": 4, "test_accuracy": 0.75, "test_loss": 0.5},
        "rounds": records[-1]["round"] if records else 5,
        "totals": {"bytes_down": 2048, "bytes_up": 1024, "wall_seconds": 2.0 * seed},
        "status": "finished",
        **summary,
    }
    (path / "summary.json").write_text(json.dumps(content))
    if records is not None:
        (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def rounds(accuracies: Sequence[float | None], **more: Any) -> list[dict[str, Any]]:
    """Records of rounds that send 1,000 bytes down and 500 up, take 2 virtual seconds and 1 second each."""
    return [
        {"round": n, "bytes_down": 1000, "bytes_up": 500, "clients": 3, "failures": 0, "train_loss": 2.0 / n}
        | {"virtual_seconds": 2.0 * n, "wall_seconds": 1.0 * n}
        | ({} if a is None else {"test_accuracy": a, "test_loss": 1.0 - a})
        | more
        for n, a in enumerate(accuracies, start=1)
    ]


def fill(path: Path) -> Path:
    """Adds what else a run of four clients and two classes leaves."""
    (path / "clients.csv").write_text(
        "client,num_train,num_heldout,accuracy,loss\n0,9,2,0.5,0.7\n1,18,2,1.0,0.1\n2,9,0,,\n3,4,1,0.0,2.5\n"
    )
    (path / "classes.csv").write_text(
        "class,name,num_train,num_test,accuracy,precision,f1\n0,cat,1234,10,0.7831,0.5,0.61\n1,<b>dog,10,0,nan,nan,nan\n"
    )
    np.savez(path / "partition.npz", offsets=np.array([0, 10, 30, 40, 45]), indices=np.arange(45))
    return path


def visit_line(visit: Visit, columns: int = LEAST + 3) -> str:
    """A line of ``visits.csv``, of which an older file has fewer columns."""
    client, begin, end, steps, outcome = visit
    cells = [1, client, "train", 1, steps, steps, 0.5, 10, 10, "ab", "cd", 1, int(begin * 1e9), int(end * 1e9), outcome]
    return ",".join(map(str, cells[:columns])) + "\n"


def timed_run(
    path: Path,
    visits: Sequence[Visit],
    models: Sequence[float],
    staleness: Sequence[Mapping[str, int]] = (),
    seed: int = 1,
    config: str = AVG,
) -> Path:
    """A run whose global models were made at these times, in seconds."""
    records: list[dict[str, Any]] = [
        {"round": n, "virtual_seconds": at, "clients": 1, "test_accuracy": 0.5, "bytes_down": 1, "bytes_up": 1}
        for n, at in enumerate(models, start=1)
    ]
    for record, table in zip(records, staleness, strict=False):
        record["staleness"] = table
    make_run(path, seed, config=f"{config}\n{DATA}", records=records)
    (path / "visits.csv").write_text(HEADER + "".join(map(visit_line, visits)))
    return path

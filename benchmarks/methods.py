"""Chooses each method's learning rate and main parameter, for the comparison ``methods_fashion_mnist``.

    python -m benchmarks.methods grid runs/grid [method ...] [data.root=<folder>]
    python -m benchmarks.methods choose runs/grid [method ...] [data.root=<folder>]

``grid`` runs a sweep per method, on one seed and one alpha; ``choose`` prints what came out, and writes the best
settings as presets, conf/experiment/methods_fashion_mnist_<method>.yaml.

Every method has the same three learning rates, and two values of one parameter of its own. A setting is judged by the
mean validation accuracy of the evaluations in its last ten rounds; of equals the first one is taken. It must also
finish at the comparison's other alpha, or the next one is taken. The seed is not one of the comparison's.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
PRESET = "methods_fashion_mnist"
LRS = (0.03, 0.1, 0.3)
LAST = 10  # rounds
SEED, ALPHA, OTHER_ALPHA, ROUNDS = 100, 0.1, 0.6, 30
# The values of each method's main parameter, and what else is fixed.
GRID: dict[str, tuple[str | None, tuple[float, ...]]] = {
    "fedavg": (None, ()),
    "fedprox": ("mu", (0.01, 0.1)),
    "scaffold": ("server_lr", (1.0, 0.5)),
    "feddyn": ("alpha", (0.1, 0.01)),
    "fedcm": ("alpha", (0.1, 0.3)),
    "fedsam": ("rho", (0.1, 0.02)),
    "mofedsam": ("rho", (0.1, 0.02)),
    "fedgamma": ("rho", (0.1, 0.02)),
    "fedsmoo": ("alpha", (0.1, 0.01)),
    "fedspeed": ("mu", (0.1, 0.01)),
    "fedld": ("lam", (0.1, 0.03)),
    "fedlex": ("beta", (0.9, 0.0)),
}
# FedLEx: a fifth of the clients explores, for 20 epochs at most. FedSpeed: the bound of all methods, not its own.
FIXED: dict[str, dict[str, Any]] = {
    "fedlex": {"explorers": 0.2, "explore_epochs": 20, "patience": 5},
    "fedspeed": {"clip": "none"},
}


def grid(folder: Path, methods: list[str], options: list[str]) -> None:
    """Runs the sweeps of some methods (none: of all), one after another."""
    for method in methods or GRID:
        parameter, values = GRID[method]
        swept = [f"strategy.{parameter}={','.join(map(str, values))}"] if parameter else []
        rates = f"client.lr={','.join(map(str, LRS))}"
        # A setting that diverges ends with an error; the others go on.
        status = _fedsim(method, folder, "-m", f"partition.alpha={ALPHA}", rates, *swept, f"name={method}", *options)
        print(f"{method}: status {status}", flush=True)


def _fedsim(method: str, folder: Path, *options: str) -> int:
    fixed = [f"strategy.{k}={v}" for k, v in FIXED.get(method, {}).items()]
    setting = [f"experiment={PRESET}", f"strategy={method}", f"seed={SEED}", f"rounds={ROUNDS}", "data.max_test=500"]
    command = [sys.executable, "-m", "fedsim.cli", *setting, *fixed, f"run_dir={folder}", "tracker=jsonl", *options]
    return subprocess.run(command, check=False).returncode


def choose(folder: Path, methods: list[str], options: list[str]) -> None:
    """Prints every setting, and writes the best one of each method that also finishes at the other alpha."""
    for method in methods or GRID:
        parameter = GRID[method][0]
        found: list[tuple[float, float, float | None]] = []
        for run in sorted((folder / method).iterdir()):
            config = yaml.safe_load((run / "config.yaml").read_text())
            records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            score = _score(records)
            value = config["strategy"][parameter] if parameter else None
            found.append((score, config["client"]["lr"], value))
        grid_order = list(GRID[method][1])
        found.sort(key=lambda f: (-f[0], LRS.index(f[1]), grid_order.index(f[2]) if f[2] is not None else 0))
        for score, lr, value in found:
            own = "" if parameter is None else f"  {parameter}={value}"
            print(f"{method:10} {100 * score:6.2f} %  lr={lr}{own}", flush=True)
        for _, lr, value in found:
            own = "" if parameter is None else f"strategy.{parameter}={value}"
            where = f"partition.alpha={OTHER_ALPHA}", f"name={method}-{OTHER_ALPHA}"
            if _fedsim(method, folder, *where, f"client.lr={lr}", *filter(None, [own]), *options) == 0:
                print(f"{method}: lr={lr} {own}", flush=True)
                _write(method, parameter, lr, value)
                break
            print(f"{method}: lr={lr} {own} does not finish at alpha {OTHER_ALPHA}", flush=True)


def _score(records: list[dict[str, Any]]) -> float:
    """Mean validation accuracy of the last rounds; 0 for a run that broke off."""
    if not records or records[-1]["round"] < ROUNDS:
        return 0.0
    late = [r["validation_accuracy"] for r in records if r["round"] > ROUNDS - LAST and "validation_accuracy" in r]
    return statistics.fmean(late)


def _write(method: str, parameter: str | None, lr: float, value: float | None) -> None:
    own = {**({parameter: value} if parameter else {}), **FIXED.get(method, {})}
    lines = [
        "# @package _global_",
        f"# {method} in the comparison {PRESET}, with what the grid chose (docs/comparison.md).",
        f"#   fedsim experiment={PRESET}_{method}",
        "defaults:",
        f"  - {PRESET}",
        f"  - override /strategy: {method}",
        "client:",
        f"  lr: {lr}",
        *(["strategy:", *(f"  {k}: {v}" for k, v in own.items())] if own else []),
    ]
    (ROOT / f"conf/experiment/{PRESET}_{method}.yaml").write_text("\n".join(lines) + "\n")


def main() -> None:
    """``grid <folder> [method ...] [key=value ...]``, and then ``choose`` with the same."""
    if len(sys.argv) < 3 or sys.argv[1] not in ("grid", "choose"):
        sys.exit(__doc__)
    folder, words = Path(sys.argv[2]), sys.argv[3:]
    stage = grid if sys.argv[1] == "grid" else choose
    stage(folder, [word for word in words if "=" not in word], [word for word in words if "=" in word])


if __name__ == "__main__":
    main()

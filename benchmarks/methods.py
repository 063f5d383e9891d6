"""Chooses each method's learning rate and main parameter, for the comparisons of docs/comparison.md.

    python -m benchmarks.methods grid <comparison> runs/grid [method ...] [data.root=<folder>]
    python -m benchmarks.methods choose <comparison> runs/grid [method ...] [data.root=<folder>]

``grid`` runs a sweep per method, in one setting and on one seed, which is none of the comparison's; ``choose`` prints
what came out, and writes the best values as presets, conf/experiment/<comparison>_<method>.yaml.

Every method has the same three learning rates, and some have two values of one parameter of their own. A setting must
also finish where the comparison has another (``other``), or the next one is taken; of equals the first one is.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
SEED = 100


@dataclass(frozen=True)
class Comparison:
    """How the settings of a comparison are chosen.

    Attributes:
        setting: Overrides of the preset for the grid.
        other: Overrides under which the chosen setting must finish, too; None: there is no other.
        score: What settings are judged by, from a finished run's records and summary.
        rates: Values of ``client.lr``.
        methods: Name and values of each method's main parameter; None: it has none.
        fixed: What else is set for a method.
    """

    setting: tuple[str, ...]
    other: tuple[str, ...] | None
    score: Callable[[list[dict[str, Any]], dict[str, Any]], float]
    rates: tuple[float, ...]
    methods: Mapping[str, tuple[str, tuple[float, ...]] | None]
    fixed: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def _late_validation(records: list[dict[str, Any]], summary: dict[str, Any]) -> float:
    """Mean validation accuracy of the evaluations in the last ten rounds."""
    last = records[-1]["round"]
    return statistics.fmean(
        r["validation_accuracy"] for r in records if r["round"] > last - 10 and "validation_accuracy" in r
    )


def _all_the_way(records: list[dict[str, Any]], summary: dict[str, Any]) -> float:
    """Mean validation accuracy of all evaluations, which are spread over virtual time: speed counts, too."""
    return statistics.fmean(r["validation_accuracy"] for r in records if "validation_accuracy" in r)


def _asynchronous(validation: float) -> Comparison:
    return Comparison(
        setting=(f"data.validation={validation}",),
        other=None,
        score=_all_the_way,
        rates=(0.0003, 0.001, 0.003),
        methods={
            "fedavg": None,
            "fedasync": ("alpha", (0.6, 0.3)),
            "fedbuff": ("server_lr", (1.0, 0.5)),
            "fedcompass": ("alpha", (0.9, 0.5)),
        },
        # FedCompass: the ratio of its own defaults. FedBuff: the buffer of the official comparison.
        fixed={"fedcompass": {"q_min": 5, "q_max": 25}, "fedbuff": {"buffer_size": 3}},
    )


COMPARISONS = {
    "asynchronous_digits": _asynchronous(0.2),
    "asynchronous_fashion_mnist": _asynchronous(0.1),
    "methods_fashion_mnist": Comparison(
        setting=("rounds=30", "partition.alpha=0.1", "data.max_test=500"),
        other=("partition.alpha=0.6",),
        score=_late_validation,
        rates=(0.03, 0.1, 0.3),
        methods={
            "fedavg": None,
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
        },
        # FedLEx: a fifth of the clients explores, 20 epochs at most. FedSpeed: the bound of all methods, not its own.
        fixed={
            "fedlex": {"explorers": 0.2, "explore_epochs": 20, "patience": 5},
            "fedspeed": {"clip": "none"},
        },
    ),
    "longtail_fashion_mnist": Comparison(
        setting=("data.imbalance=100", "data.max_test=500"),
        other=None,
        score=lambda records, summary: float(summary["final"]["validation_accuracy"]),
        rates=(0.03, 0.1, 0.3),
        methods={
            "fedavg": None,
            "fedprox": None,
            "fedetf": None,
            "fedrep": None,
            "ditto": None,
            "fedloge": ("tau", (0.1, 1.0)),
        },
    ),
    "personal_fashion_mnist": Comparison(
        setting=(),
        other=None,
        score=lambda records, summary: float(summary["final"]["personal_accuracy_mean"]),
        rates=(0.003, 0.01, 0.03),
        methods={
            "local": None,
            "fedavg_ft": None,
            "fedper": None,
            "ditto": None,
            "fedd2s": ("lam_l", (0.3, 1.0)),
        },
        fixed={"fedavg_ft": {"finetune_epochs": 3}, "fedd2s": {"stage_rounds": 12, "server_epochs": 5}},
    ),
}


def grid(name: str, folder: Path, methods: list[str], options: list[str]) -> None:
    """Runs the sweeps of some methods (none: of all), one after another."""
    plan = COMPARISONS[name]
    for method in methods or plan.methods:
        parameter = plan.methods[method]
        swept = [f"strategy.{parameter[0]}={','.join(map(str, parameter[1]))}"] if parameter else []
        rates = f"client.lr={','.join(map(str, plan.rates))}"
        # A setting that diverges ends with an error; the others go on.
        status = _fedsim(name, method, folder, "-m", *plan.setting, rates, *swept, f"name={method}", *options)
        print(f"{method}: status {status}", flush=True)


def _fedsim(name: str, method: str, folder: Path, *options: str) -> int:
    fixed = [f"strategy.{k}={v}" for k, v in COMPARISONS[name].fixed.get(method, {}).items()]
    setting = [f"experiment={name}", f"strategy={method}", f"seed={SEED}"]
    command = [sys.executable, "-m", "fedsim.cli", *setting, *fixed, f"run_dir={folder}", "tracker=jsonl", *options]
    return subprocess.run(command, check=False).returncode


def choose(name: str, folder: Path, methods: list[str], options: list[str]) -> None:
    """Prints every setting, and writes the best one of each method that also finishes in the other setting."""
    plan = COMPARISONS[name]
    for method in methods or plan.methods:
        parameter = plan.methods[method]
        found: list[tuple[float, float, float | None]] = []
        for run in sorted((folder / method).iterdir()):
            config = yaml.safe_load((run / "config.yaml").read_text())
            value = config["strategy"][parameter[0]] if parameter else None
            found.append((_score(plan, run), config["client"]["lr"], value))
        values = parameter[1] if parameter else (None,)
        found.sort(key=lambda f: (-f[0], plan.rates.index(f[1]), values.index(f[2])))
        for score, lr, value in found:
            own = "" if parameter is None else f"  {parameter[0]}={value}"
            print(f"{method:10} {100 * score:6.2f} %  lr={lr}{own}", flush=True)
        for _, lr, value in found:
            own = "" if parameter is None else f"strategy.{parameter[0]}={value}"
            if plan.other is not None:
                where = *plan.setting, *plan.other, f"name={method}-other"
                if _fedsim(name, method, folder, *where, f"client.lr={lr}", *filter(None, [own]), *options) != 0:
                    print(f"{method}: lr={lr} {own} does not finish with {' '.join(plan.other)}", flush=True)
                    continue
            print(f"{method}: lr={lr} {own}", flush=True)
            _write(name, method, lr, {parameter[0]: value} if parameter else {})
            break


def _score(plan: Comparison, run: Path) -> float:
    """What a setting is judged by; 0 for a run that broke off."""
    if not (run / "summary.json").exists():
        return 0.0
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return plan.score(records, json.loads((run / "summary.json").read_text()))


def _write(name: str, method: str, lr: float, own: Mapping[str, Any]) -> None:
    own = {**own, **COMPARISONS[name].fixed.get(method, {})}
    lines = [
        "# @package _global_",
        f"# {method} in the comparison {name}, with what the grid chose (docs/comparison.md).",
        f"#   fedsim experiment={name}_{method}",
        "defaults:",
        f"  - {name}",
        f"  - override /strategy: {method}",
        "client:",
        f"  lr: {lr}",
        *(["strategy:", *(f"  {k}: {v}" for k, v in own.items())] if own else []),
    ]
    (ROOT / f"conf/experiment/{name}_{method}.yaml").write_text("\n".join(lines) + "\n")


def main() -> None:
    """``grid <comparison> <folder> [method ...] [key=value ...]``, and then ``choose`` with the same."""
    if len(sys.argv) < 4 or sys.argv[1] not in ("grid", "choose") or sys.argv[2] not in COMPARISONS:
        sys.exit(f"{__doc__}\nComparisons: {', '.join(COMPARISONS)}.")
    stage = grid if sys.argv[1] == "grid" else choose
    name, folder, words = sys.argv[2], Path(sys.argv[3]), sys.argv[4:]
    stage(name, folder, [word for word in words if "=" not in word], [word for word in words if "=" in word])


if __name__ == "__main__":
    main()

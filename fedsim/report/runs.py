"""Reads run directories for tables and pages, and puts runs that differ in their seed only together."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from fedsim.errors import ConfigError, did_you_mean
from fedsim.rundir import read_metrics, read_summary

NEUTRAL = ("seed", "name", "engine", "tracker", "run_dir", "resume", "paths", "data.root", "hydra", "checkpoint")
"""Config keys, each with all below it, that do not make another experiment."""

SAME_DATA = ("data.root", "data.augment", "data.validation")
"""Keys of `data` that may differ between runs whose numbers stand side by side."""

MODES = {"": "global model", "personal_": "personal models", "finetuned_": "fine-tuned models"}
"""What is scored on clients' own examples: prefix of the columns of ``clients.csv``, and its name."""

_EVALUATION = ("test_", "validation_", "client_", "personal_", "finetuned_")  # prefixes of what evaluations say
_COUNTED = ("train_loss", "bytes_", "clients", "failures", "virtual_seconds", "wall_seconds")
_BEST_BY = ("validation_accuracy", "validation_loss", "test_accuracy", "test_loss")  # as the driver chooses

Leaves = dict[str, str]  # dotted key -> value as it is written in YAML


@dataclass(frozen=True)
class Run:
    """A run directory.

    Attributes:
        path: The directory, as it was named.
        config: ``config.yaml``.
        summary: ``summary.json`` of a finished run; None of an unfinished one.
    """

    path: Path
    config: dict[str, Any]
    summary: Mapping[str, Any] | None

    @cached_property
    def leaves(self) -> Leaves:
        """The config, flat."""
        leaves: Leaves = {}
        _flatten(self.config, "", leaves)
        return leaves

    @cached_property
    def essential(self) -> Leaves:
        """Of `leaves`, what makes the experiment."""
        return {k: v for k, v in self.leaves.items() if not _below(k, NEUTRAL)}

    @cached_property
    def seed(self) -> int:
        """The seed.

        Raises:
            ConfigError: The config has none.
        """
        try:
            return int(self.leaves["seed"])
        except (KeyError, ValueError) as exc:
            raise ConfigError(
                f"{self.path}/config.yaml needs a whole number `seed`, got {self.leaves.get('seed')}"
            ) from exc

    @cached_property
    def records(self) -> list[dict[str, Any]]:
        """``metrics.jsonl``.

        Raises:
            ConfigError: The file is missing or damaged.
        """
        records = read_metrics(self.path / "metrics.jsonl")
        for record in records:
            for key, value in record.items():
                if key.startswith((*_EVALUATION, *_COUNTED)) and not _is_number(value) and value is not None:
                    raise ConfigError(
                        f"{self.path}/metrics.jsonl is damaged: round {record['round']}: `{key}` must be a number, "
                        f"got {value!r}; restore it from a copy"
                    )
        return records

    @property
    def quantity(self) -> Literal["accuracy", "loss"]:
        """What it is judged by: accuracy, or the loss of a regression."""
        return "accuracy" if any("test_accuracy" in r for r in self.records) else "loss"

    @cached_property
    def result(self) -> Mapping[str, Any]:
        """The summary; of an unfinished run its sections ``final``, ``best``, ``rounds`` and ``totals`` so far."""
        return self.summary if self.summary is not None else _so_far(self.records)

    def numbers(self, known: Sequence[str] = ()) -> dict[str, float]:
        """All numbers of `result` by dotted key (``final.test_accuracy``); NaN where null is written.

        Args:
            known: Keys that must be numbers where they are written at all.

        Raises:
            ConfigError: One of ``known`` is something else.
        """
        found = {}
        for section in ("final", "best", "", "totals"):
            values = self.result.get(section, {}) if section else {"rounds": self.result.get("rounds")}
            for name, value in values.items() if isinstance(values, Mapping) else ():
                key = f"{section}.{name}" if section else name
                if value is None or _is_number(value):
                    found[key] = math.nan if value is None else float(value)
                elif key in known:
                    raise ConfigError(f"{self.path}/summary.json is damaged: `{key}` must be a number, got {value!r}")
        return found

    def table(self, name: str) -> list[dict[str, str]]:
        """Rows of a CSV file with a header; empty if there is no such file.

        Args:
            name: Such as ``clients.csv``.

        Raises:
            ConfigError: The file cannot be read, or a row is longer or shorter than the header.
        """
        path = self.path / name
        try:
            rows = list(csv.reader(io.StringIO(path.read_text(encoding="utf-8")), strict=True))
            header, *body = rows or [[]]
            for number, row in enumerate(body, start=2):
                if len(row) != len(header):
                    raise ValueError(f"line {number} has {len(row)} values, the header {len(header)}")
        except FileNotFoundError:
            return []
        except OSError as exc:
            raise ConfigError(f"cannot read {path}: {exc.strerror or exc}") from exc
        except (ValueError, csv.Error) as exc:  # a UnicodeDecodeError is a ValueError
            raise ConfigError(f"{path} is damaged ({exc}); restore it from a copy, or delete it to do without") from exc
        return [dict(zip(header, row, strict=True)) for row in body]

    def column(self, name: str, key: str) -> list[float]:
        """The numbers in a column of a CSV file, NaN where there is none; empty if there is no such file.

        Raises:
            ConfigError: The file is damaged, or holds something else there.
        """
        values = []
        for number, row in enumerate(self.table(name), start=2):
            text = row.get(key) or "nan"
            try:
                values.append(float(text))
            except ValueError as exc:
                raise ConfigError(
                    f"{self.path / name} is damaged (line {number}: `{key}` must be a number, got {text!r}); "
                    "restore it from a copy, or delete it to do without"
                ) from exc
        return values


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed only.

    Attributes:
        label: What tells them from the other groups, ``"strategy=FedProx strategy.mu=0.1"``.
        runs: By seed; all finished, or none.
    """

    label: str
    runs: tuple[Run, ...]

    @property
    def finished(self) -> bool:
        """Whether its runs are finished."""
        return self.runs[0].summary is not None

    @property
    def partition(self) -> tuple[tuple[str, str], ...]:
        """How the data are divided: the rule; the seeds say which draw."""
        return tuple(sorted((k, v) for k, v in self.runs[0].leaves.items() if _below(k, ("partition",))))


def read_run(path: Path, summary: Mapping[str, Any] | None = None) -> Run:
    """A run directory.

    Args:
        path: The directory.
        summary: What will be in ``summary.json``, where the caller knows it; default: what is there.

    Raises:
        ConfigError: ``config.yaml`` or ``summary.json`` is damaged.
    """
    config = _read_config(path / "config.yaml")
    if summary is None and (path / "summary.json").exists():
        found = read_summary(path)
        summary = found if found.get("status", "finished") == "finished" else None
    return Run(path, config, summary)


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Run directories, and those in folders of them, in the order of their names.

    Raises:
        ConfigError: A path is neither; a run is named twice; a file is damaged.
    """
    runs: dict[Path, Run] = {}
    for path in (run for given in paths for run in _expand(Path(given))):
        real = path.resolve()
        if real in runs:
            raise ConfigError(f"{path} is named twice (also as {runs[real].path}); name every run once")
        runs[real] = read_run(path)
    return list(runs.values())


def group(runs: Sequence[Run]) -> list[Group]:
    """Puts runs together that differ in their seed only; finished and unfinished ones stay apart.

    Args:
        runs: At least one.

    Returns:
        Groups in the order in which their first runs are named.

    Raises:
        ConfigError: The runs' data differ, or two are one experiment with one seed, which would be counted twice.
    """
    found: dict[tuple[str, bool], dict[int, Run]] = {}
    for run in runs:
        _check_data(runs[0], run)
        peers = found.setdefault((repr(sorted(run.essential.items())), run.summary is not None), {})
        if run.seed in peers:
            raise ConfigError(
                f"{peers[run.seed].path} and {run.path} are the same experiment with the same seed {run.seed}, "
                "and would be counted twice; name one of them"
            )
        peers[run.seed] = run
    configs = {key: next(iter(peers.values())).essential for (key, _), peers in found.items()}
    labels = dict(zip(configs, labels_of(list(configs.values())), strict=True))
    return [
        Group(labels[key] + ("" if finished else " (unfinished)"), tuple(peers[seed] for seed in sorted(peers)))
        for (key, finished), peers in found.items()
    ]


def _check_data(first: Run, other: Run) -> None:
    keys = {k for run in (first, other) for k in run.leaves if _below(k, ("data",)) and not _below(k, SAME_DATA)}
    for key in sorted(keys, key=lambda k: (not k.endswith("_target_"), k)):
        a, b = (run.leaves.get(key, "null") for run in (first, other))
        if a != b:
            differ = f"{_override(key, a)} and {_override(key, b)}"
            raise ConfigError(
                f"{first.path} and {other.path} are runs of different data ({differ}), so their numbers do not "
                "compare; name runs of the same data"
            )


def _so_far(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a summary would say of a run that has not ended."""
    if not records:
        return {}
    out: dict[str, Any] = {"rounds": records[-1]["round"]}
    evaluated = [r for r in records if "test_loss" in r]
    if evaluated:
        by = next(k for k in (*_BEST_BY, "test_loss") if k in evaluated[-1])
        sign = 1 if by.endswith("accuracy") else -1
        known = [r for r in evaluated if r.get(by) is not None]
        out["final"], best = (
            {k: v for k, v in r.items() if k == "round" or k.startswith(_EVALUATION)}
            for r in (evaluated[-1], max(known, key=lambda r: sign * r[by], default=evaluated[-1]))
        )
        out["best"] = {"by": by, **best}
    sums = {k: sum(r.get(k) or 0 for r in records) for k in ("bytes_down", "bytes_up", "clients", "failures")}
    out["totals"] = sums | {k: records[-1].get(k) or 0 for k in ("virtual_seconds", "wall_seconds")}
    return out


# --- files ------------------------------------------------------------------------------------------------


def _expand(path: Path) -> list[Path]:
    if not path.exists():
        near = did_you_mean(path.name, [p.name for p in path.parent.glob("*")]) if path.parent.is_dir() else ""
        raise ConfigError(f"{path} does not exist{near}")
    if (path / "config.yaml").is_file():
        return [path]
    found: list[Path] = []
    for folder, names, files in os.walk(path):
        names[:] = [] if "config.yaml" in files else sorted(n for n in names if not n.startswith("."))
        if "config.yaml" in files:
            found.append(Path(folder))
    if not found:
        raise ConfigError(f"{path} is not a run directory, and holds none: there is no config.yaml")
    return found


def _read_config(file: Path) -> dict[str, Any]:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        config = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
        if not isinstance(config, dict) or not config:
            raise ValueError("needed keys and values, got none")
    except (YAMLError, OmegaConfBaseException, ValueError) as exc:
        raise ConfigError(f"{file} is damaged ({' '.join(str(exc).split())}); restore it, or run again") from exc
    except OSError as exc:
        raise ConfigError(f"cannot read {file}: {exc.strerror or exc}") from exc
    return {str(key): value for key, value in config.items()}


def _flatten(node: Any, prefix: str, leaves: Leaves) -> None:
    if isinstance(node, dict) and node:
        for key, value in node.items():
            _flatten(value, f"{prefix}.{key}" if prefix else str(key), leaves)
    else:
        leaves[prefix] = scalar(node)


def scalar(value: Any) -> str:
    """A value of a config as it is written on a command line, on one line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))  # mu=1 and mu=1.0 are one experiment
    if isinstance(value, list):
        return "[" + ",".join(map(scalar, value)) + "]"
    return " ".join(str(value).split())


def short(node: Any) -> str:
    """Name of the class that a node of a config builds."""
    return str(node["_target_"]).rpartition(".")[2] if isinstance(node, Mapping) and "_target_" in node else "?"


def described(node: Any) -> str:
    """What a node of a config builds, with its values; empty if it is no node."""
    if not isinstance(node, Mapping):
        return ""
    values = ", ".join(f"{k}={scalar(v)}" for k, v in node.items() if k != "_target_" and v not in (None, [], {}))
    if "_target_" not in node:
        return values
    return short(node) + (f" ({values})" if values else "")


# --- labels -----------------------------------------------------------------------------------------------


def labels_of(configs: Sequence[Leaves]) -> list[str]:
    """What tells each config from the others, as overrides.

    A parameter is compared only among configs that build the same thing there: ``strategy.mu`` does not tell
    FedProx from FedAvg, ``strategy=FedProx`` does.
    """
    if len(configs) == 1:
        return [_override("strategy._target_", configs[0].get("strategy._target_", "all"))]
    labels = []
    keys = sorted({key for config in configs for key in config}, key=lambda k: (not k.endswith("_target_"), k))
    for config in configs:
        parts = []
        for key in keys:
            peers = [c for c in configs if _targets(c, key) == _targets(config, key)]
            if key in config and len({peer.get(key) for peer in peers}) > 1:
                parts.append(_override(key, config[key]))
        labels.append(" ".join(parts) or "(otherwise equal)")
    return labels


def _targets(config: Leaves, key: str) -> tuple[str | None, ...]:
    """What is built at the nodes above ``key``; for a ``_target_``, above the node that it builds."""
    parts = key.removesuffix("._target_").split(".")
    return tuple(config.get(".".join([*parts[:i], "_target_"])) for i in range(1, len(parts)))


def _override(key: str, value: str) -> str:
    if key.endswith("._target_"):
        key, value = key.removesuffix("._target_"), value.rpartition(".")[2]
    return f"{key}={value}"


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _below(key: str, owners: Sequence[str]) -> bool:
    return any(key == owner or key.startswith(f"{owner}.") for owner in owners)

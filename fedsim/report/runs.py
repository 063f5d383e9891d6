"""Reads run directories for tables and pages, and puts runs that differ in their seed only together."""

from __future__ import annotations

import csv
import io
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

from fedsim.config import GROUPS, config_hash, options
from fedsim.errors import ConfigError, did_you_mean
from fedsim.rundir import read_metrics, read_summary

NEUTRAL = ("seed", "name", "engine", "tracker", "run_dir", "resume", "paths", "data.root", "hydra", "checkpoint")
"""Config keys, each with all below it, that do not make another experiment."""

SAME_DATA = ("data.root", "data.augment", "data.validation")
"""Keys of `data` that may differ between runs whose numbers stand side by side."""

MODES = {"": "global model", "personal_": "personal models", "finetuned_": "fine-tuned models"}
"""What is scored on clients' own examples: prefix of the columns of ``clients.csv``, and its name."""

_EVALUATION = ("test_", "validation_", "client_", "personal_", "finetuned_")  # prefixes of what evaluations say
_SUMMED = ("bytes_down", "bytes_up", "clients", "failures", "dropouts", "late", "retries")
_COUNTED = (*_SUMMED, "bytes_", "train_loss", "staleness_", "virtual_seconds", "wall_seconds")
_SIGN = ("strategy", "run_dir")  # keys at the top of the config of every run, and hardly of anything else's
_TRACES = ("visits.csv", "partition.npz", ".lock")  # files of a run whose config tells nothing any more
_BEST_BY = ("validation_accuracy", "validation_loss", "test_accuracy", "test_loss")  # as the driver chooses

Leaves = dict[str, str]  # dotted key -> value as it is written in YAML


@dataclass(frozen=True)
class Run:
    """A run directory.

    Attributes:
        path: The directory, as it was named.
        config: ``config.yaml``.
        summary: ``summary.json`` of a finished run; None of an unfinished one.
        running: Whether a process is at work on it.
    """

    path: Path
    config: dict[str, Any]
    summary: Mapping[str, Any] | None
    running: bool = False

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
            ConfigError: The file is missing or damaged, or a finished run's does not end where the run did.
        """
        path = self.path / "metrics.jsonl"
        done = None if self.summary is None else self.summary["rounds"]
        if done is not None and not path.exists():
            raise ConfigError(f"{path} is missing, though the run is finished; restore it from a copy, or run again")
        records = read_metrics(path)
        for record in records:
            for key, value in record.items():
                if key.startswith((*_EVALUATION, *_COUNTED)) and not _is_number(value) and value is not None:
                    raise ConfigError(
                        f"{self.path}/metrics.jsonl is damaged: round {record['round']}: `{key}` must be a number, "
                        f"got {value!r}; restore it from a copy"
                    )
            staleness_of(self.path, record)
        last = records[-1]["round"] if records else 0
        if done is not None and last != done:
            held = f"it ends with round {last}" if last else "it holds no round"
            raise ConfigError(
                f"{path} is damaged: {held}, but {done} were done (summary.json); restore it from a copy, or run again"
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
        for section in ("final", "best", "", "totals", "method_mean"):
            values = self.result.get(section, {}) if section else {"rounds": self.result.get("rounds")}
            for name, value in values.items() if isinstance(values, Mapping) else ():
                key = f"{section}.{name}" if section else name
                if value is None or _is_number(value):
                    found[key] = math.nan if value is None else float(value)
                elif key in known:
                    raise ConfigError(f"{self.path}/summary.json is damaged: `{key}` must be a number, got {value!r}")
        return found

    def table(self, name: str) -> list[dict[str, str]]:
        """Rows of a CSV file with a header; empty if there is no such file, or the run is not finished.

        Args:
            name: Such as ``clients.csv``.

        Raises:
            ConfigError: The file cannot be read, has no rows, or a row is longer or shorter than the header.
        """
        path = self.path / name
        if self.summary is None:  # what is there was written before the run was given more rounds
            return []
        try:
            rows = list(csv.reader(io.StringIO(path.read_text(encoding="utf-8")), strict=True))
            header, *body = rows or [[]]
            for number, row in enumerate(body, start=2):
                if len(row) != len(header):
                    raise ValueError(f"line {number} has {len(row)} values, the header {len(header)}")
            if not body:
                raise ValueError("it has no rows")
        except FileNotFoundError:
            return []
        except OSError as exc:
            raise ConfigError(f"cannot read {path}: {exc.strerror or exc}") from exc
        except (ValueError, csv.Error) as exc:  # a UnicodeDecodeError is a ValueError
            raise self.damaged(name, str(exc)) from exc
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
                raise self.damaged(name, f"line {number}: `{key}` must be a number, got {text!r}") from exc
        return values

    def scores(self, prefix: str) -> list[float]:
        """Accuracy, or loss, of every client that has one, from ``clients.csv``; empty if there is no such file.

        Args:
            prefix: Of `MODES`: whose model is scored.

        Raises:
            ConfigError: The file is damaged, or is not what the summary's mean was taken of.
        """
        key = f"{prefix}{self.quantity}"
        found = [v for v in self.column("clients.csv", key) if not math.isnan(v)]
        said = self.numbers().get(f"final.{prefix or 'client_'}{self.quantity}_mean", math.nan)
        if self.table("clients.csv") and math.isfinite(said):
            mean = math.fsum(found) / len(found) if found else math.nan
            if not math.isclose(mean, said, rel_tol=1e-6, abs_tol=1e-9):
                raise self.damaged("clients.csv", f"the mean of `{key}` is {mean:g}, summary.json says {said:g}")
        return found

    def damaged(self, name: str, what: str) -> ConfigError:
        """The error for a file that a page can do without."""
        return ConfigError(
            f"{self.path / name} is damaged ({what}); restore it from a copy, or delete it to do without"
        )

    def check(self) -> None:
        """Whether config and summary belong together.

        Raises:
            ConfigError: They do not, or the summary lacks what every summary has.
        """
        if self.summary is None:
            return
        whole = isinstance(self.summary.get("final"), Mapping) and isinstance(self.summary.get("rounds"), int)
        if not whole:
            raise ConfigError(
                f"{self.path}/summary.json is damaged: it needs `final` and `rounds`; restore it from a copy, "
                "or run again"
            )
        said = self.summary.get("config_sha256")
        try:
            same = said is None or config_hash(self.config) == said
        except (KeyError, TypeError, AttributeError):  # not even the keys that every config has
            same = False
        if not same:
            raise ConfigError(
                f"{self.path}/config.yaml is not the config of this run: its hash is not `config_sha256` of "
                "summary.json; restore it from a copy, or run again"
            )


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed only.

    Attributes:
        label: What tells them from the other groups, ``"strategy=fedprox strategy.mu=0.1"``.
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
    run = Run(path, config, summary, summary is None and _held(path / ".lock"))
    run.check()
    return run


@dataclass(frozen=True)
class Found:
    """Runs that were found.

    Attributes:
        runs: Those that can be shown, at least one.
        left_out: Those of folders that cannot: path and reason, ``"runs/a/2026... (not finished)"``.
    """

    runs: list[Run]
    left_out: tuple[str, ...] = ()

    @property
    def note(self) -> str:
        """What was left out, in words; empty if nothing was."""
        return f"left out: {', '.join(self.left_out)}" if self.left_out else ""


def read_runs(paths: Sequence[Path], unfinished: bool = False) -> Found:
    """Run directories, and those in folders of them, in the order of their names.

    Args:
        paths: Run directories, or folders of them.
        unfinished: Whether a run may be on its way, past its first round.

    Raises:
        ConfigError: A path is neither; a run is named twice, or is named and cannot be shown; a file is damaged;
            nothing is left.
    """
    runs: dict[Path, Run] = {}
    left_out: dict[Path, str] = {}
    for given in paths:
        for path in _expand(given):
            real = path.resolve()
            if real in runs or real in left_out:
                also = f" (also as {runs[real].path})" if real in runs else ""
                raise ConfigError(f"{path} is named twice{also}; name every run once")
            run = read_run(path)
            short, remedy = _unfit(run, unfinished)
            if not short:
                runs[real] = run
            elif path == given:
                raise ConfigError(f"{path} {remedy}, or leave it out")
            else:
                left_out[real] = f"{path} ({short})"
    if not runs:
        note = Found([], tuple(left_out.values())).note
        raise ConfigError(f"no run to show; {note}; wait for one of them, or go on with it (fedsim resume=<run>)")
    return Found(list(runs.values()), tuple(left_out.values()))


def _unfit(run: Run, unfinished: bool) -> tuple[str, str]:
    """Why a run cannot be shown, in short, and with what to do; empty if it can."""
    if run.summary is not None:
        return "", ""
    if unfinished:
        if (run.path / "metrics.jsonl").exists() and run.records:
            return "", ""
        wait = "it is still running, so wait" if run.running else f"go on with `fedsim resume={run.path}`"
        return "no finished round", f"has no finished round to report; {wait}"
    if run.running:
        return "still running", "is still running; wait until it ends"
    return "not finished", f"is not finished; go on with `fedsim resume={run.path}`"


def _held(lock: Path) -> bool:
    """Whether a process holds a run directory; asking takes the lock for no longer than a moment."""
    import fcntl

    try:
        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no such file, or a file system without locks
        pass
    return False


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


def staleness_of(run: Path, record: Mapping[str, Any]) -> Counter[int]:
    """How many contributions of a round were that many global models old; empty where the record does not say.

    Args:
        run: The run directory, for the error.
        record: Of ``metrics.jsonl``.

    Raises:
        ConfigError: What stands there is no such table.
    """
    table = record.get("staleness") or {}
    try:
        found = Counter({int(old): int(count) for old, count in table.items()})
        if min(found, default=0) < 0 or min(found.values(), default=0) < 0:
            raise ValueError("a negative number")
    except (ValueError, TypeError, AttributeError) as exc:
        raise ConfigError(
            f"{run}/metrics.jsonl is damaged: round {record['round']}: `staleness` must be a table of whole numbers "
            f'such as {{"0": 3}}, got {table!r}; restore it from a copy'
        ) from exc
    return found


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
    sums = {k: sum(r.get(k) or 0 for r in records) for k in _SUMMED if any(k in r for r in records)}
    out["totals"] = sums | {k: records[-1].get(k) or 0 for k in ("virtual_seconds", "wall_seconds")}
    return out


# --- files ------------------------------------------------------------------------------------------------


def _expand(path: Path) -> list[Path]:
    """The run directory itself, or all those below a folder."""
    needed = "needed is a run directory, such as runs/fedavg-digits/20260101-120000-1a2b3c4d, or a folder of some"
    if path.is_symlink() and not path.exists():
        raise ConfigError(f"{path} is a link to {os.readlink(path)}, which does not exist; {needed}")
    if not path.exists():
        near = did_you_mean(path.name, [p.name for p in path.parent.glob("*")]) if path.parent.is_dir() else ""
        raise ConfigError(f"{path} does not exist{near}; {needed}")
    if not path.is_dir():
        inside = _is_run(path.parent)
        raise ConfigError(f"{path} is a file; {f'name its folder, {path.parent}' if inside else needed}")
    if _is_run(path):
        return [path]
    found: list[Path] = []
    for folder, names, _ in os.walk(path):
        here = Path(folder)
        if _is_run(here):
            found.append(here)
            names.clear()
        names[:] = sorted(n for n in names if not n.startswith("."))
    if not found and (path / "config.yaml").is_file():
        raise ConfigError(
            f"{path} is not a fedsim run, and holds none: its config.yaml has no {' and '.join(_SIGN)} at the top; "
            f"{needed}"
        )
    if not found:
        raise ConfigError(f"{path} is not a run directory, and holds none: there is no config.yaml of a run")
    return found


def _is_run(folder: Path) -> bool:
    """Whether a folder is a run directory; other programs have a ``config.yaml`` too."""
    try:
        text = (folder / "config.yaml").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return False
    except OSError:
        text = ""
    signed = all(re.search(rf"^{key}:", text, re.MULTILINE) for key in _SIGN)
    return signed or any((folder / name).exists() for name in _TRACES)


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
    FedProx from FedAvg, ``strategy=fedprox`` does.
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
        key = key.removesuffix("._target_")
        value = option(key, value)
    return f"{key}={value}"


def option(group: str, target: str) -> str:
    """What is written on a command line to have a class built: ``fedprox`` of ``strategy=fedprox``.

    Args:
        group: A key of a config.
        target: The ``_target_`` there; the class's name is returned where no option, or not just one, has it.
    """
    names = [name for name, own in _targets_of(group) if own == target]
    return names[0] if len(names) == 1 else target.rpartition(".")[2]


@cache
def _targets_of(group: str) -> tuple[tuple[str, str], ...]:
    def read() -> Iterator[tuple[str, str]]:
        for name, path in options(group).items():
            found = re.search(r"^_target_:\s*(\S+)", path.read_text(encoding="utf-8"), re.MULTILINE)
            if found:
                yield name, found[1]

    return tuple(read()) if group in GROUPS else ()


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _below(key: str, owners: Sequence[str]) -> bool:
    return any(key == owner or key.startswith(f"{owner}.") for owner in owners)

"""Several runs in one table, seeds together: ``fedsim compare <run>...``.

Runs whose configs are equal but for `NEUTRAL` keys are one row. A row is named after what tells it from the others.
"""

from __future__ import annotations

import math
import os
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from fedsim.errors import ConfigError, did_you_mean
from fedsim.report.text import align, human_bytes, human_seconds
from fedsim.rundir import read_summary

if TYPE_CHECKING:
    from rich.table import Table as RichTable

NEUTRAL = ("seed", "name", "engine", "tracker", "run_dir", "resume", "paths", "data.root", "hydra")
"""Config keys, each with all below it, that do not make another experiment."""

Leaves = dict[str, str]  # dotted key -> value as it is written in YAML


@dataclass(frozen=True)
class Stat:
    """One number over the runs of a row.

    Attributes:
        mean: Mean; NaN where a run's number is.
        std: Sample standard deviation (n - 1); None for a single run.
    """

    mean: float
    std: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Stat:
        """Mean and sample standard deviation of at least one value."""
        if not all(map(math.isfinite, values)):
            return cls(math.nan, math.nan if len(values) > 1 else None)
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


@dataclass(frozen=True)
class Row:
    """Runs that differ in their seed only.

    Attributes:
        label: What tells this row from the others, ``"strategy=FedProx strategy.mu=0.1"``.
        runs: Their directories, by seed.
        seeds: Their seeds.
        stats: Column to number; a column that a run does not have is absent.
    """

    label: str
    runs: tuple[Path, ...]
    seeds: tuple[int, ...]
    stats: Mapping[str, Stat]


@dataclass(frozen=True)
class _Column:
    name: str
    section: str  # of summary.json; "" is the top
    key: str
    show: Callable[[float], str]


_COLUMNS = (
    _Column("final acc %", "final", "test_accuracy", lambda v: f"{100 * v:.2f}"),
    _Column("best acc %", "best", "test_accuracy", lambda v: f"{100 * v:.2f}"),
    _Column("final loss", "final", "test_loss", lambda v: f"{v:.4g}"),
    _Column("rounds", "", "rounds", lambda v: f"{v:.4g}"),
    _Column("down", "totals", "bytes_down", human_bytes),
    _Column("up", "totals", "bytes_up", human_bytes),
    _Column("wall", "totals", "wall_seconds", human_seconds),
)


@dataclass(frozen=True)
class Table:
    """What `compare` found.

    Attributes:
        rows: In the order in which their first runs were named.
    """

    rows: tuple[Row, ...]

    def cells(self) -> list[list[str]]:
        """Header and rows as text: label, seeds, then mean ± sample standard deviation of every column."""
        columns = [c for c in _COLUMNS if any(c.name in row.stats for row in self.rows)]
        body = [[r.label, str(len(r.runs)), *(_cell(r.stats.get(c.name), c.show) for c in columns)] for r in self.rows]
        return [["run", "seeds", *(c.name for c in columns)], *body]

    def text(self) -> str:
        """Plain text."""
        return align(self.cells())

    def rich(self) -> RichTable:
        """The same cells, for a terminal."""
        from rich.table import Table as RichTable
        from rich.text import Text

        header, *body = self.cells()
        table = RichTable()
        for i, name in enumerate(header):
            table.add_column(name, justify="right" if i else "left", overflow="fold")
        for cells in body:
            table.add_row(*map(Text, cells))  # Text: a label may hold square brackets, which rich reads as markup
        return table

    def show(self, stream: TextIO | None = None) -> None:
        """Prints it: with lines on a terminal, as plain text elsewhere.

        Args:
            stream: Where to; default: standard output.
        """
        stream = stream or sys.stdout
        if stream.isatty():
            from rich.console import Console

            Console(file=stream).print(self.rich())
        else:
            print(self.text(), file=stream)


def compare(paths: Sequence[Path]) -> Table:
    """Reads finished runs and puts those that differ in their seed only together.

    Args:
        paths: Run directories, or folders of them (``runs/sweep``).

    Raises:
        ConfigError: Nothing to compare; not a run directory; a run that is not finished, is damaged, or is named
            twice; two runs of one experiment with one seed, which would be counted twice.
    """
    if not paths:
        raise ConfigError("compare needs at least one run directory, like `fedsim compare runs/sweep`")
    groups: dict[str, list[tuple[Path, Leaves, dict[str, Any]]]] = {}
    seen: dict[Path, Path] = {}
    for path in (run for given in paths for run in _expand(Path(given))):
        real = path.resolve()
        if real in seen:
            raise ConfigError(f"{path} is named twice (also as {seen[real]}); name every run once")
        seen[real] = path
        leaves = _read_config(path)
        groups.setdefault(repr(sorted(_essential(leaves).items())), []).append((path, leaves, _finished(path)))
    labels = _labels([_essential(runs[0][1]) for runs in groups.values()])
    return Table(tuple(_row(label, runs) for label, runs in zip(labels, groups.values(), strict=True)))


def _row(label: str, runs: Sequence[tuple[Path, Leaves, dict[str, Any]]]) -> Row:
    by_seed: dict[int, tuple[Path, dict[str, Any]]] = {}
    for path, leaves, summary in runs:
        try:
            seed = int(leaves["seed"])
        except (KeyError, ValueError) as exc:
            raise ConfigError(f"{path}/config.yaml needs a whole number `seed`, got {leaves.get('seed')}") from exc
        if seed in by_seed:
            raise ConfigError(
                f"{by_seed[seed][0]} and {path} are the same experiment with the same seed {seed}, "
                "and would be counted twice; name one of them"
            )
        by_seed[seed] = path, summary
    seeds = tuple(sorted(by_seed))
    stats = {}
    for column in _COLUMNS:
        values = [_lookup(*by_seed[seed], column) for seed in seeds]
        known = [value for value in values if value is not None]
        if len(known) == len(values):
            stats[column.name] = Stat.of(known)
    return Row(label, tuple(by_seed[seed][0] for seed in seeds), seeds, stats)


def _lookup(path: Path, summary: Mapping[str, Any], column: _Column) -> float | None:
    """The number; NaN where null is written, None where nothing is."""
    section = summary.get(column.section, {}) if column.section else summary
    if not isinstance(section, Mapping) or column.key not in section:
        return None
    value = section[column.key]
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        where = f"{column.section}.{column.key}" if column.section else column.key
        raise ConfigError(f"{path}/summary.json is damaged: `{where}` must be a number, got {value!r}")
    return float(value)


def _cell(stat: Stat | None, show: Callable[[float], str]) -> str:
    if stat is None:
        return "-"
    if math.isnan(stat.mean):
        return "nan"
    # No spread where there is none to see: equal bytes in every run are the rule.
    return show(stat.mean) if not stat.std else f"{show(stat.mean)} ± {show(stat.std)}"


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


def _finished(path: Path) -> dict[str, Any]:
    if (path / "summary.json").exists():
        summary = read_summary(path)
        if summary.get("status", "finished") == "finished":
            return summary
    raise ConfigError(f"{path} is not finished; go on with `fedsim resume={path}`, or leave it out")


def _read_config(path: Path) -> Leaves:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    file = path / "config.yaml"
    try:
        config = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
        if not isinstance(config, dict) or not config:
            raise ValueError("needed keys and values, got none")
    except (YAMLError, OmegaConfBaseException, ValueError) as exc:
        raise ConfigError(f"{file} is damaged ({' '.join(str(exc).split())}); restore it, or run again") from exc
    except OSError as exc:
        raise ConfigError(f"cannot read {file}: {exc.strerror or exc}") from exc
    leaves: Leaves = {}
    _flatten(config, "", leaves)
    return leaves


def _flatten(node: Any, prefix: str, leaves: Leaves) -> None:
    if isinstance(node, dict) and node:
        for key, value in node.items():
            _flatten(value, f"{prefix}.{key}" if prefix else str(key), leaves)
    else:
        leaves[prefix] = _scalar(node)


def _scalar(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))  # mu=1 and mu=1.0 are one experiment
    if isinstance(value, list):
        return "[" + ",".join(map(_scalar, value)) + "]"
    return str(value)


def _essential(leaves: Leaves) -> Leaves:
    return {k: v for k, v in leaves.items() if not any(k == n or k.startswith(f"{n}.") for n in NEUTRAL)}


def _labels(configs: Sequence[Leaves]) -> list[str]:
    """What tells each config from the others, as overrides.

    A parameter is compared only among configs that build the same thing there: ``strategy.mu`` does not tell
    FedProx from FedAvg, ``strategy=FedProx`` does.
    """
    if len(configs) == 1:
        return [_short("strategy._target_", configs[0].get("strategy._target_", "all"))]
    labels = []
    keys = sorted({key for config in configs for key in config}, key=lambda k: (not k.endswith("_target_"), k))
    for config in configs:
        parts = []
        for key in keys:
            peers = [c for c in configs if _targets(c, key) == _targets(config, key)]
            if key in config and len({peer.get(key) for peer in peers}) > 1:
                parts.append(_short(key, config[key]))
        labels.append(" ".join(parts) or "(otherwise equal)")
    return labels


def _targets(config: Leaves, key: str) -> tuple[str | None, ...]:
    """What is built at the nodes above ``key``; for a ``_target_``, above the node that it builds."""
    parts = key.removesuffix("._target_").split(".")
    return tuple(config.get(".".join([*parts[:i], "_target_"])) for i in range(1, len(parts)))


def _short(key: str, value: str) -> str:
    if key.endswith("._target_"):
        key, value = key.removesuffix("._target_"), value.rpartition(".")[2]
    return f"{key}={value}"

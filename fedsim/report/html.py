"""The HTML report: one file about one run, or about several over each other.

The file holds its pictures and styles and asks for nothing from anywhere: it can be mailed, and opened in ten years.
The same runs give the same bytes.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedsim.errors import ConfigError, RunError
from fedsim.report import pictures
from fedsim.report.blocks import Block, Details, Note, Page, Section, Table
from fedsim.report.compare import reached, tabulate
from fedsim.report.runs import MODES, Group, Run, described, group, option, read_run, read_runs, short
from fedsim.report.text import human_bytes, human_seconds, number, percent
from fedsim.rundir import dumps, write_atomic

NAME = "report.html"
_ELSEWHERE = "out=<file>.html puts the report elsewhere"
_START, _TITLE = b'<!DOCTYPE html>\n<html lang="en">', b"fedsim report</title>"  # of every report
_MANY_CLASSES = 20


def _count(value: float) -> str:
    return f"{value:,.0f}" if value.is_integer() else f"{value:,.1f}"


_TOTALS: dict[str, tuple[str, Callable[[float], str]]] = {
    "totals.bytes_down": ("Sent to clients", human_bytes),
    "totals.bytes_up": ("Sent by clients", human_bytes),
    "totals.bytes_before": ("Sent before round 1", human_bytes),
    "totals.clients": ("Clients trained", _count),
    "totals.failures": ("Failures", _count),
    "totals.dropouts": ("Lost on the way", _count),
    "totals.late": ("Cut off: too late", _count),
    "totals.retries": ("Done again", _count),
    "totals.steps": ("Local steps", _count),
    "totals.examples": ("Examples processed", _count),
    "totals.gradients": ("Gradients computed", _count),
    "totals.virtual_seconds": ("Virtual time", human_seconds),
    "totals.wall_seconds": ("Wall time", human_seconds),
}
_FIGURES = [f"{part}.test_{quantity}" for part in ("final", "best") for quantity in ("accuracy", "loss")]
_KNOWN = (*_TOTALS, *_FIGURES, "best.round", "rounds")


# --- writing ----------------------------------------------------------------------------------------------


def write_report(runs: Sequence[Path], out: Path | None = None) -> Path:
    """Writes the report of one run, or of several.

    Args:
        runs: Run directories, or folders of them. An unfinished run is shown as far as it came; one of a folder that
            has no finished round is left out, which the page says.
        out: The file to write, ``<name>.html``; an earlier report is replaced, nothing else; default:
            ``report.html`` in the run directory, of several runs in the deepest folder
            that holds them all.

    Returns:
        The file.

    Raises:
        ConfigError: No run, or one without a finished round; runs of different data; one named twice; a damaged file;
            ``out`` cannot be written.
    """
    if not runs:
        raise ConfigError("report needs at least one run directory, like `fedsim report runs/sweep`")
    if out is not None:
        _check_out(out)
    found = read_runs(runs, unfinished=True)
    path = out or _place(found.runs)
    _check_place(path)
    notes = [Note(found.note[0].upper() + found.note[1:])] if found.note else []
    alone = len(found.runs) == 1
    page = page_of_run(found.runs[0], notes) if alone else page_of_runs(group(found.runs), notes)
    try:
        write_atomic(path, render(page))
    except RunError as exc:  # where to write is the user's choice
        raise ConfigError(f"{exc}; {_ELSEWHERE}") from exc
    return path


def write_own_report(path: Path, summary: Mapping[str, Any]) -> None:
    """Writes ``report.html`` of a run that ends.

    Args:
        path: The run directory; all but ``summary.json`` is there.
        summary: What will be in ``summary.json``.

    Raises:
        FedsimError: The run cannot be read, or the file not be written.
    """
    write_atomic(path / NAME, render(page_of_run(read_run(path, json.loads(dumps(summary))))))


def render(page: Page) -> str:
    """The page as HTML."""
    from jinja2 import Environment, StrictUndefined

    source = Path(__file__).with_name("report.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    return environment.from_string(source).render(page=page) + "\n"


def _check_out(out: Path) -> None:
    if out.is_dir():
        raise ConfigError(f"out={out} is a folder; name a file, such as out={out / NAME}")
    if out.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"out={out}: a report's name must end in .html, such as out={out.with_name(NAME)}")
    if not out.parent.is_dir():
        raise ConfigError(f"out={out}: there is no folder {out.parent}; make it first, or choose another")


def _check_place(path: Path) -> None:
    """Refuses to replace what is no report, and a place that cannot be written, before a page is drawn."""
    try:
        if path.exists():
            with path.open("rb") as file:
                start = file.read(4096)
            if not (start.startswith(_START) and _TITLE in start):
                raise ConfigError(
                    f"{path} exists and is no report of fedsim; move it away, or choose another with out="
                )
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as exc:
        raise ConfigError(f"cannot write {path}: {exc.strerror or exc}; {_ELSEWHERE}") from exc


def _place(runs: Sequence[Run]) -> Path:
    if len(runs) == 1:
        return runs[0].path / NAME
    common = Path(os.path.commonpath([run.path.resolve() for run in runs]))
    here = Path.cwd()
    folder = common.relative_to(here) if common.is_relative_to(here) else common
    # A run may lie inside another, whose own report stays.
    return folder / (NAME if not (common / "config.yaml").exists() else "report-of-several.html")


# --- one run ----------------------------------------------------------------------------------------------


def page_of_run(run: Run, notes: Sequence[Note] = ()) -> Page:
    """What there is to say about one run, after ``notes``."""
    sections = [
        Section("What ran", [Table("Configuration", (), _what_ran(run)), _config(run)]),
        Section("Curves", list(pictures.curves([Group("", (run,))]))),
        Section("Virtual time", [*_target_reached(run), *pictures.virtual_time([Group("", (run,))])]),
        Section("Clients", [*_fairness(run), *pictures.spreads([Group("", (run,))])]),
        Section("Classes", list(_classes(run))),
        Section("Partition", list(pictures.partition(run))),
        Section("Cost", [_cost(run)]),
        Section("Versions and hashes", [_origin(run)]),
    ]
    return Page(
        title=_name(run),
        status=_status(run),
        good=run.summary is not None,
        lead=f"{short(run.config.get('strategy'))} on {_data(run)}, seed {run.seed}",
        notes=[*notes, *_notes(run)],
        cards=_cards(run),
        sections=sections,
    )


def _cards(run: Run) -> list[tuple[str, str, str]]:
    n = run.numbers(_KNOWN)
    quantity = "accuracy" if "final.test_accuracy" in n else "loss"
    cards = []
    if f"final.test_{quantity}" in n:
        best = f"round {n['best.round']:.0f}" if "best.round" in n else ""
        latest = _latest(run)
        cards = [
            (f"{latest} test {quantity}", _shown(quantity)(n[f"final.test_{quantity}"]), ""),
            (f"Best test {quantity}", _shown(quantity)(n.get(f"best.test_{quantity}", math.nan)), best),
        ]
        if quantity == "accuracy" and "final.test_loss" in n:
            cards.append((f"{latest} test loss", number(n["final.test_loss"]), ""))
    sent = n.get("totals.bytes_down", 0.0) + n.get("totals.bytes_up", 0.0)
    return [
        *cards,
        ("Rounds", _count(n.get("rounds", 0.0)), f"of {_planned(run):,}"),
        ("Sent", human_bytes(sent), "down and up together"),
        ("Wall time", human_seconds(n.get("totals.wall_seconds", 0.0)), ""),
    ]


def _what_ran(run: Run) -> list[list[str]]:
    c = run.config
    rows = {name: described(c.get(name)) for name in ("strategy", "recipe", "data", "partition", "model", "client")}
    if isinstance(c.get("recipe"), Mapping):
        rows["recipe"] = ", ".join(f"{name}: {described(node)}" for name, node in c["recipe"].items())
    if c.get("partition") is None:
        rows["partition"] = "the data's own clients"
    if run.summary and isinstance(run.summary.get("num_parameters"), int):
        rows["model"] += f", {run.summary['num_parameters']:,} parameters"
    rows |= {name: described(c.get(name)) for name in ("participation", "system", "eval", "engine")}
    rows |= {"rounds": f"{_planned(run):,}", "seed": str(run.seed)}
    return [[name.capitalize(), text] for name, text in rows.items() if text]


def _notes(run: Run) -> Iterator[Note]:
    """What ended a run that is not finished, and how to go on."""
    if run.summary is not None:
        return
    if run.running:
        yield Note("Still running; this page shows it as far as it had come.")
        return
    try:
        error = json.loads((run.path / "failure.json").read_text(encoding="utf-8"))["error"]
        yield Note(f"The run was ended by an error. {error}", warn=True)
    except (OSError, ValueError, KeyError, TypeError):
        pass  # it was interrupted
    yield Note(f"Not finished; go on with: fedsim resume={run.path}")


def _fairness(run: Run) -> Iterator[Block]:
    n, rows = run.numbers(), []
    for prefix, mode in MODES.items():
        keys = [f"final.{prefix or 'client_'}{run.quantity}_{part}" for part in ("mean", "std", "worst10")]
        if keys[0] in n:
            rows.append([mode, *(_shown(run.quantity)(n.get(key, math.nan)) for key in keys)])
    if rows:
        caption = f"{run.quantity.capitalize()} on the clients' own held-out examples, every client counting once"
        yield Table(caption, ["Model", "Mean", "Standard deviation", "Worst tenth"], rows)


def _target(runs: Sequence[Run]) -> float | None:
    """The accuracy that all runs were to reach (`eval.target_accuracy`), where all of them can say when they did."""
    targets = {run.leaves.get("eval.target_accuracy", "null") for run in runs}
    whole = all(r.quantity == "accuracy" and len(r.records) == r.records[-1]["round"] for r in runs)
    try:
        return float(targets.pop()) if len(targets) == 1 and whole else None
    except ValueError:
        return None


def _target_reached(run: Run) -> Iterator[Block]:
    target = _target([run])
    if target is None:
        return
    goal, found = f"{100 * target:g} %", reached(run, target)
    if found is None:
        yield Note(f"A test accuracy of {goal} was not reached.")
        return
    shown = {"seconds_to": human_seconds, "rounds_to": _count, "bytes_to": human_bytes, "contributions_to": _count}
    names = {
        "seconds_to": "Virtual time",
        "rounds_to": "Round",
        "bytes_to": "Sent",
        "contributions_to": "Contributions",
    }
    keys = [key for key in shown if key in found]
    yield Table(
        f"Until the test accuracy was first {goal} or more",
        [names[key] for key in keys],
        [[shown[key](float(found[key])) for key in keys]],
        left=0,
    )


def _classes(run: Run) -> Iterator[Block]:
    table = run.table("classes.csv")
    if not table:
        return
    if missing := [k for k in ("class", "accuracy") if k not in table[0]]:
        raise run.damaged("classes.csv", f"it has no column `{missing[0]}`")
    scored = run.result["final"].get("class_accuracy")
    if isinstance(scored, Sequence) and len(scored) != len(table):
        raise run.damaged("classes.csv", f"it has {len(table)} rows, but there are {len(scored)} classes")
    if all(row.get("name") == row.get("class") for row in table):
        table = [{k: v for k, v in row.items() if k != "name"} for row in table]
    titles = {"num_train": "Training examples", "num_test": "Test examples", "f1": "F1"}
    keys = [k for k in ("class", "name", "num_train", "num_test", "accuracy", "precision", "f1") if k in table[0]]
    columns = {k: run.column("classes.csv", k) for k in keys if k not in ("class", "name")}
    rows = [[_class_cell(k, columns[k][i]) if k in columns else row[k] for k in keys] for i, row in enumerate(table)]
    many = len(rows) > _MANY_CLASSES
    if many:
        worst = sorted((v, i) for i, v in enumerate(columns["accuracy"]) if not math.isnan(v))[:5]
        names = [f"{table[i].get('name', table[i]['class'])} ({percent(v)})" for v, i in worst]
        yield Note(f"Lowest accuracy: {', '.join(names)}.")
    yield Table(
        "The final global model on the test examples of each class",
        [titles.get(k, k.capitalize()) for k in keys],
        rows,
        left=2 if "name" in keys else 1,
        bar=keys.index("accuracy"),
        tall=many,
    )


def _class_cell(key: str, value: float) -> str:
    if math.isnan(value):
        return "–"  # a class without examples, or that is never predicted
    return _count(value) if key.startswith("num") else percent(value)


def _cost(run: Run) -> Block:
    n = run.numbers(_KNOWN)
    rounds = max(n.get("rounds", 1.0), 1.0)
    rows = [[name, show(n[k]), show(n[k] / rounds)] for k, (name, show) in _TOTALS.items() if k in n]
    return Table("What the run cost", ["", "Total", "Per round"], rows)


def _origin(run: Run) -> Block:
    s = run.summary or {}
    rows = [["Directory", str(run.path)]]
    rows += [["Commit", str(s["commit"])]] if s.get("commit") else []
    hashes = {"params": "parameters", "state": "state", "partition": "partition", "config": "config"}
    rows += [[f"SHA-256 of {name}", str(s[f"{k}_sha256"])] for k, name in hashes.items() if s.get(f"{k}_sha256")]
    rows += [[name, str(value)] for name, value in _versions(run).items()]
    rows += [] if s else [["Versions", "written when a run finishes, like hashes"]]
    return Table("Where the numbers come from", (), rows)


def _versions(run: Run) -> Mapping[str, Any]:
    found = (run.summary or {}).get("versions")
    return found if isinstance(found, Mapping) else {}


def _config(run: Run, title: str = "The whole config") -> Details:
    return Details(title, (run.path / "config.yaml").read_text(encoding="utf-8").strip())


# --- several runs -----------------------------------------------------------------------------------------


def page_of_runs(groups: Sequence[Group], notes: Sequence[Note] = ()) -> Page:
    """What there is to say about several runs, those that differ in their seed together, after ``notes``."""
    runs = [run for g in groups for run in g.runs]
    unfinished = sum(run.summary is None for run in runs)
    sections = [
        Section("Comparison", list(_comparison(groups))),
        Section("Differences", list(_differences(groups))),
        Section("Curves", list(pictures.curves(groups))),
        Section("Virtual time", list(pictures.virtual_time(groups))),
        Section("Clients", list(pictures.spreads(groups))),
        Section("Partition", list(pictures.partitions(groups))),
        Section("Cost", [_costs(groups)]),
        Section("Runs", [_every_run(groups)]),
        Section("Versions", list(_origins(runs))),
        Section("Configs", [_config(g.runs[0], f"{g.label}, seed {g.runs[0].seed}") for g in groups]),
    ]
    seeds = sorted({run.seed for run in runs})
    return Page(
        title=f"{len(runs)} runs of {_plural(len(groups), 'setting')}",
        status=f"{unfinished} of {len(runs)} not finished" if unfinished else "all finished",
        good=not unfinished,
        lead=f"{_data(runs[0])}, {'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))}",
        notes=[*notes, *(Note(f"{_name(run)}: {note.text}", note.warn) for run in runs for note in _notes(run))],
        cards=(),
        sections=sections,
    )


def _comparison(groups: Sequence[Group]) -> Iterator[Block]:
    header, *rows = tabulate(groups, _target([run for g in groups for run in g.runs])).cells(math.inf)
    yield Table("Means over seeds, ± one sample standard deviation", [cell.text for cell in header], rows)
    if any(cell.best for row in rows for cell in row):
        yield Note("In bold: the best of a column, among rows with the same partition.")
    if not all(g.finished for g in groups):
        yield Note("Of unfinished runs the latest figures stand where the final ones will be.")


def _differences(groups: Sequence[Group]) -> Iterator[Block]:
    configs = [g.runs[0].essential for g in groups]
    keys = sorted({k for c in configs for k in c if len({other.get(k) for other in configs}) > 1})
    if keys:
        rows = [[g.label, *(_leaf(k, c.get(k, "–")) for k in keys)] for g, c in zip(groups, configs, strict=True)]
        header = ["run", *(key.removesuffix("._target_") for key in keys)]
        yield Table("Keys of the config that are not the same everywhere", header, rows)


def _leaf(key: str, value: str) -> str:
    return option(key.removesuffix("._target_"), value) if key.endswith("._target_") else value


def _costs(groups: Sequence[Group]) -> Block:
    rows = []
    for g in groups:
        found = [run.numbers(_KNOWN) for run in g.runs]
        means = {k: statistics.fmean(n[k] for n in found) if all(k in n for n in found) else None for k in _TOTALS}
        shown = ["–" if mean is None else _TOTALS[k][1](mean) for k, mean in means.items()]
        rows.append([g.label, *shown])
    return Table("What a run cost, means over seeds", ["run", *(name for name, _ in _TOTALS.values())], rows)


def _every_run(groups: Sequence[Group]) -> Block:
    rows = []
    for g in groups:
        for run in g.runs:
            cards = {name: value for name, value, _ in _cards(run)}
            figures = [cards.get(f"{which} test {run.quantity}", "–") for which in (_latest(run), "Best")]
            sha = str((run.summary or {}).get("params_sha256", "–"))[:12]
            rows.append([g.label, _name(run), _status(run), str(run.seed), *figures, cards["Wall time"], sha])
    figure = groups[0].runs[0].quantity
    latest = "Final" if all(g.finished for g in groups) else "Final or latest"
    header = ["run", "Directory", "Status", "Seed", f"{latest} {figure}", f"Best {figure}", "Wall time", "Parameters"]
    return Table("Every run; its parameters by the first digits of their SHA-256", header, rows, left=3)


def _origins(runs: Sequence[Run]) -> Iterator[Block]:
    found: dict[str, int] = {}
    for run in runs:
        if run.summary is not None:
            made = json.dumps({"commit": run.summary.get("commit"), **_versions(run)})
            found[made] = found.get(made, 0) + 1
    columns = [json.loads(made) for made in found]
    names = list(dict.fromkeys(name for column in columns for name in column))
    rows = [[name, *(str(column.get(name) or "–") for column in columns)] for name in names]
    if rows:
        header = ["", *(_plural(n, "run") for n in found.values())]
        yield Table("What the runs were made with", header, rows, left=len(header))


# --- words ------------------------------------------------------------------------------------------------


def _shown(quantity: str) -> Callable[[float], str]:
    return percent if quantity == "accuracy" else number


def _latest(run: Run) -> str:
    """What the latest figures of a run are."""
    return "Latest" if run.summary is None else "Final"


def _planned(run: Run) -> int:
    rounds = run.config.get("rounds")
    return rounds if isinstance(rounds, int) else len(run.records)


def _status(run: Run) -> str:
    rounds = f"round {run.numbers(_KNOWN).get('rounds', 0.0):.0f} of {_planned(run)}"
    done = f"after {rounds}"
    if run.running:
        return f"running, {rounds}"
    if run.summary is None:
        return f"unfinished {done}"
    return f"stopped {done}: {run.summary['stopped']}" if run.summary.get("stopped") else "finished"


def _name(run: Run) -> str:
    """The last two folders, ``<name>/<time>-<hash>``."""
    return "/".join(run.path.resolve().parts[-2:])


def _data(run: Run) -> str:
    node = run.config.get("data")
    return str(node["path"]) if isinstance(node, Mapping) and node.get("path") else short(node)


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"

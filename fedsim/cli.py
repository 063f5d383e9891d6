"""The ``fedsim`` command; the only place that talks Hydra's command line.

Nothing heavy is imported until a command needs it: ``fedsim --help`` takes a fraction of a second.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NoReturn

from fedsim import interrupt
from fedsim.errors import ConfigError, FedsimError, RunError, did_you_mean, one_line
from fedsim.rundir import REMEDIES

if TYPE_CHECKING:
    from fedsim.experiment import Experiment

HELP = """\
fedsim: simulated federated learning

  fedsim [key=value ...]            run an experiment       fedsim strategy=fedprox data=mnist rounds=50
  fedsim -m [key=value,value ...]   run a sweep             fedsim -m strategy=fedavg,scaffold seed=1,2,3
  fedsim resume=<run>               go on with a run        fedsim resume=runs/fedavg-digits/20260101-120000-1a2b3c4d
  fedsim list [group]               what there is           fedsim list strategy
  fedsim partition [key=value ...]  look at a partition     fedsim partition partition.alpha=0.1
  fedsim compare <run> ...          table of several runs   fedsim compare runs/fedavg-digits runs/fedprox-digits
  fedsim report <run> ...           page about runs         fedsim report runs/fedavg-digits runs/fedprox-digits
  fedsim timeline <run> ...         who worked when         fedsim timeline runs/fedavg-digits runs/fedcompass-digits
  fedsim schedule [key=value ...]   the same, untrained     fedsim schedule strategy=fedcompass system=exponential
  fedsim replay <run> <which>       one visit alone         fedsim replay runs/fedavg-digits/2026... round=7 client=42
  fedsim cluster up|down|status     a local Ray cluster     fedsim cluster up nodes=2 cpus=1
  fedsim doctor                     is all well here?       fedsim doctor

  --dry-run           build everything and print what a run would cost, without training
  --cfg               print the resolved config
  --config-dir <dir>  add config groups of your own: <dir>/strategy/mine.yaml is then strategy=mine
  --help, --version

Overrides are Hydra's: group=option (strategy=scaffold), key=value (client.lr=0.05), several for a sweep with -m.
A `_target_` may name a class of yours, such as mymodule.MyStrategy of mymodule.py in the current folder.
Each run has its own directory, runs/<name>/<time>-<hash>/, with metrics.jsonl, summary.json, figures and checkpoints.
"""
TRACEBACK = "FEDSIM_TRACEBACK"  # set to anything: errors are shown with their traceback


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs a command line and exits: 0; 1 a run failed; 2 the request was wrong; 130 interrupted.

    Args:
        argv: Arguments without the program's name; default: the process's own.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        interrupt.catch()
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())  # plug-ins beside the user; last, so that they hide nothing
        _dispatch(args)
        sys.stdout.flush()
    except BrokenPipeError:
        _leave()
    except (Exception, KeyboardInterrupt) as exc:
        if os.environ.get(TRACEBACK):
            raise
        print(f"fedsim: {line(exc)}", file=sys.stderr, flush=True)
        raise SystemExit(130 if isinstance(exc, KeyboardInterrupt) else getattr(exc, "status", 1)) from None
    raise SystemExit(0)


def _leave() -> NoReturn:
    """Exits when nobody reads standard output any more (``fedsim list | head -1``)."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered has to go somewhere
    raise SystemExit(1)


def line(exc: BaseException) -> str:
    """An error as one line: what happened, and the notes that were added on its way up."""
    known = isinstance(exc, FedsimError | KeyboardInterrupt | MemoryError | OSError)
    if isinstance(exc, FedsimError):
        text = str(exc)
    elif isinstance(exc, KeyboardInterrupt):
        text = "interrupted"
    elif isinstance(exc, MemoryError):
        text = "out of memory; lower client.batch_size or the number of clients, or use a machine with more"
    elif isinstance(exc, OSError):
        text = f"{exc.strerror or exc}: {exc.filename}" if exc.filename else str(exc)
        text += f"; {REMEDIES[exc.errno]}" if exc.errno in REMEDIES else ""
    else:
        text = one_line(exc)
    notes = getattr(exc, "__notes__", None) or ([] if known else [f"with {TRACEBACK}=1 the traceback is shown"])
    return " ".join("; ".join([text, *notes]).split())


def _dispatch(args: list[str]) -> None:
    command = args[0] if args and args[0] in COMMANDS else None
    if "-h" in args or "--help" in args or args == ["help"]:
        print(COMMANDS[command][1] if command else HELP, end="")
    elif "--version" in args:
        _version()
    elif command:
        COMMANDS[command][0](args[1:])
    else:
        _run(args)


@dataclass(frozen=True)
class Request:
    """Arguments, sorted.

    Attributes:
        flags: Options without a value.
        rest: What is no option.
        config_dir: The value of ``--config-dir``.
    """

    flags: set[str]
    rest: list[str]
    config_dir: Path | None


def _request(args: Sequence[str], *known: str) -> Request:
    """Sorts arguments.

    Raises:
        ConfigError: An option is unknown.
    """
    from fedsim.config import SCHEMA

    flags, rest, folder, waiting = set(), [], None, iter(args)
    for arg in waiting:
        name, equals, value = arg.partition("=")
        if name == "--config-dir" and name in known:
            given = value if equals else next(waiting, "")
            if not given:
                raise ConfigError("--config-dir needs a folder with config groups, as in --config-dir myconf")
            folder = Path(given).expanduser()
        elif arg in known:
            flags.add(arg)
        elif arg.startswith("-"):
            bare = name.lstrip("-")
            hint = (
                f": write {bare}={value or '...'}, without dashes"
                if equals or bare in SCHEMA
                else did_you_mean(arg, known)
            )
            raise ConfigError(f"unknown option '{arg}'{hint}; see fedsim --help")
        else:
            rest.append(arg)
    if folder is not None:
        from fedsim.compose import check_config_dir

        check_config_dir(folder)
    return Request(flags, rest, folder)


def _overrides(args: Sequence[str], *known: str) -> Request:
    """Sorts arguments of which all but the options are overrides.

    Raises:
        ConfigError: One is not; says what was perhaps meant.
    """
    from fedsim.config import GROUPS, SCHEMA, options

    request = _request(args, *known)
    for word in request.rest:
        if "=" in word or word.startswith("~"):
            continue
        owner = next((group for group in GROUPS if word in options(group)), None)
        if word in COMMANDS:
            hint = f"the command comes first, as in fedsim {word}"
        elif word in GROUPS or word in SCHEMA:
            hint = f"it needs a value: {word}=..., without spaces around the '='"
        elif owner:
            hint = f"write {owner}={word}"
        else:
            hint = f"a run takes key=value; other commands are {', '.join(COMMANDS)}{did_you_mean(word, COMMANDS)}"
        raise ConfigError(f"cannot use the argument '{word}': {hint}; see fedsim --help")
    return request


def _version() -> None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        print(f"fedsim {version('fedsim-ray')}")
    except PackageNotFoundError:
        print("fedsim (not installed)")


# --- run --------------------------------------------------------------------------------------------------


def _run(args: list[str]) -> None:
    request = _overrides(args, "-m", "--multirun", "--dry-run", "--cfg", "--config-dir")
    if request.flags & {"-m", "--multirun"}:
        if len(request.flags) > 1:
            raise ConfigError("a sweep (-m) takes neither --dry-run nor --cfg; try them on one of its runs")
        _sweep(request)
        return
    exp, resume = _plan(request, runs=not request.flags & {"--cfg", "--dry-run"})
    if "--cfg" in request.flags:
        from fedsim.config import dump

        print(dump(exp.config), end="")
    elif "--dry-run" in request.flags:
        from fedsim.cost import report

        print(report(exp))
    else:
        from fedsim.run import execute

        execute(exp, resume)


def _plan(request: Request, runs: bool) -> tuple[Experiment, Path | None]:
    from fedsim.compose import requested
    from fedsim.config import check
    from fedsim.engine.host import begin, crew_of
    from fedsim.engine.session import close_kept

    if given := [o for o in request.rest if o.lstrip("+~").startswith("hydra")]:
        raise ConfigError(f"{given[0]} has no effect without -m: hydra.* says how a sweep runs; remove it")
    config, run = requested(request.rest, request.config_dir)
    check(config)  # before torch is imported: a slip shows at once
    crew_of(config["engine"])
    if runs:
        begin(config["engine"])  # workers import torch while this process does
    try:
        from fedsim.experiment import build

        return build(config, request.rest), run
    except BaseException:
        close_kept()
        raise


def _sweep(request: Request) -> None:
    """Every combination, one run directory each, through Hydra's sweeper and launcher."""
    import secrets
    from datetime import datetime

    import hydra

    from fedsim.compose import explain, own_targets, prepare, resolve, search_path
    from fedsim.engine.session import kept

    if any(o.lstrip("+").startswith("resume=") for o in request.rest):
        raise ConfigError("a sweep (-m) makes new runs; go on with one run at a time, without -m")
    sweep = f"sweep-{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    failed: list[str] = []
    done = 0

    def job(tree: Any) -> float | None:
        nonlocal done
        from hydra.core.hydra_config import HydraConfig

        from fedsim.experiment import build
        from fedsim.run import execute

        task = list(HydraConfig.get().overrides.task)
        name = f"[{HydraConfig.get().job.num}] {' '.join(task)}"
        try:
            print(f"\n{name}" if done else name, flush=True)
            done += 1
            final = execute(build(own_targets(resolve(tree), task), task), sweep=sweep).summary["final"]
        except BrokenPipeError:
            _leave()
        except Exception as exc:
            # The other jobs are worth having; a sweeper that optimises must hear of it, so nothing is returned.
            print(f"fedsim: {name}: {line(exc)}", file=sys.stderr, flush=True)
            failed.append(name)
            return None
        return float(final.get("validation_accuracy", final.get("test_accuracy", final["test_loss"])))

    overrides, before = prepare(request.rest), sys.argv
    with TemporaryDirectory() as scratch:  # Hydra's own files; ours are in the run directories
        sys.argv = [before[0], "-m", f"hydra.sweep.dir={scratch}", *overrides, *search_path(request.config_dir)]
        os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come to us, not to Hydra's printer
        try:
            with kept():  # one cluster for all jobs
                hydra.main(version_base="1.3", config_path="pkg://fedsim.conf", config_name="config")(job)()
        except Exception as exc:
            raise ConfigError(explain(exc, overrides, request.config_dir, sweep=True)) from exc
        finally:
            sys.argv = before
    if failed:
        raise RunError(f"{len(failed)} of {done} runs of the sweep failed: {'; '.join(failed)}")
    if not done:
        raise ConfigError(
            f"the sweep is empty: {' '.join(request.rest)} gives no values; write key=a,b or key=range(0,3)"
        )


# --- other commands ---------------------------------------------------------------------------------------


def _list(args: list[str]) -> None:
    from fedsim.config import CONF, GROUPS, options

    request = _request(args, "--config-dir")
    words, folders = request.rest, (CONF, request.config_dir)
    if not words:
        for group in GROUPS:
            print(f"{group:14} {', '.join(options(group, folders)) or '(none yet)'}")
        print("\nfedsim list <group> says more; fedsim --cfg prints every key with its value")
        return
    if len(words) > 1 or words[0] not in GROUPS:
        raise ConfigError(
            f"fedsim list takes one group, got '{' '.join(words)}'{did_you_mean(words[0], GROUPS)}; "
            f"groups: {', '.join(GROUPS)}"
        )
    for option, path in options(words[0], folders).items():
        lines = path.read_text(encoding="utf-8").splitlines()
        about = next((x[1:].strip() for x in lines if x.startswith("#") and "@package" not in x), "")
        print(f"{option:20} {about}")


def _partition(args: list[str]) -> None:
    exp, _ = _plan(_overrides(args, "--config-dir"), runs=False)
    if exp.partition is None:
        raise ConfigError(
            f"data={exp.program.dataset.name} brings its own clients, so there is no partition to look at"
        )
    from fedsim.report.partition import plot_bubbles, plot_heatmap, statistics
    from fedsim.report.text import align

    dataset, folder = exp.program.dataset, Path(exp.config["run_dir"]).expanduser() / "partition"
    labels, names = dataset.train.y.numpy(), dataset.class_names
    s = statistics(exp.partition, labels, len(names))
    title = f"{dataset.name}: {exp.describe()['partition']}, seed {exp.config['seed']}"
    repeated = "" if s.num_distinct == s.num_examples else f", of which {s.num_distinct:,} are different"
    rows = [
        ["partition", title],
        ["clients, examples", f"{s.num_clients:,}, {s.num_examples:,}{repeated}"],
        ["examples per client", f"{s.size_min:,} to {s.size_max:,}, mean {s.size_mean:.1f}, median {s.size_median:g}"],
        ["Gini of the sizes", f"{s.gini:.3f}"],
        ["classes per client", f"{s.classes_min} to {s.classes_max} of {s.num_classes}, mean {s.classes_mean:.2f}"],
        ["total variation distance", f"{s.tv_mean:.3f} (mean over clients, to all examples together)"],
        ["Kullback-Leibler divergence", f"{s.kl_mean:.3f} nats"],
        ["sha256", exp.partition.sha256()],
    ]
    if exp.config["data"].get("imbalance") is not None:
        rows.insert(1, ["data", exp.describe()["data"]])
    for kind, draw in (("bubbles", plot_bubbles), ("heatmap", plot_heatmap)):
        path = folder / f"{exp.name.partition('-')[2] or exp.name}-{exp.partition.sha256()[:8]}-{kind}.png"
        try:
            draw(exp.partition, labels, names, path, title)
        except (OSError, RunError) as exc:
            raise ConfigError(
                f"cannot draw {path}: {one_line(exc)}; set run_dir= to a folder that can be written"
            ) from exc
        rows.append([kind, str(path)])
    print(align(rows, left=2))


def _schedule(args: list[str]) -> None:
    exp, _ = _plan(_overrides(args, "--config-dir"), runs=False)
    from fedsim.report.timetable import command

    command(exp)


def _words(args: Sequence[str], command: str, *keys: str) -> tuple[list[Path], dict[str, str]]:
    """Run directories, and options written as key=value.

    Raises:
        ConfigError: No directory is named, or an option is unknown or given twice.
    """
    runs: list[Path] = []
    given: dict[str, str] = {}
    for word in _request(args).rest:
        if not word:
            raise ConfigError(f"fedsim {command}: a run directory is empty (''); name one")
        key, equals, value = word.partition("=")
        if not equals or Path(word).expanduser().exists() or "/" in key:
            runs.append(Path(word).expanduser())
        elif key not in keys:
            known = f"; it takes {', '.join(f'{k}=' for k in keys)}" if keys else ""
            raise ConfigError(f"fedsim {command} has no option {key}={did_you_mean(key, keys)}{known}")
        elif key in given:
            raise ConfigError(f"fedsim {command}: {key}= is given twice; give it once")
        elif not value:
            raise ConfigError(f"fedsim {command}: {key}= needs a value, without spaces around the '='")
        else:
            given[key] = value
    if not runs:
        raise ConfigError(
            f"fedsim {command} needs a run directory, such as runs/fedavg-digits/20260101-120000-1a2b3c4d"
        )
    return runs, given


def _compare(args: list[str]) -> None:
    runs, given = _words(args, "compare", "target", "relative_to", "format", "picture")
    from fedsim.report.compare import compare, draw, shown_as, target

    style = shown_as(given.get("format", "text"))
    picture = _picture(given, "picture")
    table = compare(runs, target(given["target"]) if "target" in given else None, given.get("relative_to", ""))
    if picture is not None:
        draw(table, picture)
    table.show(style)


def _picture(given: dict[str, str], key: str) -> Path | None:
    """The file that a user wants a picture in.

    Raises:
        ConfigError: It is no picture's name, or in a folder that is not there.
    """
    if key not in given:
        return None
    path, formats = Path(given[key]).expanduser(), (".png", ".pdf", ".svg")
    if path.is_dir():
        raise ConfigError(f"{key}={path} is a folder; name a file, such as {key}={path / 'figure.png'}")
    if path.suffix.lower() not in formats:
        raise ConfigError(f"{key}={path}: a picture's name must end in {', '.join(formats)}")
    if not path.parent.is_dir():
        raise ConfigError(f"{key}={path}: there is no folder {path.parent}; make it first, or choose another")
    return path


def _report(args: list[str]) -> None:
    runs, given = _words(args, "report", "out")
    from fedsim.report.html import write_report

    print(write_report(runs, Path(given["out"]).expanduser() if "out" in given else None))


def _timeline(args: list[str]) -> None:
    runs, given = _words(args, "timeline", "out", "seconds")
    out = _picture(given, "out") or Path("timeline.png")
    from fedsim.report.timeline import command

    command(runs, out, given.get("seconds"))


def _replay(args: list[str]) -> None:
    runs, given = _words(args, "replay", "round", "client", "phase")
    from fedsim.replay import command

    command(runs, given)


def _cluster(args: list[str]) -> None:
    from fedsim import cluster
    from fedsim.report.text import align

    takes = {"up": ("nodes", "cpus", "port"), "down": (), "status": ()}
    command, *words = _request(args).rest or [""]
    if command not in takes:
        raise ConfigError(f"fedsim cluster takes up, down or status, got '{command}'{did_you_mean(command, takes)}")
    given: dict[str, int] = {}
    for word in words:
        key, _, value = word.partition("=")
        if key not in takes[command]:
            hint = (
                f"{did_you_mean(key, takes[command])}; it takes {', '.join(f'{k}=' for k in takes[command]) or 'none'}"
            )
            raise ConfigError(f"fedsim cluster {command} has no option '{word}'{hint}")
        if key in given:
            raise ConfigError(f"fedsim cluster {command}: {key}= is given twice; give it once")
        if not (value.isascii() and value.isdecimal()):
            raise ConfigError(f"fedsim cluster {command}: {key} must be a whole number > 0, got '{value}'")
        given[key] = int(value)
    if command == "down":
        address = cluster.down()
        print(f"the cluster at {address} is down" if address else "no cluster was up")
        return
    found = cluster.up(**given) if command == "up" else cluster.status()
    resources = ", ".join(f"{found[k]:g} {k}{'' if found[k] == 1 else 's'}" for k in ("CPU", "GPU"))
    rows = [
        ["up", f"{found['address']}, {found['nodes']} node{'' if found['nodes'] == 1 else 's'}, {resources}"],
        ["run on it", f"fedsim engine=ray engine.address={found['address']}"],
        ["end it", "fedsim cluster down"],
    ]
    print(align(rows, left=2))


def _doctor(args: list[str]) -> None:
    if words := _request(args).rest:
        raise ConfigError(f"fedsim doctor takes no arguments, got '{' '.join(words)}'")
    from fedsim.doctor import doctor

    doctor()


#: What each command does, and its help.
COMMANDS: dict[str, tuple[Callable[[list[str]], None], str]] = {
    "list": (
        _list,
        """\
fedsim list [group]: the config groups with their options, or the options of one group with their first lines

  --config-dir <dir>  with config groups of your own
""",
    ),
    "schedule": (
        _schedule,
        """\
fedsim schedule [key=value ...]: who would work when under an event-driven method, without training

Takes the overrides of a run: fedsim schedule strategy=fedcompass system=exponential partition.num_clients=20
It ends as the run would: after `rounds` global models, `stop.virtual_seconds` or `stop.contributions`.
The picture goes to schedule/ under `run_dir`.

  --config-dir <dir>  with config groups of your own
""",
    ),
    "partition": (
        _partition,
        """\
fedsim partition [key=value ...]: statistics and pictures of a partition, without training

Takes the overrides of a run: fedsim partition data=mnist partition=dirichlet partition.alpha=0.1
The pictures go to partition/ under `run_dir`.

  --config-dir <dir>  with config groups of your own
""",
    ),
    "compare": (
        _compare,
        """\
fedsim compare <run> ...: a table of runs; runs that differ by seed alone become mean ± sample standard deviation

A run is a run directory, or a folder with run directories in it. In bold: the best of a column, among rows with the
same partition. Runs must be finished (unfinished ones of a folder are left out), and of the same data.

  target=<accuracy>     adds virtual time, rounds, bytes and contributions (visits that came back) until a test
                        accuracy (a fraction) was first reached: target=0.9
  relative_to=<name>    adds that virtual time as a multiple of the one of a strategy: relative_to=fedcompass
  format=<kind>         text (default), markdown, or csv, which has every number to 12 digits
  picture=<file>        draws test accuracy against virtual time, a line per row: picture=time.png, .pdf or .svg
""",
    ),
    "report": (
        _report,
        """\
fedsim report <run> ...: one HTML file about one run, or about several over each other

A run is a run directory, or a folder with run directories in it; unfinished ones are shown as far as they came. The
file holds its pictures and needs no network. A run that finishes has its own report already.

  out=<file>.html       where to; default: report.html in the run directory, or in the folder that holds all runs
""",
    ),
    "timeline": (
        _timeline,
        """\
fedsim timeline <run> ...: a picture of which client worked when, in virtual time, and how much the clients waited

A run is a run directory, or a folder with run directories in it; unfinished ones are drawn as far as they came.
Several runs stand below each other on one axis of time. At most 40 clients are drawn, from the fastest to the slowest,
and of a long run its beginning; the picture says so. Idle: not at work, because a client waited, was away, or was
not chosen. A run that finishes has its own figures/timeline.png, and timeline.csv with the time of every client.

  out=<file>            where to: .png, .pdf or .svg; default: timeline.png
  seconds=<number>      how much of the virtual time is drawn, from the beginning: seconds=100
""",
    ),
    "replay": (
        _replay,
        """\
fedsim replay <run> round=<number> client=<id>: one client's visit again, alone, in this process

Starts from the nearest checkpoint before that round, computes the rounds between, trains that client only, and says
whether what it sends and what it keeps have the recorded hashes. An error of the client comes with its traceback.
For a debugger: python -m pdb -m fedsim.cli replay <run> round=7 client=42

  phase=<name>          of a round with several phases, the one that is meant; default: all
  client=server         the server's own visit
""",
    ),
    "cluster": (
        _cluster,
        """\
fedsim cluster up|down|status: a Ray cluster of several nodes on this machine, for trying things

  up      starts it, on 127.0.0.1 and with a token; runs of this user find both:
          fedsim engine=ray engine.address=auto
  status  what is up; exit status 1 if nothing is
  down    ends it, with every process and file of it, and runs that are on it

  nodes=<number>      of the cluster, all on this machine; default: 1
  cpus=<number>       that each node offers; default: the cores, divided among the nodes
  port=<number>       default: 6379
""",
    ),
    "doctor": (
        _doctor,
        """\
fedsim doctor: versions, cores, memory, disk, GPUs, Ray, W&B, data found, and a short benchmark of this machine

Exit status 0 if fedsim can run here, 1 if it cannot.
""",
    ),
}


if __name__ == "__main__":
    main()

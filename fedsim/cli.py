"""The ``fedsim`` command; the only place that talks Hydra's command line.

Nothing heavy is imported until a command needs it: ``fedsim --help`` takes a fraction of a second.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from fedsim.errors import ConfigError, FedsimError, did_you_mean

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

  --dry-run    build everything and print what a run would cost, without training
  --cfg        print the resolved config
  --help, --version

Overrides are Hydra's: group=option (strategy=scaffold), key=value (client.lr=0.05), several for a sweep with -m.
Each run has its own directory, runs/<name>/<time>-<hash>/, with metrics.jsonl, summary.json, figures and checkpoints.
"""


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs a command line and exits: 0; 1 a run failed; 2 the request was wrong; 130 interrupted.

    Args:
        argv: Arguments without the program's name; default: the process's own.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        signal.signal(signal.SIGTERM, _terminate)
        _dispatch(args)
        sys.stdout.flush()
    except FedsimError as exc:
        _fail(str(exc), exc.status)
    except KeyboardInterrupt:
        _fail("interrupted; what was checkpointed is kept (fedsim resume=<run directory>)", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except MemoryError:
        _fail("out of memory; lower client.batch_size or the number of clients, or use a machine with more", 1)
    except OSError as exc:
        _fail(f"{exc.strerror or exc}: {exc.filename}" if exc.filename else str(exc), 1)
    raise SystemExit(0)


def _terminate(number: int, frame: Any) -> NoReturn:
    raise KeyboardInterrupt


def _fail(message: str, status: int) -> NoReturn:
    print(f"fedsim: {' '.join(message.split())}", file=sys.stderr, flush=True)
    raise SystemExit(status)


def _dispatch(args: list[str]) -> None:
    if not args or args[0] not in COMMANDS:
        words = [a for a in args if "=" not in a and not a.startswith(("-", "~", "+"))]
        if "-h" in args or "--help" in args or words == ["help"]:
            print(HELP, end="")
        elif "--version" in args:
            _version()
        elif words:
            raise ConfigError(f"unknown command '{words[0]}'{did_you_mean(words[0], COMMANDS)}; see fedsim --help")
        else:
            _run(args)
        return
    if "-h" in args or "--help" in args:
        print(COMMANDS[args[0]].__doc__)
        return
    COMMANDS[args[0]](args[1:])


def _flags(args: list[str], *known: str) -> tuple[set[str], list[str]]:
    flags = {a for a in args if a.startswith("-")}
    for flag in flags:
        if flag not in known:
            raise ConfigError(f"unknown option '{flag}'{did_you_mean(flag, known)}; see fedsim --help")
    return flags, [a for a in args if a not in flags]


def _version() -> None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        print(f"fedsim {version('fedsim-ray')}")
    except PackageNotFoundError:
        print("fedsim (not installed)")


# --- run --------------------------------------------------------------------------------------------------


def _run(args: list[str]) -> None:
    flags, overrides = _flags(args, "-m", "--multirun", "--dry-run", "--cfg")
    if flags & {"-m", "--multirun"}:
        if len(flags) > 1:
            raise ConfigError("a sweep (-m) takes neither --dry-run nor --cfg; try them on one of its runs")
        _sweep(overrides)
        return
    exp, resume = _build(overrides)
    if "--cfg" in flags:
        from fedsim import config

        print(config.dump(exp.config), end="")
    elif "--dry-run" in flags:
        from fedsim.cost import report

        print(report(exp))
    else:
        from fedsim.run import execute

        execute(exp, resume)


def _build(overrides: list[str]) -> tuple[Experiment, Path | None]:
    from fedsim import config

    if any(o.startswith("resume=") and o not in ("resume=null", "resume=") for o in overrides):
        tree, run = config.resume_config(overrides)
        from fedsim.experiment import build

        return build(tree), run
    tree = config.compose(overrides)
    config.check(tree)  # before torch is imported: a typing error shows at once
    from fedsim.experiment import build

    return build(tree, overrides), None


def _sweep(overrides: list[str]) -> None:
    """Every combination, one run directory each, through Hydra's sweeper and launcher."""
    import hydra
    from hydra.errors import HydraException
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from fedsim import config

    failed: list[str] = []

    def job(tree: DictConfig) -> float | None:
        from hydra.core.hydra_config import HydraConfig

        from fedsim.experiment import build
        from fedsim.run import execute

        task = " ".join(HydraConfig.get().overrides.task)
        print(f"\n[{HydraConfig.get().job.num}] {task}", flush=True)
        try:
            plain = config.to_config(OmegaConf.to_container(tree, resolve=True, throw_on_missing=True))
            final = execute(build(plain, list(HydraConfig.get().overrides.task))).summary["final"]
        except FedsimError as exc:
            # The other jobs are worth having; a sweeper that optimises must hear of it, so nothing is returned.
            failed.append(f"[{HydraConfig.get().job.num}] {task}: {exc}")
            print(f"fedsim: {' '.join(str(exc).split())}", file=sys.stderr, flush=True)
            return None
        return float(final.get("validation_accuracy", final.get("test_accuracy", final["test_loss"])))

    before = sys.argv
    sys.argv = [before[0], "-m", *overrides]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come to us, not to Hydra's printer
    try:
        hydra.main(version_base="1.3", config_path="pkg://fedsim.conf", config_name="config")(job)()
    except (HydraException, OmegaConfBaseException) as exc:
        raise ConfigError(config.explain(exc)) from exc
    finally:
        sys.argv = before
    if failed:
        from fedsim.errors import RunError

        raise RunError(f"{len(failed)} jobs of the sweep failed: {'; '.join(failed)}")


# --- other commands ---------------------------------------------------------------------------------------


def _list(args: list[str]) -> None:
    """Fedsim list [group]: the config groups with their options, or the options of one group with their first lines."""
    from fedsim import config

    _, words = _flags(args)
    if not words:
        for group in config.GROUPS:
            print(f"{group:14} {', '.join(config.list_options(group)) or '(none yet)'}")
        print("\nfedsim list <group> says more; fedsim --cfg prints every key with its value")
        return
    if len(words) > 1:
        raise ConfigError(f"fedsim list takes one group, got {' '.join(words)}")
    if words[0] not in config.GROUPS:
        raise ConfigError(
            f"unknown group '{words[0]}'{did_you_mean(words[0], config.GROUPS)}; groups: {', '.join(config.GROUPS)}"
        )
    for option in config.list_options(words[0]):
        lines = (config.CONF / words[0] / f"{option}.yaml").read_text(encoding="utf-8").splitlines()
        about = next((x[1:].strip() for x in lines if x.startswith("#") and "@package" not in x), "")
        print(f"{option:20} {about}")


def _partition(args: list[str]) -> None:
    """Fedsim partition [key=value ...]: statistics and pictures of a partition, without training.

    Takes the overrides of a run: fedsim partition data=mnist partition=dirichlet partition.alpha=0.1
    The pictures go to partition/ under `run_dir`."""
    _, overrides = _flags(args)
    exp, _ = _build(overrides)
    if exp.partition is None:
        raise ConfigError(f"data={exp.program.dataset.name} brings its own clients: there is no partition to look at")
    from fedsim.report.partition import plot_bubbles, plot_heatmap, statistics
    from fedsim.report.text import align

    dataset, folder = exp.program.dataset, Path(exp.config["run_dir"]) / "partition"
    labels, names = dataset.train.y.numpy(), dataset.class_names
    s = statistics(exp.partition, labels, len(names))
    title = f"{dataset.name}: {exp.describe()['partition']}, seed {exp.config['seed']}"
    rows = [
        ["partition", title],
        ["clients, examples", f"{s.num_clients:,}, {s.num_examples:,}"],
        ["examples per client", f"{s.size_min:,} to {s.size_max:,}, mean {s.size_mean:.1f}, median {s.size_median:g}"],
        ["Gini of the sizes", f"{s.gini:.3f}"],
        ["classes per client", f"{s.classes_min} to {s.classes_max} of {s.num_classes}, mean {s.classes_mean:.2f}"],
        ["total variation distance", f"{s.tv_mean:.3f} (mean over clients, to all examples together)"],
        ["Kullback-Leibler divergence", f"{s.kl_mean:.3f} nats"],
        ["sha256", exp.partition.sha256()],
    ]
    for kind, draw in (("bubbles", plot_bubbles), ("heatmap", plot_heatmap)):
        path = folder / f"{exp.name.partition('-')[2] or exp.name}-{exp.partition.sha256()[:8]}-{kind}.png"
        draw(exp.partition, labels, names, path, title)
        rows.append([kind, str(path)])
    print(align(rows, left=2))


def _compare(args: list[str]) -> None:
    """Fedsim compare <run> ...: a table of runs; runs that differ by seed alone become mean ± std.

    A run is a run directory, or a folder with run directories in it."""
    _, words = _flags(args)
    if not words:
        raise ConfigError(
            "fedsim compare needs run directories, such as fedsim compare runs/fedavg-digits runs/fedprox-digits"
        )
    from fedsim.report.compare import compare

    compare([Path(w) for w in words]).show()


COMMANDS: dict[str, Callable[[list[str]], None]] = {"list": _list, "partition": _partition, "compare": _compare}


if __name__ == "__main__":
    main()

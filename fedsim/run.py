"""The rounds of a run: train, evaluate, record, save, and go on after an interruption."""

from __future__ import annotations

import csv
import hashlib
import io
import logging
import math
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fedsim import config as conf
from fedsim import random, tree
from fedsim.checkpoint import Checkpoints
from fedsim.clients.local import Local, Visit
from fedsim.engine.base import Engine
from fedsim.engine.worker import lead
from fedsim.errors import ConfigError, RunError
from fedsim.evaluation import metrics, spread
from fedsim.experiment import Experiment, instantiate, versions
from fedsim.federation import Federation
from fedsim.memory import Memory
from fedsim.program import overrides
from fedsim.rundir import RunDir, read_metrics, write_atomic
from fedsim.tracking import RunInfo, Status, Trackers
from fedsim.vector import Layout

log = logging.getLogger("fedsim")

TOTALS = ("bytes_down", "bytes_up", "clients", "failures", "steps", "examples")


@dataclass(frozen=True)
class Result:
    """What a run leaves.

    Attributes:
        params: Final global parameters, ``[d]``.
        layout: Their names, shapes and places.
        metrics: One record per round, as in ``metrics.jsonl``.
        summary: As in ``summary.json``.
        run_dir: The run directory.
        state: The strategy's final state.
    """

    params: Tensor
    layout: Layout
    metrics: list[dict[str, Any]]
    summary: dict[str, Any]
    run_dir: Path
    state: Any = field(repr=False, default=None)


@dataclass
class Progress:
    """What the driver itself carries from round to round.

    Attributes:
        round_num: Rounds done.
        state: The strategy's state.
        totals: Sums over all rounds.
        wall_seconds: Time spent, earlier processes included.
        best: The best evaluation so far, with ``by`` and ``round``.
        patience: Evaluations since the validation loss was best.
        best_loss: The best validation loss.
        finalized: Whether `Strategy.finalize` was run.
        stopped: Why the run ended early, or empty.
        latest: The latest evaluation.
    """

    round_num: int = 0
    state: Any = None
    totals: dict[str, int] = field(default_factory=lambda: dict.fromkeys(TOTALS, 0))
    wall_seconds: float = 0.0
    best: dict[str, Any] = field(default_factory=dict)
    patience: int = 0
    best_loss: float = math.inf
    finalized: bool = False
    stopped: str = ""
    latest: dict[str, Any] = field(default_factory=dict)


def execute(exp: Experiment, resume: Path | None = None) -> Result:
    """Runs an experiment to its end, or goes on with one.

    Args:
        exp: The experiment.
        resume: Run directory to go on with; its newest checkpoint decides where.

    Raises:
        FedsimError: With one clear line; what was computed so far stays in the run directory.
    """
    if resume is None:
        run = RunDir.create(Path(exp.config["run_dir"]), exp.name, conf.config_hash(exp.config))
    else:
        run = RunDir.open(resume)
    with run.lock(), _logging_to(run.log), _engine(exp) as engine:
        return Driver(exp, run, engine).run()


@contextmanager
def _engine(exp: Experiment) -> Iterator[Engine]:
    node = {k: v for k, v in exp.config["engine"].items() if k not in ("device", "threads")}
    engine: Engine = instantiate(node, "engine", {"threads": exp.config["engine"]["threads"], "program": exp.program})
    try:
        yield engine
    finally:
        engine.close()


@contextmanager
def _logging_to(path: Path) -> Iterator[None]:
    try:
        handler = logging.FileHandler(path, encoding="utf-8")
    except OSError as exc:
        raise ConfigError(f"cannot write {path}: {exc.strerror or exc}") from exc
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    except BaseException as exc:
        log.error("stopped: %s", exc or type(exc).__name__, exc_info=True)
        raise
    finally:
        log.removeHandler(handler)
        handler.close()


class Driver:
    """One run, from its first round or its newest checkpoint.

    Args:
        exp: The experiment.
        run: Its directory, locked.
        engine: Runs client work.
    """

    def __init__(self, exp: Experiment, run: RunDir, engine: Engine) -> None:
        self.exp, self.run_dir, self.config = exp, run, exp.config
        self.strategy = exp.program.strategy
        self.memory = Memory(run.checkpoints / "memory", exp.config["checkpoint"]["memory"] == "disk")
        self.fed = Federation(exp.program, engine, exp.participation, exp.system, self.memory)
        self.checkpoints = Checkpoints(run.checkpoints, self.memory)
        self.trackers = Trackers(exp.trackers)
        self.rounds = exp.config["rounds"]
        self._saved = 0.0
        overridden = overrides(self.strategy, "personal") or exp.program.private is not None
        self.personal = overridden or (exp.program.options.buffers == "local" and exp.program.network.buffer_layout.d > 0)

    def run(self) -> Result:
        """All rounds, and what is written at the end."""
        begin = time.monotonic()
        self.progress = self._start()
        p = self.progress
        began_with = p.wall_seconds
        info = RunInfo(self.run_dir.path, self.rounds, self.exp.describe(), self.config, p.round_num)
        summary: dict[str, Any] = {}
        status: Status = "failed"
        try:
            self.trackers.start(info)
            if p.state is None:
                self._prepare()
            while p.round_num < self.rounds and not p.stopped:
                record = self._round(p.round_num + 1)
                p.wall_seconds = began_with + time.monotonic() - begin
                self.trackers.log({**record, "wall_seconds": round(p.wall_seconds, 3)})
                self._save_if_due()
            self._finalize()
            summary = self._finish()
            status = "finished"
        except KeyboardInterrupt:
            status = "interrupted"
            raise
        finally:
            self.trackers.finish(summary, status)
        records = read_metrics(self.run_dir.metrics) if self.run_dir.metrics.exists() else []
        return Result(p.state.w, self.exp.program.layout, records, summary, self.run_dir.path, p.state)

    # --- start ---------------------------------------------------------------------------------------

    def _start(self) -> Progress:
        saved = self.checkpoints.load()
        if saved is None:
            write_atomic(self.run_dir.config, conf.dump({**self.config, "resume": None}))
            self._write_partition()
            return Progress()
        if saved["config"] != conf.config_hash({**self.config, "rounds": 0}):
            raise ConfigError(
                f"{self.run_dir.path}: the checkpoint belongs to another config than config.yaml; restore the file"
            )
        self.fed.restore(saved["federation"])
        progress: Progress = saved["progress"]
        if self.rounds < progress.round_num:
            raise ConfigError(
                f"rounds={self.rounds}, but {self.run_dir.path} has done {progress.round_num} rounds already"
            )
        if progress.finalized and self.rounds > progress.round_num and overrides_finalize(self.strategy):
            raise ConfigError(
                f"{self.run_dir.path} is finished, and its strategy has finalised the model: it cannot take more rounds"
            )
        if self.rounds > progress.round_num and not progress.stopped:
            progress.finalized = False
        write_atomic(self.run_dir.config, conf.dump({**self.config, "resume": None}))
        return progress

    def _prepare(self) -> None:
        p, network = self.progress, self.exp.program.network
        self.fed.begin_round(0)
        state = self.strategy.init(self.exp.info, network.initial.clone())
        if not isinstance(getattr(state, "w", None), Tensor):
            raise RunError(f"{type(self.strategy).__name__}.init must return a state whose `w` is the global model")
        p.state = self.strategy.prepare(self.fed, state)
        self._count()
        self._save()

    def _write_partition(self) -> None:
        part, clients = self.exp.partition, self.exp.program.clients
        if part is not None:
            content = {"offsets": part.offsets, "indices": part.indices, "sha256": np.array(part.sha256())}
        else:
            content = {"sizes": clients.sizes()}
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **content)  # type: ignore[arg-type]
        write_atomic(self.run_dir.partition, buffer.getvalue())

    # --- rounds --------------------------------------------------------------------------------------

    def _round(self, number: int) -> dict[str, Any]:
        p, fed = self.progress, self.fed
        fed.begin_round(number)
        p.state = self.strategy.round(fed, p.state)
        p.round_num = number
        self._count()
        done = fed.done
        record: dict[str, Any] = {
            "round": number,
            "virtual_seconds": fed.virtual_seconds,
            "bytes_down": done.bytes_down,
            "bytes_up": done.bytes_up,
            "clients": done.clients,
            "failures": done.failures,
            "train_loss": done.loss / done.trained if done.trained else None,
        }
        if number % self.config["eval"]["every"] == 0 or number == self.rounds:
            p.latest = self._evaluate(number)
            record |= {k: v for k, v in p.latest.items() if k not in ("class_accuracy", "round")}
            self._judge(number)
        record |= self.fed.log
        limit = self.config["stop"]["virtual_seconds"]
        if limit is not None and fed.virtual_seconds >= limit:
            p.stopped = p.stopped or f"virtual time reached {limit:g} s"
        if p.stopped and p.latest.get("round") != number:
            p.latest = self._evaluate(number)
            record |= {k: v for k, v in p.latest.items() if k not in ("class_accuracy", "round")}
        return record

    def _count(self) -> None:
        for name in TOTALS:
            self.progress.totals[name] += getattr(self.fed.done, name)

    def _evaluate(self, number: int) -> dict[str, Any]:
        state = self.progress.state
        out: dict[str, Any] = {"round": number}
        out |= {k if k == "class_accuracy" else f"test_{k}": v for k, v in self.fed.evaluate(state).items()}
        if self.exp.program.server is not None:
            seen = self.fed.evaluate(state, "validation")
            out |= {f"validation_{k}": seen[k] for k in ("loss", "accuracy") if k in seen}
        for mode, prefix in (("global", "client"), ("personal", "personal")):
            if mode == "global" or self.personal:
                scores = [metrics(s) for s in self.fed.evaluate_clients(state, self._eval_clients(), mode)]
                key = "accuracy" if self.exp.program.dataset.num_classes else "loss"
                out |= spread([m.get(key, math.nan) for m in scores], f"{prefix}_{key}")
        return out

    def _eval_clients(self) -> list[int]:
        """Whose held-out examples are scored."""
        which, num = self.config["eval"]["clients"], self.fed.num_clients
        if which == "participants":
            return self.memory_clients()
        if which == "all" or which >= num:
            return list(range(num))
        rng = random.numpy_generator(self.config["seed"], "evaluation")
        return sorted(rng.choice(num, which, replace=False, shuffle=False).tolist())

    def memory_clients(self) -> list[int]:
        """Clients that have ever taken part."""
        return [c for c in self.memory.clients() if c >= 0]

    def _judge(self, number: int) -> None:
        """Best evaluation so far, and whether to stop."""
        p, stop = self.progress, self.config["stop"]
        by = next(
            (k for k in ("validation_accuracy", "validation_loss", "test_accuracy", "test_loss") if k in p.latest), None
        )
        if by is not None:
            sign = 1 if by.endswith("accuracy") else -1
            if not p.best or sign * p.latest[by] > sign * p.best[by]:
                p.best = {"by": by, **p.latest}
                if by.startswith("validation"):
                    self._write_model("model_best.safetensors")
        if "validation_loss" in p.latest:
            better = p.latest["validation_loss"] < p.best_loss
            p.patience = 0 if better else p.patience + 1
            p.best_loss = min(p.best_loss, p.latest["validation_loss"])
            if stop["patience"] is not None and p.patience >= stop["patience"]:
                p.stopped = f"no better validation loss in {p.patience} evaluations"
            target = stop["target_accuracy"]
            if target is not None and p.latest.get("validation_accuracy", 0) >= target:
                p.stopped = f"validation accuracy reached {target:g}"

    # --- saving --------------------------------------------------------------------------------------

    def _save_if_due(self) -> None:
        c, p = self.config["checkpoint"], self.progress
        due = c["every"] and p.round_num % c["every"] == 0 and time.monotonic() - self._saved >= c["seconds"]
        if due and p.round_num < self.rounds and not p.stopped:
            self._save()

    def _save(self) -> None:
        content = {
            "config": conf.config_hash({**self.config, "rounds": 0}),
            "progress": self.progress,
            "federation": self.fed.state(),
        }
        self.checkpoints.save(self.progress.round_num, content)
        self._saved = time.monotonic()

    def _finalize(self) -> None:
        p = self.progress
        if not p.finalized:
            if overrides_finalize(self.strategy):
                self.fed.begin_round(p.round_num)
                p.state = self.strategy.finalize(self.fed, p.state)
                self._count()
                p.latest = self._evaluate(p.round_num)
            p.finalized = True
            self._save()

    def _write_model(self, name: str = "model.safetensors") -> None:
        from safetensors.torch import save

        tensors = {
            k: t.contiguous().clone() for k, t in self.exp.program.layout.views(self.progress.state.w.cpu()).items()
        }
        if self.fed.buffers is not None:
            buffers = self.exp.program.network.buffer_layout.views(self.fed.buffers.cpu())
            tensors |= {k: t.contiguous().clone() for k, t in buffers.items()}
        write_atomic(self.run_dir.path / name, save(tensors))

    def _finish(self) -> dict[str, Any]:
        p = self.progress
        self._write_model()
        self._write_clients()
        summary = {
            "status": "finished",
            "final": p.latest,
            "best": p.best,
            "rounds": p.round_num,
            "stopped": p.stopped or None,
            "totals": {
                **p.totals,
                "virtual_seconds": self.fed.virtual_seconds,
                "wall_seconds": round(p.wall_seconds, 3),
            },
            "params_sha256": self.params_sha256(),
            "state_sha256": self.state_sha256(),
            "partition_sha256": None if self.exp.partition is None else self.exp.partition.sha256(),
            "config_sha256": conf.config_hash(self.config),
            "seed": self.config["seed"],
            "num_parameters": self.exp.program.layout.d,
            "versions": versions(),
            "commit": _commit(),
        }
        self._draw()
        self.run_dir.write_summary(summary)
        return summary

    def params_sha256(self) -> str:
        """Hash of what is evaluated: the global model, and every touched client's own where there are such."""
        h = hashlib.sha256(tree.sha256((self.progress.state.w, self.fed.buffers)).encode())
        if self.personal:
            for client, w in self.personal_models():
                h.update(f"{client}:{tree.sha256(w)};".encode())
        return h.hexdigest()

    def personal_models(self) -> Iterator[tuple[int, Tensor]]:
        """Each touched client's own parameters, ``[d]``."""
        program, state, p = self.exp.program, self.progress.state, self.progress
        for client in self.memory_clients():
            sent = lead(self.fed.payload(state)) | self.strategy.unicast(state, (client,))
            visit = Visit(
                client, p.round_num, "evaluate", p.round_num, "personal", memory=self.memory.get((client,))[0]
            )
            yield client, Local(program, visit, sent)._hooks.single("personal")[0]

    def state_sha256(self) -> str:
        """Hash of everything that a resume restores: server state, client memory, streams, clock."""
        return tree.sha256(
            {"state": self.progress.state, "federation": self.fed.state(), "memory": self.memory.sha256()}
        )

    def _write_clients(self) -> None:
        """``clients.csv``: a line per evaluated client."""
        p, program = self.progress, self.exp.program
        clients = self._eval_clients()
        columns: dict[str, list[Any]] = {"client": list(clients)}
        columns["num_train"] = [len(program.shard(c)) for c in clients]
        for mode, prefix in (("global", ""), ("personal", "personal_")):
            if mode == "global" or self.personal:
                scores = self.fed.evaluate_clients(p.state, clients, mode)
                found = [metrics(s) for s in scores]
                columns["num_heldout"] = [s.count for s in scores]
                for key in ("accuracy", "loss", "macro_f1"):
                    if any(key in m for m in found):
                        columns[f"{prefix}{key}"] = [m.get(key) for m in found]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
        write_atomic(self.run_dir.clients, text.getvalue())

    def _draw(self) -> None:
        from fedsim.report.curves import plot_curves

        if self.run_dir.metrics.exists():
            plot_curves([(self.exp.name, read_metrics(self.run_dir.metrics))], self.run_dir.figures / "curves.png")


def overrides_finalize(strategy: Any) -> bool:
    """Whether the strategy has its own `Strategy.finalize`."""
    from fedsim.strategy import Strategy

    return type(strategy).finalize is not Strategy.finalize


def _commit() -> str | None:
    """Commit of the source tree that fedsim runs from, ``-dirty`` if it was changed; None outside of one."""
    folder = Path(__file__).resolve().parent
    try:
        git = ["git", "-C", str(folder)]
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True)
        inside = subprocess.run([*git, "ls-files", "--error-unmatch", __file__], capture_output=True, timeout=5)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return None
    if inside.returncode:
        return None
    return head.stdout.strip() + ("-dirty" if changed.stdout.strip() else "")

"""The rounds of a run: train, evaluate, record, save, and go on after an interruption."""

from __future__ import annotations

import csv
import hashlib
import io
import logging
import math
import shlex
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fedsim import config as conf
from fedsim import interrupt, random, rounds, tree
from fedsim.attendance import Ended, Limits
from fedsim.checkpoint import Checkpoints
from fedsim.clients.availability import Always
from fedsim.clients.local import Local
from fedsim.clients.systems import Homogeneous
from fedsim.clients.visit import Visit
from fedsim.clock import ns
from fedsim.data import IntArray, PartitionedClients
from fedsim.engine.base import Engine, Score
from fedsim.engine.worker import lead, sent_to
from fedsim.errors import ClientError, ConfigError, FedsimError, RunError, one_line
from fedsim.evaluation import by_group, group_accuracy, metrics, spread
from fedsim.experiment import Experiment, versions
from fedsim.longtail import GROUPS, groups
from fedsim.memory import Memory
from fedsim.plugins import instantiate
from fedsim.program import overrides
from fedsim.rundir import RunDir, dumps, read_metrics, read_summary, write_atomic
from fedsim.strategy import SERVER
from fedsim.tracking import RunInfo, Status, Trackers
from fedsim.tracking.jsonl import Jsonl
from fedsim.vector import Layout
from fedsim.visits import Visits

log = logging.getLogger("fedsim")

TOTALS = ("bytes_down", "bytes_up", "clients", "failures", "dropouts", "late", "steps", "examples", "gradients")


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
        cohort: Clients that took part in the latest round.
        totals: Sums over all rounds, and ``bytes_before``: sent either way before round 1.
        wall_seconds: Time spent, earlier processes included.
        best: The best evaluation so far, with ``by`` and ``round``.
        patience: Evaluations since the validation loss was best.
        best_loss: The best validation loss.
        finalized: Whether `Strategy.finalize` was run.
        stopped: Why the run ended early, or empty.
        latest: The latest evaluation.
        logged: Of every number of the method's own the sum over rounds, and in how many it was there.
    """

    round_num: int = 0
    state: Any = None
    cohort: list[int] = field(default_factory=list)
    totals: dict[str, int] = field(default_factory=lambda: dict.fromkeys((*TOTALS, "bytes_before", "retries"), 0))
    wall_seconds: float = 0.0
    best: dict[str, Any] = field(default_factory=dict)
    patience: int = 0
    best_loss: float = math.inf
    finalized: bool = False
    stopped: str = ""
    latest: dict[str, Any] = field(default_factory=dict)
    logged: dict[str, tuple[float, int]] = field(default_factory=dict)


def execute(exp: Experiment, resume: Path | None = None, sweep: str | None = None) -> Result:
    """Runs an experiment to its end, or goes on with one.

    Args:
        exp: The experiment.
        resume: Run directory to go on with; its newest checkpoint decides where.
        sweep: Name of the sweep that this is a job of.

    Raises:
        FedsimError: With one clear line; what was computed so far stays in the run directory.
    """
    interrupt.check()
    with _engine(exp) as engine:  # an engine that cannot start leaves no directory behind
        if resume is None:
            root, text = Path(exp.config["run_dir"]).expanduser(), conf.dump({**exp.config, "resume": None})
            run = RunDir.create(root, exp.name, conf.config_hash(exp.config), config=text)
        else:
            run = RunDir.open(resume)
        with run.lock(), _logging_to(run.log):
            return Driver(exp, run, engine).run(sweep)


@contextmanager
def _engine(exp: Experiment) -> Iterator[Engine]:
    options = exp.config["engine"]
    node = {k: v for k, v in options.items() if k not in conf.ENGINE}
    facts = {k: options[k] for k in ("threads", "on_failure", "max_retries")}
    engine: Engine = instantiate(node, "engine", {**facts, "program": exp.program, "run_config": exp.config})
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
        if isinstance(exc, KeyboardInterrupt):
            exc.add_note(f"go on with: fedsim {shlex.quote(f'resume={path.parent}')}")
        elif getattr(exc, "status", 1) == 1:
            exc.add_note(f"the traceback is in {path}")
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
        self.exp, self.run_dir, self.config, self.engine = exp, run, exp.config, engine
        self.strategy = exp.program.strategy
        on_disk, budget = exp.config["checkpoint"]["memory"] == "disk", exp.config["engine"]["memory_budget"]
        self.memory = Memory(run.checkpoints / "memory", on_disk, conf.num_bytes(budget))
        self.fed = exp.federation(engine, self.memory)
        self.checkpoints = Checkpoints(run.checkpoints, self.memory, exp.config["checkpoint"]["keep"])
        first = (
            () if any(isinstance(t, Jsonl) for t in exp.trackers) else (Jsonl(),)
        )  # a run without its metrics is none
        self.trackers = Trackers((*first, *exp.trackers))
        self.rounds = exp.config["rounds"]
        self.progress = Progress()
        self._visits: Visits | None = None
        self._note = ""
        self._lost = 0  # retries of the engine that are in the records
        self._begin = self._saved = time.monotonic()
        self._scores: dict[str, list[Score]] = {}  # of the latest evaluation of clients, by mode
        self._local_buffers = exp.program.options.buffers == "local" and exp.program.network.buffer_layout.d > 0
        own = any(overrides(half, "personal") for _, half in exp.program.hooks.owners())
        self.personal = own or exp.program.private is not None or self._local_buffers

    def run(self, sweep: str | None = None) -> Result:
        """All rounds, and what is written at the end; ``sweep``: the name of the sweep that this is a job of."""
        self.progress = p = self._start()
        self._begin = time.monotonic() - p.wall_seconds
        described = self.exp.describe() | ({"note": self._note} if self._note else {})
        info = RunInfo(self.run_dir.path, self.rounds, described, self.config, p.round_num, sweep)
        summary: dict[str, Any] = {}
        status: Status = "failed"
        try:
            self.trackers.start(info)
            summary = read_summary(self.run_dir.summary) if self._is_finished() else self._work()
            status = "finished"
        except KeyboardInterrupt:
            status = "interrupted"
            raise
        except Exception as exc:
            if isinstance(exc, FedsimError | OSError | MemoryError):
                raise
            raise RunError(f"round {self.fed.round_num}: {one_line(exc)}") from exc
        finally:
            self.trackers.finish(summary, status)
        records = read_metrics(self.run_dir.metrics) if self.run_dir.metrics.exists() else []
        return Result(p.state.w, self.exp.program.layout, records, summary, self.run_dir.path, p.state)

    def _work(self) -> dict[str, Any]:
        p = self.progress
        self._visits = Visits(self.run_dir.visits, None if p.state is None else p.round_num + p.finalized)
        for old in (self.run_dir.summary, self.run_dir.report):  # of fewer rounds; now nothing refuses to go on
            old.unlink(missing_ok=True)
        write_atomic(self.run_dir.config, conf.dump({**self.config, "resume": None}))
        self.run_dir.failure.unlink(missing_ok=True)
        try:
            if p.state is None:
                self._prepare()
            while p.round_num < self.rounds and not p.stopped:
                interrupt.check()
                try:
                    record = self._round(p.round_num + 1)
                except Ended as exc:
                    self._end_early(exc)
                    break
                self.trackers.log({**record, "wall_seconds": round(self._elapsed(), 3)})
                self._save_if_due()
            self._finalize()
        except ClientError as exc:
            self._note_failure(exc)
            raise
        finally:
            self._visits.close()
        return self._finish()

    def _end_early(self, why: Ended) -> None:
        """Nobody is left to train: the latest global model is the last."""
        p = self.progress
        if not p.round_num:
            raise RunError(f"round 1: {why}; look at availability") from why
        p.stopped = f"{why} at {self.fed.virtual_seconds:g} virtual seconds"
        self._book()  # what came back since the latest model is in none
        self.fed.begin_round(p.round_num)
        if p.latest.get("round") != p.round_num:
            p.latest = self._evaluate(p.round_num)
            self._note_best()

    def _note_failure(self, error: ClientError) -> None:
        """Says how to look at the visit alone; what it raised is kept for `fedsim.replay` to compare."""
        if error.visit is not None:
            write_atomic(self.run_dir.failure, dumps({**error.visit, "error": str(error)}, indent=2) + "\n")
            named = {k: v for k, v in error.visit.items() if k != "visit" and (k, v) != ("phase", "train")}
            words = [f"{k}={v}" for k, v in named.items()]
            error.add_note(f"alone: fedsim replay {shlex.quote(str(self.run_dir.path))} {' '.join(words)}")

    def _elapsed(self) -> float:
        """Seconds of work, earlier processes included."""
        return time.monotonic() - self._begin

    # --- start ---------------------------------------------------------------------------------------

    def _start(self) -> Progress:
        saved = self.checkpoints.load()
        if saved is None:
            self._check_start()
            log.info("started")
            self._write_partition()
            return Progress()
        if saved["config"] != conf.config_hash({**self.config, "rounds": 0}):
            raise ConfigError(
                f"{self.run_dir.path}: the checkpoint belongs to another config than config.yaml; restore the file"
            )
        p: Progress = saved["progress"]
        self.progress = p
        if self.rounds < p.round_num:
            raise ConfigError(f"rounds={self.rounds}, but {self.run_dir.path} has done {p.round_num} rounds already")
        more = self.rounds > p.round_num and not p.stopped
        if more and p.finalized:
            if rounds.finalizes(self.strategy):
                raise ConfigError(
                    f"{self.run_dir.path} is finished, and its strategy has finalised the model: it cannot take more "
                    "rounds"
                )
            p.finalized = False
        self.fed.restore(saved["federation"])
        self.fed.begin_round(p.round_num)
        if not self._is_finished():
            log.info("resumed after round %d", p.round_num)
        return p

    def _check_start(self) -> None:
        """Without a checkpoint everything would be made anew: never over the results of a finished run."""
        run = self.run_dir
        if run.summary.exists():
            raise ConfigError(
                f"{run.path} is finished, but has no checkpoint to go on from: it would start from the beginning and "
                "lose its results; restore checkpoints/, or start a new run"
            )
        if run.metrics.exists() and read_metrics(run.metrics):
            log.warning("%s: no checkpoint was found; starts from the beginning", run.path)
            self._note = "no checkpoint was found: starts from the beginning"

    def _is_finished(self) -> bool:
        """Whether an earlier process has done everything."""
        return self.progress.finalized and self.run_dir.summary.exists()

    def _prepare(self) -> None:
        self.progress.state = rounds.first(self.fed, self.exp.info)
        self._book()
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
        since = fed.now
        p.state = rounds.following(fed, p.state, number)
        p.round_num = number
        self._book()
        done = fed.done
        p.cohort = sorted(done.who)
        record: dict[str, Any] = {
            "round": number,
            "virtual_seconds": fed.virtual_seconds,
            "bytes_down": done.bytes_down,
            "bytes_up": done.bytes_up,
            "clients": done.clients,
            "failures": done.failures,
            "dropouts": done.dropouts,
            "late": done.late,
            "retries": done.retries,
            "train_loss": done.loss / done.trained if done.trained else None,
        }
        limit, most = self.config["stop"]["virtual_seconds"], self.config["stop"].get("contributions")
        if limit is not None and fed.virtual_seconds >= limit:
            p.stopped = f"virtual time reached {limit:g} s"
        if most is not None and p.totals["clients"] >= most:
            p.stopped = f"{p.totals['clients']:,} visits came back"
        due = self._evaluation_is_due(number, since)
        if due or number == self.rounds or p.stopped:
            p.latest = self._evaluate(number)
            record |= {k: v for k, v in p.latest.items() if k != "round" and not k.startswith("class_")}
            self._note_best()
        if due:  # not for the sake of the last round: a run that takes more rounds later must not stop earlier
            self._stop_if_good()
        record["retries"] += self.engine.retries - self._lost  # of workers; since the round before, or since the start
        self._lost = self.engine.retries
        p.totals["retries"] = p.totals.get("retries", 0) + record["retries"]
        for name, value in fed.log.items():
            if isinstance(value, int | float) and math.isfinite(value):
                before, count = p.logged.get(name, (0.0, 0))
                p.logged[name] = (before + value, count + 1)
        return record | fed.log

    def _evaluation_is_due(self, number: int, since: int) -> bool:
        """Whether the model after round ``number``, which began at ``since`` nanoseconds, is scored."""
        seconds = self.config["eval"].get("virtual_seconds")
        if seconds is None:
            return bool(number % self.config["eval"]["every"] == 0)
        every = max(1, ns(seconds))  # whole numbers: 0.3 // 0.1 is 2
        return self.fed.now // every > since // every

    def _book(self) -> None:
        """Books what the round did."""
        for name in TOTALS:
            self.progress.totals[name] = self.progress.totals.get(name, 0) + getattr(self.fed.done, name)
        if self.fed.round_num == 0:
            self.progress.totals["bytes_before"] = self.fed.done.bytes_down + self.fed.done.bytes_up
        assert self._visits is not None
        self._visits.add(self.fed.done.visits)

    def _evaluate(self, number: int) -> dict[str, Any]:
        fed, state = self.fed, self.progress.state
        out: dict[str, Any] = {"round": number}
        found = fed.evaluate(state)
        out |= {k if k.startswith("class_") else f"test_{k}": v for k, v in found.items()}
        if self._long_tailed:
            labels = np.array(found["class_count"])
            hits = np.rint(labels * np.nan_to_num(found["class_accuracy"]))
            out |= by_group([group_accuracy(labels, hits, groups(self._class_counts()))], "test_accuracy")
        if self.exp.program.server is not None:
            seen = fed.evaluate(state, "validation")
            out |= {f"validation_{k}": seen[k] for k in ("loss", "accuracy") if k in seen}
        key = "accuracy" if self.exp.program.dataset.num_classes else "loss"
        self._scores = self._evaluate_clients()
        for mode, scores in self._scores.items():
            values = [metrics(s).get(key, math.nan) for s in scores]
            prefix = "client" if mode == "global" else mode
            out |= spread(values, [s.count for s in scores], f"{prefix}_{key}", higher_is_better=key == "accuracy")
            if self._long_tailed:
                own = (groups(self._class_counts(client)) for client in self._eval_clients())
                tables = [(s.confusion.sum(1), s.confusion.diagonal()) for s in scores]
                rows = [group_accuracy(*table, by) for table, by in zip(tables, own, strict=True)]
                out |= by_group(rows, f"{prefix}_accuracy")
        return out

    @property
    def _long_tailed(self) -> bool:
        return self.config["data"].get("imbalance") is not None

    @cached_property
    def _labels(self) -> IntArray:
        """Class of every training example."""
        clients = self.exp.program.clients
        assert isinstance(clients, PartitionedClients)
        labels: IntArray = clients.split.y.cpu().numpy()
        return labels

    def _class_counts(self, client: int | None = None) -> IntArray:
        """Training examples of every class, ``[C]``, of all clients together or of one."""
        clients = self.exp.program.clients
        assert isinstance(clients, PartitionedClients)
        rows = clients.train_part.indices if client is None else clients.train_part[client]
        counts: IntArray = np.bincount(self._labels[rows], minlength=self.exp.program.dataset.num_classes)
        return counts

    def _evaluate_clients(self) -> dict[str, list[Score]]:
        state, clients, epochs = self.progress.state, self._eval_clients(), self.config["eval"]["finetune_epochs"]
        out = {"global": self.fed.evaluate_clients(state, clients, "global")}
        if self.personal:
            out["personal"] = self.fed.evaluate_clients(state, clients, "personal")
        if epochs:
            out["finetuned"] = self.fed.evaluate_clients(state, clients, "finetuned", epochs)
        return out

    def _eval_clients(self) -> list[int]:
        """Whose held-out examples are scored."""
        which, num = self.config["eval"]["clients"], self.fed.num_clients
        if which == "participants":
            return self.progress.cohort
        if which == "all" or which >= num:
            return list(range(num))
        rng = random.numpy_generator(self.config["seed"], "evaluation")
        return sorted(rng.choice(num, which, replace=False, shuffle=False).tolist())

    def _note_best(self) -> None:
        p = self.progress
        by = next(k for k in ("validation_accuracy", "validation_loss", "test_accuracy", "test_loss") if k in p.latest)
        sign = 1 if by.endswith("accuracy") else -1
        if not p.best or math.isnan(p.best[by]) or sign * p.latest[by] > sign * p.best[by]:
            p.best = {"by": by, **p.latest}
            if by.startswith("validation"):
                self._write_model("model_best.safetensors")

    def _stop_if_good(self) -> None:
        """The stop rules that look at validation data."""
        p, stop = self.progress, self.config["stop"]
        if "validation_loss" not in p.latest:
            return
        p.patience = 0 if p.latest["validation_loss"] < p.best_loss else p.patience + 1
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
        self.progress.wall_seconds = self._elapsed()
        content = {
            "config": conf.config_hash({**self.config, "rounds": 0}),
            "progress": self.progress,
            "federation": self.fed.state(),
        }
        self.checkpoints.save(self.progress.round_num, content)
        self._saved = time.monotonic()

    def _finalize(self) -> None:
        p = self.progress
        if p.finalized:
            return
        if rounds.finalizes(self.strategy):
            self._save()
            p.state = rounds.final(self.fed, p.state, p.round_num)
            self._book()
            self.fed.begin_round(p.round_num)
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
        self._write_classes()
        summary = {
            "status": "finished",
            "final": _without_tables(p.latest),
            "best": _without_tables(p.best),
            "rounds": p.round_num,
            "stopped": p.stopped or None,
            "totals": {
                **p.totals,
                "virtual_seconds": self.fed.virtual_seconds,
                "wall_seconds": round(self._elapsed(), 3),
            },
            "target": self._target(),
            "method_mean": {name: value / count for name, (value, count) in p.logged.items()},
            "params_sha256": self.params_sha256(),
            "state_sha256": self.state_sha256(),
            "partition_sha256": None if self.exp.partition is None else self.exp.partition.sha256(),
            "config_sha256": conf.config_hash(self.config),
            "seed": self.config["seed"],
            "num_parameters": self.exp.program.layout.d,
            "versions": versions(),
            "commit": _commit(),
        }
        self._draw(summary)
        self.run_dir.write_summary(summary)  # last: who sees it sees a finished run
        log.info("finished after round %d", p.round_num)
        return summary

    def _target(self) -> dict[str, Any] | None:
        """When ``eval.target_accuracy`` was first reached, and what it had cost by then; None: it was not."""
        target = self.config["eval"].get("target_accuracy")
        spent = dict.fromkeys(("bytes", "contributions"), 0)
        spent["bytes"] = self.progress.totals["bytes_before"]
        for record in read_metrics(self.run_dir.metrics) if target is not None else ():
            spent["bytes"] += record["bytes_down"] + record["bytes_up"]
            spent["contributions"] += record["clients"]
            if (record.get("test_accuracy") or 0.0) >= target:  # null where nothing could be scored
                return {
                    "accuracy": target,
                    "round": record["round"],
                    "virtual_seconds": record["virtual_seconds"],
                    **spent,
                }
        return None

    @property
    def _times_differ(self) -> bool:
        """Whether who worked when is more than one row of bars per round."""
        system, limits = self.exp.system, self.fed.limits
        alike = isinstance(system, Homogeneous) and system == Homogeneous(seconds_per_step=system.seconds_per_step)
        plain = alike and isinstance(self.exp.availability, Always) and limits == Limits()
        return self.fed.schedule is not None or not plain

    def params_sha256(self) -> str:
        """Hash of what is evaluated: the global model, and every touched client's own where that is another."""
        h = hashlib.sha256(tree.sha256((self.progress.state.w, self.fed.buffers)).encode())
        if self.personal:
            shared = tree.sha256(self.progress.state.w)
            for client, own in self._personal_models():
                if (found := tree.sha256(own)) != shared:
                    h.update(f"{client}:{found};".encode())
        return h.hexdigest()

    def _personal_models(self) -> Iterator[tuple[int, Any]]:
        """Each touched client's own parameters, ``[d]``, and buffers where clients have their own."""
        program, state, number = self.exp.program, self.progress.state, self.progress.round_num
        sent = lead(self.fed.payload(state), program.device)
        for client in self.memory.clients():
            if client == SERVER:
                continue
            (row,) = self.memory.get((client,))
            own = sent_to(self.fed.unicast(state, (client,)), 0, 1, program)
            visit = Visit(client, number, "evaluate", number, "personal", memory=row)
            if self.fed.buffers is not None:  # `personal` may train, which writes into what is bound
                buffers = row.get("buffers.local", self.fed.buffers) if self._local_buffers else self.fed.buffers
                program.network.bind_buffers(buffers.to(program.device, copy=True))
            w = Local(program, visit, sent | own)._hooks.single("personal")[0]
            yield client, (w, row.get("buffers.local")) if self._local_buffers else w

    def state_sha256(self) -> str:
        """Hash of everything that a resume restores: server state, client memory, streams, clock."""
        return tree.sha256(
            {"state": self.progress.state, "federation": self.fed.state(), "memory": self.memory.sha256()}
        )

    def _write_clients(self) -> None:
        """``clients.csv``: a line per client that the last evaluation looked at."""
        clients = self._eval_clients()
        columns: dict[str, list[Any]] = {
            "client": list(clients),
            "num_train": [len(self.exp.program.shard(c)) for c in clients],
        }
        for mode, scores in (self._scores or self._evaluate_clients()).items():
            found = [metrics(s) for s in scores]
            columns["num_heldout"] = [s.count for s in scores]
            for key in ("accuracy", "loss", "macro_f1"):
                if any(key in m for m in found):
                    columns[key if mode == "global" else f"{mode}_{key}"] = [m.get(key) for m in found]
        _write_table(self.run_dir.clients, columns)

    def _write_classes(self) -> None:
        """``classes.csv``: a line per class, from the latest evaluation of the global model."""
        dataset, clients, latest = self.exp.program.dataset, self.exp.program.clients, self.progress.latest
        if "class_count" not in latest:  # regression
            return
        columns: dict[str, list[Any]] = {"class": list(range(dataset.num_classes)), "name": list(dataset.class_names)}
        if isinstance(clients, PartitionedClients):
            counts = self._class_counts()
            columns["num_train"] = counts.tolist()
            if self._long_tailed:
                columns["group"] = [GROUPS[group] for group in groups(counts)]
        columns |= {
            key.replace("class_count", "num_test").removeprefix("class_"): latest[key]
            for key in ("class_count", "class_accuracy", "class_precision", "class_f1")
        }
        _write_table(self.run_dir.classes, columns)

    def _draw(self, summary: dict[str, Any]) -> None:
        """Pictures in ``figures/``, and ``report.html``."""
        from fedsim.report import curves, html, partition, timeline

        run, part, dataset = self.run_dir, self.exp.partition, self.exp.program.dataset
        try:
            curves.plot_curves([(self.exp.name, read_metrics(run.metrics))], run.figures / "curves.png")
            if part is not None and len(part) > 1 and dataset.num_classes:
                draw = partition.plot_bubbles if len(part) <= partition.MAX_BUBBLE_CLIENTS else partition.plot_heatmap
                title = f"{self.exp.describe()['partition']}, seed {self.config['seed']}"
                labels = dataset.train.y.cpu().numpy()
                draw(part, labels, dataset.class_names, run.figures / "partition.png", title)
            if self._times_differ:
                timeline.write_own_timeline(run.path, self.exp.name)
            html.write_own_report(run.path, summary)
        except Exception:  # no picture is worth the results of a run
            log.warning("%s: the pictures or the report could not be made", run.path, exc_info=True)


def _without_tables(latest: dict[str, Any]) -> dict[str, Any]:
    """An evaluation without what `Driver._write_classes` has in full."""
    return {k: v for k, v in latest.items() if not k.startswith("class_") or k == "class_accuracy"}


def _write_table(path: Path, columns: dict[str, list[Any]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    write_atomic(path, text.getvalue())


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

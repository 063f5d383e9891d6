"""One visit of a run again, in this process: for a debugger, and to see that it gives the same bits. Nothing else runs
beside it but the visits of clients that are trained together with it (``client.batching``).

The server's state comes from the newest checkpoint before the round, and the rounds between are computed again. In the
round itself a client's visit is run as soon as it is handed out, and nothing runs after it; what went before in the
same round runs in full: a phase that the visit follows, the first pieces of a cohort of thousands. Nothing in the run
directory is written.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fedsim import rounds
from fedsim.attendance import Ended
from fedsim.checkpoint import files, tree_of
from fedsim.config import check, config_hash, load
from fedsim.engine.base import Done, EvalTask, Outcome, Task
from fedsim.engine.inline import InlineEngine
from fedsim.errors import ClientError, ConfigError, FedsimError, RunError, did_you_mean
from fedsim.experiment import Experiment, build
from fedsim.memory import Memory
from fedsim.reduce import lane
from fedsim.run import Progress
from fedsim.rundir import RunDir, read_summary
from fedsim.strategy import SERVER
from fedsim.visits import Record, read

log = logging.getLogger("fedsim")


@dataclass(frozen=True)
class Replay:
    """A visit that was run again.

    Attributes:
        round: The round in which it was handed out.
        client: Client id; -1 is the server.
        phase: ``train`` or the name of a phase.
        visit: What tells the client's visits apart.
        outcome: What it sent, as sums over this client and those that are trained together with it.
        recorded: What the run wrote down of it; None if it did not, as of a round that was never finished.
        lane: Its place among them: ``outcome.done[lane]`` is the visit.
    """

    round: int
    client: int
    phase: str
    visit: str
    outcome: Outcome
    recorded: Record | None
    lane: int = 0

    @property
    def done(self) -> Done:
        """The visit, as it would be booked."""
        return self.outcome.done[self.lane]

    @property
    def entries(self) -> str:
        """Fingerprint of what it sent."""
        return self.done.entries

    @property
    def memory(self) -> str:
        """Fingerprint of what it keeps, its personal model included."""
        return self.done.kept

    @property
    def same(self) -> bool | None:
        """Whether both fingerprints are the recorded ones; None if there are none."""
        r = self.recorded
        return None if r is None else (r.entries, r.memory) == (self.entries, self.memory)


def replay(run_dir: str | Path, round_num: int, client: int, phase: str | None = None) -> list[Replay]:
    """Runs a client's visits of one round again.

    Args:
        run_dir: The run directory.
        round_num: The round, from 1; 0 is `Strategy.prepare`, and one past the last round `Strategy.finalize`.
        client: Client id; -1 is the server.
        phase: Of a round with several phases the one that is meant; default: all of them.

    Returns:
        One replay per visit, in the order of the round.

    Raises:
        ConfigError: It is no run directory, or the client has no such visit.
        ClientError: The client raised, as it may have done in the run; the client's own error is its cause.
    """
    run = RunDir.open(run_dir)
    config = load(run.config)
    try:
        check(config)
    except ConfigError as exc:
        raise ConfigError(f"{run.config} is damaged ({exc}); restore it from a copy") from exc
    exp = build(config)
    if not (client == SERVER or 0 <= client < len(exp.program.clients)):
        raise ConfigError(f"client={client}: {run.path} has clients 0 to {len(exp.program.clients) - 1}")
    wanted = _Wanted(run, round_num, client, phase)
    with TemporaryDirectory(prefix="fedsim-replay-") as scratch:
        return _rounds(exp, run, wanted, Path(scratch))


class _Wanted:
    """The visits that are looked for, and what the run wrote down of them.

    Args:
        run: The run.
        round_num: The round.
        client: The client.
        phase: The phase, or None for all.

    Raises:
        ConfigError: There is no such visit.
    """

    def __init__(self, run: RunDir, round_num: int, client: int, phase: str | None) -> None:
        self.round, self.client, self.phase = round_num, client, phase
        self.found: list[Replay] = []
        self.failure = _failure(run)
        if self.failure.get("round") != round_num or self.failure.get("client") != client:
            self.failure = {}
        elif phase is None:
            self.phase = self.failure.get("phase")
        own: list[Record] = []
        others: list[Record] = []
        last, events = 0, False
        for record in read(run.visits):
            last = max(last, record.booked)
            if record.outcome != "done":  # nothing was computed, or nothing came of it
                continue
            events |= record.visit.startswith("task.")
            if record.round == round_num:
                (own if record.client == client else others).append(record)
        self.records = {(r.phase, r.visit): r for r in own if self.phase in (None, r.phase)}
        if run.summary.exists() and last < (planned := read_summary(run.summary)["rounds"]):
            raise ConfigError(
                f"{run.visits} ends with round {last} of {planned}: it is damaged; restore it from a copy"
            )
        if not 0 <= round_num <= last + 1:
            raise ConfigError(f"round={round_num}: {run.path} has done rounds 1 to {last}")
        if own and not self.records:
            phases = sorted({r.phase for r in own})
            raise ConfigError(
                f"client {client} has no phase {phase} in round {round_num}{did_you_mean(phase or '', phases)}; "
                f"it has: {', '.join(phases)}"
            )
        # What an event-driven client was given may still be under way, or have raised.
        if others and not own and not events and not self.failure and round_num < last:
            raise ConfigError(
                f"{_who(client)} took no part in round {round_num} of {run.path}; "
                "the columns round and client of visits.csv say who did"
            )

    def is_met(self, task: Task) -> bool:
        """Whether a task holds a visit that is looked for."""
        return task.round_num == self.round and self.client in task.clients and self.phase in (None, task.phase)

    @property
    def complete(self) -> bool:
        """Whether there is nothing more to look for."""
        if self.failure:
            return False  # until the visit that raised does so again
        return len(self.found) >= max(1, len(self.records))  # of a round that was never finished, the first


class _Found(BaseException):
    """All visits were run; what would come next is not wanted."""


class _Alone(InlineEngine):
    """Runs the visits that are looked for as soon as they are handed out."""

    slots = 32  # many pieces of a cohort are handed out before the first one is waited for

    def __init__(self, exp: Experiment, wanted: _Wanted) -> None:
        super().__init__(exp.program, exp.config["engine"]["threads"])
        self._wanted = wanted

    def submit(self, task: Task | EvalTask) -> int:
        wanted = self._wanted
        if isinstance(task, Task) and wanted.is_met(task):
            i = task.clients.index(wanted.client)
            place, (first, end) = next((n, s) for n, s in enumerate(task.spans()) if s[0] <= i < s[1])
            alone = replace(
                task,
                clients=task.clients[first:end],
                visits=task.visits[first:end],
                memory=task.memory[first:end],
                unicast={k: lane(v, slice(first, end)) for k, v in task.unicast.items()},
                groups=(end - first,),
                first_leaf=task.first_leaf + place,
            )
            visit = str(task.visits[i])
            record = wanted.records.get((task.phase, visit))
            outcome = self._worker.run(alone)
            assert isinstance(outcome, Outcome)
            wanted.found.append(Replay(wanted.round, wanted.client, task.phase, visit, outcome, record, i - first))
            if wanted.complete:
                raise _Found
        return super().submit(task)


def _rounds(exp: Experiment, run: RunDir, wanted: _Wanted, scratch: Path) -> list[Replay]:
    """Goes from the nearest checkpoint to the visits."""
    finalizes = rounds.finalizes(exp.program.strategy)
    saved, end = _nearest(run, wanted.round, finalizes, scratch), _end(run, exp.config["rounds"])
    memory = Memory(scratch, exp.config["checkpoint"]["memory"] == "disk")
    engine = _Alone(exp, wanted)
    try:
        fed = exp.federation(engine, memory)
        number, state = 0, None
        if saved is not None:
            if saved["content"]["config"] != config_hash({**exp.config, "rounds": 0}):
                raise ConfigError(f"{run.path}: the checkpoints belong to another config than config.yaml; restore it")
            memory.restore(saved["memory"])
            fed.restore(saved["content"]["federation"])
            number, state = saved["content"]["progress"].round_num, saved["content"]["progress"].state
        log.info("replay starts after round %d", number)
        if state is None:
            state = rounds.first(fed, exp.info)
        while number < min(wanted.round, end):
            number += 1
            state = rounds.following(fed, state, number)
        fed.submit_all()
        if wanted.round > number:
            if not finalizes:  # the run ended in the middle of a round: nobody was left
                with contextlib.suppress(Ended):
                    rounds.following(fed, state, wanted.round)
            rounds.final(fed, state, number)
    except _Found:
        pass
    finally:
        engine.close()
    if wanted.found:
        return wanted.found
    raise ConfigError(
        f"{_who(wanted.client)} takes no part in round {wanted.round} of {run.path}, which has rounds 1 to {end}"
        + (f" in a phase {wanted.phase}" if wanted.phase else "")
    )


def _nearest(run: RunDir, round_num: int, finalizes: bool, scratch: Path) -> Any:
    """The newest checkpoint from before a round that is whole; None: start from nothing.

    Its segments of client memory are linked into ``scratch``: a run that goes on removes old ones.
    """
    for path in reversed(_files(run)):
        if int(path.name.partition("-")[0]) >= round_num:
            continue
        try:
            saved = tree_of(path)
            for name in saved["memory"]:
                _link(run.checkpoints / "memory" / name, scratch / name)
        except (FedsimError, FileNotFoundError) as exc:
            log.warning("a replay cannot start from %s (%s); it starts earlier", path.name, exc)
            continue
        if not (saved["content"]["progress"].finalized and finalizes):
            return saved
    return None


def _link(source: Path, target: Path) -> None:
    try:
        target.hardlink_to(source)
    except FileExistsError:
        return
    except FileNotFoundError:
        raise
    except OSError:  # another file system
        shutil.copy(source, target)


def _files(run: RunDir) -> list[Path]:
    """The checkpoints, oldest first, of a run that may be removing old ones at this moment."""
    for _ in range(10):
        with contextlib.suppress(FileNotFoundError):
            return files(run.checkpoints)
    return []


def _end(run: RunDir, planned: int) -> int:
    """The last round, after which comes `Strategy.finalize`."""
    for path in reversed(_files(run)):
        with contextlib.suppress(FedsimError):
            p: Progress = tree_of(path)["content"]["progress"]
            return p.round_num if p.stopped or p.finalized else planned
    return planned


def _who(client: int) -> str:
    return "the server" if client == SERVER else f"client {client}"


def _failure(run: RunDir) -> dict[str, Any]:
    """The visit that ended the run and its error, if one did."""
    try:
        noted = json.loads(run.failure.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return noted if isinstance(noted, dict) else {}


# --- the command ------------------------------------------------------------------------------------------


def command(runs: Sequence[Path], given: Mapping[str, str]) -> None:
    """``fedsim replay <run> round=<number> client=<id>``.

    Raises:
        FedsimError: As `replay`, and where the visit has other bits than it had in the run.
    """
    if len(runs) > 1:
        raise ConfigError(f"fedsim replay takes one run directory, got {len(runs)}")
    for key in ("round", "client"):
        if key not in given:
            raise ConfigError(f"fedsim replay needs {key}=, as in fedsim replay {runs[0]} round=7 client=42")
    client = SERVER if given["client"] == "server" else _whole("client", given["client"])
    number = _whole("round", given["round"])
    failure = _failure(RunDir(runs[0]))
    try:
        found = replay(runs[0], number, client, given.get("phase"))
    except ClientError as exc:
        if exc.visit is not None and (exc.visit["round"], exc.visit["client"]) == (number, client):
            print("".join(traceback.format_exception(exc.__cause__ or exc)), end="")
            known = {**exc.visit, "error": str(exc)} == failure
            print("the error that ended the run" if known else "not the error that ended the run", flush=True)
        raise
    for visit in found:
        _show(visit)
    if any(visit.same is False for visit in found):
        raise RunError(
            f"the visit has other bits than in the run {runs[0]}: was the code, a library or the processor another "
            "one? summary.json has the versions of a finished run"
        )
    if (failure.get("round"), failure.get("client")) == (number, client):
        raise RunError(f"the error that ended the run did not come again: {failure.get('error')}")


def _whole(key: str, text: str) -> int:
    if not text.isdecimal():
        also = " or 'server'" if key == "client" else ""
        raise ConfigError(f"{key}= takes a whole number{also}, got {text!r}")
    return int(text)


def _show(visit: Replay) -> None:
    from fedsim.report.text import align

    done, r = visit.done, visit.recorded
    who = _who(visit.client)
    loss = f", mean loss {done.loss / done.scored:.4f}" if done.scored else ""
    print(f"round {visit.round}, {who}, phase {visit.phase}: {done.num_examples} examples, {done.steps} steps{loss}")
    rows = []
    for name, now, then in (
        ("entries", visit.entries, r and r.entries),
        ("memory", visit.memory, r and r.memory),
    ):
        said = "not recorded" if then is None else "as recorded"
        rows.append([f"  {name}", now, said if then in (None, now) else f"DIFFERS: {then} was recorded"])
    print(align(rows, left=3))

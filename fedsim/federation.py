"""The handle that a strategy drives: sample, train, dispatch, evaluate, time, randomness.

A strategy sees clients and reduced entries; pieces, workers, memory rows and bytes stay behind this file.
"""

from __future__ import annotations

import functools
import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from fedsim import random, tree
from fedsim.attendance import TRIES, Attendance, Ended, Limits, attend, is_there, select
from fedsim.batching import together
from fedsim.clients.availability import Always, Availability, Trip, trip
from fedsim.clients.participation import Participation
from fedsim.clients.systems import System
from fedsim.clients.visit import ClientOptions
from fedsim.clock import Clock
from fedsim.data import IntArray
from fedsim.engine.base import Done, Engine, EvalTask, Outcome, Score, Task
from fedsim.engine.collector import Collector
from fedsim.errors import ClientError, RunError
from fedsim.evaluation import merge, metrics
from fedsim.flights import Flight, Flights, Snapshot
from fedsim.memory import Memory
from fedsim.network import Network
from fedsim.parts import Block
from fedsim.program import Program
from fedsim.reduce import Reduced, Sized, lane, nbytes
from fedsim.schedule import Schedule, check_hope, drawn
from fedsim.strategy import SERVER, ClientHalf, Strategy
from fedsim.vector import Layout
from fedsim.visits import Record

log = logging.getLogger("fedsim")

Charge = tuple[str, int, int | None]  # name, bytes, digest of the content of a `once` payload
PIECE = 32  # clients in one task, at most
PIECE_BYTES = 128 * 2**20  # parameter vectors in one task, at most: each client may have one to remember
PIECE_S = 0.1  # seconds of work in one task, at least, if there is enough for all workers: each costs milliseconds
EVAL_ROWS = 4_000  # examples in one evaluation task; the order of sums follows from it


@dataclass
class Round:
    """What one round did, for the metrics.

    Attributes:
        bytes_down: Bytes sent to clients.
        bytes_up: Bytes sent by clients.
        clients: Visits.
        failures: Visits that failed; the round went on without them.
        dropouts: Visits whose clients lost their work.
        late: Visits that a deadline or over-selection cut off.
        retries: Visits that were made again because they had failed.
        steps: Local steps.
        examples: Examples processed, repeats counted.
        gradients: Minibatch gradients computed.
        loss: Sum of training losses, phase ``train`` only.
        trained: Number of examples that they are the losses of.
        who: Clients that took part, the server left out.
        visits: What each visit was.
    """

    bytes_down: int = 0
    bytes_up: int = 0
    clients: int = 0
    failures: int = 0
    dropouts: int = 0
    late: int = 0
    retries: int = 0
    steps: int = 0
    examples: int = 0
    gradients: int = 0
    loss: float = 0.0
    trained: int = 0
    who: set[int] = field(default_factory=set)
    visits: list[Record] = field(default_factory=list)


@dataclass(frozen=True)
class Event:
    """Something that happened in virtual time.

    Attributes:
        kind: ``arrival``; ``dropout``: a client has lost its task and can be reached again, or failed and is skipped;
            ``departure``: it has left for good, with its task; or ``timer``.
        time: When, in nanoseconds.
        client: Whom it is about; None for a timer.
        tag: The tag of a timer; None otherwise.
        update: The arrived client's entries, reduced over itself; None otherwise.
        steps: Local steps that it made.
        buffers: Its batch-norm statistics, if those of clients are averaged.
    """

    kind: str
    time: int
    client: int | None = None
    tag: str | int | None = None
    update: Reduced | None = None
    steps: int = 0
    buffers: Tensor | None = None


@dataclass(frozen=True)
class Piece:
    """A task with what the driver books when it is done.

    Attributes:
        task: The task.
        old: The clients' memory rows.
        down: Bytes sent to each client.
        marks: Memory rows that say which `once` payloads each client now has.
    """

    task: Task
    old: list[dict[str, Tensor]]
    down: list[int]
    marks: list[dict[str, Tensor]]


@dataclass
class Federation:
    """A population of clients and a server, between rounds and inside of one.

    Attributes:
        program: Network, data and method.
        engine: Runs client work.
        participation: Who takes part.
        system: How long it takes.
        memory: What clients keep.
        availability: When clients are there.
        limits: What ends a round before all of its clients are back.
        log: Metrics of the method's own for the current round: ``fed.log["name"] = value``.
        round_num: Number of the current round, from 1; 0 in `Strategy.prepare`.
        schedule: The timetable of an event-driven method; a checkpoint holds it.
    """

    program: Program
    engine: Engine
    participation: Participation
    system: System
    memory: Memory
    availability: Availability = field(default_factory=Always)
    limits: Limits = field(default_factory=Limits)
    log: dict[str, Any] = field(default_factory=dict)
    round_num: int = 0
    schedule: Schedule | None = None

    def __post_init__(self) -> None:
        self._clock = Clock()
        self._round = Round()
        self._calls: dict[str, int] = {}
        self._needed: dict[tuple[int, ...], int] = {}  # of a cohort with more clients than are waited for
        self._flights = Flights(max(4 * self.engine.slots, self._most))
        self._latest = Snapshot({})
        self._fruitless = 0  # tasks lost since one came back
        self._digests: dict[str, tuple[Any, int]] = {}
        self._pace: dict[str, float] = {}  # seconds per planned step, by phase, as last measured
        self.buffers = self.program.network.initial_buffers if self.program.network.buffer_layout.d else None

    @cached_property
    def _sizes(self) -> IntArray:
        return self.program.clients.sizes()

    @cached_property
    def _num_examples(self) -> int:
        return int(self._sizes.sum())

    # --- what a strategy asks -------------------------------------------------------------------------

    @property
    def num_clients(self) -> int:
        """Size of the population."""
        return len(self.program.clients)

    @property
    def layout(self) -> Layout:
        """Of the parameter vector."""
        return self.program.layout

    @property
    def module(self) -> nn.Module:
        """A new copy of the network, with its initial weights."""
        return self.program.fresh_module()

    @property
    def blocks(self) -> tuple[Block, ...]:
        """Names of the modules of each of the network's blocks; the last is the head."""
        return self.program.blocks

    def tail(self, first: int) -> Network:
        """The network's blocks from number ``first`` on (from 0) as a network of their own, its weights drawn anew."""
        return self.program.tail(first)

    @property
    def options(self) -> ClientOptions:
        """The ``client`` group: local learning rate, epochs, batch size."""
        return self.program.options

    @property
    def seed(self) -> int:
        """The run's seed."""
        return self.program.seed

    @property
    def now(self) -> int:
        """Virtual time in nanoseconds."""
        return self._clock.now

    def share(self, client: int) -> float:
        """A client's share of all training examples."""
        return int(self._sizes[client]) / self._num_examples

    def generator(self, purpose: str, *index: int | str) -> torch.Generator:
        """A stream of the server's own random numbers for this round."""
        return random.generator(self.seed, purpose, "server", self.round_num, *index)

    def sample(self) -> list[int]:
        """The round's cohort, in id order, of clients that are available; a second call in a round draws another.

        If nobody is available, time passes until somebody is.

        Raises:
            Ended: Nobody will be.
        """
        call = self._count("sample")
        rng = random.numpy_generator(self.seed, "participation", self.round_num, call)
        cohort, needed, since = select(
            self.participation, self.availability, self.limits, self.num_clients, self.now, self.seed, rng
        )
        self._clock.advance(since - self.now)
        self._needed[tuple(cohort)] = needed
        return cohort

    def train(
        self,
        clients: Iterable[int],
        state: Any,
        *,
        half: ClientHalf | None = None,
        send: Mapping[str, Any] | None = None,
        phase: str = "train",
        steps: int | None = None,
        epochs: int | None = None,
        model: Callable[[nn.Module], nn.Module] | None = None,
    ) -> Reduced:
        """One visit of each client, side by side, up to a barrier.

        Args:
            clients: Ids, in any order; `SERVER` is the server itself.
            state: Server state, for `Strategy.broadcast` and `Strategy.unicast`.
            half: A phase's own client half; default: the strategy's.
            send: What goes down, instead of the broadcast.
            phase: Name of the phase; it has its own random streams.
            steps: Local steps instead of the configured work.
            epochs: Local epochs instead of the configured work.
            model: Another build of the network: a function of the module, equal and hashable by value. What
                is sent must fit it.

        Returns:
            The entries of the clients that came back, reduced in an order that does not depend on the engine.

        Raises:
            ClientError: Local training failed.
            RunError: Nobody came back, however often they were asked.
            Ended: Nobody of them can be reached any more.
        """
        cohort = tuple(sorted(int(c) for c in clients))
        self._check_clients(cohort)
        program = self.program if model is None else self.program.variant(model)
        strategy = self.program.strategy
        sent, charges = self._payload(strategy.broadcast(state) if send is None else send, program)
        planned = {client: self._planned(client, steps, epochs, program) for client in cohort}
        cohort, visit, attendance = self._attend(cohort, phase, planned, None if send is not None else state, charges)
        planned = {client: planned[client] for client in cohort}
        handle = self.engine.put(sent)
        waiting: dict[Any, Piece] = {}
        finished: list[tuple[Piece, list[Done], int]] = []
        seconds: list[float] = []

        def take() -> None:
            ticket = self.engine.wait(list(waiting))
            outcome: Outcome = self.engine.result(ticket)
            piece = waiting.pop(ticket)
            self._keep(piece, outcome)
            collector.add(outcome, piece.task.first_leaf)
            seconds.append(outcome.seconds)
            for made in outcome.done:  # a cohort may be large
                made.memory = {}
            slim = replace(piece, old=[], marks=[], task=replace(piece.task, memory=(), unicast={}))
            finished.append((slim, outcome.done, outcome.retries))

        by_epochs = steps is None and (epochs is not None or program.options.epochs is not None)
        hooks = program.hooks if half is None else program.phase_hooks(half)
        groups = together(program, hooks, planned, self._sizes, by_epochs)
        collector = Collector(program, len(groups), [client for group in groups for client in group])
        least = PIECE_S / self._pace.get(phase, PIECE_S)
        work = [sum(planned[client] for client in group) for group in groups]
        for first, end in cut(work, self.engine.slots, least, max(1, self._most // max(map(len, groups)))):
            part = tuple(client for group in groups[first:end] for client in group)
            own = [] if send is not None else self._own(state, part, visit)
            task = Task(
                clients=part,
                visits=(visit,) * len(part),
                sent=handle,
                round_num=self.round_num,
                half=half,
                phase=phase,
                groups=tuple(map(len, groups[first:end])) if len(part) > end - first else (),
                first_leaf=first,
                num_leaves=len(groups),
                steps=steps,
                epochs=epochs,
                model=model,
            )
            piece = self._piece(task, charges, own, program)
            waiting[self.engine.submit(piece.task)] = piece
            if len(waiting) > 2 * self.engine.slots:
                take()
        while waiting:
            take()
        self._pace[phase] = max(sum(seconds), 1e-9) / sum(p + 1 for p in planned.values())
        finished.sort(key=lambda f: f[0].task.first_leaf)  # sums must not depend on who was first
        ends = [self._adopt(*f, planned, attendance) for f in finished]
        close = attendance.close if attendance is not None and attendance.lost else self.now
        self._clock.advance(max(close, *ends) - self.now)
        failed = {c for piece, done, _ in finished for c, d in zip(piece.task.clients, done, strict=True) if d.error}
        if len(failed) == len(cohort):
            raise ClientError(f"round {self.round_num}: all clients failed; {finished[0][1][0].error}")
        cohort = tuple(c for c in cohort if c not in failed)
        reduced, buffers = self._reduced(collector, cohort, program)
        if buffers is not None and self.buffers is not None and phase == "train" and program is self.program:
            self.buffers = buffers.to(self.buffers.dtype)
        return reduced

    def dispatch(self, client: int, state: Any, steps: int | None = None) -> int:
        """Hands a task to one client; it comes back as an event. At most one task per client is under way.

        Args:
            client: Client id.
            state: Server state that it starts from.
            steps: Local steps; default: the configured work.

        Returns:
            When it will be heard of again, in nanoseconds: by the planned steps, and an upload of one parameter
            vector. A client that leaves for good is heard of when it leaves, one that will never be there at once.

        Raises:
            RunError: The network has batch norms whose statistics would be averaged, and no `schedule` says over whom.
        """
        if self.buffers is not None and self.program.options.buffers == "mean" and self.schedule is None:
            raise RunError(
                "this event-driven strategy does not average batch-norm statistics; set client.buffers=local or "
                "frozen, or choose a model without batch norm"
            )
        client = int(client)
        self._check_clients((client,))
        sent, charges = self._payload(self.program.strategy.broadcast(state))
        if not self._latest.is_of(sent):
            self._latest = Snapshot(sent)
        # Counted in the client's memory: what a checkpoint writes must not follow the number of clients ever touched.
        (row,) = self.memory.get((client,))
        visit = int(row.get("task.count", 0)) + 1
        self.memory.put((client,), [{**row, "task.count": torch.tensor(visit)}])
        task = Task((client,), (f"task.{visit}",), sent, self.round_num, steps=steps)
        piece = self._piece(task, charges, self._own(state, (client,), f"task.{visit}"), self.program)
        planned = self._planned(client, steps, None, self.program)
        way = self._trip(client, visit, planned, piece.down[0], self.program)
        down = 0 if way is None else piece.down[0]
        self._round.bytes_down += down
        begin, end, finished = (self.now, self.now, False) if way is None else (way.begin, way.end, way.finished)
        flight = Flight(
            client,
            visit,
            self.round_num,
            steps,
            self._latest if finished else Snapshot({}),  # what gets lost is not trained
            piece.task.unicast if finished else {},
            piece.marks[0],
            down,
            begin,
            end,
            finished,
            gone=way is None or way.back is None,
        )
        self._flights.add(flight)
        if flight.gone:
            log.info("client %d leaves for good at %g virtual seconds", client, end / 1e9)
        heard = end if way is None or way.back is None else way.back
        self._clock.schedule(heard, "arrival", client)
        return heard

    def idle(self) -> int | None:
        """A client without a task, drawn at random among those that are available; None if all are at work.

        If nobody of many that were tried is available, it is one that is not, which may come later.
        """
        assert self.schedule is not None
        self.schedule.draws += 1
        there = functools.partial(is_there, self.availability, now=self.now, seed=self.seed)
        return drawn(self.seed, self.schedule.draws, self.num_clients, self._flights.under_way, there)

    def timer(self, time: int, tag: str | int) -> None:
        """Asks for an event at ``time`` (nanoseconds) with this tag."""
        self._clock.schedule(time, "timer", tag)

    def next_event(self) -> Event:
        """The next event; virtual time moves to it. The order does not depend on real speed.

        Raises:
            RunError: Nothing is under way and no timer is set.
            Ended: No client can be reached any more.
            ClientError: Local training failed.
        """
        if not len(self._clock) and self._flights.under_way:
            raise Ended("no client is available any more")
        for flight in self._flights.due():
            self._submit(flight)
        event = self._clock.pop()
        if event.kind == "timer":
            return Event("timer", event.time, tag=event.key)
        client = int(event.key)
        flight = self._flights.under_way[client]
        if flight.finished and client not in self._flights.tickets:
            self._submit(flight)
        if flight.gone:  # it stays under way: nobody hands it another task
            return replace(self._lose(flight, "dropout"), kind="departure")
        del self._flights.under_way[client]
        if not flight.finished:
            return self._lose(flight, "dropout")
        piece, ticket = self._flights.tickets.pop(client)
        outcome = self.engine.result(ticket)
        self._round.retries += outcome.retries
        done = outcome.done[0]
        if done.error is not None:  # it may be skipped
            log.warning("left out: %s", done.error)
            return self._lose(flight, "failed")
        self._fruitless = 0
        self._keep(piece, outcome)
        self._book(piece, 0, done, flight.begin, flight.end)
        collector = Collector(self.program, 1, (client,))
        collector.add(outcome, 0)
        update, buffers = self._reduced(collector, (client,), self.program)
        return Event("arrival", event.time, client, update=update, steps=done.steps, buffers=buffers)

    def submit_all(self) -> None:
        """Gives the engine all tasks under way, however late they are due."""
        for flight in self._flights.due(every=True):
            self._submit(flight)

    def evaluate(self, state: Any, split: str = "test") -> dict[str, Any]:
        """Scores the global model.

        Args:
            state: Server state.
            split: ``test`` or ``validation`` (the server's own).

        Returns:
            As `fedsim.evaluation.metrics`.
        """
        data = self.program.dataset.test if split == "test" else self.program.server
        if data is None or not len(data):
            raise RunError(
                "there is no validation split: set data.validation" if split != "test" else "the test set is empty"
            )
        handle = self.engine.put(self.payload(state))
        tasks = [
            EvalTask(split, "global", handle, rows=(a, min(a + EVAL_ROWS, len(data))), round_num=self.round_num)
            for a in range(0, len(data), EVAL_ROWS)
        ]
        return metrics(merge(self._run_all(tasks)))

    def evaluate_clients(
        self, state: Any, clients: Sequence[int], mode: str = "global", epochs: int | None = None
    ) -> list[Score]:
        """Scores a model on each client's held-out examples.

        Args:
            state: Server state.
            clients: Client ids.
            mode: ``global``; ``personal`` for the client's own model (`Strategy.personal`); ``finetuned`` for what
                a visit would start from (the global model, with the client's own private parameters and statistics)
                after plain local training, of which nothing is kept.
            epochs: Local epochs of that training.
        """
        handle = self.engine.put(self.payload(state))

        def tasks() -> Iterator[EvalTask]:  # one by one: all clients' rows at once would not fit
            for first in range(0, len(clients), self._most):
                part = tuple(clients[first : first + self._most])
                rows = tuple(self.memory.get(part))
                own = self.unicast(state, part)
                yield EvalTask("heldout", mode, handle, (0, 0), part, rows, own, self.round_num, epochs)

        return self._run_all(tasks())

    # --- the round, for the driver --------------------------------------------------------------------

    def begin_round(self, number: int) -> None:
        """Starts round ``number``: counters and the method's own metrics start anew."""
        self.round_num, self._round, self.log, self._calls, self._needed = number, Round(), {}, {}, {}

    @property
    def done(self) -> Round:
        """What the current round did so far."""
        return self._round

    @property
    def virtual_seconds(self) -> float:
        """Virtual time in seconds."""
        return self._clock.seconds

    def state(self) -> dict[str, Any]:
        """All that a resume needs besides server state and memory; equal payloads under way are kept once."""
        flights, payloads = self._flights.saved()
        out = {"clock": self._clock.state(), "flights": flights, "payloads": payloads, "buffers": self.buffers}
        return out if self.schedule is None else out | {"schedule": self.schedule, "fruitless": self._fruitless}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Goes back to a saved state; tasks that were under way are handed out again."""
        self._clock = Clock.restore(saved["clock"])
        self.buffers, self.schedule = saved["buffers"], saved.get("schedule")
        self._fruitless = saved.get("fruitless", 0)
        self._flights = Flights.restored(self._flights.ahead, saved["flights"], saved["payloads"])

    def payload(self, state: Any) -> dict[str, Any]:
        """What evaluation starts from: the broadcast of ``state``, and the global model if it does not have it."""
        sent = self._payload(self.program.strategy.broadcast(state))[0]
        return {"w": state.w, **sent}

    def unicast(self, state: Any, clients: Sequence[int]) -> dict[str, Any]:
        """What `Strategy.unicast` sends to some clients: for every name a list, one item for each."""
        return _joined(self._own(state, clients, self.round_num))

    def cost_down(self, state: Any, client: int) -> tuple[int, int]:
        """Bytes that a first visit sends to ``client``, and a later one, if what is sent `once` stays the same."""
        sent, charges = self._payload(self.program.strategy.broadcast(state))
        own = self._own(state, (client,), 0)
        task = Task((client,), (0,), sent, 0)
        first = self._piece(task, charges, own, self.program).down[0]
        own_names = own[0].keys() if own else ()
        once = sum(size for name, size, digest in charges if digest is not None and name not in own_names)
        return first, first - once

    # --- inside ---------------------------------------------------------------------------------------

    @property
    def _most(self) -> int:
        """Clients in one task: what is under way must fit into memory, however large the cohort is."""
        return max(1, min(PIECE, PIECE_BYTES // (4 * max(self.layout.d, 1))))

    def _count(self, what: str) -> int:
        call = self._calls.get(what, 0)
        self._calls[what] = call + 1
        return call

    def _check_clients(self, clients: Sequence[int]) -> None:
        if not clients:
            raise RunError(f"round {self.round_num}: no clients to train; the cohort must not be empty")
        for c in clients:
            if c != SERVER and not 0 <= c < self.num_clients:
                raise RunError(f"round {self.round_num}: client {c} does not exist; there are {self.num_clients}")
            if (flight := self._flights.under_way.get(c)) is not None:
                raise RunError(f"client {c} is still at work on its task {flight.visit}; wait for its arrival")
        if len(set(clients)) < len(clients):
            twice = next(c for c in clients if clients.count(c) > 1)
            raise RunError(
                f"round {self.round_num}: client {twice} is in the cohort twice; train it once and give it a weight"
            )

    def _payload(self, named: Mapping[str, Any], program: Program | None = None) -> tuple[dict[str, Any], list[Charge]]:
        """What is sent, and per name its bytes and (for `once`) a digest of its content."""
        program = program or self.program
        if "buffers" in named:
            raise RunError("'buffers' names the network's own statistics; send yours under another name")
        sent = {name: _plain(value) for name, value in named.items()}
        charges = [_charge(name, value, sent[name], program, self._digest) for name, value in named.items()]
        if self.buffers is not None and program is self.program:  # another build has statistics of its own
            sent["buffers"] = self.buffers
            if self.program.options.buffers == "mean":
                charges.append(("buffers", nbytes(self.buffers), None))
        return sent, charges

    def _own(self, state: Any, clients: Sequence[int], visit: int | str) -> list[dict[str, Any]]:
        """What `Strategy.unicast` sends to each of some clients, ``[1, ...]``; empty if it sends nothing.

        Asked client by client: what one gets, to the bit, must not depend on who is in the same task.
        """
        strategy, out = self.program.strategy, []
        for client in clients if type(strategy).unicast is not Strategy.unicast else ():
            with random.torch_seeded(self.seed, "unicast", visit, client):
                out.append(strategy.unicast(state, (client,)))
        if any(own.keys() != out[0].keys() for own in out):
            raise RunError(f"round {self.round_num}: unicast() must send the same names to every client")
        return out

    def _digest(self, name: str, value: Any) -> int:
        """63 bits of the content's hash; computed once for the same object."""
        known = self._digests.get(name)
        if known is None or known[0] is not value:
            known = self._digests[name] = (value, _short_hash(value))
        return known[1]

    def _piece(self, task: Task, charges: list[Charge], own: list[dict[str, Any]], program: Program) -> Piece:
        """Adds the clients' memory and their own payloads to a task, and says what sending it costs.

        Args:
            task: The task.
            charges: Of the broadcast; what a client gets under the same name of its own is not sent twice.
            own: What `Strategy.unicast` returned for each of the task's clients; empty if it sends nothing.
            program: The build of the network that the payloads are for.
        """
        old = self.memory.get(task.clients)
        unicast = _joined(own)
        down, marks = [], []
        for i, (client, row) in enumerate(zip(task.clients, old, strict=True)):
            mine = [
                _charge(name, value, unicast[name][i], program, lambda _, v: _short_hash(v))
                for name, value in (own[i] if own else {}).items()
            ]
            mine += [charge for charge in charges if charge[0] not in unicast]
            new = {f"sent.{n}": torch.tensor(h) for n, _, h in mine if h is not None and not _has(row, n, h)}
            total = sum(size for name, size, h in mine if h is None or f"sent.{name}" in new)
            down.append(0 if client == SERVER else total)
            marks.append(new)
        memory = tuple({k: v for k, v in row.items() if not k.startswith(("sent.", "task."))} for row in old)
        return Piece(replace(task, memory=memory, unicast=unicast), old, down, marks)

    def _submit(self, flight: Flight) -> None:
        """Gives a task under way to the engine."""
        sent = flight.snapshot.at(self.engine)
        task = Task((flight.client,), (f"task.{flight.visit}",), sent, flight.round_num, steps=flight.steps)
        piece = self._piece(task, [], [], self.program)
        task = replace(piece.task, unicast=flight.unicast)
        piece = replace(piece, task=task, marks=[flight.marks], down=[flight.down])
        self._flights.tickets[flight.client] = (piece, self.engine.submit(task))

    def _lose(self, flight: Flight, outcome: str) -> Event:
        """Books a task of which nothing comes back.

        Raises:
            RunError: Nothing has for very long.
        """
        self._miss(flight.client, "train", f"task.{flight.visit}", flight.round_num, flight.down, outcome)
        self._round.visits[-1] = replace(self._round.visits[-1], begin=flight.begin, end=flight.end)
        self._fruitless += 1
        check_hope(self._fruitless, len(self._flights.under_way))
        return Event("dropout", self.now, flight.client)

    def _miss(self, client: int, phase: str, visit: str, round_num: int, down: int, outcome: str) -> None:
        """Counts a visit that brought nothing."""
        counter = {"dropout": "dropouts", "late": "late", "failed": "failures"}[outcome]
        setattr(self._round, counter, getattr(self._round, counter) + 1)
        self._round.visits.append(
            Record(round_num, client, phase, visit, 0, 0, math.nan, down, 0, "", "", self.round_num, outcome=outcome)
        )

    def _trip(
        self, client: int, visit: int | str, steps: int, down: int, program: Program, up: int = -1
    ) -> Trip | None:
        """Where a client is when, if it is given a task now; ``up``: bytes that it sends, if they are known."""
        up = 4 * program.shared_size if up < 0 else up
        return trip(self.system, self.availability, client, visit, self.now, steps, down, up, self.seed)

    def _attend(
        self, cohort: tuple[int, ...], phase: str, planned: Mapping[int, int], state: Any, charges: list[Charge]
    ) -> tuple[tuple[int, ...], int | str, Attendance | None]:
        """Who of a cohort comes back, and the visit's name; those who do not are booked.

        Where all do (always available, no deadline), there is no `Attendance`: nothing has to be known beforehand.

        Args:
            cohort: Who is asked.
            phase: Name of the phase.
            planned: Local steps of each.
            state: Server state for `Strategy.unicast`; None: it is not asked.
            charges: Of the broadcast.
        """
        needed = self._needed.get(cohort, len(cohort))
        sure = isinstance(self.availability, Always) and getattr(self.system, "dropout", 1.0) == 0
        asked = tuple(client for client in cohort if client != SERVER)
        # What other phases take is not known beforehand: they are waited for.
        deadline = self.limits.deadline if phase == "train" else None
        simple = not asked or (sure and deadline is None and needed == len(cohort))
        for _ in range(TRIES):
            call = self._count(f"train.{phase}")
            visit: int | str = self.round_num if call == 0 else f"{self.round_num}.{call}"
            if simple:
                return cohort, visit, None
            down = {}
            for client in asked:
                own = [] if state is None else self._own(state, (client,), visit)
                down[client] = self._piece(Task((client,), (visit,), {}, 0), charges, own, self.program).down[0]
            trips = {client: self._trip(client, visit, planned[client], down[client], self.program) for client in asked}
            found = attend(trips, needed, self.now, deadline, functools.partial(self._lot, visit))
            for client, outcome in sorted(found.lost.items()):
                way = trips[client]
                sent = 0 if way is None or way.begin > found.close else down[client]  # it may not have been there yet
                self._round.bytes_down += sent
                self._miss(client, phase, str(visit), self.round_num, sent, outcome)
                if way is not None:
                    begin, end = min(way.begin, found.close), min(way.end, found.close)
                    self._round.visits[-1] = replace(self._round.visits[-1], begin=begin, end=end)
            if found.back:
                back = tuple(client for client in cohort if client == SERVER or client in set(found.back))
                return back, visit, found
            if not any(trips.values()):
                raise Ended(f"none of the {len(asked)} clients that are asked can be reached any more")
            self._clock.advance(max(found.close - self.now, 1))
        limit = "" if deadline is None else f" within participation.deadline={deadline:g} virtual seconds"
        raise RunError(
            f"round {self.round_num}: nobody of {len(asked)} clients came back{limit}, {TRIES} times in a row; "
            f"{'raise it, or ' if limit else ''}look at availability and system.dropout"
        )

    def _lot(self, visit: int | str, client: int) -> int:
        """Who of several counts that are back at the same time: the lowest."""
        return random.derive(self.seed, "lot", visit, client)

    def _planned(self, client: int, steps: int | None, epochs: int | None, program: Program) -> int:
        """Local steps that a visit is expected to make: what pieces are cut by."""
        if steps is not None:
            return steps
        if client == SERVER:
            n = 0 if program.server is None else len(program.server)
        else:
            n = int(self._sizes[client])
        if epochs is not None:
            return replace(program.options, epochs=epochs, steps=None).planned_steps(n)
        return program.strategy.planned_steps(program.options, n)

    def _keep(self, piece: Piece, outcome: Outcome) -> None:
        """Takes what the clients of a finished piece remember; one that failed keeps what it had."""
        new = [
            (client, {**old, **marks, **done.memory})
            for client, old, marks, done in zip(piece.task.clients, piece.old, piece.marks, outcome.done, strict=True)
            if done.error is None
        ]
        self.memory.put([client for client, _ in new], [row for _, row in new])

    def _adopt(
        self,
        piece: Piece,
        made: list[Done],
        retries: int,
        planned: Mapping[int, int],
        attendance: Attendance | None,
    ) -> int:
        """Books a finished piece: bytes, losses. Returns when its slowest client was back, in nanoseconds."""
        task, latest = piece.task, self.now
        self._round.retries += retries
        self._round.bytes_down += sum(piece.down)
        for i, (client, done) in enumerate(zip(task.clients, made, strict=True)):
            if done.error is not None:
                log.warning("left out: %s", done.error)
                self._miss(client, task.phase, str(task.visits[i]), task.round_num, piece.down[i], "failed")
                way = self._trip(client, task.visits[i], planned[client], piece.down[i], self.program)
                if way is not None:
                    self._round.visits[-1] = replace(self._round.visits[-1], begin=way.begin, end=way.end)
                continue
            way = Trip(self.now, self.now, True, self.now)
            if client != SERVER:  # what was really done counts, and not what was planned
                real = self._trip(client, task.visits[i], done.steps, piece.down[i], self.program, done.bytes_up)
                plan = None if attendance is None else attendance.trips[client]
                way = real if real is not None and real.finished else plan or way
            self._book(piece, i, done, way.begin, way.end)
            latest = max(latest, way.end)
        return latest

    def _book(self, piece: Piece, i: int, done: Done, begin: int, end: int) -> None:
        """Books a visit that came back."""
        task, booked = piece.task, self._round
        client = task.clients[i]
        booked.visits.append(
            Record(
                task.round_num,
                client,
                task.phase,
                str(task.visits[i]),
                done.steps,
                done.examples,
                done.loss / done.scored if done.scored else math.nan,
                piece.down[i],
                done.bytes_up,
                done.entries,
                done.kept,
                self.round_num,
                begin,
                end,
            )
        )
        booked.bytes_up += done.bytes_up
        booked.steps += done.steps
        booked.examples += done.examples
        booked.gradients += done.gradients
        if task.phase == "train":
            booked.trained += done.scored
            booked.loss += done.loss
        if client != SERVER:
            booked.clients += 1
            booked.who.add(client)

    def _reduced(
        self, collector: Collector, cohort: tuple[int, ...], program: Program
    ) -> tuple[Reduced, Tensor | None]:
        """The reduced entries, and the mean of the clients' buffers."""
        values, num_examples = collector.values()
        buffers = values.pop("buffers", None)
        return Reduced(values, program.layout, cohort, self.num_clients, num_examples), buffers

    def _run_all(self, tasks: Iterable[EvalTask]) -> list[Score]:
        scores: list[Score] = []
        waiting: deque[Any] = deque()
        for task in tasks:
            waiting.append(self.engine.submit(task))
            if len(waiting) > 2 * self.engine.slots:
                scores += self.engine.result(waiting.popleft())
        while waiting:
            scores += self.engine.result(waiting.popleft())
        return scores


def cut(planned: Sequence[int], slots: int, least: float = 1, most: int = PIECE) -> list[tuple[int, int]]:
    """Cuts a cohort into ranges of neighbours, those with most work first.

    Bits do not depend on it. For several workers the ranges become smaller towards the end (half of what is left,
    divided among the workers, at a time), so that they end at about one time though speeds differ.

    Args:
        planned: Steps of each client.
        slots: Number of workers.
        least: Steps worth a range of their own, if that leaves none of the workers without work.
        most: Clients in a range, at most.

    Returns:
        Ranges ``(first, end)``.
    """
    work = [p + 1 for p in planned]
    left, ranges, first = sum(work), list[tuple[int, int, int]](), 0
    share: float = left
    while first < len(work):
        if slots > 1 and len(ranges) % slots == 0:
            share = max(left / (2 * slots), min(least, left / slots))
        end, size = first, 0
        while end < len(work) and end - first < most and (size == 0 or size + work[end] / 2 <= share):
            size += work[end]
            end += 1
        ranges.append((size, first, end))
        first, left = end, left - size
    return [(first, end) for _, first, end in sorted(ranges, key=lambda r: (-r[0], r[1]))]


def _joined(own: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """For every name the items of all clients."""
    return {name: [lane(_plain(mine[name]), 0) for mine in own] for name in (own[0] if own else ())}


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Sized) else value


def _charge(name: str, value: Any, plain: Any, program: Program, digest: Callable[[str, Any], int]) -> Charge:
    """What sending ``plain`` costs; ``value`` may say so itself, or that it is charged `once`."""
    size = value.nbytes if isinstance(value, Sized) and value.nbytes is not None else program.nbytes(plain)
    return name, size, digest(name, plain) if isinstance(value, Sized) and value.once else None


def _short_hash(value: Any) -> int:
    return int(tree.sha256(value)[:16], 16) >> 1


def _has(row: Mapping[str, Tensor], name: str, digest: int) -> bool:
    """Whether a client has this content of the payload ``name`` already."""
    held = row.get(f"sent.{name}")
    return held is not None and int(held) == digest

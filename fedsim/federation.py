"""The handle that a strategy drives: sample, train, dispatch, evaluate, time, randomness.

A strategy sees clients and reduced entries; pieces, workers, memory rows and bytes stay behind this file.
"""

from __future__ import annotations

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
from fedsim.batching import together
from fedsim.clients.participation import Participation
from fedsim.clients.systems import System
from fedsim.clients.visit import ClientOptions
from fedsim.clock import Clock
from fedsim.data import IntArray
from fedsim.engine.base import Done, Engine, EvalTask, Outcome, Score, Task
from fedsim.engine.collector import Collector
from fedsim.errors import ClientError, RunError
from fedsim.evaluation import merge, metrics
from fedsim.memory import Memory
from fedsim.network import Network
from fedsim.parts import Block
from fedsim.program import Program
from fedsim.reduce import Reduced, Sized, lane, nbytes
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
        kind: ``arrival`` or ``timer``.
        time: When, in nanoseconds.
        client: Who arrived; None for a timer.
        tag: The tag of a timer; None for an arrival.
        update: The arrived client's entries, reduced over itself; None if it was dispatched without training.
    """

    kind: str
    time: int
    client: int | None = None
    tag: str | int | None = None
    update: Reduced | None = None


@dataclass(frozen=True)
class Flight:
    """A task under way: enough to compute it again after a resume.

    Attributes:
        client: Client id.
        visit: The client's task number.
        round_num: Round in which it was handed out.
        steps: Local steps, or None for the configured work.
        sent: What went down.
        unicast: What went down to this client alone.
        marks: Digests of the `once` payloads that are new to the client, by memory row.
        train: Whether anything is computed.
        down: Bytes that were sent to the client.
    """

    client: int
    visit: int
    round_num: int
    steps: int | None
    sent: dict[str, Any]
    unicast: dict[str, Any]
    marks: dict[str, Tensor]
    train: bool
    down: int


@dataclass(frozen=True)
class Piece:
    """A task with what the driver books when it is done.

    Attributes:
        task: The task.
        old: The clients' memory rows.
        down: Bytes sent to each client.
        marks: Memory rows that say which `once` payloads each client now has.
        charged: Whether the bytes down are in the books already.
    """

    task: Task
    old: list[dict[str, Tensor]]
    down: list[int]
    marks: list[dict[str, Tensor]]
    charged: bool = False


@dataclass
class Federation:
    """A population of clients and a server, between rounds and inside of one.

    Attributes:
        program: Network, data and method.
        engine: Runs client work.
        participation: Who takes part.
        system: How long it takes.
        memory: What clients keep.
        log: Metrics of the method's own for the current round: ``fed.log["name"] = value``.
        round_num: Number of the current round, from 1; 0 in `Strategy.prepare`.
    """

    program: Program
    engine: Engine
    participation: Participation
    system: System
    memory: Memory
    log: dict[str, Any] = field(default_factory=dict)
    round_num: int = 0

    def __post_init__(self) -> None:
        self._clock = Clock()
        self._round = Round()
        self._calls: dict[str, int] = {}
        self._flights: dict[int, Flight] = {}
        self._tickets: dict[int, Any] = {}
        self._digests: dict[str, tuple[Any, int]] = {}
        self._pace: dict[str, float] = {}  # seconds per planned step, by phase, as last measured
        self.buffers = self.program.network.initial_buffers if self.program.network.buffer_layout.d else None

    @cached_property
    def _sizes(self) -> IntArray:
        return self.program.clients.sizes()

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

    def generator(self, purpose: str, *index: int | str) -> torch.Generator:
        """A stream of the server's own random numbers for this round."""
        return random.generator(self.seed, purpose, "server", self.round_num, *index)

    def sample(self) -> list[int]:
        """The round's cohort, in id order; a second call in a round draws another."""
        call = self._count("sample")
        return self.participation.sample(
            self.num_clients, random.numpy_generator(self.seed, "participation", self.round_num, call)
        )

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
            The entries, reduced in an order that does not depend on the engine.

        Raises:
            ClientError: Local training failed.
        """
        cohort = tuple(sorted(int(c) for c in clients))
        self._check_clients(cohort)
        call = self._count(f"train.{phase}")
        visit: int | str = self.round_num if call == 0 else f"{self.round_num}.{call}"
        program = self.program if model is None else self.program.variant(model)
        strategy = self.program.strategy
        sent, charges = self._payload(strategy.broadcast(state) if send is None else send, program)
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

        planned = {client: self._planned(client, steps, epochs, program) for client in cohort}
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
        self._clock.advance(max(self._adopt(*f) for f in finished))
        failed = {c for piece, done, _ in finished for c, d in zip(piece.task.clients, done, strict=True) if d.error}
        if len(failed) == len(cohort):
            raise ClientError(f"round {self.round_num}: all clients failed; {finished[0][1][0].error}")
        cohort = tuple(c for c in cohort if c not in failed)
        return self._reduced(collector, cohort, program, adopt=phase == "train" and program is self.program)

    def dispatch(self, client: int, state: Any, steps: int | None = None, *, train: bool = True) -> int:
        """Hands a task to one client; it arrives as an event. At most one task per client is under way.

        Args:
            client: Client id.
            state: Server state that it starts from.
            steps: Local steps; default: the configured work.
            train: False: only time passes (to simulate a schedule).

        Returns:
            When it will arrive, in nanoseconds: by the planned steps, and an upload of one parameter vector.

        Raises:
            RunError: The network has batch norms whose statistics would be averaged: over whom, at an arrival?
        """
        if self.buffers is not None and train and self.program.options.buffers == "mean":
            raise RunError(
                "event-driven strategies do not average batch-norm statistics; set client.buffers=local or frozen, "
                "or choose a model without batch norm"
            )
        client = int(client)
        self._check_clients((client,))
        strategy = self.program.strategy
        sent, charges = self._payload(strategy.broadcast(state))
        # Counted in the client's memory: what a checkpoint writes must not follow the number of clients ever touched.
        (row,) = self.memory.get((client,))
        visit = int(row.get("task.count", 0)) + 1
        self.memory.put((client,), [{**row, "task.count": torch.tensor(visit)}])
        task = Task((client,), (f"task.{visit}",), sent, self.round_num, steps=steps)
        piece = self._piece(task, charges, self._own(state, (client,), f"task.{visit}"), self.program)
        planned = self._planned(client, steps, None, self.program)
        bytes_up = 4 * self.program.shared_size
        arrival = self.now + self.system.duration_ns(client, visit, planned, piece.down[0], bytes_up, self.seed)
        self._round.bytes_down += piece.down[0]
        down = piece.down[0]
        self._launch(
            Flight(client, visit, self.round_num, steps, sent, piece.task.unicast, piece.marks[0], train, down)
        )
        self._clock.schedule(arrival, "arrival", client)
        return arrival

    def timer(self, time: int, tag: str | int) -> None:
        """Asks for an event at ``time`` (nanoseconds) with this tag."""
        self._clock.schedule(time, "timer", tag)

    def next_event(self) -> Event:
        """The next arrival or timer; virtual time moves to it. The order does not depend on real speed.

        Raises:
            RunError: Nothing is under way and no timer is set.
        """
        event = self._clock.pop()
        if event.kind == "timer":
            return Event("timer", event.time, tag=event.key)
        client = int(event.key)
        flight = self._flights.pop(client)
        if not flight.train:
            return Event("arrival", event.time, client)
        piece, ticket = self._tickets.pop(client)
        outcome = self.engine.result(ticket)
        if (error := outcome.done[0].error) is not None:
            raise ClientError(f"{error} (an event-driven strategy cannot go on without it)").of(
                flight.round_num, client, "train", f"task.{flight.visit}"
            )
        self._keep(piece, outcome)
        self._adopt(piece, outcome.done, outcome.retries)
        collector = Collector(self.program, 1, (client,))
        collector.add(outcome, 0)
        return Event("arrival", event.time, client, update=self._reduced(collector, (client,), self.program, False))

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
        self.round_num, self._round, self.log, self._calls = number, Round(), {}, {}

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
        payloads: list[dict[str, Any]] = []
        hashes: dict[tuple[tuple[str, int], ...], str] = {}
        places: dict[str, int] = {}
        flights = []
        for f in self._flights.values():
            same = tuple((name, id(value)) for name, value in f.sent.items())
            if same not in hashes:
                hashes[same] = tree.sha256(f.sent)
            # By content, not by identity: after a resume equal payloads are other objects, and hashes must not change.
            if (place := places.setdefault(hashes[same], len(payloads))) == len(payloads):
                payloads.append(f.sent)
            flights.append((f.client, f.visit, f.round_num, f.steps, place, f.unicast, f.marks, f.train, f.down))
        return {
            "clock": self._clock.state(),
            "flights": flights,
            "payloads": payloads,
            "buffers": self.buffers,
        }

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Goes back to a saved state; tasks that were under way are handed out again."""
        self._clock = Clock.restore(saved["clock"])
        self.buffers = saved["buffers"]
        self._flights, self._tickets = {}, {}
        for client, visit, round_num, steps, place, *rest in saved["flights"]:
            self._launch(Flight(client, visit, round_num, steps, saved["payloads"][place], *rest))

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
            if c in self._flights:
                raise RunError(
                    f"client {c} is still at work on its task {self._flights[c].visit}; wait for its arrival"
                )
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

    def _launch(self, flight: Flight) -> None:
        self._flights[flight.client] = flight
        if flight.train:
            sent = self.engine.put(flight.sent)
            task = Task((flight.client,), (f"task.{flight.visit}",), sent, flight.round_num, steps=flight.steps)
            piece = self._piece(task, [], [], self.program)
            task = replace(piece.task, unicast=flight.unicast)
            piece = replace(piece, task=task, marks=[flight.marks], down=[flight.down], charged=True)
            self._tickets[flight.client] = (piece, self.engine.submit(piece.task))

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

    def _adopt(self, piece: Piece, made: list[Done], retries: int) -> int:
        """Books a finished piece: bytes, losses. Returns how long its slowest client took, in nanoseconds."""
        task, booked, slowest = piece.task, self._round, 0
        booked.retries += retries
        booked.bytes_down += 0 if piece.charged else sum(piece.down)
        for i, (client, done) in enumerate(zip(task.clients, made, strict=True)):
            if done.error is not None:
                log.warning("left out: %s", done.error)
                booked.failures += 1
                continue
            booked.visits.append(self._record(piece, i, done))
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
                took = self.system.duration_ns(
                    client, self.round_num, done.steps, piece.down[i], done.bytes_up, self.seed
                )
                slowest = max(slowest, took)
        return slowest

    def _record(self, piece: Piece, i: int, done: Done) -> Record:
        task = piece.task
        return Record(
            task.round_num,
            task.clients[i],
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
        )

    def _reduced(self, collector: Collector, cohort: tuple[int, ...], program: Program, adopt: bool) -> Reduced:
        """The reduced entries; ``adopt``: the mean of the clients' buffers becomes the federation's."""
        values, num_examples = collector.values()
        if (buffers := values.pop("buffers", None)) is not None and self.buffers is not None and adopt:
            self.buffers = buffers.to(self.buffers.dtype)
        return Reduced(values, program.layout, cohort, self.num_clients, num_examples)

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

"""FedCompass: clients get as many local steps as let them come back together.

Source: Li et al., 2024 (ICLR), https://arxiv.org/abs/2309.14675. The body of the paper was not at hand: this follows
its abstract and figures, and the behaviour of the official code (https://github.com/APPFL/FedCompass).

The server measures every client's seconds per local step and gives it a number of steps with which it comes back at
the time of an *arrival group*; a group's updates are aggregated at once when all are back, or at its latest time.
Nobody waits for a straggler: what comes later is kept for the next aggregation, and its client goes on at once.

Departures:
    1. The first task has `q_min` steps, as in the paper's figure; the official code gives `q_max` (``q_init=max``).
    2. Stale updates weigh less, (1 + staleness)^-a. The official stand-alone code has the opposite sign of the
       exponent; its successor has this one.
    3. All late updates are kept. The official code keeps them by client, so that a second one replaces the first, and
       one in a group that of the same client before (``buffer=overwrite``).
    4. A new group is aimed at the latest time of another one, as in the official code; the paper's figure agrees with
       the expected time (``create_ref=expected``).
    5. A group is waited for 1.2 times as long as expected, and clients count by their examples. The official code has
       1.5, and its newer version counts all clients alike (``lam=1.5 weights=equal``).
    6. A client that loses its work leaves its group and gets another task as soon as it can be reached; the paper
       knows no such clients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedsim.asynchronous import Asynchronous, AsyncState, Terms, check_discount, discount, moved
from fedsim.clients.local import Local
from fedsim.clients.visit import ClientOptions
from fedsim.clock import ns
from fedsim.federation import Federation
from fedsim.reduce import Reduced
from fedsim.schedule import Plan, Schedule
from fedsim.strategy import Info, require

FIRST, LATE = -1, 0
"""Groups of sums besides the arrival groups 1, 2, ...: of a client's first contribution, and of late ones."""


@dataclass(slots=True)
class Device:
    """What the server knows of a client.

    Attributes:
        speed: Estimated seconds per local step, S_i; 0: not measured yet.
        steps: Local steps of its task, Q_i.
        sent: When the task was handed out, nanoseconds.
        group: Its arrival group; 0: none.
    """

    speed: float = 0.0
    steps: int = 0
    sent: int = 0
    group: int = 0


@dataclass(slots=True)
class Group:
    """Clients that are to come back together.

    Attributes:
        expected: When, nanoseconds.
        latest: Until when they are waited for, nanoseconds.
        pending: Members at work.
        arrived: Members that wait for the others.
        fastest: Least seconds per step of all members; 0: to be looked up.
    """

    expected: int
    latest: int
    pending: set[int] = field(default_factory=set)
    arrived: list[int] = field(default_factory=list)
    fastest: float = 0.0


@dataclass
class CompassSchedule(Schedule):
    """FedCompass without its tensors.

    Attributes:
        q_init: Local steps of the first task.
        q_min: Fewest local steps of a task.
        q_max: Most.
        latest: Lambda: a group is waited for that many times as long as it is expected to take.
        rho: Weight of a new measurement of a client's speed.
        create_ref: What a new group is aimed at: ``latest`` or ``expected`` time of another, and its next turn.
        overwrite: Whether a client's late update replaces its earlier one.
        devices: What is known of the clients.
        groups: Arrival groups by number, until they are aggregated or their latest time is over. Who comes back and
            finds its group gone is late.
        made: Number of groups made so far.
    """

    q_init: int = 20
    q_min: int = 20
    q_max: int = 100
    latest: float = 1.2
    rho: float = 0.9
    create_ref: str = "latest"
    overwrite: bool = False
    devices: dict[int, Device] = field(default_factory=dict)
    groups: dict[int, Group] = field(default_factory=dict)
    made: int = 0

    def begin(self, num_clients: int) -> Plan:
        """All clients get the first task."""
        self.devices = {i: Device(steps=self.q_init) for i in range(num_clients)}
        return Plan(send=[(i, self.q_init) for i in range(num_clients)])

    def arrival(self, client: int, now: int) -> Plan:
        """See `Schedule.arrival`."""
        device = self.devices[client]
        self._measure(device, now)
        if not device.group:  # its first contribution is aggregated alone
            plan = Plan(fold=FIRST, use=(FIRST,))
            self._assign((client,), now, plan)
            return plan
        group = self.groups.get(device.group)
        if group is None:
            plan = self._keep_late(client)
            self._assign((client,), now, plan)
            return plan
        group.pending.remove(client)
        group.arrived.append(client)
        plan = Plan(fold=device.group)
        if not group.pending:
            self._aggregate(device.group, now, plan)
        return plan

    def dropout(self, client: int, now: int) -> Plan:
        """See `Schedule.dropout`."""
        device = self.devices[client]
        if not device.speed:  # its speed is still not known
            device.sent = now
            return Plan(send=[(client, self.q_init)])
        return self._without(client, now, (client,))

    def gone(self, client: int, now: int) -> Plan:
        """See `Schedule.gone`: its group does not wait for it."""
        return self._without(client, now, ())

    def _without(self, client: int, now: int, again: Sequence[int]) -> Plan:
        """Takes a client out of its group, which may be complete without it; ``again``: who else gets a task."""
        device, plan = self.devices[client], Plan()
        group = self.groups.get(device.group)
        if group is not None:
            group.pending.remove(client)
            if group.fastest == device.speed:
                group.fastest = 0.0
            if not group.pending and group.arrived:
                self._aggregate(device.group, now, plan, *again)
                return plan
            if not group.pending:
                del self.groups[device.group]
        self._assign(again, now, plan)
        return plan

    def timer(self, tag: int, now: int) -> Plan:
        """A group's latest time has come: it is aggregated, or over if nobody is back."""
        plan, group = Plan(), self.groups.get(tag)
        if group is not None and group.arrived:
            self._aggregate(tag, now, plan)
        elif group is not None:
            del self.groups[tag]
        return plan

    def _measure(self, device: Device, now: int) -> None:
        seconds = max(now - device.sent, 1) / 1e9 / device.steps  # never 0, which means that it is not known
        before, group = device.speed, self.groups.get(device.group)
        device.speed = (1 - self.rho) * before + self.rho * seconds if before else seconds
        if group is not None and before == group.fastest:
            group.fastest = 0.0
        elif group is not None and group.fastest:
            group.fastest = min(group.fastest, device.speed)

    def _keep_late(self, client: int) -> Plan:
        if not self.overwrite:
            return Plan(fold=LATE)
        own = LATE - 2 - client  # a group of its own, so that it can be replaced
        return Plan(fold=own, drop=(own,))

    def _aggregate(self, number: int, now: int, plan: Plan, *more: int) -> None:
        """Ends a group: its sums and all late ones are used, and its members, and ``more``, get new tasks."""
        group = self.groups.pop(number)
        late = [name for name in self.held if name <= LATE]
        replaced = [LATE - 2 - client for client in group.arrived] if self.overwrite else []
        plan.drop = tuple(name for name in late if name in replaced)
        plan.use = (*(name for name in late if name not in replaced), number)
        self._assign((*group.arrived, *more), now, plan)

    def _assign(self, clients: Sequence[int], now: int, plan: Plan) -> None:
        """New tasks, the fastest client's first: slower ones join its group where they can."""
        for client in sorted(clients, key=lambda i: (self.devices[i].speed, i)):
            device = self.devices[client]
            device.sent = now
            if not self._join(client, device, now):
                self._create(client, device, now, plan)
            plan.send.append((client, device.steps))

    def _join(self, client: int, device: Device, now: int) -> bool:
        best = (0, 0)
        for number, group in self.groups.items():
            steps = _floor((group.expected - now) / 1e9 / device.speed)
            if self.q_min <= steps <= self.q_max:
                best = max(best, (steps, number))  # of equal ones the newest
        if best == (0, 0):
            return False
        device.steps, device.group = best
        group = self.groups[device.group]
        group.pending.add(client)
        if group.fastest:
            group.fastest = min(group.fastest, device.speed)
        return True

    def _create(self, client: int, device: Device, now: int, plan: Plan) -> None:
        kept = []
        for group in self.groups.values():
            if now == group.latest:  # its timer is due
                continue
            if not group.fastest:
                group.fastest = min(self.devices[i].speed for i in (*group.pending, *group.arrived))
            aim = group.latest if self.create_ref == "latest" else group.expected
            again = (aim - now) / 1e9 + group.fastest * self.q_max  # when its fastest member is next back
            kept.append(_floor(again / device.speed))
        kept = [steps for steps in kept if steps <= self.q_max]
        device.steps = max(self.q_min, max(kept)) if kept else self.q_max
        self.made += 1
        device.group = self.made
        seconds = device.steps * device.speed
        group = Group(now + ns(seconds), now + ns(self.latest * seconds), {client}, [], device.speed)
        self.groups[self.made] = group
        plan.timers.append((group.latest, self.made))


def _floor(steps: float) -> int:
    return math.floor(steps + 1e-9)  # 0.3 / 0.1 is 2.99... in floating point


CHOICES = {
    "q_init": ("min", "max"),
    "weights": ("examples", "equal"),
    "create_ref": ("latest", "expected"),
    "buffer": ("list", "overwrite"),
}


@dataclass(frozen=True)
class CompassState(AsyncState):
    """What the server carries.

    Attributes:
        m: Momentum of group aggregations, ``[d]`` float64; None without.
    """

    m: Tensor | None = None


@dataclass(frozen=True)
class FedCompass(Asynchronous):
    """Semi-asynchronous federated learning with a scheduler that knows how fast clients are.

    Attributes:
        q_min: Fewest local steps of a task, >= 1.
        q_max: Most local steps of a task, >= ``q_min``.
        q_init: Steps of a client's first task: ``min`` (``q_min``) or ``max`` (``q_max``).
        lam: How much longer than expected a group is waited for, as a factor >= 1.
        rho: Weight of a new measurement of a client's speed, in (0, 1].
        alpha: Server step, in (0, 1].
        staleness: ``polynomial``, ``hinge`` or ``constant``: how stale updates are weighted.
        a: How fast that weight falls, >= 0.
        b: Where the hinge is, >= 0.
        weights: ``examples`` (a client's share of all training examples) or ``equal`` (1 of the number of clients).
        create_ref: What a new group is aimed at: the ``latest`` or the ``expected`` time of an existing one.
        buffer: ``list`` keeps all late updates; ``overwrite`` only each client's newest, as the official code.
        normalized: Divides updates by their numbers of steps, and multiplies the sum by the weighted mean of these.
        momentum: Of the server, on aggregations of groups, in [0, 1).
        lr_decay: Factor on a client's learning rate for every ``q_max`` local steps that it has made in earlier tasks,
            in (0, 1].
    """

    exempt: ClassVar = Asynchronous.exempt | {
        "one_full_batch_step_is_gradient_descent": "a task has q_min local steps, and the server takes alpha of it"
    }
    quick: ClassVar = {"q_min": 2, "q_max": 10}
    unused: ClassVar = Asynchronous.unused | dict.fromkeys(
        ("client.epochs", "client.steps"), "the scheduler gives every task its number of steps"
    )

    q_min: int = 20
    q_max: int = 100
    q_init: str = "min"
    lam: float = 1.2
    rho: float = 0.9
    alpha: float = 0.9
    staleness: str = "polynomial"
    a: float = 0.5
    b: float = 4.0
    weights: str = "examples"
    create_ref: str = "latest"
    buffer: str = "list"
    normalized: bool = False
    momentum: float = 0.0
    lr_decay: float = 1.0

    def check(self) -> None:
        """See `ClientHalf.check`."""
        require(self.q_min >= 1, "strategy.q_min", ">= 1", self.q_min)
        require(
            self.q_min <= self.q_max,
            "strategy.q_min",
            f"<= strategy.q_max={self.q_max}: a task has between the two numbers of local steps",
            self.q_min,
        )
        require(self.lam >= 1, "strategy.lam", ">= 1: a group cannot be given up before it is expected", self.lam)
        require(0 < self.rho <= 1, "strategy.rho", "in (0, 1]", self.rho)
        require(0 < self.alpha <= 1, "strategy.alpha", "in (0, 1]", self.alpha)
        require(0 <= self.momentum < 1, "strategy.momentum", "in [0, 1)", self.momentum)
        require(0 < self.lr_decay <= 1, "strategy.lr_decay", "in (0, 1]", self.lr_decay)
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            require(value in choices, f"strategy.{name}", f"one of {', '.join(choices)}", value)
        check_discount(self.staleness, self.a, self.b)

    def timetable(self, num_clients: int) -> CompassSchedule:
        """See `Asynchronous.timetable`."""
        return CompassSchedule(
            q_init=self.q_min if self.q_init == "min" else self.q_max,
            q_min=self.q_min,
            q_max=self.q_max,
            latest=self.lam,
            rho=self.rho,
            create_ref=self.create_ref,
            overwrite=self.buffer == "overwrite",
        )

    def planned_steps(self, options: ClientOptions, n: int) -> int:
        """See `Strategy.planned_steps`: those of a fast client, which a dry run counts."""
        return self.q_max

    def init(self, info: Info, w: Tensor) -> CompassState:
        """See `Strategy.init`."""
        return CompassState(w, m=torch.zeros_like(w, dtype=torch.float64) if self.momentum else None)

    def schedule(self, local: Local) -> dict[str, Any]:
        """The learning rate of a task follows from the client's steps before it."""
        if self.lr_decay == 1:
            return {}
        made = local.scratch.setdefault("made", local.step)
        return {"lr": self.lr_decay ** (made // self.q_max)}

    def terms(self, fed: Federation, update: Reduced, steps: int) -> Terms:
        """p_i times the update; with ``normalized`` per step, and what the mean number of steps is made of."""
        share = 1 / fed.num_clients if self.weights == "equal" else fed.share(update.clients[0])
        if not self.normalized:
            return {"delta": share * update["delta"]}
        return {"delta": share / steps * update["delta"], "steps": share * steps, "weight": share}

    def merge(self, state: CompassState, sums: Sequence[tuple[int, Terms]], groups: tuple[int, ...]) -> CompassState:
        """A step along the discounted sum of what is aggregated."""
        step = torch.zeros_like(state.w, dtype=torch.float64)
        for staleness, terms in sums:
            step += self.alpha * discount(self.staleness, self.a, self.b, staleness) * terms["delta"]
        if self.normalized:
            step *= sum(terms["steps"] for _, terms in sums) / sum(terms["weight"] for _, terms in sums)
        if state.m is None or groups == (FIRST,):
            return replace(state, w=moved(state.w, step))
        m = self.momentum * state.m + step
        return replace(state, w=moved(state.w, m), m=m)

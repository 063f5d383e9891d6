"""What passes between the federation and an engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Protocol

from torch import Tensor, nn

from fedsim.errors import ClientError
from fedsim.reduce import Node
from fedsim.strategy import ClientHalf

Rows = dict[str, Tensor]  # one client's memory by qualified name


@dataclass(frozen=True)
class Task:
    """A piece of a cohort to train.

    Attributes:
        clients: Client ids, in order.
        visits: What tells each client's visits apart: the round (``3``, the second time ``"3.1"``), or the client's
            task (``"task.5"``).
        sent: Handle of the broadcast payload (`Engine.put`).
        round_num: Number of the round.
        memory: Each client's memory rows.
        unicast: Payload for these clients only: for every name a list, one item for each.
        half: The half of a phase; None: the strategy's own.
        phase: ``train`` or the name of a phase.
        groups: How many of the clients, one group after the other, are trained together; together they are one leaf
            of the reduction tree. Empty: each client alone.
        first_leaf: Place of the first group in the reduction tree.
        num_leaves: Size of the reduction tree.
        steps: Local steps instead of the configured work.
        epochs: Local epochs instead of the configured work.
        model: Another build of the network: a function of the module, equal and hashable by value.
    """

    clients: tuple[int, ...]
    visits: tuple[int | str, ...]
    sent: Any
    round_num: int
    memory: tuple[Rows, ...] = ()
    unicast: dict[str, Any] = field(default_factory=dict)
    half: ClientHalf | None = None
    phase: str = "train"
    groups: tuple[int, ...] = ()
    first_leaf: int = 0
    num_leaves: int = 1
    steps: int | None = None
    epochs: int | None = None
    model: Callable[[nn.Module], nn.Module] | None = None

    def spans(self) -> list[tuple[int, int]]:
        """Places ``(first, end)`` of each group in ``clients``."""
        ends = list(accumulate(self.groups or [1] * len(self.clients)))
        return list(zip([0, *ends], ends, strict=False))


@dataclass
class Done:
    """One client's visit, as it is booked.

    Attributes:
        memory: The client's new memory rows.
        bytes_up: Bytes that it is charged.
        steps: Local steps.
        examples: Examples processed, repeats counted.
        gradients: Minibatch gradients computed.
        scored: Those of them whose training loss was computed.
        loss: Sum of these losses.
        num_examples: Its training examples.
        entries: Fingerprint of what it sent (`fedsim.tree.fingerprint`).
        kept: Fingerprint of its new memory rows.
        error: Why the visit failed, if it did and the rest of the cohort goes on; all else is then empty.
    """

    memory: Rows = field(default_factory=dict)
    bytes_up: int = 0
    steps: int = 0
    examples: int = 0
    gradients: int = 0
    scored: int = 0
    loss: float = 0.0
    num_examples: int = 0
    entries: str = ""
    kept: str = ""
    error: str | None = None


@dataclass
class Outcome:
    """What a piece of a cohort sends back.

    Attributes:
        kinds: Reduction of every entry; empty if every visit failed.
        nodes: Partial sums of the reduction tree, by entry.
        rows: Rows of every ``stack`` or ``concat`` entry, one item per client whose visit did not fail.
        done: Each client's visit, in the order of the task.
        retries: Visits that were made again because they had failed.
        seconds: How long the work took.
        shapes: Shapes of every entry but those of ``concat``.
    """

    kinds: dict[str, str] = field(default_factory=dict)
    nodes: dict[str, dict[Node, tuple[Tensor, ...]]] = field(default_factory=dict)
    rows: dict[str, Any] = field(default_factory=dict)
    done: list[Done] = field(default_factory=list)
    retries: int = 0
    seconds: float = 0.0
    shapes: dict[str, list[tuple[int, ...]]] = field(default_factory=dict)

    def match(self, kinds: dict[str, str], shapes: dict[str, list[tuple[int, ...]]]) -> None:
        """Takes the entries of another client, or piece, to be like those so far; the first ones say how they are.

        Raises:
            ClientError: They are not.
        """
        if self.kinds and kinds and self.kinds != kinds:
            raise ClientError(
                f"some clients sent the entries {self.kinds}, others {kinds}; finish() must return the same names and "
                "reductions for every client"
            )
        for name, found in shapes.items():
            if self.shapes.get(name, found) != found:
                raise ClientError(
                    f"entry '{name}': clients sent shapes {self.shapes[name]} and {found} (value and weight) under one "
                    "name; they must be equal"
                )
        self.kinds, self.shapes = self.kinds or kinds, self.shapes or shapes


@dataclass(frozen=True)
class EvalTask:
    """Examples to score: a range of the server's test or validation split, or clients' own examples.

    Attributes:
        split: ``test``, ``validation``, or ``heldout`` (of ``clients``).
        mode: ``global``, ``personal`` or ``finetuned``.
        sent: Handle of the broadcast payload.
        rows: Range of the split, for ``test`` and ``validation``.
        clients: Client ids, for ``heldout``.
        memory: Each client's memory rows.
        unicast: Payload for these clients only.
        round_num: Number of the round.
        epochs: Local epochs before ``finetuned`` models are scored.
    """

    split: str
    mode: str
    sent: Any
    rows: tuple[int, int] = (0, 0)
    clients: tuple[int, ...] = ()
    memory: tuple[Rows, ...] = ()
    unicast: dict[str, Any] = field(default_factory=dict)
    round_num: int = 0
    epochs: int | None = None


@dataclass(frozen=True)
class Score:
    """Sums over scored examples.

    Attributes:
        count: Number of examples.
        loss: Sum of their losses.
        confusion: Row: true class, column: predicted; int64 ``[K, K]``; empty for regression.
    """

    count: int
    loss: float
    confusion: Tensor


class Engine(Protocol):
    """Runs tasks. Tickets are hashable, and may be redeemed in any order; a ticket is redeemed once."""

    #: How many tasks run side by side.
    slots: int
    #: How often work was done again because a worker was lost, so far.
    retries: int

    def put(self, payload: dict[str, Any]) -> Any:
        """Makes a payload available to all workers; returns a handle for `Task.sent`."""
        ...

    def submit(self, task: Task | EvalTask) -> Any:
        """Takes a task; returns a ticket."""
        ...

    def wait(self, tickets: Sequence[Any]) -> Any:
        """The first of these tickets whose task is done; waits until one is."""
        ...

    def result(self, ticket: Any) -> Any:
        """Waits for a task: an `Outcome`, or a list of `Score` (one per client or range).

        Raises:
            ClientError: Local training failed.
        """
        ...

    def close(self) -> None:
        """Ends all workers."""
        ...

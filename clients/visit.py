"""A client's visit as data: what was asked, what the client remembers and was sent, where its streams stand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fedsim.clients.optimizers import Optimizer
from fedsim.strategy import require


@dataclass(frozen=True)
class ClientOptions:
    """The ``client`` config group.

    Attributes:
        optimizer: The local optimizer.
        lr: Learning rate, > 0.
        epochs: Passes over the client's data per visit; None with ``steps``.
        steps: Minibatch steps per visit; None with ``epochs``.
        batch_size: Examples per step; None: all of a client's examples.
        lr_decay: Factor on ``lr`` per round, > 0.
        clip_norm: Bound on the norm of a step's direction, or None.
        keep_optimizer: Whether a client's optimizer state survives between visits.
        drop_last: Whether an epoch's last, partial batch is left out (never if it is the only one).
        buffers: Policy for floating-point buffers: ``mean``, ``local`` or ``frozen``.
        augment: Augmentations by name, applied to each batch.
        batching: Clients that are trained together, at most.
        precision: Of matrix products and convolutions: ``fp32``, ``bf16`` or ``tf32``.
    """

    optimizer: Optimizer
    lr: float
    epochs: int | None = 1
    steps: int | None = None
    batch_size: int | None = 32
    lr_decay: float = 1.0
    clip_norm: float | None = None
    keep_optimizer: bool = False
    drop_last: bool = False
    buffers: str = "mean"
    augment: tuple[str, ...] = ()
    batching: int = 1
    precision: str = "fp32"

    def __post_init__(self) -> None:
        require(
            (self.epochs is None) != (self.steps is None),
            "client.epochs and client.steps",
            "exactly one number and one null",
            (self.epochs, self.steps),
        )
        require(self.buffers in ("mean", "local", "frozen"), "client.buffers", "mean, local or frozen", self.buffers)

    def planned_steps(self, n: int) -> int:
        """Steps of a visit with ``n`` examples."""
        if self.steps is not None:
            return self.steps if n else 0
        assert self.epochs is not None
        size = min(self.batch_size or n, n) or 1
        return self.epochs * (max(n // size, 1) if self.drop_last else -(-n // size)) if n else 0


@dataclass
class Stream:
    """A data order with its optimizer state.

    Attributes:
        steps: Steps made.
        epoch: Epochs finished.
        offset: Examples of the current epoch that were used.
        order: The current epoch's examples, ``[n]``, or None before it is drawn.
        repeats: Whether the order has numbers of n and more, which are examples over again.
        weight: Their weights, ``[n]``, or None.
        optimizer: The optimizer's tensors.
    """

    steps: int = 0
    epoch: int = 0
    offset: int = 0
    order: Tensor | None = None
    repeats: bool = False
    weight: Tensor | None = None
    optimizer: dict[str, Tensor] | None = None


class Memory:
    """``local.memory``: what a client keeps, by name, ``[1, ...]`` each. Assign to change; never in place."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        object.__setattr__(self, "_values", values)

    def __getattr__(self, name: str) -> Tensor:
        values: dict[str, Tensor] = object.__getattribute__(self, "_values")
        if name not in values:
            raise AttributeError(
                f"memory has no '{name}'; it holds: {', '.join(values) or 'nothing'} (see the `memory` hook)"
            )
        return values[name]

    def __setattr__(self, name: str, value: Tensor) -> None:
        values: dict[str, Tensor] = object.__getattribute__(self, "_values")
        values[name] = value

    def __contains__(self, name: str) -> bool:
        return name in self._values


class Sent:
    """``local.sent``: what came down, by name; tensors have the client axis first."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.__dict__.update(values)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"nothing called '{name}' was sent; broadcast and unicast sent: {', '.join(self.__dict__)}"
        )


@dataclass
class Stats:
    """What a visit did.

    Attributes:
        steps: Steps made.
        examples: Examples used, repeats counted.
        gradients: Gradients computed, each of one minibatch; a method may take several per step.
        scored: Those of them whose training loss is known.
        loss: Sum of these losses.
    """

    steps: int = 0
    examples: int = 0
    gradients: int = 0
    scored: int = 0
    loss: float = 0.0


@dataclass
class Visit:
    """Who, when and with what: the facts of a visit that `Local` is built from.

    Attributes:
        client: Client id, or `SERVER`.
        round_num: 0 before the first round.
        phase: ``train`` or the name of a phase.
        visit: Number of the visit, for random streams.
        mode: ``train``, ``global`` or ``personal``.
        steps: Overrides the configured number of steps.
        epochs: Overrides the configured number of epochs.
        memory: The client's rows, by qualified name (``strategy.h``, ``stream.train``).
        part: Which of the client's examples: ``train``, or ``none`` for the server's own evaluation, which
            has no memory either.
    """

    client: int
    round_num: int
    phase: str
    visit: int | str
    mode: str = "train"
    steps: int | None = None
    epochs: int | None = None
    memory: dict[str, Tensor] = field(default_factory=dict)
    part: str = "train"

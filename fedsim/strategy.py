"""The contracts of a method: its client half, its server half, and what the server knows.

A method is a frozen dataclass of hyper-parameters. It overrides the hooks that its paper changes and
inherits the rest, which together are FedAvg without its server step. On the client side every tensor
carries the client axis first: ``w`` is ``[C, d]``, batches are ``[C, B, ...]``, losses ``[C, B]``, a
number of a client ``[C, 1]``; C is 1 when clients run one by one.
"""

from __future__ import annotations

import inspect
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from fedsim import random
from fedsim.errors import ConfigError
from fedsim.errors import require as require
from fedsim.reduce import Entry, Reduced, mean
from fedsim.vector import Layout

if TYPE_CHECKING:
    from fedsim.clients.batch import Batch
    from fedsim.clients.local import Local
    from fedsim.clients.visit import ClientOptions
    from fedsim.federation import Federation
    from fedsim.network import Network

SERVER = -1
"""The client whose data is the server's own split and whose visits cost no bytes."""


class Model(Protocol):
    """The network at some point: a function of inputs ``[C, B, ...]``."""

    def __call__(self, x: Any) -> Any: ...

    def blocks(self, x: Any) -> tuple[Any, ...]:
        """The outputs of all blocks (`fedsim.parts.blocks_of`), ``[C, B, ...]`` each; the last are the logits."""
        ...

    @property
    def views(self) -> dict[str, Tensor]:
        """The parameters at that point, by name, ``[C, *shape]``."""
        ...


class Grad(Protocol):
    """The gradient of the local loss at any point."""

    def __call__(self, at: Tensor, batch: Batch | None = None, half: ClientHalf | None = None) -> Tensor:
        """``at`` and the result are ``[C, d]``; the default batch is the step's own."""
        ...


@dataclass(frozen=True)
class Info:
    """What a server knows before the first round.

    Attributes:
        num_clients: Size of the population.
        num_classes: 0 for regression.
        layout: Of the parameter vector.
        seed: The run's seed.
        rounds: Rounds to run.
        client_lr: The configured local learning rate.
    """

    num_clients: int
    num_classes: int
    layout: Layout
    seed: int
    rounds: int
    client_lr: float

    def generator(self, purpose: str, *index: int | str) -> torch.Generator:
        """A stream of the server's own random numbers, for `Strategy.init`."""
        return random.generator(self.seed, purpose, "init", *index)


@dataclass(frozen=True)
class State:
    """The least that a server carries.

    Attributes:
        w: Global parameters, ``[d]``.
    """

    w: Tensor


@dataclass(frozen=True)
class ClientHalf:
    """What happens on a client. Override what the method changes.

    Recipes (``clients/``) and phases are client halves without a server; a `Strategy` adds one.

    Attributes:
        batched: Whether the hooks that the class defines work for several clients at once: nothing in them looks at
            one lane alone, and numbers of a client may be ``[C, 1]``. ``client.batching=auto`` takes only classes that
            say so themselves; False keeps clients apart under every setting.
    """

    batched: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_types(self)
        self.check()

    def check(self) -> None:
        """Refuses impossible hyper-parameters: call `require` here."""

    def model(self, module: nn.Module) -> nn.Module:
        """The network to train: extra heads, wrapped or frozen weights. Default: as configured."""
        return module

    def parts(self, layout: Layout) -> dict[str, str]:
        """Roles of groups of parameters, ``{glob: role}``: ``private`` (kept by the client, never sent)
        or ``frozen``. The rest is shared."""
        return {}

    def memory(self, local: Local) -> dict[str, Tensor]:
        """First values of what a client keeps between visits, ``[C, ...]`` each. Assigning
        ``local.memory.name`` replaces a value when the round commits."""
        return {}

    def order(self, local: Local, epoch: int) -> Tensor | tuple[Tensor, Tensor]:
        """The examples of an epoch, as numbers within the client's data, ``[C, k]``; optionally with a
        weight for each. Of a client with n examples, number i of n and more is example i mod n over again; `batch`
        sees the numbers, and may make others of these. Default: a random permutation, keyed by the client's position
        in its stream."""
        return local.permutation(epoch)

    def batch(self, batch: Batch, local: Local) -> Batch:
        """The minibatch to use: other views, partners, extra fields."""
        return batch

    def schedule(self, local: Local) -> dict[str, Any]:
        """For the next step: ``lr`` (a factor) and ``batch_size``; what is left out stays."""
        return {}

    def loss(self, model: Model, batch: Batch, local: Local) -> Tensor:
        """The local objective: ``[C, B]`` per example, or ``[C]`` for a batch."""
        return local.loss(model, batch)

    def direction(self, w: Tensor, grad: Grad, local: Local) -> Tensor:
        """The step direction at ``w``, ``[C, d]``."""
        return grad(w)

    def update(self, w: Tensor, d: Tensor, local: Local) -> Tensor:
        """The iterate after a step along ``d``, ``[C, d]``; may write into ``w``."""
        return local.optimizer(w, d)

    def work(self, local: Local) -> Tensor:
        """The whole visit; returns the local parameters, ``[C, d]``."""
        return local.train(local.start)

    def finish(self, w: Tensor, local: Local) -> dict[str, Entry]:
        """What goes up, by name."""
        return {"delta": mean(local.delta(w))}

    def personal(self, local: Local) -> Tensor:
        """The client's own model, ``[C, d]``, for evaluation."""
        return local.start

    def predict(self, model: Model, batch: Batch, local: Local) -> Tensor:
        """The outputs to score, ``[C, B, classes]``; ``local.mode`` is ``global`` or ``personal``."""
        outputs = model(batch.x)
        if not isinstance(outputs, Tensor):
            raise ConfigError(
                f"the model returns a {type(outputs).__name__}; "
                f"{type(self).__name__} needs a `predict` that picks the outputs to score"
            )
        return outputs


@dataclass(frozen=True)
class Strategy(ClientHalf):
    """A federated method, both halves. Required: `init`, and `step` or `round`.

    The class also says how it is tested: one suite holds every method to the same laws, and to being its
    parent where its own idea is switched off.

    Attributes:
        parent: Name of the method (a config of the group ``strategy``) that this one extends, or None.
        parent_options: Options of the parent under which the two are compared.
        neutral: Options that make this method its parent, bit for bit.
        quick: Options under which a run with small data takes seconds; for methods with long phases.
        needs: Config values by dotted key without which the method refuses the suite's runs (a model with norms, for
            example), as small as can be.
        exempt: Laws of the suite that do not apply (a test's name without ``test_``), each with the reason.
        unused: Config keys without effect under this method, each with the reason; giving one is refused.
    """

    parent: ClassVar[str | None] = None
    parent_options: ClassVar[Mapping[str, Any]] = {}
    neutral: ClassVar[Mapping[str, Any]] = {}
    quick: ClassVar[Mapping[str, Any]] = {}
    needs: ClassVar[Mapping[str, Any]] = {}
    exempt: ClassVar[Mapping[str, str]] = {}
    unused: ClassVar[Mapping[str, str]] = {}

    def check_client(self, options: ClientOptions) -> None:
        """Refuses settings of the ``client`` group that the method cannot work with; raise a `ConfigError`."""

    def check_network(self, network: Network, options: ClientOptions) -> None:
        """Refuses networks that the method cannot work with under these settings; raise a `ConfigError`."""

    def planned_steps(self, options: ClientOptions, n: int) -> int:
        """Local steps of a visit of a client with ``n`` examples, where `ClientHalf.work` makes others than usual."""
        return options.planned_steps(n)

    def init(self, info: Info, w: Tensor) -> Any:
        """The server's first state, from the initial parameters ``w``, ``[d]``. Default: `State`."""
        return State(w)

    def prepare(self, fed: Federation, state: Any) -> Any:
        """Phases before round 1. A checkpoint follows; killed inside, it runs again."""
        return state

    def broadcast(self, state: Any) -> dict[str, Any]:
        """What goes down to every client, by name."""
        return {"w": state.w}

    def unicast(self, state: Any, clients: tuple[int, ...]) -> dict[str, Any]:
        """What goes down to these clients only, ``[C, ...]`` each, or lists of C; asked for one client at a time."""
        return {}

    def step(self, state: Any, reduced: Reduced) -> Any:
        """The server update. Pure: state in, state out."""
        raise NotImplementedError(f"{type(self).__name__} needs `step` or `round`")

    def round(self, fed: Federation, state: Any) -> Any:
        """From one global model to the next."""
        return self.step(state, fed.train(fed.sample(), state))

    def finalize(self, fed: Federation, state: Any) -> Any:
        """After the last round; `Federation.round_num` is one more than that round's."""
        return state


_TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}


def check_types(half: Any) -> None:
    """Checks the fields of a dataclass of hyper-parameters against their annotations.

    Numbers must be finite; an int is a float; a bool is no number.
    """
    kind = type(half)
    hints = typing.get_type_hints(kind)
    named = inspect.get_annotations(kind)  # its own, not its parents'
    own = [name for name in named if ClassVar not in (hints[name], typing.get_origin(hints[name]))]
    if own and "__dataclass_fields__" not in kind.__dict__:
        raise ConfigError(
            f"{kind.__name__}.{own[0]} is no option: {kind.__name__} needs its own @dataclass(frozen=True), as its "
            "parent has"
        )
    for f in fields(half):
        hint, value = hints[f.name], getattr(half, f.name)
        key = f"{config_key(half)}.{f.name}"
        allowed = typing.get_args(hint) if typing.get_origin(hint) is not None else (hint,)
        names = " or ".join(_TYPE_NAMES.get(t, str(t)) for t in allowed)
        if float in allowed and isinstance(value, int) and not isinstance(value, bool):
            object.__setattr__(half, f.name, float(value) if int not in allowed else value)
            continue
        scalar = [t for t in allowed if t in (int, float, str, bool, type(None))]
        if len(scalar) < len(allowed):
            continue  # trees and callables are the owner's to check
        if not any(type(value) is t for t in scalar):
            raise ConfigError(f"{key} must be {names}, got {value!r}")
        if isinstance(value, float):
            require(math.isfinite(value), key, "finite", value)


def config_key(half: Any) -> str:
    """The config group that an object comes from, for messages."""
    return "strategy" if isinstance(half, Strategy) else type(half).__name__

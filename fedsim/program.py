"""What a worker holds between tasks: the network, the data, and the method's hooks, composed.

Recipes are inside, the strategy outside: ``model``, ``parts``, ``memory``, ``batch`` and ``schedule``
chain; a recipe's ``direction`` is what the strategy's ``grad`` returns, and its ``loss`` is the strategy's
``local.loss``. Two owners of ``order``, ``update``, ``work`` or ``predict`` are refused.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsim import random
from fedsim.data import Clients, Dataset, Shard, Split
from fedsim.errors import ConfigError
from fedsim.network import Network
from fedsim.parts import Block, redraw, tail_of
from fedsim.reduce import Entry, nbytes
from fedsim.strategy import SERVER, ClientHalf, Grad, Model, Strategy
from fedsim.vector import trainable

if TYPE_CHECKING:
    from fedsim.clients.batch import Batch
    from fedsim.clients.local import Local
    from fedsim.clients.visit import ClientOptions

SINGLE_OWNER = ("order", "update", "work", "predict", "personal")
RESERVED = ("strategy", "stream", "buffers", "sent", "task")  # first parts of the names of memory rows


def overrides(half: ClientHalf, hook: str) -> bool:
    """Whether ``half`` has its own ``hook``."""
    return getattr(type(half), hook) is not getattr(ClientHalf, hook)


@dataclass(frozen=True)
class Hooks:
    """The hooks of recipes and a strategy (or phase) as one client half.

    Attributes:
        recipes: Inner halves by name, innermost first.
        outer: The strategy, or the half of a phase.
    """

    recipes: tuple[tuple[str, ClientHalf], ...]
    outer: ClientHalf

    def __post_init__(self) -> None:
        for name, _ in self.recipes:
            if name in RESERVED or "." in name:
                raise ConfigError(f"a recipe cannot be called '{name}'; rename the key recipe.{name}")
        for hook in (*SINGLE_OWNER, "loss"):
            halves = [h for _, h in self.recipes] if hook == "loss" else [h for _, h in self.owners()]
            owners = [type(h).__name__ for h in halves if overrides(h, hook)]
            if len(owners) > 1:
                raise ConfigError(f"{' and '.join(owners)} both define `{hook}`; choose one of them")

    def owners(self) -> tuple[tuple[str, ClientHalf], ...]:
        """All halves with the name of their memory, innermost first."""
        return (*self.recipes, ("strategy", self.outer))

    def owner(self, hook: str) -> tuple[str, ClientHalf]:
        """Who defines a hook of a single owner; the outer half if nobody does."""
        return next(((n, h) for n, h in self.owners() if overrides(h, hook)), ("strategy", self.outer))

    def bind(self, local: Local) -> Bound:
        """The hooks for one visit."""
        return Bound(self, local)


class Bound:
    """Composed hooks of one visit; each runs with ``local.memory`` set to its half's own name space."""

    def __init__(self, hooks: Hooks, local: Local) -> None:
        self.hooks, self._local = hooks, local
        self.plain_direction = not any(overrides(h, "direction") for _, h in hooks.owners())
        self.plain_loss = not any(overrides(h, "loss") for _, h in hooks.owners())
        self.plain_update = not any(overrides(h, "update") for _, h in hooks.owners())
        self.plain_batch = [(n, h) for n, h in hooks.owners() if overrides(h, "batch")]
        self.draws = any(overrides(h, hook) for _, h in hooks.owners() for hook in ("order", "batch", "schedule"))
        self.schedules = [(n, h) for n, h in hooks.owners() if overrides(h, "schedule")]
        self._inner_loss = next(((n, h) for n, h in hooks.recipes if overrides(h, "loss")), None)
        self._directions = [(n, h) for n, h in hooks.recipes if overrides(h, "direction")]

    def _call(self, owner: tuple[str, ClientHalf], hook: str, *args: Any) -> Any:
        local, (name, half) = self._local, owner
        before, local._space = local._space, name  # `Local.space`, without a context manager's microseconds
        try:
            return getattr(half, hook)(*args, local)
        finally:
            local._space = before

    def single(self, hook: str, *args: Any) -> Any:
        """Calls a hook that has one owner."""
        return self._call(self.hooks.owner(hook), hook, *args)

    def order(self, epoch: int) -> Tensor | tuple[Tensor, Tensor]:
        name, half = self.hooks.owner("order")
        with self._local.space(name):
            return half.order(self._local, epoch)

    def finish(self, w: Tensor) -> dict[str, Entry]:
        """All entries: the recipes' own and the outer half's."""
        out: dict[str, Entry] = {}
        for owner in self.hooks.owners():
            if owner[1] is self.hooks.outer or overrides(owner[1], "finish"):
                new: dict[str, Entry] = self._call(owner, "finish", w)
                for name, entry in new.items():
                    if not isinstance(entry, Entry):
                        raise ConfigError(
                            f"{type(owner[1]).__name__}.finish: entry '{name}' is a {type(entry).__name__}; "
                            "say how it is reduced: mean, total, stack or concat (fedsim.reduce)"
                        )
                if twice := sorted(out.keys() & new.keys()):
                    raise ConfigError(f"two halves send an entry called '{twice[0]}'; rename one")
                out |= new
        return out

    def batch(self, batch: Batch) -> Batch:
        for owner in self.plain_batch:
            batch = self._call(owner, "batch", batch)
        return batch

    def schedule(self) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for owner in self.schedules:
            new = self._call(owner, "schedule")
            if "lr" in new and "lr" in out:
                new = {**new, "lr": new["lr"] * out["lr"]}
            out.update(new)
        return out

    def loss(self, model: Model, batch: Batch) -> Tensor:
        """The outermost objective."""
        return self._call(("strategy", self.hooks.outer), "loss", model, batch)  # type: ignore[no-any-return]

    def inner_loss(self, model: Model, batch: Batch) -> Tensor:
        """``local.loss``: the recipe's objective, or the task's."""
        if self._inner_loss is not None:
            inner, self._inner_loss = self._inner_loss, None  # a recipe's own local.loss is the task's
            try:
                return self._call(inner, "loss", model, batch)  # type: ignore[no-any-return]
            finally:
                self._inner_loss = inner
        outputs = model(batch.x)
        if not isinstance(outputs, Tensor):
            raise ConfigError(
                f"the model returns a {type(outputs).__name__}, not a tensor; the strategy or a recipe needs a `loss`"
            )
        return self._local.task_loss(outputs, batch.y)

    def direction(self, w: Tensor, grad: Grad) -> Tensor:
        for owner in self._directions:
            grad = self._nested(owner, grad)
        return self._call(("strategy", self.hooks.outer), "direction", w, grad)  # type: ignore[no-any-return]

    def _nested(self, owner: tuple[str, ClientHalf], base: Grad) -> Grad:
        def grad(at: Tensor, batch: Batch | None = None, half: ClientHalf | None = None) -> Tensor:
            def inner(at: Tensor, b: Batch | None = None, h: ClientHalf | None = None) -> Tensor:
                return base(at, batch if b is None else b, half if h is None else h)

            return self._call(owner, "direction", at, inner)  # type: ignore[no-any-return]

        return grad


def task_loss(outputs: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy for integer labels, half the squared error for float targets.

    Args:
        outputs: ``[C, B, classes]``, or predictions of the shape of ``y``.
        y: ``[C, B]``.

    Returns:
        Per example, ``[C, B]``.
    """
    if y.is_floating_point():
        error = (outputs.view_as(y) - y).square() / 2
        return error if error.dim() == 2 else error.flatten(2).sum(-1)
    if len(y) == 1:
        return F.cross_entropy(outputs[0], y[0], reduction="none").unsqueeze(0)
    return F.cross_entropy(outputs.flatten(0, 1), y.flatten(), reduction="none").view_as(y)


def mean_task_loss(outputs: Tensor, y: Tensor) -> Tensor:
    """The mean of `task_loss` over one client's batch, ``[B, ...]`` and ``[B]``, as a scalar."""
    if not isinstance(outputs, Tensor):
        raise ConfigError(
            f"the model returns a {type(outputs).__name__}, not a tensor; the strategy or a recipe needs a `loss`"
        )
    return task_loss(outputs[None], y[None]).mean() if y.is_floating_point() else F.cross_entropy(outputs, y)


@contextmanager
def _keyed(seed: int, name: str) -> Iterator[None]:
    """Seeds torch's global generator, which constructors of layers draw from; restores it afterwards."""
    before = torch.default_generator.get_state()
    torch.default_generator.manual_seed(random.derive(seed, "model", name))
    try:
        yield
    finally:
        torch.default_generator.set_state(before)


class Program:
    """Everything that is the same for all tasks of a run.

    Args:
        strategy: Both halves.
        recipes: By name, innermost first.
        module: The model as configured; `ClientHalf.model` hooks are applied here.
        dataset: Loaded data, with the server's split in ``server``.
        clients: The population.
        server: The server's own examples (`SERVER`), or None.
        options: The ``client`` group.
        seed: The run's seed.
    """

    def __init__(
        self,
        strategy: Strategy,
        recipes: Sequence[tuple[str, ClientHalf]],
        module: nn.Module,
        dataset: Dataset,
        clients: Clients,
        server: Split | None,
        options: ClientOptions,
        seed: int,
    ) -> None:
        self.strategy, self.recipes = strategy, tuple(recipes)
        self.dataset, self.clients, self.server = dataset, clients, server
        self.options, self.seed = options, seed
        self.hooks = Hooks(self.recipes, strategy)
        self._variants: dict[Any, Program] = {}
        self._tails: dict[int, Network] = {}
        self.told: set[str] = set()  # reasons that were logged
        self._double: tuple[Tensor, Tensor] | None = None
        self._install(self.rebuild(module))

    def _install(self, module: nn.Module) -> None:
        self.network = Network(module)
        self.network.cast = torch.bfloat16 if self.options.precision == "bf16" else None
        self.network_alone: str | None = None  # why it cannot train several clients at once; None: not tried yet
        self.layout, self.device = self.network.layout, self.network.device
        self.dtype = self.layout.dtype
        roles = self.roles()
        self.private = self._mask(roles, "private")
        self.frozen = self._mask(roles, "frozen")
        #: Numbers that travel when a parameter vector does.
        self.shared_size = self.layout.d - sum(int(m.sum()) for m in (self.private, self.frozen) if m is not None)
        masks = [m for m in (self.private, self.frozen) if m is not None]
        self.kept_out = torch.stack(masks).any(0) if masks else None
        self.scale, self.shift = self._normalisation()

    def variant(self, model: Callable[[nn.Module], nn.Module]) -> Program:
        """The same program on another build of the network; the last few are kept."""
        if model not in self._variants:
            other = copy.copy(self)
            other.__dict__.pop("_channels_last", None)
            other._variants, other._tails = {}, {}
            with _keyed(self.seed, "variant"):
                other._install(model(self.fresh_module()))
            while len(self._variants) >= 4:
                self._variants.pop(next(iter(self._variants)))
            self._variants[model] = other
        return self._variants[model]

    def double_start(self, start: Tensor) -> Tensor:
        """``start`` in float64; the clients of a task start from one tensor, so the last one is kept."""
        if self._double is None or self._double[0] is not start:
            self._double = start, start.double()
        return self._double[1]

    def rebuild(self, module: nn.Module) -> nn.Module:
        """Applies the `ClientHalf.model` hooks, innermost first; each draws new weights from its own stream."""
        like = next(module.parameters(), None)
        for name, half in self.hooks.owners():
            with _keyed(self.seed, name):
                module = half.model(module)
        return module if like is None else module.to(like.device, like.dtype)

    def fresh_module(self) -> nn.Module:
        """A copy of the network as it was first built, whatever was trained on this one since."""
        return self.network.pristine()

    @property
    def blocks(self) -> tuple[Block, ...]:
        """Names of the modules of each of the network's blocks."""
        return self.network.block_names

    def tail(self, first: int) -> Network:
        """The network's blocks from number ``first`` on (from 0) as a network of their own, its weights drawn anew."""
        if first not in self._tails:
            with _keyed(self.seed, f"tail.{first}"):  # drawn on the CPU, whose generator this is
                self._tails[first] = Network(tail_of(self.fresh_module().cpu(), self.blocks, first).to(self.device))
        return self._tails[first]

    def drawn(self, *index: int | str) -> Tensor:
        """Parameters as the layers draw them by themselves, ``[d]``, anew for every ``index``."""
        module = self.fresh_module().cpu()
        with random.torch_seeded(self.seed, "drawn", *index):  # the CPU's generator, whatever the device
            redraw(module)
        return self.layout.flatten(trainable(module)).to(self.device)

    def nbytes(self, value: Any) -> int:
        """Bytes that ``value`` costs to send: of a parameter-sized tensor, only the coordinates that are shared.

        Args:
            value: A tree of tensors and numbers; tensors ``[..., d]`` are parameter-sized.
        """
        if isinstance(value, Tensor):
            if value.shape[-1:] == (self.layout.d,) and self.kept_out is not None:
                rows = value.numel() // self.layout.d
                return nbytes(value.flatten()[: rows * self.shared_size])
            return nbytes(value)
        if isinstance(value, Mapping):
            return sum(self.nbytes(v) for v in value.values())
        if isinstance(value, list | tuple):
            return sum(self.nbytes(v) for v in value)
        return nbytes(value)

    def roles(self) -> dict[str, str]:
        """Role of every parameter that has one, by name."""
        roles: dict[str, str] = {}
        for _, half in self.hooks.owners():
            for glob, role in half.parts(self.layout).items():
                if role not in ("private", "frozen", "shared"):
                    raise ConfigError(f"parts: role of '{glob}' must be private, frozen or shared, got {role!r}")
                roles.update(dict.fromkeys(self.layout.match(glob), role))
        return roles

    def _mask(self, roles: dict[str, str], role: str) -> Tensor | None:
        names = [n for n, r in roles.items() if r == role]
        return self.layout.mask_of(names).to(self.device) if names else None

    def phase_hooks(self, half: ClientHalf) -> Hooks:
        """The hooks of a phase: its own half outside, the same recipes inside."""
        return Hooks(self.recipes, half)

    def shard(self, client: int, part: str = "train") -> Shard:
        """A client's examples; ``part`` is ``train``, ``heldout`` or ``none``."""
        if part == "none":
            test = self.dataset.test
            return Shard(test.x, test.y, torch.empty(0, dtype=torch.int64))
        if client == SERVER:
            if self.server is None or not len(self.server):
                raise ConfigError("the server has no data: set data.validation to the share that it keeps")
            return Shard(self.server.x, self.server.y, torch.arange(len(self.server)))
        return self.clients.train(client) if part == "train" else self.clients.heldout(client)

    def _normalisation(self) -> tuple[Tensor | float, Tensor | float]:
        mean, std = self.dataset.mean, self.dataset.std
        if not mean:
            return 1 / 255, 0.0
        if len(mean) == 1:
            return 1 / (255 * std[0]), -mean[0] / std[0]
        m, s = (torch.tensor(v, dtype=torch.float64).view(-1, 1, 1) for v in (mean, std))
        return (1 / (255 * s)).to(self.device, self.dtype), (-m / s).to(self.device, self.dtype)

    def inputs(self, x: Tensor) -> Tensor:
        """Raw inputs ``[B, ...]`` as the network takes them: uint8 images scaled and normalised."""
        if x.dtype == torch.uint8:
            return self.arranged(x.to(self.device, self.dtype).mul_(self.scale).add_(self.shift))
        return x.to(self.device, self.dtype) if x.is_floating_point() else x.to(self.device)

    @cached_property
    def _channels_last(self) -> bool:
        """Whether images have their channels last in memory: on CPUs pooling and narrow convolutions then run on whole
        vectors. Only where every layer is known: models may write ``x.view(len(x), -1)``, which needs them first."""
        convolves = any(isinstance(m, nn.Conv2d) for m in self.network.module.modules())
        return convolves and self.device.type == "cpu" and self.network.stack is not None

    def arranged(self, x: Tensor) -> Tensor:
        """Inputs ``[B, ...]``, in the order in memory that the network works in."""
        if x.dim() != 4 or not self._channels_last:
            return x
        if x.shape[1] == 1:  # torch takes a single channel for first unless its stride says otherwise
            return x.as_strided(x.shape, (x.shape[1:].numel(), 1, x.shape[3], 1)) if x.is_contiguous() else x
        return x.contiguous(memory_format=torch.channels_last)

    def targets(self, y: Tensor) -> Tensor:
        """Raw labels ``[B]`` as the loss takes them."""
        return y.to(self.device, self.dtype) if y.is_floating_point() else y.to(self.device)

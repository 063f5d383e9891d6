"""Local optimizers: functions over ``[C, d]``, one client per row.

With one client and a float learning rate they are `torch.optim.SGD`, `Adam`, `AdamW` and `Adagrad` on a
CPU, bit for bit (the operations and their order are those of torch's single-tensor code). They exist
because torch.optim takes a second to import at its first use, knows no learning rate per client,
and keeps its state where neither a checkpoint nor another process can reach it.

Rules that all of them keep, and that the loop may build on:

- State lives in a dict of tensors, client axis first, complete from `init` on: clients at different
  points of their streams can be stacked, and a lane's rows can be saved and restored alone.
- `step` writes into ``w`` and into the state's tensors, in place and never by replacing them. So lanes
  that have finished are left alone by saving their rows and writing them back.
- Lanes never mix: no number of one client, its step count included, touches another's row.
- Step counts are int64 on the CPU, whatever the device of ``w``: reading one there costs no
  synchronisation with a GPU. A count moved elsewhere still works, but is read back at every step.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from fedsim.errors import ConfigError

if TYPE_CHECKING:
    from torch.optim import Optimizer as TorchOptim

State = dict[str, Tensor]


class Optimizer(Protocol):
    """What the local loop asks of an optimizer."""

    def init(self, w: Tensor) -> State:
        """The state at the start of a stream.

        Args:
            w: Parameters, ``[C, d]``; only shape, dtype and device matter.

        Returns:
            Named tensors, ``[C, d]`` or ``[C, 1]``; empty for a rule without state.
        """

    def step(self, w: Tensor, d: Tensor, state: State, lr: float | Tensor) -> Tensor:
        """One step along ``-d``.

        Args:
            w: Parameters, ``[C, d]``; may be written into.
            d: Directions (gradients), ``[C, d]``; never written into.
            state: What `init` made; may be written into.
            lr: Learning rate, a float for all or ``[C, 1]``.

        Returns:
            The new parameters, ``[C, d]``: ``w`` itself where the rule works in place.
        """


def _check(name: str, value: float, low: float, high: float, *, open_high: bool = False) -> None:
    """Refuse what is not a finite number in [low, high] (or [low, high) with ``open_high``)."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not low <= value <= high or (open_high and value == high):
        bracket = ")" if open_high or math.isinf(high) else "]"
        raise ConfigError(f"client.{name} must be a number in [{low:g}, {high:g}{bracket}, got {value!r}")


def _check_flag(name: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise ConfigError(f"client.{name} must be true or false, got {value!r}")


def _column(x: Tensor, w: Tensor) -> Tensor:
    """A number per client, ``[C, 1]``, on the device and in the dtype of ``w``."""
    if x.shape != (len(w), 1):
        raise ValueError(
            f"an optimizer step over {len(w)} clients needs numbers of shape [{len(w)}, 1], got {list(x.shape)}; "
            "pass lr as a float, or as one row per client"
        )
    return x.to(w.device, w.dtype)


@dataclass(frozen=True)
class SGD:
    """Stochastic gradient descent, `torch.optim.SGD`.

    State: ``momentum`` ``[C, d]`` if there is momentum, and ``step`` (steps made, int64 ``[C, 1]``) if
    dampening needs to know the first step. torch starts the buffer as a copy of the first direction; here it
    starts as -0.0, which gives the same bits (``m * -0.0 + d`` is ``d``, signed zeros included) and lets fresh
    lanes stand beside old ones.

    Attributes:
        momentum: In [0, 1); 0 keeps no state.
        dampening: In [0, 1]: later directions enter the buffer times ``1 - dampening``.
        nesterov: Look ahead; needs momentum, and no dampening.
        weight_decay: >= 0, added to the direction as ``weight_decay * w`` before momentum (coupled).

    Raises:
        ConfigError: A value out of range, or nesterov without momentum or with dampening.
    """

    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        _check("momentum", self.momentum, 0, 1, open_high=True)
        _check("dampening", self.dampening, 0, 1)
        _check_flag("nesterov", self.nesterov)
        _check("weight_decay", self.weight_decay, 0, math.inf)
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            raise ConfigError(
                "client.nesterov=true needs client.momentum > 0 and client.dampening=0, "
                f"got momentum={self.momentum:g} and dampening={self.dampening:g}"
            )

    def init(self, w: Tensor) -> State:
        """See `Optimizer.init`."""
        state = {}
        if self.momentum != 0:
            state["momentum"] = torch.full_like(w, -0.0)
            if self.dampening != 0:
                state["step"] = torch.zeros(len(w), 1, dtype=torch.int64)
        return state

    def step(self, w: Tensor, d: Tensor, state: State, lr: float | Tensor) -> Tensor:
        """See `Optimizer.step`."""
        decayed = d.add(w, alpha=self.weight_decay) if self.weight_decay != 0 else None
        g = d if decayed is None else decayed
        if self.momentum != 0:
            buffer = state["momentum"].mul_(self.momentum)
            if self.dampening == 0:
                buffer.add_(g)
            elif len(w) == 1:
                buffer.add_(g, alpha=1 - self.dampening if state["step"].item() else 1)
            else:
                buffer.addcmul_(g, _column(1 - self.dampening * (state["step"] > 0).double(), w))
            if "step" in state:
                state["step"].add_(1)
            if not self.nesterov:
                g = buffer
            elif decayed is None:
                g = g.add(buffer, alpha=self.momentum)
            else:
                g = decayed.add_(buffer, alpha=self.momentum)  # ours to overwrite: saves a second temporary
        if isinstance(lr, Tensor):
            return w.addcmul_(g, _column(lr, w), value=-1)
        return w.add_(g, alpha=-lr)


def _init_adam(w: Tensor, amsgrad: bool) -> State:
    state = {
        "step": torch.zeros(len(w), 1, dtype=torch.int64),
        "exp_avg": torch.zeros_like(w),
        "exp_avg_sq": torch.zeros_like(w),
    }
    if amsgrad:
        state["max_exp_avg_sq"] = torch.zeros_like(w)
    return state


def _step_adam(
    w: Tensor,
    g: Tensor,
    state: State,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    scratch: Tensor | None,
) -> Tensor:
    """Moments, bias correction and step; ``scratch`` is memory like ``w`` that may be overwritten, ``g`` included."""
    beta1, beta2 = betas
    step = state["step"].add_(1)
    mean = state["exp_avg"].lerp_(g, 1 - beta1)
    square = state["exp_avg_sq"].mul_(beta2).addcmul_(g, g, value=1 - beta2)
    if "max_exp_avg_sq" in state:
        square = torch.maximum(state["max_exp_avg_sq"], square, out=state["max_exp_avg_sq"])
    root = torch.sqrt(square, out=scratch)  # the last reader of g was the line that made square
    if len(w) == 1 and not isinstance(lr, Tensor):
        t = int(step.item())
        root.div_((1 - beta2**t) ** 0.5).add_(eps)
        return w.addcdiv_(mean, root, value=-(lr / (1 - beta1**t)))
    t_lanes = step.to("cpu", torch.float64)  # corrections in float64, rounded once
    root.div_(_column((1 - beta2**t_lanes).sqrt(), w)).add_(eps)
    correction = 1 - beta1**t_lanes
    rate = _column(lr, w) / _column(correction, w) if isinstance(lr, Tensor) else _column(lr / correction, w)
    return w.addcmul_(torch.div(mean, root, out=root), rate, value=-1)


def _check_adam(self: Adam | AdamW) -> None:
    betas: Any = self.betas
    if isinstance(betas, (str, float, int)) or len(betas) != 2:
        raise ConfigError(f"client.betas must be two numbers in [0, 1), such as [0.9, 0.999], got {betas!r}")
    for i, beta in enumerate(betas):
        _check(f"betas[{i}]", beta, 0, 1, open_high=True)
    object.__setattr__(self, "betas", (float(betas[0]), float(betas[1])))  # a config hands over a list
    _check("eps", self.eps, 0, math.inf)
    _check("weight_decay", self.weight_decay, 0, math.inf)
    _check_flag("amsgrad", self.amsgrad)


@dataclass(frozen=True)
class Adam:
    """Adam (Kingma and Ba, 2015, https://arxiv.org/abs/1412.6980), `torch.optim.Adam`.

    State: ``exp_avg``, ``exp_avg_sq``, with amsgrad ``max_exp_avg_sq``, ``[C, d]`` each, and ``step``, the
    number of steps made, int64 ``[C, 1]`` on the CPU.

    Attributes:
        betas: Decay of the first and second moment, each in [0, 1).
        eps: Added to the root of the second moment, >= 0.
        weight_decay: >= 0, added to the direction as ``weight_decay * w`` (coupled).
        amsgrad: Divide by the largest second moment so far (Reddi et al., 2018).

    Raises:
        ConfigError: A value out of range.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    amsgrad: bool = False

    def __post_init__(self) -> None:
        _check_adam(self)

    def init(self, w: Tensor) -> State:
        """See `Optimizer.init`."""
        return _init_adam(w, self.amsgrad)

    def step(self, w: Tensor, d: Tensor, state: State, lr: float | Tensor) -> Tensor:
        """See `Optimizer.step`."""
        decayed = d.add(w, alpha=self.weight_decay) if self.weight_decay != 0 else None
        return _step_adam(w, d if decayed is None else decayed, state, lr, self.betas, self.eps, decayed)


@dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2019), `torch.optim.AdamW`.

    Attributes:
        betas: As for `Adam`, like ``eps``, ``amsgrad`` and the state.
        eps: See `Adam`.
        weight_decay: >= 0: parameters are first multiplied by ``1 - lr * weight_decay``.
        amsgrad: See `Adam`.

    Raises:
        ConfigError: A value out of range.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-2
    amsgrad: bool = False

    def __post_init__(self) -> None:
        _check_adam(self)

    def init(self, w: Tensor) -> State:
        """See `Optimizer.init`."""
        return _init_adam(w, self.amsgrad)

    def step(self, w: Tensor, d: Tensor, state: State, lr: float | Tensor) -> Tensor:
        """See `Optimizer.step`."""
        if self.weight_decay != 0:
            w.mul_(1 - (_column(lr, w) if isinstance(lr, Tensor) else lr) * self.weight_decay)
        return _step_adam(w, d, state, lr, self.betas, self.eps, None)


@dataclass(frozen=True)
class Adagrad:
    """Adagrad (Duchi et al., 2011, https://jmlr.org/papers/v12/duchi11a.html), `torch.optim.Adagrad`.

    State: ``sum`` ``[C, d]``, the squares of all directions so far, and ``step`` (steps made, int64 ``[C, 1]`` on
    the CPU) if the learning rate decays.

    Attributes:
        lr_decay: >= 0: at the stream's step t = 0, 1, ... the learning rate is divided by ``1 + t * lr_decay``.
        weight_decay: >= 0, added to the direction as ``weight_decay * w`` (coupled).
        initial_accumulator_value: What every coordinate of the sum starts from, >= 0.
        eps: Added to the root of the sum, >= 0.

    Raises:
        ConfigError: A value out of range.
    """

    lr_decay: float = 0.0
    weight_decay: float = 0.0
    initial_accumulator_value: float = 0.0
    eps: float = 1e-10

    def __post_init__(self) -> None:
        for name in ("lr_decay", "weight_decay", "initial_accumulator_value", "eps"):
            _check(name, getattr(self, name), 0, math.inf)

    def init(self, w: Tensor) -> State:
        """See `Optimizer.init`."""
        state = {"sum": torch.full_like(w, self.initial_accumulator_value)}
        if self.lr_decay != 0:
            state["step"] = torch.zeros(len(w), 1, dtype=torch.int64)
        return state

    def step(self, w: Tensor, d: Tensor, state: State, lr: float | Tensor) -> Tensor:
        """See `Optimizer.step`."""
        g = d.add(w, alpha=self.weight_decay) if self.weight_decay != 0 else d
        root = state["sum"].addcmul_(g, g, value=1).sqrt().add_(self.eps)
        made = state["step"].add_(1) - 1 if "step" in state else None
        if not isinstance(lr, Tensor) and (made is None or len(w) == 1):
            t = 0 if made is None else int(made.item())
            return w.addcdiv_(g, root, value=-(lr / (1 + t * self.lr_decay)))
        t_lanes = torch.zeros(len(w), 1, dtype=torch.float64) if made is None else made.to("cpu", torch.float64)
        divisor = 1 + t_lanes * self.lr_decay
        rate = _column(lr, w) / _column(divisor, w) if isinstance(lr, Tensor) else _column(lr / divisor, w)
        return w.addcmul_(torch.div(g, root, out=root), rate, value=-1)


# How a number (not a tensor) of an optimizer's state is named and stored: "0.step:int" is int64 [1, 1].
_NUMBERS: dict[type, torch.dtype] = {bool: torch.bool, int: torch.int64, float: torch.float64}
_KINDS: dict[str, type] = {kind.__name__: kind for kind in _NUMBERS}


@dataclass
class _Live:
    """A torch optimizer that stands where ``state`` says, and what it was built over."""

    w: Tensor
    optimizer: TorchOptim
    params: list[Tensor]
    given: dict[str, object]  # numbers of the parameter group as they were built
    state: State
    d: Tensor | None = None


class TorchOptimizer:
    """Any `torch.optim.Optimizer` class, one client at a time, over the model's tensors as separate parameters.

    Config: ``{_target_: torch.optim.RMSprop, _partial_: true, alpha: 0.9}`` under ``client.optimizer``; the
    learning rate stays ``client.lr``. The first use of torch.optim takes about a second.

    State: what torch keeps, under ``"<parameter>.<name>"``, ``[1, ...]`` each; Python numbers under
    ``"<parameter>.<name>:int"`` (``:float``, ``:bool``), ``[1, 1]``; numbers that the optimizer changes in its
    parameter group under ``"group.<name>:<kind>"``. The tensors share memory with torch's own, so the dict is
    always current and restoring one, in any process, continues the stream bit for bit. The built optimizer is
    only a cache: it is used while ``state`` holds the very tensors it left there, and rebuilt otherwise.

    Args:
        factory: Called as ``factory(parameters, lr=lr)``.
        shapes: Shapes of the model's parameters, in the order of the flat vector.

    Raises:
        ConfigError: The factory sets ``lr`` itself; the optimizer needs a closure, or keeps state that is
            neither tensor nor number; more than one client is stepped at a time.
    """

    def __init__(self, factory: Callable[..., TorchOptim], shapes: Sequence[torch.Size]) -> None:
        kind: Any = getattr(factory, "func", factory)  # a functools.partial, or the class itself
        self.name = f"{kind.__module__}.{getattr(kind, '__qualname__', kind)}"
        if "lr" in getattr(factory, "keywords", {}):
            raise ConfigError(
                f"client.optimizer ({self.name}) sets lr itself; set client.lr instead, and remove it there"
            )
        step: Any = getattr(kind, "step", None) if isinstance(kind, type) else None
        closure = inspect.signature(step).parameters.get("closure") if step is not None else None
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise ConfigError(
                f"client.optimizer ({self.name}) evaluates the loss itself, several times a step; local training hands "
                "over one direction per step, so choose an optimizer whose step() needs no closure"
            )
        self.factory = factory
        self.shapes = [torch.Size(shape) for shape in shapes]
        # torch's own leave gradients alone; of others we do not know, so they get a copy.
        self._copy = not str(kind.__module__).startswith("torch.optim.")
        self._live: _Live | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_live": None}  # a cache does not travel

    @property
    def weight_decay(self) -> float:
        """The largest weight decay of its parameter groups; 0 if it knows none."""
        built = self.factory([torch.zeros(shape, requires_grad=True) for shape in self.shapes], lr=1.0)
        return max(float(group.get("weight_decay", 0.0)) for group in built.param_groups)

    def init(self, w: Tensor) -> State:
        """An empty state: torch makes its own at the first step.

        Args:
            w: Parameters, ``[1, d]``.
        """
        self._check_single(w)
        return {}

    def step(self, w: Tensor, d: Tensor, state: State, lr: float | Tensor) -> Tensor:
        """One step of the torch optimizer; see `Optimizer.step`.

        Args:
            w: Parameters, ``[1, d]``, contiguous; written into.
            d: Directions, ``[1, d]``.
            state: What the step before left, from this process or another; written into, and given new entries.
            lr: Learning rate, a float or ``[1, 1]``.
        """
        self._check_single(w)
        rate = float(lr)
        live = self._live
        if live is None or not _same_memory(live.w, w) or not _same_entries(live.state, state):
            live = self._live = self._build(w, state, rate)
        if live.d is not d or self._copy:
            grads = self._views(d.clone() if self._copy else d)
            for param, grad in zip(live.params, grads, strict=True):
                param.grad = grad
            live.d = d
        group: dict[str, Any] = live.optimizer.param_groups[0]
        group["lr"] = rate
        live.optimizer.step()
        self._export(live)
        state.clear()
        state.update(live.state)
        return w

    def _check_single(self, w: Tensor) -> None:
        if len(w) != 1:
            raise ConfigError(
                f"client.optimizer={self.name} trains clients one by one, but {len(w)} came together; set "
                "client.batching=off, or use sgd, adam, adamw or adagrad, which train many clients at once"
            )
        total = sum(shape.numel() for shape in self.shapes)
        if w.shape[1] != total:
            raise ValueError(f"{self.name} was built for {total} parameters, got a vector of {w.shape[1]}")

    def _views(self, flat: Tensor) -> list[Tensor]:
        pieces = torch.split(flat.detach()[0], [shape.numel() for shape in self.shapes])
        return [piece.view(shape) for piece, shape in zip(pieces, self.shapes, strict=True)]

    def _build(self, w: Tensor, state: State, lr: float) -> _Live:
        params = [view.requires_grad_() for view in self._views(w)]
        optimizer = self.factory(params, lr=lr)
        group: dict[str, Any] = optimizer.param_groups[0]
        given = {key: value for key, value in group.items() if type(value) in _NUMBERS}
        for name, stored in state.items():
            owner, _, rest = name.partition(".")
            key, _, kind = rest.partition(":")
            value: Any = _KINDS[kind](stored.item()) if kind else stored[0]
            if owner == "group":
                group[key] = value
            else:
                optimizer.state[params[int(owner)]][key] = value
        return _Live(w, optimizer, params, given, dict(state))

    def _export(self, live: _Live) -> None:
        """Bring ``live.state`` up to date; entries that torch wrote into in place are kept as they are."""
        entries: State = {}
        for i, param in enumerate(live.params):
            for key, value in live.optimizer.state.get(param, {}).items():
                self._add(entries, f"{i}.{key}", value, live.state)
        if len(live.optimizer.state.keys() - live.params):
            raise self._unsavable("state that belongs to no parameter")
        group: dict[str, Any] = live.optimizer.param_groups[0]
        for key, value in group.items():
            number = f"group.{key}:{type(value).__name__}"
            if isinstance(value, Tensor):
                raise self._unsavable(f"{key!r} of its parameter group as a tensor")
            if key != "lr" and type(value) in _NUMBERS and (value != live.given.get(key) or number in live.state):
                self._add(entries, f"group.{key}", value, live.state)
        live.state = entries

    def _add(self, entries: State, name: str, value: object, old: State) -> None:
        if isinstance(value, Tensor):
            kept = old.get(name)
            same = kept is not None and kept.shape[1:] == value.shape and _same_memory(kept[0], value)
            entries[name] = kept if same and kept is not None else value.detach()[None]
        elif type(value) in _NUMBERS:
            entries[f"{name}:{type(value).__name__}"] = torch.tensor([[value]], dtype=_NUMBERS[type(value)])
        elif value is not None:
            raise self._unsavable(f"{name.partition('.')[2]!r} as {type(value).__name__}")

    def _unsavable(self, what: str) -> ConfigError:
        return ConfigError(
            f"client.optimizer ({self.name}) keeps {what}, which cannot be saved with a client's stream; choose an "
            "optimizer whose state is tensors and numbers, kept per parameter or in its parameter group"
        )


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a is b or (
        a.data_ptr() == b.data_ptr()
        and a.dtype == b.dtype
        and a.device == b.device
        and a.shape == b.shape
        and a.stride() == b.stride()
    )


def _same_entries(a: State, b: State) -> bool:
    return len(a) == len(b) and all(b.get(name) is tensor for name, tensor in a.items())

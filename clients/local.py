"""What hooks see as ``local``, and the training loop, one client at a time.

Parameters are one flat vector, and the network's tensors are views of it. A *stream* is a data order
with its optimizer state; the order is keyed by the position in the stream, not by the round, so that
R rounds of E epochs see the very batches of one round of R * E epochs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from fedsim import random
from fedsim.clients.batch import Batch
from fedsim.clients.ops import clip
from fedsim.clients.optimizers import SGD
from fedsim.clients.visit import Memory, Sent, Stats, Stream, Visit
from fedsim.errors import ClientError
from fedsim.network import Point
from fedsim.parts import Block
from fedsim.program import Bound, Hooks, Program, mean_task_loss, task_loss
from fedsim.strategy import ClientHalf, Grad, Model

# A client's data are normalised once per visit when they are at most this large, and else batch by batch.
VISIT_CACHE_BYTES = 2**28
# What one call of `Local.train` works with.
OF_A_CALL = (
    *("_hooks", "_stream", "_stream_name", "step", "lr", "_batch", "_only"),
    *("_losses", "_grads", "_used"),
)


class Local:
    """What a hook sees of the client that it runs for. The client axis is first everywhere (C = 1; more in
    `fedsim.clients.lanes.Lanes`, where numbers are ``[C, 1]``).

    Attributes:
        start: The parameters that the visit starts from, ``[1, d]``.
        sent: What came down, by name.
        scratch: Anything that lives for this visit only.
        clients: The client ids of the lanes.
        layout: Of the parameter vector.
        round: Number of the round, from 1; 0 in `prepare`.
        phase: ``train`` or the name of a phase.
        mode: ``train``, or in evaluation ``global`` or ``personal``.
        step: Steps made in the current stream, earlier visits included.
        steps: Steps planned for this visit.
        lr: Learning rate of the current step.
        n: Training examples.
        active: Lanes that make the current step, bool ``[C, 1]``.
        mean_loss: Mean training loss of the last call of `train`, ``[1]``.
        half: The strategy, or the half of the phase.
    """

    n: Any
    step: Any
    lr: Any

    def __init__(self, program: Program, visit: Visit, sent: Mapping[str, Any], hooks: Hooks | None = None) -> None:
        self._program, self._visit = program, visit
        self.options = program.options
        self.layout = program.layout
        self.clients: tuple[int, ...] = (visit.client,)
        self.round, self.phase, self.mode = visit.round_num, visit.phase, visit.mode
        self.sent = Sent(sent)
        self.scratch: dict[str, Any] = {}
        self.stats = Stats()
        self._spaces: dict[str, dict[str, Tensor]] = {}
        self._streams: dict[str, Stream] = {}
        for name, row in visit.memory.items():
            space, _, key = name.partition(".")
            if space not in ("stream", "buffers"):
                self._spaces.setdefault(space, {})[key] = row.unsqueeze(0).to(program.device)
        self._space = "strategy"
        self._hooks = (hooks or program.hooks).bind(self)
        self.half = self._hooks.hooks.outer
        self._shard = program.shard(visit.client, visit.part)
        self.n = len(self._shard)
        self.active = torch.ones(1, 1, dtype=torch.bool, device=program.device)
        self._ready: tuple[Tensor, Tensor] | None = None
        self.step = 0
        self.lr = self.options.lr * self.options.lr_decay ** max(self.round - 1, 0)
        self._lr_sum = 0.0
        self.mean_loss = torch.zeros(1)
        self._batch: Batch | None = None
        self._grads: list[Tensor] = []
        self._used = 0
        self._seeds: dict[tuple[str, str], int] = {}
        self._cuda = program.device.type == "cuda"
        self._losses: list[Tensor] = []
        self._only: list[int] | None = None
        self._stream: Stream | None = None
        self._stream_name = ""
        self.start: Tensor = self.sent.w if "w" in sent else program.network.initial.unsqueeze(0)
        if visit.part != "none":
            self._initialise()

    # --- what the client has -------------------------------------------------------------------------

    def _initialise(self) -> None:
        """First values of memory where the client has none, then its private parameters."""
        halves = [*self._program.recipes, ("strategy", self._program.strategy)]
        if self.half is not self._program.strategy:
            halves.append(("strategy", self.half))
        for name, half in halves:
            missing = self._spaces.setdefault(name, {})
            with self.space(name):
                first = half.memory(self)
            for key, value in first.items():
                if key not in missing:
                    missing[key] = value
        if (mask := self._program.private) is not None:
            self.start = self.start.clone()
            own = self._spaces["strategy"].setdefault("private", self.start[:, mask])
            self.start[:, mask] = own.to(self.start)

    @property
    def memory(self) -> Memory:
        """What the client keeps between visits; each half has its own name space."""
        return Memory(self._spaces.setdefault(self._space, {}))

    @contextmanager
    def space(self, name: str) -> Iterator[None]:
        """Runs a hook in the memory of the half called ``name``."""
        before, self._space = self._space, name
        try:
            yield
        finally:
            self._space = before

    @property
    def num_examples(self) -> Tensor:
        """Training examples of each client, float64 ``[1, 1]``."""
        return torch.tensor([[float(self.n)]], dtype=torch.float64)

    @property
    def class_counts(self) -> Tensor:
        """Examples of each class, int64 ``[1, classes]``."""
        return torch.bincount(self.y[0], minlength=self._program.dataset.num_classes).unsqueeze(0)

    @property
    def y(self) -> Tensor:
        """Labels of all of the client's examples, ``[1, n]``."""
        y = self._shard.y
        return self._program.targets(y.index_select(0, self._shard.rows.to(y.device))).unsqueeze(0)

    def labels(self) -> tuple[Tensor, Tensor]:
        """Labels of all of the clients' examples, and which of them are real and no padding, ``[C, n]`` each."""
        y = self.y
        return y, torch.ones_like(y, dtype=torch.bool)

    @property
    def lr_sum(self) -> Tensor:
        """Sum of the learning rates of the steps made in this visit, ``[1, 1]``."""
        return torch.tensor([[self._lr_sum]], dtype=torch.float64, device=self._program.device)

    @property
    def steps(self) -> Any:
        """Steps planned for this visit."""
        if self._visit.steps is not None:
            return self._visit.steps if self.n else 0
        if self._visit.epochs is not None:
            return self._visit.epochs * self.steps_per_epoch
        return self.options.planned_steps(self.n)

    @property
    def steps_per_epoch(self) -> Any:
        """Steps of one pass over the client's data at the configured batch size."""
        size = min(self.options.batch_size or self.n, self.n) or 1
        return max(self.n // size, 1) if self.options.drop_last else -(-self.n // size)

    def generator(self, purpose: str, *index: int | str) -> list[torch.Generator]:
        """One generator per lane, keyed by (seed, purpose, phase, visit, client, *index)."""
        v = self._visit
        return [random.generator(self._program.seed, purpose, v.phase, v.visit, v.client, *index)]

    def stream_generator(self, purpose: str, *index: int | str) -> list[torch.Generator]:
        """One generator per lane for the current step, keyed by (seed, purpose, stream, client, step, *index).

        Unlike `generator` it does not know the visit: R rounds of E epochs draw what one round of R * E epochs draws.
        """
        key = ("stream", self._stream_name, self._visit.client, self.step)
        return [random.generator(self._program.seed, purpose, *key, *index)]

    def permutation(self, epoch: int) -> Tensor:
        """A random order of the client's examples for one epoch of the current stream, ``[1, n]``."""
        g = random.generator(self._program.seed, "order", self._stream_name, self._visit.client, epoch)
        return torch.randperm(self.n, generator=g).unsqueeze(0)

    # --- the network at some point -------------------------------------------------------------------

    def at(self, w: Tensor) -> Model:
        """The network at ``w``, ``[1, d]``, in evaluation mode and as a constant: no gradient flows into it."""
        return Point(self._program.network, w, detached=True)

    @property
    def blocks(self) -> tuple[Block, ...]:
        """Names of the modules of each of the network's blocks; the last is the head."""
        return self._program.blocks

    def tail(self, first: int, w: Tensor, h: Tensor) -> Tensor:
        """Logits ``[C, B, classes]`` of the network's blocks from number ``first`` on (from 0), which are a constant.

        Args:
            first: The first block that runs.
            w: Parameters of `Federation.tail`, ``[1, d_tail]``, the same for all lanes.
            h: Outputs of the block before, ``[C, B, ...]``; a gradient flows into them.
        """
        network = self._program.tail(first)
        network.train(False)
        views = {name: view.squeeze(0) for name, view in network.layout.views(w).items()}
        outputs: Tensor = functional_call(network.module, views, (h.flatten(0, 1),))[-1]
        return outputs.view(*h.shape[:2], -1)

    def drawn(self, purpose: str) -> Tensor:
        """Parameters as the layers draw them by themselves, ``[C, d]``: of each client, the same in every visit."""
        return torch.stack([self._program.drawn(purpose, client) for client in self.clients])

    def loss(self, model: Model, batch: Batch) -> Tensor:
        """The recipe's objective, or the task's: ``[1, B]``."""
        return self._hooks.inner_loss(model, batch)

    def task_loss(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy (integer labels) or half the squared error (float targets), ``[1, B]``."""
        return task_loss(outputs, y)

    def delta(self, w: Tensor) -> Tensor:
        """``w - start`` in float64, ``[1, d]``; 0 where parameters are private or frozen."""
        delta = w.double()
        delta = delta.sub_(self._program.double_start(self.start)) if delta is not w else w - self.start
        if self._program.kept_out is not None:
            delta[:, self._program.kept_out] = 0.0
        return delta

    def grad(self, at: Tensor, batch: Batch | None = None, half: ClientHalf | None = None) -> Tensor:
        """The gradient of the local objective at ``at``, ``[1, d]``.

        Within a step it uses that step's minibatch and dropout, however often it is called; elsewhere a
        ``batch`` is needed, and the network is in evaluation mode. The result stays valid until the step ends.

        Args:
            at: The point, ``[1, d]``.
            batch: Other examples.
            half: Other objective: the half whose ``loss`` is meant.
        """
        if self._batch is not None:
            return self._grad(at, batch, half)
        if batch is None:
            raise ClientError("local.grad needs a batch when it is called outside of a step")
        network = self._program.network
        mode = network.mode
        network.train(False)
        try:
            with torch.enable_grad():
                return self._grad(at, batch, half)
        finally:
            network.train(*mode)

    def _grad(self, at: Tensor, batch: Batch | None, half: ClientHalf | None) -> Tensor:
        self.stats.gradients += 1
        program, network = self._program, self._program.network
        step_batch = batch is None
        if batch is None:
            assert self._batch is not None
            batch = self._batch
        objective = self._objective(
            at.contiguous(), batch, self._hooks if half is None else program.phase_hooks(half).bind(self)
        )
        if self._batch is None:
            return network.gradient(objective, torch.empty_like(self.start), self._only)
        if step_batch and self._used == 0:
            self._losses.append(objective.detach())
        if self._used == len(self._grads):
            self._grads.append(torch.empty_like(self.start))
        self._used += 1
        return network.gradient(objective, self._grads[self._used - 1], self._only)

    def _objective(self, at: Tensor, batch: Batch, hooks: Bound) -> Tensor:
        """The local objective, a scalar; the network is then bound to ``at``."""
        network = self._program.network
        self._seed("dropout")  # again for every gradient: all gradients of a step see the same mask
        if hooks.plain_loss and batch.plain:
            # The task's own objective in one kernel; the bits of the gradient are those of the general way.
            network.bind(at)
            return mean_task_loss(network.evaluate(network.module, batch.x[0]), batch.y[0])
        objective = batch.objective(hooks.loss(Point(network, at), batch)).sum()
        network.bind(at)
        return objective

    def _descends(self, still: Tensor | None) -> bool:
        """Whether a step is nothing but plain gradient descent on the parameters."""
        plain = self._hooks.plain_direction and self._hooks.plain_update and self.options.clip_norm is None
        return plain and still is None and self.options.optimizer == SGD()

    def _descend(self, w: Tensor) -> None:
        """A step of plain gradient descent, in place: the bits of the general way, without a flat gradient."""
        assert self._batch is not None
        self.stats.gradients += 1
        objective = self._objective(w, self._batch, self._hooks)
        self._losses.append(objective.detach())
        self._program.network.descend(objective, self.lr)

    def _seed(self, purpose: str) -> None:
        """Seeds torch's own generators, for layers and hooks that draw from them, by stream, client and step."""
        key = purpose, self._stream_name
        if key not in self._seeds:  # hashed once: steps take consecutive seeds
            self._seeds[key] = random.derive(self._program.seed, *key, self._visit.client)
        seed = (self._seeds[key] + self.step) & 0x7FFF_FFFF_FFFF_FFFF
        torch.default_generator.manual_seed(seed)
        if self._cuda:
            torch.cuda.manual_seed(seed)

    # --- batches -------------------------------------------------------------------------------------

    def take(self, index: Tensor) -> Batch:
        """A batch of the examples numbered ``index``, ``[1, B]``; not augmented."""
        return self._gather(index, None)

    def examples(self) -> Batch:
        """All of the client's examples, not augmented."""
        return self.take(torch.arange(self.n).unsqueeze(0))

    def _gather(self, index: Tensor, weight: Tensor | None, repeats: bool = False) -> Batch:
        program, i = self._program, index.squeeze(0)
        if repeats:
            i = i % self.n
        if self._ready is not None:
            i = i if self._ready[0].device == i.device else i.to(self._ready[0].device)
            x, y = program.arranged(self._ready[0].index_select(0, i)), self._ready[1].index_select(0, i)
        else:
            rows = self._shard.rows.index_select(0, i).to(self._shard.x.device)
            x = program.inputs(self._shard.x.index_select(0, rows))
            y = program.targets(self._shard.y.index_select(0, rows))
        return Batch(x=x.unsqueeze(0), y=y.unsqueeze(0), index=index, weight=weight)

    def _prepare_inputs(self, num_examples: int) -> None:
        """Normalises the client's data once, where the visit will use all of them anyway."""
        x = self._shard.x
        if self._ready is not None or x.dtype != torch.uint8 or num_examples < self.n:
            return
        if self.n * x[0].numel() * self.start.element_size() <= VISIT_CACHE_BYTES:
            rows = self._shard.rows.to(x.device)
            inputs, targets = x.index_select(0, rows), self._shard.y.index_select(0, rows)
            self._ready = self._program.inputs(inputs), self._program.targets(targets)

    def _augment(self, batch: Batch) -> None:
        from fedsim.datasets.augment import AUGMENTATIONS

        key = (self._stream_name, self._visit.client, self.step)
        for name in self.options.augment:
            g = random.generator(self._program.seed, f"augment.{name}", *key)
            x = batch.x[0]
            batch.x = AUGMENTATIONS[name].apply(x, AUGMENTATIONS[name].draw(len(x), g)).unsqueeze(0)

    # --- training ------------------------------------------------------------------------------------

    def _open(self, name: str) -> Stream:
        if name not in self._streams:
            stream, prefix = Stream(), f"stream.{name}"
            if (position := self._visit.memory.get(prefix)) is not None:
                stream.steps, stream.epoch, stream.offset = (int(v) for v in position)
            kept = {
                k[len(prefix) + 5 :]: v.unsqueeze(0).clone()
                for k, v in self._visit.memory.items()
                if k.startswith(f"{prefix}.opt.")
            }
            if kept:
                stream.optimizer = kept
            self._streams[name] = stream
        return self._streams[name]

    def _draw(self, stream: Stream) -> None:
        order = self._hooks.order(stream.epoch)
        stream.order, stream.weight = (order[0][0], order[1][0]) if isinstance(order, tuple) else (order[0], None)
        if not len(stream.order):
            raise ClientError(f"`order` selected none of the client's {self.n} examples for epoch {stream.epoch}")
        stream.repeats = bool((stream.order >= self.n).any())
        if stream.offset >= len(stream.order):  # a visit ended in mid-epoch, and the order has become shorter since
            stream.epoch, stream.offset = stream.epoch + 1, 0
            self._draw(stream)

    def _next(self, stream: Stream, size: int | None) -> tuple[Tensor, Tensor | None]:
        """The next minibatch of a stream: numbers within the client's data and weights, ``[1, B]``."""
        if stream.order is None:
            self._draw(stream)
        order = stream.order
        assert order is not None
        a, n = stream.offset, order.shape[0]
        size = size or n
        b = min(a + size, n)
        stream.offset = b
        if b == n or (self.options.drop_last and n - b < size):
            stream.epoch, stream.offset, stream.order = stream.epoch + 1, 0, None
        weight = None if stream.weight is None else stream.weight.narrow(0, a, b - a).unsqueeze(0)
        return order.narrow(0, a, b - a).unsqueeze(0), weight

    def optimizer(self, w: Tensor, d: Tensor) -> Tensor:
        """The configured optimizer's step along ``d``, ``[1, d]``; may write into ``w``."""
        stream = self._stream
        assert stream is not None and stream.optimizer is not None, "local.optimizer is for use in `update`"
        return self.options.optimizer.step(w, d, stream.optimizer, self.lr)

    def train(
        self,
        w: Tensor,
        *,
        half: ClientHalf | None = None,
        only: str | None = None,
        epochs: int | None = None,
        steps: int | None = None,
        active: Tensor | None = None,
        stream: str | None = None,
    ) -> Tensor:
        """Trains from ``w`` and returns the result; ``w`` is left as it is.

        Args:
            w: Where to start, ``[1, d]``.
            half: Another half whose hooks are used.
            only: Train the parameters that fit this pattern; the rest stays.
            epochs: Passes over the data; default: as configured or dispatched.
            steps: Minibatch steps, instead of epochs.
            active: Bool ``[1, 1]``: lanes that train; the others return ``w``.
            stream: Name of the data order and optimizer state; default: that of the phase.
        """
        if (active is not None and not bool(active.any())) or not self.n:
            return w
        if epochs is None and steps is None:
            epochs, steps = self._visit.epochs, self._visit.steps
            if epochs is None and steps is None:
                epochs, steps = self.options.epochs, self.options.steps
        outer = {name: self.__dict__[name] for name in OF_A_CALL}  # a hook may train inside of a step
        self._grads, self._used, self._only = [], 0, None
        if half is not None:
            self._hooks = self._program.phase_hooks(half).bind(self)
        self._stream_name = stream or self.phase
        self._stream = s = self._open(self._stream_name)
        try:
            with torch.enable_grad():  # `personal` may train, and evaluation has gradients switched off
                return self._train(w.clone(memory_format=torch.contiguous_format), s, epochs, steps, self._still(only))
        finally:
            self.__dict__.update(outer)

    def _still(self, only: str | None) -> Tensor | None:
        """Coordinates that this call must leave alone, bool ``[d]``."""
        program, names = self._program, self._program.layout.names
        still = program.frozen
        if only is not None:
            mask = ~program.layout.mask(only).to(program.device)
            still = mask if still is None else still | mask
        if still is not None:
            self._only = [i for i, n in enumerate(names) if not bool(still[program.layout.slices[n]].all())]
        return still

    def _train(self, w: Tensor, s: Stream, epochs: int | None, steps: int | None, still: Tensor | None) -> Tensor:
        options, hooks, network = self.options, self._hooks, self._program.network
        if s.optimizer is None:
            s.optimizer = options.optimizer.init(w)
        network.train(True, frozen_norms=options.buffers == "frozen")
        base_lr, size = options.lr * options.lr_decay ** max(self.round - 1, 0), options.batch_size
        last_epoch = None if epochs is None else s.epoch + epochs
        self._prepare_inputs(self.n if steps is None else steps * min(size or self.n, self.n))
        before = w.clone() if still is not None else None
        self._losses, first = [], s.steps
        counts: list[int] = []
        scored: list[tuple[int, int]] = []
        direction: Grad = self.grad
        descends = self._descends(still)
        while (s.steps - first < steps) if steps is not None else (s.epoch < last_epoch):  # type: ignore[operator]
            self.step, self.lr, self._batch = s.steps, base_lr, None
            if hooks.draws:
                self._seed("hooks")
            if hooks.schedules:
                plan = hooks.schedule()
                self.lr = base_lr * float(plan.get("lr", 1.0))
                size = int(plan["batch_size"]) if "batch_size" in plan else options.batch_size
            index, weight = self._next(s, size)
            batch = self._gather(index, weight, s.repeats)
            if options.augment:
                self._augment(batch)
            self._batch = hooks.batch(batch) if hooks.plain_batch else batch
            self._used = 0
            if descends:
                self._descend(w)
            else:
                d = direction(w) if hooks.plain_direction else hooks.direction(w, self.grad)
                if options.clip_norm is not None:
                    d = clip(d, options.clip_norm)
                new = self.optimizer(w, d) if hooks.plain_update else hooks.single("update", w, d)
                if new is not w:
                    w.copy_(new)
                if still is not None:
                    torch.where(still, before, w, out=w)  # type: ignore[arg-type]
            self._lr_sum += self.lr
            s.steps += 1
            counts.append(index.shape[1])
            if len(self._losses) > len(scored):
                scored.append((len(counts), index.shape[1]))
        self._batch = None
        self._account(counts, scored)
        return w

    def _account(self, counts: list[int], scored: list[tuple[int, int]]) -> None:
        """Books the steps; ``scored`` has the number and the examples of those whose loss was computed."""
        self.stats.steps += len(counts)
        self.stats.examples += sum(counts)
        if not scored:
            return
        losses = torch.stack(self._losses).double().cpu()
        if not bool(losses.isfinite().all()):
            bad = int((~losses.isfinite()).nonzero()[0])
            raise ClientError(
                f"the training loss became {losses[bad].item()} at local step {scored[bad][0]} of {len(counts)} "
                f"(lr {self.lr:g}); lower client.lr, or bound the step with client.clip_norm"
            )
        n = torch.tensor([size for _, size in scored], dtype=torch.float64)
        self.mean_loss = ((losses * n).sum() / n.sum()).view(1)
        self.stats.scored += int(n.sum())
        self.stats.loss += float((losses * n).sum())

    # --- the end of a visit --------------------------------------------------------------------------

    @property
    def sizes(self) -> list[int]:
        """Training examples of each lane's client."""
        return [self.n]

    @property
    def lane_stats(self) -> list[Stats]:
        """What each lane did."""
        return [self.stats]

    def lane_rows(self, w: Tensor) -> list[dict[str, Tensor]]:
        """`rows` of each lane's client."""
        return [self.rows(w)]

    def rows(self, w: Tensor) -> dict[str, Tensor]:
        """What the client keeps, by qualified name; of torch's own memory.

        Args:
            w: What `ClientHalf.work` returned, ``[1, d]``.
        """
        out: dict[str, Tensor] = {}
        if self._program.private is not None:
            self._spaces["strategy"]["private"] = w[:, self._program.private]
        for space, values in self._spaces.items():
            for key, value in values.items():
                if not isinstance(value, Tensor) or len(value) != 1:
                    raise ClientError(
                        f"memory.{key} must be a tensor with the client axis first, [1, ...], got {value!r:.80}"
                    )
                out[f"{space}.{key}"] = value[0].detach().clone()
        for name, s in self._streams.items():
            out[f"stream.{name}"] = torch.tensor([s.steps, s.epoch, s.offset], dtype=torch.int64)
            if self.options.keep_optimizer:
                out.update({f"stream.{name}.opt.{k}": v[0].clone() for k, v in (s.optimizer or {}).items()})
        return out

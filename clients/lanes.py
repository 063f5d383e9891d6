"""Several clients trained as one computation: `Local` with C lanes.

Hooks are the same, for they are written with the client axis first. The network is stacked (`fedsim.stacked`) or
vmapped; all else is ordinary tensor code over ``[C, ...]``. A lane sees the batches, learning rates and augmentations
that it would see alone. Batches of different sizes are padded with a real example that has no weight, and a lane that
has made all of its steps no longer moves; so the numbers are those of the one-by-one loop up to rounding, not its bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call, vmap
from torch.nn.utils.rnn import pad_sequence

from fedsim import random
from fedsim.batching import reason
from fedsim.clients.batch import Batch
from fedsim.clients.local import OF_A_CALL, VISIT_CACHE_BYTES, Local
from fedsim.clients.ops import clip
from fedsim.clients.visit import Memory, Sent, Stats, Stream, Visit
from fedsim.errors import ClientError
from fedsim.network import Network, map_tensors
from fedsim.program import Bound, Hooks, Program
from fedsim.reduce import tensors_in
from fedsim.strategy import ClientHalf, Grad, Model

NEVER = 10**9  # an epoch, or a number of steps, that is not reached
PLANNED = 256  # steps whose examples are chosen at a time: indices of all steps of a long visit would be large
PLANNED_NUMBERS = 2**20  # examples that are chosen at a time, about
ALONE = "train these clients one by one: client.batching=off"


def forward(
    network: Network,
    params: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    x: Any,
    lanes: int,
    blocks: bool = False,
) -> Any:
    """The network at C points at once.

    Args:
        network: Gives the module, and its mode.
        params: By name, ``[C, *shape]``, or ``[1, *shape]`` where all lanes share them.
        buffers: Floating-point buffers likewise; in training mode batch norms write into them.
        x: Inputs, ``[C, B, ...]`` or ``[1, B, ...]``.
        lanes: C.
        blocks: Whether the outputs of all blocks are wanted.

    Returns:
        Outputs, ``[C, B, ...]``.
    """
    shared = all(len(t) == 1 for t in params.values())
    if network.stack is not None and isinstance(x, Tensor) and not shared and not blocks:
        return network.evaluate(network.stack, params, x.expand(lanes, *x.shape[1:]))
    given, module = {**params, **buffers}, network.module
    if blocks:
        given, module = {f"module.{name}": t for name, t in given.items()}, network.blocks

    def call(given: dict[str, Tensor], x: Any) -> Any:
        return functional_call(module, given, (x,))

    if shared and not buffers and not (network.mixes and network.module.training):
        rows, width = next(t.shape[:2] for t in tensors_in(x))
        flat = map_tensors(lambda t: t.flatten(0, 1), x)  # one network for all: a larger batch
        out = network.evaluate(call, {k: t.squeeze(0) for k, t in given.items()}, flat)
        if all(t.dim() and len(t) == rows * width for t in tensors_in(out)):
            return map_tensors(lambda t: t.view(rows, width, *t.shape[1:]), out)
    if all(len(t) == 1 for t in tensors_in((given, x))):
        out = network.evaluate(call, *map_tensors(lambda t: t.squeeze(0), (given, x)))
        return map_tensors(lambda t: t.unsqueeze(0), out)
    squeezed = map_tensors(lambda t: t.squeeze(0) if len(t) == 1 < lanes else t, (given, x))
    return network.evaluate(vmap(call, in_dims=_axes((given, x), lanes)), *squeezed)


def _axes(tree: Any, lanes: int) -> Any:
    """Of a tree of tensors: 0 where there is a lane for each client, None where one is for all."""
    if isinstance(tree, Tensor):
        return None if len(tree) == 1 < lanes else 0
    if isinstance(tree, Mapping):
        return {k: _axes(v, lanes) for k, v in tree.items()}
    if isinstance(tree, tuple | list):
        return type(tree)(_axes(v, lanes) for v in tree)
    return None


class LanePoint:
    """The network at one point a lane, for `ClientHalf.loss` and `ClientHalf.predict`.

    Args:
        lanes: Whose.
        views: The parameters by name, ``[C, *shape]``, or ``[1, *shape]`` for all lanes.
        detached: Evaluation mode and no gradient: a constant of the local objective.
    """

    def __init__(self, lanes: Lanes, views: dict[str, Tensor], detached: bool = False) -> None:
        self._lanes, self.views, self._detached = lanes, views, detached

    def __call__(self, x: Any) -> Any:
        return self._run(x, False)

    def blocks(self, x: Any) -> Any:
        return self._run(x, True)

    def _run(self, x: Any, blocks: bool) -> Any:
        lanes, network = self._lanes, self._lanes.network
        if not self._detached:
            return forward(network, self.views, lanes.buffers, x, len(lanes.clients), blocks)
        mode = network.mode
        network.train(False)
        try:
            with torch.no_grad():
                return forward(network, self.views, lanes.buffers, x, len(lanes.clients), blocks)
        finally:
            network.train(*mode)


@dataclass
class LaneStream:
    """A data order for each lane, with the optimizer's state of all of them.

    Attributes:
        lanes: Where each one stands.
        optimizer: The optimizer's tensors, ``[C, ...]``.
        used: Lanes that have trained on it; the others keep what they had.
    """

    lanes: list[Stream]
    optimizer: dict[str, Tensor] | None = None
    used: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class Steps:
    """The examples of some steps.

    Attributes:
        index: Their numbers within the clients' data, int64 ``[T, C, B]``; 0 where a batch is padded.
        rows: The same within the data of all lanes.
        sizes: Real examples of each batch, ``[T, C]``; 0 for a lane that has made all of its steps.
        widths: Examples of each step's largest batch; what follows in ``index`` is no step's.
        padded: Whether a lane that makes the step has a smaller one.
        keep: Which entries are real, bool ``[T, C, B]``; None if no step is padded.
        moves: Lanes that make the step, bool ``[T, C, 1]``.
    """

    index: Tensor
    rows: Tensor
    sizes: np.ndarray[Any, np.dtype[np.int64]]
    widths: list[int]
    padded: list[bool]
    keep: Tensor | None
    moves: Tensor


class _PartialMemory(Memory):
    """Memory of clients of whom only some have certain rows, which no hook may ask for then.

    Args:
        values: What all have.
        some: Names of the other rows.
    """

    def __init__(self, values: dict[str, Tensor], some: Sequence[str]) -> None:
        super().__init__(values)
        object.__setattr__(self, "_some", some)

    def _refuse(self, name: str) -> None:
        if name in object.__getattribute__(self, "_some"):
            raise ClientError(f"only some clients have memory.{name}; give its first value in `memory`, or {ALONE}")

    def __getattr__(self, name: str) -> Tensor:
        self._refuse(name)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Tensor) -> None:
        self._refuse(name)
        super().__setattr__(name, value)

    def __contains__(self, name: str) -> bool:
        self._refuse(name)
        return super().__contains__(name)


class Lanes(Local):
    """What a hook sees of C clients that are trained together.

    Differs from `Local` in that what is a number there is float64 ``[C, 1]`` here: ``step``, ``steps``, ``n``, and
    ``lr`` where a schedule gives lanes different ones.

    Args:
        program: The network, the data and the method.
        visits: One for each lane; alike but for clients, visits and memory.
        sent: What came down, ``[1, ...]`` for all or ``[C, ...]``.
        hooks: Of a phase; default: the strategy's.
        buffers: Floating-point buffers of the network, ``[C, nb]``; training writes into them.
    """

    def __init__(
        self,
        program: Program,
        visits: Sequence[Visit],
        sent: Mapping[str, Any],
        hooks: Hooks | None = None,
        buffers: Tensor | None = None,
    ) -> None:
        self._program, self._visit, self._visits = program, visits[0], tuple(visits)
        self.network = program.network
        self.options, self.layout = program.options, program.layout
        self.clients: tuple[int, ...] = tuple(v.client for v in visits)
        self.round, self.phase, self.mode = self._visit.round_num, self._visit.phase, self._visit.mode
        self.sent = Sent(sent)
        self.scratch = {}
        self._own_buffers = buffers
        # Tensors of their own: under vmap batch norms do not write through to what is not contiguous.
        views = {} if buffers is None else program.network.buffer_layout.views(buffers)
        self.buffers = {name: view.clone(memory_format=torch.contiguous_format) for name, view in views.items()}
        self._stats = [Stats() for _ in visits]
        self._spaces = {}
        self._some: dict[str, dict[int, Tensor]] = {}  # rows that only some lanes have, by qualified name and lane
        self._stack_memory()
        self._lane_streams: dict[str, LaneStream] = {}
        self._space = "strategy"
        self._hooks = (hooks or program.hooks).bind(self)
        self.half = self._hooks.hooks.outer
        self._shards = [program.shard(v.client, v.part) for v in visits]
        self._sizes = [len(shard) for shard in self._shards]
        self.n = self._column(self._sizes)
        self._data: tuple[Tensor, Tensor] | None = None
        self._prepared = False
        self._made = [0] * len(visits)  # `step`, for who must not wait for a GPU
        self.step = self._column(self._made)
        self.lr = self.options.lr * self.options.lr_decay ** max(self.round - 1, 0)
        self.active = torch.ones(len(visits), 1, dtype=torch.bool, device=program.device)
        self._lr_sums = torch.zeros(len(visits), 1, dtype=torch.float64, device=program.device)
        self.mean_loss = torch.zeros(len(visits))
        self._batch = None
        self._grads, self._used, self._calls, self._losses, self._only = [], 0, 0, [], None
        self._seeds = {}
        self._cuda = program.device.type == "cuda"
        self._stream, self._stream_name = None, ""
        self.start = self.sent.w if "w" in sent else program.network.initial.unsqueeze(0)
        self._initialise()

    # --- what the clients have -----------------------------------------------------------------------

    def _stack_memory(self) -> None:
        """Rows of all lanes side by side; those that only some have wait for the first values of the others, and are
        kept as they are if no half gives them (another phase's, for example)."""
        rows: dict[str, dict[int, Tensor]] = {}
        for i, visit in enumerate(self._visits):
            for name, row in visit.memory.items():
                if name.partition(".")[0] not in ("stream", "buffers"):
                    rows.setdefault(name, {})[i] = row
        for name, known in rows.items():
            space, _, key = name.partition(".")
            if len({row.shape for row in known.values()}) > 1:
                raise self._ragged(name)
            if len(known) == len(self._visits):
                stacked = torch.stack([known[i] for i in range(len(known))])
                self._spaces.setdefault(space, {})[key] = stacked.to(self._program.device)
            else:
                self._some[name] = known

    def _ragged(self, name: str) -> ClientError:
        key = name.partition(".")[2]
        return ClientError(f"clients remember different shapes as memory.{key}, which fit into no tensor; {ALONE}")

    def _initialise(self) -> None:
        halves = [*self._program.recipes, ("strategy", self._program.strategy)]
        if self.half is not self._program.strategy:
            halves.append(("strategy", self.half))
        for name, half in halves:
            missing = self._spaces.setdefault(name, {})
            with self.space(name):
                first = half.memory(self)
            for key, value in first.items():
                if key not in missing:
                    missing[key] = self._with_known(f"{name}.{key}", value)
        if (mask := self._program.private) is not None:
            self.start = self._lanes(self.start).clone()
            own = self._spaces["strategy"]
            if "private" not in own:
                own["private"] = self._with_known("strategy.private", self.start[:, mask])
            self.start[:, mask] = own["private"].to(self.start)

    @property
    def memory(self) -> Memory:
        known = [name.partition(".")[2] for name in self._some if name.partition(".")[0] == self._space]
        values = self._spaces.setdefault(self._space, {})
        return _PartialMemory(values, known) if known else Memory(values)

    def _with_known(self, name: str, first: Tensor) -> Tensor:
        """First values, ``[C, ...]``, but for lanes that have the row already."""
        known = self._some.pop(name, {})
        first = self._lanes(first).clone()
        for i, row in known.items():
            if row.shape != first.shape[1:]:
                raise self._ragged(name)
            first[i] = row.to(first)
        return first

    def _lanes(self, t: Tensor) -> Tensor:
        """``[1, ...]`` or ``[C, ...]`` as ``[C, ...]``."""
        return t.expand(len(self._visits), *t.shape[1:]) if len(t) == 1 else t

    def _column(self, numbers: Sequence[int]) -> Tensor:
        """A number of each client, float64 ``[C, 1]``, so that sums with it are not rounded to float32."""
        return torch.tensor(numbers, dtype=torch.float64, device=self._program.device).unsqueeze(1)

    @property
    def lane_stats(self) -> list[Stats]:
        return self._stats

    @property
    def sizes(self) -> list[int]:
        return self._sizes

    @property
    def num_examples(self) -> Tensor:
        return torch.tensor(self._sizes, dtype=torch.float64).unsqueeze(1)

    @property
    def class_counts(self) -> Tensor:
        classes = self._program.dataset.num_classes
        return torch.stack([torch.bincount(self._labels(i), minlength=classes) for i in range(len(self._shards))])

    @property
    def y(self) -> Tensor:
        """Labels of all of the clients' examples, ``[C, n]``; they must have equally many."""
        if len(set(self._sizes)) > 1:
            raise ClientError(
                f"local.y of clients with {min(self._sizes)} to {max(self._sizes)} examples is ragged; {ALONE}"
            )
        return torch.stack([self._labels(i) for i in range(len(self._shards))])

    def labels(self) -> tuple[Tensor, Tensor]:
        own = [self._labels(i) for i in range(len(self._shards))]
        sizes = torch.tensor(self._sizes, device=own[0].device).unsqueeze(1)
        return pad_sequence(own, batch_first=True), torch.arange(max(self._sizes), device=own[0].device) < sizes

    def _labels(self, i: int) -> Tensor:
        shard = self._shards[i]
        return self._program.targets(shard.y.index_select(0, shard.rows.to(shard.y.device)))

    @property
    def lr_sum(self) -> Tensor:
        return self._lr_sums.clone()

    @property
    def steps(self) -> Any:
        """Steps planned for this visit, ``[C, 1]``."""
        v = self._visit
        if v.steps is not None:
            planned = [v.steps if n else 0 for n in self._sizes]
        elif v.epochs is not None:
            planned = [v.epochs * int(e) for e in self.steps_per_epoch]
        else:
            planned = [self.options.planned_steps(n) for n in self._sizes]
        return self._column(planned)

    @property
    def steps_per_epoch(self) -> Any:
        per = []
        for n in self._sizes:
            size = min(self.options.batch_size or n, n) or 1
            per.append(max(n // size, 1) if self.options.drop_last else -(-n // size))
        return self._column(per)

    def generator(self, purpose: str, *index: int | str) -> list[torch.Generator]:
        seed = self._program.seed
        return [random.generator(seed, purpose, v.phase, v.visit, v.client, *index) for v in self._visits]

    def stream_generator(self, purpose: str, *index: int | str) -> list[torch.Generator]:
        seed, name = self._program.seed, self._stream_name
        return [
            random.generator(seed, purpose, "stream", name, c, s, *index)
            for c, s in zip(self.clients, self._made, strict=True)
        ]

    def permutation(self, epoch: int) -> Tensor:
        raise ClientError(f"lanes have no common permutation; {ALONE}")

    # --- the network at some point -------------------------------------------------------------------

    def at(self, w: Tensor) -> Model:
        return LanePoint(self, self.layout.views(w), detached=True)

    def _grad(self, at: Tensor, batch: Batch | None, half: ClientHalf | None) -> Tensor:
        step_batch = batch is None
        if batch is None:
            assert self._batch is not None
            batch = self._batch
        hooks = self._hooks if half is None else self._of(half)
        at = self._lanes(at).contiguous()
        losses, leaves = self._objectives(at, batch, hooks)
        if self._batch is None:
            for stats, active in zip(self._stats, self.active[:, 0].tolist(), strict=True):
                stats.gradients += active
            return self._gradient(losses.sum(), leaves, torch.empty_like(at))
        self._calls += 1
        if step_batch and self._used == 0:
            self._losses.append(losses.detach())
        if self._used == len(self._grads):
            self._grads.append(torch.empty_like(at))
        self._used += 1
        return self._gradient(losses.sum(), leaves, self._grads[self._used - 1])

    def _of(self, half: ClientHalf) -> Bound:
        """Another half's hooks, which must be fit for several clients, too."""
        hooks = self._program.phase_hooks(half)
        if why := reason(self._program, hooks):
            raise ClientError(f"{why}; {ALONE}")
        return hooks.bind(self)

    def _objectives(self, at: Tensor, batch: Batch, hooks: Bound) -> tuple[Tensor, dict[str, Tensor]]:
        """The objective of each lane, ``[C]``, and views of ``at`` by name that it can be differentiated by."""
        self._seed_lanes("dropout")
        leaves = {name: view.detach().requires_grad_() for name, view in self.layout.views(at).items()}
        return batch.objective(hooks.loss(LanePoint(self, leaves), batch)), leaves

    def _descend(self, w: Tensor) -> None:
        """As in `Local`: plain gradient descent, without a flat gradient."""
        assert self._batch is not None
        self._calls += 1
        losses, leaves = self._objectives(w, self._batch, self._hooks)
        self._losses.append(losses.detach())
        grads = torch.autograd.grad(losses.sum(), list(leaves.values()), allow_unused=True)
        pairs = [(leaf.data, g) for leaf, g in zip(leaves.values(), grads, strict=True) if g is not None]
        torch._foreach_add_([leaf for leaf, _ in pairs], [g for _, g in pairs], alpha=-self.lr)

    def _gradient(self, objective: Tensor, leaves: Mapping[str, Tensor], out: Tensor) -> Tensor:
        names = list(leaves) if self._only is None else [list(leaves)[i] for i in self._only]
        grads = torch.autograd.grad(objective, [leaves[n] for n in names], allow_unused=True)
        if self._only is None and all(g is not None for g in grads):
            return torch.cat([g.flatten(1) for g in grads], dim=1, out=out)
        out.zero_()
        for name, g in zip(names, grads, strict=True):
            if g is not None:
                out[:, self.layout.slices[name]] = g.flatten(1)
        return out

    def _seed_lanes(self, purpose: str) -> None:
        """Seeds torch's own generator for hooks that draw from it; what they draw is not what a client alone draws."""
        key = purpose, self._stream_name
        if key not in self._seeds:
            self._seeds[key] = random.derive(self._program.seed, *key, "lanes", *self.clients)
        seed = (self._seeds[key] + self._made[0]) & 0x7FFF_FFFF_FFFF_FFFF
        torch.default_generator.manual_seed(seed)
        if self._cuda:
            torch.cuda.manual_seed(seed)

    # --- batches -------------------------------------------------------------------------------------

    def _source(self) -> tuple[Tensor, Tensor]:
        """Data of all lanes, raw or normalised, and where each lane's examples are in them (`_from`)."""
        if self._data is None:
            first = self._shards[0]
            if all(s.x is first.x and s.y is first.y for s in self._shards):
                rows = torch.cat([s.rows for s in self._shards])
                self._data, self._rows = (first.x, first.y), rows.numpy()
            else:
                parts = [(s.x, s.y, s.rows.to(s.x.device)) for s in self._shards]
                x = torch.cat([x.index_select(0, rows) for x, _, rows in parts])
                y = torch.cat([y.index_select(0, rows) for _, y, rows in parts])
                self._data, self._rows = (x, y), np.arange(len(x))
            self._offsets = np.concatenate([[0], np.cumsum(self._sizes)[:-1]])
        return self._data

    def _prepare_inputs(self, num_examples: int) -> None:
        x, y = self._source()
        total = sum(self._sizes)
        if self._prepared or x.dtype != torch.uint8 or num_examples < total:
            return
        if total * x[0].numel() * self.start.element_size() <= VISIT_CACHE_BYTES:
            rows = torch.from_numpy(self._rows).to(x.device)
            self._data = (
                self._program.inputs(x.index_select(0, rows)),
                self._program.targets(y.index_select(0, rows)),
            )
            self._rows, self._prepared = np.arange(total), True

    def _batch_of(self, index: Tensor, rows: Tensor, keep: Tensor | None) -> Batch:
        x, y = self._source()
        lanes, flat = index.shape[:2], rows.reshape(-1).to(x.device)
        inputs, targets = x.index_select(0, flat), y.index_select(0, flat)
        if not self._prepared:
            inputs, targets = self._program.inputs(inputs), self._program.targets(targets)
        batch = Batch(
            x=inputs.view(*lanes, *inputs.shape[1:]),
            y=targets.view(*lanes, *targets.shape[1:]),
            index=index,
            weight=None,
        )
        if keep is not None:
            batch.keep = keep
        return batch

    def _with_keep(self, new: Batch, old: Batch) -> Batch:
        """A batch that a hook made anew still says what is padding."""
        if new is not old and not old.plain_keep and new.plain_keep:
            if new.index.shape != old.index.shape:
                raise ClientError(f"`batch` made a padded batch of another shape without `keep`; {ALONE}")
            new.keep = old.keep
        return new

    def take(self, index: Tensor) -> Batch:
        """A batch of the examples numbered ``index``, ``[C, B]``; not augmented.

        Raises:
            IndexError: A client does not have such an example.
        """
        self._source()
        index = self._lanes(index)
        if bool(((index < 0) | (index >= torch.tensor(self._sizes).unsqueeze(1))).any()):
            raise IndexError(f"take: numbers of examples must be from 0 to n - 1, with n = {self._sizes}")
        positions = torch.from_numpy(self._offsets).unsqueeze(1) + index
        return self._batch_of(index, torch.from_numpy(self._rows)[positions], None)

    def examples(self) -> Batch:
        most = max(self._sizes)
        n = torch.tensor(self._sizes).unsqueeze(1)
        index = torch.arange(most).unsqueeze(0).expand(len(n), most)
        batch = self.take(torch.where(index < n, index, 0))
        if bool((n < most).any()):
            batch.keep = (index < n).to(self._program.device)
        return batch

    def _augment_lanes(self, batch: Batch, sizes: Sequence[int]) -> None:
        from fedsim.datasets.augment import AUGMENTATIONS

        x = batch.x
        for name in self.options.augment:
            augmentation, drawn = AUGMENTATIONS[name], []
            steps = self._made
            for i, size in enumerate(sizes):
                g = random.generator(
                    self._program.seed, f"augment.{name}", self._stream_name, self.clients[i], steps[i]
                )
                own = augmentation.draw(size, g)
                drawn.append(torch.cat([own, own.new_zeros(x.shape[1] - size, *own.shape[1:])]))
            x = augmentation.apply(x.flatten(0, 1), torch.cat(drawn)).view_as(x)
        batch.x = x

    # --- training ------------------------------------------------------------------------------------

    def _open_lanes(self, name: str, w: Tensor) -> LaneStream:
        if name in self._lane_streams:
            return self._lane_streams[name]
        prefix, lanes, kept = f"stream.{name}", list[Stream](), list[dict[str, Tensor]]()
        for visit in self._visits:
            stream = Stream()
            if (position := visit.memory.get(prefix)) is not None:
                stream.steps, stream.epoch, stream.offset = (int(v) for v in position)
            lanes.append(stream)
            own = {k[len(prefix) + 5 :]: v for k, v in visit.memory.items() if k.startswith(f"{prefix}.opt.")}
            kept.append(own)
        optimizer = self.options.optimizer.init(w)
        for i, own in enumerate(kept):
            for key, value in own.items():
                optimizer[key][i] = value.to(optimizer[key])
        self._lane_streams[name] = LaneStream(lanes, optimizer)
        return self._lane_streams[name]

    def _chosen(self, i: int, s: Stream, size: int, epoch: int, steps: int) -> Iterator[Any]:
        """The next batches of a lane: the examples of as many as lie in one epoch, and how large each batch is.

        Args:
            i: The lane.
            s: Where it stands; moves on.
            size: Examples of a batch.
            epoch: Stops when this one begins.
            steps: Steps, at most.
        """
        n, made = self._sizes[i], 0
        while made < steps and s.epoch < epoch:
            if s.order is None:
                g = random.generator(self._program.seed, "order", self._stream_name, self.clients[i], s.epoch)
                s.order = torch.randperm(n, generator=g)
            full, rest = divmod(n - s.offset, size)
            left = full + (1 if rest and not (self.options.drop_last and full) else 0)
            count = min(left, steps - made)
            end = min(s.offset + count * size, n)
            yield s.order[s.offset : end].numpy(), count
            made += count
            s.offset = end
            if count == left:
                s.epoch, s.offset, s.order = s.epoch + 1, 0, None

    def _plan(self, s: LaneStream, sizes: Sequence[int], ends: Sequence[int], steps: Sequence[int]) -> Steps:
        """The next steps of every lane, at most so many; lanes stop for good at their last epoch."""
        lanes, width = len(s.lanes), max(sizes)
        passes = [
            (n // size + 1) * (end - lane.epoch)
            for n, size, end, lane in zip(self._sizes, sizes, ends, s.lanes, strict=True)
        ]
        most = max(min(k, p) for k, p in zip(steps, passes, strict=True))
        index = np.zeros((most, lanes, width), dtype=np.int64)
        real = np.zeros((most, lanes), dtype=np.int64)
        for i, stream in enumerate(s.lanes):
            t, size = 0, sizes[i]
            for chosen, count in self._chosen(i, stream, size, ends[i], steps[i]):
                full = len(chosen) // size
                index[t : t + full, i, :size] = chosen[: full * size].reshape(full, size)
                real[t : t + full, i] = size
                if full < count:
                    rest = len(chosen) - full * size
                    index[t + full, i, :rest] = chosen[full * size :]
                    real[t + full, i] = rest
                t += count
        made = int((real.max(1) > 0).sum())
        index, real = index[:made], real[:made]
        self._source()
        rows = self._rows[np.minimum(index + self._offsets[:, None], len(self._rows) - 1)]
        moves = torch.from_numpy(real > 0).unsqueeze(2)
        device, widths, keep = self._program.device, real.max(1), None
        padded = ((real > 0) & (real < widths[:, None])).any(1)
        if padded.any():
            keep = torch.from_numpy((np.arange(width) < real[:, :, None]) | (real[:, :, None] == 0)).to(device)
        rows_of = torch.from_numpy(rows).to(device)
        return Steps(torch.from_numpy(index), rows_of, real, widths.tolist(), padded.tolist(), keep, moves.to(device))

    def optimizer(self, w: Tensor, d: Tensor) -> Tensor:
        """The configured optimizer's step along ``d``, ``[C, d]``, of the lanes that move; may write into ``w``."""
        stream = self._lane_stream
        assert stream is not None and stream.optimizer is not None, "local.optimizer is for use in `update`"
        still = self._resting
        if still is None:
            return self.options.optimizer.step(w, d, stream.optimizer, self.lr)
        saved = {k: v[still.to(v.device)].clone() for k, v in stream.optimizer.items()}
        w = self.options.optimizer.step(w, d, stream.optimizer, self.lr)
        for k, v in saved.items():
            stream.optimizer[k][still.to(v.device)] = v
        return w

    _lane_stream: LaneStream | None = None
    _resting: Tensor | None = None
    _nested = False

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
        if active is not None and not bool(active.any()):
            return self._lanes(w)
        if epochs is None and steps is None:
            epochs, steps = self._visit.epochs, self._visit.steps
            if epochs is None and steps is None:
                epochs, steps = self.options.epochs, self.options.steps
        outer = {
            name: getattr(self, name)
            for name in (*OF_A_CALL, "active", "_lane_stream", "_resting", "_nested", "_calls")
        }
        self._nested = self._lane_stream is not None
        self._grads, self._used, self._only = [], 0, None
        if half is not None:
            self._hooks = self._of(half)
        self._stream_name = stream or self.phase
        w = self._lanes(w).clone(memory_format=torch.contiguous_format)
        stream_now = self._open_lanes(self._stream_name, w)
        chosen = torch.ones(1, 1, dtype=torch.bool) if active is None else active.cpu()
        if self._nested:
            chosen = chosen & self.active.cpu()  # a lane that rests does nothing inside of the others' steps either
        run = chosen.reshape(-1).expand(len(w)).tolist()
        try:
            with torch.enable_grad():
                if stream_now is self._lane_stream:
                    raise ClientError(f"a hook trains on the stream of the step that it is called from; {ALONE}")
                self._lane_stream = stream_now
                return self._train_lanes(w, stream_now, epochs, steps, self._still(only), run)
        finally:
            self.__dict__.update(outer)

    def _train_lanes(
        self, w: Tensor, s: LaneStream, epochs: int | None, steps: int | None, still: Tensor | None, run: Sequence[bool]
    ) -> Tensor:
        options, hooks, network, sizes = self.options, self._hooks, self.network, self._sizes
        network.train(True, frozen_norms=options.buffers == "frozen")
        base_lr = options.lr * options.lr_decay ** max(self.round - 1, 0)
        exact = network.mixes and options.buffers != "frozen"
        ends = [NEVER if epochs is None else lane.epoch + epochs for lane in s.lanes]
        left = [(NEVER if steps is None else steps) if runs and n else 0 for runs, n in zip(run, sizes, strict=True)]
        s.used.update(i for i, k in enumerate(left) if k)
        size = [min(options.batch_size or n, n) or 1 for n in sizes]
        if not self._nested:  # rows of a step under way are numbers in the data as they are
            self._prepare_inputs(
                sum(sizes) if steps is None else sum(min(steps * b, n) for b, n in zip(size, sizes, strict=True))
            )
        fixed = w.clone() if still is not None else None
        self._losses, self.lr = [], base_lr
        counts: list[Any] = []
        calls: list[int] = []
        scored: list[int] = []
        moved: list[Tensor] = []
        direction: Grad = self.grad
        descends = self._descends(still) and not hooks.schedules
        self._made = [lane.steps for lane in s.lanes]
        self.step = self._column(self._made)
        while any(going := [k > 0 and lane.epoch < e for k, e, lane in zip(left, ends, s.lanes, strict=True)]):
            if hooks.schedules:
                self.lr, self._batch = base_lr, None
                self.active = torch.tensor(going, device=w.device).unsqueeze(1)
                self._seed_lanes("hooks")
                plan = hooks.schedule()
                self.lr = base_lr * plan.get("lr", 1.0)
                if isinstance(self.lr, Tensor):
                    self.lr = self.lr.to(w.device).expand(len(size), 1)
                asked = torch.as_tensor(plan.get("batch_size", options.batch_size or 10**9)).expand(len(size), 1)
                size = [min(int(b), n) or 1 for b, n in zip(asked[:, 0], sizes, strict=True)]
            ahead = 1 if hooks.schedules else max(1, min(PLANNED, PLANNED_NUMBERS // sum(size)))
            steps_now = self._plan(s, size, ends, [min(k, ahead) for k in left])
            if exact and any(steps_now.padded):
                raise ClientError(
                    "batch norm (or what else mixes examples) cannot train on batches of different sizes side by side; "
                    f"{ALONE}, or client.drop_last=true if the clients have equally many examples"
                )
            for t in range(len(steps_now.index)):
                real = steps_now.sizes[t]
                self.active = steps_now.moves[t]
                resting = np.flatnonzero(real == 0)
                self._resting = torch.from_numpy(resting).to(w.device) if len(resting) else None
                if hooks.draws:
                    self._seed_lanes("hooks")
                here = t, slice(None), slice(steps_now.widths[t])
                keep = steps_now.keep[here] if steps_now.padded[t] and steps_now.keep is not None else None
                batch = self._batch_of(steps_now.index[here], steps_now.rows[here], keep)
                if options.augment:
                    self._augment_lanes(batch, real.tolist())
                self._batch = self._with_keep(hooks.batch(batch), batch) if hooks.plain_batch else batch
                self._used = self._calls = 0
                before = None if self._resting is None else w[self._resting]
                rest = {} if before is None else {name: b[self._resting] for name, b in self.buffers.items()}
                memory = {} if before is None else {name: dict(values) for name, values in self._spaces.items()}
                losses = len(self._losses)
                if descends:
                    self._descend(w)
                else:
                    d = direction(w) if hooks.plain_direction else hooks.direction(w, self.grad)
                    if options.clip_norm is not None:
                        d = clip(d, options.clip_norm)
                    new = self.optimizer(w, d) if hooks.plain_update else hooks.single("update", w, d)
                    if new is not w:
                        w.copy_(new)
                    if fixed is not None and still is not None:
                        torch.where(still, fixed, w, out=w)
                if before is not None:
                    w[self._resting] = before
                    for name, kept in rest.items():
                        self.buffers[name][self._resting] = kept
                    self._rest_memory(memory)
                self._lr_sums += self.lr * self.active.double()
                self._made = [made + (size > 0) for made, size in zip(self._made, real.tolist(), strict=True)]
                self.step = self.step + self.active
                counts.append(real)
                calls.append(self._calls)
                if len(self._losses) > losses:
                    scored.append(len(counts) - 1)
                    moved.append(self.active[:, 0])
            taken = (steps_now.sizes > 0).sum(0)
            for i, lane in enumerate(s.lanes):
                lane.steps += int(taken[i])
                left[i] -= int(taken[i])
        self._batch = None
        if self._own_buffers is not None:
            for name, view in network.buffer_layout.views(self._own_buffers).items():
                view.copy_(self.buffers[name])
        self._account_lanes(counts, calls, scored, moved)
        return w

    def _rest_memory(self, before: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Undoes what a step assigned to the memory of lanes that rest."""
        for space, values in self._spaces.items():
            for key, new in values.items():
                old = before.get(space, {}).get(key)
                if old is not None and new is not old and self._lanes(new).shape == self._lanes(old).shape:
                    values[key] = self._lanes(new).clone()
                    values[key][self._resting] = self._lanes(old)[self._resting].to(new)

    def _account_lanes(self, counts: list[Any], calls: list[int], scored: list[int], moved: list[Tensor]) -> None:
        """Books the steps, with the gradients of each; ``scored`` has the numbers of those whose loss was computed."""
        if not counts:
            return
        sizes = np.stack(counts)  # [T, C]
        for i, stats in enumerate(self._stats):
            stats.steps += int((sizes[:, i] > 0).sum())
            stats.examples += int(sizes[:, i].sum())
            stats.gradients += int((sizes[:, i] > 0) @ np.array(calls))
        if not scored:
            return
        losses = torch.where(torch.stack(moved), torch.stack(self._losses).double(), 0.0).cpu()
        bad = (~losses.isfinite()).nonzero()
        if len(bad):
            t, i = (int(v) for v in bad[0])
            lr = float(self.lr[i]) if isinstance(self.lr, Tensor) else self.lr
            raise ClientError(
                f"the training loss became {losses[t, i].item()} at local step {scored[t] + 1} of "
                f"{int((sizes[:, i] > 0).sum())} (lr {lr:g}); lower client.lr, or bound the step with client.clip_norm"
            ).in_lane(i)
        n = torch.from_numpy(sizes[scored]).double()
        sums, total = (losses * n).sum(0), n.sum(0)
        self.mean_loss = torch.where(total > 0, sums / total.clamp(min=1), self.mean_loss.double())
        for i, stats in enumerate(self._stats):
            stats.scored += int(total[i])
            stats.loss += float(sums[i])

    # --- the end of a visit --------------------------------------------------------------------------

    def lane_rows(self, w: Tensor) -> list[dict[str, Tensor]]:
        """What each client keeps, by qualified name; of torch's own memory.

        Args:
            w: What `ClientHalf.work` returned, ``[C, d]``.
        """
        out: list[dict[str, Tensor]] = [{} for _ in self._visits]
        if self._program.private is not None:
            self._spaces["strategy"]["private"] = w[:, self._program.private]
        for space, values in self._spaces.items():
            for key, value in values.items():
                if not isinstance(value, Tensor) or not value.dim() or len(value) not in (1, len(out)):
                    raise ClientError(
                        f"memory.{key} must be a tensor with the client axis first, [{len(out)}, ...], "
                        f"got {value!r:.80}"
                    )
                for i, row in enumerate(self._lanes(value)):
                    out[i][f"{space}.{key}"] = row.detach().clone()
        for name, rows in self._some.items():
            for i, row in rows.items():
                out[i][name] = row.detach().clone()
        for name, s in self._lane_streams.items():
            for i in s.used:
                lane = s.lanes[i]
                out[i][f"stream.{name}"] = torch.tensor([lane.steps, lane.epoch, lane.offset], dtype=torch.int64)
                if self.options.keep_optimizer:
                    out[i].update({f"stream.{name}.opt.{k}": v[i].clone() for k, v in (s.optimizer or {}).items()})
        return out

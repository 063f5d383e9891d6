"""Client work, wherever it runs: one task in, one outcome out, nothing kept between tasks."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fedsim import random, tree
from fedsim.batching import alike, lanes, remedy
from fedsim.clients.batch import Batch
from fedsim.clients.lanes import LanePoint, Lanes
from fedsim.clients.local import Local
from fedsim.clients.visit import Visit
from fedsim.data import Shard
from fedsim.engine.allocator import keep_freed_memory
from fedsim.engine.base import Done, EvalTask, Outcome, Score, Task
from fedsim.errors import ClientError, ConfigError, FedsimError
from fedsim.network import Point, map_tensors
from fedsim.program import Hooks, Program, overrides
from fedsim.reduce import Entry, TreeSum, lane, leaf, tensors_in
from fedsim.strategy import SERVER, ClientHalf, Model

EVAL_BATCH = 500


class Worker:
    """Runs tasks of one program, group after group of clients that are trained together.

    Args:
        program: The network, the data and the method.
        on_failure: Of a visit that raises: ``abort`` raises its error; ``retry`` makes it again first, from the same
            seeds; ``skip`` goes on without the client.
        max_retries: How often a visit is made again.
    """

    def __init__(self, program: Program, on_failure: str = "abort", max_retries: int = 3) -> None:
        keep_freed_memory()
        if program.device.type == "cuda":  # convolutions would take tf32 if nobody asked
            tf32 = program.options.precision == "tf32"
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        self.program = program
        self._skip, self._tries = on_failure == "skip", 1 + (max_retries if on_failure == "retry" else 0)

    def run(self, task: Task | EvalTask) -> Outcome | list[Score]:
        """Runs a task to its end.

        Raises:
            ClientError: Local training failed; names the client, the round and the seed.
        """
        with random.torch_seeded(self.program.seed, "worker"):
            return self._train(task) if isinstance(task, Task) else self._score(task)

    # --- training ------------------------------------------------------------------------------------

    def _train(self, task: Task) -> Outcome:
        began = time.perf_counter()
        program, out = self.program if task.model is None else self.program.variant(task.model), Outcome()
        trees: dict[str, TreeSum] = {}
        sent = lead(task.sent, self.program.device)
        for leaf_num, (first, end) in enumerate(task.spans()):
            for attempt in range(self._tries):
                try:
                    done, entries = self._visit(program, task, first, end, sent)
                    rows, leaves = _prepared(entries, done)
                    if task.clients[first] != SERVER:
                        for i, made in enumerate(done):
                            made.bytes_up = sum(_charge(program, e, i) for e in entries.values())
                    break
                except Exception as raised:
                    i, exc = self._culprit(program, task, first, end, sent, raised)
                    error = ClientError(f"{_where(task, i, program.seed)}: {_what(exc, program, end - first)}")
                    if attempt + 1 < self._tries:
                        out.retries += 1
                    elif self._skip:
                        done = [Done(error=str(error))]
                    else:
                        raise error.of(task.round_num, task.clients[i], task.phase, task.visits[i]) from exc
            out.done += done
            if done[0].error is None:
                try:  # one that differs from the others is no failure of its own: who differs depends on the task
                    out.match({name: e.kind for name, e in entries.items()}, _shapes(rows, leaves, entries))
                except ClientError as exc:
                    error = ClientError(f"{_where(task, first, program.seed)}: {exc}")
                    raise error.of(task.round_num, task.clients[first], task.phase, task.visits[first]) from None
                for name, own in rows.items():
                    out.rows.setdefault(name, []).extend(own)
                for name, value in leaves.items():
                    trees.setdefault(name, TreeSum(task.num_leaves)).add((0, task.first_leaf + leaf_num), value)
        out.nodes = {name: sums.nodes for name, sums in trees.items()}
        out.seconds = time.perf_counter() - began
        return out

    def _visit(
        self, program: Program, task: Task, first: int, end: int, sent: dict[str, Any]
    ) -> tuple[list[Done], dict[str, Entry]]:
        """The visits of the clients from ``first`` to ``end``, trained together; changes nothing that the next ones, or
        the same again, would see."""
        hooks = program.hooks if task.half is None else program.phase_hooks(task.half)
        visits = [
            Visit(task.clients[i], task.round_num, task.phase, task.visits[i], "train", task.steps, task.epochs, rows)
            for i, rows in enumerate(task.memory[first:end], first)
        ]
        own_sent = sent_to(task.unicast, first, end, program)
        self._seed("hooks", task.phase, task.visits[first], task.clients[first])
        with _read_only(sent, own_sent, *(visit.memory for visit in visits)):
            buffers = _buffers(program, task.sent.get("buffers"), [visit.memory for visit in visits])
            local = _local(program, visits, sent | own_sent, hooks, buffers)
            w = local._hooks.single("work")
            if end - first > 1 and w is local.start:  # which they may share
                w = w.expand(end - first, *w.shape[1:])
            _check_vector(w, local)
            # The rows are taken after `finish`, which may still assign to memory.
            entries = local._hooks.finish(w)
            new = local.lane_rows(w)
            for i, rows in enumerate(new):
                for name, kept in rows.items():
                    if kept.is_floating_point():
                        _finite(f"memory.{name.partition('.')[2]}", kept.sum(dtype=torch.float64), i)
        if "buffers" in entries:
            raise ClientError("'buffers' names the network's own statistics; give your entry another name")
        if buffers is not None:
            if program.options.buffers == "mean":
                entries["buffers"] = Entry("mean", buffers)
            elif program.options.buffers == "local":
                for rows, row in zip(new, buffers, strict=True):
                    rows["buffers.local"] = row.clone()
        done = [
            Done(
                memory=rows,
                steps=stats.steps,
                examples=stats.examples,
                gradients=stats.gradients,
                scored=stats.scored,
                loss=stats.loss,
                num_examples=n,
                kept=tree.fingerprint(rows),
            )
            for rows, stats, n in zip(new, local.lane_stats, local.sizes, strict=True)
        ]
        return done, entries

    def _culprit(
        self, program: Program, task: Task, first: int, end: int, sent: dict[str, Any], exc: Exception
    ) -> tuple[int, Exception]:
        """Which of some clients trained together raised, and what: the first that does so alone, too."""
        known = getattr(exc, "lane", None)
        told = "client.batching=off" in str(exc)
        if end - first == 1 or known is not None or told or _is_memory(exc):
            return first + (known or 0), exc
        for i in range(first, end):
            try:
                done, entries = self._visit(program, task, i, i + 1, sent)
                _prepared(entries, done)
            except Exception as alone:
                return i, alone
        exc.add_note("alone none of these clients raises: a hook may be written for one client at a time")
        exc.add_note("set client.batching=off")
        return first, exc

    def _seed(self, purpose: str, *index: int | str) -> None:
        """What draws from torch's own generator still follows from who, when and what for alone."""
        torch.default_generator.manual_seed(random.derive(self.program.seed, purpose, *index))

    # --- evaluation ----------------------------------------------------------------------------------

    @torch.no_grad()
    def _score(self, task: EvalTask) -> list[Score]:
        program, scores = self.program, []
        sent, buffers = lead(task.sent, self.program.device), task.sent.get("buffers")
        self._seed("evaluate", task.round_num, task.split, task.rows[0])
        if task.split != "heldout":
            split = program.dataset.test if task.split == "test" else program.server
            assert split is not None
            local = Local(
                program, Visit(SERVER, task.round_num, "evaluate", task.round_num, "global", part="none"), sent
            )
            _buffers(program, buffers, [{}])
            a, b = task.rows
            return [self._score_rows(local, local.start, split.x, split.y, torch.arange(a, b))]
        for first, end in self._spans(task):
            clients = task.clients[first:end]
            self._seed("evaluate", task.round_num, task.mode, clients[0])
            visits = [
                Visit(client, task.round_num, "evaluate", task.round_num, task.mode, memory=rows)
                for client, rows in zip(clients, task.memory[first:end], strict=True)
            ]
            rows = [{} if task.mode == "global" else visit.memory for visit in visits]
            bound = _buffers(program, buffers, rows)
            local = _local(program, visits, sent | sent_to(task.unicast, first, end, program), None, bound)
            if task.mode == "global":
                w = sent["w"]
            elif task.mode == "personal":
                w = local._hooks.single("personal")
            else:
                w = self._finetune(local, task, clients)
            shards = [program.shard(client, "heldout") for client in clients]
            if isinstance(local, Lanes):
                scores += self._score_lanes(local, w, shards)
            else:
                scores.append(self._score_rows(local, w, shards[0].x, shards[0].y, shards[0].rows))
        return scores

    def _spans(self, task: EvalTask) -> list[tuple[int, int]]:
        """Places of clients that are scored together: as many as are trained together."""
        program, of = self.program, task.clients
        tuned = program.phase_hooks(_plain(program)) if task.mode == "finetuned" else program.hooks
        size = lanes(program, tuned)
        common: list[int | None] = [0] * len(of)
        if size > 1:
            epochs = task.mode == "finetuned" or program.options.epochs is not None
            trains = task.mode != "global"
            sizes = [len(program.shard(c)) for c in of]
            common = [(alike(program, n, epochs) if trains else 0) if n else None for n in sizes]
        spans: list[tuple[int, int]] = []
        for i in range(len(of)):
            first, end = spans[-1] if spans else (0, 0)
            if spans and end - first < size and common[i] is not None and common[i] == common[first]:
                spans[-1] = (first, i + 1)
            else:
                spans.append((i, i + 1))
        return spans

    def _finetune(self, local: Local, task: EvalTask, clients: Sequence[int]) -> Tensor:
        try:
            return local.train(local.start, half=_plain(self.program), epochs=task.epochs, stream="finetune")
        except Exception as exc:
            known = 0 if len(clients) == 1 else getattr(exc, "lane", None)
            who = f"one of the clients {clients[0]} to {clients[-1]}" if known is None else f"client {clients[known]}"
            what = _what(exc, self.program, len(clients))
            raise ClientError(f"round {task.round_num}, {who}: fine-tuning failed: {what}") from exc

    def _score_rows(self, local: Local, w: Tensor, x: Tensor, y: Tensor, rows: Tensor) -> Score:
        program, classes = self.program, self.program.dataset.num_classes
        network = program.network
        network.train(False)
        point = Point(network, w)
        loss, confusion = 0.0, torch.zeros(classes, classes, dtype=torch.int64)
        for first in range(0, len(rows), EVAL_BATCH):
            chunk = rows[first : first + EVAL_BATCH]
            inputs = program.inputs(x.index_select(0, chunk.to(x.device)))
            labels = program.targets(y.index_select(0, chunk.to(y.device)))
            index = torch.arange(first, first + len(chunk)).unsqueeze(0)
            batch = Batch(x=inputs.unsqueeze(0), y=labels.unsqueeze(0), index=index, weight=None)
            outputs = local._hooks.single("predict", point, batch)[0]
            if labels.is_floating_point():
                loss += float((outputs.view_as(labels).double() - labels).square().sum()) / 2
                continue
            if outputs.shape != (len(chunk), classes):
                raise ConfigError(
                    f"the model's output has shape {tuple(outputs.shape)} for a batch of {len(chunk)}; "
                    f"{program.dataset.name} has {classes} classes, so {(len(chunk), classes)} is needed"
                )
            loss += float(F.cross_entropy(outputs.double(), labels, reduction="sum"))
            pairs = (labels * classes + outputs.argmax(-1)).cpu()
            confusion += torch.bincount(pairs, minlength=classes**2).view(classes, classes)
        return Score(len(rows), loss, confusion)

    def _score_lanes(self, local: Lanes, w: Tensor, shards: Sequence[Shard]) -> list[Score]:
        """As `_score_rows`, of several clients at once, each on its own examples."""
        program, classes = self.program, self.program.dataset.num_classes
        program.network.train(False)
        point = LanePoint(local, program.layout.views(w))
        sizes = torch.tensor([len(shard) for shard in shards])
        loss = torch.zeros(len(shards), dtype=torch.float64)
        confusion = torch.zeros(len(shards), classes, classes, dtype=torch.int64)
        most = int(sizes.max())
        # Padded with a lane's first example; lanes without any take the first row of the data, and count nothing.
        places = torch.arange(most).expand(len(shards), most)
        keep = places < sizes[:, None]
        same = all(shard.x is shards[0].x for shard in shards)
        first = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)[:-1]])
        rows = torch.cat([shard.rows for shard in shards])
        if same:
            x, y = shards[0].x, shards[0].y
        else:
            x, y = (
                torch.cat([part.index_select(0, shard.rows.to(part.device)) for shard, part in parts])
                for parts in (
                    [(shard, shard.x) for shard in shards],
                    [(shard, shard.y) for shard in shards],
                )
            )
            rows = torch.arange(len(x))
        index = torch.where(keep, first[:, None] + places, first[:, None]).clamp(max=max(len(rows) - 1, 0))
        width = max(1, EVAL_BATCH // len(shards))
        for a in range(0, most, width):
            chosen = rows[index[:, a : a + width]]
            flat, real = chosen.flatten(), keep[:, a : a + width]
            inputs = program.inputs(x.index_select(0, flat.to(x.device)))
            labels = program.targets(y.index_select(0, flat.to(y.device))).view(*chosen.shape, *y.shape[1:])
            batch = Batch(
                x=inputs.view(*chosen.shape, *inputs.shape[1:]), y=labels, index=places[:, a : a + width], weight=None
            )
            batch.keep = real.to(labels.device)
            outputs = local._hooks.single("predict", point, batch)
            if labels.is_floating_point():
                error = (outputs.view_as(labels).double() - labels).square() / 2
                losses = error.view(*chosen.shape, -1).sum(-1)
            else:
                if outputs.shape != (*chosen.shape, classes):
                    raise ConfigError(
                        f"the model's output has shape {tuple(outputs.shape)} for {len(shards)} clients of "
                        f"{chosen.shape[1]} examples; {(*chosen.shape, classes)} is needed"
                    )
                losses = F.cross_entropy(outputs.double().flatten(0, 1), labels.flatten(), reduction="none")
                losses = losses.view(chosen.shape)
                lane_num = torch.arange(len(shards))[:, None] * classes**2
                pairs = (lane_num + (labels * classes + outputs.argmax(-1)).cpu())[real]
                counted = torch.bincount(pairs, minlength=len(shards) * classes**2)
                confusion += counted.view(len(shards), classes, classes)
            loss += torch.where(real, losses.cpu(), 0.0).sum(1)
        return [Score(int(n), float(v), c) for n, v, c in zip(sizes, loss, confusion, strict=True)]


@dataclass(frozen=True)
class _Objective(ClientHalf):
    """Plain local training on the objective of another half.

    Attributes:
        of: That half.
    """

    of: ClientHalf

    def loss(self, model: Model, batch: Batch, local: Local) -> Tensor:
        return self.of.loss(model, batch, local)


def _plain(program: Program) -> ClientHalf:
    """The half of fine-tuning: of the method only its loss, without which some networks have none."""
    return _Objective(program.strategy) if overrides(program.strategy, "loss") else ClientHalf()


def lead(sent: Mapping[str, Any], device: torch.device | None = None) -> dict[str, Any]:
    """A broadcast payload as hooks see it: on the device, with a client axis of 1."""
    return {k: map_tensors(lambda t: t.to(device).unsqueeze(0), v) for k, v in sent.items() if k != "buffers"}


def _local(
    program: Program,
    visits: Sequence[Visit],
    sent: Mapping[str, Any],
    hooks: Hooks | None,
    buffers: Tensor | None,
) -> Local:
    """What hooks see of one client, or of several that are trained together."""
    return Local(program, visits[0], sent, hooks) if len(visits) == 1 else Lanes(program, visits, sent, hooks, buffers)


def _buffers(program: Program, shared: Tensor | None, rows: Sequence[Mapping[str, Tensor]]) -> Tensor | None:
    """Floating-point buffers for clients' visits, ``[C, nb]``; one client's are the network's from now on."""
    network = program.network
    if not network.buffer_layout.d:
        network.bind_buffers(network.initial_buffers)
        return None
    kept = [own.get("buffers.local") if program.options.buffers == "local" else None for own in rows]
    start = shared if shared is not None else network.initial_buffers
    buffers = torch.stack([start.to(network.device) if own is None else own.to(network.device) for own in kept])
    network.bind_buffers(buffers[0] if len(rows) == 1 else network.initial_buffers)
    return buffers


def _prepared(
    entries: Mapping[str, Entry], done: Sequence[Done]
) -> tuple[dict[str, list[Any]], dict[str, tuple[Tensor, ...]]]:
    """The entries of clients that were trained together, checked; writes each one's fingerprint into ``done``, while
    they are in the processor's cache.

    Returns:
        Rows that stay apart; leaves of the tree, which are one for all.

    Raises:
        ClientError: One is not finite, or no tensor.
    """
    hashes = [hashlib.sha256() for _ in done]
    rows: dict[str, list[Any]] = {}
    leaves: dict[str, tuple[Tensor, ...]] = {}
    for name, entry in entries.items():
        if entry.kind == "concat":
            if len(entry.value) != len(done):
                raise ClientError(f"entry '{name}' must be a list with an item for each of {len(done)} clients")
            rows[name] = [map_tensors(_keep, value) for value in entry.value]
            for i, h in enumerate(hashes):
                tree.feed(h, (name, entry.value[i : i + 1]))
            continue
        if not isinstance(entry.value, Tensor) or not entry.value.dim() or len(entry.value) != len(done):
            raise ClientError(f"entry '{name}' must be a tensor with the client axis first, [{len(done)}, ...]")
        own = []
        for i, (h, made) in enumerate(zip(hashes, done, strict=True)):
            value = entry.value[i : i + 1]
            if entry.kind == "stack":
                # The sum is finite only if every number is: cheaper than isfinite, and nothing overflows float64.
                _finite(f"entry '{name}'", value.double().sum(), i)
                own.append(_keep(value[0]))
                tree.feed(h, (name, value))
                continue
            weight = entry.weight if entry.weight is None or len(entry.weight) == 1 else entry.weight[i : i + 1]
            num_examples = torch.tensor([[float(made.num_examples)]], dtype=torch.float64, device=value.device)
            term = leaf(replace(entry, value=value, weight=weight), num_examples)
            _finite(f"entry '{name}'", term[0].sum(), i)
            tree.feed(h, (name, entry.kind, term))
            if name in leaves:
                term = tuple(a.add_(b) for a, b in zip(leaves[name], term, strict=True))
            leaves[name] = term
        if own:
            rows[name] = own
    for h, made in zip(hashes, done, strict=True):
        made.entries = h.hexdigest()[:16]
    return rows, leaves


def _shapes(
    rows: Mapping[str, list[Any]], leaves: Mapping[str, tuple[Tensor, ...]], entries: Mapping[str, Entry]
) -> dict[str, list[tuple[int, ...]]]:
    """Shapes by entry, which must be those of every other client; only ``concat`` may be ragged."""
    stacked = {name: [tuple(own[0].shape)] for name, own in rows.items() if entries[name].kind == "stack"}
    return stacked | {name: [tuple(t.shape) for t in value] for name, value in leaves.items()}


def _charge(program: Program, entry: Entry, i: int) -> int:
    """Bytes that client ``i`` is charged for an entry; of a parameter vector the shared coordinates travel."""
    return program.nbytes(entry.value[i]) if entry.nbytes is None else entry.nbytes


def _where(task: Task, i: int, seed: int) -> str:
    who = "the server's visit" if task.clients[i] == SERVER else f"client {task.clients[i]}"
    phase = "" if task.phase == "train" else f", phase {task.phase}"
    return f"round {task.round_num}{phase}, {who} (seed {seed}): local training failed"


def _what(exc: Exception, program: Program, clients: int) -> str:
    """What happened, and what to do about an error of torch that does not say it."""
    if isinstance(exc, FedsimError):
        return "; ".join([str(exc), *getattr(exc, "__notes__", [])])
    if _is_memory(exc):
        together = f" with {clients} clients trained together" if clients > 1 else ""
        return f"out of memory{together}; {remedy(program, clients)}"
    text = f"{type(exc).__name__}: {exc}"
    if "more than 1 value per channel" in text:
        text += "; batch norm cannot train on a batch of one: set client.drop_last=true, or use a model with group norm"
    return "; ".join([text, *getattr(exc, "__notes__", [])])


def _is_memory(exc: Exception) -> bool:
    return isinstance(exc, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(exc)


def _check_vector(w: object, local: Local) -> None:
    shape = (len(local.clients), local.layout.d)
    if not isinstance(w, Tensor) or tuple(w.shape) != shape:
        got = tuple(w.shape) if isinstance(w, Tensor) else type(w).__name__
        raise ClientError(f"work() must return parameters of shape {shape}, got {got}")


def _finite(what: str, total: Tensor, i: int) -> None:
    if not bool(total.isfinite()):
        text = f"{what} is not finite; lower client.lr, or bound the step with client.clip_norm"
        raise ClientError(text).in_lane(i)


def _keep(t: Tensor) -> Tensor:
    return t.detach().clone()


def sent_to(unicast: Mapping[str, Any], first: int, end: int, program: Program) -> dict[str, Any]:
    """What the clients from ``first`` to ``end`` got of their own, as hooks see it: on the device, with the client axis
    first; copied, as bits follow alignment."""
    device = program.device
    if end - first == 1:
        return {
            k: map_tensors(lambda t: t.to(device, copy=True).unsqueeze(0), lane(v, first)) for k, v in unicast.items()
        }
    return {k: _side_by_side([lane(v, i) for i in range(first, end)], program) for k, v in unicast.items()}


def _side_by_side(trees: Sequence[Any], program: Program) -> Any:
    """Trees of like form as one: tensors ``[C, ...]``, and numbers ``[C, 1]``, those with a point in the parameters'
    dtype. Tensors of different length, such as those with a row per example, end in zeros."""
    first = trees[0]
    if isinstance(first, Tensor):
        if len({t.shape for t in trees}) > 1:
            most = max(len(t) for t in trees)
            trees = [torch.cat([t, t.new_zeros(most - len(t), *t.shape[1:])]) for t in trees]
        return torch.stack([t.to(program.device) for t in trees])
    if isinstance(first, Mapping):
        return {k: _side_by_side([t[k] for t in trees], program) for k in first}
    if isinstance(first, tuple):
        return tuple(_side_by_side(list(items), program) for items in zip(*trees, strict=True))
    if not isinstance(first, int | float):
        return list(trees)
    numbers = torch.tensor(trees, dtype=torch.float64 if isinstance(first, float) else None)
    return numbers.to(program.device, program.dtype if isinstance(first, float) else None).unsqueeze(1)


@contextmanager
def _read_only(*trees: Any) -> Iterator[None]:
    """Refuses hooks that write into what was sent or remembered: a retry would start from other numbers."""
    tensors = [t for tree in trees for t in tensors_in(tree)]
    versions = [t._version for t in tensors]
    yield
    if [t._version for t in tensors] != versions:
        raise ClientError(
            "a hook changed local.start, local.sent or local.memory in place; assign a new tensor instead"
        )

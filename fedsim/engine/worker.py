"""Client work, wherever it runs: one task in, one outcome out, nothing kept between tasks."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fedsim import random, tree
from fedsim.clients.batch import Batch
from fedsim.clients.local import Local
from fedsim.clients.visit import Visit
from fedsim.engine.base import Done, EvalTask, Outcome, Score, Task
from fedsim.errors import ClientError, ConfigError, FedsimError
from fedsim.network import Point, map_tensors
from fedsim.program import Program, overrides
from fedsim.reduce import Entry, TreeSum, lane, leaf, tensors_in
from fedsim.strategy import SERVER, ClientHalf, Model

EVAL_BATCH = 500


class Worker:
    """Runs tasks of one program, one client at a time.

    Args:
        program: The network, the data and the method.
        on_failure: Of a visit that raises: ``abort`` raises its error; ``retry`` makes it again first, from the same
            seeds; ``skip`` goes on without the client.
        max_retries: How often a visit is made again.
    """

    def __init__(self, program: Program, on_failure: str = "abort", max_retries: int = 3) -> None:
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
        for i in range(len(task.clients)):
            for attempt in range(self._tries):
                try:
                    done, entries = self._visit(program, task, i, sent)
                    done.entries, rows, leaves = _prepared(entries, done.num_examples)
                    if task.clients[i] != SERVER:
                        done.bytes_up = sum(_charge(program, e) for e in entries.values())
                    break
                except Exception as exc:
                    error = ClientError(f"{_where(task, i, program.seed)}: {_what(exc)}")
                    if attempt + 1 < self._tries:
                        out.retries += 1
                    elif self._skip:
                        done = Done(error=str(error))
                    else:
                        raise error.of(task.round_num, task.clients[i], task.phase, task.visits[i]) from exc
            out.done.append(done)
            if done.error is None:
                try:  # one that differs from the others is no failure of its own: who differs depends on the task
                    out.match({name: e.kind for name, e in entries.items()}, _shapes(rows, leaves, entries))
                except ClientError as exc:
                    error = ClientError(f"{_where(task, i, program.seed)}: {exc}")
                    raise error.of(task.round_num, task.clients[i], task.phase, task.visits[i]) from None
                for name, row in rows.items():
                    out.rows.setdefault(name, []).append(row)
                for name, value in leaves.items():
                    trees.setdefault(name, TreeSum(task.num_leaves)).add((0, task.first_leaf + i), value)
        out.nodes = {name: sums.nodes for name, sums in trees.items()}
        out.seconds = time.perf_counter() - began
        return out

    def _visit(self, program: Program, task: Task, i: int, sent: dict[str, Any]) -> tuple[Done, dict[str, Entry]]:
        """The visit of the task's client ``i``; changes nothing that the next one, or the same again, would see."""
        client, rows = task.clients[i], task.memory[i]
        hooks = program.hooks if task.half is None else program.phase_hooks(task.half)
        visit = Visit(client, task.round_num, task.phase, task.visits[i], "train", task.steps, task.epochs, rows)
        own_sent = sent_to(task.unicast, i, program.device)
        self._seed("hooks", task.phase, task.visits[i], client)
        with _read_only(sent, own_sent, rows):
            own = self._bind_buffers(program, task.sent.get("buffers"), rows)
            local = Local(program, visit, sent | own_sent, hooks)
            w = local._hooks.single("work")
            _check_vector(w, local)
            # The rows are taken after `finish`, which may still assign to memory.
            entries = local._hooks.finish(w)
            new = local.rows(w)
        if "buffers" in entries:
            raise ClientError("'buffers' names the network's own statistics; give your entry another name")
        if own is not None:
            if program.options.buffers == "mean":
                entries["buffers"] = Entry("mean", own.unsqueeze(0))
            elif program.options.buffers == "local":
                new["buffers.local"] = own
        done = Done(
            memory=new,
            steps=local.stats.steps,
            examples=local.stats.examples,
            scored=local.stats.scored,
            loss=local.stats.loss,
            num_examples=local.n,
            kept=tree.fingerprint(new),
        )
        return done, entries

    def _bind_buffers(self, program: Program, shared: Tensor | None, rows: Mapping[str, Tensor]) -> Tensor | None:
        network = program.network
        if not network.buffer_layout.d:
            network.bind_buffers(network.initial_buffers)
            return None
        own = rows.get("buffers.local") if program.options.buffers == "local" else None
        start = own if own is not None else shared if shared is not None else network.initial_buffers
        buffers = start.to(network.device).clone()
        network.bind_buffers(buffers)
        return buffers

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
            self._bind_buffers(program, buffers, {})
            a, b = task.rows
            return [self._score_rows(local, local.start, split.x, split.y, torch.arange(a, b))]
        for i, client in enumerate(task.clients):
            self._seed("evaluate", task.round_num, task.mode, client)
            visit = Visit(client, task.round_num, "evaluate", task.round_num, task.mode, memory=task.memory[i])
            local = Local(program, visit, sent | sent_to(task.unicast, i, program.device))
            self._bind_buffers(program, buffers, {} if task.mode == "global" else task.memory[i])
            if task.mode == "global":
                w = sent["w"]
            elif task.mode == "personal":
                w = local._hooks.single("personal")
            else:
                w = self._finetune(local, task, client)
            shard = program.shard(client, "heldout")
            scores.append(self._score_rows(local, w, shard.x, shard.y, shard.rows))
        return scores

    def _finetune(self, local: Local, task: EvalTask, client: int) -> Tensor:
        try:
            return local.train(local.start, half=_plain(self.program), epochs=task.epochs, stream="finetune")
        except Exception as exc:
            raise ClientError(f"round {task.round_num}, client {client}: fine-tuning failed: {_what(exc)}") from exc

    def _score_rows(self, local: Local, w: Tensor, x: Tensor, y: Tensor, rows: Tensor) -> Score:
        program, classes = self.program, self.program.dataset.num_classes
        network = program.network
        network.train(False)
        point = Point(network, w)
        loss, confusion = 0.0, torch.zeros(classes, classes, dtype=torch.int64)
        for chunk in torch.split(rows, EVAL_BATCH):
            inputs = program.inputs(x.index_select(0, chunk.to(x.device)))
            labels = program.targets(y.index_select(0, chunk.to(y.device)))
            batch = Batch(x=inputs.unsqueeze(0), y=labels.unsqueeze(0), index=chunk.unsqueeze(0), weight=None)
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


def _prepared(entries: Mapping[str, Entry], n: int) -> tuple[str, dict[str, Any], dict[str, tuple[Tensor, ...]]]:
    """A client's entries, checked.

    Returns:
        Their fingerprint, taken while they are in the processor's cache; rows that stay apart; leaves of the tree.

    Raises:
        ClientError: One is not finite, or no tensor.
    """
    h = hashlib.sha256()
    rows: dict[str, Any] = {}
    leaves: dict[str, tuple[Tensor, ...]] = {}
    for name, entry in entries.items():
        if entry.kind == "concat":
            rows[name] = map_tensors(_keep, entry.value[0])
            tree.feed(h, (name, entry.value))
            continue
        if not isinstance(entry.value, Tensor) or not entry.value.dim() or len(entry.value) != 1:
            raise ClientError(f"entry '{name}' must be a tensor with the client axis first, [1, ...]")
        if entry.kind == "stack":
            # The sum is finite only if every number is: cheaper than isfinite, and nothing overflows float64.
            _finite(name, entry.value.double().sum())
            rows[name] = _keep(entry.value[0])
            tree.feed(h, (name, entry.value))
            continue
        num_examples = torch.tensor([[float(n)]], dtype=torch.float64, device=entry.value.device)
        leaves[name] = leaf(entry, num_examples)
        _finite(name, leaves[name][0].sum())
        tree.feed(h, (name, entry.kind, leaves[name]))
    return h.hexdigest()[:16], rows, leaves


def _shapes(
    rows: Mapping[str, Any], leaves: Mapping[str, tuple[Tensor, ...]], entries: Mapping[str, Entry]
) -> dict[str, list[tuple[int, ...]]]:
    """Shapes by entry, which must be those of every other client; only ``concat`` may be ragged."""
    stacked = {name: [tuple(row.shape)] for name, row in rows.items() if entries[name].kind == "stack"}
    return stacked | {name: [tuple(t.shape) for t in value] for name, value in leaves.items()}


def _charge(program: Program, entry: Entry) -> int:
    """Bytes that a client is charged for an entry; of a parameter vector the shared coordinates travel."""
    return program.nbytes(entry.value[0]) if entry.nbytes is None else entry.nbytes


def _where(task: Task, i: int, seed: int) -> str:
    who = "the server's visit" if task.clients[i] == SERVER else f"client {task.clients[i]}"
    phase = "" if task.phase == "train" else f", phase {task.phase}"
    return f"round {task.round_num}{phase}, {who} (seed {seed}): local training failed"


def _what(exc: Exception) -> str:
    """What happened, and what to do about an error of torch that does not say it."""
    if isinstance(exc, FedsimError):
        return str(exc)
    remedy = "; batch norm cannot train on a batch of one: set client.drop_last=true, or use a model with group norm"
    known = "more than 1 value per channel" in str(exc)
    return f"{type(exc).__name__}: {exc}{remedy if known else ''}"


def _check_vector(w: object, local: Local) -> None:
    shape = tuple(local.start.shape)
    if not isinstance(w, Tensor) or tuple(w.shape) != shape:
        got = tuple(w.shape) if isinstance(w, Tensor) else type(w).__name__
        raise ClientError(f"work() must return parameters of shape {shape}, got {got}")


def _finite(name: str, total: Tensor) -> None:
    if not bool(total.isfinite()):
        raise ClientError(f"entry '{name}' is not finite; lower client.lr, or bound the step with client.clip_norm")


def _keep(t: Tensor) -> Tensor:
    return t.detach().clone()


def sent_to(unicast: Mapping[str, Any], i: int, device: torch.device) -> dict[str, Any]:
    """What client ``i`` got of its own, as hooks see it: on the device, with a client axis of 1; copied, as bits follow
    alignment."""
    return {k: map_tensors(lambda t: t.to(device, copy=True).unsqueeze(0), lane(v, i)) for k, v in unicast.items()}


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

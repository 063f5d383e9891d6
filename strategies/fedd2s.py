"""FedD2S (reconstruction): clients distil from heads on the server, cut off layer by layer, deep to shallow.

Source: Atapour et al., 2024, "FedD2S: Personalized Data-Free Federated Knowledge Distillation",
https://arxiv.org/abs/2402.10846. Neither the paper's algorithm nor code was available: what is known is its abstract
and a summary (every client keeps its own model; server heads turn representations into soft labels; mutual
distillation by cross-entropy and KL divergence; deeper layers drop out of the federation round by round). What follows
is an algorithm that fits these, and must not be taken for the paper's.
Departures:
    1. All equations, the schedule and the default values are a reconstruction; every free choice is an option.
    2. Heads are drawn from the run's seed by the layers' own rule; the paper's way is not known.
    3. Where examples are capped (``max_per_class``), a client's first ones of every class take part; the others have no
       soft label of their own, and train without.
    4. A class's mean soft label is that of the latest round in which somebody sent the class.
    5. A client without soft labels of its own gets the whole table of classes: nobody else knows its labels; with
       ``teacher=class`` every client gets it, in every visit.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsim.clients.batch import Batch
from fedsim.clients.local import Local
from fedsim.clients.optimizers import Adam
from fedsim.clients.visit import ClientOptions
from fedsim.errors import ConfigError
from fedsim.federation import Federation
from fedsim.models.standard import AveragePool
from fedsim.network import Network, Remembering
from fedsim.parts import Blocks, blocks_of
from fedsim.reduce import Entry, Reduced, concat, once, sized
from fedsim.strategy import ClientHalf, Grad, Info, Model, Strategy, require

EXAMPLES = 500  # at once, for the representations of one client


def kl(p: Tensor, z: Tensor, T: float) -> Tensor:
    """``T^2 KL(p | softmax(z / T))`` per example; ``T^2`` keeps the gradient's size whatever the temperature.

    Args:
        p: Soft labels, ``[..., classes]``; entries of 0 add nothing.
        z: Logits, ``[..., classes]``.
        T: Temperature.
    """
    return T * T * (p * (p.clamp_min(torch.finfo(p.dtype).tiny).log() - (z / T).log_softmax(-1))).sum(-1)


@dataclass(frozen=True)
class D2SState:
    """All that the server carries from one round to the next.

    Attributes:
        w: The initial model, which all clients start from and nothing changes, ``[d]``.
        table: Mean soft label of every class, ``[classes, classes]``; rows of 0 where none was sent.
        heads: Parameters of the head on each block, by the block's number, ``[d_head]``.
        optimizer: Adam's tensors of the heads that are in training, by the block's number.
        soft: Soft labels of what each client sent last, ``[m, classes]``, by client.
        distils: Whether what goes down is for training with soft labels; only inside of a round.
    """

    w: Tensor
    table: Tensor
    heads: dict[int, Tensor] = field(default_factory=dict)
    optimizer: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    soft: dict[int, Tensor] = field(default_factory=dict)
    distils: bool = False


@dataclass(frozen=True)
class FedD2S(Strategy):
    """FedD2S (reconstruction).

    Attributes:
        dropping: Numbers of the blocks, from 1, whose output is sent up, deep to shallow, a stage each; null: all but
            the head.
        stage_rounds: Rounds of a stage: the inverse of the layer-dropping rate.
        after: After the last stage: ``hold`` its block, or ``stop`` the federation: clients train alone.
        lam_l: Weight of the soft labels in a client's loss, >= 0; 0: every client trains alone.
        lam_g: Weight of the clients' soft labels in a head's loss, >= 0.
        temperature: T, > 0.
        ramp: Rounds at the start of every stage over which ``lam_l`` grows to its value.
        path: What soft labels act on: ``full``, the client's whole model; ``head``, its lower blocks through the
            server's head, a constant there; ``masked``, its lower blocks through its own upper ones, which no objective
            has as its gradient: not recommended.
        granularity: What is sent: a tuple for every ``sample``, or the means of every ``class``.
        max_per_class: Samples of each class that a client sends, at most; null: all.
        pool: Maps with more rows and columns are averaged to so many before they go up, and the server's head sees them
            in their old size again, in equal patches; null: they are sent as they are.
        timing: ``pipelined``: soft labels of the last time; ``in_round``: first training without, then the head, then
            training with them.
        teacher: ``own``: soft labels of the client's own representations; ``class``: the mean over its class.
        heads: ``active``: one head is trained, that of the stage; ``all``: every one in every round.
        server_epochs: Epochs of a head's training in a round.
        server_lr: Learning rate of its Adam.
        server_batch_size: Tuples in a step of it.
        initial: ``common``: all clients start from one model, sent once; ``own``: each from one of its own.
    """

    batched: ClassVar = True
    parent: ClassVar = "local"
    parent_options: ClassVar = {}
    neutral: ClassVar = {"lam_l": 0.0}
    quick: ClassVar = {"stage_rounds": 1, "server_epochs": 2}
    exempt: ClassVar = {
        "one_full_batch_step_is_gradient_descent": "the global model never changes; the law's model has no blocks",
        "loss_falls_on_two_quadratic_clients": "the global model never changes; the law's model has no blocks",
    }

    dropping: tuple[int, ...] | list[int] | None = None
    stage_rounds: int = 20
    after: str = "hold"
    lam_l: float = 0.3
    lam_g: float = 1.0
    temperature: float = 3.0
    ramp: int = 0
    path: str = "full"
    granularity: str = "sample"
    max_per_class: int | None = None
    pool: int | None = None
    timing: str = "pipelined"
    teacher: str = "own"
    heads: str = "active"
    server_epochs: int = 20
    server_lr: float = 1e-3
    server_batch_size: int = 64
    initial: str = "common"

    def check(self) -> None:
        if self.dropping is not None:
            valid = isinstance(self.dropping, tuple | list) and all(type(b) is int and b >= 1 for b in self.dropping)
            falls = valid and list(self.dropping) == sorted(set(self.dropping), reverse=True)
            needed = "numbers of blocks from deep to shallow, such as [4, 3, 2, 1]"
            require(bool(falls and self.dropping), "strategy.dropping", needed, self.dropping)
            object.__setattr__(self, "dropping", tuple(self.dropping))
        for name, least in (("stage_rounds", 1), ("ramp", 0), ("server_epochs", 0), ("server_batch_size", 1)):
            require(getattr(self, name) >= least, f"strategy.{name}", f">= {least}", getattr(self, name))
        for name in ("max_per_class", "pool"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"strategy.{name}", ">= 1, or null", value)
        for name in ("lam_l", "lam_g"):
            require(getattr(self, name) >= 0, f"strategy.{name}", ">= 0", getattr(self, name))
        for name in ("temperature", "server_lr"):
            require(getattr(self, name) > 0, f"strategy.{name}", "> 0", getattr(self, name))
        for name, known in (
            ("after", ("hold", "stop")),
            ("path", ("full", "head", "masked")),
            ("granularity", ("sample", "class")),
            ("timing", ("pipelined", "in_round")),
            ("teacher", ("own", "class")),
            ("heads", ("active", "all")),
            ("initial", ("common", "own")),
        ):
            require(getattr(self, name) in known, f"strategy.{name}", " or ".join(known), getattr(self, name))
        if self.granularity == "class" and self.max_per_class is not None:
            raise ConfigError("strategy.max_per_class caps samples: set it to null with strategy.granularity=class")

    def check_network(self, network: Network, options: ClientOptions) -> None:
        if network.buffer_layout.d:
            raise ConfigError(
                "fedd2s has no rule for the statistics of batch norms, which its heads would need, and the model has "
                "some: choose one with group norm or without norms, such as model=blocks5 or model=resnet18_gn"
            )

    def model(self, module: nn.Module) -> nn.Module:
        blocks = blocks_of(module, "fedd2s")
        last = len(blocks) - 1
        first = [module.get_submodule(name) for name in blocks[0]] if last else []
        if not any(True for part in first for _ in part.parameters()):  # raw inputs would go up
            raise ConfigError(
                "fedd2s needs a block with weights before the head, and the model has none: choose a deeper one"
            )
        wrong = [b for b in self.dropping or () if b > last]
        if wrong:
            raise ConfigError(
                f"strategy.dropping names block {wrong[0]}, but the model's blocks that can be cut after are 1 to "
                f"{last}; {last + 1} is the head"
            )
        return module

    # --- the schedule ---------------------------------------------------------------------------------

    def schedule_of(self, num_blocks: int) -> tuple[int, ...]:
        """The dropping set for a model of so many blocks, head included."""
        return tuple(self.dropping) if self.dropping is not None else tuple(range(num_blocks - 1, 0, -1))

    def depth(self, round_num: int, dropping: tuple[int, ...]) -> int:
        """The block whose output is sent up in a round, from 1; 0: none, clients train alone."""
        stage = (round_num - 1) // self.stage_rounds
        if stage >= len(dropping) and self.after == "stop":
            return 0
        return dropping[min(stage, len(dropping) - 1)]

    def strength(self, round_num: int, num_stages: int) -> float:
        """The weight of soft labels in a round."""
        since = round_num - 1 - self.stage_rounds * min((round_num - 1) // self.stage_rounds, num_stages - 1)
        return self.lam_l * min(1.0, (since + 1) / (self.ramp + 1))

    def _dropping(self, local: Local) -> tuple[int, ...]:
        return self.schedule_of(len(local.blocks))

    # --- server ---------------------------------------------------------------------------------------

    def init(self, info: Info, w: Tensor) -> D2SState:
        if not info.num_classes:
            raise ConfigError("fedd2s distils soft labels, which needs classes, and the data have none: choose others")
        return D2SState(w, torch.zeros(info.num_classes, info.num_classes, dtype=w.dtype, device=w.device))

    def broadcast(self, state: D2SState) -> dict[str, Any]:
        sent: dict[str, Any] = {"w": once(state.w) if self.initial == "common" else sized(state.w, 0)}
        if state.distils and self.path == "head":
            sent["heads"] = state.heads
        if state.distils and self.teacher == "class" and bool(state.table.any()):
            sent["table"] = state.table
        return sent

    def unicast(self, state: D2SState, clients: tuple[int, ...]) -> dict[str, Any]:
        if not state.distils or self.teacher == "class":
            return {}
        none = state.table[:0]  # who has soft labels of its own needs no table, and the other way round
        known = bool(state.table.any())
        return {
            "own": [state.soft.get(c, none) for c in clients],
            "table": [none if c in state.soft or not known else state.table for c in clients],
        }

    def round(self, fed: Federation, state: D2SState) -> D2SState:
        dropping = self.schedule_of(len(fed.blocks))
        depth, who = self.depth(fed.round_num, dropping), fed.sample()
        if not depth or not self.lam_l:
            fed.train(who, state)
            return state
        active = {d: state.heads[d] for d in (depth,) if d in state.heads}
        distils = self.timing == "pipelined" and (self.path != "head" or bool(active))  # a new head knows nothing yet
        answer = fed.train(who, replace(state, distils=distils, heads=active))
        new = self._learn(fed, state, depth, dropping, answer)
        if self.timing == "in_round":
            second = replace(new, distils=True, heads={depth: new.heads[depth]})
            fed.train(who, second, half=Distilling(self), phase="distil")
        return new

    def _learn(
        self, fed: Federation, state: D2SState, depth: int, dropping: tuple[int, ...], answer: Reduced
    ) -> D2SState:
        """Trains the heads on what came up, and makes new soft labels with the active one."""
        depths = dropping if self.heads == "all" else (depth,)
        sent = [[t.to(state.w.device) for t in item] for item in answer["tuples"]]
        sizes = [len(item[-1]) for item in sent]
        columns = [torch.cat(column) for column in zip(*sent, strict=True)]
        q, y = columns[len(depths)], columns[len(depths) + 1].long()
        n = columns[-1] if self.granularity == "class" else torch.ones_like(q[:, 0])
        shapes = _shapes(fed) if self.pool else {}
        heads, optimizer = dict(state.heads), {}
        for d, h in zip(depths, columns, strict=False):
            network = fed.tail(d)
            h = h if not self.pool else restored(h, shapes[d])
            w = heads.get(d, network.initial).clone().unsqueeze(0)
            known = state.optimizer.get(d)
            opt = Adam().init(w) if known is None else {k: v.clone() for k, v in known.items()}
            w, loss = self._fit(fed, network, d, w, opt, h, q, y)
            heads[d], optimizer[d] = w[0], opt
            if d == depth:
                fed.log |= {"depth": depth, "head_loss": loss}
                soft = torch.cat([self._label(network, w, part) for part in torch.split(h, EXAMPLES)])
        table = state.table.clone()
        for c in torch.unique(y).tolist():
            weight = (n * (y == c)).unsqueeze(1).double()
            table[c] = ((weight * soft).sum(0) / weight.sum()).to(table)
        rows = dict(zip(answer.clients, torch.split(soft, sizes), strict=True))
        return replace(state, heads=heads, optimizer=optimizer, soft={**state.soft, **rows}, table=table)

    def _fit(
        self,
        fed: Federation,
        network: Network,
        depth: int,
        w: Tensor,
        state: dict[str, Tensor],
        h: Tensor,
        q: Tensor,
        y: Tensor,
    ) -> tuple[Tensor, float]:
        """Some epochs of a head, which move Adam's ``state``; returns its parameters and the last epoch's mean loss."""
        adam, loss = Adam(), 0.0
        if not len(y):  # no client of the cohort has an example
            return w, loss
        network.train(True)
        for epoch in range(self.server_epochs):
            total = torch.zeros((), dtype=torch.float64, device=w.device)
            order = torch.randperm(len(y), generator=fed.generator("head", depth, epoch))
            for index in torch.split(order, self.server_batch_size):
                i = index.to(w.device)
                network.bind(w)
                z = network.module(h[i])[-1]
                losses = F.cross_entropy(z, y[i], reduction="none") + self.lam_g * kl(q[i], z, self.temperature)
                grad = network.gradient(losses.mean(), torch.empty_like(w))
                w = adam.step(w, grad, state, self.server_lr)
                total += losses.detach().double().sum()
            loss = float(total) / len(y)
        return w, loss

    @torch.no_grad()
    def _label(self, network: Network, w: Tensor, h: Tensor) -> Tensor:
        network.train(False)
        network.bind(w)
        soft: Tensor = (network.module(h)[-1] / self.temperature).softmax(-1)
        return soft

    # --- client ---------------------------------------------------------------------------------------

    def memory(self, local: Local) -> dict[str, Tensor]:
        return {"w": local.start if self.initial == "common" else local.drawn("initial")}

    def work(self, local: Local) -> Tensor:
        local.memory.w = local.train(local.memory.w)
        return local.memory.w

    def loss(self, model: Model, batch: Batch, local: Local) -> Tensor:
        if not self.teaches(local) or self.path == "masked":
            return local.loss(model, batch)
        p, T = self.teacher_of(batch, local), self.temperature
        remembering = Remembering(model, batch.x, by_block=self.path == "head")
        plain = batch.objective(local.loss(remembering, batch))  # the task's, or a recipe's
        found = remembering.outputs
        if self.path == "full":
            extra = kl(p, model(batch.x) if found is None else found, T)
        else:
            ((depth, head),) = local.sent.heads.items()
            h = (model.blocks(batch.x) if found is None else found)[depth - 1]
            if self.pool:
                maps = h.flatten(0, 1)
                h = restored(pooled(maps, self.pool), maps.shape[1:]).view_as(h)
            z = local.tail(depth, head, h)
            extra = local.task_loss(z, batch.y) + kl(p, z, T)
        lam = self.strength(local.round, len(self._dropping(local)))
        return plain + lam * batch.objective(torch.where(p.sum(-1) > 0, extra, 0.0))

    def direction(self, w: Tensor, grad: Grad, local: Local) -> Tensor:
        g = grad(w)
        if self.path != "masked" or not self.teaches(local):
            return g
        if "lower" not in local.scratch:
            local.scratch["lower"] = self._lower(local).to(w.device)
        lower: Tensor = local.scratch["lower"]
        return g + lower * grad(w, half=SoftLabels(self))

    def _lower(self, local: Local) -> Tensor:
        """Which parameters are those of blocks that take part in the federation, bool ``[d]``."""
        blocks = local.blocks[: self.depth(local.round, self._dropping(local))]
        lower = tuple(f"{part}." for block in blocks for part in block)
        return local.layout.mask_of([name for name in local.layout.names if name.startswith(lower)])

    def teaches(self, local: Local) -> bool:
        """Whether soft labels act in this visit."""
        sent = vars(local.sent)
        return any(name in sent and bool(sent[name].shape[1]) for name in ("own", "table"))

    def teacher_of(self, batch: Batch, local: Local) -> Tensor:
        """The soft label of every example, ``[C, B, classes]``; 0 where there is none."""
        table: Tensor = local.sent.table
        p = table.new_zeros(*batch.y.shape, table.shape[-1])
        if table.shape[1]:
            p = _rows(table, batch.y)
        own = getattr(local.sent, "own", None) if self.teacher == "own" else None
        if own is not None and own.shape[1]:
            # An order may go round a lone client's examples several times.
            number = batch.index % max(local.n, 1) if len(local.clients) == 1 else batch.index
            place = self.places(local).gather(1, number.to(p.device))
            q = _rows(own, place.clamp(0, own.shape[1] - 1))
            has = (place >= 0) & (place < own.shape[1])
            # A client has either soft labels of its own or the table; under batching the other one is padded with 0.
            p = p + torch.where(has[..., None], q, 0.0)
        return p

    def places(self, local: Local) -> Tensor:
        """For every example of the clients the row of the soft labels that is its own, ``[C, n]``; -1: it has none."""
        if "places" not in local.scratch:
            local.scratch["places"] = self._places(local)
        found: Tensor = local.scratch["places"]
        return found

    def _places(self, local: Local) -> Tensor:
        if self.granularity == "sample" and self.max_per_class is None:
            return torch.arange(max(local.sizes), device=local.start.device).expand(len(local.clients), -1)
        labels, keep = local.labels()
        out = torch.full_like(labels, -1)
        for i in range(len(labels)):
            y = labels[i][keep[i]]
            if self.granularity == "class":
                out[i, : len(y)] = torch.unique(y, return_inverse=True)[1]
            else:
                sent = self._sent(y)
                out[i, sent] = torch.arange(len(sent), device=y.device)
        return out

    def _sent(self, y: Tensor) -> Tensor:
        """Which of a client's examples are sent up, int64 ``[m]``, in order."""
        if self.max_per_class is None:
            return torch.arange(len(y), device=y.device)
        chosen = [(y == c).nonzero()[: self.max_per_class, 0] for c in torch.unique(y)]
        return torch.cat([*chosen, y[:0].long()]).sort().values

    @torch.no_grad()
    def finish(self, w: Tensor, local: Local) -> dict[str, Entry]:
        dropping = self._dropping(local)
        depth = self.depth(local.round, dropping)
        if not depth or not self.lam_l:
            return {}
        depths = dropping if self.heads == "all" else (depth,)
        batch, hs, z = self._extract(w, local, depths)
        q = (z / self.temperature).softmax(-1)
        tuples = []
        for i in range(len(local.clients)):
            kept = batch.keep[i]
            y = batch.y[i][kept]
            found = [*(pooled(h[i][kept], self.pool) for h in hs), q[i][kept]]
            if self.granularity == "class":
                classes, n = torch.unique(y, return_counts=True)
                tuples.append((*(class_means(t, y, classes) for t in found), classes.to(q), n.to(q)))
            else:
                sent = self._sent(y)
                tuples.append((*(t[sent] for t in found), y[sent].to(q)))
        return {"tuples": concat(tuples)}

    def _extract(self, w: Tensor, local: Local, depths: tuple[int, ...]) -> tuple[Batch, list[Tensor], Tensor]:
        """All examples of the clients, for them the outputs of some blocks, ``[C, n, ...]`` each, and the logits."""
        batch, model = local.examples(), local.at(w)
        parts = []
        for x in torch.split(batch.x, EXAMPLES, dim=1):
            outputs = model.blocks(x)
            parts.append((*(outputs[d - 1] for d in depths), outputs[-1]))
        *hs, z = (torch.cat(of_all, 1) for of_all in zip(*parts, strict=True))
        return batch, hs, z

    def personal(self, local: Local) -> Tensor:
        return local.memory.w


@dataclass(frozen=True)
class Distilling(ClientHalf):
    """The second training of a round (``timing=in_round``): with soft labels; nothing goes up.

    Attributes:
        of: The strategy.
    """

    batched: ClassVar = True

    of: FedD2S

    def work(self, local: Local) -> Tensor:
        return self.of.work(local)

    def loss(self, model: Model, batch: Batch, local: Local) -> Tensor:
        return self.of.loss(model, batch, local)

    def direction(self, w: Tensor, grad: Grad, local: Local) -> Tensor:
        return self.of.direction(w, grad, local)

    def finish(self, w: Tensor, local: Local) -> dict[str, Entry]:
        return {}


@dataclass(frozen=True)
class SoftLabels(ClientHalf):
    """The soft labels' part of the loss alone (``path=masked``).

    Attributes:
        of: The strategy.
    """

    batched: ClassVar = True

    of: FedD2S

    def loss(self, model: Model, batch: Batch, local: Local) -> Tensor:
        p = self.of.teacher_of(batch, local)
        lam = self.of.strength(local.round, len(self.of._dropping(local)))
        return lam * torch.where(p.sum(-1) > 0, kl(p, model(batch.x), self.of.temperature), 0.0)


def _rows(table: Tensor, index: Tensor) -> Tensor:
    """Rows ``[C, B, k]`` of ``[C, m, k]`` (or ``[1, m, k]``), by number ``[C, B]``."""
    table = table.expand(len(index), *table.shape[1:])
    return table.gather(1, index[..., None].expand(*index.shape, table.shape[-1]))


def class_means(t: Tensor, y: Tensor, classes: Tensor) -> Tensor:
    """Means of ``t``, ``[m, ...]``, over the examples of each of some classes, ``[classes, ...]``, in float64.

    Args:
        t: A row per example.
        y: Labels, ``[m]``.
        classes: Those that have an example.
    """
    means = [t[y == c].double().mean(0, keepdim=True) for c in classes]
    return torch.cat([t[:0].double(), *means]).to(t)


def pooled(h: Tensor, size: int | None) -> Tensor:
    """Maps ``[m, c, H, W]`` with more rows and columns averaged to ``size`` of each; anything else as it is."""
    if size is None or h.dim() != 4 or min(h.shape[2:]) <= size:
        return h
    maps: Tensor = AveragePool(size)(h)
    return maps


def restored(h: Tensor, shape: torch.Size) -> Tensor:
    """Outputs of `pooled` in the shape that they had, ``[m, *shape]``: every mean in its own patch."""
    return h if h.shape[1:] == shape else F.interpolate(h, shape[1:], mode="nearest")


@torch.no_grad()
def _shapes(fed: Federation) -> dict[int, torch.Size]:
    """The shape of one output of every block, by the block's number."""
    x = fed.program.inputs(fed.program.dataset.test.x[:1])
    outputs = Blocks(fed.module.eval(), fed.blocks)(x)
    return {number: h.shape[1:] for number, h in enumerate(outputs, start=1)}

"""FedLD: a regulariser against overconfident local models, and a server step along the updates' principal directions.

Source: Zeng et al., 2024, "Tackling Data Heterogeneity in Federated Learning via Loss Decomposition",
https://arxiv.org/abs/2408.12300; the official code where it is more definite.
Departures:
    1. The server never forms principal directions: the new model is a combination of the updates whose coefficients
       follow from their Gram matrix (`coefficients`), the same numbers up to rounding.
    2. Directions without weight (``s_j <= 1e-12 sum(s)``) are left out, and a projection that is zero up to rounding
       has the sign 0; the official code divides 0 by 0 there.
    3. At least one direction is kept; the official code keeps none of a single client's, and discards its update. Of
       ``r m`` that is a whole number but for its rounding (0.29 x 100) that number is kept; the official code has 28.
    4. The official code freezes batch norms at their first statistics and warms the learning rate up over five
       epochs, by accident: ``client.buffers=frozen`` and ``warmup=5`` do the same.
    5. The paper's figure has the norm of the network's output, example by example; the official code that of the
       probabilities of a whole minibatch. Both are options (``of``, ``reduction``), and the code's is the default.
    6. The official code turns every direction to the side of most clients, which changes nothing there;
       ``sign=oriented`` makes it count.
    7. The official code keeps a running mean of the updates, only to ask whether it is zero: here one bit per block.
    8. The official code needs all clients in every round; here m is the size of the cohort.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedsim.clients.batch import Batch
from fedsim.clients.local import Local
from fedsim.errors import ConfigError
from fedsim.federation import Federation
from fedsim.network import Remembering
from fedsim.reduce import Entry, Reduced, Rows, sized, stack
from fedsim.strategy import ClientHalf, Info, Model, Strategy, require

COLUMNS = 2**20  # of the updates at once, for their inner products
EXAMPLES = 512  # at once, for the losses of the decomposition


@dataclass(frozen=True)
class PrincipalState:
    """All that the server carries from one round to the next.

    Attributes:
        w: Global parameters, ``[d]``.
        seen: Blocks of which a mean update that is not all zero has been seen, bool ``[T]``.
    """

    w: Tensor
    seen: Tensor


@dataclass(frozen=True)
class FedLD(Strategy):
    """FedLD.

    Attributes:
        lam: Weight of the regulariser, >= 0.
        r: Share of the principal directions that is kept, in (0, 1].
        of: What is bounded: ``probabilities`` or ``logits``.
        reduction: ``batch``: one norm over a whole minibatch, so that its size matters; ``sample``: mean over examples.
        aggregation: ``principal``, or ``mean`` for FedAvg's.
        sign: ``projection``: each client moves along a direction to its own side; ``oriented``: all to that of most.
        granularity: ``tensor``: every tensor has directions of its own; ``model``: the whole vector.
        warmup: Epochs over which the learning rate grows from 0; it stays within a round; 0: none.
        decompose_every: Rounds between loss decompositions (see `decompose`); 0: never.
    """

    batched: ClassVar = True
    parent: ClassVar = "fedavg"
    parent_options: ClassVar = {"weights": "uniform"}
    neutral: ClassVar = {"lam": 0.0, "aggregation": "mean"}
    exempt: ClassVar = {
        "one_full_batch_step_is_gradient_descent": "the regulariser needs classes",
        "loss_falls_on_two_quadratic_clients": "the regulariser needs classes",
    }

    lam: float = 0.1
    r: float = 0.8
    of: str = "probabilities"
    reduction: str = "batch"
    aggregation: str = "principal"
    sign: str = "projection"
    granularity: str = "tensor"
    warmup: float = 0.0
    decompose_every: int = 0

    def check(self) -> None:
        require(self.lam >= 0, "strategy.lam", ">= 0", self.lam)
        require(0 < self.r <= 1, "strategy.r", "in (0, 1]", self.r)
        require(self.of in ("probabilities", "logits"), "strategy.of", "probabilities or logits", self.of)
        require(self.reduction in ("batch", "sample"), "strategy.reduction", "batch or sample", self.reduction)
        rules = ("principal", "mean")
        require(self.aggregation in rules, "strategy.aggregation", "principal or mean", self.aggregation)
        require(self.sign in ("projection", "oriented"), "strategy.sign", "projection or oriented", self.sign)
        require(self.granularity in ("tensor", "model"), "strategy.granularity", "tensor or model", self.granularity)
        require(self.warmup >= 0, "strategy.warmup", ">= 0", self.warmup)
        require(self.decompose_every >= 0, "strategy.decompose_every", ">= 0", self.decompose_every)

    def init(self, info: Info, w: Tensor) -> PrincipalState:
        if self.lam and not info.num_classes:
            raise ConfigError("fedld's regulariser needs classes; set strategy.lam=0, or choose other data")
        blocks = 1 if self.granularity == "model" else len(info.layout.names)
        return PrincipalState(w, torch.zeros(blocks, dtype=torch.bool))

    def schedule(self, local: Local) -> dict[str, Any]:
        if not self.warmup:
            return {}
        epochs = local.options.epochs or 1
        return {"lr": min(1.0, epochs * (local.round - 1) / self.warmup)}

    def loss(self, model: Model, batch: Batch, local: Local) -> Tensor:
        if not self.lam:
            return local.loss(model, batch)
        remembering = Remembering(model, batch.x)
        objective = batch.objective(local.loss(remembering, batch))  # the task's, or a recipe's
        z = model(batch.x) if remembering.outputs is None else remembering.outputs
        if not isinstance(z, Tensor):
            raise ConfigError(f"fedld's regulariser needs a model that returns a tensor, got a {type(z).__name__}")
        size: Tensor = (z.softmax(-1) if self.of == "probabilities" else z).square().sum(-1)
        sample = self.reduction == "sample"
        return objective + self.lam * (batch.objective(size.log1p()) if sample else batch.sum(size).log1p())

    def finish(self, w: Tensor, local: Local) -> dict[str, Entry]:
        return {"delta": stack(local.delta(w))}

    def round(self, fed: Federation, state: PrincipalState) -> PrincipalState:
        reduced = fed.train(fed.sample(), state)
        new = self.step(state, reduced)
        due = self.decompose_every and fed.round_num % self.decompose_every == 0
        if due and reduced.num_examples.any():
            parts = decompose(fed, state.w + reduced["delta"].tensor(), new.w, reduced)
            fed.log.update({f"decomposition/{name}": value for name, value in parts.items()})
        return new

    def step(self, state: PrincipalState, reduced: Reduced) -> PrincipalState:
        rows, m = reduced["delta"], len(reduced["delta"])
        blocks = [slice(0, reduced.layout.d)]
        if self.granularity == "tensor":
            blocks = [s for _, s in reduced.layout.blocks()]
        # The plain mean until a block has moved, and always for a single number.
        principal = [seen and s.stop - s.start > 1 for seen, s in zip(state.seen.tolist(), blocks, strict=True)]
        if self.aggregation == "mean" or not any(principal):
            moved = rows.mean(torch.ones(m))
        else:
            c = torch.full((m, len(blocks)), 1 / m, dtype=torch.float64)
            for i, s in enumerate(blocks):
                if principal[i]:
                    c[:, i] = coefficients(gram(rows, s) / m, self.r, self.sign)
            moved = rows.combine(c, [s.stop - s.start for s in blocks])
        seen = torch.stack([old | moved[s].any() for old, s in zip(state.seen, blocks, strict=True)])
        return PrincipalState((state.w + moved).to(state.w), seen)


def gram(rows: Rows, block: slice) -> Tensor:
    """Inner products of the rows within a block of columns, float64 ``[m, m]``, summed over parts of the block."""
    out = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for start in range(block.start, block.stop, COLUMNS):
        part = rows[:, start : min(start + COLUMNS, block.stop)].double().contiguous()
        out += part @ part.T
    return out


def coefficients(A: Tensor, r: float, sign: str = "projection") -> Tensor:
    """The weights ``c``, ``[m]``, with which the mean of the revised updates is ``sum_l c_l g_l``.

    With ``A = G G^T / m`` and its eigenpairs ``s_j, e_j``, the principal directions are ``G^T e_j``, of length
    ``sqrt(m s_j)``; update i is revised to ``|g_i| sum_{j <= k} (s_j / sum(s)) sign<g_i, v_j> v_j``.

    Args:
        A: Inner products of the updates over m, float64 ``[m, m]``.
        r: Share of the directions that is kept.
        sign: ``projection`` or ``oriented``.
    """
    m = len(A)
    s, E = torch.linalg.eigh(A)
    s, E = s.flip(0).clamp(min=0.0), E.flip(1)
    size = (m * A.diagonal()).clamp(min=0.0).sqrt()
    kept = (torch.arange(m) < max(1, math.floor(r * m + 1e-9))) & (s > 1e-12 * s.sum())
    projection = (m * s).sqrt() * E
    side = torch.where(projection.abs() > 1e-6 * size[:, None], projection.sign(), 0.0)
    if sign == "oriented":
        majority = side.sum(0)
        side = torch.where(majority == 0, projection.sum(0), majority).sign().expand(m, m)
    weight = torch.where(kept, s.sqrt() / s.sum().clamp(min=1e-300), 0.0)
    c: Tensor = (E * (weight * (size @ side) / m / math.sqrt(m))).sum(1)
    return c


# --- the loss decomposition -------------------------------------------------------------------------------


@dataclass(frozen=True)
class LossesOf(ClientHalf):
    """A visit without training that reports the mean loss of several models on the client's examples."""

    batched: ClassVar = False

    def work(self, local: Local) -> Tensor:
        return local.start

    def finish(self, w: Tensor, local: Local) -> dict[str, Entry]:
        sums = [torch.zeros((), dtype=torch.float64) for _ in range(local.sent.models.shape[-2])]
        with torch.no_grad():
            for start in range(0, local.n, EXAMPLES):
                batch = local.take(torch.arange(start, min(start + EXAMPLES, local.n)).unsqueeze(0))
                for i in range(len(sums)):
                    model = local.at(local.sent.models[..., i, :].expand(1, -1))
                    sums[i] += local.task_loss(model(batch.x), batch.y).double().sum().cpu()
        return {"loss": sized(stack((torch.stack(sums) / max(local.n, 1))[None]), 0)}


def decompose(fed: Federation, models: Tensor, w: Tensor, reduced: Reduced) -> dict[str, float]:
    """The global loss, divided: ``F(w) = local + shift + aggregation``, over the cohort's training examples.

    ``local`` is the mean loss of each local model on its own data, ``shift`` what is added by the data of the others,
    and ``aggregation`` what the aggregated model adds to that (or takes away). Clients count by their numbers of
    examples. Every model is evaluated on every client's data, with the task's loss: m (m + 1) evaluations, all m models
    in one place. A diagnostic: charged no bytes, but for averaged batch-norm statistics, which every visit carries.

    Args:
        fed: The federation.
        models: The local models, ``[m, d]``, in the order of ``reduced.clients``.
        w: The aggregated model, ``[d]``.
        reduced: What the cohort sent up.
    """
    sent = {"w": sized(w, 0), "models": sized(torch.cat([models.to(w), w[None]]), 0)}
    answer = fed.train(reduced.clients, None, half=LossesOf(), send=sent, phase="decompose")
    losses = answer["loss"].tensor()  # [m, m + 1]
    p = (reduced.num_examples / reduced.num_examples.sum()).to(losses)
    own, everywhere = losses[:, :-1].diagonal(), p @ losses
    parts = {
        "local": p @ own,
        "shift": p @ (everywhere[:-1] - own),
        "aggregation": p @ (everywhere[-1] - everywhere[:-1]),
        "global": everywhere[-1],
    }
    return {name: float(value) for name, value in parts.items()}

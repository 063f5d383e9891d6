"""FedLoGe: one backbone against a fixed, sparse classifier, a shared head and a private one for every client.

Source: Xiao et al., 2024, "FedLoGe: Joint Local and Generic Federated Learning under Long-tailed Data",
https://arxiv.org/abs/2401.08977; the official code for what the abstract and the figures leave open.
Departures:
    1. The fixed classifier has no bias; in the official code a linear layer's random bias is frozen with it
       (``sse_bias=true``).
    2. The bias of the shared head stays as it is when the rows are normalised, and their norm becomes 1.7, as in the
       official code; the paper's figure has no bias, and norm 1 (``keep_bias=false scale=1``).
    3. A client's score is the sum of its own head and the realigned one, as in the official realignment script; its
       README and the paper's figure have others (``rule``).
    4. Classes that a client has no training example of are left out of its scores; the official code looks at the
       labels of its test set, which are not known when one predicts.
    5. One optimizer over all three parts takes the place of three: their gradients do not mix, so the steps of SGD and
       Adam are the same.
    6. Two linear layers of the official backbones that nothing uses are left out.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fedsim.clients.batch import Batch
from fedsim.clients.local import Local
from fedsim.clients.optimizers import Adam
from fedsim.clients.visit import ClientOptions
from fedsim.datasets import cache
from fedsim.errors import ConfigError
from fedsim.federation import Federation
from fedsim.parts import head_of
from fedsim.reduce import Entry, Reduced, mean, once
from fedsim.strategies.fedavg import FedAvg
from fedsim.strategies.fedetf import etf
from fedsim.strategy import Info, Model, require

log = logging.getLogger("fedsim")

RULES = ("realigned", "realigned+local", "realigned+global")
LR = 1e-4  # of Adam, in the construction of the fixed classifier


class ThreeHeads(nn.Module):
    """Features, and two heads that see them as a constant: the shared one (psi, b), and a private one (phi, a)."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        head = head_of(base, "fedloge")
        self.features, self.head = base.get_submodule("features"), head
        self.private = nn.Linear(head.in_features, head.out_features, bias=head.bias is not None)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features ``[B, dim]``, and the logits of the shared and the private head, ``[B, classes]`` each."""
        h: Tensor = self.features(x)
        fixed = h.detach()
        return h, self.head(fixed), self.private(fixed)


def sse_c(num_classes: int, dim: int, beta: float, tau: float, steps: int, generator: torch.Generator) -> Tensor:
    """The fixed classifier: a sparse matrix whose rows are made equally long and pushed apart.

    Adam, at a rate of 1e-4, minimises ``sum_c (|m_c| - tau)^2 - 1/C sum_c angle(m_c, its nearest neighbour)`` over the
    entries that are left of a simplex.

    Args:
        num_classes: C.
        dim: Length of the features, at least C.
        beta: Share of all entries that is 0, in [0, 1).
        tau: Length that rows are drawn to.
        steps: Steps of Adam; 0: the sparse simplex as it is, with rows of about ``sqrt(1 - beta)``.
        generator: What the simplex and the zeros are drawn from.

    Returns:
        The rows, float32 ``[C, dim]``.

    Raises:
        ConfigError: A row would have no entry left.
    """
    C = num_classes
    M = etf(C, dim, generator).T.float().contiguous()
    kept = torch.ones(C * dim)
    kept[torch.randperm(C * dim, generator=generator)[: math.floor(beta * dim * C + 1e-9)]] = 0
    kept = kept.view(C, dim)
    require(bool(kept.any(1).all()), "strategy.beta", f"smaller: a class keeps none of its {dim} weights", beta)
    w = (M * kept).view(1, -1)
    adam, self_angle = Adam(), 2 * torch.eye(C)
    state = adam.init(w)
    for _ in range(steps):
        m = w.view(C, dim).detach().requires_grad_()
        norm = m.norm(dim=1)
        cosine = (m @ m.T) / norm / norm[:, None] - self_angle
        nearest = cosine.max(1).values.clamp(-0.99999, 0.99999)
        (grad,) = torch.autograd.grad((norm - tau).square().sum() - nearest.acos().mean(), m)
        w = adam.step(w, (grad * kept).view(1, -1), state, LR)
    return w.view(C, dim)


def kept_sse_c(num_classes: int, dim: int, beta: float, tau: float, steps: int, info: Info) -> Tensor:
    """`sse_c` drawn from the run's seed; built once per machine and setting, as large ones take a while."""
    what = (num_classes, dim, beta, tau, steps, info.seed, LR, torch.__version__, torch.get_num_threads())
    key = hashlib.sha256(repr((*what, torch.backends.cpu.get_cpu_capability())).encode()).hexdigest()
    if (found := cache.read("sse-c", key)) is not None:
        return found[0]["W"].clone()
    log.info("building the fixed classifier: %d steps", steps)
    W = sse_c(num_classes, dim, beta, tau, steps, info.generator("sse_c"))
    if steps >= 1000:
        cache.write("sse-c", key, {"W": W}, {})
    return W


@dataclass(frozen=True)
class LoGeState:
    """All that the server carries from one round to the next.

    Attributes:
        w: Backbone, shared head, and a private part that is never read, ``[d]``.
        W: The fixed classifier, ``[classes, dim]``, and its bias as the last column if it has one.
        psi: The shared head before it was realigned, ``[classes, dim]``, and its bias as the last column; None before
            `FedLoGe.finalize`.
    """

    w: Tensor
    W: Tensor
    psi: Tensor | None = None


@dataclass(frozen=True)
class FedLoGe(FedAvg):
    """FedLoGe.

    Until the last round the fixed classifier is scored as the generic model, and a client's own head plus the shared
    one as its personal model; after it the realigned heads are. The training loss is the sum of the three.

    Attributes:
        beta: Share of the fixed classifier's entries that is 0, in [0, 1).
        tau: Length of its rows, > 0; logits are as large.
        sse_steps: Steps of its construction; 0: no construction, a sparse simplex with rows of about sqrt(1 - beta).
        sse_bias: Whether it has a random bias.
        scale: Length of the rows of the realigned generic head, > 0.
        keep_bias: Whether its bias stays, or becomes 0.
        rule: Score of a realigned client: ``realigned`` (its shared head with its own row norms), ``realigned+local``
            (with its own head added), ``realigned+global`` (with the shared head added, without biases).
        mask: Whether classes without a training example are left out of a client's scores.
        class_weights: Whether rows of the shared head are averaged by the clients' examples of that class.
    """

    batched: ClassVar = True
    parent: ClassVar = None
    neutral: ClassVar = {}
    quick: ClassVar = {"sse_steps": 20}
    needs: ClassVar = {"model.hidden": [12]}
    exempt: ClassVar = {
        "one_full_batch_step_is_gradient_descent": "needs a model with a head and classes; the law has a regression",
        "loss_falls_on_two_quadratic_clients": "needs a model with a head and classes; the law has a regression",
    }

    beta: float = 0.6
    tau: float = 0.1
    sse_steps: int = 10_000
    sse_bias: bool = False
    scale: float = 1.7
    keep_bias: bool = True
    rule: str = "realigned+local"
    mask: bool = True
    class_weights: bool = False

    def check(self) -> None:
        super().check()
        require(0 <= self.beta < 1, "strategy.beta", "in [0, 1)", self.beta)
        require(self.tau > 0, "strategy.tau", "> 0", self.tau)
        require(self.sse_steps >= 0, "strategy.sse_steps", ">= 0", self.sse_steps)
        require(self.scale > 0, "strategy.scale", "> 0", self.scale)
        require(self.rule in RULES, "strategy.rule", " or ".join(RULES), self.rule)

    def check_client(self, options: ClientOptions) -> None:
        if options.clip_norm is not None:
            raise ConfigError(
                f"client.clip_norm={options.clip_norm:g} would let the two heads shorten the backbone's steps under "
                "fedloge, whose three parts are trained apart: set client.clip_norm=null"
            )

    def model(self, module: nn.Module) -> nn.Module:
        head = head_of(module, "fedloge")
        if head.out_features < 2 or head.in_features < head.out_features:
            raise ConfigError(
                f"fedloge places {head.out_features} classes at equal angles, which needs two classes at least, and as "
                f"many features, but the model has {head.in_features}: choose a wider one"
            )
        return ThreeHeads(module)

    def parts(self, layout: Any) -> dict[str, str]:
        return {"private.": "private"}

    def init(self, info: Info, w: Tensor) -> LoGeState:
        if info.num_classes < 2:
            raise ConfigError("fedloge needs data with classes; these have numbers as targets")
        C, dim = info.layout.shapes["head.weight"]
        W = kept_sse_c(C, dim, self.beta, self.tau, self.sse_steps, info)
        if self.sse_bias:
            bias = (2 * torch.rand(C, 1, generator=info.generator("sse_c bias")) - 1) / dim**0.5
            W = torch.cat([W, bias], 1)
        return LoGeState(w, W.to(w))

    def broadcast(self, state: LoGeState) -> dict[str, Any]:
        return {"w": state.w, "W": once(state.W)} | ({} if state.psi is None else {"psi": state.psi})

    def memory(self, local: Local) -> dict[str, Tensor]:
        # The first private heads, drawn as a linear layer draws: of a client, not of its first visit, so that one that
        # never took part is scored with the head that it would start from.
        d, dim = local.layout.size("private."), local.layout.shapes["private.weight"][1]
        drawn = [2 * torch.rand(d, generator=g) - 1 for g in local.stream_generator("private head")]
        return {"private": torch.stack(drawn).to(local.start) / dim**0.5}

    def loss(self, model: Model, batch: Batch, local: Local) -> Tensor:
        h, shared, own = model(batch.x)
        scores = _scores(h, local.sent.W), shared, own
        fixed, of_shared, of_own = (local.loss(_One(model, i, batch.x, scores, local.sent.W), batch) for i in range(3))
        return fixed + of_shared + of_own

    def finish(self, w: Tensor, local: Local) -> dict[str, Entry]:
        weight = self.weight(w)
        if self.class_weights:
            n = local.num_examples.to(w.device)
            weight = (torch.ones_like(n) if self.weights == "uniform" else n).expand(w.shape).clone()
            counts = local.class_counts.to(weight)
            for name, s in local.layout.blocks():
                if name.startswith("head."):
                    weight[:, s] = counts.repeat_interleave((s.stop - s.start) // counts.shape[1], dim=1)
        return {"delta": mean(local.delta(w), weight)}

    def step(self, state: LoGeState, reduced: Reduced) -> LoGeState:  # type: ignore[override]
        return replace(state, w=(state.w + reduced["delta"]).to(state.w))

    def finalize(self, fed: Federation, state: LoGeState) -> LoGeState:
        """Gives all rows of the shared head one length; clients need it as it was."""
        w = state.w.clone()
        views = fed.layout.views(w)  # of the new vector: writing to them writes to it
        psi, bias = views["head.weight"], views.get("head.bias")
        before = torch.cat([psi, torch.zeros_like(psi[:, :1]) if bias is None else bias[:, None]], 1)
        psi.copy_(self.scale * psi / _norm(psi))
        if bias is not None and not self.keep_bias:
            bias.zero_()
        return replace(state, w=w, psi=before)

    def predict(self, model: Model, batch: Batch, local: Local) -> Tensor:
        h, shared, own = model(batch.x)
        final = hasattr(local.sent, "psi")
        if local.mode == "global":
            return shared if final else _scores(h, local.sent.W)
        if final:
            psi, bias = local.sent.psi[..., :-1], local.sent.psi[..., -1]
            realigned = h @ (psi * _norm(model.views["private.weight"])).mT
            if self.rule == "realigned+local":
                scores = own + realigned + bias[:, None]
            elif self.rule == "realigned+global":
                scores = realigned + h @ psi.mT
            else:
                scores = realigned
        else:
            scores = own + shared
        return self._masked(scores, local) if self.mask else scores

    def _masked(self, scores: Tensor, local: Local) -> Tensor:
        """Minus infinity for the classes that a client does not train on; one without examples keeps all."""
        known = local.class_counts.to(scores.device) > 0
        known |= ~known.any(1, keepdim=True)
        return scores.masked_fill(~known[:, None], -math.inf)


class _One:
    """The scores of one of the three classifiers, for `Local.loss`; those of the batch at hand are there already.

    Args:
        model: The network at some point.
        part: 0: the fixed classifier, 1: the shared head, 2: the private one.
        x: Inputs of the batch.
        known: Scores of all three on them.
        W: The fixed classifier.
    """

    def __init__(self, model: Model, part: int, x: Any, known: Sequence[Tensor], W: Tensor) -> None:
        self._model, self._part, self._x, self._known, self._W = model, part, x, known, W

    def __call__(self, x: Any) -> Any:
        if x is self._x:
            return self._known[self._part]
        outputs = self._model(x)
        return outputs[self._part] if self._part else _scores(outputs[0], self._W)

    def blocks(self, x: Any) -> tuple[Any, ...]:
        return self._model.blocks(x)

    @property
    def views(self) -> dict[str, Tensor]:
        return self._model.views


def _norm(rows: Tensor) -> Tensor:
    """Norms over the last axis, kept; never 0."""
    norm: Tensor = rows.norm(dim=-1, keepdim=True)
    return norm.clamp_min(torch.finfo(rows.dtype).tiny)


def _scores(h: Tensor, W: Tensor) -> Tensor:
    """Logits ``[C, B, classes]`` of features ``[C, B, dim]`` under ``W``, ``[1, classes, dim]`` or with a bias in one
    column more."""
    dim = h.shape[-1]
    out = h @ W[..., :dim].mT
    return out if W.shape[-1] == dim else out + W[:, None, :, -1]

"""FedLD: the regulariser, the server step along principal directions, and the loss decomposition.

The direct form of the server step (principal directions written out, update by update) is the second derivation of the
coefficients that the server computes from inner products alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsim import random
from fedsim.clients.batch import Batch
from fedsim.clients.local import Local
from fedsim.config import Config
from fedsim.data import Dataset, Shard, Split
from fedsim.errors import ClientError, ConfigError
from fedsim.experiment import Experiment, build
from fedsim.federation import Federation
from fedsim.reduce import Reduced, Rows
from fedsim.run import Driver
from fedsim.strategies import fedld
from fedsim.strategies.fedld import FedLD, PrincipalState, coefficients, gram
from fedsim.strategy import ClientHalf, Info, Model
from fedsim.vector import Layout
from tests import helpers
from tests.helpers import FixedClients, Run, batches, configure, drive, flat, local_of, module_of, quadratics

ALL = {"_target_": "fedsim.clients.participation.All"}
SIZES = [(5, 40), (12, 100), (10, 7), (5, 2), (2, 9)]  # clients, numbers of a tensor


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(Driver, "_draw", lambda *_: None)  # a run takes less time than its pictures
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a run
    yield
    torch.set_num_threads(before)


def gaussian(m: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(m, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# --- the server step, written out -------------------------------------------------------------------------


def revised(G: Tensor, r: float, sign: str = "projection") -> Tensor:
    """The revised updates, ``[m, d]``, from the singular vectors of G: directions v_j, shares s_j / sum(s)."""
    m = len(G)
    _, sigma, V = torch.linalg.svd(G, full_matrices=False)
    share = sigma.square() / sigma.square().sum()
    out = torch.zeros_like(G)
    for j in range(min(max(1, math.floor(r * m + 1e-9)), len(sigma))):
        if share[j] <= 1e-12:
            continue
        sides = [float(torch.sign(g @ V[j])) if abs(g @ V[j]) > 1e-6 * g.norm() else 0.0 for g in G]
        if sign == "oriented":
            to = sum(sides) or float(sum(g @ V[j] for g in G))
            sides = [math.copysign(1.0, to)] * m
        for i in range(m):
            out[i] += G[i].norm() * share[j] * sides[i] * V[j]
    return out


def official(G: Tensor, r: float) -> Tensor:
    """The mean of the official code's revised updates, ``[d]``: directions turned to the side of most, each update
    projected onto them, and the projections brought to length 1; none of it guarded."""
    m = len(G)
    s, E = torch.linalg.eigh(G @ G.T / m)
    s, E = s.flip(0), E.flip(1)
    total = torch.zeros_like(G[0])
    for i in range(m):
        new = torch.zeros_like(total)
        for j in range(int(r * m)):
            v = G.T @ E[:, j] / (G.T @ E[:, j]).norm()
            v = v if (G @ v >= 0).double().mean() >= 0.5 else -v
            projection = (G[i] @ v) * v
            new += s[j] / s.sum() * projection / projection.norm()
        total += G[i].norm() * new
    return total / m


def combined(G: Tensor, r: float = 0.8, sign: str = "projection") -> Tensor:
    """What the coefficients make of the updates, ``[d]``."""
    return coefficients(G @ G.T / len(G), r, sign) @ G


def close(a: Tensor, b: Tensor, atol: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


# --- the server step --------------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", ["projection", "oriented"])
@pytest.mark.parametrize("r", [0.1, 0.5, 0.8, 1.0])
@pytest.mark.parametrize(("m", "d"), SIZES)
def test_coefficients_are_the_direct_form(m: int, d: int, r: float, sign: str) -> None:
    G = gaussian(m, d)  # check 5
    close(combined(G, r, sign), revised(G, r, sign).mean(0), 1e-12)  # by singular vectors, with other rounding


@pytest.mark.parametrize(("m", "d"), SIZES)
def test_coefficients_are_the_official_aggregation(m: int, d: int) -> None:
    for seed in range(5):  # check 5
        G = gaussian(m, d, seed)
        close(combined(G), official(G, 0.8), 1e-15)


@pytest.mark.parametrize("r", [0.2, 0.5, 0.8, 1.0])
def test_every_update_shrinks_by_the_same_factor(r: float) -> None:
    # Check 1: by sqrt(sum_{j <= k} s_j^2) / sum(s). Where all are on one side of every direction that is kept, the mean
    # shows it: with `oriented` always, and along the leading direction of updates with positive inner products.
    for seed in range(4):
        G = gaussian(5, 40, seed)
        s = torch.linalg.svdvals(G).square()
        factor = s[: int(5 * r)].square().sum().sqrt() / s.sum()
        close(revised(G, r).norm(dim=1) / G.norm(dim=1), factor.expand(5))
        close(combined(G, r, "oriented").norm(), factor * G.norm(dim=1).mean())
        assert float(combined(G, r).norm()) < float(factor * G.norm(dim=1).mean()) < float(G.norm(dim=1).mean())
        H = G.abs()
        s = torch.linalg.svdvals(H).square()
        close(combined(H, 0.2).norm(), s[0] / s.sum() * H.norm(dim=1).mean())


@pytest.mark.parametrize("r", [0.2, 0.8, 1.0])
def test_identical_and_collinear_updates_are_averaged_plainly(r: float) -> None:
    g = gaussian(1, 30)  # check 2
    close(combined(g.expand(6, -1), r), g[0])
    a = torch.tensor([[2.0], [-0.5], [1.0], [-3.0], [0.25], [4.0]], dtype=torch.float64)
    close(combined(a * g, r), a.mean() * g[0])
    close(combined(-a * g, r), -a.mean() * g[0])


def test_orthogonal_updates_count_by_their_share_of_the_squared_lengths() -> None:
    # Check 3: q_i g_i / m for the longest four of five, q_i = |g_i|^2 / sum |g_l|^2 (over all five).
    G = torch.diag(torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0], dtype=torch.float64))
    close(combined(G), torch.tensor([25.0, 16.0, 9.0, 4.0, 0.0]).double() / 55 * G.diagonal() / 5)
    close(combined(G), torch.tensor([0.4545, 0.2327, 0.0982, 0.0291, 0.0], dtype=torch.float64), 5e-5)
    order = torch.tensor([3, 0, 4, 2, 1])
    turn = torch.linalg.qr(gaussian(5, 5)).Q
    close(combined(G[order] @ turn), combined(G) @ turn)


@pytest.mark.parametrize("sign", ["projection", "oriented"])
def test_the_step_follows_what_is_done_to_the_updates(sign: str) -> None:
    G = gaussian(6, 20)  # check 4
    found = combined(G, 0.6, sign)
    assert float(found.norm()) > 0.1
    for factor in (3.0, -1.0, -0.01):
        close(combined(factor * G, 0.6, sign), factor * found)
    close(combined(G[[4, 2, 0, 5, 1, 3]], 0.6, sign), found)
    turn = torch.linalg.qr(gaussian(20, 20, 1)).Q
    close(combined(G @ turn, 0.6, sign), found @ turn)


@pytest.mark.parametrize("sign", ["projection", "oriented"])
def test_the_sign_of_an_eigenvector_does_not_matter(sign: str, monkeypatch: pytest.MonkeyPatch) -> None:
    G = gaussian(6, 20)  # check 4
    found, (s, E) = combined(G, 0.8, sign), torch.linalg.eigh(G @ G.T / 6)
    for flips in ([-1.0] * 6, [1.0, -1.0] * 3, [1.0] * 5 + [-1.0]):
        monkeypatch.setattr(torch.linalg, "eigh", lambda _, by=flips: (s, E * torch.tensor(by, dtype=torch.float64)))
        close(combined(G, 0.8, sign), found, 1e-14)


def test_two_equally_long_updates_at_an_obtuse_angle_cancel() -> None:
    # Check 6: with one direction kept, that of their difference. At an acute angle it is that of their sum.
    for cos in (-0.2, -0.9):
        G = torch.tensor([[1.0, 0.0], [cos, math.sqrt(1 - cos**2)]], dtype=torch.float64)
        close(combined(G, 0.8), torch.zeros(2, dtype=torch.float64), 1e-15)
    G = torch.tensor([[1.0, 0.0], [0.2, math.sqrt(0.96)]], dtype=torch.float64)
    v = G.sum(0) / G.sum(0).norm()
    close(combined(G, 0.8), (1.2 / 2) * v)  # s_1 / sum(s) = (1 + cos) / 2


def test_oriented_updates_all_go_to_the_side_of_most() -> None:
    # Along the first axis two of three go up, along the second two of three down; all are of length sqrt(5).
    G = torch.tensor([[2.0, 1.0], [2.0, -1.0], [-2.0, -1.0]], dtype=torch.float64)
    s, V = torch.linalg.eigh(G.T @ G)
    up = [v * torch.sign((G @ v).sign().sum()) for v in V.T]
    expected = math.sqrt(5) * (s[0] * up[0] + s[1] * up[1]) / s.sum()
    close(combined(G, 1.0, "oriented"), expected)
    assert float((combined(G, 1.0) - expected).abs().max()) > 0.1
    # A tie is decided by the sum of the projections: here by the longer of two opposite updates.
    H = torch.tensor([[3.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    close(combined(H, 1.0, "oriented"), torch.tensor([2.0, 0.0], dtype=torch.float64))
    close(combined(H, 1.0), torch.tensor([1.0, 0.0], dtype=torch.float64))


@pytest.mark.parametrize(("cosine", "ratio"), [(0.3, 0.67), (0.6, 0.82), (0.9, 0.96)])
def test_the_step_is_shorter_the_less_updates_agree(cosine: float, ratio: float) -> None:
    # Check 10. The leading direction is the mean's, with the share (1 + 4 cos) / 5: the ratio is the root of that.
    for G in gaussians(cosine):
        found = float(combined(G).norm() / G.mean(0).norm())
        assert found == pytest.approx(ratio, abs=0.03)
        assert found == pytest.approx(math.sqrt((1 + 4 * cosine) / 5), abs=0.03)


def test_the_step_of_updates_without_a_common_direction() -> None:
    # Check 10 at cosine 0: k directions of equal shares 1 / m, along each of which m random signs of weight 1 / m add
    # up: in the root mean square sqrt(k) / m = 0.4 of the mean's length. Single draws scatter by 0.1.
    found = torch.stack([combined(G).norm() / G.mean(0).norm() for G in gaussians(0.0)])
    assert float(found.square().mean().sqrt()) == pytest.approx(0.4, abs=0.05)
    assert bool(((found > 0.1) & (found < 0.67)).all())


def gaussians(cosine: float) -> Iterator[Tensor]:
    """Five updates at a time, whose pairs have about this cosine."""
    for seed in range(30):
        own, common = gaussian(5, 2000, 2 * seed), gaussian(1, 2000, 2 * seed + 1)
        yield math.sqrt(cosine) * common + math.sqrt(1 - cosine) * own


@pytest.mark.parametrize(("r", "m", "k"), [(0.8, 5, 4), (0.8, 1, 1), (0.1, 5, 1), (1.0, 6, 6), (0.29, 100, 29)])
def test_the_share_of_directions_that_is_kept(r: float, m: int, k: int) -> None:
    # floor(r m), of the real product (in floating point 0.29 * 100 < 29), and at least one.
    G = torch.diag(torch.linspace(1.0, 2.0, m, dtype=torch.float64))
    assert (combined(G, r) > 1e-12).sum() == k


def test_a_single_update_is_taken_as_it_is() -> None:
    g = gaussian(1, 9)
    for r in (0.01, 0.8, 1.0):
        close(combined(g, r), g[0], 1e-15)


def test_directions_without_weight_and_updates_of_zero_do_no_harm() -> None:
    zero = torch.zeros(4, 6, dtype=torch.float64)
    assert torch.equal(combined(zero), zero[0])
    # A client without examples stands still: it counts in m, and in nothing else. Collinear ones are averaged plainly.
    g = gaussian(1, 6)
    close(combined(torch.cat([g, 0 * g, -3 * g]), 1.0), -2 / 3 * g[0])
    G = torch.cat([gaussian(3, 6), zero[:1]])
    close(combined(G, 0.5), revised(G, 0.5).mean(0))
    # Numbers that differ by many orders of magnitude, and far more updates than coordinates.
    for H in (1e-150 * gaussian(4, 6), 1e100 * gaussian(4, 6), gaussian(40, 2), gaussian(40, 1)):
        c = coefficients(H @ H.T / len(H), 1.0)
        assert bool(c.isfinite().all())
        close(c @ (H / H.abs().max()), revised(H / H.abs().max(), 1.0).mean(0))
        # Eigenvalues that are nothing but rounding leave no trace: c lies in the span of the directions with weight.
        U = torch.linalg.svd(H, full_matrices=False).U
        for sign in ("projection", "oriented"):
            c = coefficients(H @ H.T / len(H), 1.0, sign)
            close(U @ (U.T @ c), c, 1e-12)


# --- the server, tensor by tensor -------------------------------------------------------------------------

LAYOUT = Layout(
    {"a": torch.Size([4, 3]), "t": torch.Size([]), "b": torch.Size([2]), "u": torch.Size([1])}, torch.float64
)
INFO = Info(5, 3, LAYOUT, 0, 5, 0.1)


def serve(
    G: Tensor,
    seen: Tensor | None = None,
    weights: Tensor | None = None,
    places: Tensor | None = None,
    cuts: tuple[int, ...] = (),
    **options: Any,
) -> PrincipalState:
    """One server step from 0 on the rows of G, which may lie in several pieces and in another order."""
    rule, d = FedLD(**options), G.shape[1]
    state = rule.init(INFO, torch.zeros(d, dtype=torch.float64))
    state = state if seen is None else PrincipalState(state.w, seen)
    weights = torch.ones(len(G), dtype=torch.float64) if weights is None else weights
    pieces = [G] if not cuts else torch.split(G, [*cuts])
    rows = Rows(pieces, weights, LAYOUT, places)
    return rule.step(state, Reduced({"delta": rows}, LAYOUT, tuple(range(len(G))), 9, weights))


def test_every_tensor_has_its_own_directions_and_single_numbers_are_averaged() -> None:
    G, seen = gaussian(5, 16), torch.tensor([True, True, True, True])
    found = serve(G, seen).w
    for s in (slice(0, 12), slice(13, 15)):
        close(found[s], revised(G[:, s], 0.8).mean(0))
    for i in (12, 15):
        close(found[i], G[:, i].mean())
    assert float((found - G.mean(0))[:12].abs().max()) > 0.05


def test_the_whole_model_may_have_directions_in_common() -> None:
    G = gaussian(5, 16)
    found = serve(G, torch.tensor([True]), granularity="model").w
    close(found, revised(G, 0.8).mean(0))
    assert float((found - serve(G, torch.ones(4, dtype=torch.bool)).w).abs().max()) > 0.01
    first = serve(G, granularity="model")
    close(first.w, G.mean(0), 1e-15)
    assert first.seen.tolist() == [True]


def test_a_tensor_is_averaged_until_it_has_moved() -> None:
    first = gaussian(5, 16)
    first[:, 13:15] = torch.tensor([[1.0, -2.0], [-1.0, 2.0], [0.5, 0.5], [-0.5, -0.5], [0.0, 0.0]])  # the mean is 0
    first[:, 15] = 0.0
    one = serve(first)
    close(one.w, first.mean(0), 1e-15)
    assert one.seen.tolist() == [True, True, False, False]
    # The others have directions now; this one is averaged once more, and then no longer.
    second = gaussian(5, 16, 1)
    two = serve(second, one.seen)
    close(two.w[:12], revised(second[:, :12], 0.8).mean(0))
    close(two.w[13:15], second[:, 13:15].mean(0), 1e-15)
    assert two.seen.tolist() == [True, True, True, True]
    close(serve(second, two.seen).w[13:15], revised(second[:, 13:15], 0.8).mean(0))
    # What has been seen stays seen.
    assert serve(0 * second, two.seen).seen.tolist() == [True, True, True, True]
    assert serve(0 * second).seen.tolist() == [False, False, False, False]


def test_the_first_step_and_the_plain_rule_are_the_uniform_mean_to_the_bit() -> None:
    # Check 8: the bits of the rows' mean with equal weights; numbers of examples do not count.
    G, sizes = gaussian(5, 16), torch.tensor([1.0, 50.0, 3.0, 7.0, 2.0], dtype=torch.float64)
    expected = Rows([G], sizes, LAYOUT).mean(torch.ones(5))
    close(expected, G.mean(0), 1e-15)
    assert torch.equal(serve(G, weights=sizes).w, expected)
    every = torch.ones(4, dtype=torch.bool)
    assert torch.equal(serve(G, every, weights=sizes, aggregation="mean").w, expected)
    assert torch.equal(serve(G, every, weights=sizes).w, serve(G, every).w)
    assert not torch.allclose(serve(G, every).w, expected)


def test_inner_products_may_be_summed_over_parts_of_a_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    G, every = gaussian(5, 16, 3), torch.ones(4, dtype=torch.bool)
    whole, inner = serve(G, every).w, gram(Rows([G], torch.ones(5), LAYOUT), slice(2, 13))
    close(inner, torch.einsum("ik,jk->ij", G[:, 2:13], G[:, 2:13]), 1e-14)
    widths: list[int] = []
    getitem = Rows.__getitem__

    def spy(self: Rows, index: Any) -> Tensor:
        out = getitem(self, index)
        widths.append(out.shape[-1])
        return out

    monkeypatch.setattr(Rows, "__getitem__", spy)
    for columns, parts in ((1, [1] * 14), (5, [5, 5, 2, 2])):
        monkeypatch.setattr(fedld, "COLUMNS", columns)
        widths.clear()
        found = serve(G, every).w
        assert widths == parts  # of the tensors of 12 and of 2 numbers; single numbers need none
        torch.testing.assert_close(found, whole, rtol=1e-12, atol=0)


def test_rows_may_lie_in_pieces_and_in_another_order() -> None:
    G, every = gaussian(5, 16), torch.ones(4, dtype=torch.bool)
    order = torch.tensor([3, 0, 4, 1, 2])
    found = serve(G[order], every, places=order.argsort(), cuts=(2, 2, 1)).w
    assert torch.equal(found, serve(G, every).w)


def test_rows_are_combined_block_by_block() -> None:
    G, c = gaussian(5, 16), gaussian(5, 3, 1)
    rows = Rows([G[:2], G[2:]], torch.ones(5), LAYOUT)
    sizes = [12, 1, 3]
    expected = torch.cat([c[:, i] @ part for i, part in enumerate(torch.split(G, sizes, 1))])
    close(rows.combine(c, sizes), expected, 1e-14)
    close(rows.combine(c[:, 0]), c[:, 0] @ G, 1e-14)


# --- the regulariser --------------------------------------------------------------------------------------


class Logits:
    """A model whose outputs are given."""

    def __init__(self, z: Tensor) -> None:
        self.z, self.calls = z, 0

    @property
    def views(self) -> dict[str, Tensor]:
        return {}

    def blocks(self, x: Any) -> tuple[Tensor, ...]:
        return (self(x),)

    def __call__(self, x: Any) -> Tensor:
        self.calls += 1
        return self.z


@pytest.fixture(scope="module")
def local() -> Local:
    return local_of(build(experiment({})))


def objective(
    local: Local, z: Tensor, y: Tensor, keep: Tensor | None = None, weight: Tensor | None = None, **o: Any
) -> Tensor:
    """FedLD's objective of a minibatch with outputs z, ``[C, B, classes]``, and labels y, ``[C, B]``."""
    batch = Batch(x=z, y=y, index=torch.zeros(z.shape[:2], dtype=torch.int64), weight=weight)
    if keep is not None:
        batch.keep = keep
    return batch.objective(FedLD(**o).loss(Logits(z), batch, local))


def test_the_regulariser_of_two_classes_and_fifty_examples(local: Local) -> None:
    # Check 7: log 2 + 0.1 log(1 + 50 / 2) at zero logits.
    found = objective(local, torch.zeros(1, 50, 2), torch.zeros(1, 50, dtype=torch.int64), lam=0.1)
    assert float(found) == pytest.approx(1.01896, abs=1e-5)


@pytest.mark.parametrize(("B", "C"), [(50, 2), (7, 10), (1, 3)])
def test_the_regulariser_of_uniform_and_of_certain_predictions(B: int, C: int, local: Local) -> None:
    y = torch.arange(B).remainder(C)[None]  # check 7
    zero, certain = torch.zeros(1, B, C, dtype=torch.float64), 200.0 * F.one_hot(y, C).double()
    for lam in (0.5, 2.0):
        close(
            objective(local, zero, y, lam=lam)[0], torch.tensor(math.log(C) + lam * math.log(1 + B / C)).double(), 1e-6
        )
        close(objective(local, certain, y, lam=lam)[0], torch.tensor(lam * math.log(1 + B)).double(), 1e-6)
        each = objective(local, zero, y, lam=lam, reduction="sample")[0]
        assert float(each) == pytest.approx(math.log(C) + lam * math.log(1 + 1 / C), abs=1e-12)
        each = objective(local, certain, y, lam=lam, reduction="sample")[0]
        assert float(each) == pytest.approx(lam * math.log(2), abs=1e-12)
        squares = objective(local, certain, y, lam=lam, of="logits")[0]
        assert float(squares) == pytest.approx(lam * math.log(1 + B * 200.0**2), abs=1e-12)
        squares = objective(local, certain, y, lam=lam, of="logits", reduction="sample")[0]
        assert float(squares) == pytest.approx(lam * math.log(1 + 200.0**2), abs=1e-12)


@pytest.mark.parametrize("reduction", ["batch", "sample"])
@pytest.mark.parametrize("of", ["probabilities", "logits"])
def test_the_gradient_of_the_regulariser(of: str, reduction: str, local: Local) -> None:
    # Check 7, with respect to the logits: 2 P_ic (P_ic - sum_c' P_ic'^2) / (1 + |P|^2), whose rows sum to zero;
    # and of the squared logits 2 z / (1 + |z|^2).
    B, C, lam = 6, 4, 0.7
    y, z = torch.tensor([[0, 1, 2, 3, 0, 0]]), 2 * gaussian(B, C)
    at = z[None].clone().requires_grad_()
    (found,) = torch.autograd.grad(objective(local, at, y, lam=lam, of=of, reduction=reduction).sum(), at)
    P = z.softmax(1)
    size = (P if of == "probabilities" else z).square().sum(1, keepdim=True)
    top = 2 * P * (P - size) if of == "probabilities" else 2 * z
    assert of == "logits" or float(top.sum(1).abs().max()) < 1e-12
    reg = top / (1 + size.sum()) if reduction == "batch" else top / (1 + size) / B
    close(found[0], (P - F.one_hot(y[0], C)) / B + lam * reg)


@pytest.mark.parametrize("reduction", ["batch", "sample"])
def test_padded_examples_do_not_count_in_the_norm(reduction: str, local: Local) -> None:
    z, y = gaussian(15, 4).view(3, 5, 4), torch.arange(15).remainder(4).view(3, 5)
    keep = torch.arange(5) < torch.tensor([[5], [2], [1]])
    found = objective(local, z, y, keep, reduction=reduction)
    for i, n in enumerate((5, 2, 1)):
        close(found[i], objective(local, z[i : i + 1, :n], y[i : i + 1, :n], reduction=reduction)[0], 1e-14)
    assert float((found - objective(local, z, y, reduction=reduction)).abs()[1:].min()) > 1e-3


def test_weights_of_examples_count_in_the_loss_and_in_the_mean_over_examples(local: Local) -> None:
    z, y, weight = gaussian(5, 4)[None], torch.tensor([[0, 1, 2, 3, 0]]), torch.tensor([[2.0, 0.0, 1.0, 0.5, 3.0]])
    ce = F.cross_entropy(z[0], y[0], reduction="none")
    size = z[0].softmax(1).square().sum(1)
    found = objective(local, z, y, weight=weight.double(), lam=0.3)
    close(found[0], (weight[0] * ce).mean() + 0.3 * size.sum().log1p())
    found = objective(local, z, y, weight=weight.double(), lam=0.3, reduction="sample")
    close(found[0], (weight[0] * (ce + 0.3 * size.log1p())).mean())


def test_without_a_weight_the_objective_is_the_task(local: Local) -> None:
    z, y = gaussian(5, 4)[None], torch.tensor([[0, 1, 2, 3, 0]])
    assert torch.equal(objective(local, z, y, lam=0.0), local.task_loss(z, y).mean(1))


# --- whole runs, by hand ----------------------------------------------------------------------------------


def inputs(exp: Experiment, client: int) -> tuple[Tensor, Tensor]:
    """A client's examples as its network takes them."""
    shard = exp.program.shard(client)
    return exp.program.inputs(shard.x[shard.rows]), exp.program.targets(shard.y[shard.rows])


def by_hand(exp: Experiment, rounds: int, optimizer: str = "sgd", kept: bool = False, **values: Any) -> Tensor:
    """FedLD with plain modules and torch's optimizers, the server step in its direct form; ``[d]``."""
    o: dict[str, Any] = {
        "lam": 0.1,
        "r": 0.8,
        "of": "probabilities",
        "reduction": "batch",
        "factor": 1.0,
        "warmup": 0,
        **values,
    }
    client, program = exp.config["client"], exp.program
    w, streams, memory = program.network.initial.clone(), dict[int, Iterator[Any]](), dict[int, Any]()
    seen = dict.fromkeys(program.layout.names, False)
    for r in range(1, rounds + 1):
        rows, lr = [], client["lr"] * (min(1.0, client["epochs"] * (r - 1) / o["warmup"]) if o["warmup"] else 1.0)
        for c in exp.participation.sample(len(program.clients), random.numpy_generator(0, "participation", r, 0)):
            module, (x, y) = module_of(exp, w), inputs(exp, c)
            module.train(client["buffers"] != "frozen")
            if optimizer == "adam":
                step: Any = torch.optim.Adam(module.parameters(), lr)
            else:
                step = torch.optim.SGD(module.parameters(), lr, client["momentum"], 0, client["weight_decay"])
            if kept and c in memory:
                step.load_state_dict(memory[c])
            n, size = len(x), client["batch_size"]
            stream = streams.setdefault(c, batches(0, c, n, size))
            for _ in range(client["epochs"] * -(-n // size)):
                index = next(stream)
                z = module(x[index])
                P = z.softmax(1) if o["of"] == "probabilities" else z
                if o["reduction"] == "batch":
                    penalty = torch.log(1 + P.norm() ** 2)
                else:
                    penalty = torch.log(1 + P.norm(dim=1) ** 2).mean()
                loss = o["factor"] * F.cross_entropy(z, y[index]) + o["lam"] * penalty
                step.zero_grad()
                loss.backward()
                step.step()
            memory[c] = step.state_dict()
            rows.append(flat(module) - w)
        G, moved = torch.stack(rows), torch.zeros_like(w)
        for name, s in program.layout.blocks():
            plain = not seen[name] or G[:, s].shape[1] == 1
            moved[s] = G[:, s].mean(0) if plain else revised(G[:, s], o["r"]).mean(0)
            seen[name] |= bool(moved[s].any())
        w = w + moved
    return w


@dataclass(frozen=True)
class Few:
    """Seven unequal clients with examples of three classes, each with its own preference.

    Attributes:
        sizes: Examples of every client.
    """

    sizes: list[int]

    def load(self, seed: int) -> Dataset:
        owners = torch.arange(len(self.sizes)).repeat_interleave(torch.tensor(self.sizes))
        n = len(owners)
        g = torch.Generator().manual_seed(7)
        x, y = torch.randn(n, 5, generator=g), torch.randint(3, (n,), generator=g)
        y = torch.where(torch.rand(n, generator=g) < 0.5, owners % 3, y)
        split = Split(x + F.one_hot(y, 5), y)
        shards = tuple(Shard(split.x, split.y, (owners == i).nonzero()[:, 0]) for i in range(len(self.sizes)))
        return Dataset("few", split, split, class_names=("a", "b", "c"), clients=FixedClients(shards))


SIZES_OF_SEVEN = [9, 3, 14, 2, 6, 11, 5]
DATA = {"_target_": "tests.test_fedld.Few", "sizes": SIZES_OF_SEVEN, "augment": [], "validation": 0.0}
WITH_NOBODY = {"data": {**DATA, "sizes": [9, 0, 14, 2, 0, 11, 5]}}


def experiment(values: Mapping[str, Any], strategy: str = "fedld", *overrides: str) -> Config:
    """Seven unequal clients, half of them at a time, partial last batches, momentum; float64, one by one."""
    usual = {"data": DATA, "client.batch_size": 4, "precision": "float64", "client.batching": "off"}
    return configure((f"strategy={strategy}", *overrides), {**usual, **values})


def fedld_run(folder: Path, values: Mapping[str, Any], *overrides: str) -> Run:
    return drive(experiment(values, "fedld", *overrides), folder)


RUNS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"client.weight_decay": 5e-4, "client.epochs": 2}, {}),
    ({"participation": ALL, "strategy.lam": 0.5, "strategy.r": 0.5}, {"lam": 0.5, "r": 0.5}),
    ({"strategy.of": "logits"}, {"of": "logits"}),
    ({"strategy.reduction": "sample", "strategy.lam": 2.0}, {"reduction": "sample", "lam": 2.0}),
    ({"strategy.of": "logits", "strategy.reduction": "sample"}, {"of": "logits", "reduction": "sample"}),
    ({"client.keep_optimizer": True}, {"kept": True}),
    ({"participation": ALL, "client.batching": 3}, {}),
    ({"participation": ALL, **WITH_NOBODY}, {}),
    (
        {"participation": ALL, **WITH_NOBODY, "client.batching": 3, "strategy.reduction": "sample"},
        {"reduction": "sample"},
    ),
    ({"strategy.warmup": 4.0, "client.batching": 3}, {"warmup": 4}),
]


@pytest.mark.parametrize(("values", "hand"), RUNS)
def test_three_rounds_are_those_by_hand(values: dict[str, Any], hand: dict[str, Any], tmp_path: Path) -> None:
    run = fedld_run(tmp_path, values)
    close(run.w, by_hand(run.driver.exp, 3, **hand))


def test_three_rounds_with_adam_are_those_by_hand(tmp_path: Path) -> None:
    run = fedld_run(tmp_path, {"client.lr": 0.01, "client.momentum": 0.0}, "client.optimizer=adam")
    close(run.w, by_hand(run.driver.exp, 3, "adam"))


def test_in_float32_three_rounds_are_those_by_hand_up_to_rounding(tmp_path: Path) -> None:
    run = fedld_run(tmp_path, {"precision": "float32"})
    assert run.w.dtype == torch.float32
    exact = by_hand(build(experiment({})), 3)
    start = run.driver.exp.program.network.initial
    # Signs of small projections may turn with the rounding; most of the step is the same.
    assert float((run.w - exact).norm()) < 0.02 * float((exact - start).norm())


def test_a_recipe_has_its_own_loss_under_the_regulariser(tmp_path: Path) -> None:
    recipe = {"recipe.steeper": {"_target_": "tests.helpers.Steeper", "factor": 3.0}}
    run = fedld_run(tmp_path, recipe)
    close(run.w, by_hand(run.driver.exp, 3, factor=3.0))


def test_the_network_runs_once_per_batch() -> None:
    counts = []
    for lam in (0.0, 0.1):
        exp = build(experiment({"strategy.lam": lam}))
        calls: list[int] = []
        one = local_of(exp)
        exp.program.network.module.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        one.train(one.start)
        counts.append(len(calls))
    assert counts[0] == counts[1] > 0


def test_quadratic_clients_by_hand(tmp_path: Path) -> None:
    # Without the regulariser any data will do: 6 of 8 clients a round, of 3 coordinates, some without examples.
    a = (0.5 + gaussian(8, 3).abs()).tolist()
    c, sizes, lr = gaussian(8, 3, 1).tolist(), [1, 4, 0, 2, 1, 0, 3, 2], 0.2
    some = {"_target_": "fedsim.clients.participation.Fixed", "clients_per_round": 6}
    options = {"participation": some, "rounds": 4, "client__lr": lr, "client__steps": 3, "sizes": sizes}
    run = drive(
        configure(("strategy=fedld",), quadratics(a, c, [4.0, -3.0, 0.5], **options, strategy__lam=0)), tmp_path
    )
    x, q = torch.tensor([4.0, -3.0, 0.5], dtype=torch.float64), (1 - lr * torch.tensor(a, dtype=torch.float64)) ** 3
    for r in range(1, 5):
        who = run.driver.exp.participation.sample(8, random.numpy_generator(0, "participation", r, 0))
        G = (q - 1) * (x - torch.tensor(c, dtype=torch.float64)) * (torch.tensor(sizes)[:, None] > 0)
        x = x + (G[who].mean(0) if r == 1 else revised(G[who], 0.8).mean(0))
    close(run.w, x)


def test_round_one_without_the_regulariser_is_fedavg_and_round_two_is_not(tmp_path: Path) -> None:
    for rounds, same in ((1, True), (2, False)):  # check 8
        one = drive(experiment({"rounds": rounds, "strategy.lam": 0.0}), tmp_path)
        other = drive(experiment({"rounds": rounds, "strategy.weights": "uniform"}, "fedavg"), tmp_path)
        assert (one.params_sha256 == other.params_sha256) is same


# --- warm-up and batch norm -------------------------------------------------------------------------------


@pytest.fixture
def seen_steps() -> Iterator[list[Any]]:
    helpers.SEEN.clear()
    yield helpers.SEEN
    helpers.SEEN.clear()


@pytest.mark.parametrize(
    ("epochs", "factors"), [(1, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.0]), (2, [0.0, 0.4, 0.8, 1.0]), (5, [0.0, 1.0, 1.0])]
)
def test_the_warm_up_of_the_official_runs(
    epochs: int, factors: list[float], seen_steps: list[Any], tmp_path: Path
) -> None:
    values = {"rounds": len(factors), "client.epochs": epochs, "strategy.warmup": 5, "client.lr_decay": 0.5}
    watch = {"recipe.watch": {"_target_": "tests.helpers.Watch"}, "client.batch_size": None, "participation": ALL}
    fedld_run(tmp_path, {**values, **watch})
    rates, steps = [lr for _, _, lr, _ in seen_steps], 7 * epochs
    expected = [0.05 * 0.5**i * f for i, f in enumerate(factors) for _ in range(steps)]
    assert rates == pytest.approx(expected, abs=1e-15)


def test_round_one_of_a_warm_up_changes_nothing_and_directions_begin_in_round_three(tmp_path: Path) -> None:
    for rounds, moved, same in ((1, False, True), (2, True, True), (3, True, False)):
        runs = [
            fedld_run(tmp_path, {"rounds": rounds, "strategy.warmup": 5, "strategy.aggregation": rule})
            for rule in ("principal", "mean")
        ]
        start = runs[0].driver.exp.program.network.initial
        assert torch.equal(runs[0].w, start) is not moved
        assert runs[0].state.seen.tolist() == [moved] * 6
        assert torch.equal(runs[0].w, runs[1].w) is same


def test_frozen_batch_norms_keep_their_statistics_and_train_by_them(tmp_path: Path) -> None:
    values = {"model": {"_target_": "tests.helpers.Normed", "weights": None}}
    frozen = fedld_run(tmp_path, {**values, "client.buffers": "frozen"})
    first = frozen.driver.exp.program.network.initial_buffers
    assert frozen.driver.fed.buffers is not None
    assert torch.equal(frozen.driver.fed.buffers, first)
    close(frozen.w, by_hand(frozen.driver.exp, 3))
    assert not torch.equal(frozen.w[:5], frozen.driver.exp.program.network.initial[:5]), "the scale is trained"
    averaged = fedld_run(tmp_path, values).driver.fed.buffers
    assert averaged is not None
    assert not torch.equal(averaged, first)


# --- the loss decomposition -------------------------------------------------------------------------------


def losses(exp: Experiment, models: list[Tensor], clients: tuple[int, ...]) -> Tensor:
    """F_j of every model: mean cross-entropy on client j's examples, ``[models, clients]``, float64."""
    out = []
    for w in models:
        module = module_of(exp, w).eval()
        with torch.no_grad():
            pairs = [inputs(exp, j) for j in clients]
            out.append([float(F.cross_entropy(module(x).double(), y)) if len(x) else 0.0 for x, y in pairs])
    return torch.tensor(out, dtype=torch.float64)


@pytest.mark.parametrize("values", [{}, {"participation": ALL, **WITH_NOBODY}])
def test_the_decomposition_is_that_of_a_second_computation(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds: list[tuple[Tensor, Tensor, Tensor, tuple[int, ...]]] = []
    step = FedLD.step

    def spy(self: FedLD, state: PrincipalState, reduced: Reduced) -> PrincipalState:
        new = step(self, state, reduced)
        rounds.append((state.w, reduced["delta"].tensor(), new.w, reduced.clients))
        return new

    monkeypatch.setattr(FedLD, "step", spy)
    monkeypatch.setattr(fedld, "EXAMPLES", 4)  # clients have more
    run = fedld_run(tmp_path, {**values, "precision": "float32", "strategy.decompose_every": 1})
    exp, sizes = run.driver.exp, run.driver.exp.program.clients.sizes()
    for record, (w, deltas, new, who) in zip(run.records, rounds, strict=True):
        p = torch.tensor([float(sizes[c]) for c in who], dtype=torch.float64)
        p = p / p.sum()
        table = losses(exp, [(w + delta).float() for delta in deltas] + [new], who)  # F_j(w_i)
        F_own, F_all = table[:-1].diagonal(), table @ p
        expected = {
            "local": sum(p[i] * F_own[i] for i in range(len(who))),
            "shift": sum(p[i] * (F_all[i] - F_own[i]) for i in range(len(who))),
            "aggregation": sum(p[i] * (F_all[-1] - F_all[i]) for i in range(len(who))),
            "global": F_all[-1],
        }
        found = {name: record[f"decomposition/{name}"] for name in expected}
        for name, value in expected.items():
            # Check 9: each of three terms that add up to the fourth
            assert found[name] == pytest.approx(float(value), rel=1e-6, abs=2e-7), name
        assert abs(found["aggregation"]) > 1e-4
        assert found["shift"] > 1e-3


def test_the_decomposition_changes_nothing_else(tmp_path: Path) -> None:
    plain = fedld_run(tmp_path, {"rounds": 4})
    run = fedld_run(tmp_path, {"rounds": 4, "strategy.decompose_every": 2})
    assert run.state_sha256 == plain.state_sha256
    assert run.params_sha256 == plain.params_sha256
    names = ("bytes_down", "bytes_up", "steps", "examples")
    assert {k: run.driver.progress.totals[k] for k in names} == {k: plain.driver.progress.totals[k] for k in names}
    for record, other in zip(run.records, plain.records, strict=True):
        due = record["round"] % 2 == 0
        new = {"decomposition/local", "decomposition/shift", "decomposition/aggregation", "decomposition/global"}
        assert record.keys() - other.keys() == (new if due else set())
        assert record["clients"] == (2 if due else 1) * other["clients"]  # visits
        assert {k: record[k] for k in other if k != "clients"} == {k: v for k, v in other.items() if k != "clients"}


def test_a_cohort_without_examples_has_no_decomposition(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Federation, "sample", lambda self: [1])
    values = quadratics([[1.0, 2.0]] * 2, [[1.0, 2.0]] * 2, [0.5, 0.5], sizes=[2, 0], rounds=1)
    run = drive(configure(("strategy=fedld",), {**values, "strategy.lam": 0, "strategy.decompose_every": 1}), tmp_path)
    assert not [k for k in run.records[0] if k.startswith("decomposition")]
    assert run.w.tolist() == [0.5, 0.5]


# --- bytes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{"sign": "oriented"}, {"granularity": "model"}, {"aggregation": "mean"}, {"decompose_every": 1}, {"warmup": 5.0}],
)
def test_one_vector_goes_down_and_one_up(options: dict[str, Any], tmp_path: Path) -> None:
    run = fedld_run(tmp_path, {"rounds": 2, **{f"strategy.{k}": v for k, v in options.items()}})
    for record in run.records:
        assert record["bytes_down"] == record["bytes_up"] == 3 * 4 * run.driver.exp.program.layout.d


# --- mistakes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lam": -0.1}, r"strategy\.lam must be >= 0, got -0\.1"),
        ({"lam": math.nan}, r"strategy\.lam must be finite, got nan"),
        ({"r": 0.0}, r"strategy\.r must be in \(0, 1\], got 0\.0"),
        ({"r": -0.5}, r"strategy\.r must be in \(0, 1\], got -0\.5"),
        ({"r": 1.01}, r"strategy\.r must be in \(0, 1\], got 1\.01"),
        ({"r": "most"}, r"strategy\.r must be a number, got 'most'"),
        ({"of": "softmax"}, r"strategy\.of must be probabilities or logits, got 'softmax'"),
        ({"reduction": "mean"}, r"strategy\.reduction must be batch or sample, got 'mean'"),
        ({"aggregation": "median"}, r"strategy\.aggregation must be principal or mean, got 'median'"),
        ({"sign": "majority"}, r"strategy\.sign must be projection or oriented, got 'majority'"),
        ({"granularity": "layer"}, r"strategy\.granularity must be tensor or model, got 'layer'"),
        ({"warmup": -1.0}, r"strategy\.warmup must be >= 0, got -1\.0"),
        ({"decompose_every": -1}, r"strategy\.decompose_every must be >= 0, got -1"),
        ({"decompose_every": 0.5}, r"strategy\.decompose_every must be a whole number, got 0\.5"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}$"):
        FedLD(**options)


def test_the_regulariser_needs_classes(tmp_path: Path) -> None:
    values = quadratics([[1.0]], [[0.0]], [1.0], rounds=1)
    with pytest.raises(ConfigError, match=r"regulariser needs classes; set strategy\.lam=0"):
        drive(configure(("strategy=fedld",), values), tmp_path)


def test_a_model_with_several_outputs_is_refused(tmp_path: Path) -> None:
    model = {"_target_": "tests.helpers.Tupled", "weights": None}
    with pytest.raises((ConfigError, ClientError), match="the model returns a tuple, not a tensor"):
        fedld_run(tmp_path, {"model": model})
    knows_tuples = {"knows": {"_target_": "tests.test_fedld.KnowsTuples"}}
    with pytest.raises((ConfigError, ClientError), match="needs a model that returns a tensor, got a tuple"):
        fedld_run(tmp_path, {"model": model, "recipe": knows_tuples})


@dataclass(frozen=True)
class KnowsTuples(ClientHalf):
    """The loss of a network's first output."""

    def loss(self, model: Model, batch: Batch, local: Local) -> Tensor:
        return local.task_loss(model(batch.x)[0], batch.y)


class WithDropout(nn.Sequential):
    """A linear network with dropout."""

    def __init__(self, input_shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__(nn.Flatten(), nn.Dropout(0.5), nn.Linear(math.prod(input_shape), num_classes))


seen: list[tuple[float, float]] = []


@dataclass(frozen=True)
class Twice(ClientHalf):
    """A loss that asks the network three times: two masks of dropout, and another input."""

    def loss(self, model: Model, batch: Batch, local: Local) -> Tensor:
        a, b, other = model(batch.x), model(batch.x), model(batch.x + 1)
        seen.append((float((a - b).detach().abs().max()), float((other - a).detach().abs().max())))
        return local.task_loss(a, batch.y)


def test_a_recipe_s_loss_may_ask_the_network_several_times(tmp_path: Path) -> None:
    seen.clear()
    model = {"_target_": "tests.test_fedld.WithDropout", "weights": None}
    fedld_run(tmp_path, {"model": model, "recipe": {"twice": {"_target_": "tests.test_fedld.Twice"}}, "rounds": 1})
    assert seen and all(masks > 0.1 and inputs > 0.1 for masks, inputs in seen)

"""Reductions: the fixed tree, weighted means, rows, and what entries cost."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedsim.reduce import (
    Entry,
    Node,
    Reduced,
    Rows,
    Sized,
    TreeSum,
    concat,
    finish,
    lane,
    leaf,
    mean,
    nbytes,
    once,
    sized,
    stack,
    total,
    uniform,
)
from fedsim.vector import Layout

quick = settings(deadline=None, derandomize=True, max_examples=100)
# Magnitudes that differ wildly, so that another order of the sum is another result.
numbers = st.floats(-1e6, 1e6).flatmap(lambda x: st.sampled_from([x, x * 1e-9, x * 1e9]))


def summed(values: list[float]) -> Tensor:
    tree = TreeSum(len(values))
    for i, v in enumerate(values):
        tree.add((0, i), (torch.tensor([v], dtype=torch.float64),))
    return tree.result()[0]


# --- the tree ---------------------------------------------------------------------------------------------


@given(values=st.lists(numbers, min_size=1, max_size=70), data=st.data())
@quick
def test_the_bits_of_a_sum_do_not_depend_on_cuts_or_order(values: list[float], data: st.DataObject) -> None:
    n = len(values)
    cuts = sorted(data.draw(st.sets(st.integers(1, n - 1), max_size=8))) if n > 1 else []
    nodes: list[tuple[Node, tuple[Tensor, ...]]] = []
    for a, b in zip([0, *cuts], [*cuts, n], strict=True):
        piece = TreeSum(n)
        for i in data.draw(st.permutations(range(a, b))):
            piece.add((0, i), (torch.tensor([values[i]], dtype=torch.float64),))
        nodes += piece.nodes.items()
    whole = TreeSum(n)
    for i in data.draw(st.permutations(range(len(nodes)))):
        whole.add(*nodes[i])
    assert torch.equal(whole.result()[0], summed(values))


@given(values=st.lists(numbers, min_size=1, max_size=200))
@quick
def test_a_sum_is_right(values: list[float]) -> None:
    exact = math.fsum(values)
    assert abs(float(summed(values)) - exact) <= 1e-12 * math.fsum(map(abs, values))


@pytest.mark.parametrize("n", [*range(1, 18), 64, 65, 100])
def test_a_sum_over_one_to_n_is_exact(n: int) -> None:
    assert float(summed([float(i) for i in range(1, n + 1)])) == n * (n + 1) / 2


def test_the_tree_adds_neighbours_first() -> None:
    # ((a + b) + (c + d)) + e; left to right, 1 would be lost four times.
    big = 2.0**53
    assert float(summed([big, 0.0, 1.0, 1.0, 0.0])) == big + 2
    assert float(summed([big, 1.0, 1.0, 0.0, 0.0])) == big


def test_a_missing_leaf_is_noticed() -> None:
    tree = TreeSum(3)
    tree.add((0, 0), (torch.ones(1),))
    tree.add((0, 2), (torch.ones(1),))
    with pytest.raises(AssertionError, match="incomplete"):
        tree.result()


def test_a_leaf_that_comes_twice_is_noticed() -> None:
    tree = TreeSum(4)
    tree.add((0, 0), (torch.ones(1),))
    with pytest.raises(AssertionError, match="twice"):
        tree.add((0, 0), (torch.ones(1),))


def test_leaves_of_other_shapes_are_refused_even_if_they_would_broadcast() -> None:
    tree = TreeSum(2)
    tree.add((0, 0), (torch.ones(3), torch.ones(1)))
    with pytest.raises(ValueError, match=r"shapes \[\(3,\), \(1,\)\] and \[\(1,\), \(1,\)\]"):
        tree.add((0, 1), (torch.ones(1), torch.ones(1)))


# --- means and totals -------------------------------------------------------------------------------------


def reduce(entries: list[Entry], counts: list[float]) -> Tensor:
    tree = TreeSum(len(entries))
    for i, (e, n) in enumerate(zip(entries, counts, strict=True)):
        tree.add((0, i), leaf(e, torch.tensor([[n]], dtype=torch.float64)))
    return finish(entries[0].kind, tree.result())


@given(counts=st.lists(st.integers(1, 10_000), min_size=1, max_size=8), value=st.floats(-1e3, 1e3))
@quick
def test_mean_of_equal_entries_is_that_entry(counts: list[int], value: float) -> None:
    x = torch.full((1, 3), value, dtype=torch.float64)
    found = reduce([mean(x) for _ in counts], [float(n) for n in counts])
    torch.testing.assert_close(found, x[0], rtol=1e-15, atol=0)


def test_means_weigh_by_examples_or_as_told() -> None:
    rows = [torch.tensor([[1.0, -2.0]]), torch.tensor([[4.0, 6.0]])]
    by_examples = reduce([mean(x) for x in rows], [3.0, 1.0])
    assert by_examples.tolist() == [(3 * 1 + 4) / 4, (3 * -2 + 6) / 4]
    alike = reduce([mean(x, uniform(x)) for x in rows], [3.0, 1.0])
    assert alike.tolist() == [2.5, 2.0]
    told = reduce([mean(rows[0], torch.tensor([[0.5]])), mean(rows[1], torch.tensor([[2.0]]))], [3.0, 1.0])
    assert told.tolist() == [(0.5 * 1 + 2 * 4) / 2.5, (0.5 * -2 + 2 * 6) / 2.5]


def test_each_coordinate_may_have_its_own_weight() -> None:
    rows = [torch.tensor([[1.0, -2.0, 7.0]]), torch.tensor([[4.0, 6.0, -1.0]])]
    weights = [torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[3.0, 2.0, 0.0]])]
    found = reduce([mean(x, w) for x, w in zip(rows, weights, strict=True)], [9.0, 9.0])
    assert found.tolist() == [(1 + 3 * 4) / 4, 6.0, 0.0]  # nobody has seen the last: it does not move


def test_totals_and_means_keep_the_shape_of_an_entry() -> None:
    x = torch.arange(12.0).view(1, 3, 4)
    assert torch.equal(reduce([total(x), total(-3 * x)], [1.0, 1.0]), -2 * x[0].double())
    assert torch.equal(reduce([mean(x), mean(-3 * x)], [1.0, 1.0]), -x[0].double())


def test_several_lanes_in_a_leaf_are_reduced_together() -> None:
    x = torch.tensor([[1.0], [2.0], [-6.0]])
    counts = torch.tensor([[1.0], [2.0], [3.0]], dtype=torch.float64)
    top, weight = leaf(mean(x), counts)
    assert top.tolist() == [1 + 4 - 18]
    assert weight.tolist() == [6.0]


def test_reductions_are_made_in_float64() -> None:
    x = torch.tensor([[1.0]], dtype=torch.float32)
    tiny = torch.tensor([[2.0**-40]], dtype=torch.float32)
    assert float(reduce([total(x), total(tiny)], [1.0, 1.0])) == 1 + 2**-40


# A lone client's model must come back to the bit (a centralised method is a federation of one client). Its delta is
# rounded to float64 twice, so by at most 2^-52 of the larger of |w| and |w_k|: this is invisible in float32 as long as
# |w_k| > 2^-27 |w|.
float32s = st.floats(-1e4, 1e4, width=32)


@given(w=float32s, local=float32s, n=st.integers(1, 10**7))
@settings(deadline=None, derandomize=True, max_examples=300)
def test_a_lone_clients_model_comes_back_bit_for_bit(w: float, local: float, n: int) -> None:
    assume(local == 0 or abs(local) > 2**-26 * abs(w))
    start, end = torch.tensor([w]), torch.tensor([local])
    delta = reduce([mean((end.double() - start)[None])], [float(n)])
    assert torch.equal((start + delta).to(start), end)


def test_a_parameter_that_shrinks_by_more_than_2_to_the_27_in_one_visit_may_lose_its_last_bits() -> None:
    # The limit of the law above is real: 1.0 to 1e-12 and back is not exact. Only a sum without rounding would be.
    start, end = torch.tensor([1.0]), torch.tensor([1e-12])
    back = (start + (end.double() - start)).to(start)
    assert not torch.equal(back, end)
    torch.testing.assert_close(back, end, rtol=0, atol=2**-52)


# --- rows -------------------------------------------------------------------------------------------------

LAYOUT = Layout({"a": torch.Size([2, 2]), "b": torch.Size([3]), "c": torch.Size([1])})


def some_rows(m: int, pieces: int = 2) -> tuple[Rows, Tensor, Tensor]:
    g = torch.Generator().manual_seed(m)
    x = torch.randn(m, LAYOUT.d, generator=g, dtype=torch.float64)
    n = torch.randint(1, 50, (m,), generator=g).double()
    return Rows(list(x.tensor_split(pieces)), n, LAYOUT), x, n


@pytest.mark.parametrize("m", [1, 2, 3, 7, 33])
@pytest.mark.parametrize("kind", ["examples", "uniform"])
def test_mean_of_rows_has_the_bits_of_the_reduction(m: int, kind: str) -> None:
    rows, x, n = some_rows(m, pieces=min(m, 3))
    weight = None if kind == "examples" else torch.ones(m, dtype=torch.float64)
    entries = [mean(r[None], None if weight is None else uniform(r[None])) for r in x]
    assert torch.equal(rows.mean(weight), reduce(entries, n.tolist()))
    w = n if weight is None else weight
    torch.testing.assert_close(rows.mean(weight), (w[:, None] * x).sum(0) / w.sum(), rtol=1e-12, atol=1e-12)


def test_columns_are_the_tensors_of_the_model_in_order() -> None:
    rows, x, _ = some_rows(5)
    blocks = list(rows.columns())
    assert [name for name, _, _ in blocks] == ["a", "b", "c"]
    assert torch.equal(torch.cat([block for _, _, block in blocks], dim=1), x)
    assert all(torch.equal(block, x[:, s]) for _, s, block in blocks)


def test_rows_behave_like_a_matrix() -> None:
    rows, x, _ = some_rows(5)
    assert len(rows) == 5
    assert torch.equal(rows[3], x[3])
    assert torch.equal(rows[1:4], x[1:4])
    assert torch.equal(rows[:, 2:6], x[:, 2:6])
    assert torch.equal(rows[:, torch.tensor([0, 7])], x[:, [0, 7]])
    assert torch.equal(rows.tensor(), x)


def test_combine_is_the_weighted_sum_in_the_order_of_the_tree() -> None:
    rows, x, n = some_rows(7)
    c = torch.linspace(-1, 2, 7, dtype=torch.float64)
    torch.testing.assert_close(rows.combine(c), (c[:, None] * x).sum(0), rtol=1e-13, atol=1e-13)
    assert torch.equal(rows.combine(n) / n.sum(), rows.mean())


def test_reduced_names_what_came_up() -> None:
    values = Reduced({"delta": torch.ones(1), "n": torch.ones(1)}, LAYOUT, (3, 5), 9, torch.ones(2))
    assert [*values] == ["delta", "n"]
    assert len(values) == 2
    assert values.get("other") is None
    with pytest.raises(KeyError, match=r"no entry 'detla' came up; finish\(\) returned: delta, n"):
        values["detla"]


# --- bytes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        (torch.zeros(7), 28),
        (torch.zeros(7, dtype=torch.float64), 28),  # float64 is ours, not the client's
        (torch.zeros(3, 2, dtype=torch.int64), 48),
        (torch.zeros(5, dtype=torch.int8), 5),
        (torch.zeros(9, dtype=torch.bool), 2),
        ({"a": torch.zeros(2), "b": (torch.zeros(1), [torch.zeros(1)])}, 16),
        ((3, 0.5), 16),
        (None, 0),
        ("name", 0),
    ],
)
def test_bytes_of_a_tree(tree: Any, expected: int) -> None:
    assert nbytes(tree) == expected


def test_sized_and_once_are_kept_together_in_any_order() -> None:
    x = torch.zeros(3)
    assert sized(once(x), 7) == once(sized(x, 7)) == Sized(x, 7, once=True)
    assert sized(mean(x[None]), 5).nbytes == 5
    assert stack(x[None]).nbytes is None


def test_lane_is_what_one_client_gets() -> None:
    payload = {"w": torch.arange(6.0).view(3, 2), "pair": (torch.arange(3), [["x"], ["y"], ["z"]])}
    got = lane(payload, 1)
    assert got["w"].tolist() == [2.0, 3.0]
    assert got["pair"] == (torch.tensor(1), ["y"])


def test_concat_takes_any_sequence() -> None:
    assert concat(x for x in (torch.zeros(1), torch.zeros(2))).kind == "concat"  # type: ignore[arg-type]
    assert len(concat((torch.zeros(1), torch.zeros(2))).value) == 2


@pytest.mark.parametrize("kind", ["total", "mean"])
def test_what_a_client_sent_is_not_written_to(kind: str) -> None:
    mine = [torch.full((1, 3), float(i + 1), dtype=torch.float64) for i in range(5)]
    tree = TreeSum(5)
    for i, value in enumerate(mine):
        tree.add((0, i), leaf(Entry(kind, value), torch.ones(1, 1, dtype=torch.float64)))
    assert torch.equal(tree.result()[0], torch.full((3,), 15.0, dtype=torch.float64))
    assert [v.tolist() for v in mine] == [[[i + 1.0] * 3] for i in range(5)]

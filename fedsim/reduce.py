"""What a client sends up, and how a cohort's entries become one value.

An entry is a tensor with the client axis first and the name of its reduction. Means and totals
are summed in float64 over a fixed binary tree whose leaves are the cohort in client-id order:
`TreeSum` gives the same bits however the cohort was cut into pieces and in whatever order the
pieces come back. Rows (`stack`, `concat`) are kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fedsim.vector import Layout

ABSENT: tuple[Tensor, ...] = ()
"""The value of a leaf whose client failed."""
Node = tuple[int, int]  # level, index: covers the leaves [index << level, (index + 1) << level)


@dataclass(frozen=True)
class Entry:
    """What C clients send up under one name.

    Attributes:
        kind: ``mean``, ``total``, ``stack`` or ``concat``.
        value: ``[C, ...]``; for ``concat`` a list of C trees of tensors.
        weight: ``[C, 1]`` or ``[C, d]`` for ``mean``; None means the number of examples.
        nbytes: Bytes that one client is charged; None: 4 per number (as float32), other types
            as they are, and only the shared coordinates of a parameter vector.
    """

    kind: str
    value: Any
    weight: Tensor | None = None
    nbytes: int | None = None


def mean(x: Tensor, weight: Tensor | None = None) -> Entry:
    """The cohort's weighted mean.

    Args:
        x: ``[C, ...]``.
        weight: ``[C, 1]``, or of the shape of ``x``; default: each client's number of examples.
    """
    return Entry("mean", x, weight)


def total(x: Tensor) -> Entry:
    """The cohort's sum of ``x``, ``[C, ...]``."""
    return Entry("total", x)


def stack(x: Tensor) -> Entry:
    """The cohort's rows of ``x``, ``[C, ...]``, in client-id order."""
    return Entry("stack", x)


def concat(x: Sequence[Any]) -> Entry:
    """One tree of tensors per client, of any shape, in client-id order."""
    return Entry("concat", list(x))


def uniform(w: Tensor) -> Tensor:
    """Equal weights, ``[C, 1]``, for the clients of ``w``, ``[C, ...]``."""
    return torch.ones(len(w), 1, dtype=torch.float64, device=w.device)


@dataclass(frozen=True)
class Sized:
    """A payload that says its own size.

    Attributes:
        value: What is sent.
        nbytes: Bytes that one client is charged; None: counted.
        once: Charged only when the content is new to the client.
    """

    value: Any
    nbytes: int | None = None
    once: bool = False


def sized(x: Any, nbytes: int) -> Any:
    """An entry or a payload that is charged ``nbytes`` per client."""
    if isinstance(x, Entry | Sized):
        return replace(x, nbytes=int(nbytes))
    return Sized(x, nbytes=int(nbytes))


def once(x: Any) -> Sized:
    """A payload that is charged to a client only when its content is new to that client."""
    return replace(x, once=True) if isinstance(x, Sized) else Sized(x, once=True)


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """All tensors of a tree of dicts, lists and tuples, in order."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for v in tree.values():
            yield from tensors_in(v)
    elif isinstance(tree, list | tuple):
        for v in tree:
            yield from tensors_in(v)


def lane(tree: Any, i: int | slice) -> Any:
    """What client ``i`` of C gets of a payload: ``t[i]`` of every tensor ``[C, ...]``, item ``i`` of a list."""
    if isinstance(tree, Mapping):
        return {k: lane(v, i) for k, v in tree.items()}
    if isinstance(tree, tuple):
        return tuple(lane(v, i) for v in tree)
    return tree[i]


def nbytes(tree: Any) -> int:
    """Bytes of a tree as it would be sent: 4 per floating-point number, 8 per Python number,
    other tensors as they are, one bit per bool."""
    if isinstance(tree, Tensor):
        if tree.is_floating_point():
            return 4 * tree.numel()
        return -(-tree.numel() // 8) if tree.dtype == torch.bool else tree.numel() * tree.element_size()
    if isinstance(tree, Mapping):
        return sum(nbytes(v) for v in tree.values())
    if isinstance(tree, list | tuple):
        return sum(nbytes(v) for v in tree)
    return 8 if isinstance(tree, int | float) else 0


class TreeSum:
    """A sum over a fixed binary tree, fed in any order.

    Leaves are numbered ``0..num_leaves-1``. Two siblings are added as soon as both are there; where
    a sibling does not exist, or is `ABSENT`, the other one passes through. At most ``log2`` of them wait when
    leaves come in order.

    Args:
        num_leaves: Size of the tree, fixed by the cohort.

    Raises:
        ValueError: Two leaves are of different shapes.
    """

    def __init__(self, num_leaves: int) -> None:
        self.num_leaves = num_leaves
        self.nodes: dict[Node, tuple[Tensor, ...]] = {}
        self._top = max(num_leaves - 1, 0).bit_length()

    def add(self, node: Node, value: tuple[Tensor, ...]) -> None:
        """Adds the sum of the leaves under ``node``; its tensors now belong to the tree, which adds others to them."""
        level, index = node
        while level < self._top:
            last = (self.num_leaves - 1) >> level
            if index % 2 == 0 and index == last:
                pass  # no right sibling
            elif (sibling := self.nodes.pop((level, index ^ 1), None)) is not None:
                left, right = (sibling, value) if index % 2 else (value, sibling)
                if [a.shape for a in left] != [b.shape for b in right] and left != ABSENT != right:
                    raise ValueError(
                        f"clients sent shapes {[tuple(a.shape) for a in left]} and "
                        f"{[tuple(b.shape) for b in right]} (value and weight) under one name; they must be equal"
                    )
                absent = ABSENT in (left, right)
                value = left or right if absent else tuple(a.add_(b) for a, b in zip(left, right, strict=True))
            else:
                break
            level, index = level + 1, index >> 1
        assert (level, index) not in self.nodes, f"node {(level, index)} came twice"
        self.nodes[level, index] = value

    def result(self) -> tuple[Tensor, ...]:
        """The sum over all leaves."""
        assert list(self.nodes) == [(self._top, 0)], f"incomplete: have {sorted(self.nodes)} of {self.num_leaves}"
        return self.nodes[self._top, 0]


class Rows:
    """The rows of a ``stack`` entry, in client-id order; behaves like ``[m, ...]``.

    Args:
        pieces: Row blocks: tensors ``[k, ...]``, or what is indexed like one and gives copies.
        weights: Number of examples of each row's client, ``[m]``.
        layout: Of the parameter vector.
        places: Where each row is in the blocks, int64 ``[m]``; None: they are in order.
    """

    def __init__(self, pieces: Sequence[Any], weights: Tensor, layout: Layout, places: Tensor | None = None) -> None:
        self._pieces, self._weights, self._layout, self._places = pieces, weights, layout, places

    def __len__(self) -> int:
        return sum(len(p) for p in self._pieces)

    def __getitem__(self, index: Any) -> Tensor:
        """``rows[i]`` is a row, ``rows[:, s]`` a block of columns, ``rows[...]`` all of it."""
        if isinstance(index, tuple) and len(index) == 2 and index[0] == slice(None):
            return self._ordered([p[:, index[1]] for p in self._pieces])
        if isinstance(index, int):
            return self._row(range(len(self))[index])
        return self.tensor()[index]

    def _ordered(self, parts: list[Tensor]) -> Tensor:
        rows = parts[0] if len(parts) == 1 else torch.cat(parts)
        return rows if self._places is None else rows[self._places]

    def _row(self, index: int) -> Tensor:
        if self._places is not None:
            index = int(self._places[index])
        for piece in self._pieces:
            if index < len(piece):
                return piece[index]  # type: ignore[no-any-return]
            index -= len(piece)
        raise IndexError(index)

    def tensor(self) -> Tensor:
        """All rows in one place, ``[m, ...]``."""
        return self._ordered([p if isinstance(p, Tensor) else p[:] for p in self._pieces])

    def columns(self) -> Iterator[tuple[str, slice, Tensor]]:
        """Name, slice and rows ``[m, s]`` of one model tensor after the other."""
        for name, s in self._layout.blocks():
            yield name, s, self[:, s]

    def combine(self, c: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
        """``sum_l c_l row_l``, float64, summed in the order of the reduction tree.

        Args:
            c: ``[m]``; or ``[m, T]``, a coefficient for each of T blocks of columns.
            sizes: Columns of every block.
        """
        tree, repeats = TreeSum(len(self)), None if sizes is None else torch.tensor(sizes)
        for i in range(len(self)):
            coefficient = c[i].double() if repeats is None else c[i].double().repeat_interleave(repeats)
            tree.add((0, i), (coefficient * self._row(i).double(),))
        return tree.result()[0]

    def mean(self, weight: Tensor | None = None) -> Tensor:
        """Weighted mean of the rows; the bits of the reduction `mean` of the same rows.

        Args:
            weight: ``[m]``; default: the clients' numbers of examples.
        """
        weight = self._weights if weight is None else weight
        tree = TreeSum(len(self))
        for i in range(len(self)):
            row = self._row(i)
            tree.add((0, i), leaf(mean(row[None], weight[i].view(1, 1)), weight[i].view(1, 1)))
        return finish("mean", tree.result())


def leaf(entry: Entry, num_examples: Tensor) -> tuple[Tensor, ...]:
    """A leaf of the tree: what the clients of ``entry`` add to the sum, in float64.

    Args:
        entry: A ``mean`` or ``total``.
        num_examples: ``[C, 1]``.

    Returns:
        ``(weighted sum, sum of weights)`` for a mean, ``(sum,)`` for a total.
    """
    x = entry.value.double()
    if entry.kind == "total":
        return (x.sum(0),)
    weight = (num_examples if entry.weight is None else entry.weight).to(x)
    if weight.shape != x.shape:
        weight = weight.view(len(x), *[1] * (x.dim() - 1))
    if len(x) == 1:
        return weight[0] * x[0], weight[0].clone()
    return (weight * x).sum(0), weight.sum(0)


def finish(kind: str, value: tuple[Tensor, ...]) -> Tensor:
    """The reduced value from the root of the tree; where all weights are 0 a mean is 0."""
    if kind == "total":
        return value[0]
    top, weight = value
    return torch.where(weight == 0, 0.0, top / weight) if weight.numel() > 1 else top / weight


class Reduced(Mapping[str, Any]):
    """A cohort's entries, reduced.

    ``reduced["delta"]`` is a float64 tensor for ``mean`` and ``total``, `Rows` for ``stack``, a list for
    ``concat``.

    Attributes:
        layout: Of the parameter vector.
        clients: Who took part, in id order.
        num_clients: Size of the population.
        num_examples: Training examples of each of ``clients``, float64 ``[m]``.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        layout: Layout,
        clients: tuple[int, ...],
        num_clients: int,
        num_examples: Tensor,
    ) -> None:
        self._values = dict(values)
        self.layout, self.clients, self.num_clients, self.num_examples = layout, clients, num_clients, num_examples

    def __getitem__(self, name: str) -> Any:
        if name not in self._values:
            raise KeyError(f"no entry '{name}' came up; finish() returned: {', '.join(self._values)}")
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

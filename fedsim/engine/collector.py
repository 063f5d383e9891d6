"""From the outcomes of a cohort's pieces to its reduced entries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fedsim.engine.base import Outcome
from fedsim.errors import RunError
from fedsim.program import Program
from fedsim.reduce import ABSENT, Rows, TreeSum, finish


class Collector:
    """Finishes the reduction tree from pieces, in whatever order they come.

    Args:
        program: For the layout.
        num_leaves: Size of the tree.
        clients: Ids in the order of the leaves.
    """

    def __init__(self, program: Program, num_leaves: int, clients: Sequence[int]) -> None:
        self._layout, self._size = program.layout, num_leaves
        places = torch.tensor(clients, dtype=torch.int64).argsort()
        self._places = None if torch.equal(places, torch.arange(len(clients))) else places
        self._like = Outcome()
        self._trees: dict[str, TreeSum] = {}
        self._rows: dict[str, dict[int, Any]] = {}
        self._num_examples: dict[int, list[int]] = {}
        self._absent: list[int] = []

    def add(self, outcome: Outcome, first: int) -> None:
        """Takes a piece.

        Args:
            outcome: What its clients sent.
            first: Place of its first leaf.

        Raises:
            ClientError: Its clients sent other entries than those before.
        """
        self._like.match(outcome.kinds, outcome.shapes)
        for name, nodes in outcome.nodes.items():
            sums = self._trees.setdefault(name, TreeSum(self._size))
            for node, value in nodes.items():
                sums.add(node, value)
        for name, rows in outcome.rows.items():
            self._rows.setdefault(name, {})[first] = rows
        self._num_examples[first] = [d.num_examples for d in outcome.done if d.error is None]
        self._absent += [first + i for i, d in enumerate(outcome.done) if d.error is not None]

    def values(self) -> tuple[dict[str, Any], Tensor]:
        """The reduced entries by name, and the clients' numbers of examples, float64 ``[m]``."""
        num_examples = torch.tensor(self._in_order(self._num_examples), dtype=torch.float64)
        for sums in self._trees.values():
            for place in self._absent:
                sums.add((0, place), ABSENT)
        out: dict[str, Any] = {}
        for name, kind in self._like.kinds.items():
            if kind == "concat":
                out[name] = self._in_order(self._rows[name])
            elif kind == "stack":
                pieces = [_together(self._rows[name][first]) for first in sorted(self._rows[name])]
                out[name] = Rows(pieces, num_examples, self._layout, self._places)
            else:
                value = self._trees[name].result()
                if kind == "mean" and value[1].numel() == 1 and not bool(value[1]):
                    raise RunError(f"entry '{name}': all weights of the cohort are 0; does it hold any examples?")
                out[name] = finish(kind, value)
        return out, num_examples

    def _in_order(self, pieces: dict[int, list[Any]]) -> list[Any]:
        """What belongs to each client, in id order."""
        found = [item for first in sorted(pieces) for item in pieces[first]]
        return found if self._places is None else [found[i] for i in self._places.tolist()]


def _together(rows: Any) -> Any:
    """Rows of a piece, ``[k, ...]``: a list of tensors as one, anything else as it is."""
    return torch.stack(rows) if isinstance(rows, list) else rows

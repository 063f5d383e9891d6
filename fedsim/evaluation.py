"""Figures of merit from sums over scored examples, and how they spread over clients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from fedsim.data import IntArray
from fedsim.engine.base import Score
from fedsim.longtail import GROUPS

Numbers = Sequence[float] | IntArray | torch.Tensor


def merge(scores: Sequence[Score]) -> Score:
    """The score of all examples together."""
    confusion = torch.stack([s.confusion for s in scores]).sum(0)
    return Score(sum(s.count for s in scores), math.fsum(s.loss for s in scores), confusion)


def metrics(score: Score) -> dict[str, Any]:
    """Loss, and for classification accuracy, macro-F1 and tables over the classes.

    The F1 of a class is ``2 TP / (2 TP + FP + FN)``, macro-F1 its unweighted mean over the classes that occur among
    labels or predictions. The accuracy of a class (its recall) is NaN without examples, its precision without
    predictions, its F1 without either.

    Returns:
        ``loss``, ``accuracy``, ``macro_f1`` (floats); ``class_count`` (examples), ``class_accuracy``,
        ``class_precision`` and ``class_f1`` (lists of K numbers).
    """
    out: dict[str, Any] = {"loss": score.loss / score.count if score.count else math.nan}
    if not score.confusion.numel():
        return out
    hits, labels, predicted = score.confusion.diagonal().double(), score.confusion.sum(1), score.confusion.sum(0)
    out["accuracy"] = float(hits.sum() / score.count) if score.count else math.nan
    f1 = 2 * hits / (labels + predicted)
    out["macro_f1"] = float(f1.nanmean()) if score.count else math.nan
    out["class_count"] = labels.tolist()
    out["class_accuracy"] = (hits / labels).tolist()
    out["class_precision"] = (hits / predicted).tolist()
    out["class_f1"] = f1.tolist()
    return out


def group_accuracy(labels: Numbers, hits: Numbers, groups: IntArray) -> list[float]:
    """Accuracy on the examples of head, middle and tail classes; NaN where there are none.

    Args:
        labels: Scored examples of every class, ``[C]``.
        hits: Those of them that were predicted rightly, ``[C]``.
        groups: Group of every class, ``[C]`` (`fedsim.longtail.groups`).
    """
    seen, right = (np.bincount(groups, np.asarray(n), minlength=len(GROUPS)) for n in (labels, hits))
    return [float(r / n) if n else math.nan for r, n in zip(right, seen, strict=True)]


def by_group(rows: Sequence[Sequence[float]], prefix: str) -> dict[str, float]:
    """Means over clients of what `group_accuracy` says, by name.

    Args:
        rows: Of every client; NaN (no examples in the group) is left out, and so is the name where nobody has any.
        prefix: Of the names: ``<prefix>_head``, ``<prefix>_middle``, ``<prefix>_tail``.
    """
    known = {name: [row[i] for row in rows if not math.isnan(row[i])] for i, name in enumerate(GROUPS)}
    return {f"{prefix}_{name}": math.fsum(values) / len(values) for name, values in known.items() if values}


def spread(
    values: Sequence[float], counts: Sequence[int], prefix: str, higher_is_better: bool = True
) -> dict[str, float]:
    """Means, standard deviation (of the population) and mean of the worst tenth, by name.

    Args:
        values: One figure per client; NaN (a client without examples) is left out.
        counts: Held-out examples of every client, the weights of the weighted mean.
        prefix: Of the names: ``<prefix>_mean``, ``<prefix>_weighted``, ``<prefix>_std``, ``<prefix>_worst10``.
        higher_is_better: Of an accuracy; not of a loss.
    """
    known = [(x, n) for x, n in zip(values, counts, strict=True) if not math.isnan(x)]
    if not known:
        return {}
    v = np.sort(np.asarray([x for x, _ in known], dtype=np.float64))
    size = max(1, math.ceil(len(v) / 10))
    worst = v[:size] if higher_is_better else v[-size:]
    return {
        f"{prefix}_mean": float(v.mean()),
        f"{prefix}_weighted": math.fsum(x * n for x, n in known) / sum(n for _, n in known),
        f"{prefix}_std": float(v.std()),
        f"{prefix}_worst10": float(worst.mean()),
    }

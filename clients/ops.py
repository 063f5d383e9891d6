"""Small operations on rows of ``[C, d]``: every client's vector on its own.

Norms go over the last axis, row by row, with neither ``@`` nor ``dot``: their bits follow the
alignment of the memory and the number of rows, those of ``.norm(dim=-1)`` do not.
"""

from __future__ import annotations

from torch import Tensor


def clip(d: Tensor, max_norm: float) -> Tensor:
    """Each row scaled down to a norm of at most ``max_norm``; shorter rows keep their bits.

    The factor is ``min(1, max_norm / (norm + 1e-6))``, as in `torch.nn.utils.clip_grad_norm_`
    over the whole vector (torch takes the norm of the tensors' norms: the same number up to rounding).

    Args:
        d: One vector per client, ``[C, d]`` (or one alone, ``[d]``); not written to.
        max_norm: Largest norm left, > 0.

    Returns:
        A new tensor like ``d``. A row with a NaN becomes NaN throughout; in a row with an infinity
        the infinite entries become NaN and the others 0, so that neither passes unnoticed.

    Raises:
        ValueError: ``max_norm`` is not positive.
    """
    if not max_norm > 0:
        raise ValueError(f"clip needs max_norm > 0, got {max_norm!r}; to leave vectors as they are, do not clip")
    norm: Tensor = d.norm(dim=-1, keepdim=True)
    return d * (max_norm / (norm + 1e-6)).clamp(max=1.0)


def unit(v: Tensor, eps: float = 1e-7) -> Tensor:
    """Each row divided by its norm: ``v / (norm + eps)``; a row of zeros stays zero.

    Args:
        v: One vector per client, ``[C, d]`` (or one alone, ``[d]``); not written to.
        eps: Added to the norm; 1e-7 is what the FedSpeed code adds, 1e-12 SAM's.

    Returns:
        A new tensor like ``v``.
    """
    norm: Tensor = v.norm(dim=-1, keepdim=True)
    return v / (norm + eps)

"""A model's parameters as one flat vector, and back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from types import MappingProxyType

import torch
from torch import Tensor, nn

from fedsim.errors import ConfigError, did_you_mean
from fedsim.parts import norms_of


class Layout:
    """Names, shapes and offsets of named tensors inside one flat vector.

    Attributes:
        names: The tensors' names, in the order of the vector.
        shapes: Shape of every tensor, by name.
        slices: Place of every tensor in the vector, by name.
        d: Length of the vector.
        dtype: Type of the vector.
        norms: Names of the tensors that belong to norms (batch, group, layer, instance).
    """

    def __init__(
        self, shapes: Mapping[str, torch.Size], dtype: torch.dtype = torch.float32, norms: Iterable[str] = ()
    ) -> None:
        self.names = tuple(shapes)
        self.shapes: Mapping[str, torch.Size] = MappingProxyType(dict(shapes))
        slices, start = {}, 0
        for name, shape in shapes.items():
            slices[name] = slice(start, start + shape.numel())
            start += shape.numel()
        self.slices: Mapping[str, slice] = MappingProxyType(slices)
        self.d = start
        self.dtype = dtype
        self.norms = tuple(norms)

    @classmethod
    def of(cls, module: nn.Module) -> Layout:
        """The trainable parameters of ``module``.

        Raises:
            ConfigError: There are none, or they are of several types.
        """
        tensors = trainable(module)
        if not tensors:
            raise ConfigError(f"model {type(module).__name__} has no trainable parameters")
        return cls._of(tensors, type(module).__name__, norms_of(module))

    @classmethod
    def of_buffers(cls, module: nn.Module) -> Layout:
        """The floating-point buffers of ``module`` (batch-norm statistics); may be empty."""
        return cls._of(float_buffers(module), type(module).__name__)

    @classmethod
    def _of(cls, tensors: Mapping[str, Tensor], owner: str, norms: Iterable[str] = ()) -> Layout:
        dtypes = {t.dtype for t in tensors.values()}
        if len(dtypes) > 1:
            raise ConfigError(f"model {owner} mixes {sorted(map(str, dtypes))}; one floating-point type is needed")
        return cls({k: t.shape for k, t in tensors.items()}, dtypes.pop() if dtypes else torch.float32, norms)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layout) and dict(self.shapes) == dict(other.shapes) and self.dtype == other.dtype

    def __hash__(self) -> int:
        return hash((tuple(self.shapes.items()), self.dtype))

    def __reduce__(self) -> tuple[type[Layout], tuple[dict[str, torch.Size], torch.dtype, tuple[str, ...]]]:
        return Layout, (dict(self.shapes), self.dtype, self.norms)

    def views(self, w: Tensor) -> dict[str, Tensor]:
        """Named, shaped views into ``w``.

        Args:
            w: ``[..., d]``.

        Returns:
            Name to view, ``[..., *shape]``; writing to a view writes to ``w``.
        """
        lead = w.shape[:-1]
        return {name: w[..., self.slices[name]].view(*lead, *shape) for name, shape in self.shapes.items()}

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """One new vector, ``[d]``, from tensors by name.

        Raises:
            ConfigError: A tensor is missing, foreign, or of another shape.
        """
        for name in tensors:
            if name not in self.shapes:
                raise ConfigError(f"unknown tensor '{name}'{did_you_mean(name, self.names)}")
        for name, shape in self.shapes.items():
            if name not in tensors:
                raise ConfigError(f"tensor '{name}' of shape {tuple(shape)} is missing")
            if tensors[name].shape != shape:
                raise ConfigError(f"tensor '{name}' has shape {tuple(tensors[name].shape)}, needed {tuple(shape)}")
        out = torch.empty(self.d, dtype=self.dtype)
        for name, s in self.slices.items():
            out[s] = tensors[name].detach().flatten()
        return out

    def match(self, glob: str) -> tuple[str, ...]:
        """Names that fit a pattern: shell-style, and ``"head."`` is short for ``"head.*"``.

        Raises:
            ConfigError: Nothing fits.
        """
        pattern = glob + "*" if glob.endswith(".") else glob
        names = tuple(n for n in self.names if fnmatchcase(n, pattern))
        if not names:
            raise ConfigError(f"no parameter fits '{glob}'; the model has: {', '.join(self.names)}")
        return names

    def mask(self, glob: str) -> Tensor:
        """Which coordinates belong to the tensors that fit ``glob``; bool ``[d]``."""
        return self.mask_of(self.match(glob))

    def mask_of(self, names: Iterable[str]) -> Tensor:
        """Which coordinates belong to the tensors called ``names``; bool ``[d]``."""
        mask = torch.zeros(self.d, dtype=torch.bool)
        for name in names:
            mask[self.slices[name]] = True
        return mask

    def size(self, glob: str) -> int:
        """Number of coordinates of the tensors that fit ``glob``."""
        return sum(self.shapes[n].numel() for n in self.match(glob))

    def select(self, glob: str) -> slice | Tensor:
        """An index for the coordinates of the tensors that fit ``glob``: a slice where they are
        neighbours, else int64 ``[k]``."""
        names = self.match(glob)
        first, last = self.names.index(names[0]), self.names.index(names[-1])
        if last - first + 1 == len(names):
            return slice(self.slices[names[0]].start, self.slices[names[-1]].stop)
        return self.mask_of(names).nonzero()[:, 0]

    def blocks(self) -> Iterator[tuple[str, slice]]:
        """Name and slice of every tensor, in order."""
        yield from self.slices.items()


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable parameters by name; a shared one appears once."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def float_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Floating-point buffers by name."""
    return {name: b for name, b in module.named_buffers() if b.is_floating_point()}

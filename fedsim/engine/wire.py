"""Objects as they travel between processes: everything but numbers as a pickle, all tensors in one array.

One array per message, because each object beyond 100 kB costs milliseconds; and tensors come out in torch's own
memory, because bits follow alignment.
"""

from __future__ import annotations

import io
import math
import pickle
import warnings
from typing import Any

import cloudpickle
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ALIGN = 64

Message = tuple[bytes, NDArray[np.uint8]]
Place = tuple[bool, int, str, tuple[int, ...]]  # is it a tensor (or NumPy's), offset in the array, dtype, shape
SMALL = 1024  # bytes; smaller arrays of NumPy stay in the pickle


class _Pickler(cloudpickle.CloudPickler):  # type: ignore[misc]
    """Puts tensors aside."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.parts: list[Tensor] = []
        self.size = 0

    def persistent_id(self, obj: Any) -> Place | None:
        if type(obj) is Tensor:
            dense = obj.detach().cpu().contiguous()
            dtype = str(obj.dtype).removeprefix("torch.")
        elif type(obj) is np.ndarray and obj.nbytes >= SMALL and obj.dtype.kind in "biuf" and obj.dtype.isnative:
            dense, dtype = torch.from_numpy(np.ascontiguousarray(obj).view(np.uint8).copy()), obj.dtype.str
        else:
            return None
        flat = dense.as_strided((dense.numel(),), (1,)).view(torch.uint8)  # as bytes: NumPy knows no bfloat16
        place = type(obj) is Tensor, self.size, dtype, tuple(obj.shape)
        self.parts.append(flat)
        self.size += -(-len(flat) // ALIGN) * ALIGN
        return place


class _Unpickler(pickle.Unpickler):
    """Brings them back."""

    def __init__(self, file: io.BytesIO, array: NDArray[np.uint8], device: torch.device | None, copy: bool) -> None:
        super().__init__(file)
        self._array, self._device, self._copy = array, device, copy

    def persistent_load(self, place: Place) -> Any:
        is_tensor, offset, dtype, shape = place
        if not is_tensor:
            kind = np.dtype(dtype)
            part = self._array[offset : offset + math.prod(shape) * kind.itemsize].view(kind).reshape(shape)
            return part.copy() if self._copy else part
        tensor = torch.empty(0, dtype=getattr(torch, dtype))
        part = self._array[offset : offset + math.prod(shape) * tensor.element_size()]
        if self._copy or not len(part):
            tensor = tensor.new_empty(shape)
            tensor.view(-1).view(torch.uint8).numpy()[:] = part
        elif len(part):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # that it is read-only
                tensor = torch.from_numpy(part).view(tensor.dtype).view(shape)
        return tensor if self._device is None else tensor.to(self._device)


def pack(obj: Any) -> Message:
    """Any object that can be pickled, with tensors anywhere in it; they come back detached and contiguous."""
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(obj)
    array = np.empty(pickler.size, np.uint8)
    offset = 0
    for part in pickler.parts:
        array[offset : offset + len(part)] = part.numpy()
        offset += -(-len(part) // ALIGN) * ALIGN
    return file.getvalue(), array


def unpack(message: Message, device: torch.device | None = None, copy: bool = True) -> Any:
    """The object.

    Args:
        message: From `pack`.
        device: Where tensors shall be; default: in main memory.
        copy: Tensors in torch's own memory. False: in that of the message, which must not be written to; for data
            that are only gathered from.
    """
    data, array = message
    return _Unpickler(io.BytesIO(data), array, device, copy).load()

"""Trees of state: saved without pickle, rebuilt without imports, hashed.

A tree is built of dataclasses, dicts (keys strings or ints), lists, tuples, sets and frozensets (of strings and
ints), tensors, ints, floats, strings, bools and None. It becomes a JSON text (structure and scalars, exact) and a
dict of named tensors; how those reach a disk is the caller's business.

In the text, scalars and lists stand for themselves (floats by their shortest exact decimals); everything else
is an object with one telling key: ``{"tuple": [...]}``, ``{"set": [...]}``, ``{"frozenset": [...]}``,
``{"dict": [[key, value], ...]}``, ``{"dataclass": "module:qualname", "fields": [[name, value], ...]}``,
``{"tensor": name, "dtype": ..., "shape": ...}``, ``{"float": "nan" | "inf" | "-inf"}``, and ``{"int": "0x..."}``
for ints of more than 64 bits.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim.errors import FedsimError

Tree = Any
_Leaf = Callable[[Tensor, str], dict[str, Any]]

ROOT = "state"
"""What the tree itself is called in paths: ``state.heads[3].opt``."""


def flatten(tree: Tree) -> tuple[str, dict[str, Tensor]]:
    """A tree as text and tensors.

    Args:
        tree: See the module's docstring.

    Returns:
        JSON text (ASCII), and the tensors by their path in the tree. Tensors are the tree's own, not copies:
        they may be views, non-contiguous, on any device, or share memory with each other.

    Raises:
        TypeError: The tree holds something that cannot be saved; the message names its path.
    """
    tensors: dict[str, Tensor] = {}

    def leaf(tensor: Tensor, path: str) -> dict[str, Any]:
        tensors[path] = tensor
        return {"tensor": path, **_describe(tensor)}

    return json.dumps(_encode(tree, ROOT, leaf, ordered=True), allow_nan=False), tensors


def unflatten(text: str, tensors: Mapping[str, Tensor]) -> Tree:
    """The tree that `flatten` took apart.

    Dataclasses are rebuilt field by field, without calling their constructor, and only from modules that are
    already imported: nothing that a file names is ever imported or called.

    Args:
        text: As `flatten` returned it.
        tensors: Likewise; used as they are, on whatever device they are.

    Raises:
        FedsimError: The text is damaged, a tensor is missing, left over or of another dtype or shape, or a
            dataclass is not known here or has other fields.
    """
    try:
        node = json.loads(text)
    except ValueError as exc:
        raise FedsimError(
            f"a saved state cannot be read: its structure is not JSON ({exc}); the file is damaged"
        ) from exc
    used: set[str] = set()
    tree = _decode(node, ROOT, tensors, used)
    if left := sorted(tensors.keys() - used):
        raise FedsimError(
            f"a saved state holds {len(left)} tensors that its structure does not mention, such as {left[0]!r}; "
            "its two parts do not belong together"
        )
    return tree


def sha256(tree: Tree) -> str:
    """Hash of a tree: structure, scalars, and the dtype, shape and bytes of every tensor.

    Independent of the order in which dicts were filled, and of where tensors live (device, strides). Bits count:
    0.0 and -0.0 differ, 1, 1.0 and True differ, and so do a list and a tuple.

    Args:
        tree: As for `flatten`.

    Returns:
        64 hexadecimal digits.

    Raises:
        TypeError: As `flatten`.
    """

    def leaf(tensor: Tensor, path: str) -> dict[str, Any]:
        dense = tensor.resolve_conj().resolve_neg().cpu().contiguous()
        flat = dense.as_strided((dense.numel(),), (1,))  # one element may have any stride and count as contiguous
        digest = hashlib.sha256(flat.view(torch.uint8).numpy().data)  # as bytes: NumPy knows no bfloat16
        return {"tensor": digest.hexdigest(), **_describe(tensor)}

    node = _encode(tree, ROOT, leaf, ordered=False)
    return hashlib.sha256(json.dumps(node, allow_nan=False).encode()).hexdigest()


FOLD = 509  # width to which `fingerprint` folds a long tensor; a prime, so that layers and rows fold unevenly


def fingerprint(tree: Any) -> str:
    """A quick hash, to tell whether a computation gave the same bits: any one bit that differs shows.

    A long tensor is first folded: its numbers, as integers, are written into the rows of a table, and the columns are
    summed. So two numbers that changed places within a column do not show, and it is no protection against someone who
    wants two trees to have the same hash (docs/decisions/006-fingerprints.md).

    Args:
        tree: Dicts, lists, tuples, tensors, NumPy arrays, numbers, strings, None; of anything else the type counts.

    Returns:
        16 hexadecimal digits.
    """
    h = hashlib.sha256()
    feed(h, tree)
    return h.hexdigest()[:16]


def feed(h: hashlib._Hash, x: Any) -> None:
    """Adds a tree to the hash of a `fingerprint`; every part says what it is, and how long."""
    if isinstance(x, Tensor):
        dense = x.detach().resolve_conj().resolve_neg().contiguous()
        h.update(f"t{dense.dtype}{list(dense.shape)}".encode())
        for part in _folded(dense):
            h.update(part.cpu().numpy().data)
    elif isinstance(x, Mapping):
        h.update(b"m%d" % len(x))
        for key in sorted(x, key=str):
            h.update(f"{type(key).__name__}{key!r}".encode())
            feed(h, x[key])
    elif isinstance(x, list | tuple):
        h.update(f"{type(x).__name__}{len(x)}".encode())
        for item in x:
            feed(h, item)
    elif isinstance(x, bool | int | float | str | bytes) or x is None:
        h.update(f"{type(x).__name__}{x!r};".encode())
    elif isinstance(x, np.ndarray | np.generic):
        h.update(f"n{x.dtype}{x.shape}".encode())
        h.update(x.tobytes())
    else:
        h.update(f"{type(x).__module__}.{type(x).__qualname__};".encode())


def _folded(dense: Tensor) -> list[Tensor]:
    """A contiguous tensor as integers, ``[n]``; a long one as the sums of a table's columns, and a rest."""
    flat = dense.as_strided((dense.numel(),), (1,))
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    flat = flat.view(width.get(flat.element_size(), torch.uint8))
    if len(flat) < 4 * FOLD:
        return [flat]
    rows = len(flat) // FOLD
    table = flat[: rows * FOLD].view(rows, FOLD)
    return [table.sum(0, dtype=torch.int64), flat[rows * FOLD :]]


def _describe(tensor: Tensor) -> dict[str, Any]:
    return {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}


def _key_order(item: Any) -> tuple[bool, Any]:
    key = item[0] if isinstance(item, tuple) else item
    return isinstance(key, str), key


def _refuse(path: str, what: object, advice: str) -> TypeError:
    kind = type(what)
    return TypeError(f"{path} is of type {kind.__module__}.{kind.__qualname__}, which cannot be saved; {advice}")


def _encode(x: Tree, path: str, leaf: _Leaf, *, ordered: bool) -> Any:
    """The JSON node of ``x``; ``ordered`` keeps the order of dicts, otherwise entries are sorted by key."""
    # Exact types throughout: a subclass (numpy.float64, IntEnum, a named tuple) would come back as something else.
    kind = type(x)
    recurse = functools.partial(_encode, leaf=leaf, ordered=ordered)
    if x is None or kind is bool or kind is str:
        return x
    if kind is int:
        return x if -(2**63) <= x < 2**63 else {"int": hex(x)}  # Python refuses to print very long decimals
    if kind is float:
        return x if math.isfinite(x) else {"float": str(x)}
    if isinstance(x, Tensor):
        _check_tensor(x, path)
        return leaf(x, path)
    if kind is list:
        return [recurse(item, f"{path}[{i}]") for i, item in enumerate(x)]
    if kind is tuple:
        return {"tuple": [recurse(item, f"{path}[{i}]") for i, item in enumerate(x)]}
    if kind is set or kind is frozenset:
        for item in x:
            if type(item) not in (int, str):
                raise _refuse(f"an element of {path} ({item!r})", item, "elements of sets are ints or strings")
        return {kind.__name__: [recurse(item, path) for item in sorted(x, key=_key_order)]}
    if kind is dict:
        for key in x:
            if type(key) not in (int, str):
                raise _refuse(f"key {key!r} of {path}", key, "keys are ints or strings")
        items = x.items() if ordered else sorted(x.items(), key=_key_order)
        return {"dict": [[recurse(key, path), recurse(value, f"{path}[{json.dumps(key)}]")] for key, value in items]}
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        fields = _fields_of(x, path)
        items = fields.items() if ordered else sorted(fields.items())
        return {
            "dataclass": f"{kind.__module__}:{kind.__qualname__}",
            "fields": [[name, recurse(value, f"{path}.{name}")] for name, value in items],
        }
    raise _refuse(
        path,
        x,
        "use dataclasses, dicts, lists, tuples, sets, tensors, numbers, strings and None (for an array "
        "torch.from_numpy, for a NumPy number .item())",
    )


def _check_tensor(x: Tensor, path: str) -> None:
    if type(x) is not Tensor or x.requires_grad:
        raise _refuse(path, x, "it is a parameter or requires gradients, save x.detach()")
    if x.layout is not torch.strided or x.is_quantized or x.device.type == "meta":
        raise TypeError(
            f"{path} is a {x.layout}, {x.dtype} tensor on {x.device}, which cannot be saved; make it dense first"
        )


def _fields_of(x: Any, path: str) -> dict[str, Tree]:
    """Fields of a dataclass that can be found again by its name, and that has nothing besides its fields."""
    kind = type(x)
    if _find(f"{kind.__module__}:{kind.__qualname__}") is not kind:
        raise _refuse(path, x, "its class cannot be found by that name again: define it at the top level of a module")
    names = [field.name for field in dataclasses.fields(x)]
    if unset := [name for name in names if not hasattr(x, name)]:
        raise _refuse(path, x, f"its field {unset[0]!r} has no value")
    for name in vars(x) if hasattr(x, "__dict__") else ():
        if name not in names and not isinstance(getattr(kind, name, None), functools.cached_property):
            raise _refuse(path, x, f"its attribute {name!r} is no field and would be lost: declare it as one")
    return {name: getattr(x, name) for name in names}


def _find(name: str) -> Any:
    """What ``module:qualname`` means among the modules imported so far; None if nothing."""
    module, _, qualname = name.partition(":")
    found: Any = sys.modules.get(module)
    for part in qualname.split("."):
        found = vars(found).get(part) if hasattr(found, "__dict__") else None  # vars: no module-level __getattr__
    return found


def _decode(node: Any, path: str, tensors: Mapping[str, Tensor], used: set[str]) -> Tree:
    if node is None or isinstance(node, (bool, int, float, str)):
        return node
    if isinstance(node, list):
        return [_decode(item, f"{path}[{i}]", tensors, used) for i, item in enumerate(node)]
    try:
        match node:
            case {"tuple": list(items)}:
                return tuple(_decode(items, path, tensors, used))
            case {"set": list(items)}:
                return set(_decode(items, path, tensors, used))
            case {"frozenset": list(items)}:
                return frozenset(_decode(items, path, tensors, used))
            case {"dict": list(items)}:
                return {
                    _decode(key, path, tensors, used): _decode(value, f"{path}[{json.dumps(key)}]", tensors, used)
                    for key, value in items
                }
            case {"int": str(digits)}:
                return int(digits, 16)
            case {"float": str(digits)}:
                return float(digits)
            case {"tensor": str(name), "dtype": str(dtype), "shape": list(shape)}:
                used.add(name)
                return _tensor(tensors, name, {"dtype": dtype, "shape": shape}, path)
            case {"dataclass": str(name), "fields": list(items)}:
                values = {field: _decode(value, f"{path}.{field}", tensors, used) for field, value in items}
                return _rebuild(name, values, path)
    except (ValueError, TypeError) as exc:
        raise FedsimError(f"a saved state cannot be read: {path} is damaged ({exc})") from exc
    raise FedsimError(f"a saved state cannot be read: {path} is of a kind this version does not know, {str(node)[:80]}")


def _tensor(tensors: Mapping[str, Tensor], name: str, expected: dict[str, Any], path: str) -> Tensor:
    tensor = tensors.get(name)
    if tensor is None:
        raise FedsimError(f"a saved state cannot be read: the tensor of {path} is missing ({name!r})")
    if _describe(tensor) != expected:
        raise FedsimError(
            f"a saved state cannot be read: {path} should be {expected}, but its tensor is {_describe(tensor)}"
        )
    return tensor


def _rebuild(name: str, values: dict[str, Tree], path: str) -> Any:
    kind = _find(name)
    if kind is None:
        raise FedsimError(
            f"a saved state needs {name} for {path}, which is not among the modules imported so far; a file never "
            "causes an import: load the run with the strategy (and code) it was made with"
        )
    if not (
        isinstance(kind, type) and dataclasses.is_dataclass(kind) and f"{kind.__module__}:{kind.__qualname__}" == name
    ):
        raise FedsimError(
            f"a saved state names {name} for {path}, which is no dataclass; the file is damaged, or from other code"
        )
    names = {field.name for field in dataclasses.fields(kind)}
    if names != values.keys():
        missing, extra = sorted(names - values.keys()), sorted(values.keys() - names)
        raise FedsimError(
            f"a saved state does not fit {name} at {path}: missing fields {missing or 'none'}, unknown fields "
            f"{extra or 'none'}; it was saved by another version of the code"
        )
    rebuilt = object.__new__(kind)  # no constructor: exactly what was saved, and nothing of a file's choosing runs
    for field, value in values.items():
        object.__setattr__(rebuilt, field, value)
    return rebuilt

"""Trees of state come back as they were, hash by content, and never cause an import."""

import dataclasses
import enum
import functools
import json
import math
import sys
from collections import OrderedDict, namedtuple
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.errors import FedsimError
from fedsim.tree import flatten, sha256, unflatten


@dataclass(frozen=True)
class Frozen:
    w: Any
    kind: ClassVar[str] = "frozen"


@dataclass
class Mutable:
    heads: Any = field(default_factory=list)
    round_num: Any = 0

    @dataclass(frozen=True, slots=True)
    class Inner:
        x: Any


@dataclass(frozen=True)
class Derived:
    a: int
    b: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "b", 2 * self.a)

    @functools.cached_property
    def c(self) -> int:
        return self.b + 1


DTYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.complex64,
]  # fmt: skip


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    x = torch.randn(shape, generator=rng, dtype=torch.float64).mul(50)
    if dtype.is_floating_point and x.numel():
        x.view(-1)[0] = draw(st.sampled_from([math.nan, math.inf, -0.0, 1.0]))
    x = x.abs().to(dtype) if dtype is torch.uint8 else x.to(dtype)
    return x.transpose(0, -1) if x.dim() > 1 and draw(st.booleans()) else x


texts = st.text(st.characters(), max_size=5)  # lone surrogates, quotes and brackets too
keys = texts | st.integers()
scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts | st.integers(-(2**20_000), 2**20_000)
trees = st.recursive(
    scalars | tensors() | st.sets(keys, max_size=4) | st.frozensets(keys, max_size=4),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(keys, inner, max_size=3),
        inner.map(Frozen),
        st.tuples(inner, inner).map(lambda pair: Mutable(*pair)),
        inner.map(Mutable.Inner),
    ),
    max_leaves=12,
)


def same(a: Any, b: Any) -> bool:
    """Equal in type, order and bits (NaN equals NaN, 0.0 is not -0.0)."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        equal_bits = torch.equal(a.flatten().clone().view(torch.uint8), b.flatten().clone().view(torch.uint8))
        return bool(a.dtype == b.dtype and a.shape == b.shape and equal_bits)
    if isinstance(a, float):
        return a.hex() == str(b.hex())
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return same(list(a.items()), list(b.items()))
    if dataclasses.is_dataclass(a) and not isinstance(a, type):
        return all(same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    return bool(a == b)


def shuffled(tree: Any) -> Any:
    """The same tree with every dict filled in the opposite order, and tensors laid out anew."""
    if type(tree) is dict:
        return {key: shuffled(value) for key, value in reversed(tree.items())}
    if type(tree) in (list, tuple):
        return type(tree)(shuffled(item) for item in tree)
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        return dataclasses.replace(tree, **{f.name: shuffled(getattr(tree, f.name)) for f in dataclasses.fields(tree)})
    return tree.clone(memory_format=torch.contiguous_format) if isinstance(tree, torch.Tensor) else tree


@given(tree=trees)
@settings(deadline=None, derandomize=True, max_examples=200)
def test_a_tree_comes_back_as_it_was(tree: Any) -> None:
    text, leaves = flatten(tree)
    assert text.isascii()
    rebuilt = unflatten(text, leaves)
    assert same(rebuilt, tree)
    assert flatten(rebuilt)[0] == text
    assert sha256(rebuilt) == sha256(tree)


@given(tree=trees)
@settings(deadline=None, derandomize=True, max_examples=100)
def test_the_hash_knows_neither_dict_order_nor_memory_layout(tree: Any) -> None:
    assert sha256(shuffled(tree)) == sha256(tree)


def test_different_trees_have_different_hashes() -> None:
    zero = torch.zeros(2, 3)
    different: list[Any] = [
        0, 0.0, -0.0, False, None, "", "0", [], (), {}, set(), frozenset(), [0], (0,), {0: 0}, {"0": 0}, {0}, {"0"},
        math.nan, math.inf, -math.inf, 2**64, str(2**64), [[0], 0], [0, [0]], [1, 2], [2, 1],
        zero, zero.T, zero.double(), -zero, zero.reshape(6), zero.bool(), zero.to(torch.uint8), zero.bfloat16(),
        zero.half(), torch.tensor(0.0), torch.zeros(1), torch.zeros(0, 3), torch.zeros(3, 0), torch.tensor(0),
        Frozen(0), Mutable(0), Mutable.Inner(0), {"w": 0}, {"a": zero, "b": zero + 1}, {"a": zero + 1, "b": zero},
    ]  # fmt: skip
    assert len({sha256(tree) for tree in different}) == len(different)


def test_the_hash_of_a_tensor_is_that_of_its_bytes() -> None:
    base = torch.arange(12.0).reshape(3, 4)
    assert sha256(base.T) == sha256(base.T.contiguous())
    assert sha256(base[:, 1]) == sha256(torch.tensor([1.0, 5.0, 9.0]))
    assert sha256(torch.ones(1).expand(4)) == sha256(torch.ones(4))
    imaginary = torch.tensor([1 + 2j]).conj().imag  # a view with its sign pending
    assert sha256(imaginary) == sha256(torch.tensor([-2.0]))


def test_names_of_tensors_are_their_paths() -> None:
    x = torch.ones(1)
    tree = Mutable(heads=[None, {"a b": (x,), 3: x, "3": x}], round_num=Frozen(x))
    _, leaves = flatten(tree)
    assert list(leaves) == ['state.heads[1]["a b"][0]', "state.heads[1][3]", 'state.heads[1]["3"]', "state.round_num.w"]
    assert all(leaf is x for leaf in leaves.values())


def test_dict_order_survives() -> None:
    assert list(unflatten(*flatten({"b": 1, "a": 2, 0: 3}))) == ["b", "a", 0]


def test_fields_are_restored_without_running_the_constructor() -> None:
    tree = Derived(2)
    assert tree.c == 5  # a cached property is no state: it may be lost
    object.__setattr__(tree, "b", 7)
    rebuilt = unflatten(*flatten(tree))
    assert (rebuilt.a, rebuilt.b, rebuilt.c) == (2, 7, 8)


class Level(enum.IntEnum):
    LOW = 1


Pair = namedtuple("Pair", "a b")


def local_dataclass() -> Any:
    @dataclass
    class Local:
        x: int = 0

    return Local()


def with_attribute() -> Any:
    tree = Mutable()
    tree.cache = 1  # type: ignore[attr-defined]
    return tree


def unset_field() -> Any:
    return object.__new__(Derived)


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (np.float64(1.0), r"state\.heads\[3\]\.x is of type numpy\.float64, .* NumPy number \.item\(\)"),
        (np.zeros(2), r"state\.heads\[3\]\.x is of type numpy\.ndarray, .* torch\.from_numpy"),
        (object(), r"state\.heads\[3\]\.x is of type builtins\.object"),
        (1j, r"builtins\.complex"),
        (b"bytes", r"builtins\.bytes"),
        (Level.LOW, r"test_tree\.Level"),
        (Pair(1, 2), r"test_tree\.Pair"),
        (OrderedDict(a=1), r"collections\.OrderedDict"),
        (torch.Size([1]), r"torch\.Size"),
        (Frozen, r"builtins\.type"),
        (torch.nn.Parameter(torch.ones(1)), r"save x\.detach\(\)"),
        (torch.ones(1, requires_grad=True), r"save x\.detach\(\)"),
        (torch.eye(2).to_sparse(), r"state\.heads\[3\]\.x is a torch\.sparse_coo"),
        (torch.ones(1, device="meta"), r"on meta, which cannot be saved"),
        ({1.5: 0}, r"key 1\.5 of state\.heads\[3\]\.x is of type builtins\.float"),
        ({True: 0}, r"key True of state\.heads\[3\]\.x"),
        ({(1, 2)}, r"an element of state\.heads\[3\]\.x \(\(1, 2\)\)"),
        (local_dataclass(), r"at the top level of a module"),
        (with_attribute(), r"its attribute 'cache' is no field and would be lost"),
        (unset_field(), r"its field 'a' has no value"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_what_cannot_be_saved_is_refused_by_its_path(leaf: Any, message: str) -> None:
    tree = Mutable(heads=[0, 1, 2, Mutable.Inner(leaf)])
    with pytest.raises(TypeError, match=message):
        flatten(tree)
    with pytest.raises(TypeError, match=message):
        sha256(tree)


def test_a_file_never_causes_an_import() -> None:
    assert "antigravity" not in sys.modules
    text = json.dumps({"dataclass": "antigravity:State", "fields": []})
    with pytest.raises(FedsimError, match=r"needs antigravity:State for state, .* a file never causes an import"):
        unflatten(text, {})
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize(
    "name",
    ["os:system", "builtins:dict", "fedsim.tree:flatten", "fedsim.tree:dataclasses.Field", f"{__name__}:json.dumps"],
)
def test_only_dataclasses_under_their_own_name_are_built(name: str) -> None:
    with pytest.raises(FedsimError, match=r"which is no dataclass"):
        unflatten(json.dumps({"dataclass": name, "fields": []}), {})


@pytest.mark.parametrize("name", ["", ":", "os", f"{__name__}:Missing", f"{__name__}:Frozen.w.x", "os:path:join"])
def test_names_that_mean_nothing_are_refused(name: str) -> None:
    with pytest.raises(FedsimError, match=r"not among the modules imported"):
        unflatten(json.dumps({"dataclass": name, "fields": []}), {})


def test_fields_of_another_version_are_named() -> None:
    text = flatten(Frozen(1))[0].replace('"w"', '"weights"')
    with pytest.raises(FedsimError, match=r"Frozen at state: missing fields \['w'\], unknown fields \['weights'\]"):
        unflatten(text, {})


def test_parts_that_do_not_belong_together_are_refused() -> None:
    text, leaves = flatten({"w": torch.zeros(2)})
    name = 'state["w"]'
    with pytest.raises(FedsimError, match=r"the tensor of state\[\"w\"\] is missing"):
        unflatten(text, {})
    with pytest.raises(FedsimError, match=r"1 tensors that its structure does not mention, such as 'other'"):
        unflatten(text, leaves | {"other": torch.zeros(1)})
    with pytest.raises(FedsimError, match=r"should be .*float32.* but its tensor is .*float64"):
        unflatten(text, {name: torch.zeros(2, dtype=torch.float64)})
    with pytest.raises(FedsimError, match=r"should be .*\[2\].* but its tensor is .*\[3\]"):
        unflatten(text, {name: torch.zeros(3)})


@pytest.mark.parametrize(
    "text",
    ["", "{", '{"tuple": 1}', '{"what": []}', "{}", '{"dict": [1]}', '{"dict": [[[], 1]]}', '{"float": "x"}',
     '{"int": ""}', '{"set": [[]]}', '{"dict": [["a"]]}', '{"dataclass": "a:b", "fields": [["x"]]}',
     '[{"tensor": "w"}]'],
)  # fmt: skip
def test_damaged_text_is_one_clear_error(text: str) -> None:
    with pytest.raises(FedsimError, match="a saved state cannot be read"):
        unflatten(text, {})

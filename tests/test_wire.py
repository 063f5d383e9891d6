"""What travels between processes arrives as it was."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim import tree
from fedsim.engine.base import Task
from fedsim.engine.wire import pack, unpack
from tests.helpers import Explorer, Narrow

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool]


@given(
    shapes=st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3)), max_size=6),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, derandomize=True, max_examples=100)
def test_trees_arrive_bit_for_bit(shapes: list[tuple[torch.dtype, list[int]]], seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    tensors = [torch.randint(0, 2, s, generator=g).to(dtype) for dtype, s in shapes]
    sent: dict[str, Any] = {"list": tensors, "tuple": (1, 2.5, None, "x", b"y"), "nested": {"a": {3: tensors[:2]}}}
    got = unpack(pack(sent))
    assert tree.fingerprint({**got, "tuple": got["tuple"][:4]}) == tree.fingerprint(
        {**sent, "tuple": sent["tuple"][:4]}
    )


def test_tensors_arrive_in_torchs_own_memory_and_apart_from_each_other() -> None:
    base = torch.arange(12.0)
    sent = [base[1:4], base.view(3, 4).t(), torch.tensor(3.0), base[::2]]
    message = pack(sent)
    got = unpack(message)
    for a, b in zip(sent, got, strict=True):
        assert torch.equal(a, b) and b.is_contiguous() and b.data_ptr() % 64 == 0 and b.storage_offset() == 0
    got[0].zero_()
    assert torch.equal(unpack(message)[0], base[1:4])  # the message is not written to


def test_views_of_a_large_tensor_cost_their_own_size() -> None:
    message = pack(torch.zeros(1_000_000)[:10])
    assert len(message[1]) < 1000 and len(message[0]) < 1000


def test_a_message_may_be_read_only_as_ray_hands_it_out() -> None:
    data, array = pack(torch.ones(3))
    array.setflags(write=False)
    assert torch.equal(unpack((data, array)), torch.ones(3))


def test_gradients_and_parameters_stay_at_home() -> None:
    got = unpack(pack({"w": torch.ones(2, requires_grad=True)}))["w"]
    assert not got.requires_grad


def test_tasks_travel_with_their_halves_and_variants() -> None:
    task = Task((1, 2), (3, 3), {"w": torch.ones(4)}, 7, half=Explorer(), model=Narrow(5), memory=({}, {}))
    got = unpack(pack(task))
    assert got.half == task.half and got.model == task.model and hash(got.model) == hash(task.model)
    assert (got.clients, got.visits, got.round_num) == (task.clients, task.visits, task.round_num)


def test_what_cannot_be_pickled_says_so() -> None:
    with pytest.raises(Exception, match="generator"):
        pack({"g": (i for i in range(3))})


@pytest.mark.parametrize("copy", [True, False])
def test_arrays_travel_too(copy: bool) -> None:
    sent: dict[str, Any] = {
        "a": np.arange(5),
        "b": np.arange(6000, dtype=np.int32).reshape(60, 100)[::2],
        "c": np.array(["x", "yy"]),
    }
    message = pack(sent)
    got = unpack(message, copy=copy)
    for name, value in sent.items():
        assert got[name].dtype == value.dtype and (got[name] == value).all()
    assert len(message[0]) < 1000


def test_data_that_are_only_read_need_no_copy() -> None:
    sent = {"x": torch.arange(2000, dtype=torch.uint8).view(50, 40), "y": torch.arange(50), "e": torch.empty(0, 3)}
    data, array = pack(sent)
    array.setflags(write=False)
    got = unpack((data, array), copy=False)
    for name, value in sent.items():
        assert torch.equal(got[name], value) and got[name].dtype == value.dtype
    start = array.ctypes.data
    assert start <= got["x"].data_ptr() < start + len(array)

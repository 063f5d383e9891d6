"""A model's parameters as one vector, and back."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn

from fedsim.errors import ConfigError
from fedsim.vector import Layout, float_buffers, trainable


def network() -> nn.Module:
    torch.manual_seed(0)
    module = nn.Sequential()
    module.add_module("features", nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(4, 3)))
    module.add_module("head", nn.Linear(3, 2))
    return module


LAYOUT = Layout.of(network())
NAMES = (
    *("features.0.weight", "features.0.bias", "features.1.weight", "features.1.bias"),
    *("features.2.weight", "features.2.bias", "head.weight", "head.bias"),
)


def test_names_shapes_and_places_follow_the_module() -> None:
    assert LAYOUT.names == NAMES
    assert LAYOUT.d == 18 + 2 + 2 + 2 + 12 + 3 + 6 + 2
    assert LAYOUT.shapes["features.0.weight"] == (2, 1, 3, 3)
    ends = [s.stop for s in LAYOUT.slices.values()]
    assert [s.start for s in LAYOUT.slices.values()] == [0, *ends[:-1]]
    assert ends[-1] == LAYOUT.d
    assert [*LAYOUT.blocks()] == [*LAYOUT.slices.items()]


def test_flatten_and_views_are_inverse() -> None:
    module = network()
    tensors = trainable(module)
    w = LAYOUT.flatten(tensors)
    views = LAYOUT.views(w)
    assert all(torch.equal(views[n], tensors[n]) for n in NAMES)
    assert torch.equal(LAYOUT.flatten(views), w)
    assert torch.equal(torch.cat([p.detach().reshape(-1) for p in module.parameters()]), w)


def test_views_write_through_and_keep_leading_axes() -> None:
    w = torch.zeros(5, 2, LAYOUT.d)
    views = LAYOUT.views(w)
    assert views["head.weight"].shape == (5, 2, 2, 3)
    views["head.bias"][3, 1] = 7.0
    assert w[3, 1].count_nonzero() == 2
    assert w[3, 1, LAYOUT.slices["head.bias"]].tolist() == [7.0, 7.0]


@pytest.mark.parametrize(
    ("glob", "names"),
    [
        ("head.", ["head.weight", "head.bias"]),
        ("features.0.", ["features.0.weight", "features.0.bias"]),
        ("*.bias", ["features.0.bias", "features.1.bias", "features.2.bias", "head.bias"]),
        ("head.bias", ["head.bias"]),
        ("*", [*NAMES]),
        ("features.[02].weight", ["features.0.weight", "features.2.weight"]),
    ],
)
def test_patterns_select_parameters(glob: str, names: list[str]) -> None:
    assert [*LAYOUT.match(glob)] == names
    mask, index = LAYOUT.mask(glob), LAYOUT.select(glob)
    w = torch.arange(float(LAYOUT.d))
    assert torch.equal(w[mask], w[index])
    assert torch.equal(w[mask], torch.cat([w[LAYOUT.slices[n]] for n in names]))
    assert LAYOUT.size(glob) == int(mask.sum())
    neighbours = names in ([*NAMES[i:j]] for i in range(8) for j in range(i + 1, 9))
    assert isinstance(index, slice) == neighbours


def test_a_pattern_that_fits_nothing_says_what_there_is() -> None:
    with pytest.raises(ConfigError, match=r"no parameter fits 'haed\.'; the model has: features\.0\.weight, "):
        LAYOUT.match("haed.")


def test_frozen_parameters_are_left_out_and_shared_ones_appear_once() -> None:
    module = network()
    module.get_submodule("features.0").requires_grad_(False)
    tied = nn.Linear(3, 2, bias=False)
    tied.weight = module.get_submodule("head").get_parameter("weight")
    module.add_module("tied", tied)
    assert Layout.of(module).names == NAMES[2:]


def test_buffers_have_a_layout_of_their_own() -> None:
    module = network()
    layout = Layout.of_buffers(module)
    assert layout.names == ("features.1.running_mean", "features.1.running_var")
    assert layout.flatten(float_buffers(module)).tolist() == [0.0, 0.0, 1.0, 1.0]
    assert Layout.of_buffers(nn.Linear(2, 2)).d == 0


def test_layouts_compare_by_content_and_survive_pickling() -> None:
    assert Layout.of(network()) == LAYOUT
    assert hash(Layout.of(network())) == hash(LAYOUT)
    assert pickle.loads(pickle.dumps(LAYOUT)) == LAYOUT
    assert Layout.of(network().double()) != LAYOUT
    assert Layout({"a": torch.Size([2])}) != Layout({"b": torch.Size([2])})


def test_what_cannot_be_a_vector_is_refused() -> None:
    with pytest.raises(ConfigError, match="model Flatten has no trainable parameters"):
        Layout.of(nn.Flatten())
    mixed = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1).double())
    with pytest.raises(ConfigError, match="model Sequential mixes"):
        Layout.of(mixed)


def test_flatten_names_what_does_not_fit() -> None:
    good = LAYOUT.views(torch.zeros(LAYOUT.d))
    with pytest.raises(ConfigError, match=r"unknown tensor 'head\.wieght' \(did you mean 'head\.weight'\?\)"):
        LAYOUT.flatten({**good, "head.wieght": torch.zeros(1)})
    with pytest.raises(ConfigError, match=r"tensor 'head\.bias' of shape \(2,\) is missing"):
        LAYOUT.flatten({k: v for k, v in good.items() if k != "head.bias"})
    with pytest.raises(ConfigError, match=r"tensor 'head\.bias' has shape \(3,\), needed \(2,\)"):
        LAYOUT.flatten({**good, "head.bias": torch.zeros(3)})

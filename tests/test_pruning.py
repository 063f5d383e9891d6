"""Masks against their definition; networks without their dead units against the whole ones."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsim.errors import ConfigError
from fedsim.models.resnet import ResNet
from fedsim.models.standard import CNN, MLP, Blocks5, LeNet5, LogReg, TwoCNN
from fedsim.pruning import Chain, Kept, Shrunk, empty_tensors, flops, mask_of, quantile
from fedsim.vector import Layout, trainable


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- masks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("d", [2, 7, 2550])
def test_the_smallest_scores_fall(d: int, dtype: torch.dtype) -> None:
    # A shuffled ramp: the parameters with the ranks 0 to floor(share (d - 1)) fall, and no other.
    ranks = torch.randperm(d, generator=seeded(d))
    before = torch.ones(d, dtype=torch.bool)
    for share in (0.1, 0.2, 0.3, 0.4, 0.5, 0.99):
        mask = mask_of(ranks.to(dtype) / d, share)
        assert torch.equal(mask, ranks > math.floor(share * (d - 1)))
        assert bool((before | ~mask).all()), "masks are nested"
        before = mask


def test_published_counts() -> None:
    scores = torch.rand(2550, generator=seeded(0), dtype=torch.float64)
    counts = [int((~mask_of(scores, share)).sum()) for share in (0.1, 0.2, 0.3, 0.4, 0.5)]
    assert counts == [255, 510, 765, 1020, 1275]


def test_a_mask_is_what_lies_above_the_interpolated_quantile() -> None:
    for seed in range(20):
        scores = torch.rand(50 + seed, generator=seeded(seed), dtype=torch.float64).square()
        for share in (0.05, 0.37, 0.5, 0.81):
            at = float(np.quantile(scores.numpy(), share))
            assert float(quantile(scores, share)) == pytest.approx(at, rel=1e-14)
            assert torch.equal(mask_of(scores, share), scores > at)


def test_equal_scores_fall_together() -> None:
    scores = torch.tensor([0.0, 1.0, 1.0, 1.0, 2.0])
    assert mask_of(scores, 0.3).tolist() == [False, False, False, False, True]  # rank 1.2, between two ones
    assert mask_of(scores, 0.1).tolist() == [False, True, True, True, True]


def test_a_share_of_zero_prunes_nothing() -> None:
    # The literal rule, above the lowest score, would take at least one.
    scores = torch.rand(9, generator=seeded(1))
    assert int((scores > scores.min()).sum()) == 8
    assert bool(mask_of(scores, 0.0).all()) and bool(mask_of(scores, 0.0, "absolute").all())


def test_the_absolute_rule_compares_with_the_share_itself() -> None:
    assert mask_of(torch.tensor([0.29, 0.3, 0.31]).double(), 0.3, "absolute").tolist() == [False, True, True]


def test_more_scores_than_torch_quantile_takes() -> None:
    scores = torch.arange(2**24 + 5, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="too large"):
        torch.quantile(scores, 0.5)
    assert int((~mask_of(scores, 0.25)).sum()) == math.floor(0.25 * (2**24 + 4)) + 1


def test_empty_tensors_are_named() -> None:
    layout = Layout({"a": torch.Size([2]), "b": torch.Size([2]), "c": torch.Size([1])})
    assert empty_tensors(torch.tensor([True, False, False, False, False]), layout) == ("b", "c")


# --- chains -----------------------------------------------------------------------------------------------


class Averaged(nn.Module):
    """Two convolutions with an average between them.

    Args:
        pool: Between them.
        bias: Of the second.
        relu: After the first.
    """

    def __init__(self, pool: nn.Module, bias: bool = True, relu: bool = True) -> None:
        super().__init__()
        activation = nn.ReLU() if relu else nn.Identity()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), activation, pool, nn.Conv2d(4, 5, 2, bias=bias), nn.ReLU())
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(x))
        return out


def network(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A network in float64 whose biases are of both signs."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = make().double()
        for name, p in module.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(p, std=0.5)
    return module


IMAGES: dict[str, Callable[[], nn.Module]] = {
    "lenet5": lambda: LeNet5((1, 14, 14), 3),
    "twocnn": lambda: TwoCNN((1, 14, 14), 3, hidden=4, fc=10, init="torch"),
    "cnn": lambda: CNN((1, 14, 14), 3),
    "blocks5": lambda: Blocks5((1, 14, 14), 3),
    "averaged": lambda: Averaged(nn.AvgPool2d(2)),
}
NETWORKS = {**IMAGES, "mlp": lambda: MLP((1, 14, 14), 3, (9, 8, 7)), "logreg": lambda: LogReg((1, 14, 14), 3)}


def inputs(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 1, 14, 14, generator=seeded(seed), dtype=torch.float64)


def vector(module: nn.Module) -> Tensor:
    return Layout.of(module).flatten(trainable(module)).double()


def at(module: nn.Module, w: Tensor, x: Tensor) -> Tensor:
    """The network's outputs at a parameter vector."""
    views = Layout.of(module).views(w)
    with torch.no_grad():
        out: Tensor = torch.func.functional_call(module, views, (x,))
    return out


def random_mask(module: nn.Module, seed: int, silent: float, biased: float) -> Tensor:
    """Masks a third of all weights, all weights of a share ``silent`` of the units, and of these all but a share
    ``biased`` of their biases."""
    g, layout = seeded(seed), Layout.of(module)
    mask = torch.rand(layout.d, generator=g) > 0.33
    views = layout.views(mask)
    for name in layout.names:
        if name.endswith(".weight"):
            out = torch.rand(len(views[name]), generator=g) < silent
            out[0] = False  # no layer goes
            views[name][out] = False
            if (bias := name.replace("weight", "bias")) in views:
                views[bias][:] = ~out | (torch.rand(len(out), generator=g) < biased)
    return mask


def test_layers_of_the_standard_models_are_found() -> None:
    found = {name: [link.name for link in Chain.of(network(make)).links] for name, make in NETWORKS.items()}
    assert found["mlp"] == ["features.1", "features.3", "features.5", "head"]
    assert found["lenet5"] == ["features.0", "features.3", "features.7", "features.9", "head"]
    assert found["twocnn"] == ["features.0", "features.3", "features.8", "head"]
    assert found["blocks5"] == [*(f"features.block{i}.0" for i in (1, 2, 3)), "features.block4.1", "head"]
    assert found["logreg"] == ["head"]


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.two(F.relu(self.one(x)))
        return out


class Residual(Functional):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.two(x + self.one(x))
        return out


class Skipping(Functional):
    def forward(self, x: Tensor) -> Tensor:
        self.one(x)
        out: Tensor = self.two(x)
        return out


class Twice(Functional):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.two(self.one(self.one(x)))
        return out


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.one(x)
        return y, y


def sequence(*layers: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*layers)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: ResNet((3, 32, 32), 10, groups=2, width=8), "ResNet is another network"),
        (Functional, "`relu` is no layer"),
        (Residual, "`add` is no layer"),
        (Skipping, "`two` is no layer"),
        (Twice, "a layer is used twice"),
        (Pair, "`output` is no layer"),
        (sequence(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)), "layer 1 is a BatchNorm1d"),
        (sequence(nn.Linear(4, 4), nn.Sigmoid(), nn.Linear(4, 2)), "layer 1 is a Sigmoid"),
        (sequence(nn.Linear(4, 4), nn.Dropout(), nn.Linear(4, 2)), "layer 1 is a Dropout"),
        (sequence(nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 2, 1)), "layer 0 has groups"),
        (sequence(nn.Conv2d(1, 4, 3, padding=1, padding_mode="reflect"), nn.Conv2d(4, 2, 1)), "other than zeros"),
        (sequence(nn.Conv2d(1, 4, 3), nn.Linear(4, 2)), "do not follow one another unit by unit"),
        (sequence(nn.Linear(4, 4), nn.Flatten(), nn.Linear(8, 2)), "do not follow one another unit by unit"),
        (sequence(nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 2)), "not trained"),
        (sequence(nn.Flatten(), nn.ReLU()), "no linear or convolutional layer"),
    ],
)
def test_other_networks_are_refused_in_one_line(make: Callable[[], nn.Module], why: str) -> None:
    with pytest.raises(ConfigError, match=r"strategy\.structured=off") as caught:
        Chain.of(make())
    assert why in str(caught.value) and "\n" not in str(caught.value)


# --- units that are removed -------------------------------------------------------------------------------


def test_a_silent_unit_leaves_its_constant_in_the_next_biases() -> None:
    # 2 inputs, 4 units, 3 units, 1 output. Unit 0 is dead, 1 gives relu(0.5), 2 gives relu(-2) = 0, 3 lives.
    module = network(sequence(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 1)))
    w1, b1 = [[0, 0], [0, 0], [0, 0], [1, -1]], [9, 0.5, -2, 0.25]
    w2, b2 = [[1, 2, 3, 4], [-1, 4, 7, 0], [5, 6, 7, 8]], [0.1, 0.2, 0.3]
    w = torch.cat([torch.tensor(part, dtype=torch.float64).flatten() for part in (w1, b1, w2, b2, [1, 10, 100], [0.5])])
    mask = w != 0
    mask[8] = False  # unit 0's bias
    mask[:6] = False
    mask[12 + 4 : 12 + 8] = torch.tensor([True, True, True, False])  # layer 2's unit 1 sees the three silent units only
    chain = Chain.of(module)
    closed, folded = chain.closed(mask, w)
    assert chain.kept(closed, 0.5) == ((3,), (0, 2))
    views = chain.layout.views(folded)
    # Layer 2: 0.1 + 2 * 0.5, and 0.3 + 6 * 0.5; its unit 1 gives relu(0.2 + 4 * 0.5) = 2.2, times 10, at the output.
    expected = torch.tensor([1.1, 0, 3.3], dtype=torch.float64)
    torch.testing.assert_close(views["2.bias"], expected, rtol=1e-14, atol=0)
    torch.testing.assert_close(views["4.bias"], torch.tensor([22.5], dtype=torch.float64), rtol=1e-14, atol=0)
    assert chain.layout.views(closed)["2.weight"].tolist() == [
        [False, False, False, True],
        [False] * 4,
        [False, False, False, True],
    ]
    assert chain.layout.views(closed)["4.weight"].tolist() == [[True, False, True]]
    assert not folded[~closed].any()
    x = torch.randn(6, 2, generator=seeded(0), dtype=torch.float64)
    torch.testing.assert_close(at(module, folded, x), at(module, w * mask, x), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", NETWORKS)
def test_removing_units_leaves_the_outputs_unchanged(name: str) -> None:
    removed = 0
    for seed in range(6):
        module = network(NETWORKS[name], seed)
        chain, w, x = Chain.of(module), vector(module), inputs(4, seed)
        mask = random_mask(module, seed, 0.4, 0.5)
        closed, folded = chain.closed(mask, w)
        kept = chain.kept(closed, 0.3)
        removed += sum(link.units for link in chain.links[:-1]) - sum(map(len, kept))
        expected = at(module, w * mask, x)
        assert float(expected.std()) > 1e-3
        torch.testing.assert_close(at(module, folded, x), expected, rtol=1e-12, atol=1e-12)
        assert bool((mask | ~closed).all()), "nothing comes back"
        again = chain.closed(closed, folded)
        assert torch.equal(again[0], closed) and torch.equal(again[1], folded)
        index = chain.index(kept)
        small = Shrunk(kept)(network(NETWORKS[name], seed))
        torch.testing.assert_close(at(small, folded[index], x), expected, rtol=1e-12, atol=1e-12)
        assert set(closed.nonzero()[:, 0].tolist()) <= set(index.tolist()), "what survives is in the smaller network"
    assert removed > 0 or name == "logreg"


def test_removing_units_in_single_precision() -> None:
    # Published: 6e-8 without a bias that survives, 1.2e-7 with one folded; here of the largest output, and twice
    # 6e-8, a rounding of either side.
    for biased, bound in ((0.0, 2 * 6e-8), (1.0, 1.2e-7)):
        for seed in range(5):
            module, other = (network(lambda: MLP((6,), 3, (12, 10)), seed).float() for _ in range(2))
            chain, w = Chain.of(module), vector(module).float()
            mask = random_mask(module, seed, 0.4, biased)
            closed, folded = chain.closed(mask, w)
            kept = chain.kept(closed, 0.3)
            assert len(kept[0]) < 12
            x = torch.randn(20, 6, generator=seeded(seed))
            small, expected = at(Shrunk(kept)(other), folded[chain.index(kept)], x), at(module, w * mask, x)
            assert float((small - expected).abs().max()) <= bound * max(float(expected.abs().max()), 1.0)


def constant_unit(module: nn.Module, weights: str, bias: str, next_bias: str | None = None) -> tuple[Chain, Tensor]:
    """A mask under which unit 0 of a layer has its bias only; optionally with no biases in the next one."""
    chain = Chain.of(module)
    mask = torch.ones(chain.layout.d, dtype=torch.bool)
    views = chain.layout.views(mask)
    views[weights][0] = False
    assert bool(views[bias][0])
    if next_bias is not None:
        views[next_bias][:] = False
    return chain, mask


@pytest.mark.parametrize(
    ("make", "folds"),
    [
        (lambda: Averaged(nn.AvgPool2d(2)), True),
        (lambda: Averaged(nn.AvgPool2d(2), relu=False), True),
        (lambda: Averaged(nn.AvgPool2d(2, padding=1, count_include_pad=False)), True),
        (lambda: Averaged(nn.MaxPool2d(3, padding=1)), True),
        (lambda: Averaged(nn.AvgPool2d(2, padding=1)), False),
        (lambda: Averaged(nn.AvgPool2d(2, divisor_override=3)), False),
        (lambda: Averaged(nn.AvgPool2d(2), bias=False), False),
        (lambda: TwoCNN((1, 14, 14), 3, hidden=4, fc=5, init="torch"), False),
    ],
)
def test_a_constant_unit_goes_where_that_is_exact_and_else_stays(make: Callable[[], nn.Module], folds: bool) -> None:
    # Zeros that are padded, by a pooling or the next convolution, make a constant map uneven at its border.
    module = network(make)
    first = Chain.of(module).links[0].name
    chain, mask = constant_unit(module, f"{first}.weight", f"{first}.bias")
    w, x = vector(module), inputs(3)
    w[chain.layout.slices[f"{first}.bias"].start] = 0.7
    closed, folded = chain.closed(mask, w)
    assert (0 not in chain.kept(closed, 0.3)[0]) == folds
    torch.testing.assert_close(at(module, folded, x), at(module, w * mask, x), rtol=1e-12, atol=1e-12)


def test_a_constant_without_relu_keeps_its_sign() -> None:
    module = network(lambda: Averaged(nn.AvgPool2d(2), relu=False))
    chain, mask = constant_unit(module, "body.0.weight", "body.0.bias")
    w, x = vector(module), inputs(3)
    w[chain.layout.slices["body.0.bias"].start] = -0.7
    closed, folded = chain.closed(mask, w)
    assert chain.kept(closed, 0.3)[0] == (1, 2, 3)
    moved = folded - w * closed
    assert float(moved[chain.layout.slices["body.3.bias"]].abs().max()) > 1e-3
    torch.testing.assert_close(at(module, folded, x), at(module, w * mask, x), rtol=1e-12, atol=1e-12)


def test_a_constant_unit_stays_where_a_bias_that_it_needs_is_masked() -> None:
    module = network(lambda: MLP((1, 14, 14), 3, (5, 4)))
    names = ("features.1.weight", "features.1.bias", "features.3.bias")
    chain, mask = constant_unit(module, *names)
    closed, folded = chain.closed(mask, vector(module))
    assert chain.kept(closed, 0.3)[0] == (0, 1, 2, 3, 4)
    assert torch.equal(closed, mask) and torch.equal(folded, vector(module) * mask)
    views = chain.layout.views(mask)
    views["features.3.weight"][:, 0] = False  # nobody listens to it any more
    assert chain.kept(chain.closed(mask, vector(module))[0], 0.3)[0] == (1, 2, 3, 4)


def test_weak_units_are_masked_by_the_mean_of_their_weights() -> None:
    module = network(lambda: MLP((2,), 2, (3,)))
    chain = Chain.of(module)
    # Means 0.4, 0.5, 0.9; biases and the last layer do not matter.
    scores = torch.tensor([0.0, 0.8, 0.5, 0.5, 0.9, 0.9, 1, 1, 0, *[0.0] * 8], dtype=torch.float64)
    full = torch.ones(17, dtype=torch.bool)
    at_most = chain.layout.views(chain.without_weak(full, scores, 0.5))
    below = chain.layout.views(chain.without_weak(full, scores, 0.5, "absolute"))
    assert at_most["features.1.weight"].any(1).tolist() == at_most["features.1.bias"].tolist() == [False, False, True]
    assert below["features.1.weight"].any(1).tolist() == below["features.1.bias"].tolist() == [False, True, True]
    assert bool(at_most["head.weight"].all() and at_most["head.bias"].all())


def test_a_layer_without_units_is_refused_by_name() -> None:
    module = network(lambda: MLP((4,), 2, (3, 3)))
    chain = Chain.of(module)
    mask = torch.ones(chain.layout.d, dtype=torch.bool)
    for name in ("features.3.weight", "features.3.bias"):
        mask[chain.layout.slices[name]] = False
    closed, _ = chain.closed(mask, vector(module))
    needed = (
        r"strategy\.threshold=0\.7 leaves none of the 3 units of layer features\.3; lower strategy\.threshold, or .*off"
    )
    with pytest.raises(ConfigError, match=needed):
        chain.kept(closed, 0.7)


# --- smaller networks -------------------------------------------------------------------------------------

KEPT: dict[str, Kept] = {
    "mlp": ((0, 3, 8), (1,), (0, 1, 6)),
    "lenet5": ((0, 2, 5), (1, 2, 3, 15), tuple(range(0, 120, 7)), (0, 83)),
    "twocnn": ((1, 3), (0, 2, 7), (0, 4, 9)),
    "averaged": ((0, 2), (1, 4)),
}


@pytest.mark.parametrize("name", KEPT)
def test_a_smaller_network_has_the_weights_at_its_index(name: str) -> None:
    whole, kept = network(NETWORKS[name]), KEPT[name]
    small, chain = Shrunk(kept)(network(NETWORKS[name])), Chain.of(whole)
    index = chain.index(kept)
    assert index.dtype == torch.int64 and len({*index.tolist()}) == len(index)
    assert torch.equal(vector(small), vector(whole)[index])
    sizes = [len(k) for k in kept]
    assert [link.units for link in Chain.of(small).links] == [*sizes, 3]
    # Layer l has as many weights as units here and before, times those for each pair.
    per_pair = [Layout.of(whole).shapes[f"{link.name}.weight"] for link in chain.links]
    before = [per_pair[0][1], *(link.units for link in chain.links[:-1])]
    ratios = [shape[1:].numel() // units for shape, units in zip(per_pair, before, strict=True)]
    numbers = sum(r * a * b + b for r, (a, b) in zip(ratios, pairwise([before[0], *sizes, 3]), strict=True))
    assert len(index) == numbers


def test_smaller_networks_are_equal_by_value_and_travel() -> None:
    one, other = Shrunk(((0, 1), (2,))), Shrunk(((0, 1), (2,)))
    assert one == other and hash(one) == hash(other) and one != Shrunk(((0, 1), (1,)))
    assert pickle.loads(pickle.dumps(one)) == one


@pytest.mark.parametrize("name", ["mlp", "lenet5", "twocnn", "averaged"])
@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_training_a_smaller_network_is_masked_training_of_the_whole_one(name: str, optimizer: str) -> None:
    # Plain PyTorch on both sides; dead units only. Six steps, the mask after each.
    whole, x = network(NETWORKS[name]), inputs(24)
    y = torch.randint(3, (24,), generator=seeded(3))
    chain = Chain.of(whole)
    mask, w = chain.closed(random_mask(whole, 3, 0.4, 0.0), vector(whole))
    kept = chain.kept(mask, 0.3)
    assert sum(map(len, kept)) < sum(link.units for link in chain.links[:-1])
    index = chain.index(kept)
    small = Shrunk(kept)(network(NETWORKS[name]))

    def trained(module: nn.Module, start: Tensor, mask: Tensor) -> Tensor:
        layout = Layout.of(module)
        values, masks = layout.views(start), layout.views(mask)
        with torch.no_grad():
            for key, p in module.named_parameters():
                p.copy_(values[key])
        parameters = list(module.parameters())
        made: torch.optim.Optimizer = torch.optim.Adam(parameters, lr=0.01)
        if optimizer == "momentum":
            made = torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.01)
        for step in range(6):
            rows = slice(4 * step, 4 * step + 4)
            made.zero_grad()
            F.cross_entropy(module(x[rows]), y[rows]).backward()  # type: ignore[no-untyped-call]
            made.step()
            with torch.no_grad():
                for key, p in module.named_parameters():
                    p.mul_(masks[key])
        return vector(module)

    full, part = trained(whole, w, mask), trained(small, w[index], mask[index])
    assert float((full - w).abs().max()) > 1e-2
    scattered = torch.zeros_like(full)
    scattered[index] = part
    torch.testing.assert_close(scattered, full, rtol=1e-12, atol=1e-12)


# --- work -------------------------------------------------------------------------------------------------


def dense_flops(name: str) -> int:
    """Twice the multiply-adds of a forward pass on 14x14: positions times inputs times units, layer by layer."""
    layers: dict[str, Sequence[tuple[int, int, int]]] = {
        "mlp": [(1, 196, 9), (1, 9, 8), (1, 8, 7), (1, 7, 3)],
        # 14x14 padded by 2 keeps its size, 7x7 after pooling, 3x3 after the second 5x5, 1x1 after pooling.
        "lenet5": [(196, 25, 6), (9, 25 * 6, 16), (1, 16, 120), (1, 120, 84), (1, 84, 3)],
        # Padded by 1: 12x12, pooled with padding 7x7; 5x5, pooled 3x3, spread to 7x7.
        "twocnn": [(144, 25, 4), (25, 25 * 4, 8), (1, 8 * 49, 10), (1, 10, 3)],
    }
    return 2 * sum(places * inputs * units for places, inputs, units in layers[name])


@pytest.mark.parametrize("name", ["mlp", "lenet5", "twocnn"])
def test_flops_are_two_per_multiply_add(name: str) -> None:
    module, x = network(NETWORKS[name]), inputs(1)
    d = Layout.of(module).d
    before = vector(module)
    assert flops(module, x) == flops(module, x, torch.ones(d, dtype=torch.bool)) == dense_flops(name)
    assert torch.equal(vector(module), before) and not any(m._forward_hooks for m in module.modules())


def test_theoretical_flops_count_surviving_weights_where_they_are_used() -> None:
    module, x = network(NETWORKS["lenet5"]), inputs(1)
    layout = Layout.of(module)
    mask = torch.zeros(layout.d, dtype=torch.bool)
    mask[layout.slices["features.0.weight"].start + 3] = True  # used at 14x14 places
    mask[layout.slices["features.3.weight"].start] = True  # at 3x3
    mask[layout.slices["head.weight"].stop - 1] = True
    mask[layout.slices["head.bias"]] = True  # additions only
    assert flops(module, x, mask) == 2 * (196 + 9 + 1)
    assert flops(module, x) == dense_flops("lenet5"), "zeros are multiplied like other numbers"


def test_measured_flops_fall_with_the_units() -> None:
    small = Shrunk(((0, 3, 8), (1,), (0, 1, 6)))(network(NETWORKS["mlp"]))
    assert flops(small, inputs(1)) == 2 * (196 * 3 + 3 * 1 + 1 * 3 + 3 * 3)

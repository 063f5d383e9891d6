"""The models: parameter counts in closed form, shapes, refusals, and a step of training through the platform."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsim.data import Dataset, Split
from fedsim.errors import ConfigError, DataError
from fedsim.models.resnet import BasicBlock, ResNet
from fedsim.models.standard import CNN, MLP, AveragePool, Blocks5, Classifier, LeNet5, LogReg, TwoCNN, TwoNN
from fedsim.vector import Layout
from tests.helpers import Run, batches, configure, drive, examples_of, flat, module_of

ResNet18GN = functools.partial(ResNet, stem="imagenet", groups=2, init="he_normal")
ResNet34 = functools.partial(ResNet, depth=34)
Thin = functools.partial(ResNet, width=8)
ThinGN = functools.partial(ResNet18GN, width=8)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """As in a run: more threads would only wait for each other on networks so small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def conv(inputs: int, outputs: int, size: int = 5) -> int:
    return size**2 * inputs * outputs + outputs


def dense(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def resnet(stages: list[int], stem: int, channels: int, classes: int, width: int = 64) -> int:
    """Convolutions have no biases; a norm has two numbers per channel."""
    total, inputs = stem**2 * channels * width + 2 * width, width
    for outputs, count in zip([width, 2 * width, 4 * width, 8 * width], stages, strict=True):
        total += 9 * inputs * outputs + 9 * outputs**2 * (2 * count - 1) + 2 * outputs * 2 * count
        if inputs != outputs:
            total += inputs * outputs + 2 * outputs  # the projection
        inputs = outputs
    return total + dense(8 * width, classes)


@pytest.mark.parametrize(
    ("make", "shape", "classes", "expected"),
    [
        (LogReg, (60,), 10, 610),
        (LogReg, (1, 28, 28), 10, 7_850),
        (MLP, (1, 28, 28), 10, 199_210),  # published
        (MLP, (60,), 10, dense(60, 200) + dense(200, 200) + dense(200, 10)),
        (CNN, (1, 28, 28), 10, 1_663_370),  # published
        (CNN, (3, 32, 32), 10, 2_156_490),
        (CNN, (3, 32, 32), 100, conv(3, 32) + conv(32, 64) + dense(64 * 8 * 8, 512) + dense(512, 100)),
        (CNN, (1, 8, 8), 10, conv(1, 32) + conv(32, 64) + dense(64 * 2 * 2, 512) + dense(512, 10)),
        (functools.partial(CNN, padding=0), (1, 28, 28), 10, 582_026),  # known, as FedCompass' CNN
        (functools.partial(CNN, padding=0), (3, 32, 32), 10, conv(3, 32) + conv(32, 64) + dense(1600, 512) + 5_130),
        (LeNet5, (1, 28, 28), 10, 61_706),  # known
        (LeNet5, (3, 32, 32), 10, 62_006),
        (TwoNN, (1, 24, 24), 10, 157_610),  # published
        (TwoNN, (3, 24, 24), 10, dense(1728, 200) + dense(200, 200) + dense(200, 10)),
        (TwoCNN, (1, 24, 24), 10, 1_663_370),  # published, like the next three
        (TwoCNN, (3, 32, 32), 10, 1_664_970),
        (functools.partial(TwoCNN, hidden=128), (3, 24, 24), 100, 7_303_524),
        (functools.partial(TwoCNN, hidden=64, fc=2048), (1, 28, 28), 62, 13_180_734),
        (Blocks5, (3, 32, 32), 10, conv(3, 32, 3) + conv(32, 64, 3) + conv(64, 128, 3) + dense(2048, 256) + 2_570),
        (Blocks5, (1, 8, 8), 10, conv(1, 32, 3) + conv(32, 64, 3) + conv(64, 128, 3) + dense(128, 256) + 2_570),
        (ResNet18GN, (3, 32, 32), 10, resnet([2, 2, 2, 2], 7, 3, 10)),
        (ResNet18GN, (3, 32, 32), 10, 11_689_512 - dense(512, 1000) + dense(512, 10)),  # known for ImageNet
        (functools.partial(ResNet18GN, stem="cifar"), (3, 32, 32), 10, resnet([2, 2, 2, 2], 3, 3, 10)),
        (ResNet, (3, 32, 32), 10, 11_173_962),  # known
        (functools.partial(ResNet, width=6), (1, 9, 9), 3, resnet([2, 2, 2, 2], 3, 1, 3, width=6)),
        (ResNet34, (3, 32, 32), 100, resnet([3, 4, 6, 3], 3, 3, 100)),
        (functools.partial(ResNet34, stem="imagenet"), (3, 64, 64), 1000, 21_797_672),  # known
        (LeNet5, (1, 16, 16), 10, conv(1, 6) + conv(6, 16) + dense(16 * 2 * 2, 120) + dense(120, 84) + dense(84, 10)),
    ],
)
def test_parameters_are_as_many_as_the_layers_say(
    make: Any, shape: tuple[int, ...], classes: int, expected: int
) -> None:
    with torch.device("meta"):
        model = make(input_shape=shape, num_classes=classes)
    assert sum(p.numel() for p in model.parameters()) == expected


@pytest.mark.parametrize("make", [LogReg, MLP, CNN, LeNet5, TwoNN, TwoCNN, Blocks5])
@pytest.mark.parametrize("shape", [(1, 12, 12), (3, 28, 28), (2, 33, 40), (3, 64, 64), (1, 12, 50)])
def test_the_head_applied_to_the_features_is_the_model(make: Any, shape: tuple[int, int, int]) -> None:
    assert_is_head_of_features(make(shape, 7), shape)


@pytest.mark.parametrize("make", [Thin, ThinGN, functools.partial(Thin, depth=34, stem="imagenet")])
@pytest.mark.parametrize("shape", [(3, 28, 28), (1, 33, 20)])
def test_the_head_applied_to_the_features_is_the_residual_network(make: Any, shape: tuple[int, int, int]) -> None:
    assert_is_head_of_features(make(shape, 7).eval(), shape)


def assert_is_head_of_features(model: Classifier, shape: tuple[int, int, int]) -> None:
    x = torch.rand(3, *shape)
    logits = model(x)
    assert logits.shape == (3, 7)
    assert isinstance(model.features, nn.Sequential)
    assert isinstance(model.head, nn.Linear)
    torch.testing.assert_close(model.head(model.features(x)), logits, rtol=0, atol=0)
    assert model.features(x).shape == (3, model.head.in_features)


@pytest.mark.parametrize("make", [LogReg, MLP, CNN, LeNet5, TwoNN, TwoCNN, Blocks5, ThinGN])
def test_models_run_under_vmap(make: Any) -> None:
    models = [make((1, 18, 18), 4) for _ in range(2)]
    x = torch.rand(2, 5, 1, 18, 18)
    stacked, _ = torch.func.stack_module_state(models)

    def call(parameters: dict[str, torch.Tensor], batch: torch.Tensor) -> Any:
        return torch.func.functional_call(models[0], parameters, (batch,))

    together = torch.func.vmap(call)(stacked, x)
    one_by_one = torch.stack([m(b) for m, b in zip(models, x, strict=True)])
    torch.testing.assert_close(together, one_by_one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "sides"), [((1, 28, 28), [24, 12, 8, 4]), ((3, 32, 32), [28, 14, 10, 5]), ((1, 17, 17), [13, 6, 2, 1])]
)
def test_without_padding_a_convolution_takes_four_pixels_and_a_pooling_half(
    shape: tuple[int, int, int], sides: list[int]
) -> None:
    x, found = torch.rand(2, *shape), []
    for layer in CNN(shape, 10, padding=0).features:
        x = layer(x)
        if isinstance(layer, nn.Conv2d | nn.MaxPool2d):
            found.append(tuple(x.shape))
    assert found == [(2, c, side, side) for c, side in zip([32, 32, 64, 64], sides, strict=True)]
    assert x.shape == (2, 512)


def test_an_mlp_has_the_hidden_layers_asked_for() -> None:
    model = MLP((60,), 3, hidden=[5])
    assert sum(p.numel() for p in model.parameters()) == dense(60, 5) + dense(5, 3)
    assert [type(layer) for layer in model.features] == [nn.Flatten, nn.Linear, nn.ReLU]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CNN((60,), 10), r"model=cnn needs images .*\(60,\).*logreg"),
        (lambda: CNN((1, 3, 28), 10), r"at least 4x4.*3x28"),
        (lambda: CNN((1, 15, 28), 10, padding=0), r"model=cnn model\.padding=0 .*at least 16x16.*15x28"),
        (lambda: CNN((1, 28, 28), 10, padding=1), r"model\.padding must be 0 or 2, got 1"),
        (lambda: CNN((1, 28, 28), 10, padding=2.0), r"model\.padding must be .*got 2\.0"),  # type: ignore[arg-type]
        (lambda: LeNet5((1, 8, 8), 10), r"model=lenet5 .*at least 12x12.*8x8"),
        (lambda: LeNet5((1, 28, 11), 10), r"at least 12x12.*28x11"),
        (lambda: MLP((60,), 10, hidden=[0]), r"model\.hidden"),
        (lambda: TwoNN((60,), 10, hidden=0), r"model\.hidden must be .*at least 1, got 0"),
        (lambda: TwoNN((60,), 10, init="xavier"), r"model\.init must be torch or xavier_normal, got 'xavier'"),
        (lambda: TwoCNN((1, 5, 28), 10), r"model=twocnn .*at least 6x6.*5x28"),
        (lambda: TwoCNN((1, 28, 28), 10, fc=2.5), r"model\.fc"),  # type: ignore[arg-type]
        (lambda: TwoCNN((1, 28, 28), 10, init="he"), r"model\.init"),
        (lambda: Blocks5((1, 28, 7), 10), r"model=blocks5 .*at least 8x8.*28x7"),
        (lambda: ResNet((60,), 10), r"model=resnet18 \(stem=cifar\) needs images"),
        (lambda: ResNet((3, 4, 9), 10), r"at least 5x5.*4x9"),
        (lambda: ResNet((3, 16, 16), 10, 34, "imagenet"), r"resnet34 \(stem=imagenet\) .*at least 17x17.*16x16"),
        (lambda: ResNet((3, 32, 32), 10, depth=50), r"model\.depth must be 18 or 34, got 50"),
        (lambda: ResNet((3, 32, 32), 10, stem="mnist"), r"model\.stem must be imagenet or cifar, got 'mnist'"),
        (lambda: ResNet((3, 32, 32), 10, init="xavier_normal"), r"model\.init must be he_normal or torch"),
        (lambda: ResNet((3, 32, 32), 10, groups=3), r"model\.groups must be a divisor of model\.width=64, .*got 3"),
        (lambda: ResNet((3, 32, 32), 10, width=0), r"model\.width"),
        (lambda: ResNet((3, 32, 32), 10, groups=True), r"model\.groups"),
        (lambda: LogReg((), 10), r"input_shape=\(\)"),
        (lambda: LogReg((60,), 0), r"num_classes=0"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_smallest_size_that_does(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "smallest"),
    [
        (CNN, 4),
        (functools.partial(CNN, padding=0), 16),
        (LeNet5, 12),
        (TwoCNN, 6),
        (Blocks5, 8),
        (Thin, 5),
        (ThinGN, 17),
        (functools.partial(ThinGN, stem="cifar"), 5),
    ],
)
def test_the_smallest_size_named_does_fit(make: Any, smallest: int) -> None:
    model = make((1, smallest, smallest), 2)
    assert model(torch.rand(2, 1, smallest, smallest)).shape == (2, 2)
    with pytest.raises(ConfigError, match=f"{smallest}x{smallest}"):
        make((1, smallest - 1, smallest), 2)


# Parts of models


@pytest.mark.parametrize("shape", [(6, 6), (7, 7), (2, 9), (14, 5), (30, 7)])
def test_average_pooling_is_torchs(shape: tuple[int, int]) -> None:
    x = torch.rand(2, 3, *shape, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(2, 3, 7, 7, dtype=torch.float64)
    outputs = AveragePool(7)(x), nn.AdaptiveAvgPool2d(7)(x)
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*(torch.autograd.grad((out * weights).sum(), x)[0] for out in outputs))


def test_blocks_make_up_the_network_and_its_parameters() -> None:
    model = Blocks5((3, 32, 32), 10)
    x = torch.rand(2, 3, 32, 32)
    outputs = [x]
    for name in model.blocks:
        outputs.append(model.get_submodule(name)(outputs[-1]))
    assert [tuple(out.shape[1:]) for out in outputs[1:]] == [(32, 16, 16), (64, 8, 8), (128, 4, 4), (256,), (10,)]
    assert torch.equal(outputs[-1], model(x))
    layout = Layout.of(model)
    assert [name for block in model.blocks for name in layout.match(block + ".")] == list(layout.names)


def by_hand(w: Mapping[str, Tensor], x: Tensor, stages: list[int], stem: str) -> Tensor:
    """A residual network with group norms of two groups, from its parameters by name."""

    def norm(name: str, x: Tensor) -> Tensor:
        groups = x.reshape(len(x), 2, -1)
        groups = (groups - groups.mean(-1, keepdim=True)) / (groups.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
        return groups.view_as(x) * w[name + ".weight"][:, None, None] + w[name + ".bias"][:, None, None]

    if stem == "imagenet":
        x = norm("features.norm", F.conv2d(x, w["features.conv.weight"], stride=2, padding=3)).relu()
        x = F.max_pool2d(x, 3, 2, 1)
    else:
        x = norm("features.norm", F.conv2d(x, w["features.conv.weight"], padding=1)).relu()
    first = [1 + sum(stages[:i]) for i in range(1, 4)]  # blocks that halve
    for i in range(1, sum(stages) + 1):
        name, stride = f"features.block{i}", 2 if i in first else 1
        y = norm(f"{name}.norm1", F.conv2d(x, w[f"{name}.conv1.weight"], stride=stride, padding=1)).relu()
        y = norm(f"{name}.norm2", F.conv2d(y, w[f"{name}.conv2.weight"], padding=1))
        if i in first:
            x = norm(f"{name}.shortcut.1", F.conv2d(x, w[f"{name}.shortcut.0.weight"], stride=2))
        x = (x + y).relu()
    return x.mean((-1, -2)) @ w["head.weight"].T + w["head.bias"]


@pytest.mark.parametrize(("depth", "stages"), [(18, [2, 2, 2, 2]), (34, [3, 4, 6, 3])])
@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
def test_residual_networks_compute_what_their_formula_says(depth: int, stages: list[int], stem: str) -> None:
    model = Thin((3, 20, 18), 5, depth, stem, groups=2).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms start at 1 and 0, where much would go unnoticed
                parameter.add_(0.3 * torch.randn(parameter.shape))
    x = torch.rand(2, 3, 20, 18, dtype=torch.float64)
    torch.testing.assert_close(model(x), by_hand(dict(model.named_parameters()), x, stages, stem))


def test_the_imagenet_stem_leaves_one_pixel_of_32() -> None:
    model, x, shapes = ResNet18GN((3, 32, 32), 10), torch.rand(1, 3, 32, 32), []
    for layer in model.features:
        x = layer(x)
        if isinstance(layer, nn.MaxPool2d | BasicBlock):
            shapes.append(tuple(x.shape[1:]))
    assert shapes == [(64, 8, 8)] * 3 + [(128, 4, 4)] * 2 + [(256, 2, 2)] * 2 + [(512, 1, 1)] * 2


def test_no_norm_is_left_of_the_other_kind() -> None:
    kinds = {2: nn.GroupNorm, None: nn.BatchNorm2d}
    for groups, kind in kinds.items():
        norms = [m for m in Thin((3, 32, 32), 10, groups=groups).modules() if isinstance(m, tuple(kinds.values()))]
        assert len(norms) == 20
        assert all(isinstance(m, kind) for m in norms)
    assert not list(Thin((3, 32, 32), 10, groups=2).buffers())


def test_batch_norm_says_what_to_do_with_a_batch_of_one_pixel() -> None:
    model = Thin((3, 8, 8), 4)
    x = torch.rand(1, 3, 8, 8)
    with pytest.raises(DataError, match=r"one example has maps of 1x1 \(64 channels\).*client\.drop_last=true"):
        model(x)
    assert model(torch.cat([x, x])).shape == (2, 4)
    assert Thin((3, 9, 9), 4)(torch.rand(1, 3, 9, 9)).shape == (1, 4)
    assert model.eval()(x).shape == (1, 4)


# How weights are drawn


def assert_normal(weight: Tensor, deviation: float) -> None:
    n = weight.numel()
    assert abs(weight.mean().item()) < 5 * deviation / math.sqrt(n)
    assert abs(weight.std().item() / deviation - 1) < 5 / math.sqrt(2 * n)
    assert weight.abs().max() > 3 * deviation  # no uniform or truncated distribution of that deviation reaches so far


@pytest.mark.parametrize("make", [TwoNN, TwoCNN])
def test_xaviers_rule_is_the_default_of_the_code_that_these_come_from(make: Any) -> None:
    torch.manual_seed(0)
    model: Classifier = make((3, 24, 24), 10)
    for layer in model.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            field = layer.weight[0, 0].numel()
            assert_normal(layer.weight, math.sqrt(2 / (field * sum(layer.weight.shape[:2]))))
            assert layer.bias is not None and not layer.bias.any()


def test_hes_rule_scales_convolutions_by_their_outputs() -> None:
    torch.manual_seed(0)
    model = ResNet18GN((3, 32, 32), 10, width=32)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            assert_normal(layer.weight, math.sqrt(2 / (layer.weight[0, 0].numel() * layer.out_channels)))
    assert model.head.weight.abs().max() <= 1 / math.sqrt(256)  # as torch draws it


@pytest.mark.parametrize("make", [TwoNN, TwoCNN, Thin])
def test_weights_may_be_drawn_as_torch_draws_them(make: Any) -> None:
    torch.manual_seed(0)
    model = make((3, 24, 24), 10, init="torch")
    for layer in model.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            bound = 1 / math.sqrt(layer.weight[0].numel())
            assert 0.8 * bound < layer.weight.abs().max() <= bound


# Through the platform


@dataclass(frozen=True)
class RandomImages:
    """Noise as data: 24 training and 4 test images of a shape, 10 classes."""

    shape: list[int]

    def load(self, seed: int) -> Dataset:
        rng = torch.Generator().manual_seed(0)
        x = torch.randint(256, (28, *self.shape), dtype=torch.uint8, generator=rng)
        y = torch.arange(28) % 10
        names = tuple(str(c) for c in range(10))
        return Dataset("noise", Split(x[:24], y[:24]), Split(x[24:], y[24:]), names, (0.5,), (0.25,))


def one_step(tmp_path: Path, model: str, shape: tuple[int, ...], **values: Any) -> Run:
    """One round of FedAvg over three clients, each with one step on three of its eight examples."""
    data = {"_target_": "tests.test_models.RandomImages", "shape": [*shape], "augment": [], "validation": 0.0}
    config = configure(
        ["partition=iid", f"model={model}"],
        {
            "data": data,
            "partition.num_clients": 3,
            "partition.holdout": 0.0,
            "participation": {"_target_": "fedsim.clients.participation.All"},
            "client.epochs": None,
            "client.steps": 1,
            "client.batch_size": 3,
            "client.momentum": 0.0,
            "rounds": 1,
            **{key.replace("__", "."): value for key, value in values.items()},
        },
    )
    return drive(config, tmp_path)


def by_plain_torch(run: Run, client: int) -> tuple[Tensor, Tensor]:
    """A client's parameters after its step, and its batch-norm statistics, ``[d]`` and ``[nb]``."""
    exp = run.driver.exp
    module = module_of(exp).train()
    for name, buffer in module.named_buffers():
        if buffer.is_floating_point():
            buffer.fill_(1.0 if name.endswith("var") else 0.0)
    x, y = examples_of(exp, client)
    rows = next(batches(exp.config["seed"], client, len(x), 3))
    if exp.config["client"]["buffers"] == "frozen":
        for layer in module.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.eval()
    loss = F.cross_entropy(module(x[rows]), y[rows])
    grads = torch.autograd.grad(loss, list(module.parameters()))
    with torch.no_grad():
        for p, g in zip(module.parameters(), grads, strict=True):
            p.sub_(exp.config["client"]["lr"] * g)
    statistics = [b.flatten() for b in module.buffers() if b.is_floating_point()]
    return flat(module), torch.cat(statistics) if statistics else torch.empty(0)


@pytest.mark.parametrize(
    ("model", "shape", "values"),
    [
        ("twonn", (1, 24, 24), {}),
        ("twocnn", (3, 24, 24), {"hidden": 4, "fc": 64}),
        ("blocks5", (1, 8, 8), {}),
        ("resnet18_gn", (3, 32, 32), {"width": 8}),
        ("resnet34", (3, 9, 9), {"width": 8}),
        pytest.param("resnet18_gn", (3, 32, 32), {}, marks=pytest.mark.slow),
        pytest.param("resnet34", (3, 9, 9), {}, marks=pytest.mark.slow),
    ],
)
def test_one_round_is_the_mean_of_plain_steps(
    tmp_path: Path, model: str, shape: tuple[int, ...], values: dict[str, Any]
) -> None:
    run = one_step(tmp_path, model, shape, **{f"model__{key}": value for key, value in values.items()})
    torch.testing.assert_close(run.w, torch.stack([by_plain_torch(run, k)[0] for k in range(3)]).mean(0))
    assert math.isfinite(run.result.summary["final"]["test_loss"])


@pytest.mark.parametrize("policy", ["mean", "local", "frozen"])
def test_batch_norm_statistics_follow_their_policy(tmp_path: Path, policy: str) -> None:
    run = one_step(tmp_path, "resnet18", (3, 9, 9), model__width=8, client__buffers=policy)
    plain = [by_plain_torch(run, k) for k in range(3)]
    torch.testing.assert_close(run.w, torch.stack([w for w, _ in plain]).mean(0))
    statistics, initial = run.driver.fed.buffers, run.driver.exp.program.network.initial_buffers
    assert statistics is not None
    if policy == "mean":
        torch.testing.assert_close(statistics, torch.stack([own for _, own in plain]).mean(0))
        assert not torch.equal(statistics, initial)
    else:
        assert torch.equal(statistics, initial)
    if policy == "local":
        torch.testing.assert_close(run.rows("buffers.local"), torch.stack([own for _, own in plain]))
    else:
        assert not any(name.startswith("buffers") for row in run.memory.get((0, 1, 2)) for name in row)

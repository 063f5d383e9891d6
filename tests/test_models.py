"""The standard models: parameter counts in closed form, shapes, and refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fedsim.errors import ConfigError
from fedsim.models.standard import CNN, MLP, Classifier, LeNet5, LogReg


def conv(inputs: int, outputs: int) -> int:
    return 25 * inputs * outputs + outputs


def dense(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


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
        (LeNet5, (1, 28, 28), 10, 61_706),  # known
        (LeNet5, (3, 32, 32), 10, 62_006),
        (LeNet5, (1, 16, 16), 10, conv(1, 6) + conv(6, 16) + dense(16 * 2 * 2, 120) + dense(120, 84) + dense(84, 10)),
    ],
)
def test_parameters_are_as_many_as_the_layers_say(
    make: Any, shape: tuple[int, ...], classes: int, expected: int
) -> None:
    model = make(input_shape=shape, num_classes=classes)
    assert sum(p.numel() for p in model.parameters()) == expected


@pytest.mark.parametrize("make", [LogReg, MLP, CNN, LeNet5])
@pytest.mark.parametrize("shape", [(1, 12, 12), (3, 28, 28), (2, 33, 40), (3, 64, 64), (1, 12, 50)])
def test_the_head_applied_to_the_features_is_the_model(make: type[Any], shape: tuple[int, int, int]) -> None:
    model: Classifier = make(shape, 7)
    x = torch.rand(3, *shape)
    logits = model(x)
    assert logits.shape == (3, 7)
    assert isinstance(model.features, nn.Sequential)
    assert isinstance(model.head, nn.Linear)
    torch.testing.assert_close(model.head(model.features(x)), logits, rtol=0, atol=0)
    assert model.features(x).shape == (3, model.head.in_features)


@pytest.mark.parametrize("make", [LogReg, MLP, CNN, LeNet5])
def test_models_run_under_vmap(make: type[Any]) -> None:
    models = [make((1, 12, 12), 4) for _ in range(2)]
    x = torch.rand(2, 5, 1, 12, 12)
    stacked, _ = torch.func.stack_module_state(models)

    def call(parameters: dict[str, torch.Tensor], batch: torch.Tensor) -> Any:
        return torch.func.functional_call(models[0], parameters, (batch,))

    together = torch.func.vmap(call)(stacked, x)
    torch.testing.assert_close(together, torch.stack([m(b) for m, b in zip(models, x, strict=True)]))


def test_an_mlp_has_the_hidden_layers_asked_for() -> None:
    model = MLP((60,), 3, hidden=[5])
    assert sum(p.numel() for p in model.parameters()) == dense(60, 5) + dense(5, 3)
    assert [type(layer) for layer in model.features] == [nn.Flatten, nn.Linear, nn.ReLU]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CNN((60,), 10), r"model=cnn needs images .*\(60,\).*logreg"),
        (lambda: CNN((1, 3, 28), 10), r"at least 4x4.*3x28"),
        (lambda: LeNet5((1, 8, 8), 10), r"model=lenet5 .*at least 12x12.*8x8"),
        (lambda: LeNet5((1, 28, 11), 10), r"at least 12x12.*28x11"),
        (lambda: MLP((60,), 10, hidden=[0]), r"model\.hidden"),
        (lambda: LogReg((), 10), r"input_shape=\(\)"),
        (lambda: LogReg((60,), 0), r"num_classes=0"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_smallest_size_that_does(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize(("make", "smallest"), [(CNN, 4), (LeNet5, 12)])
def test_the_smallest_size_named_does_fit(make: type[Any], smallest: int) -> None:
    assert make((1, smallest, smallest), 2)(torch.rand(1, 1, smallest, smallest)).shape == (1, 2)

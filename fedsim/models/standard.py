"""The small networks that federated papers compare on.

Each takes the shape of one input and the number of classes, and computes ``head(features(x))``: ``features`` is a flat
`nn.Sequential`, ``head`` the last linear layer, so that methods with private heads or layer-wise rules find both.
Weights are drawn as PyTorch draws them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from fedsim.errors import ConfigError


class Classifier(nn.Module):
    """``head(features(x))``.

    Args:
        features: All layers but the last.
        num_features: Numbers that they give per example.
        num_classes: Number of classes.
    """

    def __init__(self, features: nn.Sequential, num_features: int, num_classes: int) -> None:
        super().__init__()
        if num_classes < 1:
            raise ConfigError(f"a model needs at least one class (output), got num_classes={num_classes}")
        self.features = features
        self.head = nn.Linear(num_features, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, ``[B, num_classes]``, of inputs ``[B, *input_shape]``."""
        logits: Tensor = self.head(self.features(x))
        return logits


class LogReg(Classifier):
    """Multinomial logistic regression: one linear layer, ``(p + 1) C`` parameters for p inputs and C classes.

    Args:
        input_shape: Shape of one input; it is flattened.
        num_classes: Number of classes.
    """

    def __init__(self, input_shape: Sequence[int], num_classes: int) -> None:
        super().__init__(nn.Sequential(nn.Flatten()), _size(input_shape), num_classes)


class MLP(Classifier):
    """The "2NN" of McMahan et al., 2017, section 3 (https://arxiv.org/abs/1602.05629): two hidden ReLU layers of 200.

    199,210 parameters for 28x28 images and 10 classes.

    Args:
        input_shape: Shape of one input; it is flattened.
        num_classes: Number of classes.
        hidden: Units of every hidden layer.

    Raises:
        ConfigError: A layer would be empty.
    """

    def __init__(self, input_shape: Sequence[int], num_classes: int, hidden: Sequence[int] = (200, 200)) -> None:
        if not isinstance(hidden, Sequence) or not all(isinstance(h, int) and h >= 1 for h in hidden):
            raise ConfigError(
                f"model.hidden must be a list of positive whole numbers, such as [200, 200], got {hidden}"
            )
        sizes = [_size(input_shape), *hidden]
        layers: list[nn.Module] = [nn.Flatten()]
        for before, after in pairwise(sizes):
            layers += [nn.Linear(before, after), nn.ReLU()]
        super().__init__(nn.Sequential(*layers), sizes[-1], num_classes)


class CNN(Classifier):
    """The CNN of McMahan et al., 2017, section 3 (https://arxiv.org/abs/1602.05629), for images of any size.

    Two 5x5 convolutions of 32 and 64 channels (padded to keep the size), each with ReLU and 2x2 max pooling, then 512
    ReLU units. 1,663,370 parameters for 28x28x1 and 10 classes, as published; 2,156,490 for 32x32x3.

    Args:
        input_shape: ``(channels, height, width)``, at least 4x4.
        num_classes: Number of classes.

    Raises:
        ConfigError: The inputs are no images, or too small.
    """

    def __init__(self, input_shape: Sequence[int], num_classes: int) -> None:
        channels, height, width = _image("cnn", input_shape, 4)
        layers = [
            *(nn.Conv2d(channels, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(64 * (height // 4) * (width // 4), 512), nn.ReLU()),
        ]
        super().__init__(nn.Sequential(*layers), 512, num_classes)


class LeNet5(Classifier):
    """LeNet-5 (LeCun et al., 1998, section II.B, https://doi.org/10.1109/5.726791) in its present-day form.

    ReLU, 2x2 max pooling, full connections between the convolutions and a linear output take the place of scaled tanh,
    trained subsampling, the partial connection table and the radial basis output. 61,706 parameters for 28x28x1 and
    10 classes, 62,006 for 32x32x3. Images smaller than 32x32 are padded by 2, as 28x28 ones are in the paper.

    Args:
        input_shape: ``(channels, height, width)``, at least 12x12.
        num_classes: Number of classes.

    Raises:
        ConfigError: The inputs are no images, or too small.
    """

    def __init__(self, input_shape: Sequence[int], num_classes: int) -> None:
        channels, height, width = _image("lenet5", input_shape, 12)
        padding = 2 if min(height, width) < 32 else 0
        # A 5x5 convolution without padding takes 4 pixels; each pooling halves what is left.
        rows, columns = (((n + 2 * padding - 4) // 2 - 4) // 2 for n in (height, width))
        layers = [
            *(nn.Conv2d(channels, 6, 5, padding=padding), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(16 * rows * columns, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU()),
        ]
        super().__init__(nn.Sequential(*layers), 84, num_classes)


def _size(input_shape: Sequence[int]) -> int:
    """Numbers in one input."""
    size = math.prod(input_shape)
    if len(input_shape) == 0 or size < 1:
        raise ConfigError(f"a model needs inputs with at least one number each, got input_shape={tuple(input_shape)}")
    return size


def _image(model: str, input_shape: Sequence[int], smallest: int) -> tuple[int, int, int]:
    """Channels, height and width, if they are an image's and it is large enough."""
    if len(input_shape) != 3:
        raise ConfigError(
            f"model={model} needs images (channels, height, width), but the data have inputs of shape "
            f"{tuple(input_shape)}; choose model=logreg or model=mlp"
        )
    channels, height, width = input_shape
    if channels < 1 or min(height, width) < smallest:
        raise ConfigError(
            f"model={model} needs images of at least {smallest}x{smallest}, but the data have {height}x{width} "
            f"({channels} channels); choose a smaller model (cnn from 4x4 on, mlp, logreg) or larger images"
        )
    return channels, height, width

"""The small networks that federated papers compare on.

Each takes the shape of one input and the number of classes, and computes ``head(features(x))``: ``features`` is an
`nn.Sequential`, ``head`` the last linear layer, so that methods with private heads or layer-wise rules find both.
Weights are drawn as PyTorch draws them, unless the model says otherwise.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from fedsim.errors import ConfigError
from fedsim.parts import sequential_blocks


class Classifier(nn.Module):
    """``head(features(x))``.

    Args:
        features: All layers but the last.
        num_features: Numbers that they give per example.
        num_classes: Number of classes.

    Attributes:
        blocks: Names of the modules of each block, in order (`fedsim.parts.blocks_of`): a block begins with every layer
            that has weights and is no norm; the head is the last. A block takes the output of the one before.
    """

    blocks: Sequence[str | Sequence[str]]

    def __init__(self, features: nn.Sequential, num_features: int, num_classes: int) -> None:
        super().__init__()
        if num_classes < 1:
            raise ConfigError(f"a model needs at least one class (output), got num_classes={num_classes}")
        self.features = features
        self.head = nn.Linear(num_features, num_classes)
        if not hasattr(type(self), "blocks"):
            self.blocks = (*sequential_blocks(features), "head")

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


class TwoNN(MLP):
    """The TwoNN of the FedLEx code: `MLP` with two equal hidden layers, weights drawn by Xavier's rule.

    157,610 parameters for 24x24 grey images (``data.size=24``) and 10 classes.

    Args:
        input_shape: Shape of one input; it is flattened.
        num_classes: Number of classes.
        hidden: Units of each hidden layer.
        init: ``xavier_normal`` (see `draw_xavier`), or ``torch``: as PyTorch draws weights.

    Raises:
        ConfigError: A layer would be empty, or ``init`` is unknown.
    """

    def __init__(
        self, input_shape: Sequence[int], num_classes: int, hidden: int = 200, init: str = "xavier_normal"
    ) -> None:
        check_width("hidden", hidden)
        super().__init__(input_shape, num_classes, (hidden, hidden))
        _draw(self, init)


class CNN(Classifier):
    """The CNN of McMahan et al., 2017, section 3 (https://arxiv.org/abs/1602.05629), for images of any size.

    Two 5x5 convolutions of 32 and 64 channels (padded to keep the size), each with ReLU and 2x2 max pooling, then 512
    ReLU units. 1,663,370 parameters for 28x28x1 and 10 classes, as published; 2,156,490 for 32x32x3. With ``padding=0``
    it is the CNN of the FedCompass code: 582,026 and 878,538 parameters.

    Args:
        input_shape: ``(channels, height, width)``, at least 4x4, or 16x16 with ``padding=0``.
        num_classes: Number of classes.
        padding: Of both convolutions, on each side: 2, which keeps the size, or 0.

    Raises:
        ConfigError: The inputs are no images, or too small; the padding is neither 0 nor 2.
    """

    def __init__(self, input_shape: Sequence[int], num_classes: int, padding: int = 2) -> None:
        if type(padding) is not int or padding not in (0, 2):
            raise ConfigError(f"model.padding must be 0 or 2, got {padding!r}")
        lost = 4 - 2 * padding  # what a convolution takes of height and width; each pooling halves what is left
        name, smallest = ("cnn", 4) if padding else ("cnn model.padding=0", 16)
        channels, height, width = check_image(name, input_shape, smallest)
        rows, columns = (((n - lost) // 2 - lost) // 2 for n in (height, width))
        layers = [
            *(nn.Conv2d(channels, 32, 5, padding=padding), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 64, 5, padding=padding), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(64 * rows * columns, 512), nn.ReLU()),
        ]
        super().__init__(nn.Sequential(*layers), 512, num_classes)


class TwoCNN(Classifier):
    """The TwoCNN of the AutoFLIP code: `CNN` with other paddings, averaged to 7x7 maps, for images of any size.

    Two 5x5 convolutions (padded by 1), each with ReLU and 2x2 max pooling (padded by 1), then a linear layer with ReLU.
    1,663,370 parameters for 1 channel and 10 classes, 1,664,970 for 3 channels, whatever the size. With ``hidden=64``
    and ``fc=2048`` it is the code's FEMNISTCNN: 13,180,734 parameters for 1 channel and 62 classes.

    Args:
        input_shape: ``(channels, height, width)``, at least 6x6.
        num_classes: Number of classes.
        hidden: Channels of the first convolution; the second has twice as many.
        fc: Units of the linear layer.
        init: ``xavier_normal`` (see `draw_xavier`), or ``torch``: as PyTorch draws weights.

    Raises:
        ConfigError: The inputs are no images, or too small; a layer would be empty, or ``init`` is unknown.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        hidden: int = 32,
        fc: int = 512,
        init: str = "xavier_normal",
    ) -> None:
        check_width("hidden", hidden)
        check_width("fc", fc)
        channels, _, _ = check_image("twocnn", input_shape, 6)
        layers = [
            *(nn.Conv2d(channels, hidden, 5, padding=1), nn.ReLU(), nn.MaxPool2d(2, padding=1)),
            *(nn.Conv2d(hidden, 2 * hidden, 5, padding=1), nn.ReLU(), nn.MaxPool2d(2, padding=1)),
            *(AveragePool(7), nn.Flatten(), nn.Linear(2 * hidden * 49, fc), nn.ReLU()),
        ]
        super().__init__(nn.Sequential(*layers), fc, num_classes)
        _draw(self, init)


class AveragePool(nn.Module):
    """`nn.AdaptiveAvgPool2d` whose gradient has the same bits every time, on a GPU too.

    torch's adds atomically there wherever windows overlap, in an order that changes.

    Args:
        size: Height and width of the result; also larger than those of the input.

    Attributes:
        per_channel: Every channel is treated alike and alone (`fedsim.stacked`).
    """

    per_channel = True

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        """Means over windows, ``[B, C, size, size]``, of maps ``[B, C, H, W]``."""
        for dim in (-2, -1):
            n = x.shape[dim]
            if n != self.size:
                # Window i: from floor(i n / size) up to ceil((i + 1) n / size).
                ends = [(i * n // self.size, -(-(i + 1) * n // self.size)) for i in range(self.size)]
                x = torch.stack([x.narrow(dim, a, b - a).mean(dim) for a, b in ends], dim)
        return x


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
        channels, height, width = check_image("lenet5", input_shape, 12)
        padding = 2 if min(height, width) < 32 else 0
        # A 5x5 convolution without padding takes 4 pixels; each pooling halves what is left.
        rows, columns = (((n + 2 * padding - 4) // 2 - 4) // 2 for n in (height, width))
        layers = [
            *(nn.Conv2d(channels, 6, 5, padding=padding), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(16 * rows * columns, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU()),
        ]
        super().__init__(nn.Sequential(*layers), 84, num_classes)


class Blocks5(Classifier):
    """A plain CNN in five named blocks, for methods that cut a network between blocks.

    Blocks 1 to 3: a 3x3 convolution of 32, 64 and 128 channels (padded to keep the size), ReLU, 2x2 max pooling; block
    4: 256 ReLU units; block 5: the head. 620,362 parameters for 32x32x3 and 10 classes.

    Args:
        input_shape: ``(channels, height, width)``, at least 8x8.
        num_classes: Number of classes.

    Attributes:
        blocks: Names of the blocks, in order: ``module.get_submodule(name)`` is a block, and ``name + "."`` fits its
            parameters in a `fedsim.vector.Layout`.

    Raises:
        ConfigError: The inputs are no images, or too small.
    """

    blocks: tuple[str, ...] = (*(f"features.block{i}" for i in range(1, 5)), "head")

    def __init__(self, input_shape: Sequence[int], num_classes: int) -> None:
        channels, height, width = check_image("blocks5", input_shape, 8)
        blocks: OrderedDict[str, nn.Module] = OrderedDict()
        for i, (before, after) in enumerate(pairwise((channels, 32, 64, 128)), start=1):
            layers = nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)
            blocks[f"block{i}"] = nn.Sequential(*layers)
        flat = 128 * (height // 8) * (width // 8)
        blocks["block4"] = nn.Sequential(nn.Flatten(), nn.Linear(flat, 256), nn.ReLU())
        super().__init__(nn.Sequential(blocks), 256, num_classes)


def draw_xavier(module: nn.Module) -> None:
    """Draws all weights of linear and convolutional layers anew from Xavier's normal distribution; biases are 0.

    Source: Glorot and Bengio, 2010, https://proceedings.mlr.press/v9/glorot10a.html.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.xavier_normal_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def _draw(module: nn.Module, init: str) -> None:
    if init not in ("torch", "xavier_normal"):
        raise ConfigError(f"model.init must be torch or xavier_normal, got {init!r}")
    if init == "xavier_normal":
        draw_xavier(module)


def check_width(name: str, value: object) -> None:
    """Refuses anything but a whole number of at least 1 for ``model.<name>``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"model.{name} must be a whole number of at least 1, got {value!r}")


def _size(input_shape: Sequence[int]) -> int:
    """Numbers in one input."""
    size = math.prod(input_shape)
    if len(input_shape) == 0 or size < 1:
        raise ConfigError(f"a model needs inputs with at least one number each, got input_shape={tuple(input_shape)}")
    return size


def check_image(model: str, input_shape: Sequence[int], smallest: int) -> tuple[int, int, int]:
    """Channels, height and width, if they are an image's and it is large enough.

    Args:
        model: Name of the model, for the message.
        input_shape: What the data have.
        smallest: Least height and width.

    Raises:
        ConfigError: They are not.
    """
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

"""Residual networks (He et al., 2016, https://arxiv.org/abs/1512.03385), in the forms that federated papers use.

`ResNet` has basic blocks only (depths 18 and 34). Two stems: ``imagenet``, a 7x7 convolution of stride 2 and a 3x3 max
pooling of stride 2 as in the paper, also for small images; ``cifar``, one 3x3 convolution of stride 1 and no pooling,
as most code for 32x32 images has it. Two norms: batch norm, or group norm (Wu and He, 2018,
https://arxiv.org/abs/1803.08494), which keeps no statistics of a client's data.

Departures:
    1. Shortcuts that change shape are projections (1x1 convolutions with a norm), the paper's option B; its own nets
       for CIFAR are narrower, and pad with zeros (option A).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor, nn

from fedsim.errors import ConfigError, DataError
from fedsim.models.standard import Classifier, check_image, check_width

STAGES = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}
"""Basic blocks of each stage, by depth."""


class ResNet(Classifier):
    """A residual network of basic blocks in four stages, each with twice the channels and half the size of the last.

    11,181,642 parameters at depth 18 with the ImageNet stem for 3 channels and 10 classes, 11,173,962 with the CIFAR
    stem; as many with group norm as with batch norm. Batch norm cannot be trained on a batch of one example whose last
    maps are 1x1 (images up to 32x32 with the ImageNet stem, up to 8x8 with the CIFAR stem).

    Args:
        input_shape: ``(channels, height, width)``, at least 17x17 with the ImageNet stem, 5x5 with the CIFAR stem: no
            map of one pixel is halved.
        num_classes: Number of classes.
        depth: 18 or 34.
        stem: ``imagenet`` or ``cifar``.
        groups: Groups of the group norms, a divisor of ``width``; None: batch norms.
        width: Channels of the first stage; there are eight times as many features.
        init: ``he_normal`` (see `draw_he`), or ``torch``: as PyTorch draws weights.

    Raises:
        ConfigError: An option is impossible; the inputs are no images, or too small.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        depth: int = 18,
        stem: str = "cifar",
        groups: int | None = None,
        width: int = 64,
        init: str = "torch",
    ) -> None:
        for name, value, known in (
            ("depth", depth, tuple(STAGES)),
            ("stem", stem, ("imagenet", "cifar")),
            ("init", init, ("he_normal", "torch")),
        ):
            if value not in known:
                raise ConfigError(f"model.{name} must be {' or '.join(map(str, known))}, got {value!r}")
        check_width("width", width)
        if groups is not None and (type(groups) is not int or groups < 1 or width % groups):
            raise ConfigError(
                f"model.groups must be a divisor of model.width={width}, or null for batch norm, got {groups!r}"
            )
        channels, _, _ = check_image(f"resnet{depth} (stem={stem})", input_shape, 17 if stem == "imagenet" else 5)
        norm: Callable[[int], nn.Module] = BatchNorm if groups is None else partial(nn.GroupNorm, groups)

        size, stride = (7, 2) if stem == "imagenet" else (3, 1)
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        layers["conv"] = nn.Conv2d(channels, width, size, stride, padding=size // 2, bias=False)
        layers["norm"] = norm(width)
        layers["relu"] = nn.ReLU()
        if stem == "imagenet":
            layers["pool"] = nn.MaxPool2d(3, 2, padding=1)
        inputs = width
        for stage, count in enumerate(STAGES[depth]):
            outputs = width << stage
            for i in range(count):
                name = f"block{sum(STAGES[depth][:stage]) + i + 1}"
                layers[name] = BasicBlock(inputs, outputs, 2 if stage > 0 and i == 0 else 1, norm)
                inputs = outputs
        layers["average"] = nn.AdaptiveAvgPool2d(1)  # to 1x1: a mean, the same bits every time on a GPU too
        layers["flatten"] = nn.Flatten()
        super().__init__(nn.Sequential(layers), inputs, num_classes)
        if init == "he_normal":
            draw_he(self)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with norms, and the input added before the last ReLU.

    Args:
        inputs: Channels of the input.
        outputs: Channels of the output.
        stride: Of the first convolution.
        norm: Makes a norm of so many channels.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = norm(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``[B, outputs, H / stride, W / stride]`` of maps ``[B, inputs, H, W]``."""
        # In place where no one else can see the tensor, and no gradient needs it: a norm's output.
        out: Tensor = self.norm1(self.conv1(x)).relu_()
        out = self.norm2(self.conv2(out))
        out += self.shortcut(x)
        return out.relu_()


class BatchNorm(nn.BatchNorm2d):
    """`nn.BatchNorm2d` that says what to do where there is nothing to take a mean of."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalised maps, ``[B, C, H, W]``.

        Raises:
            DataError: In training, one number per channel.
        """
        if self.training and x.shape[0] * x.shape[2] * x.shape[3] == 1:
            raise DataError(
                "batch norm cannot train on one number per channel, but a batch of one example has maps of 1x1 "
                f"({self.num_features} channels) here; set client.drop_last=true if it is the last of an epoch, raise "
                "client.batch_size, take larger images, or group norm (model.groups=2)"
            )
        return super().forward(x)


def draw_he(module: nn.Module) -> None:
    """Draws the weights of convolutions anew from He's normal distribution, scaled by the number of outputs.

    Source: He et al., 2015, section 2.2, https://arxiv.org/abs/1502.01852; as ImageNet code commonly has it.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

"""Networks that benchmarks of other simulators use and fedsim has no config for."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from fedsim.models.standard import Classifier, check_image


class PflCNN(Classifier):
    """The CNN of pfl-research's CIFAR-10 benchmark; 1,626,442 parameters for 32x32x3 and 10 classes.

    Source: ``simple_cnn`` of https://github.com/apple/pfl-research, benchmarks (Granqvist et al., 2024,
    https://arxiv.org/abs/2404.06430, appendix). Two 3x3 convolutions of 32 and 64 channels without padding, each with
    ReLU, 2x2 max pooling, dropout of 1/4, 128 ReLU units, dropout of 1/2; weights by Xavier's uniform rule.

    Args:
        input_shape: ``(channels, height, width)``, at least 6x6.
        num_classes: Number of classes.
        dropout: Whether there is any.
    """

    def __init__(self, input_shape: Sequence[int], num_classes: int, dropout: bool = True) -> None:
        channels, height, width = check_image("PflCNN", input_shape, 6)
        flat = 64 * ((height - 4) // 2) * ((width - 4) // 2)
        layers = [
            *(nn.Conv2d(channels, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2)),
            *([nn.Dropout(0.25)] if dropout else []),
            *(nn.Flatten(), nn.Linear(flat, 128), nn.ReLU()),
            *([nn.Dropout(0.5)] if dropout else []),
        ]
        super().__init__(nn.Sequential(*layers), 128, num_classes)
        for layer in self.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(layer.weight)

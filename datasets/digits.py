"""Digits: 1,797 images of hand-written digits, 8x8, part of the package: small enough to run anywhere at once.

Source: E. Alpaydin and C. Kaynak, 1998, *Optical Recognition of Handwritten Digits*, UCI Machine Learning
Repository, https://doi.org/10.24432/C50P49; its test part, as scikit-learn distributes it (``load_digits``).
Terms: CC BY 4.0. Changes: kept as 8-bit integers in a compressed NumPy file, ``digits.npz``.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fedsim.data import Dataset, Split
from fedsim.errors import DataError

FILE = Path(__file__).with_name("digits.npz")
SHA256 = "b2dab7b501728c22e9119ad76740b2e17c77a231e42d1e592380d90886f1a05e"


@dataclass(frozen=True)
class Digits:
    """The digits, with a fixed split: of every class, each fifth image in source order is for testing.

    The split is stratified and the same for every seed: 1,442 training and 355 test images. Images are uint8
    ``[N, 1, 8, 8]``: the source's 0..16 times 255/16, rounded.
    """

    def load(self, seed: int) -> Dataset:
        """Reads the file that came with the package.

        Args:
            seed: Not used; nothing is random.

        Raises:
            DataError: The file is missing or not what it was.
        """
        try:
            content = FILE.read_bytes()
        except OSError as exc:
            raise DataError(f"data=digits needs {FILE}, which cannot be read ({exc}); install fedsim again") from exc
        found = hashlib.sha256(content).hexdigest()
        if found != SHA256:
            raise DataError(f"{FILE} is damaged: its SHA-256 is {found}, not {SHA256}; install fedsim again")
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            images, labels = file["images"].astype(np.int64), file["labels"].astype(np.int64)

        x = torch.from_numpy(((images * 255 + 8) // 16).astype(np.uint8))[:, None]
        y = torch.from_numpy(labels)
        test = np.zeros(len(labels), dtype=bool)
        for digit in range(10):
            test[np.flatnonzero(labels == digit)[4::5]] = True
        train_rows, test_rows = (torch.from_numpy(np.flatnonzero(rows)) for rows in (~test, test))
        return Dataset(
            name="digits",
            train=Split(x[train_rows], y[train_rows]),
            test=Split(x[test_rows], y[test_rows]),
            class_names=tuple("0123456789"),
            mean=(0.3052,),  # of the training images
            std=(0.3760,),
        )

"""Images: labelled image sets of the Hugging Face hub, or of a folder with the hub's Parquet files.

All images of a set must have one size, or are given one (``size``). They are decoded once, into uint8
``[N, channels, height, width]``, and kept in memory as a whole (CIFAR-10: 184 MB) and on disk (see
`fedsim.datasets.cache`), from where the next run maps them without importing ``datasets``.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim.data import Dataset, IntArray, Partition, Split, hold_out
from fedsim.datasets import cache
from fedsim.datasets.checks import check_float, check_int
from fedsim.errors import ConfigError, DataError, did_you_mean
from fedsim.random import numpy_generator

FORMAT = 1  # of what is cached; raise it whenever decoding changes


@dataclass(frozen=True)
class Images:
    """One labelled image set.

    Attributes:
        path: Name on the hub, such as ``ylecun/mnist``.
        config: The hub's configuration of it; null: the default.
        revision: Commit or tag on the hub; null: what is current when the set is first loaded.
        root: null: the hub. A folder: the Parquet files in ``<root>/<path>/<config>/``, ``<root>/<path>/`` or
            ``<root>/``, named ``<split>-*.parquet`` as on the hub; no network is needed.
        image: Column of the images.
        label: Column of the classes (a ``ClassLabel``).
        train_split: Name of the split to train on.
        test_split: Name of the split to test on; null: a part of ``train_split``, see ``test_fraction``.
        test_fraction: Where the set has no split to test on: the share of the training examples that is taken for
            testing, in (0, 1), and null otherwise. It is drawn at random by the run's seed, separately from every
            value of the (first) natural key, or from every class where there is none: of n examples
            ``min(round(test_fraction * n), n - 1)``.
        keys: Natural keys of the training examples: name to column. Values that are strings
            become 0, 1, ... in their sorted order.
        size: Height and width that images are resized to (bilinear, by Pillow, as they are decoded); null: as they are.
        mean: Per-channel mean of images scaled to [0, 1]; null: measured on all of ``train_split``, resized.
        std: Per-channel standard deviation, like ``mean``.
        max_train: Use a random sample of this many training examples; null: all.
        max_test: Use a random sample of this many test examples; null: all.
    """

    path: str
    config: str | None = None
    revision: str | None = None
    root: str | None = None
    image: str = "image"
    label: str = "label"
    train_split: str = "train"
    test_split: str | None = "test"
    test_fraction: float | None = None
    keys: Mapping[str, str] = field(default_factory=dict)
    size: int | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    max_train: int | None = None
    max_test: int | None = None

    def __post_init__(self) -> None:
        for name in ("path", "config", "revision", "root", "image", "label", "train_split", "test_split"):
            value = getattr(self, name)
            if value is None and name in ("config", "revision", "root", "test_split"):
                continue
            if not isinstance(value, str) or not value:
                raise ConfigError(f"data.{name} must be a name, got {value!r}")
        if self.test_fraction is not None:
            check_float("data.test_fraction", self.test_fraction, 0.0, 1.0, "the share of examples to test on, or null")
        if (self.test_split is None) == (self.test_fraction is None):
            raise ConfigError(
                "give one of data.test_split and data.test_fraction and set the other to null; got "
                f"data.test_split={self.test_split} data.test_fraction={self.test_fraction}"
            )
        if self.size is not None:
            check_int("data.size", self.size, 1, "height and width of the images, or null to leave them as they are")
        if not isinstance(self.keys, Mapping) or not all(isinstance(c, str) for c in self.keys.values()):
            raise ConfigError(f"data.keys must map names to columns, such as {{writer: writer_id}}, got {self.keys!r}")
        object.__setattr__(self, "keys", dict(self.keys))
        for name, low in (("mean", -math.inf), ("std", 0.0)):
            object.__setattr__(self, name, _channels(f"data.{name}", getattr(self, name), low))
        if (self.mean is None) != (self.std is None) or len(self.mean or ()) != len(self.std or ()):
            raise ConfigError(f"data.mean={self.mean} and data.std={self.std} must be both null or equally long")
        for name in ("max_train", "max_test"):
            if getattr(self, name) is not None:
                check_int(f"data.{name}", getattr(self, name), 1, "a number of examples, or null for all")

    def load(self, seed: int) -> Dataset:
        """Decodes the set, or takes what was decoded before.

        Args:
            seed: The run's seed; it chooses the sample if ``max_train`` or ``max_test`` is set, and the examples to
                test on if ``test_fraction`` is.

        Raises:
            DataError: Files, columns or splits are missing or damaged, or are not labelled images of one size; or
                ``test_fraction`` is too little.
        """
        files = None if self.root is None else self._files(Path(self.root).expanduser())
        name, key = self.path.rstrip("/").rsplit("/", 1)[-1], self._key(files)
        found = cache.read(name, key)
        if found is None:
            found = self._decode(files)
            cache.write(name, key, *found)
        tensors, about = found

        channels = tensors["train_x"].shape[1]
        mean, std = self.mean or json.loads(about["mean"]), self.std or json.loads(about["std"])
        if len(mean) != channels:
            raise DataError(f"data.mean={mean} has {len(mean)} numbers, but the images have {channels} channels")
        train: Tensor | slice
        test: Tensor | slice
        if self.test_split is None:
            source, (train, test) = "train", self._cut(tensors, seed)
            train = train[_sample(len(train), self.max_train, seed, "train")]
            test = test[_sample(len(test), self.max_test, seed, "test")]
        else:
            source = "test"
            train = _sample(len(tensors["train_x"]), self.max_train, seed, "train")
            test = _sample(len(tensors["test_x"]), self.max_test, seed, "test")
        return Dataset(
            name=name,
            train=Split(tensors["train_x"][train], tensors["train_y"][train]),
            test=Split(tensors[f"{source}_x"][test], tensors[f"{source}_y"][test]),
            class_names=tuple(json.loads(about["class_names"])),
            mean=tuple(mean),
            std=tuple(std),
            keys={k: tensors[f"key_{k}"][train] for k in self.keys},
        )

    def _cut(self, tensors: dict[str, Tensor], seed: int) -> tuple[Tensor, Tensor]:
        """Rows of the training split to train on, and to test on, in increasing order."""
        assert self.test_fraction is not None
        groups = tensors[f"key_{min(self.keys)}"] if self.keys else tensors["train_y"]
        values, codes = np.unique(groups.numpy(), return_inverse=True)
        owners: IntArray = codes.astype(np.int64)
        rng = numpy_generator(seed, "test split")
        parts = hold_out(Partition.from_owners(owners, len(values)), self.test_fraction, rng)
        train, test = (torch.from_numpy(np.sort(part.indices)) for part in parts)
        if not len(test):
            kind = f"values of '{min(self.keys)}'" if self.keys else "classes"
            raise DataError(
                f"data.test_fraction={self.test_fraction} of each of {len(values)} {kind} with "
                f"{np.bincount(owners).max()} examples or fewer is no test example at all; raise it"
            )
        return train, test

    def _key(self, files: dict[str, list[Path]] | None) -> str:
        """Hash of all that the decoded set depends on."""
        columns = [self.image, self.label, sorted(self.keys.items()), self.size]
        if files is None:
            origin: list[Any] = ["hub", self.path, self.config, self.revision, self.train_split, self.test_split]
        else:
            stats = [(s, str(f.resolve()), f.stat()) for s, of in sorted(files.items()) for f in of]
            origin = [[s, f, stat.st_size, stat.st_mtime_ns] for s, f, stat in stats]
        return hashlib.sha256(json.dumps([FORMAT, columns, origin]).encode()).hexdigest()

    def _files(self, root: Path) -> dict[str, list[Path]]:
        """The Parquet files of every split that is used."""
        own = root / self.path
        configs = [f for f in sorted(own.glob("*")) if _parquet(f)]
        if self.config is not None:
            folders = [own / self.config, own, root]
        elif len(configs) > 1 and not _parquet(own):
            names = ", ".join(f.name for f in configs)
            raise DataError(f"{own} has several configurations; set data.config to one of: {names}")
        else:
            folders = [own, *configs, root]
        splits = next((found for found in map(_parquet, folders) if found), None)
        if splits is None:
            tried = ", ".join(map(str, folders))
            have = f" (configurations there: {', '.join(f.name for f in configs)})" if configs else ""
            raise DataError(
                f"no Parquet files of '{self.path}' under data.root={self.root}: looked for "
                f"{self.train_split}-*.parquet in {tried}{have}; correct data.root, data.path or "
                "data.config, or set data.root=null to load from the Hugging Face hub"
            )
        where = str(next(iter(splits.values()))[0].parent)
        return {split: _whole(splits[_known("split", name, splits, key, where)]) for split, name, key in self._splits()}

    def _splits(self) -> list[tuple[str, str, str]]:
        splits = [("train", self.train_split, "data.train_split"), ("test", self.test_split, "data.test_split")]
        return [(split, name, key) for split, name, key in splits if name is not None]

    def _decode(self, files: dict[str, list[Path]] | None) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Tensors of every split, and what else must be known of them."""
        hub = self._from_hub() if files is None else None
        tensors: dict[str, Tensor] = {}
        names: dict[str, list[str]] = {}
        for split, split_name, _ in self._splits():
            columns = [self.image, self.label, *(self.keys.values() if split == "train" else ())]
            where = f"split '{split_name}' of {self.path}"
            if files is not None:
                table, features = self._from_files(files[split], columns)
            else:
                assert hub is not None
                table, features = self._columns(hub[split], columns, where)
            if table.num_rows == 0:
                raise DataError(f"{where} has no examples")
            names[split] = _class_names(features[self.label], self.label, where)
            tensors[f"{split}_x"] = _images(table.column(self.image), self.image, where, self.size)
            tensors[f"{split}_y"] = _labels(table.column(self.label), len(names[split]), self.label, where)
            if split == "train":
                for key, column in self.keys.items():
                    tensors[f"key_{key}"] = _natural_key(table.column(column), key, column, where)
        if names["train"] != names.get("test", names["train"]):
            raise DataError(
                f"the splits of {self.path} name their classes differently: {names['train']}, {names['test']}"
            )
        shapes = [tuple(tensors[f"{split}_x"].shape[1:]) for split in names]
        if shapes[0] != shapes[-1]:
            raise DataError(
                f"{self.path}: training images are {shapes[0]}, test images {shapes[1]}; "
                "set data.size, which resizes all, or make them one size first"
            )
        mean, std = _moments(tensors["train_x"])
        about = {"class_names": names["train"], "mean": mean, "std": std}
        return tensors, {k: json.dumps(v) for k, v in about.items()}

    def _from_files(self, files: list[Path], columns: list[str]) -> tuple[Any, Any]:
        """Columns of a split's files: an Arrow table, and the features by column."""
        import pyarrow as pa
        import pyarrow.parquet as pq
        from datasets import Features

        tables, features = [], None
        for path in files:
            try:
                file = pq.ParquetFile(path)
                features = Features.from_arrow_schema(file.schema_arrow)
                for column, key in self._column_keys(columns):
                    _known("column", column, features, key, str(path))
                tables.append(file.read(columns=list(dict.fromkeys(columns))))
            except (pa.ArrowException, OSError) as exc:
                line = str(exc).splitlines()[0] if str(exc) else type(exc).__name__
                raise DataError(f"{path} is damaged or no Parquet file ({line}); fetch it again") from exc
        try:
            return pa.concat_tables(tables), features
        except pa.ArrowException as exc:
            raise DataError(f"the files {files[0]} to {files[-1].name} have different columns ({exc})") from exc

    def _from_hub(self) -> dict[str, Any]:
        """Every split as the hub's library loads it."""
        import datasets

        datasets.disable_progress_bars()
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries; what they end in is said below
        try:
            loaded = datasets.load_dataset(self.path, self.config, revision=self.revision)
        except Exception as exc:  # no network, no such set, a gated set, a broken one: the library's reason is the best
            line = str(exc).splitlines()[0] if str(exc) else ""
            raise DataError(
                f"data.path='{self.path}' (data.config={self.config}) could not be loaded from the Hugging Face hub "
                f"({type(exc).__name__}: {line}); check the name and the network, or set data.root to a folder "
                "that has its Parquet files"
            ) from exc
        return {split: loaded[_known("split", name, loaded, key, self.path)] for split, name, key in self._splits()}

    def _columns(self, split: Any, columns: list[str], where: str) -> tuple[Any, Any]:
        for column, key in self._column_keys(columns):
            _known("column", column, split.features, key, where)
        return split.select_columns(list(dict.fromkeys(columns))).with_format("arrow")[:], split.features

    def _column_keys(self, columns: list[str]) -> list[tuple[str, str]]:
        return list(zip(columns, ["data.image", "data.label", *(f"data.keys.{k}" for k in self.keys)], strict=False))


def _channels(key: str, value: Any, low: float) -> tuple[float, ...] | None:
    if value is None:
        return None
    numbers = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else ()
    good = all(isinstance(v, int | float) and math.isfinite(v) and v > low for v in numbers)
    if not numbers or not good:
        above = " above 0" if low == 0 else ""
        raise ConfigError(f"{key} must be a list of numbers{above}, one per channel, or null, got {value!r}")
    return tuple(float(v) for v in numbers)


def _parquet(folder: Path) -> dict[str, list[Path]]:
    """Parquet files of a folder, or of ``data/`` in it, by split."""
    splits: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*.parquet")) or sorted(folder.glob("data/*.parquet")):
        splits.setdefault(re.sub(r"-\d+-of-\d+$", "", path.stem), []).append(path)
    return splits


def _whole(files: list[Path]) -> list[Path]:
    """The files of one split, if none of ``<split>-00000-of-00003.parquet`` and so on is missing."""
    match = re.search(r"-of-(\d+)$", files[0].stem)
    if match and len(files) != int(match[1]):
        have = ", ".join(f.name for f in files)
        raise DataError(
            f"{files[0].parent} needs {int(match[1])} files of a split, but has only {have}; fetch the others"
        )
    return files


def _known(what: str, name: str, known: Mapping[str, Any], key: str, where: str) -> str:
    if name not in known:
        have = ", ".join(known)
        raise DataError(f"{key}='{name}' is no {what} of {where}{did_you_mean(name, known)}; it has: {have}")
    return name


def _class_names(feature: Any, column: str, where: str) -> list[str]:
    names = getattr(feature, "names", None)  # of a ClassLabel
    if not names:
        raise DataError(
            f"data.label='{column}' of {where} has no class names (it is {feature}, not a ClassLabel); "
            "name another column, or store it with datasets' cast_column(..., ClassLabel(names=[...]))"
        )
    return list(names)


def _labels(column: Any, num_classes: int, name: str, where: str) -> Tensor:
    labels = column.fill_null(-1).to_numpy()
    bad = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(bad):
        raise DataError(
            f"{len(bad)} labels of {where} (data.label='{name}') are missing or not in 0..{num_classes - 1}, "
            f"the first in row {bad[0]}; a split without labels cannot be used"
        )
    return torch.from_numpy(labels.astype(np.int64))


def _natural_key(column: Any, key: str, name: str, where: str) -> Tensor:
    import pyarrow.types as types

    if column.null_count:
        raise DataError(f"data.keys.{key}='{name}': {column.null_count} rows of {where} have no value")
    if types.is_integer(column.type):
        return torch.from_numpy(column.to_numpy().astype(np.int64))
    if types.is_string(column.type) or types.is_large_string(column.type):
        return torch.from_numpy(np.unique(np.array(column.to_pylist()), return_inverse=True)[1].astype(np.int64))
    raise DataError(f"data.keys.{key}='{name}' of {where} must hold strings or whole numbers, not {column.type}")


def _images(column: Any, name: str, where: str, size: int | None) -> Tensor:
    """Decodes a column of encoded images into uint8 ``[N, C, H, W]``, resized if there is a ``size``."""
    from concurrent.futures import ThreadPoolExecutor

    import pyarrow.compute as pc
    import pyarrow.types as types

    paths: list[str | None] = [None] * len(column)
    if types.is_struct(column.type) and {"bytes", "path"} <= {f.name for f in column.type}:
        column, paths = pc.struct_field(column, "bytes"), pc.struct_field(column, "path").to_pylist()
    if not types.is_binary(column.type) and not types.is_large_binary(column.type):
        raise DataError(f"data.image='{name}' of {where} must hold encoded images, not {column.type}")
    cells: list[bytes | None] = column.to_pylist()
    first = _pixels(cells[0], paths[0], 0, where, size)
    images = np.empty((len(cells), *first.shape), dtype=np.uint8)

    def decode(start: int) -> None:
        for row in range(start, min(start + 512, len(cells))):
            pixels = _pixels(cells[row], paths[row], row, where, size)
            if pixels.shape != first.shape:
                raise DataError(
                    f"images of {where} must have one size, but row 0 is {first.shape} and row {row} {pixels.shape} "
                    "(channels, height, width); set data.size, which resizes all, or make them one size first"
                )
            images[row] = pixels

    with ThreadPoolExecutor() as pool:  # decoders release the interpreter's lock
        for _ in pool.map(decode, range(0, len(cells), 512)):
            pass
    return torch.from_numpy(images)


def _pixels(
    cell: bytes | None, path: str | None, row: int, where: str, size: int | None
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """One image, ``[C, H, W]``: grey ones have 1 channel, all others 3. Without bytes it is in a file of its own."""
    import io

    from PIL import Image

    if cell is None and path is None:
        raise DataError(f"row {row} of {where} has no image; drop such rows from the data first")
    try:
        with Image.open(str(path) if cell is None else io.BytesIO(cell)) as image:
            if image.mode.startswith(("I", "F")):
                raise DataError(
                    f"row {row} of {where} has more than 8 bits per channel (mode {image.mode}); convert it"
                )
            mode = "L" if image.mode in ("1", "L", "LA") else "RGB"
            decoded: Image.Image = image if image.mode == mode else image.convert(mode)
            if size is not None:
                decoded = decoded.resize((size, size), Image.Resampling.BILINEAR)
            pixels = np.asarray(decoded)
            return pixels[None] if mode == "L" else pixels.transpose(2, 0, 1)
    except (OSError, SyntaxError) as exc:
        raise DataError(f"the image in row {row} of {where} cannot be decoded ({exc}); fetch the data again") from exc


def _moments(x: Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of every channel of uint8 images scaled to [0, 1], from their histograms."""
    means, deviations = [], []
    for channel in range(x.shape[1]):
        counts = np.zeros(256, dtype=np.int64)
        for start in range(0, len(x), 4096):  # in blocks: bincount works on eight-byte copies
            counts += np.bincount(x[start : start + 4096, channel].numpy().ravel(), minlength=256)
        share, value = counts / counts.sum(), np.arange(256) / 255
        mean = float((share * value).sum())
        means.append(mean)
        deviations.append(float(np.sqrt((share * (value - mean) ** 2).sum())) or 1.0)  # a constant channel: any scale
    return means, deviations


def _sample(num_rows: int, wanted: int | None, seed: int, split: str) -> Tensor | slice:
    """Rows of a random sample, in increasing order; all of them (without a copy) if none is asked for."""
    if wanted is None or wanted >= num_rows:
        return slice(None)
    return torch.from_numpy(np.sort(numpy_generator(seed, "sample", split).permutation(num_rows)[:wanted]))

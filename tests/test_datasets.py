"""Data sources: the digits, generated clients, image sets (from small files made here, and real ones if at hand)."""

from __future__ import annotations

import io
import logging
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedsim.data import Clients
from fedsim.datasets import cache, digits
from fedsim.datasets.augment import AUGMENTATIONS, flip, pad_and_crop
from fedsim.datasets.digits import Digits
from fedsim.datasets.images import Images
from fedsim.datasets.synthetic import CACHED_CLIENTS, Synthetic, SyntheticClients
from fedsim.errors import ConfigError, DataError
from fedsim.random import numpy_generator
from tests.real_data import real_data

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# Digits


def test_digits_are_scikit_learns() -> None:
    bunch = pytest.importorskip("sklearn.datasets").load_digits()
    data = Digits().load(0)
    assert (len(data.train), len(data.test), data.num_classes) == (1442, 355, 10)
    x, y = torch.cat([data.train.x, data.test.x]), torch.cat([data.train.y, data.test.y])
    assert (x.dtype, x.shape[1:], y.dtype) == (torch.uint8, (1, 8, 8), torch.int64)
    # Back to 0..16, and to the source's order by way of the pixels and label of every image.
    raw = np.rint(x.numpy().reshape(-1, 64) / 255 * 16)
    mine = sorted([*row.tolist(), label] for row, label in zip(raw, y.tolist(), strict=True))
    theirs = sorted([*row.tolist(), label] for row, label in zip(bunch.data, bunch.target.tolist(), strict=True))
    assert mine == theirs


def test_the_digits_split_is_stratified_and_the_same_for_every_seed() -> None:
    one, other = Digits().load(0), Digits().load(1)
    assert torch.equal(one.test.x, other.test.x)
    train, test = torch.bincount(one.train.y), torch.bincount(one.test.y)
    assert torch.equal(test, (train + test) // 5)


def test_digits_are_standardised_by_their_own_figures() -> None:
    data = Digits().load(0)
    x = data.train.x.double() / 255
    assert abs(x.mean().item() - data.mean[0]) < 1e-4
    assert abs(x.std().item() - data.std[0]) < 2e-4


@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_damaged_digits_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    path = tmp_path / "digits.npz"
    if damage == "changed":
        content = bytearray(digits.FILE.read_bytes())
        content[1000] ^= 1
        path.write_bytes(content)
    monkeypatch.setattr(digits, "FILE", path)
    with pytest.raises(DataError, match=r"digits\.npz.*install fedsim again"):
        Digits().load(0)


# Synthetic


def population(seed: int = 0, **options: Any) -> SyntheticClients:
    clients = Synthetic(**options).load(seed).clients
    assert isinstance(clients, SyntheticClients)
    return clients


def inputs(clients: Clients, client: int) -> torch.Tensor:
    shard = clients.train(client)
    return shard.x[shard.rows]


def test_a_clients_data_depend_on_the_seed_and_its_number_only() -> None:
    a, b, other = population(1, num_clients=20), population(1, num_clients=20), population(2, num_clients=20)
    b.train(19)
    for client in (5, 19, 0):
        assert torch.equal(inputs(a, client), inputs(b, client))
        assert torch.equal(a.heldout(client).y, b.heldout(client).y)
    assert not torch.equal(inputs(a, 0)[:40], inputs(other, 0)[:40])
    assert not torch.equal(inputs(a, 0)[:40], inputs(a, 1)[:40])


def test_a_pickled_population_is_small_and_the_same() -> None:
    clients = population(3, num_clients=1000)
    clients.train(7)
    blob = pickle.dumps(clients)
    assert len(blob) < 2000
    copy: SyntheticClients = pickle.loads(blob)
    np.testing.assert_array_equal(copy.sizes(), clients.sizes())
    assert torch.equal(inputs(copy, 7), inputs(clients, 7))


def test_sizes_train_and_heldout_agree() -> None:
    clients = population(num_clients=40, min_size=30, max_size=200, heldout=0.25)
    sizes = clients.sizes()
    assert len(clients) == len(sizes) == 40
    for client in range(40):
        train, held = clients.train(client), clients.heldout(client)
        total = len(train) + len(held)
        assert len(train) == sizes[client]
        assert len(held) == round(0.25 * total)
        assert 30 <= total <= 200
        assert sorted([*train.rows.tolist(), *held.rows.tolist()]) == list(range(total))
        assert (train.x.dtype, train.y.dtype) == (torch.float32, torch.int64)
    assert sizes.max() == 150  # 200 less a quarter: with 40 log-normal sizes some are capped
    for client in (-1, 40):
        with pytest.raises(IndexError):
            clients.train(client)


def test_sizes_are_log_normal() -> None:
    k = 40_000
    sizes = SyntheticClients(Synthetic(num_clients=k, min_size=10, max_size=None, heldout=1e-9), 0).sizes() - 10
    # floor(exp(4 + 2 z)) <= 54 where exp(4 + 2 z) < 55.
    for bound in (54, 400):
        p = 0.5 * (1 + math.erf((math.log(bound + 1) - 4) / 2 / math.sqrt(2)))
        assert abs((sizes <= bound).mean() - p) < 5 * math.sqrt(p * (1 - p) / k)


def test_a_large_population_is_generated_when_touched() -> None:
    data = Synthetic(num_clients=1_000_000).load(0)
    clients = data.clients
    assert isinstance(clients, SyntheticClients)
    assert len(clients.sizes()) == 1_000_000
    assert len(clients._cache) == 100  # the test clients
    assert (len(data.train), data.num_classes, data.train.x.shape[1:]) == (0, 10, (60,))
    for client in range(CACHED_CLIENTS + 10):
        clients.train(client)
    assert len(clients._cache) == CACHED_CLIENTS


def test_the_test_set_is_pooled_from_evenly_spread_clients() -> None:
    data = Synthetic(num_clients=9, test_clients=3).load(0)
    assert data.clients is not None
    held = [data.clients.heldout(client) for client in (0, 3, 6)]
    assert torch.equal(data.test.x, torch.cat([h.x[h.rows] for h in held]))
    assert torch.equal(data.test.y, torch.cat([h.y[h.rows] for h in held]))


def test_inputs_have_the_variances_of_the_paper_and_no_correlation() -> None:
    n = 20_000
    x = inputs(population(num_clients=1, min_size=n, max_size=n, heldout=1e-4), 0).double()
    expected = torch.arange(1, 61, dtype=torch.float64) ** -1.2
    assert ((x.var(dim=0) / expected - 1).abs() < 5 * math.sqrt(2 / n)).all()
    correlation = torch.corrcoef(x.T) - torch.eye(60)
    assert correlation.abs().max() < 5.5 / math.sqrt(n)


def test_centres_of_clients_spread_by_beta() -> None:
    # v_kj ~ N(B_k, 1), B_k ~ N(0, beta^2): the last feature hardly varies inside a client (60^-1.2 = 0.007).
    k, beta = 500, 2.0
    clients = population(num_clients=k, beta=beta, max_size=50)
    means = np.array([inputs(clients, c)[:, -1].double().mean() for c in range(k)])
    variance = beta**2 + 1 + 60**-1.2 / 45
    assert abs(means.mean()) < 5 * math.sqrt(variance / k)
    assert abs(means.var() / variance - 1) < 5 * math.sqrt(2 / k)


def test_iid_clients_share_one_model_and_one_distribution() -> None:
    clients = population(4, num_clients=5, iid=True, alpha=3.0, beta=3.0)
    shared = numpy_generator(4, "synthetic", "shared")
    weight, bias = shared.normal(size=(60, 10)), shared.normal(size=10)
    for client in range(5):
        shard = clients.train(client)
        logits = shard.x.double().numpy() @ weight + bias
        assert (
            logits.argmax(axis=1) == shard.y.numpy()
        ).mean() > 0.99  # inputs were rounded to float32 after labelling
        error = shard.x.double().mean(dim=0) * torch.arange(1, 61) ** 0.6 * math.sqrt(len(shard.x))
        assert error.abs().max() < 5  # mean 0


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"num_clients": 0}, "num_clients"),
        ({"num_clients": 1.5}, "num_clients"),
        ({"alpha": -1.0}, "alpha"),
        ({"beta": math.nan}, "beta"),
        ({"iid": "yes"}, "iid"),
        ({"min_size": 0}, "min_size"),
        ({"max_size": 49}, "max_size"),
        ({"heldout": 0.0}, "heldout"),
        ({"heldout": 1.0}, "heldout"),
        ({"test_clients": 0}, "test_clients"),
    ],
)
def test_impossible_synthetic_options_are_refused(options: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=rf"data\.{key}"):
        Synthetic(**options)


def test_a_test_set_of_nothing_is_refused() -> None:
    with pytest.raises(DataError, match=r"data\.heldout=0\.01"):
        Synthetic(num_clients=3, min_size=2, max_size=2, heldout=0.01).load(0)


# Images, from files made here


def png(pixels: np.ndarray[Any, Any], kind: str = "PNG") -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **({"lossless": True} if kind == "WEBP" else {}))
    return buffer.getvalue()


def random_images(n: int, *shape: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8)


def make_split(cells: list[Any], labels: list[Any], classes: list[str] | None = None, **columns: list[Any]) -> Any:
    import datasets

    rows = {"image": [None if c is None else {"bytes": c, "path": None} for c in cells], "label": labels, **columns}
    types = {"image": datasets.Image()}
    types["label"] = datasets.ClassLabel(names=classes) if classes else datasets.Value("int64")
    for name, values in columns.items():
        types[name] = datasets.Value("string" if isinstance(values[0], str) else "int64")
    return datasets.Dataset.from_dict(rows, features=datasets.Features(types))


def write(folder: Path, train: Any, test: Any, train_name: str = "train-00000-of-00001.parquet") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, split in ((train_name, train), ("test-00000-of-00001.parquet", test)):
        split.to_parquet(folder / name)
    return folder


@pytest.fixture
def grey(tmp_path: Path) -> tuple[Path, np.ndarray[Any, Any], list[int]]:
    """A folder in the hub's layout, its 12 training images and their labels; 5 test images."""
    import datasets

    datasets.disable_progress_bars()
    train, labels = random_images(12, 6, 5), [i % 3 for i in range(12)]
    writers = [f"w{i}" for i in (10, 9, 10, 2, 2, 9, 9, 9, 10, 2, 2, 2)]
    classes = ["a", "b", "c"]
    write(
        tmp_path / "hub" / "me" / "set" / "plain",
        make_split([png(p) for p in train], labels, classes, writer_id=writers, page=[i + 40 for i in range(12)]),
        make_split([png(p) for p in random_images(5, 6, 5, seed=1)], [0, 1, 2, 0, 1], classes),
    )
    return tmp_path / "hub", train, labels


def test_images_are_decoded_exactly(grey: tuple[Path, Any, list[int]]) -> None:
    root, train, labels = grey
    data = Images(path="me/set", config="plain", root=str(root), keys={"writer": "writer_id", "page": "page"}).load(0)
    assert data.name == "set"
    assert data.class_names == ("a", "b", "c")
    np.testing.assert_array_equal(data.train.x.numpy(), train[:, None])
    assert data.train.y.tolist() == labels
    assert (len(data.test), data.train.y.dtype) == (5, torch.int64)
    assert data.keys["writer"].tolist() == [0, 2, 0, 1, 1, 2, 2, 2, 0, 1, 1, 1]  # w10, w2, w9 in sorted order
    assert data.keys["page"].tolist() == list(range(40, 52))  # whole numbers stay
    np.testing.assert_allclose(data.mean, (train / 255).mean(), rtol=1e-12)
    np.testing.assert_allclose(data.std, (train / 255).std(), rtol=1e-12)


def test_colour_images_are_channels_first(tmp_path: Path) -> None:
    train, test = random_images(4, 5, 7, 3), random_images(2, 5, 7, 3, seed=1)
    splits = [make_split([png(p, "WEBP") for p in x], [0] * len(x), ["one"]) for x in (train, test)]
    data = Images(path="x/y", root=str(write(tmp_path / "set", *splits)), mean=[0.5] * 3, std=[0.25] * 3).load(0)
    np.testing.assert_array_equal(data.train.x.numpy(), train.transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(data.test.x.numpy(), test.transpose(0, 3, 1, 2))
    assert (data.mean, data.std) == ((0.5,) * 3, (0.25,) * 3)


@pytest.mark.parametrize("place", ["me/set/plain", "me/set", "me/set/data", "."])
@pytest.mark.parametrize("config", ["plain", None])
def test_the_folder_may_be_the_root_the_set_or_its_configuration(
    grey: tuple[Path, Any, Any], tmp_path: Path, place: str, config: str | None
) -> None:
    root = tmp_path / "elsewhere"
    (root / place).mkdir(parents=True)
    for file in grey[0].rglob("*.parquet"):
        file.rename(root / place / file.name)
    assert len(Images(path="me/set", config=config, root=str(root)).load(0).train) == 12


def test_a_split_of_several_files_is_read_in_order_and_as_a_whole(grey: tuple[Path, Any, Any]) -> None:
    root, train, _ = grey
    folder = root / "me/set/plain"
    (folder / "train-00000-of-00001.parquet").rename(folder / "train-00000-of-00002.parquet")
    with pytest.raises(DataError, match=r"needs 2 files of a split.*train-00000-of-00002"):
        Images(path="me/set", root=str(root)).load(0)
    more = random_images(3, 6, 5, seed=2)
    last = make_split([png(p) for p in more], [2, 1, 0], ["a", "b", "c"])
    last.to_parquet(folder / "train-00001-of-00002.parquet")
    data = Images(path="me/set", root=str(root)).load(0)
    np.testing.assert_array_equal(data.train.x[:, 0].numpy(), np.concatenate([train, more]))


def test_a_sample_is_seeded_and_keeps_rows_together(grey: tuple[Path, Any, list[int]]) -> None:
    root, train, labels = grey
    options: dict[str, Any] = {"path": "me/set", "root": str(root), "keys": {"page": "page"}, "max_test": 2}
    data = Images(**options, max_train=7).load(0)
    rows = [page - 40 for page in data.keys["page"].tolist()]
    assert len(rows) == 7
    assert rows == sorted(set(rows))
    np.testing.assert_array_equal(data.train.x[:, 0].numpy(), train[rows])
    assert data.train.y.tolist() == [labels[row] for row in rows]
    assert len(data.test) == 2
    again = [Images(**options, max_train=7).load(seed).keys["page"].tolist() for seed in (0, 1, 2)]
    assert again[0] == data.keys["page"].tolist()
    assert again[1] != again[0] or again[2] != again[0]
    assert len(Images(**options, max_train=100).load(0).train) == 12


# Images, resized


def resized(channel: np.ndarray[Any, Any], size: int) -> np.ndarray[Any, Any]:
    """One side after the other: a triangle as wide as two old pixels or two new ones, whichever is more."""
    for axis in (1, 0):
        n = channel.shape[axis]
        scale = n / size
        centres, places = (np.arange(size) + 0.5) * scale, np.arange(n) + 0.5
        weights = np.maximum(1 - np.abs(places - centres[:, None]) / max(scale, 1.0), 0.0)
        weights /= weights.sum(axis=1, keepdims=True)
        channel = np.moveaxis(np.tensordot(weights, channel, axes=(1, axis)), 0, axis)
    return channel


@pytest.mark.parametrize("size", [3, 5, 6, 11])
def test_images_are_resized_bilinearly(tmp_path: Path, size: int) -> None:
    train, test = random_images(4, 6, 10, 3), random_images(2, 6, 10, 3, seed=1)
    root = write(tmp_path / "set", *(make_split([png(p) for p in x], [0] * len(x), ["one"]) for x in (train, test)))
    data = Images(path="x/y", root=str(root), size=size).load(0)
    assert data.train.x.shape == (4, 3, size, size)
    for images, split in ((train, data.train), (test, data.test)):
        for image, got in zip(images, split.x, strict=True):
            for c in range(3):
                # Pillow rounds to whole numbers after each side.
                np.testing.assert_allclose(got[c].numpy(), resized(image[..., c].astype(float), size), atol=1.01)
    np.testing.assert_allclose(data.mean, data.train.x.numpy().mean(axis=(0, 2, 3)) / 255, rtol=1e-12)


def test_images_of_several_sizes_can_be_resized_to_one(tmp_path: Path) -> None:
    cells = [png(np.full(shape, 7 * shape[0], dtype=np.uint8)) for shape in ((4, 4), (9, 5), (2, 8))]
    write(tmp_path, make_split(cells, [0, 0, 0], ["a"]), make_split(cells[:1], [0], ["a"]))
    data = Images(path="x/y", root=str(tmp_path), size=6).load(0)
    for image, shade in zip(data.train.x, (28, 63, 14), strict=True):
        assert (image == shade).all()  # one shade stays that shade


def test_each_size_has_a_cache_of_its_own(grey: tuple[Path, Any, Any], own_cache: Path) -> None:
    root, train, _ = grey
    for size, shape in ((None, (1, 6, 5)), (4, (1, 4, 4)), (None, (1, 6, 5)), (6, (1, 6, 6)), (4, (1, 4, 4))):
        assert Images(path="me/set", root=str(root), size=size).load(0).train.x.shape[1:] == shape
    assert len(list(own_cache.iterdir())) == 3
    np.testing.assert_array_equal(Images(path="me/set", root=str(root)).load(0).train.x[:, 0].numpy(), train)


# Images, a split to test on where the set has none


@pytest.mark.parametrize("key", ["writer", None])
@pytest.mark.parametrize("fraction", [0.2, 0.34, 0.5, 0.9])
def test_a_part_of_every_writer_or_class_is_for_testing(
    grey: tuple[Path, Any, list[int]], key: str | None, fraction: float
) -> None:
    root, train, labels = grey
    (root / "me/set/plain/test-00000-of-00001.parquet").unlink()
    # `page` is a second key, and another value for each example: the first in the alphabet counts, here `a_writer`.
    keys = {"page": "page", "a_writer": "writer_id"} if key else {}
    options: dict[str, Any] = {"path": "me/set", "root": str(root), "test_split": None, "keys": keys}
    data = Images(**options, test_fraction=fraction).load(0)
    pixels = [image.tobytes() for image in train]
    rows = [[pixels.index(image.numpy().tobytes()) for image in split.x] for split in (data.train, data.test)]
    assert sorted(rows[0] + rows[1]) == list(range(12))
    assert all(row == sorted(row) for row in rows)
    assert [data.train.y.tolist(), data.test.y.tolist()] == [[labels[i] for i in row] for row in rows]
    groups = [0, 2, 0, 1, 1, 2, 2, 2, 0, 1, 1, 1] if key else labels  # w10, w2, w9
    for group in range(3):
        n = groups.count(group)
        assert sum(groups[i] == group for i in rows[1]) == min(round(fraction * n), n - 1)
    if key:
        assert data.keys["a_writer"].tolist() == [groups[i] for i in rows[0]]
        assert data.keys["page"].tolist() == [40 + i for i in rows[0]]


def test_which_examples_are_for_testing_depends_on_the_seed_alone(grey: tuple[Path, Any, Any]) -> None:
    options: dict[str, Any] = {"path": "me/set", "root": str(grey[0]), "test_split": None, "test_fraction": 0.4}
    tests = [Images(**options).load(seed).test.x for seed in (0, 0, 1, 2, 3)]
    assert torch.equal(tests[0], tests[1])
    assert any(not torch.equal(tests[0], other) for other in tests[2:])
    sample = Images(**options, max_train=3, max_test=2, keys={"writer": "writer_id"}).load(0)
    assert (len(sample.train), len(sample.test), len(sample.keys["writer"])) == (3, 2, 3)
    both = torch.cat([sample.train.x, sample.test.x])
    assert len(torch.unique(both, dim=0)) == 5  # no example is in both


def test_every_example_is_for_testing_equally_often(grey: tuple[Path, Any, Any]) -> None:
    root, train, _ = grey
    images = Images(path="me/set", root=str(root), test_split=None, test_fraction=0.5, keys={"writer": "writer_id"})
    times, runs = np.zeros(12), 300
    pixels = [image.tobytes() for image in train]
    for seed in range(runs):
        for image in images.load(seed).test.x:
            times[pixels.index(image.numpy().tobytes())] += 1
    share = np.array([2 / 3, 0.5, 2 / 3, 2 / 5, 2 / 5, 0.5, 0.5, 0.5, 2 / 3, 2 / 5, 2 / 5, 2 / 5])
    assert (np.abs(times / runs - share) < 5 * np.sqrt(share * (1 - share) / runs)).all()


def test_a_test_fraction_of_nothing_is_refused(grey: tuple[Path, Any, Any]) -> None:
    options: dict[str, Any] = {"path": "me/set", "root": str(grey[0]), "test_split": None, "test_fraction": 0.1}
    with pytest.raises(DataError, match=r"data\.test_fraction=0\.1 of each of 3 classes with 4 examples or fewer"):
        Images(**options).load(0)
    with pytest.raises(DataError, match=r"0\.1 of each of 3 values of 'writer' with 5 .*no test example at all"):
        Images(**options, keys={"writer": "writer_id"}).load(0)


# Images, the cache


def test_images_are_decoded_once(grey: tuple[Path, Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    root, train, _ = grey
    images = Images(path="me/set", root=str(root), keys={"page": "page"})
    first = images.load(0)
    with monkeypatch.context() as patch:
        patch.setattr(Images, "_decode", lambda *_: pytest.fail("decoded again"))
        second = images.load(0)
    assert torch.equal(first.train.x, second.train.x)
    assert torch.equal(first.test.y, second.test.y)
    assert torch.equal(first.keys["page"], second.keys["page"])
    assert (first.mean, first.std, first.class_names) == (second.mean, second.std, second.class_names)
    # A changed file is another set.
    changed = make_split([png(255 - p) for p in train], [0] * 12, ["a", "b", "c"], page=[0] * 12)
    changed.to_parquet(root / "me/set/plain/train-00000-of-00001.parquet")
    np.testing.assert_array_equal(images.load(0).train.x[:, 0].numpy(), 255 - train)


@pytest.mark.parametrize("damage", ["truncated", "one bit", "empty", "no cache"])
def test_a_damaged_cache_is_built_again(
    grey: tuple[Path, Any, Any], own_cache: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    root, train, _ = grey
    images = Images(path="me/set", root=str(root))
    images.load(0)
    (file,) = own_cache.iterdir()  # and no temporary file beside it
    content = bytearray(file.read_bytes())
    if damage == "one bit":
        content[-3] ^= 4
    damaged: dict[str, bytes] = {"truncated": bytes(content[:-10]), "empty": b"", "no cache": b"{}" * 40}
    file.write_bytes(damaged.get(damage, bytes(content)))
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(images.load(0).train.x[:, 0].numpy(), train)
    assert "decoding it again" in caplog.text
    caplog.clear()
    images.load(0)
    assert not caplog.records


def test_a_cache_that_cannot_be_written_costs_time_only(
    grey: tuple[Path, Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path / "file"))
    assert len(Images(path="me/set", root=str(grey[0])).load(0).train) == 12
    assert "could not be kept" in caplog.text


def test_the_cache_is_at_home_unless_told_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDSIM_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.folder() == tmp_path / ".cache" / "fedsim"


def test_a_cached_set_loads_without_the_libraries_that_decode_it(grey: tuple[Path, Any, Any]) -> None:
    options: dict[str, Any] = {"path": "me/set", "root": str(grey[0])}
    Images(**options).load(0)
    code = f"""
import sys
import fedsim.datasets.augment, fedsim.datasets.digits, fedsim.datasets.synthetic, fedsim.models.resnet
import fedsim.datasets.dirichlet_balanced, fedsim.datasets.natural, fedsim.datasets.pathological
import fedsim.datasets.quantity, fedsim.datasets.shards
import fedsim.report.partition
from fedsim.datasets.images import Images
assert len(Images(**{options!r}).load(0).train) == 12
heavy = sorted({{"datasets", "pyarrow", "PIL", "matplotlib", "sklearn", "pandas"}} & set(sys.modules))
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})


# Images, refusals


def load(root: Path, **options: Any) -> None:
    Images(**{"path": "me/set", "root": str(root), **options}).load(0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "me/other"}, r"no Parquet files of 'me/other' under data\.root=.*looked for train-\*\.parquet"),
        ({"image": "img"}, r"data\.image='img' is no column of .*train-00000.*it has: image, label, writer_id, page"),
        ({"label": "lable"}, r"data\.label='lable' .*did you mean 'label'"),
        ({"keys": {"user": "user"}}, r"data\.keys\.user='user' is no column"),
        (
            {"train_split": "trian"},
            r"data\.train_split='trian' is no split .*did you mean 'train'.*it has: test, train",
        ),
        ({"test_split": "validation"}, r"data\.test_split='validation' is no split"),
        ({"label": "page"}, r"data\.label='page' .*not a ClassLabel"),
        ({"image": "writer_id"}, r"data\.image='writer_id' .*must hold encoded images, not string"),
        ({"mean": [0.5, 0.5, 0.5], "std": [1.0, 1.0, 1.0]}, r"data\.mean=.* 3 numbers.* 1 channels"),
    ],
)
def test_wrong_names_are_refused_with_the_right_ones(
    grey: tuple[Path, Any, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        load(grey[0], **options)


def test_several_configurations_are_named(grey: tuple[Path, Any, Any]) -> None:
    folder = grey[0] / "me/set"
    (folder / "other").mkdir()
    (folder / "other/train.parquet").write_bytes((folder / "plain/train-00000-of-00001.parquet").read_bytes())
    with pytest.raises(DataError, match=r"set data\.config to one of: other, plain"):
        load(grey[0])
    with pytest.raises(DataError, match=r"configurations there|no Parquet files"):
        load(grey[0], config="missing")
    load(grey[0], config="plain")


@pytest.mark.parametrize("cut", [0, 100, -50])
def test_a_truncated_file_is_named(grey: tuple[Path, Any, Any], cut: int) -> None:
    file = grey[0] / "me/set/plain/train-00000-of-00001.parquet"
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(
        DataError, match=r"train-00000-of-00001\.parquet is damaged or no Parquet file .*fetch it again"
    ):
        load(grey[0])


@pytest.mark.parametrize(
    ("cells", "labels", "message"),
    [
        ([png(random_images(1, 4, 4)[0]), png(random_images(1, 4, 5)[0])], [0, 0], r"one size.*row 1 \(1, 4, 5\)"),
        ([png(random_images(1, 4, 4)[0]), png(random_images(1, 4, 4, 3)[0])], [0, 0], r"one size.*row 1 \(3, 4, 4\)"),
        ([png(random_images(1, 4, 4)[0]), b"not an image"], [0, 0], r"row 1 of split 'train'.*cannot be decoded"),
        ([png(random_images(1, 9, 9)[0])[:-40], png(random_images(1, 9, 9)[0])], [0, 0], r"row 0 .*cannot be decoded"),
        ([png(random_images(1, 4, 4)[0]), None], [0, 0], r"row 1 of .* has no image"),
        ([png(np.ones((4, 4), dtype=np.uint16))], [0], r"row 0 .*more than 8 bits"),
        (
            [png(random_images(1, 4, 4)[0])] * 3,
            [0, -1, None],
            r"2 labels .*missing or not in 0\.\.1, the first in row 1",
        ),
        ([], [], r"split 'train' of me/set has no examples"),
    ],
)
def test_what_is_no_labelled_image_of_one_size_is_refused(
    tmp_path: Path, cells: list[Any], labels: list[Any], message: str
) -> None:
    good = make_split([png(random_images(1, 4, 4)[0])], [0], ["a", "b"])
    write(tmp_path, make_split(cells, labels, ["a", "b"]), good)
    with pytest.raises(DataError, match=message):
        load(tmp_path)


def test_splits_that_do_not_fit_each_other_are_refused(tmp_path: Path) -> None:
    small, large = ([png(random_images(1, n, n)[0])] for n in (4, 5))
    write(tmp_path / "a", make_split(small, [0], ["a", "b"]), make_split(large, [0], ["a", "b"]))
    with pytest.raises(DataError, match=r"training images are \(1, 4, 4\), test images \(1, 5, 5\)"):
        load(tmp_path / "a")
    write(tmp_path / "b", make_split(small, [0], ["a", "b"]), make_split(small, [0], ["b", "a"]))
    with pytest.raises(DataError, match="name their classes differently"):
        load(tmp_path / "b")


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"path": ""}, "path"),
        ({"path": None}, "path"),
        ({"config": 3}, "config"),
        ({"keys": "writer"}, "keys"),
        ({"keys": {"writer": 3}}, "keys"),
        ({"mean": 0.5, "std": 0.5}, "mean"),
        ({"mean": [0.5]}, "mean"),
        ({"mean": [0.5], "std": [0.0]}, "std"),
        ({"mean": [0.5], "std": [0.5, 0.5]}, "mean"),
        ({"test_split": ""}, "test_split"),
        ({"test_split": None}, "test_split and data.test_fraction"),
        ({"test_fraction": 0.1}, "test_split and data.test_fraction"),
        ({"test_split": None, "test_fraction": 1.0}, "test_fraction"),
        ({"test_split": None, "test_fraction": 0}, "test_fraction"),
        ({"size": 0}, "size"),
        ({"size": [24, 24]}, "size"),
        ({"max_train": 0}, "max_train"),
        ({"max_test": 1.5}, "max_test"),
    ],
)
def test_impossible_image_options_are_refused(options: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=rf"data\.{key}"):
        Images(**{"path": "me/set", **options})


# Images of the hub, without a network


def test_a_set_of_the_hub_is_the_same_as_its_files(
    grey: tuple[Path, Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    files = {f.name.split("-")[0]: datasets.Dataset.from_parquet(str(f)) for f in grey[0].rglob("*.parquet")}
    asked = []

    def hub(path: str, config: str | None, revision: str | None) -> Any:
        asked.append((path, config, revision))
        return datasets.DatasetDict(files)

    monkeypatch.setattr(datasets, "load_dataset", hub)
    options: dict[str, Any] = {"path": "me/set", "config": "plain", "keys": {"writer": "writer_id"}}
    here, there = Images(**options, root=str(grey[0])).load(0), Images(**options, revision="abc").load(0)
    assert torch.equal(here.train.x, there.train.x)
    assert torch.equal(here.keys["writer"], there.keys["writer"])
    assert (here.class_names, here.mean) == (there.class_names, there.mean)
    Images(**options, revision="abc").load(0)
    assert asked == [("me/set", "plain", "abc")]  # the second time it came from the cache
    with pytest.raises(DataError, match=r"data\.label='class' is no column of .*it has: image, label"):
        Images(**options, label="class").load(0)
    with pytest.raises(DataError, match=r"data\.test_split='val' is no split of me/set.*it has: t"):
        Images(**options, test_split="val").load(0)


def test_a_set_of_the_hub_may_have_one_split_only(grey: tuple[Path, Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    (file,) = grey[0].rglob("train*.parquet")
    train = datasets.Dataset.from_parquet(str(file))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.DatasetDict({"train": train}))
    keys = {"writer": "writer_id"}
    options: dict[str, Any] = {"path": "me/set", "test_split": None, "test_fraction": 0.5, "keys": keys}
    here, there = Images(**options, root=str(grey[0])).load(3), Images(**options).load(3)
    assert torch.equal(here.train.x, there.train.x)
    assert torch.equal(here.test.x, there.test.x)
    with pytest.raises(DataError, match=r"data\.test_split='test' is no split of me/set.*it has: train"):
        Images(path="me/set").load(0)


def configured(name: str, **options: Any) -> Images:
    """The set of a config file, as the platform builds it."""
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    config: Any = OmegaConf.load(ROOT / "conf" / "data" / f"{name}.yaml")
    for key in CORE["data"]:
        config.pop(key)
    images: Images = instantiate(config, **options, _convert_="all")
    return images


def test_the_configs_name_the_columns_of_the_hub(tmp_path: Path) -> None:
    import datasets

    colour, grey = random_images(4, 32, 32, 3), random_images(10, 28, 28)
    columns = {"img": datasets.Image(), "fine_label": datasets.ClassLabel(100), "coarse_label": datasets.ClassLabel(20)}
    for split in ("train", "test"):
        rows = {"img": [{"bytes": png(p), "path": None} for p in colour], "fine_label": [99, 0, 7, 7]}
        path = tmp_path / "uoft-cs/cifar100/cifar100" / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        table = {**rows, "coarse_label": [0, 19, 1, 1]}
        datasets.Dataset.from_dict(table, features=datasets.Features(columns)).to_parquet(path)
    data = configured("cifar100", root=str(tmp_path)).load(0)
    assert (data.num_classes, data.train.y.tolist(), data.train.x.shape) == (100, [99, 0, 7, 7], (4, 3, 32, 32))
    data = configured("cifar100", root=str(tmp_path), keys={"superclass": "coarse_label"}).load(0)
    assert data.keys["superclass"].tolist() == [0, 19, 1, 1]

    columns = {
        "image": datasets.Image(),
        "writer_id": datasets.Value("string"),
        "hsf_id": datasets.Value("int64"),
        "character": datasets.ClassLabel(62),
    }
    table = {
        "image": [{"bytes": png(p), "path": None} for p in grey],
        "writer_id": ["f0000_14"] * 5 + ["f0001_41"] * 5,
        "hsf_id": [0] * 10,
        "character": list(range(52, 62)),
    }
    path = tmp_path / "flwrlabs/femnist/data/train-00000-of-00001.parquet"
    path.parent.mkdir(parents=True)
    datasets.Dataset.from_dict(table, features=datasets.Features(columns)).to_parquet(path)
    data = configured("femnist", root=str(tmp_path), test_fraction=0.2).load(0)
    assert (data.num_classes, len(data.train), len(data.test)) == (62, 8, 2)
    assert torch.bincount(data.keys["writer"]).tolist() == [4, 4]


def test_images_that_the_hub_left_in_files_of_their_own_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    pixels = random_images(2, 4, 4)
    paths = []
    for i, image in enumerate(pixels):
        paths.append(tmp_path / f"{i}.png")
        paths[-1].write_bytes(png(image))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a"])})
    split = datasets.Dataset.from_dict({"image": [str(p) for p in paths], "label": [0, 0]}, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: {"train": split, "test": split})
    np.testing.assert_array_equal(Images(path="me/set").load(0).train.x[:, 0].numpy(), pixels)


def test_a_hub_out_of_reach_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def hub(*_: Any, **__: Any) -> Any:
        raise ConnectionError("Couldn't reach the Hub\nand more")

    monkeypatch.setattr(datasets, "load_dataset", hub)
    with pytest.raises(DataError, match=r"data\.path='me/set'.*Couldn't reach the Hub\).*set data\.root") as caught:
        Images(path="me/set").load(0)
    assert "\n" not in str(caught.value)


# Real data


def test_femnist_has_its_writers(own_cache: Path) -> None:
    root = real_data("flwrlabs/femnist")
    data = configured("femnist", root=str(root), test_split="test", test_fraction=None).load(0)
    assert (len(data.train), len(data.test), data.num_classes) == (14_708, 1_685, 62)
    sizes = torch.bincount(data.keys["writer"])
    assert [len(sizes), *(int(f(sizes)) for f in (torch.min, torch.median, torch.max))] == [105, 4, 152, 165]
    cut = configured("femnist", root=str(root)).load(0)  # as if there were no split to test on
    held = [min(round(0.1 * n), n - 1) for n in sizes.tolist()]
    assert (len(cut.train), len(cut.test)) == (14_708 - sum(held), sum(held))
    assert torch.equal(torch.bincount(cut.keys["writer"]), sizes - torch.tensor(held))


def test_pneumonia_counts_are_the_published_ones(own_cache: Path) -> None:
    root = real_data("medmnist/pneumoniamnist")
    data = Images(path="medmnist/pneumoniamnist", root=str(root)).load(0)
    assert data.class_names == ("normal", "pneumonia")
    assert torch.bincount(data.train.y).tolist() == [1214, 3494]
    assert torch.bincount(data.test.y).tolist() == [234, 390]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10", "cifar100"])
def test_configured_means_are_those_of_the_images(name: str) -> None:
    config = configured(name)
    assert config.mean is not None and config.std is not None
    data = configured(name, root=str(real_data(config.path)), mean=None, std=None).load(0)
    assert (len(data.test), data.num_classes) == (10_000, 100 if name == "cifar100" else 10)
    np.testing.assert_allclose(data.mean, config.mean, atol=6e-5)
    np.testing.assert_allclose(data.std, config.std, atol=6e-5)
    assert (torch.bincount(data.train.y) >= 50_000 // data.num_classes).all()


# Augmentations


def test_flip_mirrors_half_of_the_images() -> None:
    x = torch.arange(4000 * 2 * 3 * 4, dtype=torch.int32).reshape(4000, 2, 3, 4)
    y = flip(x, AUGMENTATIONS["flip"].draw(len(x), torch.Generator().manual_seed(0)))
    same, mirrored = (y == x).flatten(1).all(1), (y == x.flip(-1)).flatten(1).all(1)
    assert (same ^ mirrored).all()
    assert abs(mirrored.double().mean().item() - 0.5) < 5 * math.sqrt(0.25 / 4000)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_crop_cuts_a_window_out_of_the_padded_image(dtype: torch.dtype) -> None:
    n, pad = 4000, 4
    x = torch.randint(1, 256, (n, 2, 6, 5), generator=torch.Generator().manual_seed(1)).to(dtype)
    y = pad_and_crop(x, AUGMENTATIONS["crop"].draw(n, torch.Generator().manual_seed(0)))
    assert (y.dtype, y.shape) == (x.dtype, x.shape)
    padded = torch.zeros(n, 2, 14, 13, dtype=dtype)
    padded[:, :, pad:-pad, pad:-pad] = x
    matches = torch.stack(
        [(y == padded[:, :, i : i + 6, j : j + 5]).flatten(1).all(1) for i in range(9) for j in range(9)]
    )
    assert (matches.sum(0) == 1).all()  # every window but the right one differs
    share = matches.double().mean(1)
    assert ((share - 1 / 81).abs() < 5 * math.sqrt(1 / 81 * 80 / 81 / n)).all()


@pytest.mark.parametrize("name", sorted(AUGMENTATIONS))
def test_augmentations_depend_on_their_generator_alone_and_leave_their_input(name: str) -> None:
    x = torch.rand(16, 3, 8, 8)
    before = x.clone()
    of = AUGMENTATIONS[name]
    a, b, c = (of.apply(x, of.draw(len(x), torch.Generator().manual_seed(seed))) for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert torch.equal(x, before)


# Configs

CORE: dict[str, dict[str, Any]] = {
    "data": {"augment": [], "validation": 0.0, "imbalance": None},
    "partition": {"holdout": 0.1},
    "model": {"weights": None},
}
"""Keys that the core reads, and takes away before it builds the object."""
CONFIGS = sorted(path for group in CORE for path in (ROOT / "conf" / group).glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_configs_of_data_partitions_and_models_can_be_built(path: Path) -> None:
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    group = path.parent.name
    config: Any = OmegaConf.load(path)
    for key, value in CORE[group].items():
        assert config.pop(key) == value
    if path.stem == "images":
        config.path = "me/set"
    built = instantiate(config, **({"input_shape": (1, 28, 28), "num_classes": 10} if group == "model" else {}))
    assert config._target_.endswith(f".{type(built).__name__}")

"""Presets (`conf/experiment/`): they compose, say what they are, have the published settings, and run."""

from __future__ import annotations

import fnmatch
import io
import math
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fedsim
from fedsim.compose import compose
from fedsim.config import check, options
from tests.cli import ROOT
from tests.test_docs import jobs

PRESETS = options("experiment")
CIFAR = [f"{method}_cifar10_dir{alpha}" for method in ("fedspeed", "fedavg") for alpha in ("0.6", "0.1")]
#: CIFAR-10, 100 clients at 10 %, and 200 at 5 %, of the authors' table: IID, Dirichlet 0.6, 0.3, 0.1.
TABLE = {
    "fedspeed": (["87.31", "86.33", "85.39", "82.26"], ["86.87", "85.07", "83.94", "79.66"]),
    "fedavg": (["82.52", "80.65", "79.75", "77.31"], ["81.09", "79.93", "78.66", "75.21"]),
}
FLIP = [f"autoflip_{data}" for data in ("mnist", "cifar10", "cifar100", "femnist")]
LOGE = ["fedloge_cifar10_lt", "fedloge_cifar100_lt"]
OWN_IMAGES = ["data.path=me/set", "+data.keys.site=site"]
NEEDED = {"fedld_images": OWN_IMAGES, "fedld_images_official": OWN_IMAGES}  # what a preset leaves to the user


def head(name: str) -> str:
    """The comment at the top of a preset, without its marks."""
    lines = PRESETS[name].read_text(encoding="utf-8").splitlines()
    top = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    return "\n".join(line.removeprefix("#") for line in top)


def composed(name: str, *overrides: str) -> Any:
    config = compose([f"experiment={name}", *NEEDED.get(name, []), *overrides])
    check(config)
    return config


def matched(word: str) -> str:
    """An override with the presets that its pattern stands for, if it has one."""
    if not (pattern := re.fullmatch(r"experiment=glob\((.*)\)", word)):
        return word
    found = fnmatch.filter(PRESETS, pattern[1])
    assert found, f"{word} stands for no preset"
    return f"experiment={','.join(found)}"


# What they say


@pytest.mark.parametrize("name", PRESETS)
def test_the_commands_that_a_preset_names_compose(name: str) -> None:
    commands = re.findall(r"^   fedsim (.*)$", head(name), re.MULTILINE)
    assert commands and shlex.split(commands[0])[0] == f"experiment={name}"
    for command in commands:
        for job in jobs([matched(re.sub(r"<\w+>", "x", word)) for word in shlex.split(command)]):
            check(compose([*job, *(o for o in NEEDED.get(name, []) if not any(o.split("=")[0] in j for j in job))]))


@pytest.mark.parametrize(
    "name", [*CIFAR, *LOGE, *FLIP, "fedlex_mnist_pathological", "fedld_images", "fedd2s_cifar10", "fedcompass_mnist"]
)
def test_a_published_preset_says_what_is_published_how_long_it_takes_and_what_differs(name: str) -> None:
    for word in ("Published: ", "Time: ", "Differs from "):
        assert len(re.findall(rf"^ {word}", head(name), re.MULTILINE)) == 1
    page = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
    assert f"`{name}`" in page


def test_every_preset_has_a_row_in_the_page() -> None:
    page = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w.<>]+)` \|", page, re.MULTILINE)
    assert {row for row in rows if "<" not in row} <= set(PRESETS)
    patterns = [re.sub(r"<\w+>", "*", row) for row in rows]
    assert [name for name in PRESETS if not any(fnmatch.fnmatch(name, p) for p in patterns)] == []


@pytest.mark.parametrize("name", CIFAR)
def test_published_numbers_are_those_of_the_authors_table(name: str) -> None:
    method, alpha = name.split("_")[0], name.removeprefix(f"{name.split('dir')[0]}dir")
    hundred, two_hundred = TABLE[method]
    own = hundred[["inf", "0.6", "0.3", "0.1"].index(alpha)]
    text = head(name)
    assert f"Published: {own} %" in text
    rows = [line.split()[-7::2] for line in text.splitlines() if re.search(r"(\d\d\.\d\d \| ){3}", line)]
    assert rows == [hundred, two_hundred]
    page = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
    (line,) = re.findall(rf"^\| `{re.escape(name)}` \|.*$", page, re.MULTILINE)
    assert f" {own} % " in line
    seconds = {"fedspeed": 29.5, "fedavg": 15.9}[method]
    assert f"{seconds} s per round" in text
    assert f"so {seconds * 1000 / 3600:.1f} h" in text and f"{seconds * 1000 / 3600:.1f} h" in line


@pytest.mark.parametrize("path", sorted((ROOT / "conf" / "data").glob("*.yaml")), ids=lambda p: p.stem)
def test_the_commands_at_the_top_of_data_files_compose(path: Path) -> None:
    text = path.read_text(encoding="utf-8").replace("\\\n#", "")
    commands = re.findall(r"fedsim (data=.*)$", text, re.MULTILINE)
    assert commands
    for command in commands:
        words = [re.sub(r"<\w+>", "x", word) for word in shlex.split(command)]
        check(compose(words))


# What they set


@pytest.mark.parametrize("name", CIFAR)
def test_the_cifar_presets_have_the_settings_of_the_table(name: str) -> None:
    config = composed(name)
    client, data = config["client"], config["data"]
    assert (config["rounds"], client["epochs"], client["steps"], client["batch_size"]) == (1000, 5, None, 50)
    assert (client["optimizer"], client["lr"], client["lr_decay"], client["weight_decay"]) == ("sgd", 0.1, 0.998, 1e-3)
    # FedSpeed has the official code's bound of 10 as an option of its own.
    assert (client["momentum"], client["clip_norm"]) == (0.0, None if name.startswith("fedspeed") else 10.0)
    assert (data["mean"], data["std"]) == ([0.491, 0.482, 0.447], [0.247, 0.243, 0.262])
    assert (data["augment"], data["validation"], data["max_train"]) == (["flip", "crop"], 0.0, None)
    assert config["partition"] == {
        "_target_": "fedsim.datasets.dirichlet_refill.DirichletRefill",
        "num_clients": 100,
        "alpha": float(name.partition("dir")[2]),
        "holdout": 0.0,
    }
    assert config["participation"]["_target_"].endswith(".Bernoulli")
    assert config["participation"]["probability"] == 0.1
    if name.startswith("fedspeed"):
        method = config["strategy"]
        assert (method["mu"], method["rho"], method["alpha"]) == (0.1, 0.1, 1.0)
        assert (method["perturbation"], method["clip"], method["clip_norm"]) == ("normalised", "official", 10.0)
        assert method["dual"] == "all"
    else:
        assert config["strategy"]["_target_"].endswith(".FedAvg")


@pytest.mark.parametrize("alpha", ["0.6", "0.1"])
def test_twins_differ_by_the_strategy_and_the_place_of_the_bound_alone(alpha: str) -> None:
    one, other = (composed(f"{method}_cifar10_dir{alpha}") for method in ("fedspeed", "fedavg"))
    one["client"]["clip_norm"] = one["strategy"]["clip_norm"]
    assert {key for key in one if one[key] != other[key]} == {"strategy"}


def test_the_rest_of_the_table_is_reached_by_overrides() -> None:
    block = ["partition.num_clients=200", "participation.probability=0.05", "client.batch_size=25"]
    config = composed("fedspeed_cifar10_dir0.6", "partition.alpha=inf", *block)
    assert (config["partition"]["alpha"], config["partition"]["num_clients"]) == (math.inf, 200)
    fixed = composed("fedavg_cifar10_dir0.1", "participation=fixed", "participation.clients_per_round=10")
    assert fixed["participation"]["_target_"].endswith(".Fixed")


def test_the_fedlex_preset_has_the_settings_of_the_official_example() -> None:
    config = composed("fedlex_mnist_pathological")
    client, method, part = config["client"], config["strategy"], config["partition"]
    assert (config["rounds"], client["epochs"], client["batch_size"], client["optimizer"]) == (200, 5, 350, "adam")
    assert (client["lr"], client["lr_decay"], client["weight_decay"]) == (3e-4, 0.99, 0.0)
    assert (part["num_clients"], part["classes_per_client"], part["holdout"]) == (10, 2, 0.2)
    assert config["participation"]["fraction"] == 0.2
    assert (method["explorers"], method["explore_epochs"], method["patience"], method["beta"]) == (1.0, 150, 40, 0.9)
    assert (config["model"]["hidden"], config["model"]["init"]) == (200, "xavier_normal")
    assert (config["data"]["size"], config["data"]["augment"]) == (24, ["flip"])


def test_the_fedcompass_preset_has_the_settings_of_the_official_scripts() -> None:
    config = composed("fedcompass_mnist")
    client, method, system = config["client"], config["strategy"], config["system"]
    assert (client["optimizer"], client["lr"], client["batch_size"], client["keep_optimizer"]) == (
        "adam",
        1e-3,
        64,
        False,
    )
    assert (method["q_min"], method["q_max"], method["lam"], method["rho"]) == (20, 100, 1.2, 0.9)
    assert (method["alpha"], method["staleness"], method["a"]) == (0.9, "polynomial", 0.5)
    assert (system["seconds_per_step"], system["scale"], system["bin"], system["jitter"]) == (0.15, 0.5, 0.1, 0.05)
    assert (config["partition"]["num_clients"], config["model"]["padding"], config["data"]["size"]) == (5, 0, None)
    assert config["partition"]["_target_"].endswith(".ClassPartition")


@pytest.mark.parametrize(("name", "imbalance", "fraction", "depth"), [(LOGE[0], 50, 1.0, 18), (LOGE[1], 100, 0.3, 34)])
def test_the_fedloge_presets_have_the_published_settings(
    name: str, imbalance: float, fraction: float, depth: int
) -> None:
    config = composed(name)
    client, method, part, model = config["client"], config["strategy"], config["partition"], config["model"]
    assert (config["rounds"], client["epochs"], client["batch_size"]) == (500, 5, 8)
    assert (client["optimizer"], client["lr"], client["momentum"], client["lr_decay"]) == ("sgd", 0.03, 0.5, 1.0)
    assert (client["weight_decay"], client["clip_norm"], client["keep_optimizer"]) == (0.0, None, False)
    assert (method["beta"], method["tau"], method["sse_steps"], method["scale"]) == (0.6, 0.1, 10_000, 1.7)
    assert (method["rule"], method["keep_bias"], method["class_weights"]) == ("realigned+local", True, False)
    assert (part["num_clients"], part["alpha"], part["holdout"]) == (40, 0.5, "test")
    assert part["_target_"].endswith(".Dirichlet")
    assert (config["data"]["imbalance"], config["data"]["augment"]) == (imbalance, ["crop", "flip"])
    assert (model["depth"], model["stem"], model["groups"]) == (depth, "cifar", None)
    assert config["participation"].get("fraction", 1.0) == fraction
    assert config["eval"]["clients"] == "all"


def test_published_numbers_of_fedloge_are_those_of_its_page() -> None:
    # Of each log once in the page of the method; presets and the page of presets repeat them.
    page = (ROOT / "docs" / "methods" / "fedloge.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| CIFAR-10, ([\d.]+), (\d+) \|.* (\S+ / \S+) \|$", page, re.MULTILINE)
    logs = {(alpha, imbalance): numbers for alpha, imbalance, numbers in rows}
    text = head(LOGE[0])
    assert "{} % generic and {} % local".format(*logs["0.5", "50"].split(" / ")) in text
    for override, key in (
        ("data.imbalance=100", ("0.5", "100")),
        ("partition.alpha=1", ("1", "50")),
        ("partition.alpha=1 data.imbalance=100", ("1", "100")),
    ):
        assert re.search(rf"^   {re.escape(override)} +{logs[key]}$", text, re.MULTILINE)
    assert "41.06 / 72.69" in page and "41.06 % generic and 72.69 % local" in head(LOGE[1])
    table = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
    assert "`fedloge_cifar10_lt` | {} % generic, {} % local |".format(*logs["0.5", "50"].split(" / ")) in table
    assert "`fedloge_cifar100_lt` | 41.06 % generic, 72.69 % local |" in table


@pytest.mark.parametrize("name", FLIP)
def test_the_autoflip_presets_have_the_settings_of_the_published_commands(name: str) -> None:
    config = composed(name)
    client, method, part = config["client"], config["strategy"], config["partition"]
    assert (config["rounds"], client["epochs"], client["batch_size"], client["optimizer"]) == (200, 5, 350, "adam")
    assert (client["lr"], client["lr_decay"], client["weight_decay"]) == (3e-4, 0.99, 0.0)
    assert (method["explorers"], method["explore_epochs"], method["patience"], method["beta"]) == (1.0, 150, 40, 0.9)
    assert (method["threshold"], method["rule"]) == (0.3, "quantile")
    assert part["num_clients"] == 20
    fraction, holdout, size, hidden, fc = {
        "autoflip_mnist": (0.25, 0.2, 24, 32, 512),
        "autoflip_cifar10": (0.25, 0.2, 24, 32, 512),
        "autoflip_cifar100": (0.05, 0.2, 24, 128, 512),
        "autoflip_femnist": (0.25, 0.1, None, 64, 2048),
    }[name]
    assert (config["participation"]["fraction"], part["holdout"], config["data"]["size"]) == (fraction, holdout, size)
    assert (config["model"]["hidden"], config["model"]["fc"], config["model"]["init"]) == (hidden, fc, "xavier_normal")
    assert config["data"]["augment"] == ["flip"]
    kind = {"autoflip_cifar100": "DirichletBalanced", "autoflip_femnist": "Natural"}.get(name, "Pathological")
    assert part["_target_"].endswith(f".{kind}")
    assert part.get("classes_per_client", 2) == 2 and part.get("alpha", 1.0) == 1.0


def test_the_fedd2s_preset_has_the_settings_of_its_head() -> None:
    config = composed("fedd2s_cifar10")
    client, method, part = config["client"], config["strategy"], config["partition"]
    assert (config["rounds"], client["epochs"], client["batch_size"]) == (100, 5, 64)
    assert (client["optimizer"], client["lr"], client["momentum"], client["lr_decay"]) == ("sgd", 0.01, 0.9, 1.0)
    assert (method["dropping"], method["stage_rounds"], method["temperature"]) == (None, 20, 3.0)
    assert (method["lam_g"], method["lam_l"], method["server_lr"], method["server_epochs"]) == (1.0, 0.3, 1e-3, 20)
    assert (part["num_clients"], part["alpha"], part["holdout"]) == (20, 0.5, "test")
    assert config["participation"]["fraction"] == 0.5
    assert config["model"]["_target_"].endswith(".Blocks5") and config["eval"]["clients"] == "all"
    assert "reconstruction" in head("fedd2s_cifar10").splitlines()[1]


def test_the_fedld_preset_has_the_published_settings_of_its_clients() -> None:
    config = composed("fedld_images")
    client, method = config["client"], config["strategy"]
    assert (config["rounds"], client["epochs"], client["batch_size"]) == (200, 1, 50)
    assert (client["lr"], client["momentum"], client["weight_decay"]) == (0.01, 0.5, 5e-4)
    assert (client["lr_decay"], client["buffers"]) == (1.0, "frozen")
    assert (method["lam"], method["r"], method["of"], method["reduction"]) == (0.1, 0.8, "probabilities", "batch")
    assert config["participation"]["_target_"].endswith(".All")
    assert (config["data"]["size"], config["model"]["stem"]) == (384, "imagenet")
    official = composed("fedld_images_official")
    assert (method.pop("warmup"), official["strategy"].pop("warmup")) == (0.0, 5.0)
    assert {**official, "name": config["name"]} == config


def test_the_network_of_the_table_has_the_published_size() -> None:
    from hydra.utils import instantiate

    node = {k: v for k, v in composed("fedspeed_cifar10_dir0.6")["model"].items() if k != "weights"}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = instantiate(node, input_shape=(3, 32, 32), num_classes=10)
    sizes = [p.numel() for p in network.parameters()]
    assert f"{sum(sizes) / 1e6:.2f}" == "11.18"
    norms = [m for m in network.modules() if isinstance(m, torch.nn.GroupNorm)]
    assert len(norms) == 20 and {m.num_groups for m in norms} == {2}
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in network.modules())
    first = next(m for m in network.modules() if isinstance(m, torch.nn.Conv2d))
    assert (first.kernel_size, first.stride) == ((7, 7), (2, 2))
    assert sum(isinstance(m, torch.nn.MaxPool2d) for m in network.modules()) == 1
    # By He's rule a k x k convolution to m channels has the expected squared norm 2 n_in: (k k n_in m) 2 / (k k m); a
    # norm's weights are ones, the last layer is uniform in +-1/sqrt(512). Known of the official code: about 112.
    convolutions = [m for m in network.modules() if isinstance(m, torch.nn.Conv2d)]
    squared = sum(2 * m.in_channels for m in convolutions) + sum(m.num_channels for m in norms) + 10 * (512 + 1) / 1536
    norm = torch.cat([p.detach().flatten() for p in network.parameters()]).norm().item()
    assert abs(norm - math.sqrt(squared)) < 0.5
    assert round(norm) == 112


# They run


def images(
    folder: Path, shape: tuple[int, ...], image: str, labels: list[int], label: str = "label", **columns: list[int]
) -> None:
    """Writes a set of random images as Parquet files, the same columns for training and testing."""
    import datasets
    from PIL import Image

    datasets.disable_progress_bars()
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0)
    names = [str(c) for c in range(max(labels) + 1)]
    features = {image: datasets.Image(), label: datasets.ClassLabel(names=names)}
    features |= dict.fromkeys(columns, datasets.Value("int64"))
    for split in ("train", "test"):
        cells = []
        for _ in labels:
            buffer = io.BytesIO()
            Image.fromarray(pixels.integers(0, 256, shape, dtype=np.uint8)).save(buffer, "PNG")
            cells.append({"bytes": buffer.getvalue(), "path": None})
        rows = datasets.Dataset.from_dict(
            {image: cells, label: labels, **columns}, features=datasets.Features(features)
        )
        rows.to_parquet(folder / f"{split}-00000-of-00001.parquet")


TEN = [i % 10 for i in range(200)]
#: Random data for the sets that presets name.
SETS: dict[str, Callable[[Path], None]] = {
    "uoft-cs/cifar10": lambda root: images(root, (32, 32, 3), "img", TEN[:10]),
    "uoft-cs/cifar100": lambda root: images(root, (32, 32, 3), "img", TEN[:10], "fine_label"),
    "ylecun/mnist": lambda root: images(root, (28, 28), "image", TEN),
    "zalando-datasets/fashion_mnist": lambda root: images(root, (28, 28), "image", TEN),
    "flwrlabs/femnist": lambda root: images(
        root, (28, 28), "image", TEN[:60], "character", writer_id=[i // 20 for i in range(60)]
    ),
    "me/set": lambda root: images(root, (50, 60, 3), "image", [0, 1] * 3, site=[0, 0, 1, 1, 2, 2]),
}
ONE_STEP = ["client.epochs=null", "client.steps=1"]
ONE_CLIENT = [*ONE_STEP, "partition.num_clients=1", "participation.probability=1.0"]
#: With one image of every class there is nothing to cut.
LONG_TAIL = [*ONE_STEP, "partition.num_clients=1", "client.batch_size=2", "data.imbalance=1", "strategy.sse_steps=10"]
#: What makes a preset's round small, and leaves its network, method, data and rules as they are.
SMALL = {
    **{name: [*ONE_CLIENT, "client.batch_size=2"] for name in CIFAR},
    **dict.fromkeys(LOGE, LONG_TAIL),
    "fedd2s_cifar10": [*ONE_STEP, "partition.num_clients=2", "strategy.server_epochs=1"],
    "fedlex_mnist_pathological": [*ONE_STEP, "strategy.explore_epochs=1"],
    "fedcompass_mnist": ["strategy.q_min=1", "strategy.q_max=1"],
    "autoflip_mnist": [*ONE_STEP, "strategy.explore_epochs=1", "partition.num_clients=5"],
    "autoflip_cifar10": [*ONE_STEP, "strategy.explore_epochs=1", "partition.num_clients=5", "partition.holdout=0"],
    "autoflip_cifar100": [*ONE_STEP, "strategy.explore_epochs=1", "partition.num_clients=1"],
    "autoflip_femnist": [*ONE_STEP, "strategy.explore_epochs=1", "partition.num_clients=1"],
    **{n: [*ONE_STEP, "data.imbalance=10"] for n in PRESETS if n.startswith("longtail_fashion_mnist")},
    **{n: [*ONE_STEP, "data.imbalance=10", "strategy.sse_steps=10"] for n in PRESETS if n.endswith("mnist_fedloge")},
    **{n: [*ONE_STEP] for n in PRESETS if n.startswith("personal_fashion_mnist")},
    "pruning_fashion_mnist": ONE_STEP,
    "pruning_fashion_mnist_autoflip": [*ONE_STEP, "strategy.explore_epochs=1"],
    "fedld_images": ["data.size=32"],
    "fedld_images_official": ["data.size=32"],
}


#: Presets that differ from another by a number or the strategy.
SIMILAR = [
    n for n in PRESETS if n in (*CIFAR[1:], LOGE[1], *FLIP[1:]) or "_fashion_mnist_" in n or "asynchronous_digits_" in n
]


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in SIMILAR else ()) for n in PRESETS])
def test_a_preset_runs_a_round_on_random_data_of_its_shape(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(fedsim.run.Driver, "_draw", lambda *_: None)
    config = composed(name)
    small = ["rounds=1", "tracker=[jsonl]", f"run_dir={tmp_path}/runs", "checkpoint.every=0", *SMALL.get(name, [])]
    if path := config["data"].get("path"):
        SETS[path](tmp_path / "hub" / path)
        small += [f"data.root={tmp_path}/hub", "data.max_train=null", "data.max_test=null"]
    result = fedsim.simulate([f"experiment={name}", *NEEDED.get(name, []), *small])
    (record,) = result.metrics
    assert record["clients"] >= 1
    assert record["failures"] == 0
    assert math.isfinite(record["train_loss"]) and math.isfinite(record["test_loss"])
    assert torch.isfinite(result.params).all()

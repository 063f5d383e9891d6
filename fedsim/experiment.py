"""From a config to the objects of a run, and `simulate`; the only reader of the config tree."""

from __future__ import annotations

import inspect
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from fedsim import config as conf
from fedsim import random
from fedsim.clients.local import ClientOptions
from fedsim.clients.optimizers import SGD, Adam, AdamW, Optimizer, TorchOptimizer
from fedsim.config import Config
from fedsim.data import Clients, Dataset, Partition, PartitionedClients, Split, hold_out
from fedsim.errors import ConfigError, FedsimError, did_you_mean
from fedsim.program import Program
from fedsim.strategy import ClientHalf, Info, Strategy
from fedsim.vector import Layout, trainable

if TYPE_CHECKING:
    from fedsim.clients.participation import Participation
    from fedsim.clients.systems import System
    from fedsim.run import Result
    from fedsim.tracking import Tracker


@dataclass(frozen=True)
class Experiment:
    """Everything that a run needs, built and checked.

    Attributes:
        config: The resolved config.
        program: Network, data and method.
        participation: Who takes part.
        system: How long it takes.
        trackers: Who is told.
        partition: The partition, or None where clients generate their own data.
        info: What the strategy is told at the start.
    """

    config: Config
    program: Program
    participation: Participation
    system: System
    trackers: tuple[Tracker, ...]
    partition: Partition | None
    info: Info

    @property
    def name(self) -> str:
        """Folder of the run."""
        named: str | None = self.config["name"]
        return named or f"{_short(self.config['strategy'])}-{self.program.dataset.name}".lower()

    def describe(self) -> dict[str, str]:
        """What runs, for people."""
        c, p = self.config, self.program
        rows = {
            "strategy": _fields(c["strategy"]),
            "data": f"{p.dataset.name}, {self._sizes()}",
            "partition": "the data's own clients" if c["partition"] is None else _fields(c["partition"]),
            "model": f"{_short(c['model'])}, {p.layout.d:,} parameters",
            "client": _client(c["client"]),
            "participation": f"{_fields(c['participation'])} of {len(p.clients):,} clients",
            "rounds": str(c["rounds"]),
            "engine": f"{_short(c['engine'])} on {c['engine']['device']}, seed {c['seed']}",
        }
        if p.recipes:
            rows["recipe"] = ", ".join(name for name, _ in p.recipes)
        return rows

    def _sizes(self) -> str:
        p = self.program
        server = f", {len(p.server):,} for validation" if p.server is not None else ""
        return f"{int(p.clients.sizes().sum()):,} examples to train{server}, {len(p.dataset.test):,} to test"


def build(config: Config, explicit: Sequence[str] = ()) -> Experiment:
    """Checks a config and builds what it describes; no training, no run directory.

    Args:
        config: As `fedsim.config.compose` returns it; resolved in place of ``auto``.
        explicit: Keys that the user gave, for messages about what has no effect.

    Raises:
        ConfigError: An impossible value, a plug-in that cannot be built, a model that does not fit the data.
        DataError: Data are missing or damaged, or a partition is impossible.
    """
    conf.check(config)
    config = {**config, "engine": {**config["engine"], "device": _device(config["engine"]["device"])}}
    seed, dtype = config["seed"], getattr(torch, config["precision"])
    strategy = instantiate(config["strategy"], "strategy")
    _require(strategy, Strategy, "strategy")
    recipes = [(name, instantiate(node, f"recipe.{name}")) for name, node in config["recipe"].items()]
    for name, recipe in recipes:
        _require(recipe, ClientHalf, f"recipe.{name}")
    dataset, server, kept = _load_data(config, seed)
    if dataset.clients is not None:
        if given := [k for k in explicit if k.split(".")[0].split("=")[0] == "partition"]:
            raise ConfigError(
                f"{given[0]} has no effect: data={dataset.name} brings its own clients; set data.num_clients instead"
            )
        config["partition"] = None
    clients, partition = _partition(config, dataset, kept, seed)
    module = _model(config, dataset, seed, dtype)
    options = _client_options(config, module)
    program = Program(
        strategy, recipes, module, _on_device(dataset, config), clients, _move(server, config), options, seed
    )
    participation, system = (
        instantiate(config["participation"], "participation"),
        instantiate(config["system"], "system"),
    )
    participation.check(len(clients))
    info = Info(len(clients), dataset.num_classes, program.layout, seed, config["rounds"], config["client"]["lr"])
    trackers = tuple(instantiate(node, f"tracker.{name}") for name, node in config["tracker"].items())
    return Experiment(config, program, participation, system, trackers, partition, info)


def simulate(overrides: Sequence[str] = ()) -> Result:
    """Runs an experiment in this process, like ``fedsim <overrides>``.

    Args:
        overrides: Hydra's grammar, such as ``["strategy=fedprox", "rounds=5"]``.

    Returns:
        Final parameters, metrics and summary.

    Raises:
        FedsimError: With one clear line.
    """
    from fedsim.run import execute

    overrides = list(overrides)
    if any(o.startswith("resume=") and o not in ("resume=null", "resume=") for o in overrides):
        config, run = conf.resume_config(overrides)
        return execute(build(config), run)
    return execute(build(conf.compose(overrides), overrides))


# --- data -------------------------------------------------------------------------------------------------


def _load_data(config: Config, seed: int) -> tuple[Dataset, Split | None, Tensor | None]:
    """The data set, the server's validation split, and the training rows that are left for clients."""
    node = {k: v for k, v in config["data"].items() if k not in ("augment", "validation")}
    source = instantiate(node, "data")
    dataset: Dataset = source.load(seed)
    share = config["data"]["validation"]
    if config["data"]["augment"] and (dataset.clients is not None or dataset.train.x.dim() != 4):
        raise ConfigError(f"data.augment={config['data']['augment']} is for images; {dataset.name} has none")
    if dataset.clients is not None:
        if share:
            raise ConfigError(
                f"data.validation={share} is not available: {dataset.name}'s examples all belong to its clients"
            )
        return dataset, None, None
    n = len(dataset.train)
    num = round(share * n)
    if share and not 0 < num < n:
        raise ConfigError(
            f"data.validation={share} would keep {num} of {n} training examples; keep at least 1 and leave at least 1"
        )
    if not num:
        return dataset, None, None
    order = random.numpy_generator(seed, "validation").permutation(n)
    held, kept = (torch.from_numpy(np.sort(part)) for part in (order[:num], order[num:]))
    return dataset, Split(dataset.train.x[held], dataset.train.y[held]), kept


def _partition(config: Config, dataset: Dataset, kept: Tensor | None, seed: int) -> tuple[Clients, Partition | None]:
    if dataset.clients is not None:
        return dataset.clients, None
    node = {k: v for k, v in config["partition"].items() if k != "holdout"}
    partitioner = instantiate(node, "partition")
    rows = torch.arange(len(dataset.train)) if kept is None else kept
    labels = dataset.train.y[rows].numpy()
    keys = {name: key[rows].numpy() for name, key in dataset.keys.items()}
    part: Partition = partitioner(labels, keys, random.numpy_generator(seed, "partition"))
    part = replace(part, indices=rows.numpy()[part.indices])
    train, held = hold_out(part, config["partition"]["holdout"], random.numpy_generator(seed, "holdout"))
    return PartitionedClients(_move(dataset.train, config) or dataset.train, train, held), part


def _move(split: Split | None, config: Config) -> Split | None:
    device = config["engine"]["device"]
    if split is None or device == "cpu":
        return split
    return Split(split.x.to(device), split.y.to(device))


def _on_device(dataset: Dataset, config: Config) -> Dataset:
    return replace(dataset, test=_move(dataset.test, config) or dataset.test)


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda"):
        count = torch.cuda.device_count()
        if int(name.partition(":")[2] or 0) >= count:
            raise ConfigError(
                f"engine.device={name}: this machine has {count} CUDA devices that torch can use; set engine.device=cpu"
            )
    return name


# --- model and client -------------------------------------------------------------------------------------


def _model(config: Config, dataset: Dataset, seed: int, dtype: torch.dtype) -> nn.Module:
    example = (dataset.clients.train(0).x if dataset.clients is not None else dataset.train.x)[:2]
    outputs = dataset.num_classes or (1 if dataset.train.y.dim() < 2 else dataset.train.y.shape[1])
    node = {k: v for k, v in config["model"].items() if k != "weights"}
    facts = {"input_shape": tuple(example.shape[1:]), "num_classes": outputs}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(random.derive(seed, "model"))
        module = instantiate(node, "model", facts)
        _require(module, nn.Module, "model")
        module = module.to(config["engine"]["device"], dtype)
        _check_outputs(module, example, dataset, config)
    if config["model"]["weights"] is not None:
        _load_weights(module, Path(config["model"]["weights"]))
    return module  # type: ignore[no-any-return]


def _check_outputs(module: nn.Module, example: Tensor, dataset: Dataset, config: Config) -> None:
    """One forward pass of two examples: the model takes the data, and a tensor output fits the classes."""
    dtype = next(module.parameters()).dtype
    x = example.to(
        config["engine"]["device"], dtype if example.dtype == torch.uint8 or example.is_floating_point() else None
    )
    name = _short(config["model"])
    was = module.training
    try:
        with torch.no_grad():
            out = module.eval()(x)
    except Exception as exc:
        first = " ".join(str(exc).split())[:200]
        raise ConfigError(
            f"model {name} cannot take inputs of shape {tuple(example.shape[1:])} ({dataset.name}): {first}"
        ) from exc
    finally:
        module.train(was)
    if dataset.num_classes and isinstance(out, Tensor) and tuple(out.shape) != (len(x), dataset.num_classes):
        raise ConfigError(
            f"model {name} returns shape {tuple(out.shape[1:])} per example, but {dataset.name} has "
            f"{dataset.num_classes} classes; give the model {dataset.num_classes} outputs"
        )


def _load_weights(module: nn.Module, path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except FileNotFoundError as exc:
        raise ConfigError(f"model.weights={path}: no such file") from exc
    except (OSError, SafetensorError) as exc:
        raise ConfigError(f"model.weights={path} is not a readable .safetensors file ({exc})") from exc
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for name, t in trainable(module).items():
        if name not in tensors:
            raise ConfigError(f"model.weights={path} has no tensor '{name}'{did_you_mean(name, tensors)}")
        if tensors[name].shape != t.shape:
            raise ConfigError(
                f"model.weights={path}: '{name}' has shape {tuple(tensors[name].shape)}, the model's is {tuple(t.shape)}"
            )
    for name in tensors:
        if name not in named:
            raise ConfigError(
                f"model.weights={path} has a tensor '{name}' that the model lacks{did_you_mean(name, named)}"
            )
    with torch.no_grad():
        for name, t in tensors.items():
            named[name].copy_(t)


def _client_options(config: Config, module: nn.Module) -> ClientOptions:
    c = dict(config["client"])
    optimizer: Optimizer
    if isinstance(c["optimizer"], Mapping):
        factory = instantiate({"_partial_": True, **c["optimizer"]}, "client.optimizer")
        optimizer = TorchOptimizer(factory, list(Layout.of(module).shapes.values()))
    elif c["optimizer"] == "sgd":
        optimizer = SGD(momentum=c["momentum"], nesterov=c["nesterov"], weight_decay=c["weight_decay"])
    else:
        kind = Adam if c["optimizer"] == "adam" else AdamW
        optimizer = kind(betas=tuple(c["betas"]), eps=c["eps"], weight_decay=c["weight_decay"])
    own = {k: v for k, v in c.items() if k not in ("optimizer", "momentum", "nesterov", "betas", "eps", "weight_decay")}
    return ClientOptions(optimizer, augment=tuple(config["data"]["augment"]), **own)


# --- plug-ins ---------------------------------------------------------------------------------------------


def instantiate(node: Mapping[str, Any], key: str, facts: Mapping[str, Any] | None = None) -> Any:
    """Builds the object that a config node describes (Hydra's ``_target_``).

    Args:
        node: ``_target_`` and keyword arguments.
        key: Where it stands in the config, for messages.
        facts: Further arguments, passed if the target takes them and the node does not give them.

    Raises:
        ConfigError: The target cannot be imported, or refuses its arguments.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import get_object
    from hydra.utils import instantiate as hydra_instantiate

    target = node["_target_"]
    try:
        kind = get_object(target)
    except Exception as exc:
        raise ConfigError(f"{key}._target_={target} cannot be imported: {' '.join(str(exc).split())[:300]}") from exc
    if not callable(kind):
        raise ConfigError(f"{key}._target_={target} is a {type(kind).__name__}, not a class or a function")
    try:
        parameters = inspect.signature(kind).parameters
    except (TypeError, ValueError):
        parameters = {}  # type: ignore[assignment]
    any_name = not parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for name in node:
        if not name.startswith("_") and not any_name and name not in parameters:
            known = [n for n in parameters if n != "self"]
            raise ConfigError(
                f"unknown key '{key}.{name}'{did_you_mean(name, known)}; {target} takes: {', '.join(known) or 'nothing'}"
            )
    extra = {n: v for n, v in (facts or {}).items() if n not in node and (n in parameters or (any_name and parameters))}
    try:
        return hydra_instantiate(dict(node), **extra, _convert_="all")
    except InstantiationException as exc:
        cause: BaseException = exc
        while cause.__cause__ is not None and not isinstance(cause, FedsimError):
            cause = cause.__cause__
        if isinstance(cause, FedsimError):
            raise cause from exc
        raise ConfigError(f"{key} ({target}) cannot be built: {' '.join(str(cause).split())[:300]}") from exc


def _require(thing: object, kind: type, key: str) -> None:
    if not isinstance(thing, kind):
        raise ConfigError(
            f"{key}._target_ must make a {kind.__module__}.{kind.__qualname__}, got a {type(thing).__name__}"
        )


def _short(node: Mapping[str, Any]) -> str:
    return str(node["_target_"]).rpartition(".")[2]


def _fields(node: Mapping[str, Any]) -> str:
    shown = ", ".join(f"{k}={v}" for k, v in node.items() if not k.startswith("_") and v is not None)
    return _short(node) + (f" ({shown})" if shown else "")


def _client(c: Mapping[str, Any]) -> str:
    work = f"{c['epochs']} epochs" if c["epochs"] is not None else f"{c['steps']} steps"
    name = c["optimizer"] if isinstance(c["optimizer"], str) else _short(c["optimizer"])
    return f"{work}, batch {c['batch_size'] or 'of all'}, {name} lr {c['lr']:g}"


def versions() -> dict[str, str]:
    """Versions of what results may depend on."""
    from importlib.metadata import PackageNotFoundError, version

    out = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    for name, package in (("fedsim", "fedsim-ray"), ("hydra", "hydra-core")):
        try:
            out[name] = version(package)
        except PackageNotFoundError:
            out[name] = "not installed"
    out["cpu"] = torch.backends.cpu.get_cpu_capability()
    return out

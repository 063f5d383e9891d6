"""From a config to the objects of a run, and `simulate`; the only reader of the config tree."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from fedsim import batching, random
from fedsim import config as conf
from fedsim.attendance import check_deadline
from fedsim.clients.availability import Always
from fedsim.clients.optimizers import SGD, Adagrad, Adam, AdamW, Optimizer, TorchOptimizer
from fedsim.clients.visit import ClientOptions
from fedsim.compose import requested
from fedsim.config import Config
from fedsim.data import Clients, Dataset, Partition, PartitionedClients, Split, hold_out
from fedsim.errors import ConfigError, did_you_mean, one_line, require
from fedsim.longtail import local_tests, long_tailed
from fedsim.plugins import instantiate, locate, require_kind
from fedsim.program import Program, overrides
from fedsim.strategy import ClientHalf, Info, Strategy
from fedsim.vector import Layout, trainable

if TYPE_CHECKING:
    from fedsim.clients.availability import Availability
    from fedsim.clients.participation import Participation
    from fedsim.clients.systems import System
    from fedsim.engine.base import Engine
    from fedsim.federation import Federation
    from fedsim.memory import Memory
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
        availability: When clients are there.
        trackers: Who is told.
        partition: The partition, or None where clients generate their own data.
        info: What the strategy is told at the start.
    """

    config: Config
    program: Program
    participation: Participation
    system: System
    availability: Availability
    trackers: tuple[Tracker, ...]
    partition: Partition | None
    info: Info

    @property
    def name(self) -> str:
        """Folder of the run."""
        named: str | None = self.config["name"]
        return named or f"{_short(self.config['strategy'])}-{self.program.dataset.name}".lower()

    def federation(self, engine: Engine, memory: Memory) -> Federation:
        """The federation, before its first round."""
        from fedsim.attendance import Limits
        from fedsim.federation import Federation

        limits = {key: value for key, value in self.config["participation"].items() if key in conf.PARTICIPATION}
        return Federation(
            self.program, engine, self.participation, self.system, memory, self.availability, Limits(**limits)
        )

    def describe(self) -> dict[str, str]:
        """What runs, for people."""
        c, p = self.config, self.program
        rows = {
            "strategy": _fields(c["strategy"]),
            "data": f"{p.dataset.name}{self._imbalance()}, {self._sizes()}",
            "partition": "the data's own clients" if c["partition"] is None else _fields(c["partition"]),
            "model": f"{_short(c['model'])}, {p.layout.d:,} parameters",
            "client": _client(c["client"], "client.epochs" not in p.strategy.unused),
            "participation": self._participation(),
            "devices": self._devices(),
            "rounds": str(c["rounds"]),
            "engine": f"{_short(c['engine'])} on {c['engine']['device']}, seed {c['seed']}",
        }
        if p.recipes:
            rows["recipe"] = ", ".join(name for name, _ in p.recipes)
        return rows

    def _participation(self) -> str:
        """Who takes part."""
        if "participation" in self.program.strategy.unused:
            return f"{len(self.program.clients):,} clients, event-driven"
        return f"{_fields(self.config['participation'], over_selection=1.0)} of {len(self.program.clients):,} clients"

    def _devices(self) -> str:
        """How fast clients are, and when they are there."""
        usual = {"jitter": 0.0, "dropout": 0.0}
        there = self.config.get("availability")
        text = _fields(self.config["system"], **usual)
        return text if there is None or _short(there) == "Always" else f"{text}, {_fields(there)}"

    def _imbalance(self) -> str:
        imbalance, y = self.config["data"].get("imbalance"), self.program.dataset.train.y
        if imbalance is None:
            return ""
        counts = np.bincount(y.numpy(), minlength=self.program.dataset.num_classes)
        return f", imbalance {imbalance:g} ({counts.max():,} to {counts.min():,} a class)"

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
    locate({k: v for k, v in config["engine"].items() if k not in conf.ENGINE}, "engine")
    strategy = instantiate(config["strategy"], "strategy")
    if type(strategy).step is Strategy.step and type(strategy).round is Strategy.round:
        raise ConfigError(
            f"strategy {_short(config['strategy'])} needs a `step` or a `round`: the server's half of a method"
        )
    tuned = ("client.batch_size", "client.drop_last") if config["eval"]["finetune_epochs"] else ()
    for override in explicit:
        key = override.lstrip("+~").split("=")[0]
        if key not in tuned and (why := strategy.unused.get(key)):
            raise ConfigError(f"{override} has no effect with strategy={_short(config['strategy'])}: {why}; remove it")
    recipes = [(name, instantiate(node, f"recipe.{name}")) for name, node in config["recipe"].items()]
    dataset, server, kept = _load_data(config, seed)
    if dataset.clients is not None:
        if given := [k for k in explicit if k.split(".")[0].split("=")[0] == "partition"]:
            raise ConfigError(
                f"{given[0]} has no effect: data={dataset.name} brings its own clients; set data.num_clients instead"
            )
        if config["partition"] is not None and config["partition"]["holdout"] == "test":
            raise ConfigError(
                f"partition.holdout=test needs a partition, and data={dataset.name} brings its own clients, which hold "
                "out examples of their own; set partition.holdout=0"
            )
        config["partition"] = None
    dataset = _on_device(dataset, config)
    clients, partition = _partition(config, dataset, kept, seed)
    example = (clients.train(0).x if dataset.clients is not None else dataset.train.x)[:2]
    module = _model(config, dataset, example, seed, dtype, [strategy, *(recipe for _, recipe in recipes)])
    options = _client_options(config, module)
    strategy.check_client(options)
    program = Program(strategy, recipes, module, dataset, clients, _move(server, config), options, seed)
    strategy.check_network(program.network, options)
    config = batching.chosen(config, program)
    rule = {k: v for k, v in config["participation"].items() if k not in conf.PARTICIPATION}
    participation, system = instantiate(rule, "participation"), instantiate(config["system"], "system")
    participation.check(len(clients))
    over = config["participation"].get("over_selection", 1.0)
    if over > 1 and not getattr(participation, "refills", False):
        raise ConfigError(
            f"participation.over_selection={over:g} has no effect with participation={_short(rule)}: it asks for no "
            "number of clients; choose participation=fixed or fraction"
        )
    if check := getattr(system, "check", None):
        check(len(clients))
    availability = (
        Always() if config.get("availability") is None else instantiate(config["availability"], "availability")
    )
    when_off = getattr(availability, "when_off", None)
    require(when_off in ("pause", "drop"), "availability.when_off", "pause or drop", when_off)
    availability.check(len(clients))
    info = Info(len(clients), dataset.num_classes, program.layout, seed, config["rounds"], config["client"]["lr"])
    trackers = tuple(instantiate(node, f"tracker.{name}") for name, node in config["tracker"].items())
    for tracker in trackers:
        if check := getattr(tracker, "check", None):
            check()
    exp = Experiment(config, program, participation, system, availability, trackers, partition, info)
    _check_deadline(exp)
    return exp


def _check_deadline(exp: Experiment) -> None:
    """Refuses a deadline that nobody can meet, where that can be seen beforehand."""
    deadline, p, jitter = exp.config["participation"].get("deadline"), exp.program, getattr(exp.system, "jitter", 1.0)
    if deadline is None or jitter or type(p.strategy).work is not ClientHalf.work:
        return
    sizes, size = p.clients.sizes(), 4 * p.shared_size
    planned = [p.strategy.planned_steps(p.options, int(n)) for n in sizes]
    check_deadline(
        deadline,
        min(exp.system.duration_ns(i, 1, n, size, size, exp.config["seed"]) for i, n in enumerate(planned)),
    )


@dataclass(frozen=True)
class Shared:
    """What a worker of another process is given; the rest it builds from the config, by import path.

    Attributes:
        dataset: The data set, in main memory, without what only the driver needs.
        clients: The population.
        server: The server's own examples, or None.
        tensors: Every parameter and buffer of the network as it was first built, by name.
    """

    dataset: Dataset
    clients: Clients
    server: Split | None
    tensors: dict[str, Tensor]

    @classmethod
    def of(cls, program: Program) -> Shared:
        """What a program's workers need."""
        data, clients = program.dataset, program.clients
        empty = Split(data.train.x[:0], data.train.y[:0])  # clients have the examples
        if isinstance(clients, PartitionedClients) and clients.test is not None:
            clients = replace(clients, test=Split(data.test.x[:0], data.test.y[:0]))  # `rebuild` has it from `dataset`
        return cls(
            replace(data, train=empty, keys={}, clients=None),
            clients,
            program.server,
            {name: t.detach() for name, t in _named(program.fresh_module()).items()},
        )


def _named(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def rebuild(config: Config, shared: Shared) -> Program:
    """The program of a run in another process, bit for bit that of the driver.

    Args:
        config: The resolved config.
        shared: What the driver gives; tensors may be read-only.

    Raises:
        ConfigError: A plug-in cannot be imported here, or is another one than at the driver.
    """
    seed, dtype = config["seed"], getattr(torch, config["precision"])
    strategy = instantiate(config["strategy"], "strategy")
    recipes = [(name, instantiate(node, f"recipe.{name}")) for name, node in config["recipe"].items()]
    clients = shared.clients
    dataset = replace(_on_device(shared.dataset, config), clients=None)
    if isinstance(clients, PartitionedClients):
        test = None if clients.test is None else dataset.test
        clients = replace(clients, split=_move(clients.split, config) or clients.split, test=test)
    plain = {**config, "model": {**config["model"], "weights": None}}  # the file may not be here
    example = clients.train(0)
    module = _model(plain, dataset, example.x[example.rows[:2]], seed, dtype, [strategy, *(r for _, r in recipes)])
    options = _client_options(config, module)
    program = Program(strategy, recipes, module, dataset, clients, _move(shared.server, config), options, seed)
    named = _named(program.fresh_module())
    if {n: t.shape for n, t in named.items()} != {n: t.shape for n, t in shared.tensors.items()}:
        raise ConfigError("a worker built another network than the driver: is the code the same on all nodes?")
    program.network.reset({name: t.clone() for name, t in shared.tensors.items()})
    return program


def simulate(overrides: Sequence[str] = (), config_dir: str | Path | None = None) -> Result:
    """Runs an experiment in this process, like ``fedsim <overrides>``.

    Args:
        overrides: Hydra's grammar, such as ``["strategy=fedprox", "rounds=5"]``.
        config_dir: A folder with config groups of your own, such as ``myconf`` for ``myconf/strategy/mine.yaml``.

    Returns:
        Final parameters, metrics and summary.

    Raises:
        FedsimError: With one clear line.
    """
    from fedsim.run import execute

    config, run = requested(overrides, None if config_dir is None else Path(config_dir))
    return execute(build(config, overrides), run)


# --- data -------------------------------------------------------------------------------------------------


def _load_data(config: Config, seed: int) -> tuple[Dataset, Split | None, Tensor | None]:
    """The data set, the server's validation split, and the training rows that are left for clients."""
    node = {k: v for k, v in config["data"].items() if k not in conf.DATA}
    source = instantiate(node, "data")
    dataset: Dataset = source.load(seed)
    share, imbalance = config["data"]["validation"], config["data"].get("imbalance")
    if config["data"]["augment"] and (dataset.clients is not None or dataset.train.x.dim() != 4):
        raise ConfigError(f"data.augment={config['data']['augment']} is for images; {dataset.name} has none")
    if imbalance is not None:
        dataset = long_tailed(dataset, imbalance, seed)
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
    if not dataset.num_classes and getattr(partitioner, "needs_classes", False):
        raise ConfigError(
            f"partition={_short(config['partition'])} divides by class, and {dataset.name} has none (regression); "
            "choose partition=iid, quantity or natural"
        )
    rows = torch.arange(len(dataset.train)) if kept is None else kept
    labels = dataset.train.y[rows].numpy()
    keys = {name: key[rows].numpy() for name, key in dataset.keys.items()}
    part: Partition = partitioner(labels, keys, random.numpy_generator(seed, "partition"))
    if part.repeats and not getattr(partitioner, "repeats", False):
        times = np.bincount(part.indices)
        raise ConfigError(
            f"partition={_short(config['partition'])} uses {(times > 1).sum():,} examples more than once, one of them "
            f"{times.max()} times; a partitioner that means to do so says `repeats: ClassVar = True`"
        )
    part = replace(part, indices=rows.numpy()[part.indices])
    holdout, test = config["partition"]["holdout"], None
    share = 0.0 if holdout == "test" else holdout
    train, held = hold_out(part, share, random.numpy_generator(seed, "holdout"))
    if holdout == "test":
        if not dataset.num_classes:
            raise ConfigError(
                f"partition.holdout=test draws test examples by class, and {dataset.name} has none (regression); "
                "set a share of the clients' own examples, such as partition.holdout=0.1"
            )
        test = dataset.test
        held = local_tests(dataset.train.y.numpy(), train, test.y.cpu().numpy(), seed)
    return PartitionedClients(_move(dataset.train, config) or dataset.train, train, held, test), part


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


def _model(
    config: Config, dataset: Dataset, example: Tensor, seed: int, dtype: torch.dtype, halves: Sequence[ClientHalf]
) -> nn.Module:
    outputs = dataset.num_classes or (1 if dataset.train.y.dim() < 2 else dataset.train.y.shape[1])
    node = {k: v for k, v in config["model"].items() if k != "weights"}
    facts = {"input_shape": tuple(example.shape[1:]), "num_classes": outputs}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(random.derive(seed, "model"))
        module: nn.Module = instantiate(node, "model", facts).to(config["engine"]["device"], dtype)
        Layout.of(module)  # there must be something to train
        _check_outputs(module, example, dataset, config, any(overrides(half, "loss") for half in halves))
    if config["model"]["weights"] is not None:
        _load_weights(module, Path(config["model"]["weights"]).expanduser())
    return module


def _check_outputs(module: nn.Module, example: Tensor, dataset: Dataset, config: Config, own_loss: bool) -> None:
    """One forward pass of two examples: the model takes the data, and its output fits the loss."""
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
        raise ConfigError(
            f"model {name} cannot take inputs of shape {tuple(example.shape[1:])} ({dataset.name}): {one_line(exc)}; "
            "choose another model, or other data"
        ) from exc
    finally:
        module.train(was)
    if not isinstance(out, Tensor) and not own_loss:
        raise ConfigError(
            f"model {name} returns a {type(out).__name__}, not a tensor, and neither the strategy nor a recipe has a "
            "`loss` for that; return a tensor"
        )
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
        raise ConfigError(f"model.weights={path} does not exist; give a .safetensors file, or null") from exc
    except (OSError, SafetensorError) as exc:
        raise ConfigError(f"model.weights={path} is no readable .safetensors file ({exc}); give one, or null") from exc
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for name, t in trainable(module).items():
        if name not in tensors:
            raise ConfigError(f"model.weights={path} has no tensor '{name}'{did_you_mean(name, tensors)}")
        if tensors[name].shape != t.shape:
            raise ConfigError(
                f"model.weights={path}: '{name}' has shape {tuple(tensors[name].shape)}, but the model needs "
                f"{tuple(t.shape)}; take the weights of such a model"
            )
    for name in tensors:
        if name not in named:
            raise ConfigError(
                f"model.weights={path} has a tensor '{name}' that the model lacks{did_you_mean(name, named)}"
            )
    with torch.no_grad():
        for name, saved in tensors.items():
            named[name].copy_(saved)


def _client_options(config: Config, module: nn.Module) -> ClientOptions:
    c, device = dict(config["client"]), config["engine"]["device"]
    if c["precision"] == "tf32" and device == "cpu":
        raise ConfigError("client.precision=tf32 is for CUDA devices, and engine.device is cpu; set bf16 or fp32")
    if c["precision"] != "fp32" and config["precision"] != "float32":
        raise ConfigError(f"client.precision={c['precision']} needs precision=float32, got {config['precision']}")
    optimizer: Optimizer
    if isinstance(c["optimizer"], Mapping):
        factory = instantiate({**c["optimizer"], "_partial_": True}, "client.optimizer")
        shapes = list(Layout.of(module).shapes.values())
        optimizer = TorchOptimizer(factory, shapes)
        try:
            tried = factory([torch.zeros(shape, requires_grad=True) for shape in shapes], lr=c["lr"])
        except Exception as exc:
            raise ConfigError(
                f"client.optimizer ({c['optimizer']['_target_']}) cannot be built: {one_line(exc)}"
            ) from exc
        require_kind(tried, torch.optim.Optimizer, "client.optimizer._target_")
    elif c["optimizer"] == "sgd":
        optimizer = SGD(momentum=c["momentum"], nesterov=c["nesterov"], weight_decay=c["weight_decay"])
    else:
        eps = {} if c["eps"] is None else {"eps": c["eps"]}
        if c["optimizer"] == "adagrad":
            optimizer = Adagrad(weight_decay=c["weight_decay"], **eps)
        else:
            kind = Adam if c["optimizer"] == "adam" else AdamW
            optimizer = kind(betas=tuple(c["betas"]), weight_decay=c["weight_decay"], **eps)
    others = ("optimizer", "momentum", "nesterov", "betas", "eps", "weight_decay", "batching", "memory_budget")
    own = {k: v for k, v in c.items() if k not in others}
    lanes = c["batching"] if type(c["batching"]) is int else 1  # `auto` is resolved when all is built
    return ClientOptions(optimizer, augment=tuple(config["data"]["augment"]), batching=lanes, **own)


# --- for people -------------------------------------------------------------------------------------------


def _short(node: Mapping[str, Any]) -> str:
    return str(node["_target_"]).rpartition(".")[2]


def _fields(node: Mapping[str, Any], **usual: Any) -> str:
    """A plug-in's options, without those that are null or ``usual``."""
    kept = {k: v for k, v in node.items() if v is not None and (k not in usual or v != usual[k])}
    shown = ", ".join(f"{k}={v}" for k, v in kept.items() if not k.startswith("_"))
    return _short(node) + (f" ({shown})" if shown else "")


def _client(c: Mapping[str, Any], own_work: bool) -> str:
    """What a visit is; ``own_work``: whether the config says how long it is."""
    work = f"{c['epochs']} epochs, " if c["epochs"] is not None else f"{c['steps']} steps, "
    name = c["optimizer"] if isinstance(c["optimizer"], str) else _short(c["optimizer"])
    return f"{work if own_work else ''}batch {c['batch_size'] or 'of all'}, {name} lr {c['lr']:g}"


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

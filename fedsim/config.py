"""The keys that the platform reads, and checks of every value before any work is done.

Fields of plug-ins (strategies, partitioners, ...) are checked by the plug-ins themselves when they are built.
`fedsim.compose` makes a config from what a user writes.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedsim.errors import ConfigError, did_you_mean

Config = dict[str, Any]
Check = Callable[[str, Any], None]

GROUPS = (
    "strategy",
    "recipe",
    "data",
    "partition",
    "model",
    "client",
    "participation",
    "system",
    "availability",
    "engine",
    "eval",
    "tracker",
    "experiment",
)
#: Groups of which several options may be chosen.
LISTS = ("recipe", "tracker")
#: Keys that do not change results.
NEUTRAL = ("engine", "tracker", "run_dir", "resume", "name", "checkpoint", "rounds", "hydra")
#: Keys of the group ``engine`` that are not the engine's own arguments.
ENGINE = ("device", "threads", "on_failure", "max_retries", "memory_budget")
#: Keys of the group ``data`` that are not the source's own arguments.
DATA = ("augment", "validation", "imbalance")
#: Keys of the group ``participation`` that are not the rule's own arguments.
PARTICIPATION = ("deadline", "over_selection")
#: Keys that may be given anew when a run is resumed.
RESUMABLE = ("engine", "tracker", "checkpoint", "rounds", "data.root")
CONF = Path(__file__).parent / "conf"


# --- checks of single values ------------------------------------------------------------------------------


def _refuse(key: str, needed: str, got: Any) -> ConfigError:
    return ConfigError(f"{key} must be {needed}, got {shown(got)}")


def shown(value: Any) -> str:
    """A value as a user writes it."""
    words: dict[Any, str] = {None: "null", "": "nothing"}
    if isinstance(value, bool):
        return str(value).lower()
    return words.get(value, repr(value)) if isinstance(value, str | None) else repr(value)


def _integer(low: int, null: bool = False) -> Check:
    def check(key: str, value: Any) -> None:
        if value is None and null:
            return
        if type(value) is not int or value < low:
            raise _refuse(key, f"a whole number, at least {low}" + (", or null" if null else ""), value)

    return check


def _number(interval: str, null: bool = False) -> Check:
    """A finite number in an interval such as ``(0, 1]`` or ``[0, inf)``."""
    low, high = (float(x) for x in interval[1:-1].split(","))

    def check(key: str, value: Any) -> None:
        if value is None and null:
            return
        fits = type(value) in (int, float) and math.isfinite(value)
        fits = fits and (value > low if interval[0] == "(" else value >= low)
        fits = fits and (value < high if interval[-1] == ")" else value <= high)
        if not fits:
            raise _refuse(key, f"a number in {interval}" + (", or null" if null else ""), value)

    return check


def _flag(key: str, value: Any) -> None:
    if type(value) is not bool:
        raise _refuse(key, "true or false", value)


def _choice(*options: Any) -> Check:
    def check(key: str, value: Any) -> None:
        if value not in options:
            near = did_you_mean(str(value), map(str, options))
            raise ConfigError(f"{key} must be one of {', '.join(map(str, options))}, got {shown(value)}{near}")

    return check


def _text(null: bool = False) -> Check:
    def check(key: str, value: Any) -> None:
        if not (isinstance(value, str) and value) and not (value is None and null):
            quoted = f" (a number is quoted twice: {key}='\"{value}\"')" if isinstance(value, int | float) else ""
            raise _refuse(key, f"text{' or null' if null else ''}{quoted}", value)

    return check


def _target(key: str, value: Any) -> None:
    if not isinstance(value, Mapping) or not isinstance(value.get("_target_"), str):
        raise _refuse(key, "a config with a `_target_` (the Python path of a class)", value)


def _named_targets(key: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        raise _refuse(key, f"configs by name, such as {key}=[a,b]", value)
    for name, item in value.items():
        _target(f"{key}.{name}", item)


def _optimizer(key: str, value: Any) -> None:
    if isinstance(value, Mapping):
        _target(key, value)
    else:
        _choice("sgd", "adam", "adamw", "adagrad")(key, value)


def _betas(key: str, value: Any) -> None:
    if not isinstance(value, list) or len(value) != 2:
        raise _refuse(key, "two numbers in [0, 1), such as [0.9, 0.999]", value)
    for i, beta in enumerate(value):
        _number("[0, 1)")(f"{key}[{i}]", beta)


def _augment(key: str, value: Any) -> None:
    if not isinstance(value, list):
        raise _refuse(key, "a list, such as [flip, crop]", value)
    for name in value:
        _choice("flip", "crop")(key, name)


def _holdout(key: str, value: Any) -> None:
    if value != "test":
        try:
            _number("[0, 1)")(key, value)
        except ConfigError as exc:
            raise _refuse(key, "a number in [0, 1), or test", value) from exc


def _eval_clients(key: str, value: Any) -> None:
    if value not in ("participants", "all"):
        try:
            _integer(1)(key, value)
        except ConfigError as exc:
            raise _refuse(key, "participants, all, or a whole number of clients, at least 1", value) from exc


def _device(key: str, value: Any) -> None:
    if not isinstance(value, str) or not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
        raise _refuse(key, "cpu, cuda, cuda:<number> or auto", value)


def num_bytes(value: int | str | None) -> int | None:
    """A number of bytes, or text such as ``4GiB`` (units of 1024), as a number.

    Raises:
        ValueError: It is neither.
    """
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        return value
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT])i?B", str(value))
    if not found:
        raise ValueError(value)
    return int(float(found[1]) * 1024 ** (1 + "KMGT".index(found[2])))


def _batching(key: str, value: Any) -> None:
    if value is not False and value not in ("auto", "off") and (type(value) is not int or value < 1):  # YAML's `off`
        raise _refuse(key, "auto, off, or a number of clients, at least 1", value)


def _size(key: str, value: Any) -> None:
    try:
        num_bytes(value)
    except ValueError:
        raise _refuse(key, "a size such as 512MiB or 4GiB, a number of bytes > 0, or null", value) from None


# Every key that the platform reads itself. A group with a `_target_` may have further keys, its owner's.
SCHEMA: dict[str, Check] = {
    "seed": _integer(0),
    "rounds": _integer(1),
    "name": _text(null=True),
    "run_dir": _text(),
    "resume": _text(null=True),
    "precision": _choice("float32", "float64"),
    "strategy": _target,
    "recipe": _named_targets,
    "data": _target,
    "data.augment": _augment,
    "data.validation": _number("[0, 1)"),
    "data.imbalance": _number("[1, inf)", null=True),
    "partition": _target,
    "partition.holdout": _holdout,
    "model": _target,
    "model.weights": _text(null=True),
    "client.optimizer": _optimizer,
    "client.lr": _number("(0, inf)"),
    "client.epochs": _integer(1, null=True),
    "client.steps": _integer(1, null=True),
    "client.batch_size": _integer(1, null=True),
    "client.lr_decay": _number("(0, inf)"),
    "client.batching": _batching,
    "client.precision": _choice("fp32", "bf16", "tf32"),
    "client.memory_budget": _size,
    "client.momentum": _number("[0, 1)"),
    "client.nesterov": _flag,
    "client.betas": _betas,
    "client.eps": _number("[0, inf)", null=True),
    "client.weight_decay": _number("[0, inf)"),
    "client.clip_norm": _number("(0, inf)", null=True),
    "client.keep_optimizer": _flag,
    "client.drop_last": _flag,
    "client.buffers": _choice("mean", "local", "frozen"),
    "participation": _target,
    "participation.deadline": _number("(0, inf)", null=True),
    "participation.over_selection": _number("[1, inf)"),
    "system": _target,
    "availability": _target,
    "engine": _target,
    "engine.device": _device,
    "engine.threads": _integer(1),
    "engine.on_failure": _choice("abort", "retry", "skip"),
    "engine.max_retries": _integer(0),
    "engine.memory_budget": _size,
    "eval.every": _integer(1),
    "eval.clients": _eval_clients,
    "eval.finetune_epochs": _integer(0),
    "eval.virtual_seconds": _number("(0, inf)", null=True),
    "eval.target_accuracy": _number("(0, 1]", null=True),
    "tracker": _named_targets,
    "stop.target_accuracy": _number("(0, 1]", null=True),
    "stop.patience": _integer(1, null=True),
    "stop.virtual_seconds": _number("(0, inf)", null=True),
    "stop.contributions": _integer(1, null=True),
    "checkpoint.every": _integer(0),
    "checkpoint.seconds": _number("[0, inf)"),
    "checkpoint.keep": _integer(2, null=True),
    "checkpoint.memory": _choice("ram", "disk"),
}
OPEN = {key for key, check in SCHEMA.items() if check in (_target, _named_targets)}
#: Keys that older runs' configs lack: as if null.
LATER = (
    "data.imbalance",
    "availability",
    "participation.deadline",
    "participation.over_selection",
    "eval.virtual_seconds",
    "eval.target_accuracy",
    "stop.contributions",
)


def check(config: Config) -> None:
    """Checks every value that the platform reads.

    Raises:
        ConfigError: A key is unknown or missing, or a value impossible; names the key.
    """
    known = {k.split(".")[0] for k in SCHEMA}
    for top, value in config.items():
        if top not in known:
            raise ConfigError(f"unknown key '{top}'{did_you_mean(top, known)}; known: {', '.join(sorted(known))}")
        fields = [k.split(".", 1)[1] for k in SCHEMA if k.startswith(f"{top}.")]
        if top not in SCHEMA and not isinstance(value, Mapping):
            raise _refuse(top, f"a group with the keys {', '.join(fields)}", value)
        if fields and top not in OPEN:
            for name in value:
                if name not in fields:
                    raise ConfigError(
                        f"unknown key '{top}.{name}'{did_you_mean(name, fields)}; known: {', '.join(fields)}"
                    )
    for key, test in SCHEMA.items():
        node: Any = config
        for part in key.split("."):
            if not isinstance(node, Mapping) or part not in node:
                if key in LATER:
                    break
                raise ConfigError(f"key '{key}' is missing; it cannot be deleted or left out of a config file")
            node = node[part]
            if node is None and part == "partition":  # data that bring their own clients
                break
        else:
            test(key, node)
    _check_together(config)


def _check_together(config: Config) -> None:
    client, stop = config["client"], config["stop"]
    if (client["epochs"] is None) == (client["steps"] is None):
        raise ConfigError(
            "give one of client.epochs and client.steps and set the other to null; got "
            f"client.epochs={shown(client['epochs'])} client.steps={shown(client['steps'])}"
        )
    optimizer = client["optimizer"]
    foreign = {"sgd": ("betas", "eps"), "adagrad": ("momentum", "nesterov", "betas")}
    foreign |= dict.fromkeys(("adam", "adamw"), ("momentum", "nesterov"))
    unused = (
        foreign.get(optimizer, ())
        if isinstance(optimizer, str)
        else ("momentum", "nesterov", "betas", "eps", "weight_decay")
    )
    for name in unused:
        default = load(CONF / "client" / "default.yaml")[name]
        if client[name] != default:
            kind = optimizer if isinstance(optimizer, str) else optimizer["_target_"]
            raise ConfigError(
                f"client.{name}={client[name]} has no effect with client.optimizer={kind}; "
                f"set client.{name}={shown(default)}, or change the optimizer"
            )
    if client["nesterov"] and not client["momentum"]:
        raise ConfigError("client.nesterov=true needs client.momentum > 0, got client.momentum=0")
    for name in ("target_accuracy", "patience"):
        if stop[name] is not None and not config["data"]["validation"]:
            raise ConfigError(
                f"stop.{name}={stop[name]} looks at examples that the server keeps, and data.validation is 0; "
                "set data.validation, such as data.validation=0.1"
            )


# --- files ------------------------------------------------------------------------------------------------


def options(group: str, folders: Sequence[Path | None] = (CONF,)) -> dict[str, Path]:
    """The options of a config group, and their files."""
    return {f.stem: f for folder in folders if folder for f in sorted((folder / group).glob("*.yaml"))}


def config_hash(config: Config) -> str:
    """Hash of all that results depend on, the number of rounds included."""
    kept = {k: v for k, v in config.items() if k not in NEUTRAL or k == "rounds"}
    kept["data"] = {k: v for k, v in config["data"].items() if k != "root"}  # the same data elsewhere
    kept["engine"] = {k: config["engine"][k] for k in ("device", "threads")}  # bits follow both
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()


def dump(config: Config) -> str:
    """The config as YAML."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(config))


def load(path: Path) -> Config:
    """A run's ``config.yaml``.

    Raises:
        ConfigError: It is missing or damaged.
    """
    from omegaconf import OmegaConf

    try:
        tree = OmegaConf.to_container(OmegaConf.load(path))
        if not isinstance(tree, dict):
            raise ValueError("not a mapping")
    except FileNotFoundError as exc:
        raise ConfigError(f"{path} does not exist; is {path.parent} a run directory?") from exc
    except Exception as exc:  # YAML's errors have no common base with OmegaConf's
        raise ConfigError(f"{path} is damaged ({' '.join(str(exc).split())[:200]}); restore it from a copy") from exc
    return {str(k): v for k, v in tree.items()}


def keys(config: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """All keys, dotted; those that hold others included."""
    for key, value in config.items():
        yield f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from keys(value, f"{prefix}{key}.")

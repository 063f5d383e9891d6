"""Plug-ins by name: imports what a config's ``_target_`` says, and checks that it fits its place."""

from __future__ import annotations

import functools
import inspect
import logging
import sys
from collections.abc import Mapping
from typing import Any

from torch import nn

from fedsim.errors import ConfigError, FedsimError, did_you_mean, one_line
from fedsim.strategy import ClientHalf, Strategy

logging.getLogger("hydra").addHandler(logging.NullHandler())  # it would print what is raised here too

#: What the object of a group must be: an instance of a class, or one that has these methods.
CONTRACTS: dict[str, type | tuple[str, ...]] = {
    "strategy": Strategy,
    "recipe": ClientHalf,
    "data": ("load",),
    "partition": ("__call__",),
    "model": nn.Module,
    "participation": ("check", "sample"),
    "system": ("duration_ns", "lost_at"),
    "availability": ("check", "interval"),
    "engine": ("put", "submit", "wait", "result", "close"),
    "tracker": ("start", "log", "finish"),
}


def instantiate(node: Mapping[str, Any], key: str, facts: Mapping[str, Any] | None = None) -> Any:
    """Builds the object that a config node describes (Hydra's ``_target_``).

    Args:
        node: ``_target_`` and keyword arguments.
        key: Where it stands in the config, for messages.
        facts: Further arguments, for those of the target's parameters that have their names; the node's count more.

    Raises:
        ConfigError: The target cannot be imported, refuses its arguments, or makes something of the wrong kind.
    """
    from hydra.utils import instantiate as hydra_instantiate

    parameters = locate(node, key)
    extra = {name: fact for name, fact in (facts or {}).items() if name in parameters and name not in node}
    try:
        make = hydra_instantiate({**node, "_partial_": True}, _convert_="all")
        # Facts are given here: Hydra would build what a config among them describes.
        if node.get("_partial_"):
            made = functools.partial(make, **extra) if extra else make
        else:
            made = make(**extra)
    except Exception as exc:
        cause: BaseException = exc
        while cause.__cause__ is not None and not isinstance(cause, FedsimError):
            cause = cause.__cause__
        if isinstance(cause, FedsimError):
            raise cause from exc
        raise ConfigError(f"{key} ({node['_target_']}) cannot be built: {one_line(cause)}") from exc
    require_kind(made, CONTRACTS.get(key.split(".")[0], object), f"{key}._target_={node['_target_']}")
    return made


def locate(node: Mapping[str, Any], key: str) -> Mapping[str, inspect.Parameter]:
    """Imports the target of a config node and checks the names of its arguments, without building anything.

    Returns:
        The target's parameters by name.

    Raises:
        ConfigError: The target cannot be imported, cannot be called, or has no such parameter.
    """
    from hydra.utils import get_object

    target = node["_target_"]
    try:
        kind = get_object(target)
    except Exception as exc:
        raise ConfigError(f"{key}._target_={target} cannot be imported: {_why_not(target, exc)}") from exc
    if not callable(kind):
        raise ConfigError(f"{key}._target_={target} must be a class or a function, got {type(kind).__name__}")
    if isinstance(kind, type) and isinstance(methods := CONTRACTS.get(key.split(".")[0]), tuple):
        require_kind(kind, methods, f"{key}._target_={target}")
    try:
        parameters = inspect.signature(kind).parameters
    except (TypeError, ValueError):
        return {}
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        for name in node:
            if not name.startswith("_") and name not in parameters:
                raise ConfigError(
                    f"unknown key '{key}.{name}'{did_you_mean(name, parameters)}; "
                    f"{target} takes: {', '.join(parameters) or 'nothing'} (~{key}.{name} deletes the key)"
                )
    return parameters


def _why_not(target: str, exc: Exception) -> str:
    """Why an import failed, in words for whoever wrote the path."""
    cause = exc.__cause__ or exc
    if not isinstance(cause, ModuleNotFoundError):
        return one_line(cause)
    module, _, name = target.rpartition(".")
    if cause.name == target and module in sys.modules:
        return f"{module} has no '{name}'{did_you_mean(name, dir(sys.modules[module]))}"
    return f"there is no module '{cause.name}'; is it installed, in this folder, or in a folder of PYTHONPATH?"


def require_kind(thing: object, needed: type | tuple[str, ...], what: str) -> None:
    """Refuses what is no instance of ``needed``, or lacks one of the methods named there."""
    if isinstance(needed, tuple):
        missing = [name for name in needed if not callable(getattr(thing, name, None))]
        if missing:
            kind = thing.__name__ if isinstance(thing, type) else type(thing).__name__
            raise ConfigError(
                f"{what} must make an object with the methods {', '.join(needed)}; {kind} has no {missing[0]}"
            )
    elif not isinstance(thing, needed):
        raise ConfigError(f"{what} must make a {needed.__module__}.{needed.__qualname__}, got {type(thing).__name__}")

"""From what a user writes to a config: Hydra composes it, and what Hydra refuses is explained in one line.

Nothing here knows what a value means; `fedsim.config.check` does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from fedsim.config import CONF, GROUPS, LISTS, OPEN, RESUMABLE, SCHEMA, Config, check, keys, load, options, shown
from fedsim.errors import ConfigError, did_you_mean
from fedsim.rundir import RunDir


def compose(overrides: Sequence[str], config_dir: Path | None = None) -> Config:
    """The config tree with overrides in Hydra's grammar, resolved.

    Args:
        overrides: Such as ``["strategy=fedprox", "client.lr=0.05"]``.
        config_dir: A folder with config groups of the user's own (see `check_config_dir`).

    Raises:
        ConfigError: An override is malformed, or names a key or an option that does not exist.
    """
    overrides = prepare(overrides)
    try:
        tree = _hydra_compose(overrides, config_dir)
    except Exception as exc:  # Hydra's, OmegaConf's and YAML's errors, and ValueError for a group set to a number
        raise ConfigError(explain(exc, overrides, config_dir)) from exc
    return own_targets(resolve(tree), overrides)


def own_targets(config: Config, overrides: Sequence[str]) -> Config:
    """Where the user names a class (``model._target_=net.Net``), the options of the default one are left out.

    What the platform reads (``model.weights``) stays, and so does what the user gave.
    """
    given = {o.key_or_group for o in _parse(overrides) if not o.is_delete()}
    for group in GROUPS:
        if f"{group}._target_" in given and group not in given:
            kept = {key for key in map(str, config[group]) if {f"{group}.{key}"} & (given | set(SCHEMA))}
            config[group] = {key: value for key, value in config[group].items() if key in kept}
    return config


def requested(overrides: Sequence[str], config_dir: Path | None = None) -> tuple[Config, Path | None]:
    """What a command line asks for: a config, and the run directory to go on with, if any.

    Raises:
        ConfigError: As `compose` and `resume_config`.
    """
    if any(o.startswith("resume=") and o not in ("resume=null", "resume=") for o in overrides):
        return resume_config(overrides, config_dir)
    config = compose(overrides, config_dir)
    if config.get("resume") is not None:
        raise ConfigError(
            f"write resume={config['resume']} on the command line, as it stands; not in a config or a sweep"
        )
    return config, None


def _hydra_compose(overrides: Sequence[str], config_dir: Path | None, whole: bool = False) -> Any:
    """What Hydra composes, unresolved; ``whole``: with Hydra's own part."""
    from hydra import compose, initialize_config_module
    from hydra.core.global_hydra import GlobalHydra
    from hydra.initialize import get_gh_backup, restore_gh_from_backup

    before = get_gh_backup()  # of a caller who uses Hydra too
    GlobalHydra.instance().clear()
    try:
        with initialize_config_module("fedsim.conf", version_base="1.3"):
            return compose("config", [*overrides, *search_path(config_dir)], return_hydra_config=whole)
    finally:
        restore_gh_from_backup(before)


def resolve(tree: Any) -> Config:
    """A plain config from a composed tree.

    Raises:
        ConfigError: A value is missing, or refers to one that does not exist.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        return _plain_config(OmegaConf.to_container(tree, resolve=True, throw_on_missing=True))
    except OmegaConfBaseException as exc:
        raise ConfigError(_text(exc)) from exc


def _plain_config(tree: Any) -> Config:
    """Without what is Hydra's own; groups of which nothing is chosen are absent or null, and become empty."""
    config = {str(k): v for k, v in tree.items() if k not in ("hydra", "experiment")}
    for group, node in config.items():  # the plug-in's own keys first, then what the platform reads
        if isinstance(node, dict) and "_target_" in node:
            config[group] = dict(sorted(node.items(), key=lambda item: f"{group}.{item[0]}" in SCHEMA))
    for group in LISTS:
        config[group] = config.get(group) or {}
    return config


def prepare(overrides: Sequence[str]) -> list[str]:
    """Quotes text that Hydra's grammar has no place for, such as letters with accents; anything structured is left.

    Raises:
        ConfigError: Several options are given for a group that takes one: Hydra would mix them.
    """
    out = []
    for override in overrides:
        key, _, value = override.partition("=")
        if key in GROUPS and key not in LISTS and "[" in value:
            raise ConfigError(f"{key} takes one option, got {value}; for a sweep over several write {key}=a,b with -m")
        odd = re.search(r"[^\w/\-+.%*@:?| ]", value, re.ASCII) and not re.search(r"[,'\"\[\]{}()$\\]", value)
        out.append(f"{key}='{value}'" if odd else override)
    return out


# --- a user's own config groups ---------------------------------------------------------------------------


def search_path(config_dir: Path | None) -> list[str]:
    """The override that adds a folder of config groups."""
    if config_dir is None:
        return []
    quoted = str(config_dir.resolve()).replace("\\", "\\\\").replace("'", "\\'")
    return [f"hydra.searchpath=['file://{quoted}']"]


def check_config_dir(folder: Path) -> None:
    """Refuses a folder that holds no config groups, or an option that fedsim has already.

    Raises:
        ConfigError: Names the folder and what was needed.
    """
    found = [path for group in GROUPS for path in options(group, [folder]).values()]
    if not found:
        got = "it has no such folder" if folder.is_dir() else "there is no such directory"
        raise ConfigError(
            f"--config-dir {folder} must hold config groups, such as {folder / 'strategy' / 'mine.yaml'} "
            f"(groups: {', '.join(GROUPS)}); {got}"
        )
    for path in found:
        if path.stem in options(path.parent.name):
            raise ConfigError(f"{path}: fedsim has {path.parent.name}={path.stem} already; rename the file")


# --- going on with a run ----------------------------------------------------------------------------------


def resume_config(overrides: Sequence[str], config_dir: Path | None = None) -> tuple[Config, Path]:
    """The config of the run that ``resume=`` names, with what may change on a resume changed.

    Args:
        overrides: ``resume=<run directory>``, and perhaps others.
        config_dir: A folder with config groups of the user's own.

    Raises:
        ConfigError: It is no run directory, or another override would change results.
    """
    run = Path(next(o for o in overrides if o.startswith("resume="))[len("resume=") :].strip("'\"")).expanduser()
    saved = load(RunDir.open(run).config)
    try:
        check(saved)
    except ConfigError as exc:
        raise ConfigError(f"{run / 'config.yaml'} is damaged ({exc}); restore it from a copy") from exc
    before = dict(saved["engine"])
    texts = prepare([o for o in overrides if not o.startswith("resume=")])
    given = list(zip(texts, _parse(texts), strict=True))
    for text, o in given:
        if not {o.key_or_group, o.key_or_group.split(".")[0]} & set(RESUMABLE):
            raise ConfigError(
                f"resume= goes on with the run's own config, and {text} would make it another run; "
                f"only {', '.join(RESUMABLE)} may change"
            )
        if o.is_sweep_override():
            raise ConfigError(_several(text, o))
    if chosen := {o.key_or_group: text for text, o in given if o.key_or_group in GROUPS}:
        fresh = compose(list(chosen.values()), config_dir)
        kept = {key: saved["engine"][key] for key in ("device", "threads")}  # bits follow both
        saved |= {group: fresh[group] | (kept if group == "engine" else {}) for group in chosen}
    for _, o in given:
        if o.key_or_group not in GROUPS:
            _assign(saved, o)
    for key in ("device", "threads"):
        if saved["engine"][key] != before[key]:
            raise ConfigError(f"engine.{key} changes bits: this run has {before[key]}, and goes on with it; remove it")
    saved["resume"] = str(run)
    return saved, run


def _assign(config: Config, override: Any) -> None:
    node: Any = config
    *groups, last = override.key_or_group.split(".")
    for part in groups:
        node = node.get(part) if isinstance(node, Mapping) else None
    if not isinstance(node, dict) or (last not in node and not override.is_add()):
        raise ConfigError(unknown_key(override.key_or_group, config))
    if override.is_delete():
        del node[last]
    else:
        node[last] = override.value()


# --- explaining what Hydra refused ------------------------------------------------------------------------

#: What others call our keys.
SYNONYMS = {
    "learning_rate": "lr",
    "local_epochs": "epochs",
    "num_epochs": "epochs",
    "local_steps": "steps",
    "wd": "weight_decay",
    "num_rounds": "rounds",
    "num_users": "num_clients",
    "clients": "num_clients",
    "cohort_size": "clients_per_round",
    "method": "strategy",
    "algorithm": "strategy",
    "dataset": "data",
    "output_dir": "run_dir",
    "gpu": "device",
}


def explain(error: Exception, overrides: Sequence[str], config_dir: Path | None = None, sweep: bool = False) -> str:
    """One line for an error of Hydra or OmegaConf: the override at fault, with the nearest name that exists.

    Args:
        error: What was raised.
        overrides: What the user gave.
        config_dir: A folder with config groups of the user's own.
        sweep: Whether an override may give several values.
    """
    try:
        parsed = _parse(overrides)
    except ConfigError as exc:
        return str(exc)
    choices = []
    for text, o in zip(overrides, parsed, strict=True):
        if o.is_sweep_override() and not sweep:
            return _several(text, o)
        if o.key_or_group in GROUPS and not o.is_delete():
            several = _swept(o, config_dir) if o.is_sweep_override() else None
            if several == []:
                return f"'{text}' fits no option of {o.key_or_group}; `fedsim list {o.key_or_group}` shows them"
            if fault := _group_fault(o, o.value() if several is None else several, config_dir):
                return fault
            choices.append(text if several is None else f"{o.key_or_group}={several[0]}")
    try:
        tree, chosen = _choose(choices, config_dir)
    except Exception:  # a config file is at fault, not an override
        return _text(error)
    known = set(keys(tree))
    for o in parsed:
        key = o.key_or_group
        if key in GROUPS or key.startswith(("hydra.", "hydra/")):
            continue
        if key not in known and not o.is_add():
            return unknown_key(key, tree, chosen, config_dir)
        if key in known and o.is_add() and not o.is_force_add():
            return f"{key} has a value already; write {key}=..., without '+'"
    if sweep and (found := re.search(r"Could not override '([^']+)'", str(error))):
        # Hydra first composes what the jobs have in common, without the options that are swept over.
        return f"{found[1]} is a key of some of the options swept over only; write ++{found[1]}=..."
    return _text(error)


def _parse(overrides: Sequence[str]) -> list[Any]:
    """Hydra's reading of each override.

    Raises:
        ConfigError: One of them is malformed.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser, out = OverridesParser.create(), []
    for text in overrides:
        try:
            out.append(parser.parse_override(text))
        except HydraException as exc:
            raise ConfigError(
                f"cannot read the override {text!r}: it must be key=value, such as client.lr=0.1, with matching "
                "brackets and quotes; text with special characters is quoted twice, such as 'name=\"a, b\"'"
            ) from exc
    return out


def _swept(override: Any, config_dir: Path | None) -> list[str]:
    """The options of a group that a sweep goes over."""
    from hydra.core.override_parser.types import Glob

    value = override.value()
    if isinstance(value, Glob):
        return value.filter(list(options(override.key_or_group, [CONF, config_dir])))
    return list(override.sweep_string_iterator())


def _several(text: str, o: Any) -> str:
    return (
        f"{text} gives several values: add -m for a sweep over them; a list is written {o.key_or_group}=[...], "
        "and text with a comma is quoted twice"
    )


def _group_fault(o: Any, value: Any, config_dir: Path | None) -> str | None:
    """What is wrong with the choice of an option of a group, if anything."""
    group, known = o.key_or_group, options(o.key_or_group, [CONF, config_dir])
    if o.is_add() or o.package is not None:
        return f"write {group}={value}, without '+' and '@'; a group's option takes the place of the one before"
    if value is None and group in LISTS:
        return f"for no {group} at all write {group}=[]"
    for name in value if isinstance(value, list) else [value]:
        if not (name in known or str(name).startswith("[")):  # a list in a sweep: Hydra has more to say than we
            several = f"; several at once: {group}=[a,b]" if group in LISTS else ""
            return (
                f"{group} has no option {shown(name)}{did_you_mean(str(name), known)}; "
                f"it has: {', '.join(known) or 'none yet'}{several}"
            )
    return None


def _choose(choices: Sequence[str], config_dir: Path | None) -> tuple[Config, dict[str, str]]:
    """The config with these options chosen, unresolved, and the name of each group's option."""
    from omegaconf import OmegaConf

    tree: Any = OmegaConf.to_container(_hydra_compose(choices, config_dir, whole=True))
    return _plain_config(tree), {g: o for g, o in tree["hydra"]["runtime"]["choices"].items() if isinstance(o, str)}


def unknown_key(
    key: str, config: Config, chosen: Mapping[str, str] | None = None, config_dir: Path | None = None
) -> str:
    """Says that a key does not exist, and which one was perhaps meant, here or with another option of a group.

    Args:
        key: What the user wrote.
        config: The config that does not have it.
        chosen: The name of each group's option.
        config_dir: A folder with config groups of the user's own.
    """
    here = [k for k in keys(config) if not k.endswith("_target_")]
    others = {k: o for k, o in _keys_of_options(config_dir).items() if k not in here and not k.endswith("_target_")}
    group, parent = key.split(".")[0], key.rpartition(".")[0]
    if key in others:
        now = f"; this run has {group}={chosen[group]}" if chosen and group in chosen else ""
        return f"unknown key '{key}': it belongs to {_some(others[key])}{now}"
    beside = [k for k in here if k.rpartition(".")[0] == parent and parent]
    known = (
        f"{parent} has: {', '.join(k.rpartition('.')[2] for k in beside)}" if beside else "fedsim --cfg prints all keys"
    )
    near = _nearest(key, [k for k in here if k != parent], list(others))
    if near is not None:
        of = "" if near in here else f" of {_some(others[near])}"
        return f"unknown key '{key}' (did you mean '{near}'{of}?); {known}"
    more = f" (a field that its class has and its config file lacks: +{key}=...)" if beside and group in OPEN else ""
    return f"unknown key '{key}'; {known}{more}"


def _some(names: Sequence[str]) -> str:
    return " or ".join(names[:3]) + (f" or {len(names) - 3} others" if len(names) > 3 else "")


def _nearest(key: str, here: Sequence[str], others: Sequence[str]) -> str | None:
    """The key that was meant: the one whose last part is most similar; of several, the most similar as a whole."""
    last = re.split(r"[./]", key)[-1].lower()
    synonym = get_close_matches(last, SYNONYMS, 1, 0.85)
    meant = SYNONYMS[synonym[0]] if synonym else last
    near = get_close_matches(meant, sorted({k.rpartition(".")[2] for k in (*here, *others)}), 1, 0.6)
    for pool in (here, others) if near else ():
        if same := [k for k in pool if k.rpartition(".")[2] == near[0]]:
            return get_close_matches(key, same, 1, 0.0)[0]
    return None


def _keys_of_options(config_dir: Path | None) -> dict[str, list[str]]:
    """Every key of every option's file, and the options that have it."""
    out: dict[str, list[str]] = {}
    for group in GROUPS:
        for name, path in options(group, [CONF, config_dir]).items():
            package = re.search(r"^# @package (\S+)", path.read_text(encoding="utf-8"), re.MULTILINE)
            prefix = package[1] if package else group
            for key in keys(load(path)) if prefix != "_global_" else ():
                out.setdefault(f"{prefix}.{key}", []).append(f"{group}={name}")
    return out


def _text(error: Exception) -> str:
    """One line of the error itself."""
    from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} has no value yet; set it: {error.full_key}=..."
    if isinstance(error, OmegaConfBaseException) and error.full_key:
        return f"{error.full_key}: {' '.join(str(error.msg).split()).split(' full_key: ')[0]}"
    return " ".join(str(error).split()).split(" See https")[0]

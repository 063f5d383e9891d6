"""A run on Weights & Biases (https://wandb.ai), or in its offline files; see ``docs/wandb.md``.

``metrics.jsonl`` is the record; W&B has a copy. So whatever happens to W&B after the start costs that copy, never the
run, and a resume sends every round that W&B lacks.
"""

from __future__ import annotations

import csv
import json
import logging
import os
import secrets
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from fedsim.errors import ConfigError, RunError, did_you_mean, one_line
from fedsim.rundir import RunDir, dumps, read_metrics, write_atomic
from fedsim.tracking import RunInfo, Status

if TYPE_CHECKING:
    from wandb import Run

log = logging.getLogger(__name__)
logging.getLogger("opentelemetry").addHandler(logging.NullHandler())  # wandb's own statistics; it would print

Mode = Literal["online", "offline", "disabled"]
INIT_S, FINISH_S = 30.0, 60.0  # how long W&B may take to start, and to upload what is left at the end
EXIT_CODES: dict[Status, int] = {"finished": 0, "failed": 1, "interrupted": 255}  # 255 is what wandb has for Ctrl-C
FORBIDDEN = "/\\#?%:"  # in W&B's names of projects
OFFLINE = "set tracker.wandb.mode=offline to record without a network and without an account"


class Wandb:
    """Tells W&B about a run: a W&B run per run directory, a step per round.

    Args:
        project: W&B's project; made when it is new.
        entity: User or team that owns the project; None: the account's default.
        mode: ``"online"``, ``"offline"`` (files in the run directory, to upload later), or ``"auto"``: what
            ``WANDB_MODE`` says, else online where there are credentials, else offline.
        group: Group of W&B runs; None: the sweep that the run belongs to, if any.
        tags: Tags of the W&B run.
        name: Name that W&B shows; None: the last two folders of the run directory.

    Raises:
        ConfigError: An option has a wrong type, or a value that W&B would refuse.
    """

    def __init__(
        self,
        project: str = "fedsim",
        entity: str | None = None,
        mode: Literal["auto", "online", "offline"] = "auto",
        group: str | None = None,
        tags: Sequence[str] = (),
        name: str | None = None,
    ) -> None:
        for key, value in (("project", project), ("entity", entity), ("group", group), ("name", name)):
            if not (isinstance(value, str) and value.strip()) and not (value is None and key != "project"):
                null = "" if key == "project" else ", or null"
                raise ConfigError(f"tracker.wandb.{key} must be text{null}, got {value!r}")
        if len(project) > 128 or set(project) & set(FORBIDDEN):
            raise ConfigError(
                f"tracker.wandb.project must have at most 128 characters and none of {' '.join(FORBIDDEN)}, "
                f"got {project!r}; the owner goes to tracker.wandb.entity"
            )
        if mode not in ("auto", "online", "offline"):
            near = did_you_mean(str(mode), ("auto", "online", "offline"))
            raise ConfigError(f"tracker.wandb.mode must be auto, online or offline, got {mode!r}{near}")
        good = isinstance(tags, Sequence) and not isinstance(tags, str)
        if not good or not all(isinstance(tag, str) and 1 <= len(tag) <= 64 for tag in tags):
            raise ConfigError(
                f"tracker.wandb.tags must be a list of texts of 1 to 64 characters, such as [a,b], got {tags!r}"
            )
        self._project, self._entity, self._mode = project, entity, mode
        self._group, self._tags, self._name = group, tuple(tags), name
        self._run: Run | None = None

    def check(self) -> None:
        """Refuses a mode that needs credentials which are not there, or cannot be right.

        Raises:
            ConfigError: Says which.
        """
        self._resolve_mode()

    def start(self, run: RunInfo) -> None:
        """Starts the W&B run, or goes on with it, and tells it the rounds that it lacks.

        Raises:
            ConfigError: Credentials are missing or malformed, or W&B refuses what it is asked for.
            RunError: W&B cannot be reached within 30 seconds, or refuses the account.
        """
        self._run_dir, self._bytes, self._last, self._lost = run.run_dir, 0, 0, ""
        mode, why = self._resolve_mode()
        if mode == "disabled":
            print(f"W&B: off, because {why}", flush=True)
            return
        self._run = self._init(run, mode)
        self._folder = run.run_dir / "wandb" / Path(self._run.dir).parent.name
        self._first = self._run.starting_step  # a W&B run that goes on begins after the last round that it has
        # Axes for any metric; the round is the usual one.
        for axis in ("round", "virtual_seconds", "wall_seconds", "bytes_total"):
            self._run.define_metric(axis)
        self._run.define_metric("*", step_metric="round")
        print(f"W&B: {self._run.url}" if mode == "online" else f"W&B: offline ({why})", flush=True)
        metrics = RunDir(run.run_dir).metrics
        for record in read_metrics(metrics) if metrics.exists() else ():
            if record["round"] <= run.keep_rounds:
                self.log(record)

    def _resolve_mode(self) -> tuple[Mode, str]:
        """What to do, and the reason."""
        wanted = asked()
        if self._mode == "offline":
            return "offline", "tracker.wandb.mode=offline"
        if wanted in ("offline", "disabled") and self._mode == "online":
            raise ConfigError(
                f"tracker.wandb.mode=online, but WANDB_MODE or W&B's settings say {wanted}; unset that, or {OFFLINE}"
            )
        if wanted is not None and self._mode == "auto":
            return wanted, f"WANDB_MODE or W&B's settings say {wanted}"
        if has_credentials():
            return "online", "there are credentials"
        if self._mode == "online":
            raise ConfigError(
                "tracker.wandb.mode=online needs an account, and no credentials were found; run `wandb login`, set "
                f"WANDB_API_KEY, or {OFFLINE}"
            )
        return "offline", "no account was found; `wandb login` or WANDB_API_KEY gives one"

    def _init(self, run: RunInfo, mode: Mode) -> Run:
        import wandb

        path = run.run_dir.resolve()
        stored = _identity(run.run_dir / "wandb.json", run.sweep)
        settings = wandb.Settings(
            silent=True,
            console="off",
            symlink=False,
            disable_git=True,
            disable_code=True,
            save_code=False,
            init_timeout=INIT_S,
            finish_timeout=FINISH_S,
            finish_timeout_raises=True,
        )
        try:
            return wandb.init(
                project=self._project,
                entity=self._entity,
                mode=cast(Literal["online", "offline"], mode),
                id=stored["id"],
                resume="allow",
                name=self._name or f"{path.parent.name}/{path.name}",
                group=self._group or stored["group"],
                tags=self._tags or None,
                dir=path,
                config={**run.config, "resume": None},  # as in config.yaml
                allow_val_change=True,  # a resume may have more rounds
                reinit="create_new",  # a W&B run of whoever calls `simulate` stays theirs
                settings=settings,
            )
        except wandb.errors.UsageError as exc:
            raise ConfigError(f"W&B refuses the run: {_reason(exc)}") from exc
        except Exception as exc:
            raise RunError(
                f"W&B could not start within {INIT_S:g} s: {_reason(exc)}; check the network and the account, "
                f"or {OFFLINE}"
            ) from exc

    def log(self, record: Mapping[str, Any]) -> None:
        """Tells a round, with ``bytes_total``: all bytes of the rounds so far, both ways."""
        if self._run is None:
            return
        plain = json.loads(dumps(record))
        number = plain["round"]
        self._bytes += plain.get("bytes_down", 0) + plain.get("bytes_up", 0)
        if number >= self._first:
            with self._going_on():
                self._run.log({**plain, "bytes_total": self._bytes}, step=number, commit=True)
                self._last = number

    def finish(self, summary: Mapping[str, Any], status: Status) -> None:
        """Ends the W&B run; a run that did not finish is marked as failed there."""
        if self._run is not None:
            with self._going_on():
                self._finish(self._run, summary, status)
        if self._lost:
            resume = shlex.quote(f"resume={self._run_dir}")
            print(f"W&B: {self._lost}; metrics.jsonl has all, and fedsim {resume} sends it", flush=True)
        self._run, self._lost = None, ""

    def _finish(self, run: Run, summary: Mapping[str, Any], status: Status) -> None:
        run.summary.update(json.loads(dumps(summary)))
        if status == "finished":
            try:
                with _staging_in(self._folder):
                    run.summary["clients"] = _table(RunDir(self._run_dir).clients)
            except Exception:  # a table is not worth the end of the run
                log.warning("W&B did not take the table of clients", exc_info=True)
        folder = shlex.quote(str(self._folder))
        try:
            run.finish(EXIT_CODES[status])
        except TimeoutError:
            print(f"W&B: not all was uploaded; do it with: wandb sync --include-online {folder}", flush=True)
        else:
            if run.offline:
                print(f"W&B: upload the run with: wandb sync {folder}", flush=True)

    @contextmanager
    def _going_on(self) -> Iterator[None]:
        """What W&B cannot take any more is said at the end; the run goes on."""
        try:
            yield
        except Exception as exc:
            log.warning("W&B failed after round %d", self._last, exc_info=True)
            self._lost = f"recording stopped after round {self._last} ({_reason(exc)})"
            self._run = None
            import wandb

            if wandb.run is None:  # a run of whoever calls `simulate` uses the same service
                with suppress(Exception):  # one that is gone would be noisy at exit, and in the way of the next run
                    wandb.teardown(1)


def asked() -> Mode | None:
    """The mode that ``WANDB_MODE`` or W&B's settings files ask for; None: no other than the usual.

    Raises:
        ConfigError: It is none of W&B's modes, or not for fedsim.
    """
    import pydantic
    import wandb

    try:
        # What is set up first counts: silent, or `wandb.login` and `wandb.init` would say what they find.
        mode = wandb.setup(wandb.Settings(silent=True)).settings.mode
    except pydantic.ValidationError as exc:
        raise ConfigError(
            f"W&B's settings are wrong, in an environment variable (WANDB_MODE={os.environ.get('WANDB_MODE')}) or in a "
            f"settings file: {_reason(exc)}"
        ) from exc
    if mode == "shared":
        raise ConfigError("WANDB_MODE=shared is not available: only one process of a run talks to W&B; unset it")
    known: dict[str, Mode] = {"offline": "offline", "dryrun": "offline", "disabled": "disabled"}
    if mode == "online" and not os.environ.get("WANDB_MODE"):
        return None
    return known.get(mode, "online")


def has_credentials() -> bool:
    """Whether W&B finds a key or a token on this machine; asks neither the network nor the user.

    Raises:
        ConfigError: It finds one that cannot be right.
    """
    import wandb

    if wandb.run is not None:  # of whoever calls `simulate`: `wandb.login` would refuse to look
        return not wandb.run.offline
    try:
        return bool(wandb.login(prompt=False, verify=False))
    except wandb.errors.AuthenticationError as exc:
        raise ConfigError(
            f"the W&B credentials are wrong: {_reason(exc)}; run `wandb login --relogin`, correct WANDB_API_KEY, or "
            f"{OFFLINE}"
        ) from exc


def _identity(path: Path, sweep: str | None) -> dict[str, Any]:
    """Id and group of a run directory's W&B run, kept there: a resume goes on with that W&B run."""
    try:
        stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return {"id": str(stored["id"]), "group": stored["group"]}
    except FileNotFoundError:
        new = {"id": secrets.token_hex(8), "group": sweep}
        write_atomic(path, dumps(new) + "\n")
        return new
    except (OSError, ValueError, TypeError, KeyError) as exc:
        raise ConfigError(f"{path} is damaged ({one_line(exc)}); delete it, and W&B gets a new run") from exc


def _table(path: Path) -> Any:
    """``clients.csv`` as a table of W&B's."""
    import wandb

    with path.open(encoding="utf-8", newline="") as file:
        columns, *rows = csv.reader(file)
    return wandb.Table(columns=[*columns], data=[[_number(cell) for cell in row] for row in rows])


@contextmanager
def _staging_in(folder: Path) -> Iterator[None]:
    """The table waits for its upload in ``folder``; not in the home directory, where it would stay for ever."""
    if os.environ.get("WANDB_DATA_DIR"):
        yield
        return
    os.environ["WANDB_DATA_DIR"] = str(folder.resolve())
    try:
        yield
    finally:
        del os.environ["WANDB_DATA_DIR"]


def _number(cell: str) -> float | int | None:
    return None if not cell else int(cell) if cell.lstrip("-").isdigit() else float(cell)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__

"""What W&B is told, read back from its offline files; and what happens when it cannot be told."""

from __future__ import annotations

import csv
import json
import os
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import wandb
from wandb.proto import wandb_internal_pb2

import fedsim.tracking.wandb as tracker
from fedsim.config import load
from fedsim.errors import ConfigError
from fedsim.experiment import simulate
from fedsim.rundir import read_metrics, read_summary
from fedsim.tracking import RunInfo
from fedsim.tracking.wandb import Wandb
from tests.cli import QUICK, ROOT, Fedsim, only_run

ALL = "tracker=[console,jsonl,wandb]"
KEY = "a" * 40  # of the right length
SAVED = ("rounds=4", "checkpoint.seconds=0", "strategy._target_=tests.wrong.Interrupted")


@pytest.fixture(autouse=True)
def no_account(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No credentials, no settings of this machine's user, and no W&B service left from or to another test."""
    for name in [n for n in os.environ if n.startswith("WANDB")]:
        monkeypatch.delenv(name)
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("NETRC", str(home / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(home))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(home))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    before = sys.exit, sys.excepthook
    yield
    wandb.teardown()
    sys.exit, sys.excepthook = before  # wandb puts its own there


# --- reading offline files --------------------------------------------------------------------------------


@dataclass
class Told:
    """What one offline folder holds.

    Attributes:
        run: The record of the run itself.
        config: Its config.
        history: Rows without W&B's own keys.
        summary: The last value of each key.
        exit_code: None: the file does not say how the run ended.
    """

    folder: Path
    run: Any
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    exit_code: int | None = None


def records(path: Path) -> Iterator[Any]:
    """Records of a ``.wandb`` file: LevelDB's log format (32 KiB blocks) behind seven bytes that name W&B."""
    data, place, parts = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield wandb_internal_pb2.Record.FromString(parts)  # type: ignore[attr-defined]
            parts = b""


def offline_files(run_dir: Path) -> list[Path]:
    """The ``.wandb`` files of a run directory, oldest first, complete."""
    wandb.teardown()  # as at the end of a process: the service has written what it holds
    return sorted(run_dir.glob("wandb/offline-run-*/*.wandb"))


def told(run_dir: Path) -> list[Told]:
    """What is in the offline folders of a run directory, oldest first."""
    out = []
    for path in offline_files(run_dir):
        this = Told(path.parent, None)
        for record in records(path):
            kind = record.WhichOneof("record_type")
            if kind == "run" and this.run is None:
                this.run = record.run
                this.config = {u.key: json.loads(u.value_json) for u in record.run.config.update}
            elif kind == "history":
                row = {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
                assert row["_step"] == row["round"]
                this.history.append({k: v for k, v in row.items() if not k.startswith("_")})
            elif kind == "summary":
                this.summary |= {u.key: json.loads(u.value_json) for u in record.summary.update if u.key}
            elif kind == "exit":
                this.exit_code = record.exit.exit_code
        out.append(this)
    return out


def expected(run_dir: Path, rounds: int | None = None) -> list[dict[str, Any]]:
    """The rows of ``metrics.jsonl``, each with the bytes of all rounds so far."""
    rows = read_metrics(run_dir)[:rounds]
    sums = [sum(r["bytes_down"] + r["bytes_up"] for r in rows[: i + 1]) for i in range(len(rows))]
    assert sums and sums[0] > 0
    return [{**row, "bytes_total": total} for row, total in zip(rows, sums, strict=True)]


# --- runs that end well -----------------------------------------------------------------------------------


def test_a_sweep_is_a_group_of_runs_with_the_metrics_of_their_directories(fedsim: Fedsim, tmp_path: Path) -> None:
    outcome = fedsim("-m", *QUICK, "rounds=2", "eval.every=2", "strategy=fedavg,fedprox", ALL)
    assert (outcome.status, outcome.err) == (0, "")
    assert os.listdir(tmp_path) == ["runs"]  # nothing of W&B's beside them
    folders = sorted(p.parent for p in tmp_path.rglob("config.yaml"))
    found = [told(folder) for folder in folders]
    assert [len(f) for f in found] == [1, 1]
    one, two = (f[0] for f in found)
    for run_dir, this in zip(folders, (one, two), strict=True):
        assert this.history == expected(run_dir) and len(this.history) == 2
        assert "test_loss" in this.history[1] and "test_loss" not in this.history[0]
        assert this.exit_code == 0
        assert this.run.display_name == f"{run_dir.parent.name}/{run_dir.name}"
        assert {k: v for k, v in this.config.items() if k != "_wandb"} == load(run_dir / "config.yaml")
        assert this.folder.name in outcome.out  # what to sync
    assert one.run.run_id != two.run.run_id
    assert one.run.run_group == two.run.run_group and one.run.run_group.startswith("sweep-")
    assert one.run.project == "fedsim"
    assert outcome.out.count("W&B: offline (no account was found") == 2
    assert outcome.out.count("final test") == 2  # the console has its say too


def test_the_summary_and_the_clients_are_those_of_the_run_directory(fedsim: Fedsim, tmp_path: Path) -> None:
    assert fedsim(*QUICK, "tracker=wandb").status == 0
    run_dir = only_run(tmp_path)
    (this,) = told(run_dir)
    saved = read_summary(run_dir)
    assert saved and {key: this.summary[key] for key in saved} == saved
    (path,) = this.folder.glob("files/media/table/clients*.json")
    table = json.loads(path.read_text())
    with (run_dir / "clients.csv").open() as file:
        header, *rows = csv.reader(file)
    assert table["columns"] == header
    assert table["data"] == [[float(cell) for cell in row] for row in rows] and rows


def test_axes_are_declared(fedsim: Fedsim, tmp_path: Path) -> None:
    assert fedsim(*QUICK, "tracker=wandb").status == 0
    (path,) = offline_files(only_run(tmp_path))
    metrics = [r.metric for r in records(path) if r.WhichOneof("record_type") == "metric"]
    assert {"round", "virtual_seconds", "wall_seconds", "bytes_total"} <= {m.name for m in metrics}
    assert [m.step_metric for m in metrics if m.glob_name == "*"] == ["round"]


def test_options_reach_the_run(fedsim: Fedsim, tmp_path: Path) -> None:
    options = {"project": "p q", "entity": "team", "group": "mine", "name": "n", "tags": "[a,b c]"}
    given = [f"tracker.wandb.{k}={v!r}" if k != "tags" else f"tracker.wandb.{k}={v}" for k, v in options.items()]
    assert fedsim("-m", *QUICK, "tracker=wandb", *given, "seed=1").status == 0
    (this,) = told(only_run(tmp_path))
    run = this.run
    assert (run.project, run.entity, run.run_group, run.display_name) == ("p q", "team", "mine", "n")
    assert list(run.tags) == ["a", "b c"]


def test_results_do_not_depend_on_the_tracker(tmp_path: Path) -> None:
    args = [*QUICK, "participation=fraction", "participation.fraction=0.5", "rounds=2"]
    found = [simulate([*args, f"run_dir={tmp_path / t}", f"tracker=[{t}]"]).summary for t in ("jsonl", "wandb")]
    for key in ("params_sha256", "state_sha256", "partition_sha256", "config_sha256"):
        assert found[0][key] == found[1][key], key


def test_a_run_of_the_caller_s_own_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    with wandb.init(project="own", mode="offline", dir=tmp_path / "own", settings=wandb.Settings(silent=True)) as own:
        simulate([*QUICK, f"run_dir={tmp_path / 'runs'}", "tracker=[wandb]"])
        assert wandb.run is own
        own.log({"alive": 1})
    (this,) = told(only_run(tmp_path))
    assert this.history == expected(only_run(tmp_path))


# --- runs that end otherwise ------------------------------------------------------------------------------


def test_a_run_that_raised_is_finished_as_failed(fedsim: Fedsim, tmp_path: Path) -> None:
    outcome = fedsim(*QUICK, "rounds=3", "strategy._target_=tests.wrong.FailsOnClient", ALL)
    assert outcome.status == 1 and "round 2" in outcome.line
    (this,) = told(only_run(tmp_path))
    assert this.exit_code == 1
    assert this.history == expected(only_run(tmp_path)) and len(this.history) == 1


def test_an_interrupted_run_is_finished_as_failed_and_a_resume_goes_on_with_it(
    fedsim: Fedsim, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = fedsim("-m", *QUICK, *SAVED, ALL, "seed=5")
    assert outcome.status == 130
    run_dir = only_run(tmp_path)
    (this,) = told(run_dir)
    assert this.exit_code not in (None, 0)
    assert this.history == expected(run_dir, 2)
    monkeypatch.setenv("GO_ON", "1")
    time.sleep(1.1 - time.time() % 1)  # W&B's folders are named after the second
    assert fedsim(f"resume={run_dir}").status == 0
    before, after = told(run_dir)
    assert after.run.run_id == before.run.run_id and after.run.run_group == before.run.run_group != ""
    assert after.exit_code == 0
    assert after.history == expected(run_dir) and len(after.history) == 4  # the earlier rounds too: it stands alone


def test_a_terminated_process_tells_w_and_b_and_leaves_no_process_behind(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "fedsim.cli", *QUICK, *SAVED, "+strategy.signal=SIGTERM", "tracker=wandb"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130 and err.count("\n") == 1, err
    assert [line.split(":")[0] for line in out.splitlines()] == ["W&B", "W&B"]
    (this,) = told(only_run(tmp_path))
    assert this.exit_code not in (None, 0) and len(this.history) == 2
    for _ in range(100):
        if not _services_of(process.pid):
            break
        time.sleep(0.1)
    assert not _services_of(process.pid)


def _services_of(pid: int) -> list[str]:
    """W&B service processes that were started by a process."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_text().split("\0")
        except OSError:  # it has ended
            continue
        if words[0].endswith("wandb-core") and str(pid) in words:
            found.append(path.parent.name)
    return found


def test_w_and_b_failing_on_the_way_costs_no_round_and_a_resume_sends_all(
    fedsim: Fedsim, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    send = wandb.Run.log

    def breaks(run: wandb.Run, data: dict[str, Any], **options: Any) -> None:
        if data["round"] == 2:
            raise ConnectionResetError("Connection lost")
        send(run, data, **options)

    with monkeypatch.context() as broken:
        broken.setattr(wandb.Run, "log", breaks)
        outcome = fedsim(*QUICK, "rounds=3", "tracker=wandb")
    assert (outcome.status, outcome.err) == (0, "")
    run_dir = only_run(tmp_path)
    assert "W&B: recording stopped after round 1 (Connection lost)" in outcome.out and str(run_dir) not in outcome.err
    assert len(read_metrics(run_dir)) == 3 and read_summary(run_dir)["status"] == "finished"
    time.sleep(1.1 - time.time() % 1)
    assert fedsim(f"resume={run_dir}").status == 0
    assert told(run_dir)[-1].history == expected(run_dir)
    assert told(run_dir)[-1].exit_code == 0


def test_an_upload_that_takes_too_long_is_said_with_the_remedy(
    fedsim: Fedsim, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = wandb.Run.finish

    def late(run: wandb.Run, exit_code: int) -> None:
        finish(run, exit_code)
        raise TimeoutError

    monkeypatch.setattr(wandb.Run, "finish", late)
    outcome = fedsim(*QUICK, "tracker=wandb")
    assert (outcome.status, outcome.err) == (0, "")
    (this,) = told(only_run(tmp_path))
    assert "not all was uploaded; do it with: wandb sync --include-online runs/" in outcome.out
    assert outcome.out.rstrip().endswith(this.folder.name)


# --- accounts, modes and mistakes -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "netrc", "mode"),
    [
        ({}, "", "offline"),
        ({"WANDB_API_KEY": KEY}, "", "online"),
        ({"WANDB_BASE_URL": "http://here:1"}, f"machine here:1\n  login user\n  password {KEY}\n", "online"),
        ({"WANDB_BASE_URL": "http://here:1"}, f"machine there\n  login user\n  password {KEY}\n", "offline"),
        ({"WANDB_API_KEY": KEY, "WANDB_MODE": "offline"}, "", "offline"),
        ({"WANDB_API_KEY": KEY, "WANDB_MODE": "disabled"}, "", "disabled"),
        ({"WANDB_MODE": "online"}, "", "online"),
    ],
)
def test_auto_is_what_the_environment_says_then_what_credentials_allow(
    environment: dict[str, str], netrc: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    Path(os.environ["NETRC"]).write_text(netrc)
    assert Wandb()._resolve_mode()[0] == mode


def test_disabled_by_the_environment_says_so_and_writes_nothing(
    fedsim: Fedsim, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    outcome = fedsim(*QUICK, "tracker=wandb")
    assert outcome.status == 0 and outcome.out.startswith("W&B: off, because WANDB_MODE")
    assert not list(tmp_path.rglob("*wandb*"))


@pytest.mark.parametrize(
    ("environment", "argument", "said"),
    [
        ({"WANDB_API_KEY": "abc"}, "rounds=1", r"credentials are wrong: .*40\+ characters, has 3.*mode=offline"),
        ({"WANDB_MODE": "bogus"}, "rounds=1", r"WANDB_MODE=bogus.*'online', 'offline'"),
        ({"WANDB_MODE": "shared"}, "rounds=1", r"WANDB_MODE=shared is not available"),
        ({"WANDB_MODE": "offline"}, "tracker.wandb.mode=online", r"mode=online, but WANDB_MODE .* say offline; unset"),
        ({}, "tracker.wandb.mode=online", r"mode=online needs an account.*wandb login.*mode=offline"),
    ],
)
def test_a_wrong_account_is_one_line(
    environment: dict[str, str], argument: str, said: str, fedsim: Fedsim, monkeypatch: pytest.MonkeyPatch
) -> None:
    import re

    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    outcome = fedsim(*QUICK, "tracker=wandb", argument)
    assert outcome.status == 2 and re.search(said, outcome.line), outcome.line
    assert outcome.out == ""


def test_a_server_that_does_not_answer_ends_the_run_in_time(fedsim: Fedsim, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr(tracker, "INIT_S", 1.0)
    begin = time.monotonic()
    outcome = fedsim(*QUICK, "tracker=wandb")
    assert time.monotonic() - begin < 10
    assert outcome.status == 1 and "W&B could not start within 1 s" in outcome.line
    assert "tracker.wandb.mode=offline" in outcome.line


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"project": "a/b"},
            r"tracker\.wandb\.project .* none of .*got 'a/b'; the owner goes to tracker\.wandb\.entity",
        ),
        ({"project": "a" * 129}, "at most 128 characters"),
        ({"project": None}, r"tracker\.wandb\.project must be text, got None"),
        ({"entity": 3}, r"tracker\.wandb\.entity must be text, or null, got 3"),
        ({"group": " "}, r"tracker\.wandb\.group must be text, or null, got ' '"),
        ({"name": ["a"]}, r"tracker\.wandb\.name must be text, or null"),
        ({"mode": "of"}, r"tracker\.wandb\.mode must be auto, online or offline, got 'of'"),
        ({"tags": "a"}, r"tracker\.wandb\.tags must be a list of texts"),
        ({"tags": [1]}, r"tracker\.wandb\.tags must be a list of texts"),
        ({"tags": ["a" * 65]}, "of 1 to 64 characters"),
    ],
)
def test_options_are_checked_on_construction(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Wandb(**options)


@pytest.mark.parametrize("dry", [True, False])
def test_credentials_that_are_missing_leave_nothing_behind(fedsim: Fedsim, tmp_path: Path, dry: bool) -> None:
    outcome = fedsim(*QUICK, ALL, "tracker.wandb.mode=online", *["--dry-run"] * dry)
    assert outcome.status == 2 and "mode=online needs an account" in outcome.line
    assert not list(tmp_path.rglob("config.yaml"))


def test_a_damaged_identity_is_named(tmp_path: Path) -> None:
    (tmp_path / "wandb.json").write_text("{")
    with pytest.raises(ConfigError, match=r"wandb\.json is damaged .*delete it"):
        Wandb().start(RunInfo(tmp_path, rounds=1))


def test_a_run_without_the_tracker_does_not_import_wandb(tmp_path: Path) -> None:
    code = """
import sys
from fedsim.cli import main
for args in sys.argv[1:]:
    try:
        main(args.split())
    except SystemExit as exc:
        assert not exc.code and "wandb" not in sys.modules, args
"""
    commands = ["--help", " ".join(["--dry-run", *QUICK]), " ".join(QUICK)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, *commands], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


# --- online, with a server of our own ---------------------------------------------------------------------


class Server(BaseHTTPRequestHandler):
    """As much of W&B's server as a run needs: whether it has a run, and what it is told of it."""

    rows: dict[str, list[dict[str, Any]]]
    ends: list[int]

    def log_message(self, *_: object) -> None: ...

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self._answer({})

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path == "/graphql":
            request = json.loads(raw)
            self._answer({"data": self._data(request.get("operationName"), request.get("variables") or {})})
        elif self.path.endswith("/file_stream"):
            told = json.loads(raw)
            content = (told.get("files") or {}).get("wandb-history.jsonl", {}).get("content", [])
            self.rows.setdefault(self.path.split("/")[4], []).extend(map(json.loads, content))
            if told.get("complete"):
                self.ends.append(told["exitcode"])
            self._answer({})
        else:
            self._answer({})

    def _data(self, operation: str, given: dict[str, Any]) -> dict[str, Any]:
        project = {"id": "p", "name": "fedsim", "entity": {"id": "e", "name": "me"}}
        name = given.get("name", "")
        if operation == "RunResumeStatus":
            rows = self.rows.get(name)
            known = {"id": "b", "name": name, "displayName": "", "config": "{}", "summaryMetrics": "{}", "tags": []}
            known |= {"logLineCount": 0, "eventsLineCount": 0, "eventsTail": "[]", "wandbConfig": '{"t":1}'}
            if rows:
                known |= {"historyLineCount": len(rows), "historyTail": json.dumps([json.dumps(rows[-1])])}
            return {"model": {**project, "bucket": known if rows else None}}
        if operation == "UpsertBucket":
            bucket = {"id": "b", "name": name, "displayName": "", "config": "{}", "project": project}
            return {"upsertBucket": {"bucket": {**bucket, "historyLineCount": 0}, "inserted": name not in self.rows}}
        if operation == "CreateRunFiles":
            url = f"http://{self.headers['Host']}/upload"
            files = [{"name": f, "uploadUrl": url} for f in given["files"]]
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
        if operation == "Viewer":
            return {"viewer": {"id": "u", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}}
        return {}

    def _answer(self, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.mark.slow
def test_an_online_run_goes_on_after_a_resume_without_a_gap_and_without_a_round_twice(
    fedsim: Fedsim, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: dict[str, list[dict[str, Any]]] = {}
    ends: list[int] = []
    kind = type("Bound", (Server,), {"rows": rows, "ends": ends})
    with ThreadingHTTPServer(("127.0.0.1", 0), kind) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_address[1]}")
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        try:
            stopped = fedsim(*QUICK, *SAVED, "tracker=wandb")
            assert stopped.status == 130 and "\nW&B" not in stopped.out and "/me/fedsim/runs/" in stopped.out
            (run_dir,) = tmp_path.glob("runs/*/*")
            # The newest checkpoint is lost, as after a kill: round 2 is computed again, and W&B has it already.
            (run_dir / "checkpoints").glob("00000002*").__next__().unlink()
            monkeypatch.setenv("GO_ON", "1")
            assert fedsim(f"resume={run_dir}").status == 0
        finally:
            server.shutdown()
            thread.join()
    ((name, found),) = rows.items()
    assert name == json.loads((run_dir / "wandb.json").read_text())["id"]
    assert [row["round"] for row in found] == [row["_step"] for row in found] == [1, 2, 3, 4]
    wall = ("wall_seconds",)  # round 2 has that of its first time
    for row, want in zip(found, expected(run_dir), strict=True):
        assert {k: row[k] for k in want if k not in wall} == {k: v for k, v in want.items() if k not in wall}
    assert len(ends) == 2 and ends[0] not in (0, None) and ends[1] == 0

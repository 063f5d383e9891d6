"""The command: what it prints, what it leaves, and how users add their own plug-ins."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedsim.cli import COMMANDS, HELP
from fedsim.compose import compose
from fedsim.config import GROUPS, config_hash, dump, load, options
from fedsim.cost import estimate
from fedsim.experiment import build, simulate
from fedsim.rundir import read_summary
from tests.cli import QUICK, ROOT, Fedsim, only_run

# --- help -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "args", [["--help"], ["-h"], ["help"], ["rounds=5", "--help"], *([c, "--help"] for c in COMMANDS)]
)
def test_help_fits_a_screen(fedsim: Fedsim, args: list[str]) -> None:
    outcome = fedsim(*args)
    assert outcome.status == 0 and outcome.err == ""
    lines = outcome.out.splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 120
    assert lines[0].startswith("fedsim")


def test_help_names_every_command_and_option() -> None:
    for word in (*COMMANDS, "-m", "resume=", "--dry-run", "--cfg", "--config-dir", "--version"):
        assert word in HELP


def test_help_and_a_misspelt_key_do_not_wait_for_torch(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom fedsim.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    for args in (["--help"], ["list"], ["rouns=5"], ["rounds=0"]):
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-c", code, *args], cwd=tmp_path, env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr


def test_version(fedsim: Fedsim) -> None:
    outcome = fedsim("--version")
    assert outcome.status == 0 and outcome.out.startswith("fedsim ")


def test_list_shows_every_group_and_every_option_with_a_word_on_it(fedsim: Fedsim) -> None:
    listed = fedsim("list").out
    for group in GROUPS:
        assert group in listed
        for option in options(group):
            assert option in listed
    for group in GROUPS:
        lines = fedsim("list", group).out.splitlines()
        assert [line.split()[0] for line in lines] == list(options(group))
        assert all(len(line.split(maxsplit=1)) == 2 for line in lines)


# --- the config -------------------------------------------------------------------------------------------

UNUSUAL = [
    *("partition=dirichlet", "partition.alpha=inf", "name='a: \"b\" # ü'", "client.clip_norm=1e-12", "seed=7"),
    *("stop.virtual_seconds=1e30", "client.optimizer={_target_: torch.optim.RMSprop, alpha: 0.5}", "model.hidden=[]"),
]


@pytest.mark.parametrize(
    "overrides", [[], UNUSUAL, ["data=synthetic", "strategy=scaffold"], ["experiment=centralized"]]
)
def test_the_printed_config_is_the_config(fedsim: Fedsim, tmp_path: Path, overrides: list[str]) -> None:
    printed = fedsim("--cfg", *overrides)
    assert printed.status == 0 and os.listdir(tmp_path) == []
    path = tmp_path / "config.yaml"
    path.write_text(printed.out)
    expected = build(compose(overrides), overrides).config
    assert load(path) == expected
    assert config_hash(load(path)) == config_hash(expected)
    again = build(load(path)).config
    assert again == expected and dump(again) == printed.out


def test_a_run_stores_the_printed_config(fedsim: Fedsim, tmp_path: Path) -> None:
    assert fedsim(*QUICK, "tracker=[]").status == 0
    assert (only_run(tmp_path) / "config.yaml").read_text() == fedsim("--cfg", *QUICK, "tracker=[]").out


def test_an_experiment_file_counts_more_than_defaults_and_less_than_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /strategy: fedprox\nrounds: 7\nseed: 3\nstrategy:\n  mu: 0.5\n"
        "client:\n  lr: 0.02\ndata:\n  validation: 0.2\n"
    )
    config = compose(["experiment=mine", "client.lr=0.03"], tmp_path)
    found = (config["rounds"], config["seed"], config["client"]["lr"], config["data"]["validation"])
    assert found == (7, 3, 0.03, 0.2)
    assert config["strategy"]["mu"] == 0.5 and config["strategy"]["_target_"].endswith("FedProx")


# --- the cost ---------------------------------------------------------------------------------------------


def test_the_dry_run_says_what_a_hand_computes_and_writes_nothing(fedsim: Fedsim, tmp_path: Path) -> None:
    # 1,442 training images for 4 clients: 361, 361, 360 and 360, of which round(36.1) and 36 are held out. So 325 and
    # 324 remain: 11 batches of 32, 22 steps in 2 epochs. Logistic regression on 8x8: 64 * 10 + 10 parameters.
    args = ["model=logreg", "partition=iid", "partition.num_clients=4", "client.epochs=2", "rounds=3"]
    outcome = fedsim("--dry-run", *args)
    assert outcome.status == 0 and os.listdir(tmp_path) == []
    assert "650 parameters" in outcome.out and "nothing was trained" in outcome.out
    model = 4 * 650
    cost = estimate(build(compose(args)))
    assert (cost["cohort"], cost["model_bytes"]) == (4, model)
    assert (cost["steps"], cost["total_steps"]) == (4 * 22, 3 * 4 * 22)
    assert (cost["bytes_down"], cost["bytes_up"]) == (4 * model, 4 * model)
    assert (cost["total_bytes_down"], cost["total_bytes_up"]) == (12 * model, 12 * model)
    sent_twice = estimate(build(compose([*args, "strategy=scaffold"])))  # the model and a control variate, both ways
    assert (sent_twice["bytes_down"], sent_twice["bytes_up"]) == (8 * model, 8 * model)
    assert sent_twice["memory_per_client"] - cost["memory_per_client"] == model


@pytest.mark.parametrize("strategy", ["fedavg", "fedprox", "scaffold", "fedadam"])
def test_the_dry_run_is_what_a_run_then_costs(tmp_path: Path, strategy: str) -> None:
    overrides = [*QUICK, f"strategy={strategy}", "rounds=2", f"run_dir={tmp_path}", "tracker=[]"]
    cost = estimate(build(compose(overrides)))
    totals = simulate(overrides).summary["totals"]
    assert cost["total_steps"] == totals["steps"]
    assert (cost["total_bytes_down"], cost["total_bytes_up"]) == (totals["bytes_down"], totals["bytes_up"])


def test_a_dry_run_charges_what_is_sent_once_to_each_client_once(tmp_path: Path) -> None:
    small = ["strategy=fedlex", "strategy.explore_epochs=1", "rounds=4", f"run_dir={tmp_path}", "tracker=[]"]
    cost = estimate(build(compose([*QUICK, *small])))
    totals = simulate([*QUICK, *small]).summary["totals"]
    explored = 3 * cost["model_bytes"]  # a vector down to each of three clients, before round 1
    assert cost["total_bytes_down"] == totals["bytes_down"] - explored == (4 + 1) * explored


def test_a_dry_run_of_steps_and_a_sampled_cohort() -> None:
    overrides = ["client.epochs=null", "client.steps=7", "participation=fixed", "participation.clients_per_round=3"]
    cost = estimate(build(compose(overrides)))
    assert (cost["cohort"], cost["steps"], cost["total_steps"]) == (3, 21, 30 * 21)


# --- sweeps -----------------------------------------------------------------------------------------------


def test_a_sweep_makes_one_run_directory_per_job_and_nothing_else(fedsim: Fedsim, tmp_path: Path) -> None:
    outcome = fedsim("-m", *QUICK, "strategy=fedavg,fedprox", "seed=1,2", "name=sweep/x")
    assert outcome.status == 0 and outcome.err == ""
    assert os.listdir(tmp_path) == ["runs"] and os.listdir(tmp_path / "runs") == ["sweep"]
    runs = sorted((tmp_path / "runs/sweep/x").iterdir())
    found = sorted(
        (load(r / "config.yaml")["strategy"]["_target_"].split(".")[-1], read_summary(r)["seed"]) for r in runs
    )
    assert found == [("FedAvg", 1), ("FedAvg", 2), ("FedProx", 1), ("FedProx", 2)]
    heads = [line for line in outcome.out.splitlines() if line.startswith("[")]
    assert [head.split()[0] for head in heads] == ["[0]", "[1]", "[2]", "[3]"]
    assert "strategy=fedavg seed=1" in heads[0]


def test_an_impossible_job_is_named_and_the_others_finish(fedsim: Fedsim, tmp_path: Path) -> None:
    outcome = fedsim("-m", *QUICK, "partition.num_clients=3,5000,2", "tracker=[]")
    assert outcome.status == 1
    first, last = outcome.err.splitlines()
    assert first.startswith("fedsim: [1] ") and "5000" in first
    assert last.startswith("fedsim: 1 of 3 runs of the sweep failed: [1] ") and "partition.num_clients=5000" in last
    done = [load(path.parent / "config.yaml")["partition"]["num_clients"] for path in tmp_path.rglob("summary.json")]
    assert sorted(done) == [2, 3]
    assert len(list(tmp_path.rglob("config.yaml"))) == 2


def test_a_job_that_fails_on_the_way_does_not_end_the_sweep(fedsim: Fedsim, tmp_path: Path) -> None:
    targets = "tests.wrong.FailsOnServer,fedsim.strategies.fedavg.FedAvg"
    outcome = fedsim("-m", *QUICK, f"strategy._target_={targets}", "tracker=[]")
    assert outcome.status == 1 and "1 of 2 runs of the sweep failed: [0]" in outcome.err
    assert len(list(tmp_path.rglob("summary.json"))) == 1


def test_a_sweep_goes_over_the_options_that_fit_a_pattern(fedsim: Fedsim, tmp_path: Path) -> None:
    outcome = fedsim("-m", *QUICK, "strategy=glob(fedad*)", "tracker=[]")
    assert outcome.status == 0 and outcome.err == ""
    found = [load(path)["strategy"]["_target_"].split(".")[-1] for path in tmp_path.rglob("config.yaml")]
    assert sorted(found) == ["FedAdagrad", "FedAdam"]


@pytest.mark.parametrize(
    ("sweep", "line"),
    [
        ("strategy=glob(fedx*)", "'strategy=glob(fedx*)' fits no option of strategy"),
        ("strategy=fedprox,fedsam", "unknown key 'clients.lr'"),
        ("strategy=glob(fedp*)", "unknown key 'clients.lr'"),
    ],
)
def test_a_wrong_sweep_is_explained(sweep: str, line: str, fedsim: Fedsim) -> None:
    assert line in fedsim("-m", *QUICK, sweep, "clients.lr=0.1").line


def test_a_key_of_swept_options_needs_two_plus_signs(fedsim: Fedsim, tmp_path: Path) -> None:
    sweep = ("-m", *QUICK, "strategy=fedavgm,fedsam", "tracker=[]")
    assert fedsim(*sweep, "strategy.server_lr=0.5").line.endswith("write ++strategy.server_lr=...")
    assert fedsim(*sweep, "++strategy.server_lr=0.5").status == 0
    assert {load(path)["strategy"]["server_lr"] for path in tmp_path.rglob("config.yaml")} == {0.5}


# --- a user's own -----------------------------------------------------------------------------------------

MODULE = """
from dataclasses import dataclass
from torch import nn
from fedsim.strategies.fedavg import FedAvg

@dataclass(frozen=True)
class Mine(FedAvg):
    knob: float = 1.0

class Net(nn.Sequential):
    def __init__(self, input_shape, num_classes):
        super().__init__(nn.Flatten(), nn.Linear(input_shape[1] * input_shape[2], num_classes))
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder with a module, and config groups that name its classes."""
    (tmp_path / "my_plugins.py").write_text(MODULE)
    for name, text in {
        "strategy/mine": "# My method.\n_target_: my_plugins.Mine\nknob: 2.0\n",
        "model/net": "_target_: my_plugins.Net\n",
    }.items():
        path = tmp_path / "conf dir" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def console_script(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The installed command, which unlike `python -m` does not look for modules in the current folder by itself."""
    code = "from fedsim.cli import main; main()"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-P", "-c", code, *args], cwd=cwd, env=env, capture_output=True, text=True, timeout=120
    )


def test_own_config_groups_and_plugins_of_the_current_folder(own: Path) -> None:
    args = ["--config-dir", "conf dir", "strategy=mine", "model=net", "strategy.knob=1,3", "data.validation=0.1"]
    done = console_script("-m", *args, "rounds=1", "partition.num_clients=3", cwd=own)
    assert done.returncode == 0, done.stderr
    runs = [path.parent for path in own.rglob("summary.json")]
    assert sorted(load(run / "config.yaml")["strategy"]["knob"] for run in runs) == [1, 3]
    assert sorted(set(os.listdir(own)) - {"__pycache__"}) == ["conf dir", "my_plugins.py", "runs"]
    again = console_script(f"resume={runs[0]}", "rounds=2", cwd=own)  # a run knows its config: no --config-dir
    assert again.returncode == 0, again.stderr


@pytest.fixture
def in_own(own: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, with its module importable in this process."""
    monkeypatch.syspath_prepend(own)
    monkeypatch.delitem(sys.modules, "my_plugins", raising=False)
    return own / "conf dir"


def test_own_options_are_listed_and_explained(fedsim: Fedsim, in_own: Path) -> None:
    assert "mine" in fedsim("list", "--config-dir", str(in_own)).out
    assert "mine                 My method." in fedsim("list", "strategy", f"--config-dir={in_own}").out
    assert "did you mean 'mine'?" in fedsim("--config-dir", str(in_own), "strategy=min").line
    assert (
        "did you mean 'strategy.knob'?" in fedsim("--config-dir", str(in_own), "strategy=mine", "strategy.nob=1").line
    )
    assert "belongs to strategy=mine" in fedsim("--config-dir", str(in_own), "strategy.knob=1").line
    assert "strategy has no option 'mine'" in fedsim("strategy=mine").line


def test_own_config_groups_from_python(in_own: Path, tmp_path: Path) -> None:
    result = simulate([*QUICK[:1], "strategy=mine", "model=net", f"run_dir={tmp_path}/r", "tracker=[]"], in_own)
    assert load(result.run_dir / "config.yaml")["strategy"] == {"_target_": "my_plugins.Mine", "knob": 2.0}


@pytest.mark.parametrize(
    "file, text, says",
    [
        ("strategy/fedavg", "_target_: my_plugins.Mine", "fedsim has strategy=fedavg already; rename the file"),
        ("strategy/mine", "_target_: [", "mine.yaml"),
        ("strategy/mine", "knob: 1", "strategy must be a config with a `_target_`"),
        ("strategy/mine", "_target_: my_plugins.Mine\nnob: 1", "unknown key 'strategy.nob' (did you mean 'knob'?)"),
        ("strategy/mine", "_target_: my_plugins.Mien", "my_plugins has no 'Mien' (did you mean 'Mine'?)"),
        ("strategy/mine", "_target_: my_plugins.Mine\nknob: ${nothing}", "Interpolation key 'nothing' not found"),
        (
            "strategy/mine",
            "_target_: my_plugins.Mine\nknob: ???",
            "strategy.knob has no value yet; set it: strategy.knob=...",
        ),
        ("strategy/mine", "", "strategy must be a config with a `_target_`"),
        ("strategy/mine", "- a\n- b", "strategy must be a config with a `_target_`"),
        ("strategy/mine", "defaults:\n  - nothing\n", "nothing"),
    ],
)
def test_a_wrong_config_file_of_ones_own_is_one_clear_line(
    fedsim: Fedsim, in_own: Path, file: str, text: str, says: str
) -> None:
    (in_own / f"{file}.yaml").write_text(text)
    outcome = fedsim("--config-dir", str(in_own), "strategy=mine")
    assert outcome.status == 2 and says in outcome.line
    assert not (in_own.parent / "runs").exists()

"""What people type wrong: each case ends with one line that teaches, and leaves nothing behind."""

from __future__ import annotations

import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from fedsim.cli import main
from fedsim.compose import resume_config
from fedsim.config import load
from fedsim.errors import RunError
from fedsim.rundir import RunDir, read_metrics, read_summary
from tests.cli import QUICK, ROOT, Fedsim, only_run, process

# --- before anything is done: status 2, nothing left behind -----------------------------------------------

#: Command line, and what its line must say.
REFUSED: list[tuple[str, str]] = [
    # keys
    ("data._target_=tests.wrong.Regression partition=dirichlet", "divides by class, and line has none (regression)"),
    ("strategy=fedsgd client.drop_last=true", "client.drop_last=true has no effect with strategy=FedSGD"),
    ("report", "fedsim report needs a run directory"),
    ("report ''", "a run directory is empty ('')"),
    ("report runs", "runs does not exist"),
    ("report . ot=x.html", "has no option ot= (did you mean 'out'?)"),
    ("compare . format=pdf", "pdf"),
    ("compare . target=90", "90"),
    ("replay", "fedsim replay needs a run directory"),
    ("replay nothing round=1 client=1", "nothing is not a directory"),
    ("doctor now", "fedsim doctor takes no arguments, got 'now'"),
    ("tracker=wand", "did you mean 'wandb'?"),
    ("tracker=wandb tracker.wandb.mode=sometimes", "tracker.wandb.mode"),
    ("eval.finetune_epochs=-1", "eval.finetune_epochs must be a whole number, at least 0"),
    ("checkpoint.keep=1", "checkpoint.keep must be a whole number, at least 2, or null, got 1"),
    ("strategy=fednova client.optimizer=adam", "strategy=fednova needs client.optimizer=sgd, got adam"),
    ("strategy=fedsgd client.epochs=5", "client.epochs=5 has no effect with strategy=FedSGD: a visit is one step over"),
    ("strategy=fedsgd +client.steps=5 client.epochs=null", "has no effect with strategy=FedSGD"),
    ("rouns=5", "unknown key 'rouns' (did you mean 'rounds'?)"),
    ("clint.lr=0.1", "did you mean 'client.lr'?"),
    ("client.learning_rate=0.1", "did you mean 'client.lr'?"),
    ("client.learning_rte=0.1", "did you mean 'client.lr'?"),
    ("client.bach_size=8", "did you mean 'client.batch_size'?"),
    ("lr=0.1", "did you mean 'client.lr'?"),
    ("epochs=5", "did you mean 'client.epochs'?"),
    ("num_clients=10", "did you mean 'partition.num_clients'?"),
    ("dataset=mnist", "did you mean 'data'?"),
    ("method=fedavg", "did you mean 'strategy'?"),
    ("mu=0.1", "did you mean 'strategy.mu' of strategy=fednova or strategy=fedprox or strategy=fedspeed?"),
    ("strategy.mue=1", "did you mean 'strategy.mu' of strategy=fednova or strategy=fedprox or strategy=fedspeed?"),
    ("strategy=fedprox strategy.mue=1", "did you mean 'strategy.mu'?"),
    ("strategy.mu=1", "or strategy=fedprox or strategy=fedspeed; this run has strategy=fedavg"),
    ("participation.fraction=0.5", "it belongs to participation=fraction; this run has participation=all"),
    ("partition=pathological partition.alpha=1", "it belongs to partition=dirichlet"),
    ("client/lr=0.1", "did you mean 'client.lr'?"),
    ("tracker.console.foo=1", "tracker.console has: style, interval_s"),
    ("strategy.zzz=1", "+strategy.zzz=..."),
    ("+foo=1", "unknown key 'foo'; known: availability, checkpoint, client"),
    ("+client.foo=1", "unknown key 'client.foo'; known: optimizer, lr"),
    ("+client.lr=0.2", "client.lr has a value already; write client.lr=..., without '+'"),
    ("+strategy.foo=1", "unknown key 'strategy.foo'; fedsim.strategies.fedavg.FedAvg takes: weights"),
    ("~client.lr", "key 'client.lr' is missing; it cannot be deleted"),
    ("~stratgey", "did you mean 'strategy'?"),
    ("=5", "unknown key ''"),
    # groups and options
    ("strategy=fedporx", "strategy has no option 'fedporx' (did you mean 'fedprox'?); it has: autoflip, ditto"),
    ("strategy=FedProx", "did you mean 'fedprox'?"),
    ("strateg=fedprox", "did you mean 'strategy'?"),
    ("strategy=", "strategy has no option nothing; it has: autoflip, ditto"),
    ("strategy=null", "strategy has no option null; it has: autoflip, ditto"),
    ("strategy=[fedavg,fedprox]", "strategy takes one option, got [fedavg,fedprox]; for a sweep"),
    ("strategy=fedavg,fedprox", "gives several values: add -m for a sweep"),
    ("+strategy=fedprox", "write strategy=fedprox, without '+'"),
    ("tracker=[console,wandbb]", "tracker has no option 'wandbb'"),
    ("tracker=null", "for no tracker at all write tracker=[]"),
    ("recipe=[nothing]", "recipe has no option 'nothing'"),
    ("experiment=nope", "experiment has no option 'nope'; it has: asynchronous_digits"),
    ("hydra.run.dir=x", "hydra.run.dir=x has no effect without -m"),
    # overrides that cannot be read
    ("'client.lr=[0.1'", "cannot read the override 'client.lr=[0.1': it must be key=value"),
    ("""'name="half'""", "cannot read the override"),
    ("client:lr=0.1", "cannot read the override"),
    ("ключ=1", "cannot read the override"),
    ("client.lr=0.1,0.2", "gives several values: add -m for a sweep"),
    ("'rounds=${foo}'", "rounds: Interpolation key 'foo' not found"),
    # arguments that are no overrides
    ("rounds", "cannot use the argument 'rounds': it needs a value: rounds=..."),
    ("client.lr = 0.1", "cannot use the argument 'client.lr': it needs a value: client.lr=..., without spaces"),
    ("run rounds=5", "cannot use the argument 'run': a run takes key=value; other commands are list"),
    ("lst", "did you mean 'list'?"),
    ("rounds=1 list", "the command comes first, as in fedsim list"),
    ("fedprox", "write strategy=fedprox"),
    ("''", "cannot use the argument ''"),
    ("--dryrun", "unknown option '--dryrun' (did you mean '--dry-run'?)"),
    ("--rounds=5", "unknown option '--rounds=5': write rounds=5, without dashes"),
    ("--rounds 5", "write rounds=..., without dashes"),
    ("-x", "unknown option '-x'"),
    ("-m --dry-run seed=1,2", "a sweep (-m) takes neither --dry-run nor --cfg"),
    ("list nothing", "fedsim list takes one group, got 'nothing'; groups: strategy"),
    ("list stratgy", "did you mean 'strategy'?"),
    ("list --cfg", "unknown option '--cfg'"),
    ("compare", "fedsim compare needs a run directory, such as runs/fedavg-digits/"),
    ("compare nothing", "nothing does not exist"),
    ("compare .", "is not a run directory"),
    ("partition data=synthetic", "brings its own clients"),
    ("--config-dir nowhere strategy=mine", "--config-dir nowhere must hold config groups"),
    ("--config-dir", "--config-dir needs a folder"),
    ("-m seed=range(0)", "the sweep is empty: seed=range(0) gives no values"),
    ("-m seed=1,", "cannot read the override 'seed=1,'"),
    ("-m strategy=fedavg,fedporx", "strategy has no option 'fedporx' (did you mean 'fedprox'?)"),
    ("-m seed=1,2 strateg=fedavg", "did you mean 'strategy'?"),
    ("-m seed=1,2 resume=x", "a sweep (-m) makes new runs"),
    # types and ranges
    ("rounds=0", "rounds must be a whole number, at least 1, got 0"),
    ("rounds=five", "rounds must be a whole number, at least 1, got 'five'"),
    ("rounds=1.5", "got 1.5"),
    ("rounds=true", "got true"),
    ("rounds=", "got nothing"),
    ("seed=-1", "seed must be a whole number, at least 0, got -1"),
    ("client.lr=nan", "client.lr must be a number in (0, inf), got nan"),
    ("client.lr=inf", "got inf"),
    ("client.lr=-1", "got -1"),
    ("client.lr=0", "got 0"),
    ("client.lr=null", "got null"),
    ("client.lr={a:1}", "got {'a': 1}"),
    ("client.batch_size=0", "client.batch_size must be a whole number, at least 1, or null, got 0"),
    ("client.momentum=1", "client.momentum must be a number in [0, 1), got 1"),
    ("client.clip_norm=0", "client.clip_norm must be"),
    ("client.betas=[0.5]", "client.betas must be two numbers in [0, 1), such as [0.9, 0.999], got [0.5]"),
    ("client.buffers=foo", "client.buffers must be one of mean, local, frozen, got 'foo'"),
    ("client.nesterov=yes", "client.nesterov must be true or false, got 'yes'"),
    ("data.augment=[flipp]", "data.augment must be one of flip, crop, got 'flipp' (did you mean 'flip'?)"),
    ("data.augment=flip", "data.augment must be a list, such as [flip, crop], got 'flip'"),
    ("data.validation=1", "data.validation must be a number in [0, 1), got 1"),
    ("partition.num_clients=0", "partition.num_clients must be a whole number of at least 1"),
    ("partition.num_clients=2.0", "got 2.0"),
    ("partition.alpha=nan", "partition.alpha must be a number in (0, inf]"),
    ("partition.holdout=null", "partition.holdout must be a number in [0, 1), or test, got null"),
    ("partition.holdout=1.5", "partition.holdout must be a number in [0, 1), or test, got 1.5"),
    ("participation=fraction participation.fraction=2", "participation.fraction must be a number in (0, 1], got 2"),
    ("model.hidden=5", "model.hidden must be a list of positive whole numbers, such as [200, 200], got 5"),
    ("strategy=fedprox strategy.mu=-1", "strategy.mu must be >= 0, got -1"),
    ("strategy=fedprox strategy.mu=nan", "strategy.mu must be finite, got nan"),
    ("strategy=fedprox strategy.mu=a", "strategy.mu must be a number, got 'a'"),
    ("eval.clients=some", "eval.clients must be participants, all, or a whole number of clients"),
    ("engine.device=gpu", "engine.device must be cpu, cuda, cuda:<number> or auto, got 'gpu'"),
    ("engine.device=cuda:99", "CUDA devices that torch can use; set engine.device=cpu"),
    (
        "stop=null",
        "stop must be a group with the keys target_accuracy, patience, virtual_seconds, contributions, got null",
    ),
    ("name=5", "name must be text or null (a number is quoted twice: name='\"5\"'), got 5"),
    ("name=..", "`name` must be a relative path without '..'"),
    ("name=a/../../b", "`name` must be a relative path without '..'"),
    # what does not go together
    ("client.steps=5", "give one of client.epochs and client.steps and set the other to null; got client.epochs=2"),
    ("client.epochs=null", "got client.epochs=null client.steps=null"),
    (
        "client.optimizer=sgdd",
        "client.optimizer must be one of sgd, adam, adamw, adagrad, got 'sgdd' (did you mean 'sgd'?)",
    ),
    ("client.optimizer=adam client.momentum=0.9", "client.momentum=0.9 has no effect with client.optimizer=adam"),
    ("client.betas=[0.5,0.5]", "client.betas=[0.5, 0.5] has no effect with client.optimizer=sgd"),
    ("client.nesterov=true", "client.nesterov=true needs client.momentum > 0"),
    ("client.optimizer={lr:3}", "client.optimizer must be a config with a `_target_`"),
    ("client.optimizer={_target_:torch.optim.LBFGS}", "choose an optimizer whose step() needs no closure"),
    ("client.optimizer={_target_:torch.optim.Adamm}", "torch.optim has no 'Adamm' (did you mean 'Adam'?)"),
    (
        "client.optimizer={_target_:torch.optim.RMSprop,alfa:1}",
        "unknown key 'client.optimizer.alfa' (did you mean 'alpha'",
    ),
    (
        "client.optimizer={_target_:torch.optim.RMSprop,alpha:-3}",
        "cannot be built: ValueError: Invalid alpha value: -3",
    ),
    ("client.optimizer={_target_:torch.optim.RMSprop,lr:3}", "set client.lr instead"),
    ("client.optimizer={_target_:torch.nn.Linear}", "client.optimizer (torch.nn.Linear) cannot be built"),
    ("stop.patience=3", "stop.patience=3 looks at examples that the server keeps, and data.validation is 0; set data."),
    ("stop.target_accuracy=0.9", "set data.validation, such as data.validation=0.1"),
    ("data.validation=0.0001", "would keep 0 of 1442 training examples"),
    ("partition.num_clients=5000", "partition.num_clients=5000 with partition.min_size=1 needs 5000 training examples"),
    ("partition=iid partition.num_clients=5000", "there are only 1442"),
    ("partition.min_size=1000", "needs 20000 training examples, but there are only 1442; lower one of the two"),
    ("partition=pathological partition.num_clients=2", "is 4: too few to cover 10 classes; raise one of the two"),
    ("partition=pathological partition.classes_per_client=11", "have only 10 classes; lower it"),
    ("partition=natural", "needs data with a natural key"),
    ("participation=fixed participation.clients_per_round=21", "is more than partition.num_clients=20"),
    ("data=synthetic partition.num_clients=5", "has no effect: data=synthetic brings its own clients; set data.num_c"),
    ("data=synthetic data.validation=0.1", "data.validation=0.1 is not available"),
    ("data=synthetic data.augment=[flip]", "is for images; synthetic has none"),
    ("data=synthetic model=cnn", "model=cnn needs images (channels, height, width)"),
    ("model=lenet5", "needs images of at least 12x12, but the data have 8x8"),
    ("data=images", "data.path has no value yet; set it: data.path=..."),
    ("data=mnist data.root=nowhere", "correct data.root, data.path or data.config"),
    ("model.weights=nope.safetensors", "model.weights=nope.safetensors does not exist; give a .safetensors file"),
    ("run_dir=/dev/null/x", "cannot make a run directory in /dev/null/x/fedavg-digits: Not a directory"),
    ("resume=nope", "nope is not a directory; a run directory looks like runs/<name>/<timestamp>-<hash>"),
    ("resume=.", "is not a run directory: it has no config.yaml"),
    # plug-ins
    ("strategy._target_=nope.Foo", "strategy._target_=nope.Foo cannot be imported: there is no module 'nope'"),
    ("strategy._target_=tests.wrong.Fedavg", "tests.wrong has no 'Fedavg' (did you mean 'FedAvg'?)"),
    ("strategy._target_=tests.wrong.NUMBER", "must be a class or a function, got int"),
    ("strategy._target_=3", "strategy must be a config with a `_target_`"),
    ("strategy._target_=tests.wrong.number", "must make a fedsim.strategy.Strategy, got int"),
    ("strategy._target_=tests.wrong.NoServer", "needs a `step` or a `round`"),
    (
        "strategy._target_=tests.wrong.NoServer strategy.weights=uniform",
        "unknown key 'strategy.weights'; tests.wrong.NoServer takes: nothing",
    ),
    ("data._target_=tests.wrong.number", "must make an object with the methods load; int has no load"),
    ("partition._target_=tests.wrong.number", "int has no __call__"),
    ("participation._target_=tests.wrong.Empty", "make an object with the methods check, sample; Empty has no check"),
    ("system._target_=tests.wrong.Empty", "Empty has no duration_ns"),
    ("engine._target_=tests.wrong.Empty", "Empty has no put"),
    ("engine._target_=tests.wrong.number", "int has no put"),
    ("tracker.console._target_=tests.wrong.Empty", "Empty has no start"),
    (
        "+recipe.a={_target_:tests.wrong.Empty}",
        "recipe.a._target_=tests.wrong.Empty must make a fedsim.strategy.ClientHalf",
    ),
    ("+recipe.a=3", "recipe.a must be a config with a `_target_`"),
    ("~model.hidden model._target_=tests.wrong.Nothing", "model Nothing has no trainable parameters"),
    ("~model.hidden model._target_=tests.wrong.Refuses", "cannot be built: RuntimeError: first line second line"),
    ("~model.hidden model._target_=tests.wrong.Empty", "must make a torch.nn.modules.module.Module, got Empty"),
    ("~model.hidden model._target_=tests.wrong.Pair", "returns a tuple, not a tensor"),
    (
        "~model.hidden model._target_=tests.wrong.Linear +model.outputs=7",
        "digits has 10 classes; give the model 10 out",
    ),
    (
        "~model.hidden model._target_=tests.wrong.Linear +model.inputs=9",
        "cannot take inputs of shape (1, 8, 8) (digits)",
    ),
]


@pytest.mark.parametrize("line, says", REFUSED, ids=[line for line, _ in REFUSED])
def test_a_wrong_request_ends_in_one_line_and_leaves_nothing(
    fedsim: Fedsim, tmp_path: Path, line: str, says: str
) -> None:
    outcome = fedsim(*shlex.split(line))
    assert says in outcome.line
    assert outcome.status == 2
    assert outcome.out == ""
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["ünï côdé", "two words", "lr=0.1", "a/b", "тест", "2026-01-01", "~x", "#1 & 2;3"])
def test_unusual_names_work(fedsim: Fedsim, tmp_path: Path, name: str) -> None:
    assert fedsim(*QUICK, f"name={name}", "tracker=[]").status == 0
    (run,) = (tmp_path / "runs" / name).iterdir()
    assert f"name: {name}" in (run / "config.yaml").read_text().replace("'", "").replace('"', "")


def test_a_very_long_name_is_refused(fedsim: Fedsim, tmp_path: Path) -> None:
    outcome = fedsim(*QUICK, f"name={'n' * 300}")
    assert outcome.status == 2 and "choose a shorter `name`" in outcome.line
    assert not list(tmp_path.rglob("*.yaml"))


# --- data and weights -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parquet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 60 + 20 images of 3 classes, 8x8, as the hub stores them."""
    import numpy as np
    from datasets import ClassLabel, Dataset, Features, Image

    root = tmp_path_factory.mktemp("parquet")
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b", "c"])})
    rng = np.random.default_rng(0)
    for split, n in (("train", 60), ("test", 20)):
        images = [rng.integers(0, 256, (8, 8), dtype=np.uint8) for _ in range(n)]
        columns = {"image": images, "label": [i % 3 for i in range(n)]}
        Dataset.from_dict(columns, features=features).to_parquet(root / f"{split}-00000-of-00001.parquet")
    return root


def images(root: Path, *more: str) -> list[str]:
    return ["data=images", "data.path=own/set", f"data.root={root}", *QUICK, *more]


def test_images_of_three_classes_train(fedsim: Fedsim, parquet: Path) -> None:
    assert fedsim(*images(parquet)).status == 0


@pytest.mark.parametrize(
    "more, says",
    [
        ("data.label=klass", "data.label='klass' is no column of"),
        ("data.image=label", "data.image='label'"),
        ("data.test_split=tst", "data.test_split='tst' is no split"),
        ("data.mean=[0.5,0.5] data.std=[1,1]", "data.mean=(0.5, 0.5) has 2 numbers, but the images have 1 channels"),
        ("~model.hidden model._target_=tests.wrong.Linear", "returns shape (10,) per example, but set has 3 classes"),
        ("data.max_train=2", "partition.num_clients=3 "),
    ],
)
def test_wrong_descriptions_of_data_are_refused(
    fedsim: Fedsim, tmp_path: Path, parquet: Path, more: str, says: str
) -> None:
    outcome = fedsim(*images(parquet, *more.split()))
    assert outcome.status == 2 and says in outcome.line
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("damage", ["truncated", "missing", "empty"])
def test_damaged_data_are_refused(fedsim: Fedsim, tmp_path: Path, parquet: Path, damage: str) -> None:
    root = tmp_path / "data"
    shutil.copytree(parquet, root)
    file = root / "test-00000-of-00001.parquet"
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-100] if damage == "truncated" else b"")
    outcome = fedsim(*images(root))
    assert outcome.status == 2
    assert ("test_split" if damage == "missing" else f"{file} is damaged or no Parquet file") in outcome.line
    assert os.listdir(tmp_path) == ["data"]


def test_wrong_weights_are_refused(fedsim: Fedsim, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    right = {f"features.{i}.{k}": torch.zeros(s) for i, k, s in ((1, "weight", (5, 64)), (1, "bias", (5,)))}
    right |= {"head.weight": torch.zeros(10, 5), "head.bias": torch.zeros(10)}

    def refused(tensors: dict[str, torch.Tensor] | bytes) -> str:
        path.write_bytes(tensors if isinstance(tensors, bytes) else save(tensors))
        outcome = fedsim(*QUICK, "model.weights=w.safetensors")
        assert outcome.status == 2 and os.listdir(tmp_path) == [path.name]
        return outcome.line

    assert "'head.bias' has shape (3,), but the model needs (10,)" in refused({**right, "head.bias": torch.zeros(3)})
    assert "has no tensor 'head.bias'" in refused({k: t for k, t in right.items() if k != "head.bias"})
    assert "has a tensor 'had.bias' that the model lacks" in refused({**right, "had.bias": torch.zeros(3)})
    assert "is no readable .safetensors file" in refused(save(right)[:-8])
    assert "is no readable .safetensors file" in refused(b"")
    path.write_bytes(save(right))
    assert fedsim(*QUICK, "model.weights=w.safetensors").status == 0


# --- a run that fails -------------------------------------------------------------------------------------


def test_a_loss_that_becomes_nan_names_round_and_client_and_keeps_what_was_done(fedsim: Fedsim, tmp_path: Path) -> None:
    outcome = fedsim(*QUICK, "rounds=5", "client.lr=0.01", "client.lr_decay=1e30")
    assert outcome.status == 1
    assert re.search(r"round 2, client \d+ \(seed 0\): .*lower client\.lr.*the traceback is in runs/", outcome.line)
    run = only_run(tmp_path)
    assert [r["round"] for r in read_metrics(run)] == [1]
    assert not (run / "summary.json").exists()
    assert len(list((run / "checkpoints").glob("*.safetensors"))) >= 1
    assert "Traceback" in (run / "log.txt").read_text()
    again = fedsim(f"resume={run}")
    assert again.status == 1 and "round 2, client" in again.line
    assert [r["round"] for r in read_metrics(run)] == [1]


@pytest.mark.parametrize(
    "target, says",
    [
        ("FailsOnClient", "round 2, client 0 (seed 0): local training failed: KeyError: 'missing'"),
        ("FailsOnServer", "round 1: KeyError: \"no entry 'dleta' came up"),
        ("NoState", "NoState.init must return a state whose `w` is the global model, got dict"),
        (
            "NotRounded",
            "NotRounded.step returned w of (385,) and torch.float64, but the model is (385,) and torch.float32",
        ),
        ("Wide", "Wide.step returned w of (1, 385) and torch.float32"),
        (
            "Scalar",
            "round 1, client 0 (seed 0): local training failed: entry 'one' must be a tensor with the client axis",
        ),
    ],
)
def test_a_plugin_that_fails_is_named(fedsim: Fedsim, tmp_path: Path, target: str, says: str) -> None:
    outcome = fedsim(*QUICK, "rounds=3", f"strategy._target_=tests.wrong.{target}")
    assert outcome.status == 1 and says in outcome.line
    log = only_run(tmp_path) / "log.txt"
    assert f"the traceback is in {log.relative_to(tmp_path)}" in outcome.line and "Traceback" in log.read_text()


def test_options_without_a_decorator_are_said(fedsim: Fedsim) -> None:
    outcome = fedsim(*QUICK, "strategy._target_=tests.wrong.Undecorated")
    assert outcome.status == 2 and "Undecorated.mu is no option: Undecorated needs its own @dataclass" in outcome.line


def test_the_traceback_is_shown_on_request(
    fedsim: Fedsim, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FEDSIM_TRACEBACK", "1")
    with pytest.raises(RunError):
        main([*QUICK, "strategy._target_=tests.wrong.FailsOnServer"])


# --- going on with a run ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two rounds, with client memory."""
    root = tmp_path_factory.mktemp("finished")
    with pytest.raises(SystemExit) as caught:
        main([*QUICK, "strategy=scaffold", "rounds=2", f"run_dir={root}", "tracker=[jsonl]"])
    assert not caught.value.code
    return only_run(root)


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of that run, to be damaged."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def files(folder: Path) -> dict[str, bytes]:
    """Content of all files but those that every attempt writes."""
    found = [f for f in folder.rglob("*") if f.is_file() and f.name not in ("log.txt", ".lock")]
    return {str(f.relative_to(folder)): f.read_bytes() for f in found}


def test_a_finished_run_takes_more_rounds(fedsim: Fedsim, run: Path) -> None:
    assert fedsim("resume=run", "rounds=3", "tracker=[jsonl]").status == 0
    assert [r["round"] for r in read_metrics(run)] == [1, 2, 3]


def test_a_resume_changes_what_does_not_change_results_and_nothing_else(run: Path) -> None:
    edit(run / "config.yaml", "threads: 1", "threads: 2")
    before = load(run / "config.yaml")
    for overrides, changed in (
        ([], {}),
        (["rounds=9", "checkpoint.every=5"], {"rounds": 9, "checkpoint": {**before["checkpoint"], "every": 5}}),
        (["engine=inline", "tracker=[]"], {"tracker": {}}),  # threads stay: bits follow them
        (["engine.threads=2", "engine=inline"], {}),
        (["+data.root=/elsewhere"], {"data": {**before["data"], "root": "/elsewhere"}}),
        (["~tracker.jsonl"], {"tracker": {}}),
        (["tracker=[jsonl]", "+engine.new=1"], {"engine": {**before["engine"], "new": 1}}),
    ):
        config, path = resume_config([*overrides, f"resume={run}"])
        assert path == run
        assert config == {**before, "resume": str(run), **changed}


@pytest.mark.parametrize(
    "more, says",
    [
        (
            "client.lr=0.5",
            "client.lr=0.5 would make it another run; only engine, tracker, checkpoint, rounds, data.root may change",
        ),
        ("strategy=fedavg", "strategy=fedavg would make it another run"),
        ("~client.lr", "~client.lr would make it another run"),
        ("engine.threads=7", "engine.threads changes bits: this run has 1"),
        ("engine.device=cuda", "engine.device changes bits: this run has cpu"),
        ("name=other", "name=other would make it another run"),
        ("rounds=1", "has done 2 rounds already"),
        ("rounds=many", "rounds must be a whole number, at least 1, got 'many'"),
        ("rounds=3,4", "gives several values"),
        ("engine.theads=2", "did you mean 'engine.threads'?"),
        ("engine=inlin", "engine has no option 'inlin'"),
        ("-m", "a sweep (-m) makes new runs"),
        ("rounds", "rounds=..."),
    ],
)
def test_a_wrong_resume_changes_nothing(fedsim: Fedsim, run: Path, more: str, says: str) -> None:
    before = files(run)
    outcome = fedsim("resume=run", more)
    assert outcome.status == 2 and says in outcome.line
    assert files(run) == before


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage, says",
    [
        (
            lambda r: edit(r / "config.yaml", "seed: 0", "seed: 1"),
            "belongs to another config than config.yaml; restore",
        ),
        (lambda r: edit(r / "config.yaml", "lr: 0.1", "lr: -1"), "config.yaml is damaged (client.lr must be a number"),
        (lambda r: edit(r / "config.yaml", "seed: 0", "seed: [0"), "config.yaml is damaged ("),
        (lambda r: (r / "config.yaml").write_text(""), "config.yaml is damaged"),
        (lambda r: (r / "config.yaml").write_bytes(b"\xff\xfe\x00"), "config.yaml is damaged"),
        (lambda r: (r / "config.yaml").unlink(), "is not a run directory: it has no config.yaml"),
        (
            lambda r: flip(max((r / "checkpoints").glob("*.safetensors"))),
            "is damaged (its content does not have the hash",
        ),
        (lambda r: max((r / "checkpoints").glob("*.safetensors")).write_bytes(b""), "is damaged"),
        (lambda r: flip(max((r / "checkpoints/memory").glob("*"))), "checkpoints/memory/"),
        (lambda r: shutil.rmtree(r / "checkpoints/memory"), "checkpoints/memory/"),
        (lambda r: edit(r / "metrics.jsonl", '{"round": 1', '{"round": '), "metrics.jsonl:1: damaged line"),
    ],
    ids=[
        "seed",
        "value",
        "yaml",
        "empty",
        "bytes",
        "gone",
        "checkpoint",
        "truncated",
        "memory",
        "no memory",
        "metrics",
    ],
)
def test_a_damaged_run_is_refused_and_not_made_worse(
    fedsim: Fedsim, run: Path, damage: Callable[[Path], object], says: str
) -> None:
    damage(run)
    before = files(run)
    outcome = fedsim("resume=run", "rounds=3", "tracker=[jsonl]")
    assert outcome.status in (1, 2) and says in outcome.line
    assert files(run) == before


def test_a_run_in_use_is_refused(fedsim: Fedsim, run: Path) -> None:
    before = files(run)
    with RunDir.open(run).lock():
        outcome = fedsim("resume=run", "rounds=3")
    assert outcome.status == 2
    assert re.search(r"run is in use by process \d+ on .*; wait until it ends, or stop it", outcome.line)
    assert files(run) == before


# --- disks, signals, pipes: processes of their own --------------------------------------------------------


def test_a_full_disk_loses_nothing_and_the_run_goes_on_when_there_is_room(fedsim: Fedsim, tmp_path: Path) -> None:
    # A file larger than the limit cannot be written; the kernel says so as it does when a disk is full.
    def small_files() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4_000, resource.RLIM_INFINITY))

    args = [*QUICK, "model.hidden=[]", "rounds=4", "checkpoint.seconds=0", "partition.num_clients=2"]
    outcome = process(*args, cwd=tmp_path, preexec_fn=small_files)
    assert outcome.status == 1
    assert re.search(r"cannot write runs/.*/checkpoints/0.*: File too large; raise the limit", outcome.line)
    run = only_run(tmp_path)
    assert not list(run.rglob("*.tmp"))
    assert fedsim(f"resume={run}").status == 0
    assert fedsim(*args, "run_dir=whole").status == 0
    assert read_summary(run)["state_sha256"] == read_summary(only_run(tmp_path / "whole"))["state_sha256"]


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_an_interrupted_run_says_how_to_go_on_and_ends_as_if_it_never_had_been(
    fedsim: Fedsim, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    args = [*QUICK, "rounds=4", "strategy._target_=tests.wrong.Interrupted", f"+strategy.signal={name}", "name=a b"]
    outcome = process(*args, cwd=tmp_path)
    assert outcome.status == 130
    command = re.fullmatch(r"fedsim: interrupted; go on with: fedsim (.*)", outcome.line)
    assert command is not None
    monkeypatch.setenv("GO_ON", "1")
    assert fedsim(*shlex.split(command[1])).status == 0
    assert fedsim(*args, "run_dir=whole").status == 0
    runs = [only_run(tmp_path / folder) for folder in ("runs", "whole")]
    assert read_summary(runs[0])["state_sha256"] == read_summary(runs[1])["state_sha256"]


def test_an_interrupt_that_a_library_drops_is_not_lost(tmp_path: Path) -> None:
    outcome = process(*QUICK, "strategy._target_=tests.wrong.Deaf", cwd=tmp_path)
    assert outcome.status == 130 and outcome.line == "fedsim: interrupted"
    assert not (tmp_path / "runs").exists()


def test_a_reader_that_leaves_is_no_error(tmp_path: Path) -> None:
    for args in (["--help"], ["-m", *QUICK, "rounds=3", "seed=1,2"]):
        shell = f"{shlex.join([sys.executable, '-m', 'fedsim.cli', *args])} | head -1"
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(shell, shell=True, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
        assert done.stderr == "" and done.stdout.count("\n") == 1


def test_a_full_pipe_of_output_is_said(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        outcome = process("list", cwd=tmp_path, stdout=full)
    assert outcome.status == 1 and "No space left on device; free some space" in outcome.line


def test_pictures_that_cannot_be_written_are_said(fedsim: Fedsim) -> None:
    outcome = fedsim("partition", "run_dir=/dev/null/x")
    assert outcome.status == 2 and "Not a directory" in outcome.line
    assert "set run_dir= to a folder that can be written" in outcome.line

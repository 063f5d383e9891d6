"""What a run depends on: its config, and nothing that happened in the process before."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fedsim
from fedsim.clients.batch import Batch
from fedsim.clients.local import Local
from fedsim.clients.optimizers import Adagrad
from fedsim.compose import compose
from fedsim.engine.inline import InlineEngine
from fedsim.errors import ClientError, ConfigError, RunError
from fedsim.experiment import build
from fedsim.federation import Federation
from fedsim.memory import Memory
from fedsim.network import Network
from fedsim.reduce import Reduced
from fedsim.strategies.fedavg import FedAvg
from fedsim.strategy import ClientHalf, State


@dataclass(frozen=True)
class Careless(ClientHalf):
    """A recipe whose hooks draw from torch's own generator."""

    def order(self, local: Local, epoch: int) -> Tensor:
        return torch.randperm(local.n).unsqueeze(0)

    def batch(self, batch: Batch, local: Local) -> Batch:
        batch.x = batch.x + 0.1 * torch.randn_like(batch.x)
        return batch


@dataclass(frozen=True)
class CarelessServer(FedAvg):
    """A strategy whose server half draws from torch's own generator."""

    def step(self, state: State, reduced: Reduced) -> State:
        noisy = super().step(state, reduced)
        return State(noisy.w + 1e-3 * torch.randn_like(noisy.w))


class NormNet(nn.Module):
    """Two layers with a batch norm of some width."""

    def __init__(self, input_shape: Sequence[int], num_classes: int, momentum: float | None = 0.1) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8, momentum=momentum), nn.ReLU())
        self.head = nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.features(x))
        return out


@dataclass(frozen=True)
class Narrower:
    """Another build of `NormNet`, half as wide."""

    def __call__(self, module: nn.Module) -> nn.Module:
        module.features = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.BatchNorm1d(4), nn.ReLU())
        module.head = nn.Linear(4, 10)
        return module


SMALL = ("partition.num_clients=4", "model.hidden=[8]", "client.epochs=1", "tracker=[]", "checkpoint.seconds=0")
NORM = ("~model.hidden", "model._target_=tests.test_promises.NormNet", *(s for s in SMALL if "hidden" not in s))


def simulate(folder: Path, *overrides: str) -> fedsim.Result:
    return fedsim.simulate([*SMALL, f"run_dir={folder}", *overrides])


@pytest.mark.parametrize(
    "careless",
    [
        ("+recipe.careless={_target_: tests.test_promises.Careless}",),
        ("strategy._target_=tests.test_promises.CarelessServer",),
    ],
)
def test_hooks_that_draw_from_torchs_own_generator_still_give_the_same_bits(
    tmp_path: Path, careless: tuple[str, ...]
) -> None:
    whole = simulate(tmp_path, "rounds=4", *careless).summary
    torch.randn(5)
    half = simulate(tmp_path, "rounds=2", *careless)
    torch.randn(7)
    resumed = fedsim.simulate([f"resume={half.run_dir}", "rounds=4"]).summary
    assert whole["state_sha256"] == resumed["state_sha256"] != simulate(tmp_path, "rounds=4").summary["state_sha256"]


def test_torchs_own_generator_is_left_as_it_was(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    simulate(tmp_path, "rounds=1", "+recipe.careless={_target_: tests.test_promises.Careless}")
    assert torch.equal(before, torch.get_rng_state())


def test_threads_belong_to_the_experiment(tmp_path: Path) -> None:
    one, two = (simulate(tmp_path, "rounds=1", f"engine.threads={n}").summary["config_sha256"] for n in (1, 2))
    assert one != two


def test_no_two_clients_or_epochs_share_an_order() -> None:
    exp = build(compose(["partition=iid", "partition.num_clients=4", "partition.holdout=0"]))
    fed = Federation(exp.program, InlineEngine(exp.program), exp.participation, exp.system, Memory(Path("unused")))
    orders: dict[tuple[int, int], list[int]] = {}
    for client, epoch in itertools.product(range(4), range(3)):
        from fedsim.clients.visit import Visit

        local = Local(exp.program, Visit(client, 1, "train", 1), {"w": fed.program.network.initial[None]})
        order = local.permutation(epoch)[0].tolist()
        assert sorted(order) == list(range(local.n))
        orders[client, epoch] = order[:300]
    assert len({tuple(o) for o in orders.values()}) == len(orders)


def test_a_pickled_network_does_not_trust_addresses_of_the_old_process() -> None:
    network = Network(nn.Linear(3, 2))
    w = torch.ones(network.layout.d)
    network.bind(w)
    copy = pickle.loads(pickle.dumps(network))
    w.zero_()
    copy.bind(w)
    assert not copy.module.weight.any()


def federation(tmp_path: Path) -> tuple[Federation, State]:
    exp = build(compose(list(NORM)))
    fed = Federation(exp.program, InlineEngine(exp.program), exp.participation, exp.system, Memory(tmp_path))
    fed.begin_round(1)
    state = exp.program.strategy.init(exp.info, exp.program.network.initial.clone())
    return fed, state


@pytest.mark.parametrize("how", ["variant", "phase"])
def test_batch_norm_statistics_follow_the_rounds_alone(tmp_path: Path, how: str) -> None:
    fed, state = federation(tmp_path)
    assert fed.buffers is not None
    before = fed.buffers.clone()
    if how == "variant":
        d = fed.program.variant(Narrower()).layout.d
        fed.train([0], state, send={"w": torch.zeros(d)}, model=Narrower())
    else:
        fed.train([0], state, phase="probe")
    assert torch.equal(fed.buffers, before)
    fed.train([0], state)
    assert not torch.equal(fed.buffers, before)


def test_events_do_not_average_batch_norm_statistics(tmp_path: Path) -> None:
    fed, state = federation(tmp_path)
    with pytest.raises(RunError, match=r"client\.buffers=local or frozen"):
        fed.dispatch(0, state)


def test_batch_norm_without_momentum_is_refused() -> None:
    with pytest.raises(ConfigError, match="momentum=None"):
        build(compose([*NORM, "+model.momentum=null"]))


def test_metrics_are_written_whatever_the_trackers(tmp_path: Path) -> None:
    result = simulate(tmp_path, "rounds=2")
    assert [r["round"] for r in result.metrics] == [1, 2]
    assert (result.run_dir / "figures" / "curves.png").exists()


def test_adagrad_can_be_chosen(tmp_path: Path) -> None:
    def optimizer(*overrides: str) -> Any:
        return build(compose([*SMALL, "client.optimizer=adagrad", *overrides])).program.options.optimizer

    assert optimizer() == Adagrad()
    assert optimizer("client.eps=1e-6", "client.weight_decay=0.1") == Adagrad(eps=1e-6, weight_decay=0.1)
    with pytest.raises(ConfigError, match=r"client.momentum=0.9 has no effect"):
        optimizer("client.momentum=0.9")


def test_a_batch_of_one_under_batch_norm_has_a_remedy() -> None:
    exp = build(compose([*NORM, "client.batch_size=1"]))
    fed = Federation(exp.program, InlineEngine(exp.program), exp.participation, exp.system, Memory(Path("unused")))
    fed.begin_round(1)
    with pytest.raises(ClientError, match=r"round 1, client 0 .*batch norm .* client.drop_last=true"):
        fed.train([0], exp.program.strategy.init(exp.info, exp.program.network.initial.clone()))

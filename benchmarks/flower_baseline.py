"""Flower's simulation doing the rounds of `benchmarks.engines`: the other side of that comparison.

    <a Python with flwr[simulation] and torch> -m benchmarks.flower_baseline --model mlp [--rounds 12]

It runs in an environment of its own, as Flower pins its Ray: ``pip install torch==2.13.0 numpy 'flwr[simulation]'``
(the build of torch that fedsim runs with), in the root of this repository. Prints one line, JSON: ``seconds`` of every
round, ``first`` (from the start of the process to the end of the first round), and ``versions``.

Equal on both sides: the module (fedsim's own class), the data (`benchmarks.common.RandomImages`, in memory), clients,
examples per client, batches, steps, learning rate, one thread of torch per worker, two workers, no evaluation, the mean
of the clients' parameters by examples (Flower's own `FedAvg`), usage statistics off.

In Flower's favour: inputs are normalised once, beforehand, as float32 (fedsim does it per batch, from bytes); module
and data stay in the worker between visits; no printing of a run's header, no file, no checkpoint, which the start-up of
fedsim's command includes; and it starts by `run_simulation`, which Flower calls deprecated, but which spares it what
``flwr run`` adds: packing the app, a SuperLink, and processes to talk to it. Against it: its log of every round. And
its server looks for results every 0.1 s (its default, which no setting of a user changes), so that its rounds come in
steps of that: of short ones much is waiting. Not equal: the bits, as the random streams differ, and the version of Ray.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import time
from typing import Any

os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}

import flwr
import ray
import torch
import torch.nn.functional as F
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from torch import Tensor, nn

from benchmarks.common import BATCH, CLIENTS, LR, STEPS, RandomImages, since_start
from fedsim.models.standard import CNN, MLP, LeNet5

MODELS: dict[str, type[nn.Module]] = {"mlp": MLP, "lenet5": LeNet5, "cnn": CNN}
PER_CLIENT = STEPS * BATCH

client_app = ClientApp()


@functools.cache
def client_side(model: str) -> tuple[nn.Module, Tensor, Tensor]:
    """Module, inputs and labels; once per worker process."""
    torch.set_num_threads(1)
    data = RandomImages(num_train=CLIENTS * PER_CLIENT).load(0)
    x = (data.train.x.float() / 255 - 0.5) / 0.25
    return MODELS[model]((1, 28, 28), 10), x, data.train.y


@client_app.train()
def train(msg: Message, context: Context) -> Message:
    module, x, y = client_side(str(msg.content["config"]["model"]))
    module.load_state_dict(msg.content["arrays"].to_torch_state_dict())
    module.train()
    optimizer = torch.optim.SGD(module.parameters(), lr=LR)
    first = int(context.node_config["partition-id"]) * PER_CLIENT
    total = torch.zeros(())
    for index in (first + torch.randperm(PER_CLIENT)).split(BATCH):
        loss = F.cross_entropy(module(x[index]), y[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.detach()
    content = RecordDict(
        {
            "arrays": ArrayRecord(module.state_dict()),
            "metrics": MetricRecord({"num-examples": PER_CLIENT, "loss": float(total) / STEPS}),
        }
    )
    return Message(content=content, reply_to=msg)


class Timed(FedAvg):
    """Flower's FedAvg with a clock."""

    def __init__(self) -> None:
        super().__init__(fraction_evaluate=0.0, min_train_nodes=CLIENTS, min_available_nodes=CLIENTS)
        self.seconds: list[float] = []
        self.first = 0.0

    def configure_train(self, *args: Any, **kwargs: Any) -> Any:
        self.began = time.perf_counter()
        return super().configure_train(*args, **kwargs)

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        replies = list(replies)
        if len(replies) != CLIENTS or any(reply.has_error() for reply in replies):
            raise RuntimeError(f"round {server_round}: {len(replies)} replies, or one that failed")
        out = super().aggregate_train(server_round, replies)
        self.seconds.append(time.perf_counter() - self.began)
        self.first = self.first or since_start()
        return out


def main() -> None:
    parser = argparse.ArgumentParser(description="Rounds of Flower's simulation.")
    parser.add_argument("--model", choices=MODELS, default="mlp")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    strategy, server_app = Timed(), ServerApp()

    @server_app.main()
    def serve(grid: Grid, context: Context) -> None:
        torch.set_num_threads(1)
        module = MODELS[options.model]((1, 28, 28), 10)
        strategy.start(
            grid=grid,
            initial_arrays=ArrayRecord(module.state_dict()),
            num_rounds=options.rounds,
            train_config=ConfigRecord({"model": options.model}),
        )

    run_simulation(
        server_app=server_app,
        client_app=client_app,
        num_supernodes=CLIENTS,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"num_cpus": options.workers, "include_dashboard": False},
        },
    )
    assert len(strategy.seconds) == options.rounds
    versions = {"flwr": flwr.__version__, "ray": ray.__version__, "torch": torch.__version__}
    print(json.dumps({"seconds": strategy.seconds, "first": strategy.first, "versions": versions}), flush=True)


if __name__ == "__main__":
    from benchmarks import flower_baseline  # by this name workers import it, so that what they cache stays

    flower_baseline.main()

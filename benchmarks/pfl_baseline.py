"""pfl-research doing the rounds of `benchmarks.whole` and `benchmarks.cifar`: the other side of those comparisons.

    printf 'round\nround\nevaluate\n' | <a Python with pfl[pytorch]> -m benchmarks.pfl_baseline --case mlp

It runs in an environment of its own (``pip install torch==2.13.0 'pfl[pytorch]'``, the build of torch that fedsim runs
with), in the root of this repository, and does what its standard input says, line by line, so that its rounds and those
of fedsim can take turns. Prints JSON: first ``versions``, then for every line the seconds that it took
(``{"round": 0.17}``). The first round, before that, warms up.

Equal on both sides: the module (fedsim's own class), the data (`benchmarks.common.RandomImages`, in memory), clients,
examples per client, batches, steps, learning rate, one thread of torch, one process, the mean of the clients'
parameters by examples, central evaluation (loss and accuracy) on the test split in batches of 500.

In pfl's favour: inputs are normalised once, beforehand, as float32 (fedsim does it per visit, from bytes); batches are
cut once and kept, as its `Dataset` does, and come in the same order in every epoch (fedsim draws a new order and
gathers); clients' metrics are never computed (its default is before and after training, in rounds with evaluation,
while fedsim always returns the training loss); nothing is printed; sums in float32 (fedsim's are in
float64, and every visit is fingerprinted); of the classes' table, which fedsim's evaluation makes, nothing. Against it:
nothing known. Not equal: random streams, and so the bits.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.callback.central_evaluation import CentralEvaluationCallback
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchTensorDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam.base import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from torch import Tensor, nn

from benchmarks.common import CASES, CIFAR, Case
from benchmarks.models import PflCNN
from fedsim.models.standard import CNN, MLP, LeNet5, LogReg, TwoCNN

MODELS: dict[str, type[nn.Module]] = {"logreg": LogReg, "mlp": MLP, "lenet5": LeNet5, "cnn": CNN, "twocnn": TwoCNN}
NEVER = 10**9


class Module(nn.Module):
    """A network with the two methods that pfl asks for."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """The mean cross-entropy."""
        if not self.training:
            self.train()
        return F.cross_entropy(self.network(x), y)

    @torch.no_grad()
    def metrics(self, x: Tensor, y: Tensor) -> dict[str, Weighted]:
        """Loss and accuracy."""
        if self.training:
            self.eval()
        logits = self.network(x)
        loss, hits = F.cross_entropy(logits, y, reduction="sum"), (logits.argmax(-1) == y).sum()
        return {"loss": Weighted(float(loss), len(y)), "accuracy": Weighted(float(hits), len(y))}


class Commands(TrainingProcessCallback):
    """Waits for the next line of the standard input, between rounds."""

    def __init__(self, evaluation: CentralEvaluationCallback) -> None:
        self.evaluation = evaluation
        self.began: float | None = None

    def after_central_iteration(self, aggregate_metrics: Metrics, model: Any, *, central_iteration: int) -> Any:
        """Answers the line before, and reads on."""
        if self.began is None:  # the first round
            say({"versions": {name: version(name) for name in ("pfl", "torch", "numpy")}})
        else:
            self._synchronize()
            say({"round": time.perf_counter() - self.began})
        for line in sys.stdin:
            self.began = time.perf_counter()
            if line.strip() == "round":
                return False, Metrics()
            self.evaluation.after_central_iteration(aggregate_metrics, model, central_iteration=NEVER)
            self._synchronize()
            say({"evaluate": time.perf_counter() - self.began})
        return True, Metrics()

    def _synchronize(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()


def say(what: dict[str, Any]) -> None:
    print(json.dumps(what), flush=True)


def network(case: Case) -> nn.Module:
    """The module of a case."""
    shape = (case.channels, case.size, case.size)
    return PflCNN(shape, 10, case.dropout) if case.target else MODELS[case.model](shape, 10)


def run(case: Case, device: str) -> None:
    """All rounds that are asked for."""
    data = case.data.load(0)
    x, y = ((data.train.x.float() / 255 - 0.5) / 0.25).to(device), data.train.y.to(device)
    test = PyTorchTensorDataset((((data.test.x.float() / 255 - 0.5) / 0.25).to(device), data.test.y.to(device)))
    n = case.examples
    users = {c: PyTorchTensorDataset((x[c * n : (c + 1) * n], y[c * n : (c + 1) * n])) for c in range(case.num_clients)}
    module = Module(network(case))
    model = PyTorchModel(module, torch.optim.SGD, torch.optim.SGD(module.parameters(), lr=1.0))
    training = FederatedDataset(users.__getitem__, get_user_sampler("minimize_reuse", list(users)))
    how_to_evaluate = NNEvalHyperParams(local_batch_size=500)
    evaluation = CentralEvaluationCallback(test, how_to_evaluate, frequency=1)
    FederatedAveraging().run(
        NNAlgorithmParams(NEVER, evaluation_frequency=NEVER, train_cohort_size=case.clients, val_cohort_size=0),
        SimulatedBackend(training, training, postprocessors=[WeightByDatapoints()]),
        model,
        NNTrainHyperParams(local_learning_rate=case.lr, local_num_epochs=1, local_batch_size=case.batch),
        how_to_evaluate,
        callbacks=[Commands(evaluation)],
        send_metrics_to_platform=False,  # it would print them
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Rounds of pfl-research.")
    parser.add_argument("--case", choices=[*CASES, *CIFAR], default="mlp")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    os.environ["PFL_PYTORCH_DEVICE"] = options.device  # pfl would take a GPU if there is one
    logging.disable(logging.INFO)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    np.random.seed(0)
    run({**CASES, **CIFAR}[options.case], options.device)


if __name__ == "__main__":
    main()

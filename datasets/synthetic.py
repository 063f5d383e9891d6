"""Synthetic(alpha, beta): logistic data in which both the models and the inputs of clients differ.

Source: Li et al., 2020 ("FedProx"), section 5.1 and appendix C.1, https://arxiv.org/abs/1812.06127, with the
authors' generator (https://github.com/litian96/FedProx, ``data/synthetic_*``) where the paper is silent. Client k
has a model of its own, ``y = argmax softmax(W_k x + b_k)`` with ``W_k, b_k ~ N(u_k, 1)``, ``u_k ~ N(0, alpha)``, and
inputs of its own, ``x ~ N(v_k, Sigma)`` with ``Sigma = diag(j^-1.2)``, ``v_k ~ N(B_k, 1)``, ``B_k ~ N(0, beta)``.

Departures:
    1. ``alpha`` and ``beta`` are standard deviations, as in the authors' code (the paper's notation leaves it
       open; at the values 0 and 1 it makes no difference).
    2. Sizes are capped at ``max_size``: their log-normal law, exp(N(4, 2^2)) + 50, has no bound, and one client in
       a million would hold a million examples. ``max_size=null`` is the paper.
    3. A client's data come into being when they are first touched, so that a population of 1,000,000
       costs what its sizes cost: two arrays.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from fedsim.data import Dataset, IntArray, Shard, Split
from fedsim.datasets.checks import check_float, check_int
from fedsim.errors import ConfigError, DataError
from fedsim.random import Key, numpy_generator

NUM_FEATURES = 60
NUM_CLASSES = 10
CACHED_CLIENTS = 256


@dataclass(frozen=True)
class Synthetic:
    """A population of clients with generated data; the server's test set is pooled from clients' held-out data.

    Attributes:
        num_clients: Number of clients, K.
        alpha: How much the models of clients differ, >= 0 (a standard deviation).
        beta: How much the inputs of clients differ, >= 0 (a standard deviation).
        iid: One model, W and b ~ N(0, 1), and one input distribution, v = 0, for all; alpha and beta are not used.
        min_size: Fewest examples of a client, training and held-out ones together.
        max_size: Most examples of a client; null: no limit.
        heldout: Share of a client's examples held out, in (0, 1).
        test_clients: Clients, evenly spread, whose held-out examples are the server's test set.
    """

    num_clients: int = 30
    alpha: float = 1.0
    beta: float = 1.0
    iid: bool = False
    min_size: int = 50
    max_size: int | None = 1000
    heldout: float = 0.1
    test_clients: int = 100

    def __post_init__(self) -> None:
        check_int("data.num_clients", self.num_clients, 1, "the number of clients")
        for name in ("alpha", "beta"):
            check_float(f"data.{name}", getattr(self, name), 0.0, 1e6, "a standard deviation", strict=False)
        if not isinstance(self.iid, bool):
            raise ConfigError(f"data.iid must be true or false, got {self.iid!r}")
        check_int("data.min_size", self.min_size, 1, "the fewest examples of a client")
        if self.max_size is not None:
            check_int(
                "data.max_size", self.max_size, self.min_size, "the most examples of a client, or null for no limit"
            )
        check_float("data.heldout", self.heldout, 0.0, 1.0, "the share of a client's examples held out")
        check_int("data.test_clients", self.test_clients, 1, "clients whose held-out examples are the test set")

    def load(self, seed: int) -> Dataset:
        """Draws the sizes of all clients, and the data of the test clients only.

        Args:
            seed: The run's seed; every client's data follow from it and the client's number.

        Raises:
            DataError: The test clients hold out no example.
        """
        clients = SyntheticClients(self, seed)
        chosen = np.arange(min(self.test_clients, len(clients))) * len(clients) // min(self.test_clients, len(clients))
        held = [clients.heldout(int(client)) for client in chosen]
        test = Split(torch.cat([s.x[s.rows] for s in held]), torch.cat([s.y[s.rows] for s in held]))
        if len(test) == 0:
            raise DataError(
                f"data.heldout={self.heldout} of clients with {int(clients.sizes()[chosen].max())} examples or fewer "
                "is no test example at all; raise data.heldout or data.min_size"
            )
        return Dataset(
            name="synthetic",
            train=Split(test.x[:0], test.y[:0]),
            test=test,
            class_names=tuple(str(c) for c in range(NUM_CLASSES)),
            clients=clients,
        )


class SyntheticClients:
    """The population (see `fedsim.data.Clients`): float32 inputs ``[n, 60]``, int64 labels ``[n]``.

    Pickled as options and seed; another process draws the same data again.

    Args:
        options: What was asked for.
        seed: The run's seed.
    """

    def __init__(self, options: Synthetic, seed: int) -> None:
        self.options, self.seed = options, seed
        self._cache: OrderedDict[int, tuple[Shard, Shard]] = OrderedDict()

    def __reduce__(self) -> tuple[type[SyntheticClients], tuple[Synthetic, int]]:
        return SyntheticClients, (self.options, self.seed)

    def __len__(self) -> int:
        return self.options.num_clients

    def sizes(self) -> IntArray:
        return self._totals - self._held

    def train(self, client: int) -> Shard:
        return self._client(client)[0]

    def heldout(self, client: int) -> Shard:
        return self._client(client)[1]

    def _generator(self, *index: Key) -> np.random.Generator:
        return numpy_generator(self.seed, "synthetic", *index)

    @cached_property
    def _totals(self) -> IntArray:
        o = self.options
        extra = np.minimum(self._generator("sizes").lognormal(4.0, 2.0, o.num_clients), 1e9).astype(np.int64)
        totals: IntArray = o.min_size + (extra if o.max_size is None else np.minimum(extra, o.max_size - o.min_size))
        return totals

    @cached_property
    def _held(self) -> IntArray:
        wanted: IntArray = np.rint(self.options.heldout * self._totals).astype(np.int64)
        return np.minimum(wanted, self._totals - 1)

    def _client(self, client: int) -> tuple[Shard, Shard]:
        if not 0 <= client < len(self):
            raise IndexError(f"client {client} of {len(self)}")
        if client in self._cache:
            self._cache.move_to_end(client)
        else:
            self._cache[client] = self._generate(client)
            if len(self._cache) > CACHED_CLIENTS:
                self._cache.popitem(last=False)
        return self._cache[client]

    def _generate(self, client: int) -> tuple[Shard, Shard]:
        o, rng, n = self.options, self._generator(client), int(self._totals[client])
        if o.iid:
            shared = self._generator("shared")
            weight, bias = shared.normal(size=(NUM_FEATURES, NUM_CLASSES)), shared.normal(size=NUM_CLASSES)
            centre = np.zeros(NUM_FEATURES)
        else:
            u, b = rng.normal(0.0, o.alpha), rng.normal(0.0, o.beta)  # u_k and B_k
            centre = rng.normal(b, 1.0, NUM_FEATURES)  # v_k
            weight, bias = rng.normal(u, 1.0, (NUM_FEATURES, NUM_CLASSES)), rng.normal(u, 1.0, NUM_CLASSES)
        deviation = np.arange(1, NUM_FEATURES + 1) ** -0.6  # the square root of Sigma's diagonal
        x = centre + deviation * rng.standard_normal((n, NUM_FEATURES))
        y = (x @ weight + bias).argmax(axis=1)  # softmax keeps the order
        inputs, labels = torch.from_numpy(x.astype(np.float32)), torch.from_numpy(y.astype(np.int64))
        rows = torch.arange(n)  # examples are exchangeable: the last ones are held out
        cut = n - int(self._held[client])
        return Shard(inputs, labels, rows[:cut]), Shard(inputs, labels, rows[cut:])

"""10,000 clients in one round: the memory of the driver and of every worker while it runs.

    python -m benchmarks.cohort [--clients 10000] [--hidden 200 200] [--out cohort.png]

One round on two workers of `engine=ray`, a client doing one step on two images, three times: `fedavg`, whose clients
keep nothing; `scaffold`, whose clients each leave a control as large as the model with the driver; and the same under
``engine.memory_budget``, which sends what is too much to disk. The MLP of 199,210 parameters; ``--hidden 800 400`` is
one of 952,410 (and 38 GB of controls: on a disk that has them, give ``--methods fedavg "scaffold, budget"``).

Samples what each process has for itself (without shared memory), and what all processes of the machine have in
``/dev/shm``, where Ray's object store is; draws them over the time of the round, and prints them at a tenth of it, in
the middle and at the end. Flat: the highest of its second half is no more than ``FLAT_MB`` above the highest of its
first half, beyond the controls that the driver must keep. (With a budget, memory goes up to it and down again.)
Python's own records of 10,000 visits are in that.
"""

from __future__ import annotations

import argparse
import os
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.common import aim, own_folder
from fedsim import rounds
from fedsim.compose import compose
from fedsim.config import num_bytes
from fedsim.experiment import build
from fedsim.federation import Federation
from fedsim.memory import Memory
from fedsim.run import _engine

METHODS = {
    "fedavg": ["strategy=fedavg"],
    "scaffold": ["strategy=scaffold"],
    "scaffold, budget": ["strategy=scaffold", "engine.memory_budget=512MiB"],
}
FLAT_MB = 128.0
EVERY_S = 0.1

Samples = dict[str, list[float]]  # ``seconds``, and megabytes by name


@dataclass
class Watch:
    """Samples memory in a thread of its own.

    Attributes:
        pids: Processes, by name.
    """

    pids: dict[str, int]

    def __post_init__(self) -> None:
        self.samples: Samples = {name: [] for name in ("seconds", *self.pids, "object store")}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Watch:
        self._begin = time.perf_counter()
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            self.samples["seconds"].append(time.perf_counter() - self._begin)
            for name, pid in self.pids.items():
                self.samples[name].append(own_megabytes(pid))
            self.samples["object store"].append(shared_megabytes())
            if self._ended.wait(EVERY_S):
                return


def own_megabytes(pid: int) -> float:
    """Main memory of a process, without what it shares."""
    lines = Path(f"/proc/{pid}/status").read_text().split("\n")
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) * 1024 / 1e6


def shared_megabytes() -> float:
    """What is in use of the machine's shared memory."""
    found = os.statvfs("/dev/shm")
    return (found.f_blocks - found.f_bfree) * found.f_frsize / 1e6


def watched_round(method: str, clients: int, hidden: list[int], folder: Path) -> tuple[Samples, int]:
    """Samples of one round, and the number of parameters."""
    import ray

    exp = build(
        compose(
            [
                *METHODS[method],
                *("engine=ray", "engine.workers=2"),
                *("model=mlp", f"model.hidden={hidden}"),
                *("data._target_=benchmarks.common.RandomImages", f"+data.num_train={2 * clients}"),
                *("partition=iid", f"partition.num_clients={clients}", "partition.holdout=0"),
                *("client.epochs=null", "client.steps=1", "client.batch_size=2", "client.lr=0.01"),
            ]
        )
    )
    with _engine(exp) as engine:
        running: Any = engine
        while any(host.starting is not None for host in running._hosts):
            running._pump(0.1)
        workers = [ray.get(host.actor.pid.remote()) for host in running._hosts]
        budget = num_bytes(exp.config["engine"]["memory_budget"])
        fed = Federation(exp.program, engine, exp.participation, exp.system, Memory(folder, budget=budget))
        state = rounds.first(fed, exp.info)
        with Watch({"driver": os.getpid(), **{f"worker {i + 1}": pid for i, pid in enumerate(workers)}}) as watch:
            rounds.following(fed, state, 1)
        assert len(fed.done.who) == clients
        return watch.samples, exp.program.layout.d


def draw(found: dict[str, Samples], d: int, clients: int, path: Path) -> None:
    """One picture per method, side by side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(found), figsize=(5 * len(found), 4), squeeze=False, layout="constrained")
    for axis, (method, samples) in zip(axes[0], found.items(), strict=True):
        for name, values in samples.items():
            if name != "seconds":
                style = "--" if name == "object store" else "-"
                label = "object store (/dev/shm)" if name == "object store" else name
                axis.plot(samples["seconds"], values, style, label=label)
        axis.set(title=method, xlabel="seconds since the round began", ylabel="main memory, MB")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0][0].legend()
    figure.suptitle(f"One round over {clients:,} clients, d = {d:,}, two workers")
    figure.savefig(path, dpi=120)


def show(method: str, samples: Samples, d: int, clients: int) -> None:
    """A tenth of the round, the middle, the end; and whether it was flat."""
    count = len(samples["seconds"])
    places = (count // 10, count // 2, count - 1)
    print(f"{method}: {samples['seconds'][-1]:.1f} s; MB at a tenth of the round, in the middle, at the end; highest")
    more: dict[str, float] = {}
    for name, values in samples.items():
        if name != "seconds":
            print(f"  {name:14}" + "".join(f"{v:10.0f}" for v in (*(values[i] for i in places), max(values))))
            more[name] = max(values[count // 2 :]) - max(values[: count // 2])
    if method == "scaffold":
        owned = clients * d * 4 / 1e6
        print(f"  the driver must keep {owned:.0f} MB of controls")
        more["driver"] -= owned / 2
    most = max(more.values())
    print(aim("second half of the round above the first, at most, MB", most, FLAT_MB, most <= FLAT_MB), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory over a round of many clients.")
    parser.add_argument("--clients", type=int, default=10_000)
    parser.add_argument("--hidden", type=int, nargs=2, default=[200, 200], help="units of the MLP's layers")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--out", type=Path, default=Path("cohort.png"))
    options = parser.parse_args()
    found: dict[str, Samples] = {}
    d = 0
    with own_folder() as folder:
        for method in options.methods:  # each in a new process, as freed memory is not always given back
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                job = pool.submit(watched_round, method, options.clients, options.hidden, folder / method)
                found[method], d = job.result()
            show(method, found[method], d, options.clients)
    draw(found, d, options.clients, options.out)
    print(f"drawn in {options.out}")


if __name__ == "__main__":
    main()

"""System models: durations, the distributions of speeds, jitter and dropout, and files of measured devices."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any

import pytest
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from fedsim import plugins
from fedsim.clients import systems
from fedsim.clients.systems import Csv, Exponential, Homogeneous, LogNormal, Normal, System, uniform
from fedsim.errors import ConfigError

CONF = Path(__file__).parents[1] / "conf" / "system"
CLIENTS = 10_000


def speeds(system: System, clients: int = CLIENTS, seed: int = 0) -> list[float]:
    """Seconds per step of each client, from what a visit of 10,000 steps takes."""
    return [system.duration_ns(client, 1, 10_000, 0, 0, seed) / 1e13 for client in range(clients)]


def far_off(sample: Sequence[float], cdf: Callable[[float], float]) -> float:
    """Kolmogorov-Smirnov distance times sqrt(n): above 1.95 with probability 0.001 if the sample follows ``cdf``."""
    n = len(sample)
    at = [cdf(x) for x in sorted(sample)]
    return max(max((i + 1) / n - p, p - i / n) for i, p in enumerate(at)) * math.sqrt(n)


def phi(x: float) -> float:
    return (1 + math.erf(x / math.sqrt(2))) / 2


# --- durations --------------------------------------------------------------------------------------------


def test_a_visit_takes_its_transfers_and_its_steps() -> None:
    # 1e6 bytes are 8 megabits: 4 s down at 2 Mbps, 16 s up at 0.5 Mbps, and 30 steps of 0.1 s.
    system: System = Homogeneous(seconds_per_step=0.1, download_mbps=2, upload_mbps=0.5)
    duration = system.duration_ns(client=3, visit=1, steps=30, bytes_down=10**6, bytes_up=10**6, seed=0)
    assert duration == 23 * 10**9
    assert type(duration) is int


def test_unlimited_transfers_and_zero_steps_take_no_time() -> None:
    assert Homogeneous().duration_ns(0, 0, 100, 10**9, 10**9, 0) == 0
    assert Homogeneous(0.01).duration_ns(0, 0, 0, 10**9, 10**9, 0) == 0


@pytest.mark.parametrize("link", ["download_mbps", "upload_mbps"])
def test_each_direction_has_its_own_bandwidth(link: str) -> None:
    # 3 MB and 5 MB at 8 Mbps, which is 1 MB per second
    duration = Homogeneous(**{link: 8.0}).duration_ns(0, 0, 7, 3 * 10**6, 5 * 10**6, 0)
    assert duration == (3 if link == "download_mbps" else 5) * 10**9


@given(steps=st.integers(0, 10**6), client=st.integers(0, 10**6), visit=st.integers(0, 100), seed=st.integers(0, 9))
@settings(deadline=None, derandomize=True)
def test_homogeneous_clients_are_homogeneous(steps: int, client: int, visit: int, seed: int) -> None:
    assert Homogeneous(0.01).duration_ns(client, visit, steps, 5, 5, seed) == steps * 10_000_000


# --- speeds of clients ------------------------------------------------------------------------------------


@pytest.mark.parametrize("std", [0.3, 2.0])
def test_normal_speeds_follow_the_normal_distribution_given_that_they_are_positive(std: float) -> None:
    below = phi(-1 / std)  # 0.04 % and 31 %
    found = speeds(Normal(2.0, std=std))
    assert min(found) > 0
    assert far_off(found, lambda x: (phi((x / 2 - 1) / std) - below) / (1 - below)) < 1.95


def test_log_normal_speeds_have_the_median_and_the_deviation_asked_for() -> None:
    found = speeds(LogNormal(2.0, sigma=0.8))
    assert far_off(found, lambda x: phi(math.log(x / 2) / 0.8)) < 1.95


def test_exponential_speeds_without_bins_are_exponential() -> None:
    found = speeds(Exponential(2.0, scale=0.7, bin=0))
    assert far_off(found, lambda x: 1 - math.exp(-x / (2 * 0.7))) < 1.95


def test_exponential_speeds_lie_in_bins_of_geometric_shares() -> None:
    # ceil(x / bin) = k has the probability r^(k - 1) (1 - r), r = exp(-bin / scale); the mean is bin / (1 - r).
    r = math.exp(-0.1 / 0.5)
    found = [x / (0.15 * 0.1) for x in speeds(Exponential(0.15, scale=0.5, bin=0.1))]
    assert all(abs(x - round(x)) < 1e-6 and round(x) >= 1 for x in found)
    counts = Counter(round(x) for x in found)
    for k in range(1, 15):
        p = r ** (k - 1) * (1 - r)
        assert abs(counts[k] / CLIENTS - p) < 4 * math.sqrt(p * (1 - p) / CLIENTS), k
    assert sum(found) / CLIENTS == pytest.approx(1 / (1 - r), abs=4 * math.sqrt(r) / (1 - r) / math.sqrt(CLIENTS))


@pytest.mark.parametrize("system", [Normal(1.0, std=0), LogNormal(1.0, sigma=0)])
def test_without_deviation_clients_are_equal(system: System) -> None:
    assert set(speeds(system, 20)) == {1.0}


@pytest.mark.parametrize("make", [Normal, Exponential, LogNormal])
def test_speed_belongs_to_the_client_and_jitter_to_the_task(make: Callable[..., System]) -> None:
    steady, shaky = make(0.1), make(0.1, jitter=0.05)
    tasks = [(client, visit) for client in range(50) for visit in (1, 2, "task.3")]
    assert len({steady.duration_ns(c, v, 10**6, 0, 0, 0) for c, v in tasks}) <= 50
    assert len({shaky.duration_ns(c, v, 10**6, 0, 0, 0) for c, v in tasks}) == 150
    assert speeds(steady, 50) != speeds(steady, 50, seed=1)


@pytest.mark.parametrize("make", [Homogeneous, Normal, Exponential, LogNormal])
def test_answers_do_not_depend_on_earlier_questions(make: Callable[..., System]) -> None:
    def ask(system: System, client: int, visit: int, seed: int) -> tuple[int, float | None]:
        return system.duration_ns(client, visit, 100, 10**6, 10**6, seed), system.lost_at(client, visit, seed)

    options = {"jitter": 0.2, "dropout": 0.3, "upload_mbps": 5.0}
    tasks = [(client, visit, seed) for client in (3, 0, 7) for visit in (2, 1) for seed in (0, 1)]
    one = make(0.1, **options)
    asked = {task: ask(one, *task) for task in tasks}
    assert [ask(one, *task) for task in reversed(tasks)] == [asked[task] for task in reversed(tasks)]
    assert [ask(make(0.1, **options), *task) for task in tasks] == [asked[task] for task in tasks]
    assert len({duration for duration, _ in asked.values()}) == len(tasks)


# --- jitter and dropout -----------------------------------------------------------------------------------


def test_jitter_is_a_normal_factor_of_mean_one() -> None:
    system = Homogeneous(1.0, jitter=0.05)
    factors = [system.duration_ns(visit % 10, visit, 10**6, 0, 0, 0) / 1e15 for visit in range(CLIENTS)]
    assert far_off(factors, lambda x: phi((x - 1) / 0.05)) < 1.95


def test_jitter_never_goes_below_a_twentieth() -> None:
    # With a deviation of 10 the factor is below 0.05 with probability Phi(-0.095), and then it is 0.05.
    system = Homogeneous(1.0, jitter=10)
    factors = [system.duration_ns(0, visit, 20, 0, 0, 0) / 2e10 for visit in range(CLIENTS)]
    p = phi(-0.095)
    assert min(factors) == 0.05
    assert abs(factors.count(0.05) / CLIENTS - p) < 4 * math.sqrt(p * (1 - p) / CLIENTS)


def test_a_jittered_visit_is_rounded_once() -> None:
    # 1 ns a step: 1e15 steps tell the factor to 15 digits, by which 7 steps take 7 times the factor, rounded.
    system = Homogeneous(1e-9, jitter=0.3)
    durations = [(system.duration_ns(0, v, 10**15, 0, 0, 0), system.duration_ns(0, v, 7, 0, 0, 0)) for v in range(99)]
    assert all(short == round(long / 1e15 * 7) for long, short in durations)
    assert len({short for _, short in durations}) > 7


def test_jitter_does_not_concern_transfers() -> None:
    # 1e6 bytes at 8 Mbps are 1 s
    system = Homogeneous(1.0, jitter=0.5, download_mbps=8, upload_mbps=8)
    for visit in range(20):
        assert system.duration_ns(0, visit, 0, 10**6, 10**6, 0) == 2 * 10**9
        work = system.duration_ns(0, visit, 5, 0, 0, 0)
        assert system.duration_ns(0, visit, 5, 10**6, 10**6, 0) == 2 * 10**9 + work
        assert work != 5 * 10**9


def test_tasks_get_lost_with_the_probability_asked_for_and_at_any_moment() -> None:
    p = 0.2
    system = Homogeneous(1.0, dropout=p)
    moments = [system.lost_at(visit % 10, visit, 0) for visit in range(CLIENTS)]
    lost = [m for m in moments if m is not None]
    assert abs(len(lost) / CLIENTS - p) < 4 * math.sqrt(p * (1 - p) / CLIENTS)
    assert far_off(lost, lambda x: x) < 1.95
    assert min(lost) > 0 and max(lost) < 1


def test_without_dropout_nothing_gets_lost() -> None:
    assert {Homogeneous(1.0).lost_at(0, visit, 0) for visit in range(1000)} == {None}


def test_loss_and_jitter_of_a_task_are_independent() -> None:
    system = Homogeneous(1.0, jitter=0.1, dropout=0.5)
    slow = [system.duration_ns(0, v, 100, 0, 0, 0) > 10**11 for v in range(CLIENTS)]
    lost = [system.lost_at(0, v, 0) is not None for v in range(CLIENTS)]
    both = sum(a and b for a, b in zip(slow, lost, strict=True)) / CLIENTS
    assert abs(both - 0.25) < 4 * math.sqrt(0.25 * 0.75 / CLIENTS)


@pytest.mark.parametrize("drawn", [0, 2**63 - 1])
def test_uniform_numbers_are_neither_zero_nor_one(drawn: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(systems, "derive", lambda *_: drawn)
    assert 0 < uniform(0, "any") < 1
    assert math.isfinite(NormalDist().inv_cdf(uniform(0, "any")))


def test_uniform_numbers_are_uniform() -> None:
    assert far_off([uniform(0, "any", i) for i in range(CLIENTS)], lambda x: x) < 1.95


# --- files of devices -------------------------------------------------------------------------------------


def table(folder: Path, text: str) -> str:
    path = folder / "devices.csv"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_a_file_gives_each_client_its_speed(tmp_path: Path) -> None:
    system = Csv(table(tmp_path, "client,seconds_per_step\n1,0.5\n0,2\n\n2,1e-9\n"), upload_mbps=8)
    assert [system.duration_ns(c, 1, 4, 0, 0, 0) for c in range(3)] == [8 * 10**9, 2 * 10**9, 4]
    assert system.duration_ns(2, 1, 4, 0, 10**6, 0) == 10**9 + 4


def test_a_file_gives_each_client_its_bandwidth_and_the_model_what_it_leaves_empty(tmp_path: Path) -> None:
    # 1e6 bytes: 1 s at 8 Mbps, 2 s at 4, 8 s at 1. Columns in another order, and a mark that Excel puts first.
    text = "\ufeffupload_mbps,client, download_mbps,seconds_per_step\n4,0,8,0\n,1,8,0\n1,2,,0\n"
    system = Csv(table(tmp_path, text), download_mbps=1)
    assert [system.duration_ns(c, 1, 4, 10**6, 10**6, 0) / 1e9 for c in range(3)] == [1 + 2, 1, 8 + 8]


def test_clients_beyond_the_file_are_refused_or_repeat_it(tmp_path: Path) -> None:
    path = table(tmp_path, "client,seconds_per_step\n0,1\n1,2\n2,3\n")
    assert [Csv(path, repeat=True).duration_ns(c, 1, 1, 0, 0, 0) // 10**9 for c in range(8)] == [1, 2, 3, 1, 2, 3, 1, 2]
    Csv(path, repeat=True).check(10**6)
    Csv(path).check(3)
    message = r"devices\.csv has lines for 3 clients, but there are 4; add lines, .* system\.repeat=true"
    with pytest.raises(ConfigError, match=message):
        Csv(path).check(4)
    with pytest.raises(ConfigError, match=message):
        Csv(path).duration_ns(3, 1, 1, 0, 0, 0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "",
            r"line 1: a header with the columns client,seconds_per_step and perhaps .* is needed, 'client' is missing",
        ),
        ("client\n0\n", r"line 1: .* 'seconds_per_step' is missing"),
        ("client,seconds_per_steps\n", r"line 1: .* got column 'seconds_per_steps' \(did you mean 'seconds_per_step'"),
        ("client,client,seconds_per_step\n", r"line 1: .* got column 'client'"),
        ("client,seconds_per_step\n", r"has no lines; give one for each client"),
        ("client,seconds_per_step\n0,1\n1\n", r"line 3: 2 fields are needed, got 1"),
        ("client,seconds_per_step\n0,1,2\n", r"line 2: 2 fields are needed, got 3"),
        ("client,seconds_per_step\n0,1\n2,1\n", r"has no line for client 1; number the clients from 0"),
        ("client,seconds_per_step\n0,1\n0,1\n", r"line 3: client 0 has a line already"),
        ("client,seconds_per_step\n-1,1\n", r"line 2: client must be a whole number, at least 0, got '-1'"),
        ("client,seconds_per_step\n1.0,1\n", r"line 2: client must be a whole number"),
        ("client,seconds_per_step\n0,-1\n", r"line 2: seconds_per_step must be a number of seconds in .*, got '-1'"),
        ("client,seconds_per_step\n0,nan\n", r"line 2: seconds_per_step .* got 'nan'"),
        ("client,seconds_per_step\n0,fast\n", r"line 2: seconds_per_step .* got 'fast'"),
        ("client,seconds_per_step,upload_mbps\n0,1,0\n", r"line 2: upload_mbps must be a positive number .* got '0'"),
        ("client,seconds_per_step\n0,\0\n", r"devices\.csv"),
    ],
)
def test_files_that_say_nothing_clear_are_refused_by_line(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^system\.path=.*devices\.csv") as caught:
        Csv(table(tmp_path, text))
    assert "\n" not in str(caught.value)
    caught.match(message)


def test_what_is_no_text_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "devices.csv").write_bytes(b"client,seconds_per_step\n0,\xff\n")
    with pytest.raises(ConfigError, match=r"system\.path=.* is no CSV file"):
        Csv(str(tmp_path / "devices.csv"))
    with pytest.raises(ConfigError, match=r"system\.path=.*none\.csv cannot be read: No such file"):
        Csv(str(tmp_path / "none.csv"))
    with pytest.raises(ConfigError, match=r"system\.path=.* cannot be read: Is a directory"):
        Csv(str(tmp_path))
    with pytest.raises(ConfigError, match=r"system\.path must be the path of a CSV file, got 3"):
        Csv(3)  # type: ignore[arg-type]


# --- config -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf, "1", True, 1e10])
def test_impossible_systems_are_refused_by_config_key(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"system\.seconds_per_step must be a number of seconds >= 0"):
        Homogeneous(value)
    for name in ("download_mbps", "upload_mbps"):
        with pytest.raises(ConfigError, match=rf"system\.{name} must be a positive number of megabits .* got 0$"):
            Homogeneous(**{name: 0})
        if value != 1e10:
            with pytest.raises(ConfigError, match=rf"system\.{name} must be a positive number of megabits"):
                Homogeneous(**{name: value})
    with pytest.raises(ConfigError, match=r"system\.jitter must be a standard deviation in \[0, 10\]"):
        Homogeneous(jitter=value)
    with pytest.raises(ConfigError, match=r"system\.dropout must be a probability in \[0, 1\)"):
        Homogeneous(dropout=value)
    for make in (Normal, Exponential, LogNormal):
        with pytest.raises(ConfigError, match=r"system\.seconds_per_step must be a number of seconds > 0"):
            make(value)
    with pytest.raises(ConfigError, match=r"system\.std must be"):
        Normal(1.0, std=value)
    with pytest.raises(ConfigError, match=r"system\.scale must be"):
        Exponential(1.0, scale=value)
    with pytest.raises(ConfigError, match=r"system\.bin must be"):
        Exponential(1.0, bin=value)
    with pytest.raises(ConfigError, match=r"system\.sigma must be"):
        LogNormal(1.0, sigma=value)


def test_limits_are_where_the_messages_say() -> None:
    for make in (Normal, Exponential, LogNormal):
        with pytest.raises(ConfigError, match=r"seconds > 0 .* got 0$"):
            make(0)
    with pytest.raises(ConfigError, match=r"system\.dropout .* got 1$"):
        Homogeneous(dropout=1)
    with pytest.raises(ConfigError, match=r"system\.scale .* got 0$"):
        Exponential(1.0, scale=0)
    with pytest.raises(ConfigError, match=r"system\.repeat must be true or false, got 1$"):
        Csv("none.csv", repeat=1)  # type: ignore[arg-type]
    slowest = Homogeneous(1e9, download_mbps=1e-9, jitter=10)
    assert slowest.duration_ns(0, 0, 10**9, 10**12, 0, 0) > 10**27  # far beyond any run, and still a number


def test_every_config_builds_its_system(tmp_path: Path) -> None:
    built: dict[str, Any] = {path.stem: OmegaConf.load(path) for path in CONF.glob("*.yaml")}
    built["csv"]["path"] = table(tmp_path, "client,seconds_per_step\n0,1\n")
    kinds = {name: type(instantiate(config)).__name__ for name, config in built.items()}
    assert kinds == {
        "homogeneous": "Homogeneous",
        "normal": "Normal",
        "exponential": "Exponential",
        "lognormal": "LogNormal",
        "csv": "Csv",
    }
    assert instantiate(built["homogeneous"]) == Homogeneous(seconds_per_step=0.01)
    for name in ("normal", "exponential", "lognormal"):  # the command line shows what the class does by itself
        assert instantiate(built[name]) == type(instantiate(built[name]))(0.01), name


def test_a_system_without_lost_at_is_no_system() -> None:
    with pytest.raises(ConfigError, match=r"methods duration_ns, lost_at; Half has no lost_at"):
        plugins.instantiate({"_target_": f"{__name__}.Half"}, "system")


class Half:
    def duration_ns(self, *_: Any) -> int:
        return 0

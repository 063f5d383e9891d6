"""Client memory: what is put comes back, what changed is written, and nothing follows the population."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedsim import memory as module
from fedsim.errors import RunError
from fedsim.memory import Memory, Row

PLACES = pytest.mark.parametrize("on_disk", [False, True], ids=["ram", "disk"])


def same(a: Row, b: Row) -> bool:
    """Whether two rows agree in names, types, shapes and bits."""

    def bits(t: Tensor) -> bytes:
        dense = torch.empty(t.numel(), dtype=t.dtype).copy_(t.reshape(-1))
        return dense.view(torch.uint8).numpy().tobytes()

    facts = [{k: (t.dtype, t.shape, bits(t)) for k, t in row.items()} for row in (a, b)]
    return facts[0] == facts[1]


def row(client: int, version: int = 0, size: int = 3) -> Row:
    return {"stream.train": torch.tensor([client, version, 0]), "strategy.c": torch.full((size,), client + version / 8)}


def ragged(client: int) -> Row:
    """Names, types and shapes that differ from client to client."""
    kinds = [torch.float32, torch.float64, torch.int64, torch.bool, torch.bfloat16]
    shape = [(), (client,), (2, 0), (client % 3 + 1, 2), (0,)][client % 5]
    g = torch.Generator().manual_seed(client)
    out = {"a": (torch.rand(shape, generator=g) * 9 - 4).to(kinds[client % 5]), "b": torch.tensor(float(client))}
    return out if client % 2 else {**out, "c": torch.arange(client)[::2]}


def files(folder: Path) -> dict[str, int]:
    return {p.name: p.stat().st_size for p in sorted(folder.glob("*"))}


# --- rows -------------------------------------------------------------------------------------------------


@PLACES
def test_rows_come_back_as_they_were_put(tmp_path: Path, on_disk: bool) -> None:
    m = Memory(tmp_path / "memory", on_disk)
    clients = [-1, 0, *range(1, 40, 3), 999_999]
    m.put(clients, [ragged(abs(c)) for c in clients])
    for step in ("put", "flushed", "restored"):
        found = m.get([*clients, 5])
        assert all(same(r, ragged(abs(c))) for c, r in zip(clients, found[:-1], strict=True)), step
        assert found[-1] == {}
        assert m.clients() == sorted(clients) and len(m) == len(clients)
        names = m.flush()
        if step == "flushed":
            m = Memory(tmp_path / "memory", on_disk)
            m.restore(names)


@PLACES
def test_special_numbers_keep_their_bits(tmp_path: Path, on_disk: bool) -> None:
    values = {"x": torch.tensor([0.0, -0.0, float("nan"), -float("inf"), 1e-45])}
    m = Memory(tmp_path / "memory", on_disk)
    m.put([3], [values])
    m.flush()
    assert same(m.get([3])[0], values)


@PLACES
def test_what_is_returned_is_the_callers_own(tmp_path: Path, on_disk: bool) -> None:
    m = Memory(tmp_path / "memory", on_disk)
    mine = row(1)
    m.put([1], [mine])
    mine["strategy.c"].zero_()
    m.get([1])[0]["strategy.c"].fill_(7)
    assert same(m.get([1])[0], row(1))


def test_tensors_are_in_memory_that_torch_aligned(tmp_path: Path) -> None:
    m = Memory(tmp_path / "memory")
    m.put([1], [{"a": torch.ones(3, dtype=torch.uint8), "b": torch.ones(5)}])
    assert m.get([1])[0]["b"].data_ptr() % 64 == 0


def test_a_client_with_nothing_to_remember_is_not_kept(tmp_path: Path) -> None:
    m = Memory(tmp_path / "memory")
    m.put([1, 2], [{}, row(2)])
    assert m.clients() == [2]


@PLACES
def test_the_hash_depends_on_content_alone(tmp_path: Path, on_disk: bool) -> None:
    m = Memory(tmp_path / "a", on_disk)
    for version in range(9):
        m.put(range(9), [row(c, version) for c in range(9)])
        m.put([version], [row(version, 99)])
        m.flush()
    m.put(range(9), [row(c) for c in range(9)])
    expected = Memory(tmp_path / "b")
    for client in reversed(range(9)):
        expected.put([client], [row(client)])
    assert m.sha256() == expected.sha256()
    names = m.flush()
    assert m.sha256() == expected.sha256()
    restored = Memory(tmp_path / "a", not on_disk)
    restored.restore(names)
    restored.get([4])  # some rows in RAM, others not
    assert restored.sha256() == expected.sha256()


@pytest.mark.parametrize(
    "changed",
    [
        {0: {"a": torch.tensor([1.0, -0.0])}},  # another bit
        {0: {"a": torch.tensor([[1.0, 0.0]])}},  # another shape
        {0: {"b": torch.tensor([1.0, 0.0])}},  # another name
        {1: {"a": torch.tensor([1.0, 0.0])}},  # another client
        {0: {"a": torch.tensor([1.0, 0.0]).view(torch.int32)}},  # another type
    ],
)
def test_the_hash_sees_every_difference(tmp_path: Path, changed: dict[int, Row]) -> None:
    hashes = []
    for rows in ({0: {"a": torch.tensor([1.0, 0.0])}}, changed):
        m = Memory(tmp_path)
        m.put(rows.keys(), rows.values())
        hashes.append(m.sha256())
    assert hashes[0] != hashes[1]


# --- what is written --------------------------------------------------------------------------------------


@PLACES
def test_only_rows_that_changed_are_written(tmp_path: Path, on_disk: bool) -> None:
    m = Memory(tmp_path / "memory", on_disk)
    size = 40_000  # numbers; a segment of ten such rows is over 1 MiB, and is not merged
    m.put(range(100), [row(c, size=size) for c in range(100)])
    first = m.flush()
    assert sum(files(tmp_path / "memory").values()) == pytest.approx(100 * 4 * size, rel=0.01)
    assert m.flush() == first  # nothing changed, nothing is written
    m.put(range(10), [row(c, version=1, size=size) for c in range(10)])
    second = m.flush()
    (new,) = set(second) - set(first)
    assert files(tmp_path / "memory")[new] == pytest.approx(10 * 4 * size, rel=0.01)


def test_a_row_that_is_put_unchanged_is_not_written(tmp_path: Path) -> None:
    m = Memory(tmp_path / "memory")
    m.put(range(9), [row(c) for c in range(9)])
    names = m.flush()
    m.put(range(9), [row(c) for c in range(9)])
    assert m.flush() == names


@PLACES
def test_outdated_rows_are_given_up(tmp_path: Path, on_disk: bool) -> None:
    # 50 clients of 40 kB, of which 5 change in each round: live rows are 2 MB, whatever the number of rounds.
    m, rng = Memory(tmp_path / "memory", on_disk), random.Random(0)
    newest = dict.fromkeys(range(50), 0)
    m.put(newest, [row(c, size=10_000) for c in newest])
    written, seen = 0, set[str]()
    for version in range(1, 60):
        cohort = rng.sample(range(50), 5)
        m.put(cohort, [row(c, version, 10_000) for c in cohort])
        newest.update(dict.fromkeys(cohort, version))
        m.collect([m.flush()])
        now = files(tmp_path / "memory")
        written += sum(size for name, size in now.items() if name not in seen)
        seen |= now.keys()
    live = 50 * 40_000
    assert sum(now.values()) < 2.2 * live
    assert written < 3.5 * (live + 59 * 5 * 40_000)
    assert all(same(r, row(c, newest[c], 10_000)) for c, r in zip(newest, m.get(newest), strict=True))


@PLACES
def test_small_segments_are_merged(tmp_path: Path, on_disk: bool) -> None:
    m = Memory(tmp_path / "memory", on_disk)
    for first in range(0, 1000, 5):  # 200 flushes, no row ever outdated
        m.put(range(first, first + 5), [row(c) for c in range(first, first + 5)])
        names = m.flush()
        m.collect([names])
        assert len(names) < 8 * 4
    assert sorted(files(tmp_path / "memory")) == sorted(names)
    restored = Memory(tmp_path / "memory")
    restored.restore(names)
    assert all(same(r, row(c)) for c, r in enumerate(restored.get(range(1000))))


def test_on_disk_no_more_waits_in_ram_than_a_segment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SEGMENT_BYTES", 10_000)
    m = Memory(tmp_path / "memory", on_disk=True)
    for client in range(30):
        m.put([client], [row(client, size=1000)])
        assert sum(len(data) for _, data in m._rows.values()) < 14_100
    assert len(files(tmp_path / "memory")) == 10
    names = m.flush()
    assert not m._rows
    assert all(same(r, row(c, size=1000)) for c, r in enumerate(m.get(range(30))))
    m.collect([names])
    assert sorted(files(tmp_path / "memory")) == sorted(names)


# --- checkpoints ------------------------------------------------------------------------------------------


@PLACES
def test_a_restore_goes_back_in_time(tmp_path: Path, on_disk: bool) -> None:
    m = Memory(tmp_path / "memory", on_disk)
    m.put(range(8), [row(c) for c in range(8)])
    old = m.flush()
    m.put(range(6, 12), [row(c, 1) for c in range(6, 12)])
    new = m.flush()
    m.put(range(12), [row(c, 2) for c in range(12)])
    m._write_dirty()  # as a process does that is killed before its checkpoint
    (tmp_path / "memory" / ".00000009-0.safetensors.1-00000000.tmp").write_bytes(b"half")
    again = Memory(tmp_path / "memory", on_disk)
    again.restore(new, [old])
    assert set(files(tmp_path / "memory")) == set(old) | set(new)
    assert all(same(r, row(c, int(c >= 6))) for c, r in enumerate(again.get(range(12))))
    again.restore(old)
    assert again.clients() == list(range(8))
    assert set(files(tmp_path / "memory")) == set(old)
    assert all(same(r, row(c)) for c, r in enumerate(again.get(range(8))))
    again.restore([])
    assert again.clients() == [] and files(tmp_path / "memory") == {}


def test_collect_keeps_what_a_checkpoint_needs(tmp_path: Path) -> None:
    m = Memory(tmp_path / "memory")
    kept: list[list[str]] = []
    for version in range(20):
        cohort = range(version % 3, 9, 2)
        m.put(cohort, [row(c, version) for c in cohort])
        kept = [*kept[-1:], m.flush()]
        m.collect(kept)
        assert set(files(tmp_path / "memory")) == {name for names in kept for name in names}


@settings(deadline=None, derandomize=True, max_examples=60)
@given(data=st.data(), on_disk=st.booleans())
def test_any_history_is_remembered(
    data: st.DataObject, on_disk: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Puts, checkpoints and restores in any order, against a dict."""
    folder = tmp_path_factory.mktemp("any") / "memory"
    m, now = Memory(folder, on_disk), dict[int, Row]()
    saved: list[tuple[list[str], dict[int, Row]]] = []
    for version in range(data.draw(st.integers(1, 12))):
        action = data.draw(st.sampled_from(["put", "put", "save", "restore"]))
        if action == "put":
            clients = data.draw(st.lists(st.integers(0, 9), unique=True, max_size=6))
            new = [{"x": torch.full((c % 3,), version), "y": torch.tensor(c + version / 3)} for c in clients]
            m.put(clients, new)
            now = {**now, **dict(zip(clients, new, strict=True))}
        elif action == "save":
            saved = [*saved[-1:], (m.flush(), now)]
            m.collect([names for names, _ in saved])
        elif saved:
            saved = saved[: data.draw(st.integers(1, len(saved)))]
            m = Memory(folder, data.draw(st.booleans()))
            m.restore(saved[-1][0], [names for names, _ in saved[:-1]])
            now = saved[-1][1]
        assert m.clients() == sorted(now)
        assert all(same(r, now.get(c, {})) for c, r in enumerate(m.get(range(10))))


@pytest.fixture
def damaged(tmp_path: Path) -> Iterator[tuple[list[str], Path]]:
    """Names of segments of which the second has one bit flipped, and the second's path."""
    m = Memory(tmp_path / "memory")
    for part in range(3):
        m.put([part], [row(part, size=300_000)])
        names = m.flush()
    path = tmp_path / "memory" / names[1]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    yield names, path


@PLACES
def test_a_flipped_bit_is_found(tmp_path: Path, damaged: tuple[list[str], Path], on_disk: bool) -> None:
    names, path = damaged
    with pytest.raises(RunError, match=r"client memory .*00000001-\w{16}.safetensors is missing or damaged") as caught:
        Memory(tmp_path / "memory", on_disk).restore(names)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("how", ["cut short", "empty", "gone", "text"])
def test_a_file_that_is_no_segment_is_refused(tmp_path: Path, damaged: tuple[list[str], Path], how: str) -> None:
    names, path = damaged
    data = path.read_bytes()
    path.unlink()
    if how != "gone":
        path.write_bytes({"cut short": data[:-9], "empty": b"", "text": b"not a segment, but long enough"}[how])
    with pytest.raises(RunError, match="is missing or damaged"):
        Memory(tmp_path / "memory").restore(names)


def test_a_segment_that_vanishes_under_a_run_is_named(tmp_path: Path) -> None:
    m = Memory(tmp_path / "memory", on_disk=True)
    m.put([1], [row(1)])
    (name,) = m.flush()
    (tmp_path / "memory" / name).unlink()
    with pytest.raises(RunError, match=f"client memory .*{name} is missing or damaged"):
        m.get([1])


# --- cost -------------------------------------------------------------------------------------------------


def seconds_of_rounds(m: Memory, touched: int, rounds: int = 30) -> float:
    """Processor time of rounds of ten clients each, checkpoints included; the median of five tries."""
    rng, tries = random.Random(0), []
    for _ in range(5):
        begin = time.process_time()
        for _ in range(rounds):
            cohort = rng.sample(range(touched), 10)
            rows = m.get(cohort)
            m.put(cohort, [{k: t + 1 for k, t in r.items()} for r in rows])
            m.collect([m.flush()])
        tries.append(time.process_time() - begin)
    return sorted(tries)[2]


@PLACES
def test_a_round_costs_what_its_cohort_costs(tmp_path: Path, on_disk: bool) -> None:
    """Ten of 20,000 touched clients cost about what ten of 100 cost; the factor leaves room for noise."""
    seconds = []
    for touched in (100, 20_000):
        m = Memory(tmp_path / str(touched), on_disk)
        m.put(range(touched), [{"stream.train": torch.tensor([c, 0, 0])} for c in range(touched)])
        m.flush()
        seconds.append(seconds_of_rounds(m, touched))
    assert seconds[1] < 4 * seconds[0] + 0.02


@pytest.mark.slow
def test_a_round_of_a_million_touched_clients(tmp_path: Path) -> None:
    """Prints what rounds of ten cost after a hundred and after a million clients were touched."""
    seconds = {}
    for touched in (100, 1_000_000):
        m = Memory(tmp_path / str(touched))
        for first in range(0, touched, 10_000):
            part = range(first, min(first + 10_000, touched))
            m.put(part, [{"stream.train": torch.tensor([c, 0, 0])} for c in part])
            m.flush()
        seconds[touched] = seconds_of_rounds(m, touched) / 30
        names = m.flush()
        begin = time.perf_counter()
        Memory(tmp_path / str(touched)).restore(names)
        print(
            f"\n{touched:,} touched: {1e3 * seconds[touched]:.2f} ms a round, {len(names)} segments, "
            f"restored in {time.perf_counter() - begin:.2f} s"
        )
    assert seconds[1_000_000] < 4 * seconds[100] + 0.002

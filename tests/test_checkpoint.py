"""Checkpoints are whole or absent, the last two are kept, and damage is known by name."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedsim.checkpoint import Checkpoints, files, tree_of
from fedsim.errors import RunError
from fedsim.memory import Memory


@dataclass(frozen=True)
class Server:
    w: Tensor
    history: dict[str, list[float]]
    flags: tuple[bool, None, str]


def content(round_num: int) -> dict[str, Any]:
    g = torch.Generator().manual_seed(round_num)
    state = Server(torch.randn(50, generator=g), {"loss": [0.1 * round_num, float("inf")]}, (True, None, "é"))
    return {"round": round_num, "state": state}


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    x, y = a["state"], b["state"]
    return a["round"] == b["round"] and torch.equal(x.w, y.w) and x.history == y.history and x.flags == y.flags


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints"


def make(folder: Path) -> tuple[Checkpoints, Memory]:
    memory = Memory(folder / "memory")
    return Checkpoints(folder, memory), memory


def value(memory: Memory, client: int) -> float:
    return float(memory.get([client])[0]["x"])


def put(memory: Memory, client: int, x: float) -> None:
    memory.put([client], [{"x": torch.tensor(x)}])


def saved(folder: Path, rounds: int) -> list[Path]:
    """Checkpoints after each round; client 7 remembers the number of the round, client r that of its own."""
    checkpoints, memory = make(folder)
    assert checkpoints.load() is None
    paths = []
    for r in range(1, rounds + 1):
        put(memory, 7, r)
        put(memory, 100 + r, r)
        paths.append(checkpoints.save(r, content(r)))
    return paths


def test_the_newest_comes_back_with_its_memory(folder: Path) -> None:
    saved(folder, 5)
    checkpoints, memory = make(folder)
    assert same(checkpoints.load(), content(5))
    assert value(memory, 7) == 5
    assert memory.clients() == [7, 101, 102, 103, 104, 105]
    assert [value(memory, 100 + r) for r in range(1, 6)] == [1, 2, 3, 4, 5]


def test_the_last_two_are_kept_with_all_that_they_need(folder: Path) -> None:
    paths = saved(folder, 5)
    assert files(folder) == paths[-2:]
    needed = {name for path in paths[-2:] for name in tree_of(path)["memory"]}
    assert {p.name for p in (folder / "memory").iterdir()} == needed


def test_without_the_newest_the_run_goes_on_from_the_one_before(folder: Path) -> None:
    saved(folder, 5)[-1].unlink()
    checkpoints, memory = make(folder)
    assert same(checkpoints.load(), content(4))
    assert value(memory, 7) == 4 and 105 not in memory.clients()
    put(memory, 7, 5)
    put(memory, 105, 5)
    checkpoints.save(5, content(5))
    assert [int(p.name[:8]) for p in files(folder)] == [4, 5]
    checkpoints, memory = make(folder)
    assert same(checkpoints.load(), content(5)) and value(memory, 105) == 5


def test_a_second_checkpoint_of_a_round_is_the_newer(folder: Path) -> None:
    checkpoints, memory = make(folder)
    checkpoints.load()
    put(memory, 7, 1)
    first = checkpoints.save(4, content(4))
    os.utime(first, ns=(0, 0))
    put(memory, 7, 2)
    checkpoints.save(4, {**content(4), "finalized": True})
    checkpoints, memory = make(folder)
    assert "finalized" in checkpoints.load() and value(memory, 7) == 2


def test_tensors_come_back_in_memory_that_torch_aligned(folder: Path) -> None:
    checkpoints, _ = make(folder)
    checkpoints.save(1, {"a": torch.ones(3, dtype=torch.uint8), "b": torch.ones(7), "c": torch.ones(5)[1:]})
    loaded = make(folder)[0].load()
    assert all(t.data_ptr() % 64 == 0 for t in loaded.values())


@pytest.mark.parametrize("at", [0, 9, 200, -1])
def test_a_flipped_bit_is_found_wherever_it_is(folder: Path, at: int) -> None:
    newest = saved(folder, 3)[-1]
    data = bytearray(newest.read_bytes())
    data[at] ^= 1
    newest.write_bytes(data)
    with pytest.raises(RunError, match="delete it to resume from the one before") as caught:
        make(folder)[0].load()
    assert str(newest) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("keep", [0, 3, 100])
def test_a_file_that_was_cut_short_is_found(folder: Path, keep: int) -> None:
    newest = saved(folder, 3)[-1]
    newest.write_bytes(newest.read_bytes()[:keep])
    with pytest.raises(RunError, match=f"checkpoint {newest} is damaged"):
        make(folder)[0].load()


def test_damage_to_an_older_one_does_not_matter(folder: Path) -> None:
    paths = saved(folder, 3)
    paths[-2].write_bytes(b"")
    checkpoints, memory = make(folder)
    assert same(checkpoints.load(), content(3)) and value(memory, 7) == 3
    checkpoints.save(4, content(4))
    checkpoints.save(5, content(5))
    assert [int(p.name[:8]) for p in files(folder)] == [4, 5]


def test_damage_to_client_memory_is_named(folder: Path) -> None:
    saved(folder, 3)
    segment = sorted((folder / "memory").iterdir())[-1]
    data = bytearray(segment.read_bytes())
    data[-1] ^= 1
    segment.write_bytes(data)
    with pytest.raises(RunError, match=f"client memory {segment} is missing or damaged"):
        make(folder)[0].load()


def test_what_a_killed_process_left_is_removed(folder: Path) -> None:
    paths = saved(folder, 5)
    (folder / "memory" / ("00000099-" + "0" * 16 + ".safetensors")).write_bytes(b"never referred to")
    old = folder / paths[0].name
    old.write_bytes(b"a checkpoint that was to be removed")
    make(folder)[0].load()
    assert files(folder) == paths[-2:]
    assert "00000099" not in {p.name[:8] for p in (folder / "memory").iterdir()}


def test_a_full_disk_leaves_the_checkpoint_before(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints, memory = make(folder)
    checkpoints.load()
    put(memory, 7, 1)
    checkpoints.save(1, content(1))
    put(memory, 7, 2)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(RunError, match=r"cannot write .*: No space left on device; free some space"):
            checkpoints.save(2, content(2))
    checkpoints, memory = make(folder)
    assert same(checkpoints.load(), content(1)) and value(memory, 7) == 1
    assert not list(folder.rglob("*.tmp"))


def test_a_save_follows_a_save_that_failed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints, memory = make(folder)
    checkpoints.load()
    put(memory, 7, 1)
    checkpoints.save(1, content(1))
    put(memory, 7, 2)
    replace, left = os.replace, [1]  # the segment is written, the checkpoint is not

    def once(a: Any, b: Any) -> None:
        if not left:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        left.pop()
        replace(a, b)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", once)
        with pytest.raises(RunError, match="cannot write"):
            checkpoints.save(2, content(2))
    checkpoints.save(2, content(2))
    checkpoints, memory = make(folder)
    assert same(checkpoints.load(), content(2)) and value(memory, 7) == 2


def test_what_cannot_be_saved_is_named(folder: Path) -> None:
    with pytest.raises(RunError, match=r"after round 3: .*rates.* is of type numpy.ndarray, which cannot be saved"):
        make(folder)[0].save(3, {"rates": np.zeros(2)})

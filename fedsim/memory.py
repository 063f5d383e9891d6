"""Per-client state that survives rounds.

A client's memory is a few named tensors, created when the client is first touched. The driver owns it; it travels
with the work and comes back with the result. A row is kept as bytes, with its names, types and shapes beside it
(many clients share those), so that a small row costs little more than its numbers.

On disk, memory is a log of segments: files of rows, each row replacing an older one of its client. A checkpoint
writes the rows that changed and stores the names of the segments that are in use; nothing that it does follows the
population or the number of clients that were ever touched. A segment's name carries the first 16 digits of its
SHA-256.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor

from fedsim.errors import RunError
from fedsim.rundir import write_atomic

Row = dict[str, Tensor]
Schema = tuple[tuple[str, str, tuple[int, ...]], ...]  # name, dtype and shape of each tensor of a row
Packed = tuple[int, bytes]  # number of the schema, and the tensors one after the other

SEGMENT_BYTES = 2**26  # a segment ends with the row that makes it this long
SMALL_BYTES = 2**20  # shorter segments are merged, so that there are never many
FANOUT = 8  # how many small segments of about one size are merged
UNWRITTEN = -1  # the segment of a client that is in none yet


@dataclass
class Segment:
    """A file of rows.

    Attributes:
        name: Of the file.
        rows: How many it holds.
        live: How many of them are the newest of their client.
        size: Of the file, in bytes.
    """

    name: str
    rows: int
    live: int
    size: int


class Memory:
    """The memory of all touched clients.

    Args:
        folder: Where segments are written.
        on_disk: Rows stay on disk between visits (up to 64 MiB wait to be written), instead of in RAM.
        budget: Bytes of rows in RAM, beyond which they go to disk; None: no limit.
    """

    def __init__(self, folder: Path, on_disk: bool = False, budget: int | None = None) -> None:
        self._folder, self._on_disk = folder, on_disk
        self._budget = SEGMENT_BYTES if on_disk else budget
        self._held = 0  # bytes of the rows in RAM
        self._schemas: list[Schema] = []
        self._numbers: dict[Schema, int] = {}
        self._rows: dict[int, Packed] = {}  # those in RAM
        self._dirty: set[int] = set()  # of these, those that changed since they were written
        self._where: dict[int, int] = {}  # client -> number of the segment with its newest row on disk
        self._segments: dict[int, Segment] = {}  # those in use, oldest first
        self._retired: set[str] = set()  # no longer in use, but perhaps by a checkpoint
        self._next = 0

    def __len__(self) -> int:
        return len(self._where)

    def clients(self) -> list[int]:
        """Ids of the touched clients, in order."""
        return sorted(self._where)

    def get(self, clients: Iterable[int]) -> list[Row]:
        """The rows of some clients, as tensors of their own; empty for a client that was never touched."""
        clients = list(clients)
        packed = self._find(clients)
        if not self._on_disk:
            for client, row in packed.items():
                if client not in self._rows:
                    self._rows[client] = row
                    self._held += len(row[1])
            self._trim()
        return [self._unpack(packed[c]) if c in packed else {} for c in clients]

    def put(self, clients: Iterable[int], rows: Iterable[Row]) -> None:
        """Replaces the rows of some clients; a client without anything to remember is not kept."""
        for client, row in zip(clients, rows, strict=True):
            if not row:
                assert client not in self._where, f"client {client} cannot forget everything"
                continue
            packed = self._pack(row)
            if self._rows.get(client) != packed:
                if client in self._rows:
                    self._held -= len(self._rows[client][1])
                self._where.setdefault(client, UNWRITTEN)
                self._rows[client] = packed
                self._dirty.add(client)
                self._held += len(packed[1])
        self._trim()

    def _trim(self) -> None:
        """Gives up what is in RAM, when it is too much: written rows are read again when they are needed."""
        if self._budget is not None and self._held >= self._budget:
            self._write_dirty()
            self._rows.clear()
            self._held = 0

    def sha256(self) -> str:
        """Hash of every client's row, in id order; independent of where rows are kept."""
        digests = np.empty((len(self._where), 32), dtype=np.uint8)
        place = {client: i for i, client in enumerate(self.clients())}
        by_segment: dict[int, list[int]] = {}
        for client, segment in self._where.items():
            by_segment.setdefault(UNWRITTEN if client in self._rows else segment, []).append(client)
        for part in by_segment.values():  # each segment is read once
            for client, (schema, data) in self._find(part).items():
                h = hashlib.sha256(f"{client}:{self._schemas[schema]};".encode())
                h.update(data)
                digests[place[client]] = np.frombuffer(h.digest(), np.uint8)
        return hashlib.sha256(digests.tobytes()).hexdigest()

    # --- rows as bytes -------------------------------------------------------------------------------

    def _schema(self, schema: Schema) -> int:
        number = self._numbers.get(schema)
        if number is None:
            number = self._numbers[schema] = len(self._schemas)
            self._schemas.append(schema)
        return number

    def _pack(self, row: Row) -> Packed:
        names, parts = sorted(row), []
        for name in names:
            dense = row[name].detach().cpu().contiguous()
            flat = dense.as_strided((dense.numel(),), (1,))  # one element may have any stride and count as contiguous
            parts.append(flat.view(torch.uint8).numpy().data)  # as bytes: NumPy knows no bfloat16
        schema = tuple((name, str(row[name].dtype).removeprefix("torch."), tuple(row[name].shape)) for name in names)
        return self._schema(schema), b"".join(parts)

    def _unpack(self, packed: Packed) -> Row:
        row, a = {}, 0
        for name, dtype, shape in self._schemas[packed[0]]:
            tensor = torch.empty(shape, dtype=getattr(torch, dtype))  # torch's own memory: bits follow alignment
            b = a + tensor.numel() * tensor.element_size()
            if b > a:
                tensor.view(-1).view(torch.uint8).numpy()[:] = np.frombuffer(packed[1], np.uint8, b - a, a)
            row[name], a = tensor, b
        return row

    # --- on disk -------------------------------------------------------------------------------------

    def _find(self, clients: Iterable[int]) -> dict[int, Packed]:
        """The rows of those clients that have one."""
        out: dict[int, Packed] = {}
        by_segment: dict[int, list[int]] = {}
        for client in clients:
            if (packed := self._rows.get(client)) is not None:
                out[client] = packed
            elif (segment := self._where.get(client)) is not None:
                by_segment.setdefault(segment, []).append(client)
        for segment, part in by_segment.items():
            out.update(self._read(segment, part))
        return out

    def _read(self, number: int, wanted: Sequence[int] | None = None) -> dict[int, Packed]:
        """Rows of a segment: those of some of its clients, or all that are newest."""
        path = self._folder / self._segments[number].name
        try:
            with safe_open(path, "np") as f:
                schemas = [self._schema(_schema_from(s)) for s in json.loads(f.metadata()["schemas"])]
                clients, kinds, offsets = (f.get_tensor(name) for name in ("clients", "kinds", "offsets"))
                if wanted is None:
                    places = [
                        i for i, c in enumerate(clients.tolist()) if self._where[c] == number and c not in self._dirty
                    ]
                else:
                    places = np.searchsorted(clients, wanted).tolist()
                    assert clients[places].tolist() == list(wanted)
                data = f.get_slice("data")
                return {
                    int(clients[i]): (schemas[kinds[i]], data[int(offsets[i]) : int(offsets[i + 1])].tobytes())
                    for i in places
                }
        except (OSError, SafetensorError, KeyError, ValueError, TypeError, IndexError) as exc:
            raise _damaged(path, exc) from exc

    def _write(self, rows: Iterable[tuple[int, Packed]]) -> None:
        """Appends rows, in one or more segments."""
        batch: dict[int, Packed] = {}
        size = 0
        for client, packed in rows:
            batch[client] = packed
            size += len(packed[1])
            if size >= SEGMENT_BYTES:
                self._write_segment(batch)
                batch, size = {}, 0
        if batch:
            self._write_segment(batch)

    def _write_segment(self, rows: dict[int, Packed]) -> None:
        clients = sorted(rows)
        used = sorted({rows[c][0] for c in clients})
        kind = {number: i for i, number in enumerate(used)}
        tensors: dict[str, np.ndarray[Any, Any]] = {
            "clients": np.array(clients, np.int64),
            "kinds": np.array([kind[rows[c][0]] for c in clients], np.int32),
            "offsets": np.cumsum([0, *(len(rows[c][1]) for c in clients)], dtype=np.int64),
            "data": np.frombuffer(b"".join([rows[c][1] for c in clients]), np.uint8),
        }
        data = save(tensors, {"schemas": json.dumps([self._schemas[number] for number in used])})
        number, self._next = self._next, self._next + 1
        name = f"{number:08d}-{hashlib.sha256(data).hexdigest()[:16]}.safetensors"
        self._folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self._folder / name, data)
        self._segments[number] = Segment(name, len(clients), len(clients), len(data))
        for client in clients:
            if (old := self._where[client]) != UNWRITTEN:
                self._segments[old].live -= 1
                if not self._segments[old].live:
                    self._retired.add(self._segments.pop(old).name)
            self._where[client] = number

    def _write_dirty(self, moving: Sequence[int] = ()) -> None:
        """Appends the rows that changed, and what is live in the segments ``moving``."""
        changed = ((client, self._rows[client]) for client in sorted(self._dirty))
        self._write(itertools.chain(changed, (row for number in moving for row in self._read(number).items())))
        self._dirty.clear()
        if self._on_disk:
            self._rows.clear()
            self._held = 0

    def _to_move(self) -> list[int]:
        """Segments to be written anew: those that are mostly outdated, or small and many."""
        outdated = Counter(self._where[client] for client in self._dirty)
        sparse, tiers = [], dict[int, list[int]]()
        for number, segment in self._segments.items():
            if not (left := segment.live - outdated[number]):
                continue
            if 2 * left < segment.rows:
                sparse.append(number)
            elif segment.size < SMALL_BYTES:
                tiers.setdefault(segment.size.bit_length() // 3, []).append(number)
        return sparse + [number for numbers in tiers.values() if len(numbers) >= FANOUT for number in numbers]

    # --- checkpoints ---------------------------------------------------------------------------------

    def flush(self) -> list[str]:
        """Writes the rows that changed; returns the names of the segments in use, for a checkpoint to store.

        Files of segments that are no longer in use are left for `collect`.
        """
        self._write_dirty(self._to_move())
        return [segment.name for segment in self._segments.values()]

    def restore(self, names: Sequence[str], kept: Iterable[Sequence[str]] = ()) -> None:
        """The memory at a checkpoint. Files that no checkpoint needs, as a killed process leaves them, are removed.

        Args:
            names: The segments that the checkpoint stores.
            kept: Those of the other checkpoints.

        Raises:
            RunError: A segment is missing or damaged; names the file.
        """
        self._rows, self._dirty, self._held = {}, set(), 0
        self._where, self._segments = {}, {}
        for name in names:
            path, number = self._folder / name, int(name.partition("-")[0])
            try:
                with path.open("rb") as file:
                    digest, size = hashlib.file_digest(file, "sha256").hexdigest(), file.tell()
                if digest[:16] != path.stem.partition("-")[2]:
                    raise ValueError("its content does not have the hash in its name")
                with safe_open(path, "np") as f:
                    clients = f.get_tensor("clients").tolist()
            except (OSError, SafetensorError, ValueError) as exc:
                raise _damaged(path, exc) from exc
            self._where.update(dict.fromkeys(clients, number))  # later segments hold newer rows
            self._segments[number] = Segment(name, len(clients), 0, size)
        for number, live in Counter(self._where.values()).items():
            self._segments[number].live = live
        self._next = max(self._segments, default=-1) + 1
        needed = {name for other in kept for name in other}
        self._retired = needed - set(names)
        needed.update(names)
        for path in self._folder.glob("*"):
            if path.name not in needed:
                path.unlink()

    def collect(self, kept: Iterable[Sequence[str]]) -> None:
        """Removes segments that are no longer in use, unless one of these checkpoints stores them."""
        needed = {name for names in kept for name in names}
        for name in self._retired - needed:
            (self._folder / name).unlink(missing_ok=True)
        self._retired &= needed


def _schema_from(decoded: list[tuple[str, str, list[int]]]) -> Schema:
    return tuple((name, dtype, tuple(shape)) for name, dtype, shape in decoded)


def _damaged(path: Path, exc: Exception) -> RunError:
    return RunError(
        f"client memory {path} is missing or damaged ({exc}); restore it from a copy, or delete the newest checkpoint "
        f"in {path.parent.parent} to resume from the one before (all of them: from the start)"
    )

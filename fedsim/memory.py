"""Per-client state that survives rounds.

A client's memory is a few named tensors, created when the client is first touched. The driver owns it; it
travels with the work and comes back with the result. On disk it is a log of segments, each a
``.safetensors`` file with the rows that changed, stacked by name: a checkpoint writes changed rows only.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fedsim import tree
from fedsim.errors import RunError
from fedsim.rundir import write_atomic

Row = dict[str, Tensor]
COMPACT_CLIENTS = 16  # rows that are moved at once when a segment is rewritten


class Memory:
    """The memory of all touched clients.

    Args:
        folder: Where segments are written.
        on_disk: Rows are read from and written to disk on every use, instead of being kept in RAM.
    """

    def __init__(self, folder: Path, on_disk: bool = False) -> None:
        self._folder, self._on_disk = folder, on_disk
        self._rows: dict[int, Row] = {}
        self._where: dict[int, int] = {}  # client -> segment with its newest row on disk
        self._sizes: dict[int, int] = {}  # segment -> rows in it, outdated ones included
        self._dirty: set[int] = set()
        self._next = 0

    def __len__(self) -> int:
        return len(self._where.keys() | self._rows.keys())

    def clients(self) -> list[int]:
        """Ids of the touched clients, in order."""
        return sorted(self._where.keys() | self._rows.keys())

    def get(self, clients: Iterable[int]) -> list[Row]:
        """The rows of some clients; empty for one that was never touched."""
        clients = list(clients)
        missing = [c for c in clients if c not in self._rows and c in self._where]
        loaded = self._load(missing)
        return [dict(self._rows.get(c) or loaded.get(c) or {}) for c in clients]

    def put(self, clients: Iterable[int], rows: Iterable[Row]) -> None:
        """Replaces the rows of some clients; a client without anything to remember is not kept."""
        new = {c: r for c, r in zip(clients, rows, strict=True) if r}
        if self._on_disk:
            self._write(new)
        else:
            self._rows.update(new)
            self._dirty.update(new)

    def sha256(self) -> str:
        """Hash of every client's rows, in id order; independent of where they are kept."""
        h = hashlib.sha256()
        clients = self.clients()
        for i in range(0, len(clients), COMPACT_CLIENTS):
            part = clients[i : i + COMPACT_CLIENTS]
            for c, row in zip(part, self.get(part), strict=True):
                h.update(f"{c}:{tree.sha256(row)};".encode())
        return h.hexdigest()

    # --- on disk -------------------------------------------------------------------------------------

    def _path(self, segment: int) -> Path:
        return self._folder / f"{segment:08d}.safetensors"

    def _write(self, rows: dict[int, Row]) -> None:
        if not rows:
            return
        groups: dict[tuple[str, torch.dtype, torch.Size], list[int]] = {}
        for c in sorted(rows):
            for name, t in rows[c].items():
                groups.setdefault((name, t.dtype, t.shape), []).append(c)
        tensors, names = {}, []
        for i, ((name, _, _), owners) in enumerate(groups.items()):
            names.append(name)
            tensors[f"{i}.rows"] = torch.stack([rows[c][name].cpu() for c in owners])
            tensors[f"{i}.clients"] = torch.tensor(owners, dtype=torch.int64)
        self._folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self._path(self._next), save(tensors, {"names": json.dumps(names)}))
        self._where.update(dict.fromkeys(rows, self._next))
        self._sizes[self._next] = len(rows)
        self._next += 1

    def _load(self, clients: list[int]) -> dict[int, Row]:
        out: dict[int, Row] = {c: {} for c in clients}
        wanted: dict[int, set[int]] = {}
        for c in clients:
            wanted.setdefault(self._where[c], set()).add(c)
        for segment, owners in wanted.items():
            path = self._path(segment)
            try:
                with safe_open(path, "pt") as f:
                    for i, name in enumerate(json.loads(f.metadata()["names"])):
                        rows = f.get_slice(f"{i}.rows")
                        for j, c in enumerate(f.get_tensor(f"{i}.clients").tolist()):
                            if c in owners:
                                out[c][name] = rows[j : j + 1][0].clone()  # torch's own, aligned memory
            except (OSError, SafetensorError, KeyError, ValueError, TypeError) as exc:
                raise RunError(
                    f"client memory {path} is missing or damaged ({exc}); the run cannot be resumed from here"
                ) from exc
        return out

    # --- checkpoints ---------------------------------------------------------------------------------

    def flush(self) -> dict[str, Tensor]:
        """Writes the rows that changed; returns the index that a checkpoint stores.

        Of a segment that is more than half outdated the live rows are written anew; files that nothing
        refers to are left for `collect`.
        """
        self._write({c: self._rows[c] for c in self._dirty})
        self._dirty.clear()
        live = Counter(self._where.values())
        sparse = {s for s, n in live.items() if 2 * n < self._sizes[s]}
        moving = [c for c, s in self._where.items() if s in sparse]
        for i in range(0, len(moving), COMPACT_CLIENTS):
            part = moving[i : i + COMPACT_CLIENTS]
            self._write(dict(zip(part, self.get(part), strict=True)))
        clients = sorted(self._where)
        segments = sorted(set(self._where.values()))
        return {
            "clients": torch.tensor(clients, dtype=torch.int64),
            "segments": torch.tensor([self._where[c] for c in clients], dtype=torch.int64),
            "files": torch.tensor(segments, dtype=torch.int64),
            "sizes": torch.tensor([self._sizes[s] for s in segments], dtype=torch.int64),
            "next": torch.tensor(self._next),
        }

    def restore(self, index: dict[str, Tensor] | None) -> None:
        """The state at a checkpoint (None: before the first); later segments are removed."""
        self._rows, self._dirty = {}, set()
        if index is None:
            self._where, self._sizes, self._next = {}, {}, 0
            for path in self._folder.glob("*.safetensors"):
                path.unlink()
            return
        self._where = dict(zip(index["clients"].tolist(), index["segments"].tolist(), strict=True))
        self._sizes = dict(zip(index["files"].tolist(), index["sizes"].tolist(), strict=True))
        self._next = int(index["next"])
        for path in self._folder.glob("*.safetensors"):
            if int(path.stem) >= self._next:
                path.unlink()
        if not self._on_disk:
            self._rows = self._load(list(self._where))

    def collect(self, indices: Iterable[dict[str, Tensor]]) -> None:
        """Removes segments that neither the present nor any of these indices refers to."""
        used = set(self._where.values())
        for index in indices:
            used.update(index["segments"].tolist())
        for path in self._folder.glob("*.safetensors"):
            if int(path.stem) not in used:
                path.unlink()

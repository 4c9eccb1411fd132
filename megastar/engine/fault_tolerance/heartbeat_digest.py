"""Which heartbeats a rank reads. In a large job rank 0, which reads all of them, publishes a digest for the others.

When a connection breaks and when a run ends, each rank needs to know which others have failed. If each rank read every
heartbeat, the load of the store would grow with the square of the number of ranks: at 1,024 ranks one such round takes
several seconds of the store's time. The digest contains only what a diagnosis by another rank can use.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from megastar.engine.exit_codes import CLEAN
from megastar.engine.fault_tolerance.failure_detector import FailureDetector
from megastar.engine.fault_tolerance.heartbeat import ABORTED, EXITED, HeartbeatStore, decode, flag_of

ABOVE = 128  # ranks: up to this number, each rank reads all heartbeats
MOST = 64  # heartbeats in a digest
SILENT = 2.5  # ticks without a new heartbeat


def read_peers(store: HeartbeatStore, detector: FailureDetector, every: bool) -> dict[int, bytes]:
    """The heartbeats that this rank's detector needs: rank 0's, or with ``every`` those of possibly failed ranks."""
    others = [rank for rank in range(store.world) if rank != store.rank]
    if store.rank and not every:
        return store.read([0])
    if store.rank and store.world > ABOVE:
        digest = unpack(store.get("digest"))
        returned = set(detector.beats) - set(digest)  # no longer silent: the detector needs their new heartbeats
        return store.read(sorted(returned | {0})) | digest
    beats = store.read(others)
    if store.rank == 0 and store.world > ABOVE:
        store.write("digest", pack(failed(beats, detector)))
    return beats


def failed(beats: Mapping[int, bytes], detector: FailureDetector) -> dict[int, bytes]:
    """The heartbeats of ranks that aborted, exited with an error or are silent: those of the first ``MOST`` ranks."""
    found: list[tuple[int, float, int]] = []
    for rank, raw in beats.items():
        flag, changed_at = flag_of(raw), detector.changed_at.get(rank, detector.clock)
        if flag == ABORTED:
            found.append((0, changed_at, rank))
        elif flag == EXITED:
            if decode(raw).status not in CLEAN:
                found.append((1, changed_at, rank))
        elif detector.clock - changed_at > SILENT * detector.tick:
            found.append((2, changed_at, rank))
    return {rank: beats[rank] for _, _, rank in sorted(found)[:MOST]}


def pack(beats: Mapping[int, bytes]) -> bytes:
    return json.dumps({str(rank): raw.decode("latin-1") for rank, raw in beats.items()}).encode()


def unpack(raw: bytes) -> dict[int, bytes]:
    return {int(rank): text.encode("latin-1") for rank, text in json.loads(raw or b"{}").items()}

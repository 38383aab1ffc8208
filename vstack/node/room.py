"""How much of a file system stays free, and from whom. Pure.

Uploads stop first, then repair, then demotion; what is left below that, up to a superblock's worth, is for
tombstones and compaction, which make room. The last part is not the store's at all: votes must go on being
written, or the node falls out of the mesh. All marks are shares of the file system's size, so that they hold
on small disks too, and nothing is remembered: when space returns, writes are taken again.

                 0          votes         upkeep        (half way)        reserve            total
    free bytes   |------------|-------------|---------------|----------------|-----------------|
    who writes      votes      + upkeep       + demotion       + repair          + uploads
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

_VOTES = 0.1
_LAST = 0.25
"""Shares of the reserve: what the votes keep; what a superblock's worth may be at most."""


class Purpose(Enum):
    """Why something is written. The later ones may use more of the disk."""

    UPLOAD = "upload"
    REPAIR = "repair"
    DEMOTION = "demotion"
    UPKEEP = "upkeep"
    """Tombstones, hints and the copies that compaction makes."""


def keep_free(purpose: Purpose, reserve: float, superblock_bytes: int) -> Callable[[int], float]:
    """From the bytes of a file system to those that must stay free for others.

    `reserve` is the share, 0 to 1, of the file system that uploads leave alone.
    """

    def mark(total: int) -> float:
        uploads = total * reserve
        upkeep = uploads * _VOTES
        demotion = upkeep + min(superblock_bytes, uploads * _LAST)
        return {
            Purpose.UPLOAD: uploads,
            Purpose.REPAIR: (uploads + demotion) / 2,
            Purpose.DEMOTION: demotion,
            Purpose.UPKEEP: upkeep,
        }[purpose]

    return mark

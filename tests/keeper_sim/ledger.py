"""What must hold of registers and disks together, whatever fails. Sees each event as it happens.

READABLE    a chunk of a ready or deleted video has k good pieces where its register says, always
NAMED       no piece that its register names is deleted by its holder, nor one of an open upload
GRACE       none within the policy's grace after it was last named: somebody may be reading it
COLLECTED   no register ever names a piece that is not on that disk, or was collected before
CHECKED     none names a piece that has long been damaged: it is looked at before it is named
SAME KEY    pieces with the same key have the same bytes
WINDOW      a deleted video is not purged before its time to be undeleted is over
GONE        nothing is written about a video that was purged, until somebody uploads it again
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection
from typing import NamedTuple

from tests.keeper_sim.disk import Disk
from tests.keeper_sim.registers import Cell, Registers
from vstack.mesh.config import NodeId, key_subject
from vstack.mesh.mesh_client import Change
from vstack.mesh.registers import (
    INIT_INDEX,
    NO_NODE,
    ChunkRecord,
    Generation,
    PieceKey,
    Scheme,
    UploadId,
    VideoRecord,
    chunk_key,
    chunk_prefix,
    init_record,
    unpack_chunk,
    unpack_video,
    upload_id,
    video_key,
)

LONG = 45.0
"""Seconds between the look at a piece and the change that names it, at most: the slowest writes of the other
pieces, and a change that happens late."""


class Violation(Exception):
    """An invariant does not hold."""


class Held(NamedTuple):
    node: NodeId
    key: PieceKey


class Ledger:
    def __init__(
        self, now: Callable[[], float], disks: dict[NodeId, Disk], grace: float, undelete: float
    ) -> None:
        self._now = now
        self._disks = disks
        """Those that are not lost."""
        self._grace = grace
        self._undelete = undelete
        self.registers = Registers(self._on_change)
        self.violation: Violation | None = None
        """The first one."""
        self._unnamed: dict[Held, float] = {}
        """When a piece was last named, of those that are not any more."""
        self._over: dict[tuple[str, UploadId], float] = {}
        """When an upload came to its end."""
        self._collected: set[Held] = set()
        self._spoilt: dict[Held, float] = {}
        """When the world last damaged or took a piece."""
        self._hashes: dict[PieceKey, bytes] = {}
        self._written: dict[tuple[str, UploadId, int], dict[Generation, dict[Held, Scheme]]] = defaultdict(
            lambda: defaultdict(dict)
        )
        self._deleted: dict[str, float] = {}
        """When a video was last deleted."""
        self.under_way: list[Change] = []
        """Changes that have been asked for, and may happen any moment."""
        self.changes = 0
        """Of registers, and pieces written."""
        self.purged: set[str] = set()
        self.strays: set[str] = set()
        """Chunk registers that a client made for an upload that was over."""

    def fail(self, rule: str, text: str) -> None:
        if self.violation is None:
            self.violation = Violation(f"{rule} at {self._now():.2f} s: {text}")

    # -- what the registers say -------------------------------------------------------------------

    def video(self, video: str) -> tuple[int, VideoRecord | None]:
        cell = self.registers.read(video_key(video))
        return cell.version, None if cell.data is None else unpack_video(cell.data)

    def live_uploads(self, video: str) -> list[UploadId]:
        """Uploads whose pieces must not go: the one that stands, or is open, and the one before that."""
        version, record = self.video(video)
        if record is None or record.state == "aborted":
            return []
        live = [upload_id(record, version)]
        if (before := _before(record)) is not None:
            live.append(before.upload)
        return live

    def records(self, video: str) -> list[tuple[UploadId, int, ChunkRecord, int]]:
        """Of all chunks that must stay readable: upload, index, record, and the register's version."""
        version, record = self.video(video)
        if record is None or record.state in ("aborted", "purging"):
            return []
        out: list[tuple[UploadId, int, ChunkRecord, int]] = []
        inits = [record]
        if (before := _before(record)) is not None:
            inits.append(before)
        for upload, one in zip(self.live_uploads(video), inits, strict=True):
            if one.init is not None:
                out.append((upload, INIT_INDEX, init_record(one.init), version))
            for key in self.registers.keys(chunk_prefix(video, upload)):
                cell = self.registers.read(key)
                assert cell.data is not None
                out.append((upload, int(key[-8:]), unpack_chunk(cell.data), cell.version))
        return out

    def named(self, video: str) -> set[Held]:
        """All pieces that the registers of live uploads name."""
        out: set[Held] = set()
        for upload in self.live_uploads(video):
            for key in self.registers.keys(chunk_prefix(video, upload)):
                out |= _names_of_chunk(key, self.registers.read(key))
        return out | self._names_of_video(video, self.registers.read(video_key(video)))

    def good(self, held: Held) -> bool:
        disk = self._disks.get(held.node)
        stored = disk.get(held.key) if disk is not None else None
        return stored is not None and stored.good

    def count_good(
        self, video: str, upload: UploadId, record: ChunkRecord, without: Collection[Held] = ()
    ) -> int:
        """Distinct good pieces where the record says: fragments, or nodes with a copy."""
        found = set()
        for place in record.places:
            held = Held(place.node, record.key(video, upload, place))
            if held not in without and self.good(held):
                found.add(place.node if record.scheme.k == 1 else place.piece)
        return len(found)

    def tolerates(self, victims: Collection[Held]) -> bool:
        """Whether all that must stay readable would, without these: as the registers are, and as keepers at
        work may make them any moment."""
        lost = set(victims)
        for video in sorted({h.key.video for h in lost}):
            state = self.video(video)[1]
            if state is None or state.state in ("aborted", "purging"):
                continue
            for upload, _, record, _ in self.records(video):
                if self.count_good(video, upload, record, lost) < record.scheme.k:
                    return False
        for change in self.under_way:
            if change.expect == self.registers.read(change.key).version and not self._could_read(
                change, lost
            ):
                return False
        for video, upload, index in sorted({(h.key.video, h.key.upload, h.key.chunk) for h in lost}):
            version = self._version(video, upload, index)
            known = {u: r for u, i, r, _ in self.records(video) if i == index}.get(upload)
            state = self.video(video)[1]
            is_open = (
                state is not None and state.state == "uploading" and upload == self.live_uploads(video)[0]
            )
            for generation, puts in self._written[video, upload, index].items():
                if is_open and generation.node == NO_NODE:
                    return False  # its client relies on what was acknowledged
                if generation.against == version and not self._would_do(known, puts, lost):
                    return False
        return True

    def _could_read(self, change: Change, lost: set[Held]) -> bool:
        """Whether what the change puts there could be read."""
        if change.data is None or change.key.startswith("views/"):
            return True
        video = key_subject(change.key)
        if change.key.startswith("video/"):
            state = unpack_video(change.data)
            if state.init is None:
                return True
            upload, record = upload_id(state, change.expect), init_record(state.init)
        else:
            upload, record = _upload_of(change.key), unpack_chunk(change.data)
        return self.count_good(video, upload, record, lost) >= record.scheme.k

    def _version(self, video: str, upload: UploadId, index: int) -> int:
        key = video_key(video) if index == INIT_INDEX else chunk_key(video, upload, index)
        return self.registers.read(key).version

    def _is_open(self, video: str, upload: UploadId) -> bool:
        version, record = self.video(video)
        return record is not None and record.state == "uploading" and upload_id(record, version) == upload

    def _would_do(self, known: ChunkRecord | None, puts: dict[Held, Scheme], lost: set[Held]) -> bool:
        """Whether the chunk could be read if a keeper that has written `puts` made the register name them, or
        only some: it may not hear of the others."""
        scheme = next(iter(puts.values()))
        good = {h.key.piece for h in puts if h not in lost and self.good(h)}
        if scheme.k == 1:
            return bool(good)
        if known is None or known.scheme != scheme:
            return scheme.m - len({h.key.piece for h in puts} - good) >= scheme.k
        example = next(iter(puts)).key
        kept = {
            p.piece
            for p in known.places
            if (h := Held(p.node, known.key(example.video, example.upload, p))) not in lost and self.good(h)
        }
        return len(kept - ({h.key.piece for h in puts} - good)) >= scheme.k

    # -- events -----------------------------------------------------------------------------------

    def on_put(self, node: NodeId, key: PieceKey, scheme: Scheme, sha256: bytes) -> None:
        """The node is given the piece, and acknowledges it: perhaps it is there already."""
        self.changes += 1
        known = self._hashes.setdefault(key, sha256)
        if known != sha256:
            self.fail("SAME KEY", f"two keepers wrote different bytes as {_show(key)}")
        held = Held(node, key)
        self._collected.discard(held)
        disk = self._disks.get(node)
        if disk is None or disk.get(key) is None:
            self._spoilt.pop(held, None)
        self._written[key.video, key.upload, key.chunk][key.generation][held] = scheme

    def on_spoil(self, victims: Collection[Held]) -> None:
        """The world has damaged or taken these: it asked `tolerates` before."""
        for held in victims:
            self._spoilt[held] = self._now()

    def on_collect(self, node: NodeId, key: PieceKey) -> None:
        """The holder deletes the piece now."""
        held = Held(node, key)
        video, now = key.video, self._now()
        version = self.video(video)[0]
        self._collected.add(held)
        if version == 0 or key.upload.version > version:
            self.fail("NAMED", f"{_show(key)} went, and no register says anything of its upload")
        live = self.live_uploads(video)
        since = self._unnamed.get(held, float("-inf"))
        if key.upload not in live:
            since = min(since, self._over.get((video, key.upload), since))
        elif self._is_open(video, key.upload):
            self.fail("NAMED", f"{_show(key)} of an open upload was collected on {node[:4]}")
            return
        elif held in self.named(video):
            self.fail("NAMED", f"{_show(key)} is named, and was collected on {node[:4]}")
            return
        elif self._version(video, key.upload, key.chunk) == 0:
            self.fail("NAMED", f"{_show(key)} was collected, and its chunk has no register")
        if now - since < self._grace - 1e-6:
            self.fail("GRACE", f"{_show(key)} was collected on {node[:4]} {now - since:.2f} s after its end")

    def _on_change(self, key: str, was: Cell, now: Cell, by: str) -> None:
        self.changes += 1
        if key.startswith("video/"):
            self._on_video(key, was, now)
        elif key.startswith("chunk/"):
            self._on_chunk(key, was, now, by)
            if key not in self.strays:
                self._on_names(_names_of_chunk(key, was), _names_of_chunk(key, now), by)
        if now.data is not None and key.split("/")[1] in self.purged and by != "client":
            self.fail("GONE", f"{by} wrote {key}, and its video was purged")
        if not key.startswith("views/"):
            self.check_readable(key_subject(key))

    def check_readable(self, video: str) -> None:
        for upload, index, record, _ in self.records(video):
            good = self.count_good(video, upload, record)
            if good < record.scheme.k:
                places = ", ".join(f"{p.node[:4]}/{p.piece}" for p in record.places)
                self.fail(
                    "READABLE",
                    f"chunk {index} of {video[:4]}: {good} good pieces where {record.scheme.name} are "
                    f"named ({places})",
                )

    def _on_chunk(self, key: str, was: Cell, now: Cell, by: str) -> None:
        video, upload = key.split("/")[1:3]
        live = [str(u) for u in self.live_uploads(video)]
        if now.data is None:
            state = self.video(video)[1]
            if upload in live and state is not None and state.state != "purging":
                self.fail("GONE", f"{by} deleted {key}, and its upload stands")
        elif was.version == 0 and upload not in live:
            self.strays.add(key)

    def _on_video(self, key: str, was: Cell, now: Cell) -> None:
        video = key_subject(key)
        old, new = (None if c.data is None else unpack_video(c.data) for c in (was, now))
        self._on_names(self._names_of_video(video, was), self._names_of_video(video, now), "video")
        live = self.live_uploads(video)
        for cell, record in ((was, old), (now, new)):
            if record is not None:
                upload = upload_id(record, cell.version)
                before = _before(record)
                for one in [upload] if before is None else [upload, before.upload]:
                    if one not in live:
                        self._over.setdefault((video, one), self._now())
        state = None if new is None else new.state
        if state == "deleted" and (old is None or old.state not in ("deleted", "uploading")):
            self._deleted[video] = self._now()
        if state == "purging" and self._now() - self._deleted[video] < self._undelete - 1.0:
            self.fail("WINDOW", f"{video[:4]} was purged {self._now() - self._deleted[video]:.1f} s after")
        if new is None:
            self.purged.add(video)
            if old is not None and old.state not in ("purging", "aborted"):
                self.fail("GONE", f"the register of {video[:4]} was deleted, and it was {old.state}")
        elif state == "uploading":
            self.purged.discard(video)

    def _names_of_video(self, video: str, cell: Cell) -> set[Held]:
        """What the video's register names: the copies of its init segment; and those of the upload that
        stands again if an open one fails."""
        if cell.data is None:
            return set()
        record = unpack_video(cell.data)
        named = _names_of_init(video, upload_id(record, cell.version), record)
        if (before := _before(record)) is not None:
            named |= _names_of_init(video, before.upload, before)
        return named

    def _on_names(self, old: set[Held], new: set[Held], by: str) -> None:
        now = self._now()
        for held in old - new:
            self._unnamed[held] = now
        for held in new - old:
            self._unnamed.pop(held, None)
            disk = self._disks.get(held.node)
            if held in self._collected:
                self.fail("COLLECTED", f"{by} named {_show(held.key)} of {held.node[:4]}: it was collected")
            elif disk is not None and held not in self._spoilt and disk.get(held.key) is None:
                self.fail("COLLECTED", f"{by} named {_show(held.key)}, which is not on {held.node[:4]}")
            elif disk is not None and now - self._spoilt.get(held, now) > LONG:
                self.fail("CHECKED", f"{by} named {_show(held.key)} of {held.node[:4]}: long damaged")


def _before(record: VideoRecord) -> VideoRecord | None:
    """Of an open upload: what stands again if nothing comes of it."""
    return unpack_video(record.before) if record.state == "uploading" and record.before else None


def _names_of_chunk(key: str, cell: Cell) -> set[Held]:
    if cell.data is None:
        return set()
    record = unpack_chunk(cell.data)
    return {Held(p.node, record.key(key_subject(key), _upload_of(key), p)) for p in record.places}


def _upload_of(key: str) -> UploadId:
    """Of a chunk's register."""
    epoch, version = map(int, key.split("/")[2].split("."))
    return UploadId(epoch, version)


def _names_of_init(video: str, upload: UploadId, record: VideoRecord) -> set[Held]:
    if record.init is None:
        return set()
    init = init_record(record.init)
    return {Held(p.node, init.key(video, upload, p)) for p in init.places}


def _show(key: PieceKey) -> str:
    chunk = "init" if key.chunk == INIT_INDEX else key.chunk
    against, node, boot, counter = key.generation
    return f"{key.video[:4]}/{key.upload}/{chunk}/{key.piece} ({against}, {node[:4]}, {boot}, {counter})"

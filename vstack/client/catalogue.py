"""Finding videos: listing, names to ids, a video's chunk table. Deleting them, having them back, pinning,
verifying their pieces.

A table is taken as a range read of its chunk registers and checked against the hash in the video's
register, so that one answer is enough to trust it, whoever gave it.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from time import time

import msgspec

from vstack.client.pieces import Checked, check_pieces
from vstack.errors import DamagedData, MeshUnavailable, NotFound, VstackError
from vstack.mesh.config import NodeId
from vstack.mesh.mesh_client import Change, MeshClient
from vstack.mesh.messages import Mismatch, Row
from vstack.mesh.registers import (
    INIT_INDEX,
    ChunkRecord,
    Redundancy,
    Scheme,
    UploadId,
    VideoRecord,
    VideoState,
    chunk_key,
    chunk_prefix,
    init_record,
    pack,
    table_hash,
    unpack_chunk,
    unpack_video,
    unpack_views,
    upload_id,
    uploads_prefix,
    video_key,
    views_prefix,
)

MIN_PREFIX = 6
MAX_TITLE = 200
"""Characters of a title; longer ones are cut."""
VERIFY_AT_ONCE = 16
"""Chunks whose pieces are read by their holders at a time."""
EDIT_TRIES = 20
"""How often a change of a video is made anew because its register was changed meanwhile."""


@dataclass(frozen=True)
class Video:
    """A video's register, as it was read."""

    id: str
    version: int
    record: VideoRecord

    @property
    def upload(self) -> UploadId:
        return upload_id(self.record, self.version)

    @property
    def seconds(self) -> float:
        media = self.record.media
        return 0.0 if media is None else media.duration * media.clock[0] / media.clock[1]


@dataclass(frozen=True)
class Videos:
    """A listing. If not `complete`, videos may be missing because the `silent` nodes did not answer."""

    videos: list[Video]
    complete: bool
    silent: tuple[NodeId, ...]


async def read_video(mesh: MeshClient, video: str) -> Video | None:
    """The register of `video` (64 hex digits), or None if it holds nothing. Raises MeshUnavailable."""
    found = await mesh.read(video_key(video))
    return None if found.data is None else Video(video, found.version, unpack_video(found.data))


async def list_videos(mesh: MeshClient, *, hidden: bool = False) -> Videos:
    """All videos that are ready, by title; with `hidden` those uploading, aborted or deleted as well."""
    page = await mesh.list("video/")
    videos = []
    for row in page.rows:
        try:
            video = Video(row.key.removeprefix("video/"), row.version, unpack_video(row.data))
        except msgspec.DecodeError:
            continue  # written by a newer version: not ours to show
        if hidden or video.record.state == "ready":
            videos.append(video)
    videos.sort(key=lambda v: (v.record.title.casefold(), v.id))
    return Videos(videos, page.complete, page.silent)


async def find_video(mesh: MeshClient, name: str, state: VideoState = "ready") -> Video:
    """The video in `state` that `name` means: an id, a unique prefix of one, or a unique exact title.

    Raises NotFound, MeshUnavailable; VstackError with the reason if it means videos in other states only.
    """
    if re.fullmatch(r"[0-9a-f]{64}", name):
        video = await read_video(mesh, name)
        named, complete, silent = ([] if video is None else [video]), True, 0
    else:
        listing = await list_videos(mesh, hidden=True)
        named = [v for v in listing.videos if v.record.title == name[:MAX_TITLE]]
        if re.fullmatch(rf"[0-9a-f]{{{MIN_PREFIX},63}}", name):
            named += [v for v in listing.videos if v.id.startswith(name) and v not in named]
        complete, silent = listing.complete, len(listing.silent)
    found = [v for v in named if v.record.state == state]
    if len(found) > 1:
        ids = ", ".join(v.id[:12] for v in found[:5])
        raise NotFound(f"{name!r} means more than one video ({ids}): name one by more of its id")
    if found:
        return found[0]
    if not complete:
        raise MeshUnavailable(f"cannot tell whether there is a video {name!r}: {silent} nodes do not answer")
    if state == "deleted":
        for video in named:
            _must_be_deleted(video)
        raise NotFound(f"no deleted video is called {name!r}: `vstack ls --all` shows them")
    for video in named:
        if video.record.state == "deleted":
            raise NotFound(f"{name!r} is a deleted video: `vstack undelete {video.id[:12]}` has it back")
    if re.fullmatch(r"[0-9a-f]{64}", name):
        raise NotFound(f"no video {name[:12]}… is ready in this mesh: `vstack ls` shows those that are")
    short = re.fullmatch(r"[0-9a-f]{1,5}", name)
    hint = f"; the prefix of an id needs {MIN_PREFIX} digits" if short else ""
    raise NotFound(f"no video is called {name!r}: `vstack ls` shows those that are ready{hint}")


async def find_with_table(mesh: MeshClient, name: str) -> tuple[Video, list[ChunkRecord]]:
    """A ready video and its chunk table; by its id, in one round trip. Raises as `find_video` and
    `chunk_table` do."""
    if not re.fullmatch(r"[0-9a-f]{64}", name):
        video = await find_video(mesh, name)
        return video, await chunk_table(mesh, video)
    # which of its uploads counts is in the register, so the chunks of all are asked for; there is mostly one
    rows = asyncio.create_task(mesh.list(uploads_prefix(name)))
    try:
        video = await find_video(mesh, name)
        prefix = chunk_prefix(name, video.upload)
        try:
            return video, _table(video, [row for row in (await rows).rows if row.key.startswith(prefix)])
        except DamagedData:  # it may be older than the register
            return video, await chunk_table(mesh, video)
    finally:
        rows.cancel()
        await asyncio.gather(rows, return_exceptions=True)


async def chunk_table(mesh: MeshClient, video: Video) -> list[ChunkRecord]:
    """The chunk registers of a ready video, in order. Raises DamagedData, MeshUnavailable."""
    return _table(video, (await mesh.list(chunk_prefix(video.id, video.upload))).rows)


def _table(video: Video, rows: Sequence[Row]) -> list[ChunkRecord]:
    """Raises DamagedData if it is not the one that the video's register names."""
    records = [unpack_chunk(row.data) for row in rows]
    if len(records) != video.record.chunks or table_hash([r.entry for r in records]) != video.record.table:
        raise DamagedData(
            f"the chunk table of video {video.id[:12]} has {len(records)} of {video.record.chunks} rows, "
            "or not the hash that its register names: try again when more nodes are up"
        )
    return records


async def verify_video(
    mesh: MeshClient, video: Video, table: Sequence[ChunkRecord]
) -> AsyncIterator[list[Checked]]:
    """Has the holders of all pieces read them, a few chunks at a time; the init segment comes first, as a
    chunk. A piece that is not where it was named is looked for where its register names it now.

    `table`: as from `chunk_table`. Raises MeshUnavailable.
    """
    init = video.record.init
    records = [*([] if init is None else [init_record(init)]), *table]
    if any(mesh.config.member(p.node) is None for r in records for p in r.places):
        await mesh.refresh()  # the node may be a newer member than this client knows
    for first in range(0, len(records), VERIFY_AT_ONCE):
        checked = await check_pieces(mesh, video.id, video.upload, records[first : first + VERIFY_AT_ONCE])
        for i, found in enumerate(checked):
            if len(found.good) < len(found.states):
                now = await _places_now(mesh, video, found.record)
                if now != found.record:
                    checked[i] = (await check_pieces(mesh, video.id, video.upload, [now]))[0]
        yield checked


async def _places_now(mesh: MeshClient, video: Video, record: ChunkRecord) -> ChunkRecord:
    """The record of a chunk, or of the init segment, as it is now; as it was if the video is gone."""
    if record.entry.index == INIT_INDEX:
        found = await read_video(mesh, video.id)
        same = found is not None and found.upload == video.upload
        return init_record(found.record.init) if found and same and found.record.init else record
    data = (await mesh.read(chunk_key(video.id, video.upload, record.entry.index))).data
    return record if data is None else unpack_chunk(data)


async def views(mesh: MeshClient, video: str, days: int = 30) -> int:
    """How often `video` (64 hex digits) was seen on the last `days` days, today included.

    Days are those of UTC, by the clocks of the nodes that counted; today is by this machine's. Views that
    a node has noted and not written yet are not in it. Raises MeshUnavailable if it cannot be known.
    """
    first = int(time() // 86_400) - days + 1
    prefix = views_prefix(video)
    page = await mesh.list(prefix)
    if not page.complete:
        raise MeshUnavailable(
            f"cannot tell how often video {video[:12]} was seen: {len(page.silent)} nodes do not answer"
        )
    total = 0
    for row in page.rows:
        try:
            total += unpack_views(row.data).total if int(row.key.removeprefix(prefix)) >= first else 0
        except msgspec.DecodeError:
            continue  # written by a newer version: not ours to count
    return total


async def delete_video(mesh: MeshClient, video: Video) -> Video:
    """Hides the video: it is kept, and can be undeleted, until its space is reclaimed.

    Raises OutcomeUnknown, VstackError (it is not ready any more).
    """

    def edit(now: Video) -> VideoRecord:
        if now.record.state == "deleted":
            return now.record
        if now.record.state != "ready":
            raise VstackError(f"video {now.id[:12]} is not ready any more, but {now.record.state}")
        return msgspec.structs.replace(now.record, state="deleted", waited=0)

    return await edit_video(mesh, video, edit)


async def undelete_video(mesh: MeshClient, video: Video) -> Video:
    """Shows a deleted video again. Raises OutcomeUnknown, VstackError (it cannot be had back)."""

    def edit(now: Video) -> VideoRecord:
        _must_be_deleted(now)
        return msgspec.structs.replace(now.record, state="ready", waited=0)

    return await edit_video(mesh, video, edit)


def _must_be_deleted(video: Video) -> None:
    """Raises VstackError with the reason why a video cannot be undeleted."""
    reasons = {"ready": "is not deleted", "purging": "is being removed for good: put the file again later"}
    if video.record.state != "deleted":
        why = reasons.get(video.record.state, f"is not deleted, but {video.record.state}")
        raise VstackError(f"video {video.id[:12]} {why}")


async def pin_video(
    mesh: MeshClient, video: Video, redundancy: Redundancy, erasure: Scheme | None = None
) -> Video:
    """Says how the video is to be kept, and how its fragments are made (None: as they are). The nodes change
    its chunks afterwards, in the background.

    Raises OutcomeUnknown, VstackError (it is not ready any more).
    """

    def edit(now: Video) -> VideoRecord:
        if now.record.state != "ready":
            raise VstackError(f"video {now.id[:12]} is not ready any more, but {now.record.state}")
        code = erasure or now.record.erasure
        return msgspec.structs.replace(now.record, redundancy=redundancy, erasure=code)

    return await edit_video(mesh, video, edit)


async def edit_video(mesh: MeshClient, video: Video, edit: Callable[[Video], VideoRecord]) -> Video:
    """Changes the register of a video, which others change as well: the nodes count in it. `edit` gives what
    is to be there instead, and is asked again with what is there then; if that is the same, nothing is
    written. The upload stays.

    Raises OutcomeUnknown, NotFound (it is gone), whatever `edit` raises, and VstackError if it is changed
    by others all the time.
    """
    for _ in range(EDIT_TRIES):
        record = msgspec.structs.replace(edit(video), upload=video.upload)
        if record == msgspec.structs.replace(video.record, upload=video.upload):
            return video
        outcome = await mesh.change(Change(video_key(video.id), video.version, pack(record)))
        if not isinstance(outcome, Mismatch):
            return Video(video.id, outcome.version, record)
        if outcome.data is None:
            raise NotFound(f"video {video.id[:12]} has just been removed for good")
        video = Video(video.id, outcome.version, unpack_video(outcome.data))
    raise VstackError(f"video {video.id[:12]} is changed by somebody else all the time: try again")

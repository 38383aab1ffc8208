"""A world for one schedule by hand: nodes that are up and do nothing of themselves, one video with one chunk,
whose register and pieces a test sets as it likes."""

from __future__ import annotations

import hashlib
from collections.abc import Coroutine, Sequence
from typing import Any

from tests.keeper_sim.clients import content
from tests.keeper_sim.ledger import Held
from tests.keeper_sim.mesh import CLIENT, SimMesh
from tests.keeper_sim.profile import Profile
from tests.keeper_sim.world import Parts, SimNode, World
from vstack import erasure
from vstack.mesh.mesh_client import Change
from vstack.mesh.messages import Ok
from vstack.mesh.registers import (
    ChunkEntry,
    ChunkRecord,
    Generation,
    Place,
    Redundancy,
    Scheme,
    UploadId,
    VideoRecord,
    chunk_key,
    pack,
    unpack_chunk,
    uploaded,
    video_key,
)
from vstack.node.keeper.mender import Target

GRACE, UNDELETE = 10, 30


class Scene:
    """Time passes only while the schedule sleeps or asks for something; nothing fails but what it breaks."""

    def __init__(self, nodes: int, parts: Parts | None = None, seed: int = 0) -> None:
        profile = Profile(nodes=nodes, videos=1, grace=GRACE, undelete=UNDELETE, repair_delay=5, lag=0.001)
        self.world = World(seed, profile, parts)
        self.nodes = list(self.world.nodes.values())
        self.ledger = self.world.ledger
        self.client = SimMesh(self.world, CLIENT)
        self.video = self.world.clients.videos[0]
        self.upload = UploadId(0, 0)
        self.data = content(self.video, 0)

    def play(self, schedule: Coroutine[Any, Any, None]) -> None:
        """Raises Violation."""
        for node in self.nodes:
            node.boot_up()
        for node in self.nodes:
            node.look()
        self.world.do(schedule)

    @property
    def target(self) -> Target:
        return Target(self.video, self.upload, 0)

    @property
    def version(self) -> int:
        """Of the chunk's register."""
        return self.ledger.registers.read(self.target.key).version

    @property
    def state(self) -> str:
        """Of the video; gone if there is no such video any more."""
        record = self.ledger.video(self.video)[1]
        return "gone" if record is None else record.state

    @property
    def record(self) -> ChunkRecord:
        data = self.ledger.registers.read(self.target.key).data
        assert data is not None
        return unpack_chunk(data)

    @property
    def holders(self) -> list[SimNode]:
        """Of the pieces that the register names, in its order."""
        return [self.world.nodes[p.node] for p in self.record.places]

    def key_of(self, place: Place) -> Held:
        return Held(place.node, self.record.key(self.video, self.upload, place))

    def has(self, place: Place) -> bool:
        return self.world.nodes[place.node].disk.get(self.key_of(place).key) is not None

    async def open(self) -> int:
        """An upload begins; the version of the video's register."""
        record = VideoRecord(state="uploading", title="t", redundancy="auto", recipe="r", source_size=1)
        opened = await self.client.change(Change(video_key(self.video), 0, pack(record)))
        assert isinstance(opened, Ok)
        self.upload = UploadId(self.world.config.epoch, opened.version)
        return opened.version

    async def store(
        self, scheme: Scheme, nodes: Sequence[SimNode], redundancy: Redundancy = "auto"
    ) -> tuple[Place, ...]:
        """The video is ready, its chunk on these nodes."""
        version = await self.open()
        places = [self.put(node, i, scheme, uploaded(scheme)) for i, node in enumerate(nodes)]
        await self.name(scheme, places)
        ready = VideoRecord(
            state="ready", title="t", redundancy=redundancy, recipe="r", source_size=1, upload=self.upload,
            chunks=1,
        )  # fmt: skip
        assert isinstance(await self.client.change(Change(video_key(self.video), version, pack(ready))), Ok)
        return tuple(places)

    def put(self, node: SimNode, piece: int, scheme: Scheme, generation: Generation) -> Place:
        """A piece is on that node's disk now."""
        number = 0 if scheme.k == 1 else piece
        payload = bytes(erasure.encode(self.data, scheme.k, scheme.m)[number])
        place = Place(node.id, number, hashlib.sha256(payload).digest(), generation)
        key = self.chunk(scheme, [place]).key(self.video, self.upload, place)
        self.ledger.on_put(node.id, key, scheme, place.sha256)
        node.disk.put(key, scheme, len(self.data), place.sha256, payload)
        return place

    def chunk(self, scheme: Scheme, places: Sequence[Place]) -> ChunkRecord:
        entry = ChunkEntry(0, 0, 1, len(self.data), hashlib.sha256(self.data).digest())
        return ChunkRecord(entry, scheme, tuple(places))

    async def name(self, scheme: Scheme, places: Sequence[Place], expect: int | None = None) -> bool:
        """The chunk's register names these pieces; False if it does not hold `expect` any more."""
        data = pack(self.chunk(scheme, places))
        key = chunk_key(self.video, self.upload, 0)
        expect = self.version if expect is None else expect
        return isinstance(await self.client.change(Change(key, expect, data)), Ok)

    def generation(self, node: SimNode, counter: int = 1) -> Generation:
        """Of pieces that the keeper on `node` writes now."""
        return Generation(self.version, node.id, node.boot, counter)

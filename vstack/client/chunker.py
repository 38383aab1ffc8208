"""Ingest: a source file becomes an init segment and chunks, and is proved to be the same video.

One continuous stream copy through one of FFmpeg's muxers, nothing transcoded, no temporary file:

    source --demux--> packets --mux--> bytes --split--> fragments --gather--> chunks
                         |               |
                         +--> proof <----+--demux--> packets

What is compared is what a reader will demux from the very bytes that are stored. The muxer that is
used is the first, the source's own family first, which passes the proof on the beginning of the
file; the proof then runs along to the last packet.

Invariants: init + all chunks is the muxer's output, byte for byte; init + a chunk that is not
dependent is a file by itself, with true timestamps; start + duration of a chunk is the start of
the next; equal file, rules, CHUNKER_VERSION and FFmpeg version give equal bytes.

Memory: a chunk and a group of pictures (`cuts`), a fragment in the muxer, and FFmpeg's read-ahead.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

import av

from vstack.client.containers import STORED, Container, Muxer, candidates, format_name
from vstack.client.cuts import Cut, CutRules, Cutter
from vstack.client.probe import AS_IT_IS, check_readable, head_of, open_source
from vstack.client.remux import ProofFailed, Remux
from vstack.errors import BadInput
from vstack.mesh.registers import ChunkEntry, Media

__all__ = ["CHUNKER_VERSION", "Chunk", "CutRules", "Ingest", "ProofFailed", "recipe"]

CHUNKER_VERSION = 1
"""Rises with every change that makes other chunks out of an equal file."""

OPAQUE_BYTES = 2 * 1024 * 1024


@dataclass(frozen=True)
class Chunk:
    """One row of the chunk table, and its bytes."""

    entry: ChunkEntry
    data: bytes


def recipe(rules: CutRules) -> str:
    """What chunks depend on besides the file: for `VideoRecord.recipe`."""
    return f"chunker {CHUNKER_VERSION}; {rules.describe()}; ffmpeg {av.ffmpeg_version_info}"


class Ingest:
    """One pass over one source file. Use once: read `chunks` to the end, then `media`."""

    def __init__(
        self,
        path: Path,
        rules: CutRules = CutRules(),  # noqa: B008  (frozen)
        *,
        container: str | None = None,
        opaque: bool = False,
        salvage: bool = False,
    ) -> None:
        """Probe `path` and choose how to store it; a few MiB of it are read.

        `container` is a name out of `alternatives` and skips the choice. `opaque` takes any file and
        stores its bytes. `salvage` takes a file that was cut short for what is left.

        Raises BadInput, with the reason and the way out; ProofFailed if no container will do.
        """
        self.path = path
        self.rules = rules
        self.init = b""
        """The init segment. Whole once the first chunk was yielded; empty for mpegts and opaque."""
        self.lost: tuple[str, ...] = ()
        """What of the source will not be stored, in words."""
        self.alternatives: tuple[str, ...] = ()
        """What may still be tried as `container`, should the proof fail later on."""
        self.progress = 0
        """Bytes of the source read so far (about)."""
        self._salvage = salvage
        self._media: Media | None = None
        check_readable(path)
        self.source_size = path.stat().st_size
        """Bytes of the source."""
        self._muxer: Muxer | None = None
        if not opaque:
            self._muxer = self._choose(container)

    @property
    def container(self) -> Container:
        """What the stored form is."""
        return self._muxer.container if self._muxer is not None else "opaque"

    @property
    def media(self) -> Media:
        """How the chunks fit together. Raises RuntimeError before `chunks` is exhausted."""
        if self._media is None:
            raise RuntimeError("media is complete only after the last chunk")
        return self._media

    def chunks(self) -> Generator[Chunk, None, None]:
        """The chunks in order.

        Raises ProofFailed when the stored form turns out to differ (chunks yielded before must then
        be thrown away; `alternatives` names what else to try), BadInput when the source breaks off.
        """
        return self._opaque_chunks() if self._muxer is None else self._media_chunks(self._muxer)

    def _choose(self, container: str | None) -> Muxer:
        with open_source(self.path, check_length=not self._salvage) as source:
            names = list(candidates(format_name(source, head_of(self.path))))
        if container is not None:
            names = names[names.index(container) :] if container in names else [container]
        reasons = []
        for number, name in enumerate(names):
            run = Remux(self.path, STORED[name], salvage=self._salvage, trial=True)
            try:
                for _ in run.fragments():
                    pass
            except ProofFailed as error:
                reasons.append(f"{name}: {error}")
                continue
            self.lost = run.lost
            self.alternatives = tuple(names[number + 1 :])
            return STORED[name]
        raise ProofFailed(f"{self.path} cannot be stored packet by packet ({'; '.join(reasons)}); {AS_IT_IS}")

    def _opaque_chunks(self) -> Generator[Chunk, None, None]:
        with self.path.open("rb") as file:
            index = 0
            while data := file.read(OPAQUE_BYTES):
                self.progress += len(data)
                yield Chunk(ChunkEntry(index, 0, 0, len(data), hashlib.sha256(data).digest()), data)
                index += 1
        self._media = Media(container="opaque", source_format="", clock=(1, 1), duration=0)

    def _media_chunks(self, muxer: Muxer) -> Generator[Chunk, None, None]:
        run = Remux(self.path, muxer, salvage=self._salvage, trial=False)
        try:
            held: Cut | None = None
            index = first = 0
            for cut in self._cuts(run):
                if held is None:
                    first = cut.start
                else:
                    yield _chunk(index, held, cut.start)
                    index += 1
                held = cut
            if held is None:
                raise BadInput(f"{self.path} has no packets; {AS_IT_IS}")
            end = max(run.end, held.start)
            yield _chunk(index, held, end)
        except ProofFailed as error:
            raise ProofFailed(f"{self.path} as {muxer.name}: {error}; {AS_IT_IS}") from error
        self.progress = self.source_size
        clock = run.clock
        self._media = Media(
            container=muxer.container,
            source_format=run.source_format,
            clock=(clock.numerator, clock.denominator),
            duration=end - first,
            tracks=run.tracks,
            lost=run.lost,
        )

    def _cuts(self, run: Remux) -> Iterator[Cut]:
        cutter: Cutter | None = None
        for fragment in run.fragments():
            if cutter is None:
                self.init = run.init
                cutter = Cutter(self.rules, run.clock)
            self.progress = min(run.progress, self.source_size)
            yield from cutter.add(fragment)
        if cutter is not None:
            yield from cutter.finish(run.end)


def _chunk(index: int, cut: Cut, end: int) -> Chunk:
    digest = hashlib.sha256(cut.data).digest()
    return Chunk(
        ChunkEntry(index, cut.start, end - cut.start, len(cut.data), digest, cut.dependent), cut.data
    )

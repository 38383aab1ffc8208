"""The erasure code: any k of m fragments give a chunk back. A leaf that nodes and clients both import.

Reed-Solomon over GF(2^8) by zfec, systematic: the first k fragments are the chunk itself, cut in k
equal parts, the last one padded with zeros to `fragment_size`. The chunk's true length and every
fragment's SHA-256 are in its register.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import zfec

from vstack.errors import DamagedData


def fragment_size(length: int, k: int) -> int:
    """Bytes of each fragment of a chunk of `length` bytes."""
    return -(-length // k)


def encode(data: bytes, k: int, m: int) -> list[bytes | memoryview]:
    """The m fragments of `data`, by number; the first k are views of it. k = 1: m times the data itself."""
    if k == 1:
        return [data] * m
    size = fragment_size(len(data), k)
    view = memoryview(data)
    blocks: list[bytes | memoryview] = [view[i * size : (i + 1) * size] for i in range(k)]
    blocks = [b if len(b) == size else bytes(b).ljust(size, b"\0") for b in blocks]
    return [*blocks, *zfec.Encoder(k, m).encode(blocks, range(k, m))]


def encode_hashed(data: bytes, k: int, m: int) -> tuple[list[bytes | memoryview], list[bytes]]:
    """The m fragments of `data`, by number, and the SHA-256 of each."""
    pieces = encode(data, k, m)
    return pieces, [hashlib.sha256(piece).digest() for piece in pieces]


def decode(fragments: Mapping[int, bytes | memoryview], k: int, m: int, length: int) -> bytes:
    """The chunk of `length` bytes, from any k of its fragments by number. k = 1: from any copy.

    Raises DamagedData if there are fewer than k, or if their sizes are not that of a fragment. Says
    nothing about their content: the caller checks hashes.
    """
    return b"".join(decode_parts(fragments, k, m, length))


def decode_parts(
    fragments: Mapping[int, bytes | memoryview], k: int, m: int, length: int
) -> tuple[memoryview, ...]:
    """As `decode`, in k parts: fragments that are a part of the chunk are not copied."""
    size = fragment_size(length, k)
    whole = {i: f for i, f in fragments.items() if 0 <= i < m and len(f) == size}
    if len(whole) < k:
        raise DamagedData(f"{k} fragments of {size} bytes are needed, {len(whole)} are there")
    numbers = sorted(whole)[:k]  # the systematic ones first: they need no arithmetic
    blocks: Sequence[bytes | memoryview] = [whole[i] for i in numbers]
    if k > 1 and numbers != list(range(k)):
        blocks = zfec.Decoder(k, m).decode(blocks, numbers)
    # What pads the last ones, when the chunk is shorter than they are many, is left out.
    ends = (max(0, min(size, length - i * size)) for i in range(k))
    return tuple(memoryview(b)[:end] for b, end in zip(blocks, ends, strict=True))

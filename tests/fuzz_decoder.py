"""A coverage-guided fuzzer of what a stranger's bytes reach first: the decoder, and the rules of access.

    pip install atheris
    python -m tests.fuzz_decoder -max_total_time=20

libFuzzer's options follow. The decoder itself is C without instrumentation: coverage guides through the
Python behind it, and libFuzzer mutates valid messages of every kind for the rest.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import atheris  # type: ignore[import-untyped, import-not-found, unused-ignore]

with atheris.instrument_imports(include=["vstack.mesh"]):
    import msgspec

    from vstack.mesh.access import Directory, Identity, allowed
    from vstack.mesh.config import Config, Member, View, key_epoch
    from vstack.mesh.messages import Envelope, Header, Hello, decode, encode

from .test_access import MESSAGES

VIEW = View((Config(1, tuple(Member(f"{i:032x}", f"10.0.0.{i}:7400") for i in range(1, 6)), 1),))
NOBODY = Directory({}, frozenset())


def try_one(raw: bytes) -> None:
    """Anything but a DecodeError is a find."""
    try:
        header = decode(raw)
    except msgspec.DecodeError:
        return
    again = decode(encode(header))
    assert again == header or header != header  # a NaN is no fault
    body = header.body
    for role in ("reader", "node"):
        allowed(Identity(role), body)
    if isinstance(body, Hello):
        NOBODY.believed(Identity("joining"), body)
    if isinstance(body, Envelope):
        for item in body.items:
            assert key_epoch(item.key) >= 0
            VIEW.group(item.key)
            VIEW.leader(item.key)


def main(words: Sequence[str]) -> None:
    with tempfile.TemporaryDirectory() as corpus:
        for name, body in MESSAGES.items():
            (Path(corpus) / name).write_bytes(encode(Header(body, 1000)))
        atheris.Setup([sys.argv[0], corpus, "-max_len=4096", *words], try_one)
        atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1:])

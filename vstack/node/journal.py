"""A journal of every Accepted that this node gave: one JSON line each, written before it leaves.

For audits and tests: the journals of all nodes together show whether any register ever had two
chosen values. A killed process loses none of it; a power cut may.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import msgspec

from vstack.mesh.config import NodeId
from vstack.mesh.messages import Accept


class Journal:
    """Appends to `path`. Raises OSError."""

    def __init__(self, path: Path, node: NodeId) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._node = node

    def write(self, accepts: list[Accept]) -> None:
        """With the operating system when this returns."""
        lines = [
            {
                "node": self._node,
                "key": a.key,
                "ballot": list(a.ballot),
                "version": a.value.version,
                "value": hashlib.sha256(msgspec.msgpack.encode(a.value)).hexdigest(),
            }
            for a in accepts
        ]
        os.write(self._fd, b"".join(json.dumps(line).encode() + b"\n" for line in lines))

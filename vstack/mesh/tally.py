"""What a node's sockets count, and what they complain of in the log.

Each kind of message and each kind of trouble has a counter; trouble is logged once for whomever it is
about. Strangers decide how much trouble there is, so the lines in the log are bounded.
"""

from __future__ import annotations

import logging
from collections import Counter

from vstack.mesh.messages import Body, Envelope

log = logging.getLogger(__name__)

MAX_COMPLAINTS = 4096
"""Lines in the log about peers, of each kind, whoever they are: what strangers can cost."""


class Tally:
    """Counters by name, and warnings about peers."""

    def __init__(self) -> None:
        self.counters: Counter[str] = Counter()
        self._complained: set[bytes] = set()
        self._logged: set[tuple[str, str]] = set()

    def count(self, way: str, body: Body) -> None:
        """`way` is sent or received; what an envelope holds is counted as well."""
        kind = type(body).__name__
        self.counters[f"{way}.{kind}"] += 1
        if isinstance(body, Envelope):
            for kind_of, count in Counter(map(type, body.items)).items():
                self.counters[f"{way}.item.{kind_of.__name__}"] += count

    def log_once(self, kind: str, about: str, message: str, *args: object) -> None:
        """One warning of this `kind` for each `about`."""
        if (kind, about) not in self._logged and len(self._logged) < MAX_COMPLAINTS:
            self._logged.add((kind, about))
            log.warning(message, *args)

    def malformed(self, peer: bytes, why: str) -> None:
        """Counts a message that is dropped; logged once for each `peer`."""
        self.counters["malformed"] += 1
        if peer not in self._complained and len(self._complained) < MAX_COMPLAINTS:
            self._complained.add(peer)
            log.warning("malformed message from %s dropped: %s", peer.hex()[:24], why)

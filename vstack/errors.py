"""Errors that a person reads: one sentence that names the thing and the way out, and an exit code."""

from __future__ import annotations


class VstackError(Exception):
    """Base of every error that the product reports. `str(error)` is one line for a person."""

    exit_code = 1


class UsageError(VstackError):
    """The caller asked for something that cannot be asked for: a bad option, address or configuration."""

    exit_code = 2


class MeshUnavailable(VstackError):
    """No node answered, or too few of them live to do what was asked."""

    exit_code = 3


class NotFound(VstackError):
    """No such video, or the name fits more than one."""

    exit_code = 4


class BadInput(VstackError):
    """The source file cannot be stored as video: missing, empty, truncated, or not media."""

    exit_code = 5


class OutcomeUnknown(VstackError):
    """A change was sent and no answer came in time: it may or may not have happened."""

    exit_code = 6


class DamagedData(VstackError):
    """Bytes on disk or from a peer do not have the hash that was promised for them."""

    exit_code = 7

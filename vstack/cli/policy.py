"""`vstack policy`: how the mesh keeps its videos, shown and changed.

What is typed and shown is KEY=VALUE with units; what is stored is `mesh.config.Policy`, whose bounds hold.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import monotonic

import msgspec

from vstack.cli import show
from vstack.client import members
from vstack.errors import BadInput, OutcomeUnknown, UsageError, VstackError
from vstack.mesh.changes import SetPolicy
from vstack.mesh.config import Policy
from vstack.mesh.dialer import NoAnswer, Refused
from vstack.mesh.mesh_client import OPERATION, MeshClient
from vstack.mesh.messages import ChangeMesh, MeshChanged
from vstack.mesh.registers import Scheme, parse_scheme

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_BYTES = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_duration(text: str) -> int:
    """`10m` -> 600 seconds. Raises BadInput."""
    found = re.fullmatch(r"([0-9]{1,12})([smhd])", text)
    if not found:
        raise BadInput(f"{text!r} is not a duration: write it as 90s, 10m, 24h or 30d")
    return int(found[1]) * _SECONDS[found[2]]


def show_duration(seconds: int) -> str:
    """In the largest unit that gives a whole number: 86400 -> `24h`, 2592000 -> `30d`."""
    units = {"d": 2 * 86_400, "h": 3600, "m": 60}
    for unit, least in units.items():
        if seconds >= least and seconds % _SECONDS[unit] == 0:
            return f"{seconds // _SECONDS[unit]}{unit}"
    return f"{seconds}s"


def _parse_days(text: str) -> int:
    seconds = parse_duration(text)
    if seconds % 86_400:
        raise BadInput(f"{text!r} is not a number of whole days: views are counted by the day, as in 30d")
    return seconds // 86_400


def _parse_bytes(text: str) -> int:
    found = re.fullmatch(r"([0-9]{1,15})([KMGT]?)", text)
    if not found:
        raise BadInput(f"{text!r} is not a size: write it as 512K, 32M or 1G, bytes a second")
    return int(found[1]) * _BYTES[found[2]]


def _show_bytes(value: int) -> str:
    for unit in ("T", "G", "M", "K"):
        if value >= _BYTES[unit] and value % _BYTES[unit] == 0:
            return f"{value // _BYTES[unit]}{unit}"
    return str(value)


def _parse_count(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,15}", text):
        raise BadInput(f"{text!r} is not a whole number")
    return int(text)


@dataclass(frozen=True)
class Key:
    """One setting of the policy, as it is typed and shown."""

    field: str
    """Of `Policy`."""
    json: str
    parse: Callable[[str], object]
    """Raises BadInput."""
    show: Callable[[int], str]
    meaning: str


KEYS: dict[str, Key] = {
    "erasure": Key("erasure", "erasure", parse_scheme, str,
                   "k/m of new videos' fragments: any k of m give a chunk back"),
    "hot-views": Key("hot_views", "hot_views", _parse_count, str,
                     "a video with more views than this is kept as whole copies"),
    "window": Key("window_days", "window_days", _parse_days, lambda n: f"{n}d",
                  "over which those views are counted"),
    "repair-delay": Key("repair_delay", "repair_delay_s", parse_duration, show_duration,
                        "after which what a silent node held counts as missing"),
    "grace": Key("grace", "grace_s", parse_duration, show_duration,
                 "for which pieces stay that no video names any more"),
    "undelete": Key("undelete", "undelete_s", parse_duration, show_duration,
                    "for which a deleted video can be had back, and an upload that stopped is kept"),
    "repair-rate": Key("repair_rate", "repair_rate_bytes_s", _parse_bytes, lambda n: f"{_show_bytes(n)}",
                       "bytes a second that each node spends at most to repair and to move"),
}  # fmt: skip


def show_value(policy: Policy, name: str) -> str:
    """A setting's value as it is typed."""
    value = getattr(policy, KEYS[name].field)
    return "/".join(map(str, value)) if name == "erasure" else KEYS[name].show(value)


def parse_settings(words: Sequence[str]) -> dict[str, object]:
    """`["grace=10m"]` -> {"grace": 600}, by fields of `Policy`. Raises UsageError, with the reason."""
    fields: dict[str, object] = {}
    for word in words:
        name, equals, text = word.partition("=")
        key = KEYS.get(name)
        if key is None:
            raise UsageError(f"there is no policy {name!r}; there are {', '.join(KEYS)}")
        if not equals:
            raise UsageError(f"{name} needs a value: `vstack policy {name}={show_value(Policy(), name)}`")
        if key.field in fields:
            raise UsageError(f"{name} is given twice")
        try:
            value = key.parse(text)
            msgspec.convert({key.field: value}, Policy)
        except BadInput as e:
            raise UsageError(f"{name}: {e}") from e
        except msgspec.ValidationError as e:
            raise UsageError(f"{name}={text} is out of bounds: {_bounds(name)}") from e
        fields[key.field] = tuple(value) if isinstance(value, Scheme) else value
    return fields


def _bounds(name: str) -> str:
    """What a number may be, read from the type of its field."""
    types = {f.name: f.type for f in msgspec.inspect.type_info(Policy).fields}  # type: ignore[attr-defined]
    bound = types[KEYS[name].field]
    return f"it is {KEYS[name].show(bound.ge)} to {KEYS[name].show(bound.le)}"


async def change_policy(mesh: MeshClient, fields: dict[str, object]) -> tuple[Policy, int]:
    """Sets some fields of the policy in one change, whatever others change meanwhile; the policy then, and
    its epoch. Setting what is so already changes nothing. Raises Refused, MeshUnavailable, OutcomeUnknown.

    `MeshClient.change_mesh` sends the same policy again when the mesh was changed meanwhile, which would
    undo somebody else's change of another field: here it is made anew from the newest configuration.
    """
    deadline = monotonic() + OPERATION
    why: VstackError | None = None
    while True:
        config = (await members.open_view(mesh)).config
        wanted = msgspec.structs.replace(config.policy, **fields)
        if wanted == config.policy:
            return wanted, config.epoch
        body = ChangeMesh(os.urandom(16), config.epoch, SetPolicy(wanted))
        for node in sorted(config.nodes, key=mesh.silent):
            left = deadline - monotonic()
            if left <= 0:
                raise OutcomeUnknown(f"the policy may or may not have been changed: {why}")
            try:
                answer = (await mesh.ask(node, body, timeout=left)).header.body
            except NoAnswer as e:
                why = e
                continue
            except Refused as e:
                if e.code not in ("epoch", "busy", "forming", "late"):
                    raise
                why = e
                break
            if isinstance(answer, MeshChanged):
                return wanted, answer.epoch
        await asyncio.sleep(0.1)


async def policy(mesh: MeshClient, options: argparse.Namespace) -> int:
    """Shows the policy; with KEY=VALUE changes it first."""
    fields = parse_settings(options.settings)
    if fields:
        now, epoch = await change_policy(mesh, fields)
    else:
        config = (await members.open_view(mesh)).config
        now, epoch = config.policy, config.epoch
    if options.json:
        values = {
            key.json: show_value(now, name) if name == "erasure" else getattr(now, key.field)
            for name, key in KEYS.items()
        }
        show.print_json({"epoch": epoch, "policy": values})
    else:
        show.table(
            ("policy", "value", "meaning"),
            [(name, show_value(now, name), key.meaning) for name, key in KEYS.items()],
        )
    return 0

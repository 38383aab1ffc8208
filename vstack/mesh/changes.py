"""How one configuration follows another (CHUNKPAXOS, section 5).

Pure. A change is asked for by an operator, a joining node, or the mesh itself; `successor` makes
the configuration that it leads to, or says in words why it cannot be. Deciding it is
`paxos.replica`'s part. What holds here:

    one voter leaves at a time     the next removal waits until base has passed the last one's epoch
    at most MAX_OPEN runs of equal voters are open, counted after the change
    base moves only past epochs whose voters have listed and settled what they hold
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

import msgspec
from msgspec import Meta

from vstack.errors import BadInput
from vstack.mesh.config import (
    Config,
    Grant,
    Hex32,
    Member,
    NodeId,
    Policy,
    PublicKey,
    View,
    host_and_port,
    pack_config,
)

MAX_OPEN = 4
MAX_MEMBERS = 1024
MAX_GRANTS = 1024
MAX_BYTES = 160 * 1024
"""Of a packed configuration: it has to fit a register's value, and a message."""


class ChangeRefused(BadInput):
    """The mesh cannot be changed in this way, or not now."""


class AddMember(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """A new member, or another address, zone or weight of one."""

    member: Member


class ReplaceMember(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """A new node in the place of one that is gone."""

    old: Hex32
    member: Member


class RemoveMember(msgspec.Struct, frozen=True, array_like=True, tag=3):
    node: Hex32


class DrainMember(msgspec.Struct, frozen=True, array_like=True, tag=4):
    """Its votes move elsewhere, and it gets no new pieces; or the other way round."""

    node: Hex32
    draining: bool = True


class Authorise(msgspec.Struct, frozen=True, array_like=True, tag=5):
    """A client's key, or another role or name for one."""

    grant: Grant


class Revoke(msgspec.Struct, frozen=True, array_like=True, tag=6):
    key: PublicKey


class MoveBase(msgspec.Struct, frozen=True, array_like=True, tag=7):
    """What older epochs held is settled in the newest: `base` becomes that."""

    base: int


class GiveUp(msgspec.Struct, frozen=True, array_like=True, tag=8):
    """These nodes are gone for good: nobody waits for their votes any more. See `forced`."""

    lost: Annotated[tuple[Hex32, ...], Meta(max_length=1024)]


class SetPolicy(msgspec.Struct, frozen=True, array_like=True, tag=9):
    """Videos are kept in another way from now on."""

    policy: Policy


MeshChange = (
    AddMember
    | ReplaceMember
    | RemoveMember
    | DrainMember
    | Authorise
    | Revoke
    | MoveBase
    | GiveUp
    | SetPolicy
)


def leaving(view: View) -> frozenset[NodeId]:
    """Nodes that vote no more but whose votes have not all moved: they must stay up."""
    voted = {n for c in view.chain() for n in c.voters}
    return frozenset(voted - set(view.config.voters)) - view.lost


def unsettled(view: View, settled: Mapping[NodeId, int]) -> dict[int, list[NodeId]]:
    """Why base cannot move to the newest epoch: by open epoch, the voters that still have to list and
    settle what they hold. `settled` gives the epoch at which each node has done so. Empty: it can move."""
    waiting: dict[int, list[NodeId]] = {}
    for config in view.chain()[:-1]:
        lost = view.lost & set(config.voters)
        missing = [n for n in config.voters if n not in lost and settled.get(n, 0) < view.epoch]
        if len(missing) > max(0, (config.g - 1) // 2 - len(lost)):
            waiting[config.epoch] = missing
    return waiting


def successor(view: View, change: MeshChange, change_id: bytes = b"") -> Config:
    """The configuration that follows the newest one of `view`. Raises ChangeRefused.

    That base may move (`MoveBase`) is for the caller to know: see `unsettled`.
    """
    config = view.config
    if isinstance(change, GiveUp):
        return forced(view, change.lost, change_id)
    members, grants, policy = list(config.members), list(config.grants), config.policy
    base = config.epoch if view.is_settled() else config.base
    if isinstance(change, AddMember):
        members = _with_member(members, change.member)
    elif isinstance(change, ReplaceMember):
        old = _find(config, change.old)
        members.remove(old)
        members = _with_member(members, change.member)
    elif isinstance(change, RemoveMember):
        members.remove(_find(config, change.node))
    elif isinstance(change, DrainMember):
        old = _find(config, change.node)
        if old.draining == change.draining:
            raise ChangeRefused(
                f"node {old.node[:8]} is {'draining already' if old.draining else 'not draining'}"
            )
        members[members.index(old)] = msgspec.structs.replace(old, draining=change.draining)
    elif isinstance(change, Authorise):
        grants = [g for g in grants if g.key != change.grant.key] + [change.grant]
        if len(change.grant.key) != 32:
            raise ChangeRefused("a public key has 32 bytes")
    elif isinstance(change, Revoke):
        grants = [g for g in grants if g.key != change.key]
        if len(grants) == len(config.grants):
            raise ChangeRefused("no client of this mesh has that key")
    elif isinstance(change, SetPolicy):
        policy = change.policy
        if policy == config.policy:
            raise ChangeRefused("that is the policy already")
        k, m = policy.erasure
        if m <= k:
            raise ChangeRefused(f"{k}/{m} is not an erasure code: m, all fragments, must be more than k")
    else:
        base = change.base
    if config.grants and not any(g.role == "admin" for g in grants):
        raise ChangeRefused("nobody could change this mesh any more: its last admin has to stay one")
    new = Config(
        config.epoch + 1,
        tuple(sorted(members, key=lambda m: m.node)),
        base,
        config.hash_version,
        tuple(grants),
        change_id,
        policy=policy,
    )
    _check(view, new)
    return new


def forced(view: View, lost: Sequence[NodeId], change_id: bytes) -> Config:
    """The operator's way out when nodes are gone for good: their votes are waited for no more.

    Registers whose group lost its majority go on with what is left of it. Raises ChangeRefused.
    """
    config = view.config
    gone = set(lost)
    for node in lost:
        _find(config, node)
    members = tuple(m for m in config.members if m.node not in gone)
    if not any(not m.draining for m in members):
        raise ChangeRefused("at least one voting node must be left")
    return Config(
        config.epoch + 1,
        members,
        config.base,
        config.hash_version,
        config.grants,
        change_id,
        tuple(sorted(gone)),
        config.policy,
    )


def _find(config: Config, node: NodeId) -> Member:
    member = config.member(node)
    if member is None:
        raise ChangeRefused(f"node {node[:8]} is not a member of the mesh")
    return member


def _with_member(members: list[Member], new: Member) -> list[Member]:
    if host_and_port(new.address) is None:
        raise ChangeRefused(f"{new.address!r} is not an address: HOST:PORT is needed")
    for other in members:
        if other.node != new.node and other.address == new.address:
            raise ChangeRefused(
                f"node {other.node[:8]} is a member at {new.address} already: remove or replace it first"
            )
        if other.node != new.node and new.key and other.key == new.key:
            raise ChangeRefused(f"node {other.node[:8]} is a member with that key: each node has its own")
        if other.node == new.node:
            if other == msgspec.structs.replace(new, draining=other.draining):
                raise ChangeRefused(f"node {new.node[:8]} is a member already")
            new = msgspec.structs.replace(new, draining=other.draining)
    return [m for m in members if m.node != new.node] + [new]


def _check(view: View, new: Config) -> None:
    if len(new.members) > MAX_MEMBERS or len(new.grants) > MAX_GRANTS:
        raise ChangeRefused(f"a mesh has at most {MAX_MEMBERS} members and {MAX_GRANTS} clients")
    if len(pack_config(new)) > MAX_BYTES:
        raise ChangeRefused(f"the configuration would take more than {MAX_BYTES >> 10} KiB: shorten names")
    known = [m.key for m in new.members if m.key] + [g.key for g in new.grants]
    if len(set(known)) < len(known):
        raise ChangeRefused("that key is another node's or client's already")
    if not new.voters:
        raise ChangeRefused("at least one voting node must be left")
    gone = set(view.config.voters) - set(new.voters)
    still = leaving(view)
    if gone and still:
        raise ChangeRefused(
            f"the votes of node {min(still)[:8]} are still moving: one node leaves at a time. "
            "`vstack mesh plan` shows how far it is"
        )
    runs: list[set[NodeId]] = []
    for config in (*(c for c in view.chain() if c.epoch >= new.base), new):
        if not runs or runs[-1] != set(config.voters):
            runs.append(set(config.voters))
    if len(runs) > MAX_OPEN:
        raise ChangeRefused(
            f"{MAX_OPEN - 1} changes of members are under way: wait until their votes have moved"
        )

"""Who gets into the mesh, and out of it: what members ask the chain of configurations for.

A joining node asks for itself; an administrator changes members and rights; an operator whose mesh has
lost its majority forces a configuration. What follows an epoch is decided in `paxos.replica`; here it is
said whether a wish makes sense now, as far as this node knows who is alive.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from hashlib import blake2b

import msgspec

from vstack.mesh.changes import (
    AddMember,
    ChangeRefused,
    DrainMember,
    GiveUp,
    MoveBase,
    RemoveMember,
    ReplaceMember,
    forced,
    successor,
)
from vstack.mesh.config import Member, NodeId
from vstack.mesh.messages import ChangeMesh, Failure, ForceConfig, MeshChanged, State
from vstack.mesh.paxos.replica import Replica
from vstack.mesh.transport import Incoming
from vstack.node.peers import Peers
from vstack.node.settings import NodeSettings, Removed
from vstack.node.votes import VoteStore

log = logging.getLogger(__name__)

UPDATE_EVERY = 5.0
"""Seconds between two tries to have the configuration say where this node is."""
DECIDE_WITHIN = 5.0
"""Seconds that the decision about a joining node may take."""

Answer = MeshChanged | Failure


class Admission:
    """See above. Answers are taken with `take_answers`, after everything that was handled before."""

    def __init__(
        self, settings: NodeSettings, votes: VoteStore, replica: Replica, peers: Peers, myself: Member
    ) -> None:
        """`myself`: this node as the configuration should have it."""
        self._settings = settings
        self._votes = votes
        self._replica = replica
        self._view = replica.view
        self._peers = peers
        self._me = myself.node
        self._myself = myself
        self._update_at = 0.0
        self._answers: list[tuple[Incoming, Answer]] = []

    def take_answers(self) -> list[tuple[Incoming, Answer]]:
        """Answers to requests since the last call, those of decisions included."""
        changes, self._replica.changes = self._replica.changes, []
        for tag, answer in changes:
            self._answer(tag, answer)
        answers, self._answers = self._answers, []
        return answers

    def keep_up_to_date(self, now: float) -> None:
        """The configuration says where this node is and what it can hold: if that has changed, so must it."""
        listed = self._view.config.member(self._me)
        if listed is None:
            if self._replica.may_leave:
                why = f"this node was removed from the mesh, by epoch {self._view.epoch}"
                self._votes.retire(why)
                raise Removed(f"{why}, and may be switched off. `--rejoin` makes it a new member")
            return
        mine = msgspec.structs.replace(self._myself, draining=listed.draining)
        if listed != mine and now >= self._update_at:
            self._update_at = now + UPDATE_EVERY
            self._let_in(mine, now, None)

    def _let_in(self, member: Member, now: float, tag: Incoming | None) -> None:
        """Adds a node, in the place of a dead one if there is one at its address."""
        config = self._view.config
        if config.member(member.node) == member:
            self._answer(tag, MeshChanged(config.epoch))
            return
        change: AddMember | ReplaceMember = AddMember(member)
        for old in config.members:
            if old.address == member.address and old.node != member.node:
                change = ReplaceMember(old.node, member)
                if self._peers.state(old.node) is not State.DOWN:
                    text = f"waiting until node {old.node[:8]}, which was at {old.address}, counts as down"
                    self._answer(tag, Failure("busy", text))
                    return
        wish = msgspec.msgpack.encode((config.epoch, member))
        change_id = blake2b(wish, digest_size=16).digest()
        self._replica.propose(change, change_id, config.epoch, now, now + DECIDE_WITHIN, tag)

    def _answer(self, tag: object, answer: Answer) -> None:
        if isinstance(tag, Incoming):
            self._answers.append((tag, answer))

    def on_join(self, request: Incoming, member: Member, now: float) -> None:
        hello = request.session.hello
        if hello.role != "node" or hello.node != member.node or member.draining:
            self._answer(request, Failure("refused", "a node asks for itself"))
        elif (len(member.key) == 32) != (self._settings.keys is not None):
            self._answer(request, Failure("refused", "a node comes with its key to a mesh that uses keys"))
        elif any(member.node in c.nodes for c in self._votes.chain()) and not self._view.config.member(
            member.node
        ):
            text = "this NodeId was a member before: start with an empty data directory, or --rejoin"
            self._answer(request, Failure("removed", text))
        else:
            self._let_in(member, now, request)

    def on_change(self, request: Incoming, m: ChangeMesh, now: float) -> None:
        change = m.change
        if isinstance(change, MoveBase):
            self._answer(request, Failure("refused", "base moves by itself"))
            return
        if (
            isinstance(change, ReplaceMember)
            and self._view.config.member(change.old)
            and self._peers.state(change.old) is not State.DOWN
        ):
            text = f"node {change.old[:8]} still answers: remove it instead of replacing it"
            self._answer(request, Failure("refused", text))
            return
        if isinstance(change, GiveUp) and (alive := self._not_lost(change.lost)):
            self._answer(request, Failure("refused", alive))
            return
        if isinstance(change, RemoveMember) and len(self._view.config.members) == 1:
            self._answer(request, Failure("refused", "the last node of a mesh cannot be removed"))
            return
        if isinstance(change, RemoveMember | DrainMember) and (why := self._would_stall(change)):
            self._answer(request, Failure("refused", why))
            return
        self._replica.propose(change, m.id, m.replaces, now, request.deadline, request)

    def _would_stall(self, change: RemoveMember | DrainMember) -> str:
        """Whether so many of the voters that would be left are down that nothing could be decided."""
        try:
            after = successor(self._view, change)
        except ChangeRefused:
            return ""  # what is wrong with it is said when it is proposed
        down = [n for n in after.nodes if self._peers.state(n) is State.DOWN]
        voters_down = sum(n in after.voters for n in down)
        if voters_down <= (after.g - 1) // 2 and 2 * len(down) < len(after.nodes):
            return ""
        names = ", ".join(n[:8] for n in down)
        return f"too few nodes would be left to decide: {names} is down. Start, replace or remove it first"

    def _not_lost(self, lost: Sequence[NodeId]) -> str:
        """Why some nodes cannot be given up now; empty if they can."""
        alive = [n for n in lost if n == self._me or self._peers.is_heard(n)]
        names = ", ".join("this node itself" if n == self._me else n[:8] for n in alive)
        return f"{names}: not lost, or not known to be down yet" if alive else ""

    def on_force(self, request: Incoming, m: ForceConfig, now: float) -> None:
        """No majority is left: what the operator says is lost is waited for no more."""
        config = m.config
        if config == self._view.config:
            self._answer(request, MeshChanged(config.epoch))
            return
        try:
            if config != forced(self._view, config.lost, config.change):
                raise ChangeRefused(
                    f"that configuration does not follow epoch {self._view.epoch}, which this node is in"
                )
        except ChangeRefused as e:
            self._answer(request, Failure("refused", str(e)))
            return
        if why := self._not_lost(config.lost):
            self._answer(request, Failure("refused", why))
            return
        if 2 * len(config.members) > len(self._view.config.members):
            # They could decide something else at the same moment: then this has to be decided, too.
            text = "a majority of the mesh is left: it decides this like any other change"
            self._answer(request, Failure("refused", text))
            return
        log.warning("recovering: %s are given up by the operator", ", ".join(n[:8] for n in config.lost))
        self._replica.adopt([config], now)
        self._answer(request, MeshChanged(config.epoch))

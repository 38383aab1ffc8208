"""Who changes the simulated mesh: administrators with one wish each, and the tries of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from tests.sim.invariants import Violation
from vstack.mesh.changes import (
    AddMember,
    Authorise,
    DrainMember,
    MeshChange,
    RemoveMember,
    ReplaceMember,
)
from vstack.mesh.config import Grant, Member, NodeId, View
from vstack.mesh.messages import Failure, MeshChanged

if TYPE_CHECKING:
    from tests.sim.node import Node
    from tests.sim.world import World

Wish = Callable[[View], MeshChange | None]
"""The change that leads from a view to what the administrator wants; None: it is so already."""

PATIENCE = 1.5
PAUSE = 0.25
TRIES = 6
"""Tries of a change that need not happen."""


class Admin:
    """One wish. Tries of one change keep its id, and the epoch that it replaces, through any node."""

    def __init__(self, world: World, wish: Wish, stubborn: bool) -> None:
        self.world = world
        self.wish = wish
        self.stubborn = stubborn
        """Does not end before it is so."""
        self.over = False
        self._tries = 0
        self._made: tuple[MeshChange, bytes, int] | None = None

    def act(self, node: Node | None = None) -> None:
        """Makes the change through `node`, or through any."""
        world = self.world
        if self.over:
            return
        if not self.stubborn and (self._tries >= TRIES or world.healed):
            self.over = True
            return
        node = node or world.some_node()
        if node is None:
            world.at(world.now + PAUSE, self.act)
            return
        self._tries += 1
        if self._made is None:
            view = node.replica.view
            change = self.wish(view)
            if change is None:
                self.over = True
                return
            self._made = change, world.rng.randbytes(16), view.epoch
        change, change_id, replaces = self._made
        world.note("change", node.name, change, replaces)
        tag = (self, change_id, self._tries)
        world.at(world.now + PATIENCE + PAUSE, self._silence, self._tries)
        node.propose(change, change_id, replaces, world.now + PATIENCE, tag)

    def _silence(self, tries: int) -> None:
        if tries == self._tries:
            self._again()

    def _again(self) -> None:
        self.world.at(self.world.now + PAUSE * self.world.rng.uniform(0.5, 2.0), self.act)

    def on_changed(self, change_id: bytes, tries: int, what: MeshChanged | Failure) -> None:
        world = self.world
        world.note("changed", change_id, what)
        if isinstance(what, MeshChanged):
            decided = world.watcher.chain.get(what.epoch)
            right = self._made is None or self._made[1] != change_id or what.epoch == self._made[2] + 1
            if decided is None or decided.change != change_id or not right:
                raise Violation(f"chain: {change_id.hex()} is not epoch {what.epoch}: {decided}")
        elif what.code == "epoch":
            world.denied[change_id] = what.text
        if tries != self._tries or self.over:
            return
        self._tries += 1
        if isinstance(what, Failure) and what.code in ("late", "busy"):
            self._again()
        elif isinstance(what, Failure) and what.code == "refused" and not self.stubborn:
            self.over = True
        else:  # decided, or overtaken: look again whether there is anything left to do
            self._made = None
            if isinstance(what, MeshChanged) and not self.stubborn:
                self.over = True
            else:
                self._again()


# -- wishes -----------------------------------------------------------------------------------------


def add(node: NodeId, address: str) -> Wish:
    return lambda view: None if view.config.member(node) else AddMember(Member(node, address))


def remove(node: NodeId) -> Wish:
    return lambda view: RemoveMember(node) if view.config.member(node) else None


def replace(old: NodeId, machine: Node) -> Wish:
    """Whatever node is at the machine now takes the place of `old`."""

    def wish(view: View) -> MeshChange | None:
        if view.config.member(old) is None:
            return None
        return ReplaceMember(old, Member(machine.name, machine.address))

    return wish


def drain(node: NodeId, draining: bool) -> Wish:
    def wish(view: View) -> MeshChange | None:
        member = view.config.member(node)
        if member is None or member.draining == draining:
            return None
        return DrainMember(node, draining)

    return wish


def grant(key: bytes) -> Wish:
    def wish(view: View) -> MeshChange | None:
        known = any(g.key == key for g in view.config.grants)
        return None if known else Authorise(Grant(key, "admin"))

    return wish

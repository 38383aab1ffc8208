"""Who may do what: every message has its least role, and a key is whose the configuration says."""

from __future__ import annotations

from typing import get_args

import pytest
from msgspec.structs import replace

from vstack.mesh.access import DEEDS, NOBODY, TABLE, Identity, NodeRole, allowed, directory
from vstack.mesh.changes import Authorise
from vstack.mesh.config import Config, Grant, Member
from vstack.mesh.messages import (
    PROTOCOL_VERSION,
    Body,
    ChangeMesh,
    Envelope,
    ForceConfig,
    GetConfig,
    GetHoldings,
    GetInventory,
    GetPiece,
    GetStatus,
    GetUsage,
    Hasten,
    Hello,
    Join,
    List,
    Op,
    Ping,
    PutPiece,
    Scan,
    Stored,
    Submit,
    Viewed,
    WirePieceKey,
)

MESH, ADMIN, WRITER, READER, STRANGER, OTHER_KEY = (bytes([n]) * 32 for n in range(1, 7))
KEYS = [bytes([100 + n]) * 32 for n in range(4)]
NODES = [f"{n:032x}" for n in range(1, 5)]
MEMBERS = tuple(
    Member(n, f"10.0.0.{i}:7400", key=k) for i, (n, k) in enumerate(zip(NODES, KEYS, strict=True))
)
GRANTS = (Grant(ADMIN, "admin", "ann"), Grant(WRITER, "writer", "will"), Grant(READER, "reader", "rita"))
CONFIG = Config(1, MEMBERS[:3], 1, grants=GRANTS)
FOUNDERS = (Grant(ADMIN, "admin", "ann"),)

KEY = "video/" + "a" * 64
PIECE = WirePieceKey("a" * 64, (1, 2), 0, 0, (0, "0" * 32, 0, 0))
GRANT = Grant(STRANGER, "reader")
MESSAGES: dict[str, Body] = {
    "hello": Hello(PROTOCOL_VERSION, "", "client"),
    "config": GetConfig(),
    "status": GetStatus(),
    "holdings": GetHoldings(),
    "usage": GetUsage(),
    "inventory": GetInventory((PIECE,), 0),
    "hasten": Hasten("scrub"),
    "list": List("video/"),
    "get": GetPiece(PIECE, 0, 1),
    "viewed": Viewed("a" * 64, bytes(16)),
    "read": Submit((Op(bytes(16), KEY, 1),)),
    "write": Submit((Op(bytes(16), KEY, 1), Op(bytes(16), KEY, 1, 0, b"x"))),
    "delete": Submit((Op(bytes(16), KEY, 1, 7, None),)),
    "put": PutPiece(PIECE, 3, 5, 10, bytes(32)),
    "change": ChangeMesh(bytes(16), 1, Authorise(GRANT)),
    "force": ForceConfig(CONFIG),
    "join": Join(MEMBERS[3]),
    "ping": Ping(1, ()),
    "envelope": Envelope(()),
    "scan": Scan("video/", "", 1, 1),
}
READS = {"hello", "config", "status", "holdings", "usage", "inventory", "list", "get", "viewed", "read"}
WRITES = READS | {"write", "delete", "put", "hasten"}
STRANGE = {"hello", "config", "join", "ping"}
MAY = {
    "reader": READS,
    "writer": WRITES,
    "admin": WRITES | {"change", "force"},
    "joining": STRANGE,
    "founder": STRANGE | {"envelope"},
    "node": STRANGE | {"envelope", "scan"} | WRITES,
}


def test_every_message_has_a_row() -> None:
    assert set(TABLE) == set(get_args(Body))


@pytest.mark.parametrize("role", MAY)
def test_a_role_may_do_what_is_listed_and_nothing_else(role: NodeRole) -> None:
    assert {name for name, body in MESSAGES.items() if allowed(Identity(role), body) is None} == MAY[role]


def test_all_requests_are_among_the_examples() -> None:
    listed = {type(body) for body in MESSAGES.values()}
    gossip = {kind for kind, row in TABLE.items() if row == TABLE[Ping]}
    assert {kind for kind, row in TABLE.items() if row != NOBODY} <= listed | gossip


def test_a_key_that_is_nobodys_may_do_nothing() -> None:
    for body in MESSAGES.values():
        assert "revoked" in (allowed(None, body) or "")


def test_a_refusal_names_what_is_needed_and_what_there_is() -> None:
    assert "role writer, and this key's is reader" in (allowed(Identity("reader"), MESSAGES["put"]) or "")
    assert "role admin, and this key's is writer" in (allowed(Identity("writer"), MESSAGES["change"]) or "")
    assert "for nodes" in (allowed(Identity("admin"), MESSAGES["envelope"]) or "")
    assert "role admin" in (allowed(Identity("node", node=NODES[0]), MESSAGES["change"]) or "")
    assert "members" in (allowed(Identity("joining"), MESSAGES["envelope"]) or "")
    assert "members" in (allowed(Identity("joining"), MESSAGES["put"]) or "")
    assert allowed(Identity("admin"), Stored(True)) == "Stored is not a request"


def test_a_refusal_says_what_was_wanted_in_the_words_of_the_user() -> None:
    reader, joining = Identity("reader"), Identity("joining")
    for name in ("put", "write", "delete"):
        said = allowed(reader, MESSAGES[name]) or ""
        assert said.startswith("you may not store or change videos: that needs the role writer"), said
    changed = allowed(reader, MESSAGES["change"]) or ""
    assert changed.startswith("you may not change who is in the mesh, or who may use it: that"), changed
    assert (allowed(joining, MESSAGES["read"]) or "").startswith("you may not read videos: that")
    assert {kind for kind, row in TABLE.items() if row != NOBODY} == set(DEEDS)


def test_a_delete_is_a_change_though_it_carries_no_data() -> None:
    """`expect` alone tells it from a read."""
    assert allowed(Identity("reader"), Submit((Op(bytes(16), KEY, 1, 0, None),))) is not None
    assert allowed(Identity("reader"), Submit(())) is None


def test_keys_are_whose_the_configuration_says() -> None:
    people = directory([CONFIG], MESH, FOUNDERS).people
    assert people[KEYS[1]] == Identity("node", node=NODES[1])
    assert people[WRITER] == Identity("writer", "will")
    assert people[MESH].role == "joining"
    assert STRANGER not in people
    assert len(people) == 7


def test_before_there_is_a_mesh_its_key_holders_found_it_and_its_admins_look_on() -> None:
    people = directory([], MESH, FOUNDERS).people
    assert people == {ADMIN: Identity("admin", "ann"), MESH: Identity("founder")}


def test_founding_admins_count_no_more_once_the_mesh_has_revoked_them() -> None:
    config = replace(CONFIG, epoch=2, grants=(Grant(WRITER, "admin"),))
    people = directory([CONFIG, config], MESH, FOUNDERS).people
    assert ADMIN not in people
    assert READER not in people
    assert people[WRITER].role == "admin"


def test_members_of_every_open_epoch_count_by_their_newest_key() -> None:
    changed = (replace(MEMBERS[0], key=OTHER_KEY), MEMBERS[3])
    found = directory([CONFIG, replace(CONFIG, epoch=2, members=changed)], MESH, FOUNDERS)
    assert found.members == set(NODES)
    assert KEYS[0] not in found.people
    assert found.people[OTHER_KEY].node == NODES[0]
    assert found.people[KEYS[1]].node == NODES[1], "it left, and older epochs are not settled"
    settled = directory([replace(CONFIG, epoch=2, members=changed, base=2)], MESH, FOUNDERS)
    assert KEYS[1] not in settled.people


def test_a_node_that_was_declared_lost_is_not_admitted() -> None:
    lost = replace(CONFIG, epoch=2, members=MEMBERS[:2], lost=(NODES[2],))
    assert KEYS[2] not in directory([CONFIG, lost], MESH, FOUNDERS).people


def hello(node: str) -> Hello:
    return Hello(PROTOCOL_VERSION, "", "node", node, 3)


def test_a_member_is_believed_only_with_its_own_key() -> None:
    known = directory([CONFIG], MESH, FOUNDERS)
    own = known.people[KEYS[0]]
    assert known.believed(own, hello(NODES[0])) == hello(NODES[0])
    assert "not of" in str(known.believed(own, hello(NODES[1])))
    assert "not of" in str(known.believed(own, hello("f" * 32)))


def test_a_client_is_not_believed_to_be_a_node() -> None:
    known = directory([CONFIG], MESH, FOUNDERS)
    for key in (ADMIN, WRITER, READER):
        assert "client's" in str(known.believed(known.people[key], hello(NODES[0])))
        client = Hello(PROTOCOL_VERSION, "", "client")
        assert known.believed(known.people[key], client) == client


def test_the_mesh_key_makes_nobody_a_member() -> None:
    """A member that has not learned that it is one comes so: it is heard, and has no vote by it."""
    known = directory([CONFIG], MESH, FOUNDERS)
    joining = known.people[MESH]
    heard = known.believed(joining, hello(NODES[0]))
    assert isinstance(heard, Hello)
    assert (heard.role, heard.node) == ("client", "")
    assert known.believed(joining, hello(NODES[3])) == hello(NODES[3]), "it is no member: it may join"


def test_founders_are_believed_to_be_who_they_say() -> None:
    known = directory([], MESH, FOUNDERS)
    assert known.believed(known.people[MESH], hello(NODES[0])) == hello(NODES[0])

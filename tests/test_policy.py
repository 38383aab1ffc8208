"""How the mesh keeps videos, said by an operator: what is refused, and what two of them say at once."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vstack.cli.policy import (
    KEYS,
    change_policy,
    parse_duration,
    parse_settings,
    show_duration,
    show_value,
)
from vstack.errors import UsageError
from vstack.local import LocalMesh
from vstack.mesh.changes import SetPolicy
from vstack.mesh.config import Policy
from vstack.mesh.dialer import NoAnswer, Refused
from vstack.mesh.mesh_client import MeshClient, connect
from vstack.mesh.messages import ChangeMesh
from vstack.samples import make_sample

from .cluster import running_mesh, vstack, with_client

NO_CODES = ["5/3", "3/3", "1/3", "0/3", "17/40", "16/33", "17/20", "text", "3", "3/", "3/5/7", "-3/5", "3/5 "]


# -- what is typed --------------------------------------------------------------------------------


def test_every_setting_is_read_as_it_is_typed() -> None:
    words = [
        "erasure=4/6", "hot-views=50", "window=7d", "repair-delay=90s", "grace=5m", "undelete=0s",
        "repair-rate=512K",
    ]  # fmt: skip
    assert parse_settings(words) == {
        "erasure": (4, 6), "hot_views": 50, "window_days": 7, "repair_delay": 90, "grace": 300, "undelete": 0,
        "repair_rate": 512 << 10,
    }  # fmt: skip


@pytest.mark.parametrize("name", KEYS)
def test_what_is_shown_can_be_typed(name: str) -> None:
    shown = show_value(Policy(), name)
    assert parse_settings([f"{name}={shown}"]) == {KEYS[name].field: getattr(Policy(), KEYS[name].field)}


@given(st.integers(0, 10**9))
def test_a_duration_that_is_shown_can_be_typed(seconds: int) -> None:
    assert parse_duration(show_duration(seconds)) == seconds


def test_all_of_the_policy_has_a_name() -> None:
    assert {key.field for key in KEYS.values()} == set(Policy.__struct_fields__)


@pytest.mark.parametrize("code", NO_CODES)
def test_a_code_that_cannot_be_is_refused(code: str) -> None:
    with pytest.raises(UsageError, match=r"erasure: .*(is not an erasure code|over the bounds of 16/32)"):
        parse_settings([f"erasure={code}"])


@pytest.mark.parametrize(
    ("word", "why"),
    [
        ("hot-views=0", "it is 1 to"),
        ("hot-views=many", "not a whole number"),
        ("hot-views=-1", "not a whole number"),
        ("window=0d", "it is 1d to 3650d"),
        ("window=36h", "whole days"),
        ("window=30", "not a duration"),
        ("repair-delay=10", "not a duration"),
        ("repair-delay=11y", "not a duration"),
        ("undelete=3651d", "it is 0s to 3650d"),
        ("repair-rate=1023", "it is 1K to 1T"),
        ("repair-rate=2T", "it is 1K to 1T"),
        ("repair-rate=32MB", "not a size"),
        ("copies=4", "there is no policy 'copies'"),
        ("=4", "there is no policy ''"),
        ("grace", "grace needs a value"),
        ("hot_views=3", "there is no policy 'hot_views'"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(word: str, why: str) -> None:
    with pytest.raises(UsageError) as e:
        parse_settings(["grace=5m", word])
    assert why in str(e.value)


def test_a_setting_that_is_given_twice_is_refused() -> None:
    with pytest.raises(UsageError, match="grace is given twice"):
        parse_settings(["grace=5m", "grace=6m"])


# -- what a mesh makes of it ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalMesh]:
    folder = tmp_path_factory.mktemp("mesh")
    with running_mesh(folder, 3, keys=folder / "keys") as mesh:
        yield mesh


def policy_of(mesh: LocalMesh) -> Policy:
    async def look(client: MeshClient) -> Policy:
        return client.config.policy

    return with_client(mesh, look)


@pytest.mark.processes
def test_an_admin_changes_what_it_names_and_nothing_else(mesh: LocalMesh) -> None:
    peers, key = ",".join(mesh.peers), mesh.client_key
    before = vstack("policy", "--json", peers=peers, key=key).json
    done = vstack("policy", "hot-views=77", "window=7d", "--json", peers=peers, key=key)
    assert done.code == 0, done
    changed = {"hot_views": 77, "window_days": 7}
    assert isinstance(before["policy"], dict)
    assert done.json["policy"] == before["policy"] | changed
    assert vstack("policy", "--json", peers=peers, key=key).json == done.json
    lines = vstack("policy", peers=peers, key=key).out.splitlines()
    assert [line.split()[:2] for line in lines if line.startswith("hot")] == [["hot-views", "77"]]
    assert len(lines) == 1 + len(KEYS)


@pytest.mark.processes
def test_setting_what_is_so_already_makes_no_new_epoch(mesh: LocalMesh) -> None:
    peers, key = ",".join(mesh.peers), mesh.client_key
    once = vstack("policy", "grace=11m", "--json", peers=peers, key=key)
    assert once.code == 0, once
    again = vstack("policy", "grace=11m", "--json", peers=peers, key=key)
    assert (again.code, again.json) == (0, once.json)


@pytest.mark.processes
def test_two_operators_at_once_do_not_undo_each_other(mesh: LocalMesh) -> None:
    async def run(_: MeshClient) -> None:
        async with (
            connect(mesh.peers, keys=mesh.client_key) as first,
            connect(mesh.peers[1:], keys=mesh.client_key) as second,
        ):
            for minutes in range(20, 26):
                await asyncio.gather(
                    change_policy(first, {"grace": 60 * minutes}),
                    change_policy(second, {"undelete": 3600 * minutes}),
                )
                now = (await change_policy(first, {}))[0]
                assert (now.grace, now.undelete) == (60 * minutes, 3600 * minutes)

    with_client(mesh, run, key=mesh.client_key)


@pytest.mark.processes
def test_what_cannot_be_changes_nothing(mesh: LocalMesh) -> None:
    peers, key = ",".join(mesh.peers), mesh.client_key
    before = policy_of(mesh)
    vstack("policy", "grace=5s", "erasure=5/3", peers=peers, key=key).failed_with(2, "5/3 is not an erasure")
    vstack("policy", "erasure=17/40", peers=peers, key=key).failed_with(2, "over the bounds of 16/32")
    vstack("policy", "speed=9", peers=peers, key=key).failed_with(2, "there is no policy 'speed'", "grace")
    assert policy_of(mesh) == before


@pytest.mark.processes
@pytest.mark.parametrize("code", [(5, 3), (3, 3), (16, 16)])
def test_the_nodes_refuse_a_code_that_cannot_be_whoever_asks(mesh: LocalMesh, code: tuple[int, int]) -> None:
    async def run(client: MeshClient) -> None:
        with pytest.raises(Refused, match="is not an erasure code"):
            await client.change_mesh(SetPolicy(Policy(erasure=code)))

    before = policy_of(mesh)
    with_client(mesh, run)
    assert policy_of(mesh) == before


@pytest.mark.processes
@pytest.mark.parametrize("code", [(1, 3), (2, 33), (17, 20), (0, 3)])
def test_a_code_out_of_bounds_is_no_message_at_all(mesh: LocalMesh, code: tuple[int, int]) -> None:
    async def run(client: MeshClient) -> None:
        asked = ChangeMesh(bytes(16), client.config.epoch, SetPolicy(Policy(erasure=code)))
        with pytest.raises((NoAnswer, Refused)):
            await client.ask(client.config.nodes[0], asked, timeout=1.0)

    before = policy_of(mesh)
    with_client(mesh, run)
    assert policy_of(mesh) == before


@pytest.mark.processes
def test_a_writer_sees_the_policy_and_may_not_change_it(mesh: LocalMesh, tmp_path: Path) -> None:
    assert mesh.client_key is not None
    peers, key = ",".join(mesh.peers), tmp_path / "rita.key"
    made = vstack("keys", "new", key, "--mesh", mesh.client_key, "--json").json
    word = ("keys", "authorise", str(made["public"]), "--role", "writer")
    assert vstack(*word, peers=peers, key=mesh.client_key).code == 0
    before = policy_of(mesh)
    assert vstack("policy", peers=peers, key=key).code == 0
    vstack("policy", "grace=1m", peers=peers, key=key).failed_with(2, "admin")
    assert policy_of(mesh) == before


@pytest.mark.processes
def test_a_new_video_is_written_as_the_policy_says(mesh: LocalMesh, tmp_path: Path) -> None:
    peers, key = ",".join(mesh.peers), mesh.client_key
    make_sample(tmp_path / "film.mp4", seconds=2, size=(160, 90))
    assert vstack("policy", "erasure=2/3", peers=peers, key=key).code == 0
    try:
        assert vstack("put", tmp_path / "film.mp4", peers=peers, key=key).code == 0
    finally:
        assert vstack("policy", "erasure=3/5", peers=peers, key=key).code == 0
    info = vstack("info", "film", "--json", peers=peers, key=key).json
    table = info["chunk_table"]
    assert isinstance(table, list)
    assert {(c["k"], c["m"], len({p["node"] for p in c["places"]})) for c in table} == {(2, 3, 3)}
    assert info["erasure"] == "2/3"

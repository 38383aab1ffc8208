"""What `vstack keys authorise` asks the mesh for: a client keeps its name, and a name means one client."""

from __future__ import annotations

import pytest

from vstack.cli.keys import wanted
from vstack.errors import UsageError
from vstack.mesh.config import Grant

ANN, RITA, NEW = (bytes([n]) * 32 for n in range(1, 4))
GRANTS = (Grant(ANN, "admin", "ann"), Grant(RITA, "reader", "rita"))


def test_without_a_name_a_known_key_keeps_its_own() -> None:
    assert wanted(GRANTS, RITA, "writer", None) == Grant(RITA, "writer", "rita")
    assert wanted(GRANTS, RITA, "reader", None) in GRANTS
    assert wanted(GRANTS, NEW, "reader", None) == Grant(NEW, "reader", "")


def test_a_name_that_is_given_replaces_the_old_one() -> None:
    assert wanted(GRANTS, RITA, "reader", "margarita").name == "margarita"
    assert wanted(GRANTS, RITA, "reader", "").name == ""


def test_the_name_of_another_client_is_refused() -> None:
    with pytest.raises(UsageError, match=r"'ann' is the name of another client, 01010101"):
        wanted(GRANTS, NEW, "reader", "ann")
    assert wanted(GRANTS, ANN, "admin", "ann") in GRANTS


def test_many_clients_may_have_no_name() -> None:
    grants = (*GRANTS, Grant(bytes([9]) * 32, "reader", ""))
    assert wanted(grants, NEW, "reader", "").name == ""


@pytest.mark.parametrize("name", ["x" * 65, "two\nlines"])
def test_a_name_that_cannot_be_shown_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="printable"):
        wanted(GRANTS, NEW, "reader", name)

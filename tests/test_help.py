"""What the command says of itself, without a mesh."""

from __future__ import annotations

import pytest

from vstack.cli.main import build_parser, run


def test_the_command_alone_shows_its_help_as_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err == build_parser().format_help()


def test_the_help_names_every_source_of_peers_and_says_what_bad_input_is() -> None:
    text = " ".join(build_parser().format_help().split())
    for source in ("--peers", "VSTACK_PEERS", "config.toml", "the mesh that `vstack up` runs in this folder"):
        assert source in text
    assert "5 bad input: the source cannot be stored, or the change is refused" in text

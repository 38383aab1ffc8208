"""The `vstack` command: verbs, what they print, and their exit codes. No logic of the mesh lives here."""

from vstack.cli.main import main

__all__ = ["main"]

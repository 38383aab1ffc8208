"""Tests. Run with pytest; the simulator in `tests.sim` also runs by itself: scripts/simulate."""

"""vstack: video storage with no coordinator."""

__version__ = "0.1.0"

"""Whether a video is hot: from its views to a decision, with hysteresis. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from vstack.mesh.config import Policy

COOL = 0.8
"""A hot video stays hot above this share of the threshold: it does not go to and fro."""


def views_within(by_day: Mapping[int, int], today: int, days: int) -> int:
    """Views on the last `days` days, today included. Days count from 1970-01-01; those that lie ahead of
    `today`, by the clock of another node, count as well."""
    return sum(views for day, views in by_day.items() if day > today - days)


def is_hot(hot: bool, views: int, policy: Policy) -> bool:
    """`hot`: whether it was until now."""
    return views >= COOL * policy.hot_views if hot else views > policy.hot_views

"""Operators and modules whose gradient may be off at some level, and why."""

from collections.abc import Mapping

EXEMPT: Mapping[str, str] = {}

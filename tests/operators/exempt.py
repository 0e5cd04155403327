"""Operators and modules whose gradient may be off at some level, and why."""

from collections.abc import Mapping

_PRODUCTS = (
    "a sum stands between what its gradient is multiplied with and what it is divided by, which may be near zero"
)

EXEMPT: Mapping[str, str] = {
    "cumprod": _PRODUCTS,
    "index_reduce.prod": _PRODUCTS,
}

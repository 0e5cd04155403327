"""Storage formats: reference, operator and kernels of each. Importing this package defines the operators."""

from . import pack_bool, quantize

__all__ = ["pack_bool", "quantize"]

"""Compiles the CPU bodies of the formats: ``_compiled_elements.cpp``, what they share, before the source of one.

Inductor's own compiler and cache build them, so that they need nothing that compiling the graph does not need.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch._inductor.async_compile import AsyncCompile, get_compile_threads
from torch._inductor.codecache import CppPythonBindingsCodeCache

from ._hash import FRACTION_BITS, INDEX_HIGH_MULTIPLIER, MULTIPLIERS, SHIFTS
from .quantize import MAX_SCALE, MAX_SPREAD, MIN_SCALE

# Elements below which another thread costs more than it saves.
THREAD_NUMEL = 2**15

# How the elements of a dtype are read.
_ELEMENTS: dict[torch.dtype, dict[str, tuple[str, object]]] = {
    torch.float32: {"INFINITY_BITS": ("Word", 0x7F800000), "SHIFT": ("int", 0), "UNIT": ("float", 1.0)},
    torch.bfloat16: {"INFINITY_BITS": ("Word", 0x7F80), "SHIFT": ("int", 16), "UNIT": ("float", 1.0)},
    torch.float16: {"INFINITY_BITS": ("Word", 0x7C00), "SHIFT": ("int", 13), "UNIT": ("float", 2.0**112)},
}

_WORDS = {4: "int32_t", 2: "int16_t"}

# The ``kernel`` of a source; it takes tensors for pointers.
Body = Callable[..., None]


def compile_body(
    path: Path, lines: Iterable[str], argument_types: Iterable[str], dtype: torch.dtype
) -> Callable[[], Body]:
    """Starts compiling a source for elements of ``dtype``; what it gives waits for the source's ``kernel``.

    Args:
        path: The source.
        lines: What it expects to be defined beside what all sources do.
        argument_types: Those of its ``kernel``; ``Word`` stands for the integer as wide as an element.
        dtype: Float32, bfloat16 or float16.
    """
    word = _WORDS[dtype.itemsize]
    constants = [f"constexpr {ctype} {name} = {value!r};" for name, (ctype, value) in _constants(dtype).items()]
    shared = Path(__file__).with_suffix(".cpp").read_text()
    source = ["#include <cstdint>", f"using Word = {word};", *constants, *lines, shared, path.read_text()]
    # With one thread Inductor compiles what is asked for, when it is.
    submit = AsyncCompile.submit if get_compile_threads() > 1 else None
    types = [argument_type.replace("Word", word) for argument_type in argument_types]
    return CppPythonBindingsCodeCache.load_pybinding_async(types, "\n".join(source), submit_fn=submit)


def _constants(dtype: torch.dtype) -> dict[str, tuple[str, object]]:
    """Name -> type and value of all that the sources expect to be defined, but ``Word``."""
    integers = {"FRACTION_BITS": FRACTION_BITS} | {f"SHIFT{i}": shift for i, shift in enumerate(SHIFTS)}
    words = {f"MULTIPLIER{i}": multiplier % 2**32 for i, multiplier in enumerate(MULTIPLIERS)}
    words["INDEX_HIGH_MULTIPLIER"] = INDEX_HIGH_MULTIPLIER
    floats = {"MIN_SCALE": MIN_SCALE, "MAX_SCALE": MAX_SCALE, "MAX_SPREAD": MAX_SPREAD}
    floats["LARGEST"] = torch.finfo(dtype).max
    typed: dict[str, tuple[str, object]] = dict(_ELEMENTS[dtype])
    for ctype, values in (("int", integers), ("uint32_t", words), ("float", floats)):
        typed |= {name: (ctype, value) for name, value in values.items()}
    return typed


def num_threads(numel: int) -> int:
    """Threads for ``numel`` elements."""
    return min(torch.get_num_threads(), 1 + numel // THREAD_NUMEL)

"""CPU body of the encoder: ``_compiled_cpu.cpp``, compiled once per set of formats, for any size.

One body serves all tensors of a model, so that a graph's compile time does not grow with what it stores; formats that
differ in their bits alone share a source, because starting the compiler takes several times as long as one more of
them. Inductor's own compiler and cache build it, so that it needs nothing that compiling the graph does not need.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor
from torch._inductor.async_compile import AsyncCompile, get_compile_threads
from torch._inductor.codecache import CppPythonBindingsCodeCache

from ._hash import FRACTION_BITS, INDEX_HIGH_MULTIPLIER, MULTIPLIERS, SHIFTS, mix_seed
from ._layout import to_storage_order
from .quantize import MAX_SCALE, MAX_SPREAD, MIN_SCALE, PLANES, check_arguments, num_groups, quantize_fake

# Elements below which another thread costs more than it saves.
THREAD_NUMEL = 2**15

# How the elements of a dtype are read.
_ELEMENTS: dict[torch.dtype, dict[str, tuple[str, object]]] = {
    torch.float32: {"INFINITY_BITS": ("Word", 0x7F800000), "SHIFT": ("int", 0), "UNIT": ("float", 1.0)},
    torch.bfloat16: {"INFINITY_BITS": ("Word", 0x7F80), "SHIFT": ("int", 16), "UNIT": ("float", 1.0)},
    torch.float16: {"INFINITY_BITS": ("Word", 0x7C00), "SHIFT": ("int", 13), "UNIT": ("float", 2.0**112)},
}

_WORDS = {4: "int32_t", 2: "int16_t"}


# Bits, group size and the dtype of what is encoded.
Format = tuple[int, int, torch.dtype]

# Each gives the source's ``kernel`` once it is compiled.
_kernels: dict[Format, Callable[[], Callable[..., None]]] = {}


def _constants(group_size: int, dtype: torch.dtype) -> dict[str, tuple[str, object]]:
    """Name -> type and value of all that the source expects to be defined, but ``Word`` and ``FORMATS``."""
    integers = {"GROUP_SIZE": group_size, "FRACTION_BITS": FRACTION_BITS}
    integers |= {f"SHIFT{i}": shift for i, shift in enumerate(SHIFTS)}
    words = {f"MULTIPLIER{i}": multiplier % 2**32 for i, multiplier in enumerate(MULTIPLIERS)}
    words["INDEX_HIGH_MULTIPLIER"] = INDEX_HIGH_MULTIPLIER
    floats = {"MIN_SCALE": MIN_SCALE, "MAX_SCALE": MAX_SCALE, "MAX_SPREAD": MAX_SPREAD}
    floats["LARGEST"] = torch.finfo(dtype).max
    typed: dict[str, tuple[str, object]] = dict(_ELEMENTS[dtype])
    for ctype, values in (("int", integers), ("uint32_t", words), ("float", floats)):
        typed |= {name: (ctype, value) for name, value in values.items()}
    return typed


def start_compiling(formats: Iterable[Format]) -> None:
    """Compiles what ``quantize_compiled`` needs for ``formats``, if it is not there yet, while the caller goes on."""
    missing: dict[tuple[int, torch.dtype], list[int]] = {}
    for bits, group_size, dtype in sorted(set(formats) - _kernels.keys(), key=str):
        check_arguments(dtype, bits, group_size)
        missing.setdefault((group_size, dtype), []).append(bits)
    for (group_size, dtype), widths in missing.items():
        kernel = _compile(widths, group_size, dtype)
        _kernels.update({(bits, group_size, dtype): kernel for bits in widths})


def _compile(widths: list[int], group_size: int, dtype: torch.dtype) -> Callable[[], Callable[..., None]]:
    """The source's ``kernel`` for codes of these widths, once it is asked for."""
    word = _WORDS[dtype.itemsize]
    lines = ["#include <cstdint>", f"using Word = {word};"]
    for name, (ctype, value) in _constants(group_size, dtype).items():
        lines.append(f"constexpr {ctype} {name} = {value!r};")
    planes = ((*PLANES[bits], 0)[:2] for bits in widths)
    lines.append("#define FORMATS(CASE) " + " ".join(f"CASE({low}, {high})" for low, high in planes))
    source = Path(__file__).with_suffix(".cpp").read_text()
    pointers = [f"const {word}*", "const int64_t*", "uint8_t*", "uint16_t*", f"{word}*"]
    # With one thread Inductor compiles what is asked for, when it is.
    submit = AsyncCompile.submit if get_compile_threads() > 1 else None
    return CppPythonBindingsCodeCache.load_pybinding_async(
        [*pointers, *["int64_t"] * 4], "\n".join([*lines, source]), submit_fn=submit
    )


@torch.library.custom_op(
    "actcompile::quantize_compiled", mutates_args=(), device_types="cpu", tags=torch.Tag.needs_exact_strides
)
def quantize_compiled(x: Tensor, bits: int, group_size: int, seed: Tensor, salt: int) -> tuple[Tensor, Tensor, Tensor]:
    """``quantize`` with a compiled body."""
    flat = to_storage_order(x)
    groups = num_groups(flat.numel(), group_size)
    codes = flat.new_empty(groups * (group_size * bits // 8), dtype=torch.uint8)
    scale, zero = flat.new_empty(groups, dtype=torch.bfloat16), flat.new_empty(groups)
    if (bits, group_size, x.dtype) not in _kernels:
        start_compiling([(bits, group_size, x.dtype)])
    encode = _kernels[bits, group_size, x.dtype]()
    threads = min(torch.get_num_threads(), 1 + flat.numel() // THREAD_NUMEL)
    encode(flat, seed, codes, scale, zero, mix_seed(salt), flat.numel(), threads, bits)
    return codes, scale, zero


quantize_compiled.register_fake(quantize_fake)

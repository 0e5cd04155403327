"""CPU body of the encoder: ``_compiled_cpu.cpp``, compiled once per set of formats, for any size.

One body serves all tensors of a model, so that a graph's compile time does not grow with what it stores; formats that
differ in their bits alone share a source, because starting the compiler takes several times as long as one more of
them.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from ._compiled_elements import Body, compile_body, num_threads
from ._hash import mix_seed
from ._layout import to_storage_order
from .quantize import PLANES, check_arguments, num_groups, quantize_fake

# Bits, group size and the dtype of what is encoded.
Format = tuple[int, int, torch.dtype]

# Each gives the source's ``kernel`` once it is compiled.
_kernels: dict[Format, Callable[[], Body]] = {}


def start_compiling(formats: Iterable[Format]) -> None:
    """Compiles what ``quantize_compiled`` needs for ``formats``, if it is not there yet, while the caller goes on."""
    missing: dict[tuple[int, torch.dtype], list[int]] = {}
    for bits, group_size, dtype in sorted(set(formats) - _kernels.keys(), key=str):
        check_arguments(dtype, bits, group_size)
        missing.setdefault((group_size, dtype), []).append(bits)
    for (group_size, dtype), widths in missing.items():
        kernel = _compile(widths, group_size, dtype)
        _kernels.update({(bits, group_size, dtype): kernel for bits in widths})


def _compile(widths: list[int], group_size: int, dtype: torch.dtype) -> Callable[[], Body]:
    """The source's ``kernel`` for codes of these widths, once it is asked for."""
    planes = ((*PLANES[bits], 0)[:2] for bits in widths)
    lines = [
        f"constexpr int GROUP_SIZE = {group_size};",
        "#define FORMATS(CASE) " + " ".join(f"CASE({low}, {high})" for low, high in planes),
    ]
    pointers = ["const Word*", "const int64_t*", "uint8_t*", "uint16_t*", "Word*"]
    return compile_body(Path(__file__).with_suffix(".cpp"), lines, [*pointers, *["int64_t"] * 4], dtype)


@torch.library.custom_op(
    "actcompile::quantize_compiled", mutates_args=(), device_types="cpu", tags=(torch.Tag.needs_exact_strides,)
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
    encode(flat, seed, codes, scale, zero, mix_seed(salt), flat.numel(), num_threads(flat.numel()), bits)
    return codes, scale, zero


quantize_compiled.register_fake(quantize_fake)

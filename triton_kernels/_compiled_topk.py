"""CPU bodies of pruning and its inverse: ``_compiled_topk.cpp``, compiled once per block and dtype, for any size.

One source serves both directions, all counts and all widths of values.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ._compiled_elements import Body, compile_body, num_threads
from ._hash import mix_seed
from ._layout import from_storage_order, to_storage_order
from ._topk_sizes import POSITION_BITS, check_format, empty_parts, group_numel
from .sparse_weight_grad import multiply_in_chunks, sparse_weight_grad_fake
from .topk import densify_fake, sparsify_fake

# Block and the dtype of what is pruned.
SparseFormat = tuple[int, torch.dtype]

# Each gives the source's ``kernel`` once it is compiled.
_kernels: dict[SparseFormat, Callable[[], Body]] = {}


def start_compiling_sparse(formats: Iterable[SparseFormat]) -> None:
    """Compiles what both operators need for ``formats``, if it is not there yet, while the caller goes on."""
    for block, dtype in sorted(set(formats) - _kernels.keys(), key=str):
        constants = {"BLOCK": block, "GROUP": group_numel(block), "POSITION_BITS": POSITION_BITS.get(block, 0)}
        lines = [f"constexpr int {name} = {value};" for name, value in constants.items()]
        pointers = ["Word*", "const int64_t*", "uint8_t*", "uint8_t*", "uint16_t*", "Word*"]
        types = [*pointers, *["int64_t"] * 6]
        _kernels[block, dtype] = compile_body(Path(__file__).with_suffix(".cpp"), lines, types, dtype)


def _body(block: int, dtype: torch.dtype) -> Body:
    if (block, dtype) not in _kernels:
        start_compiling_sparse([(block, dtype)])
    return _kernels[block, dtype]()


@torch.library.custom_op(
    "actcompile::sparsify_compiled", mutates_args=(), device_types="cpu", tags=(torch.Tag.needs_exact_strides,)
)
def sparsify_compiled(
    x: Tensor, keep: int, block: int, value_bits: int, seed: Tensor, salt: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``sparsify`` with a compiled body."""
    flat = to_storage_order(x)
    numel = flat.numel()
    parts = empty_parts(flat, numel, keep, block, value_bits)
    sizes = (mix_seed(salt), numel, num_threads(numel), keep, value_bits)
    _body(block, x.dtype)(flat, seed, *parts, *sizes, False)
    return parts


sparsify_compiled.register_fake(sparsify_fake)


@torch.library.custom_op("actcompile::densify_compiled", mutates_args=(), device_types="cpu")
def densify_compiled(
    index: Tensor,
    values: Tensor,
    scale: Tensor,
    zero: Tensor,
    keep: int,
    block: int,
    value_bits: int,
    shape: Sequence[int],
    stride: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """``densify`` with a compiled body."""
    check_format(dtype, keep, block, value_bits)
    flat = index.new_empty(torch.Size(shape).numel(), dtype=dtype)
    # No seed, and no salt.
    sizes = (0, flat.numel(), num_threads(flat.numel()), keep, value_bits)
    _body(block, dtype)(flat, index.new_zeros((), dtype=torch.int64), index, values, scale, zero, *sizes, True)
    return from_storage_order(flat, shape, stride)


densify_compiled.register_fake(densify_fake)


@torch.library.custom_op("actcompile::sparse_weight_grad_compiled", mutates_args=(), device_types="cpu")
def sparse_weight_grad_compiled(
    grad_out: Tensor,
    index: Tensor,
    values: Tensor,
    scale: Tensor,
    zero: Tensor,
    keep: int,
    block: int,
    value_bits: int,
    in_features: int,
) -> Tensor:
    """``sparse_weight_grad`` with the compiled body of ``densify``."""
    stored = index, values, scale, zero
    return multiply_in_chunks(densify_compiled, grad_out, stored, keep, block, value_bits, in_features)


sparse_weight_grad_compiled.register_fake(sparse_weight_grad_fake)

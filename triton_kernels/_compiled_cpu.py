"""CPU bodies of the encoders: the references, compiled by Inductor once per format and dtype, for any size.

Inductor turns the reference's arithmetic into vectorized C++ that packs codes in registers. One body serves all
tensors of a model, so that a graph's compile time does not grow with what it stores.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch._inductor.config as inductor_config
from torch import Tensor
from torch._guards import TracingContext, tracing
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from ._hash import mix_seed
from ._layout import to_storage_order
from .quantize import encode_groups, group, quantize, quantize_fake

# Groups of the example that a body is traced with; any number but 0 and 1 means the same.
_EXAMPLE_GROUPS = 24


@functools.cache
def _encoder(bits: int, group_size: int, dtype: torch.dtype) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """``encode_groups`` compiled for any number of groups."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    context: StatelessSymbolicContext[Any, Any] = StatelessSymbolicContext([DimDynamic.DYNAMIC, DimDynamic.STATIC])
    groups = mode.from_tensor(torch.empty(_EXAMPLE_GROUPS, group_size, dtype=dtype), symbolic_context=context)
    key = mode.from_tensor(torch.zeros((), dtype=torch.int64))
    body = functools.partial(encode_groups, bits=bits)
    # A graph of its own: nothing of the one that is being compiled or run may reach it.
    with torch.no_grad(), tracing(TracingContext(mode)), torch.device("cpu"), V.set_fake_mode(mode):
        traced = make_fx(lambda g, k: body(g, key=k), select_decomp_table(), tracing_mode="symbolic")(groups, key)
        # Loops over groups end in scalar code: that takes a quarter off the compile time and nothing off the speed.
        with inductor_config.patch({"cpp.enable_loop_tail_vec": False}):
            compiled = compile_fx_inner(traced, [groups, key])
    return lambda *args: compiled(list(args))


@torch.library.custom_op(
    "actcompile::quantize_compiled", mutates_args=(), device_types="cpu", tags=torch.Tag.needs_exact_strides
)
def quantize_compiled(x: Tensor, bits: int, group_size: int, seed: Tensor, salt: int) -> tuple[Tensor, Tensor, Tensor]:
    """``quantize`` with a compiled body."""
    if not x.numel():
        return quantize(x, bits, group_size, seed, salt)
    encode = _encoder(bits, group_size, x.dtype)
    codes, scale, zero = encode(group(to_storage_order(x), group_size), seed ^ mix_seed(salt))
    return codes, scale, zero


quantize_compiled.register_fake(quantize_fake)

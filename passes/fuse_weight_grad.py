"""Decodes layer inputs inside of their weight gradients. Changes the order of summation there, and no value otherwise.

    x = dequantize(codes, scale, zero, ...);  gw = mm(permute(g), x)
becomes
    gw = quantized_weight_grad(g, codes, scale, zero, ...)

    1. mm(permute(g), x)    a layer that keeps its weight as [out_features, in_features]; biases do not matter
    2. mm(permute(x), g)    one that keeps it as [in_features, out_features]: the result is transposed
    3. views                x may have been stored in other dimensions, if its memory holds it row by row
    4. several products     of the same decoded tensor: all of them or none, or it is decoded for the rest anyway

Runs last, on graphs that Inductor compiles. Whether the product shall decode is measured for each shape; nothing is,
and so nothing changes, on the CPU.

Never touches: tensors that anything else reads, symbolic sizes, rows that are no whole number of groups.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

from actcompile.plan import Plan

from ..triton_kernels._weight_grad_times import Product, device_name, inside_pays
from ..triton_kernels.weight_grad import MIN_GROUP_SIZE
from ._fx import GraphPair, call
from ._views import VIEW_OPS

aten = torch.ops.aten
dequantize = torch.ops.actcompile.dequantize.default
quantized_weight_grad = torch.ops.actcompile.quantized_weight_grad.default

# Operators whose result surely lies in the memory of their argument; others copy where they must.
_VIEWS = VIEW_OPS - {aten.reshape.default, aten.expand.default}

Pays = Callable[[Sequence[Product], torch.device], bool]


class _Reader(NamedTuple):
    """A product of a decoded tensor: ``grad_out`` is the other operand, permuted where ``transposed`` is not set."""

    mm: fx.Node
    grad_out: fx.Node
    transposed: bool
    product: Product


def fuse_weight_grad(pair: GraphPair, plan: Plan, pays: Pays = inside_pays) -> None:
    """Rewrites the products of every decoded tensor for which ``pays`` says so."""
    graph = pair.backward.graph
    rewritten = False
    for decoder in graph.find_nodes(op="call_function", target=dequantize):
        readers = _readers(decoder)
        if readers and pays([reader.product for reader in readers], decoder.meta["val"].device):
            for reader in readers:
                _decode_inside(decoder, reader)
            rewritten = True
    if rewritten:
        graph.eliminate_dead_code()
        pair.backward.recompile()


def _readers(decoder: fx.Node) -> list[_Reader]:
    """All that read ``decoder``, if they all are weight gradients; else nothing."""
    views, products = [decoder], []
    for view in views:
        for user in view.users:
            if user.target in _VIEWS:
                views.append(user)
            else:
                products.append((user, view))
    readers = [_reader(decoder, user, view) for user, view in products]
    known = [reader for reader in readers if reader is not None and reader.grad_out not in views]
    return known if len(known) == len(readers) else []


def _reader(decoder: fx.Node, user: fx.Node, x: fx.Node) -> _Reader | None:
    """``user`` as a weight gradient whose decoded operand is ``x``."""
    if user.target is not aten.mm.default:
        return None
    left, right = user.args
    transposed = left is x
    grad_out: Any = right if transposed else left
    rows, in_features = x.meta["val"].shape[:: -1 if transposed else 1]
    out_features = grad_out.meta["val"].shape[1 if transposed else 0]
    bits, group_size = decoder.args[3:5]
    assert isinstance(bits, int) and isinstance(group_size, int), decoder.args
    if not all(isinstance(size, int) for size in (rows, in_features, out_features)):
        return None
    # The whole memory of the decoded tensor, row by row.
    is_row_major = x.meta["val"].stride() == ((1, in_features) if transposed else (in_features, 1))
    if group_size < MIN_GROUP_SIZE or in_features % group_size or not is_row_major:
        return None
    value = decoder.meta["val"]
    dtype = str(value.dtype).removeprefix("torch.")
    sizes = (rows, out_features, in_features, bits, group_size)
    return _Reader(user, grad_out, transposed, Product(device_name(value.device), *sizes, dtype, int(transposed)))


def _decode_inside(decoder: fx.Node, reader: _Reader) -> None:
    graph, mm, grad_out = decoder.graph, reader.mm, reader.grad_out
    codes, scale, zero, bits, group_size = decoder.args[:5]
    with graph.inserting_before(mm):
        if not reader.transposed:
            is_permuted = grad_out.target is aten.permute.default and grad_out.args[1] == [1, 0]
            grad_out = (
                grad_out.all_input_nodes[0] if is_permuted else call(graph, aten.permute.default, grad_out, [1, 0])
            )
        arguments = (codes, scale, zero, bits, group_size, reader.product.in_features, reader.transposed)
        fused = call(graph, quantized_weight_grad, grad_out, *arguments)
    mm.replace_all_uses_with(fused)
    graph.erase_node(mm)

"""Backwards for some of the samples of a batch.

Sizes in the graph are replaced by those of fewer samples, what was saved is cut, and what is stored in codes is read
without decoding the other samples where its layout allows.
"""

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from ._growth import sizes_position
from .passes._fx import GraphPair, hint, is_tensor
from .triton_kernels._layout import from_storage_order, storage_permutation
from .triton_kernels.pack_bool import unpack_range
from .triton_kernels.quantize import split_planes

dequantize = torch.ops.actcompile.dequantize.default
unpack_bool = torch.ops.actcompile.unpack_bool.default


@dataclass(frozen=True)
class SlicedBackward:
    """A backward graph for ``size // count`` samples of ``size``.

    ``graph`` has the same nodes as the whole backward, by name. ``dims`` says where the batch lies in their values;
    what is not there has none. Their noted values have the right shapes and dtypes, on no device.
    """

    graph: fx.Graph
    size: int
    count: int
    dims: Mapping[str, int]


@dataclass(frozen=True)
class Layout:
    """Shape and strides of a saved tensor."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """``length`` of the ``size`` samples of a batch, from ``start`` on; a dimension may hold several rows of each."""

    start: int
    length: int
    size: int

    def rows(self, num_rows: int) -> slice:
        """The rows of these samples in a dimension of ``num_rows``."""
        per_sample = num_rows // self.size
        return slice(self.start * per_sample, (self.start + self.length) * per_sample)


def slice_backward(pair: GraphPair, size: int, dims: Mapping[str, int], count: int) -> SlicedBackward:
    """The backward of ``pair`` with all sizes as they are for ``size // count`` samples."""
    owner = fx.GraphModule(pair.backward, pair.backward.graph)
    graph = fx.Graph(owner)
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(pair.backward.graph, copies))
    for node, copy in copies.items():
        if node.name not in dims or not is_tensor(node):
            continue
        shape = [hint(length) for length in node.meta["val"].shape]
        shape[dims[node.name]] = shape[dims[node.name]] // size * (size // count)
        copy.meta["val"] = torch.empty(shape, dtype=node.meta["val"].dtype, device="meta")
        position = sizes_position(node)
        if position is not None:
            copy.update_arg(position, shape)
        elif node.target is torch.ops.prims.iota.default:
            copy.update_arg(0, shape[0])
    return SlicedBackward(graph, size, count, dims)


def samples_meet(graph: fx.Graph, dims: Mapping[str, int]) -> bool:
    """Whether samples read what was computed from several of them, as in batch normalization."""
    mixed: set[fx.Node] = set()
    for node in graph.nodes:
        # A tuple is what it was made of.
        is_item = node.target is operator.getitem
        sources = node.all_input_nodes[0].all_input_nodes if is_item else node.all_input_nodes
        if node.name in dims and not mixed.isdisjoint(sources):
            return True
        is_read = any(source.name in dims or source in mixed for source in sources)
        if node.name not in dims and is_tensor(node) and is_read:
            mixed.add(node)
    return False


def cut(value: Tensor, dim: int, part: Part) -> Tensor:
    """A copy of the samples of ``part``, which lie along ``dim``."""
    rows = part.rows(value.shape[dim])
    return value.narrow(dim, rows.start, rows.stop - rows.start).clone()


def decode(decoder: Any, args: Sequence[Any], dim: int, part: Part) -> Tensor:
    """The samples of ``part`` of what ``decoder(*args)`` returns."""
    if decoder is unpack_bool:
        packed, shape, *strides = args
        stride = strides[0] if strides and strides[0] is not None else _contiguous(shape)
        run = _run(Layout(tuple(shape), tuple(stride)), dim, part)
        if run is not None:
            return from_storage_order(unpack_range(packed, run), _cut_shape(shape, dim, part), stride, shape)
    if decoder is dequantize:
        codes, scale, zero, bits, group_size, shape, stride, dtype = args
        run = _run(Layout(tuple(shape), tuple(stride)), dim, part)
        if run is not None:
            groups = slice(run.start // group_size, (run.stop - 1) // group_size + 1)
            planes = torch.cat([plane[groups].reshape(-1) for plane in split_planes(codes, bits, group_size)])
            first, numel = groups.start * group_size, run.stop - groups.start * group_size
            flat = dequantize(planes, scale[groups], zero[groups], bits, group_size, [numel], [1], dtype)
            return from_storage_order(flat[run.start - first :].clone(), _cut_shape(shape, dim, part), stride, shape)
    return cut(decoder(*args), dim, part)


def _contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


@dataclass(frozen=True)
class Groups:
    """The groups in which a tensor, or the samples ``part`` of it along ``dim``, lies in storage order."""

    layout: Layout
    group_size: int
    dim: int | None = None
    part: Part | None = None

    def ids(self) -> Tensor:
        """For each element the number of its group: int64, in the shape of the elements."""
        run, shape = self._run(), self.layout.shape
        if self.part is not None and self.dim is not None:
            if run is None:
                return cut(Groups(self.layout, self.group_size).ids(), self.dim, self.part)
            shape = tuple(_cut_shape(shape, self.dim, self.part))
        assert run is not None
        return from_storage_order(torch.arange(run.start, run.stop) // self.group_size, shape, *self._order())

    def spread(self, values: Tensor) -> Tensor:
        """For each element the value of its group, one of ``values`` for each group of the whole tensor."""
        run, shape = self._run(), self.layout.shape
        if run is None:
            return values[self.ids()]
        if self.part is not None and self.dim is not None:
            shape = tuple(_cut_shape(shape, self.dim, self.part))
        first = run.start // self.group_size
        flat = values[first : -(-run.stop // self.group_size), None].expand(-1, self.group_size).reshape(-1)
        return from_storage_order(
            flat[run.start - first * self.group_size :][: run.stop - run.start], shape, *self._order()
        )

    def _order(self) -> tuple[Sequence[int], Sequence[int]]:
        """What ``from_storage_order`` takes a part's order from: strides and shape of the whole tensor."""
        return self.layout.stride, self.layout.shape

    def whole(self) -> slice | None:
        """The groups of the elements, where these lie one after the other from the start of a group on."""
        run, size = self._run(), self.group_size
        return None if run is None or run.start % size else slice(run.start // size, -(-run.stop // size))

    def sums(self, values: Tensor) -> Tensor:
        """The sum over each group of ``values``, which are given for each element: [num_groups] of the whole tensor."""
        num_groups = -(-math.prod(self.layout.shape) // self.group_size)
        sums = values.new_zeros(num_groups)
        run = self._run()
        if run is None:
            return sums.index_add_(0, self.ids().reshape(-1).to(values.device), values.reshape(-1))
        flat = values.permute(storage_permutation(self.layout.shape, self.layout.stride)).reshape(-1)
        missing = run.start % self.group_size, -run.stop % self.group_size
        groups = (F.pad(flat, missing) if any(missing) else flat).view(-1, self.group_size)
        sums[run.start // self.group_size :][: len(groups)] = groups.sum(1)
        return sums

    def _run(self) -> slice | None:
        """Where the elements lie in storage order, if one after the other."""
        if self.part is None or self.dim is None:
            return slice(0, math.prod(self.layout.shape))
        return _run(self.layout, self.dim, self.part)


def _run(layout: Layout, dim: int, part: Part) -> slice | None:
    """The elements of ``part`` in storage order, where these lie one after the other."""
    order = storage_permutation(layout.shape, layout.stride)
    if any(layout.shape[outer] != 1 for outer in order[: order.index(dim)]):
        return None
    rows = part.rows(layout.shape[dim])
    row = math.prod(layout.shape) // layout.shape[dim]
    return slice(rows.start * row, rows.stop * row)


def _cut_shape(shape: Sequence[int], dim: int, part: Part) -> list[int]:
    rows = part.rows(shape[dim])
    return [*shape[:dim], rows.stop - rows.start, *shape[dim + 1 :]]

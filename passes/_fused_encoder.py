"""Encoders inside the Triton kernels that Inductor generates: codes are written where the value is in registers.

    y = gelu(x)                              one kernel: load x, store y, store codes, scale and zero of y
    codes, scale, zero = quantize(y, ...)

Each of the three results is a pointwise node over the elements of y whose store is the encoder's, so that Inductor
fuses it like any other pointwise node, into row-wise reductions such as LayerNorm, too. That store needs whole groups
in a program's tile: what would tile them otherwise is not fused, and such kernels have a fixed configuration.

Every name of Inductor's that this needs is in this file, as seen in torch 2.11 to 2.15.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
import torch._inductor.config as inductor_config
from torch._inductor import ir
from torch._inductor.codegen.common import DeferredLine
from torch._inductor.codegen.simd import SIMDScheduling
from torch._inductor.codegen.triton import FixedTritonConfig, TritonKernel, TritonScheduling
from torch._inductor.runtime.runtime_utils import next_power_of_2
from torch._inductor.scheduler import FusedSchedulerNode, SchedulerNode
from torch._inductor.utils import sympy_subs
from torch._inductor.virtualized import V, ops

from ..triton_kernels._hash import mix_seed
from ..triton_kernels.quantize import PLANES, num_groups

# Elements of a program's tile, which is one warp's: it finds the extremes of its groups without waiting for others.
# Groups up to the larger size are fused.
_TILE, _LARGEST_TILE = 512, 1024
# Bytes of a row that each thread of its program holds; with twice as many some kernels would spill.
_ROW_NBYTES_PER_THREAD = 64
# Rows up to this length stay in registers between their statistics and their encoding; longer ones would spill.
_LONGEST_ROW = 4096

_TRITON_DTYPES = {torch.float32: "tl.float32", torch.bfloat16: "tl.bfloat16", torch.float16: "tl.float16"}

_HELPERS = "from actcompile.triton_kernels._encode_tile import {function} as {{name}}"

# Stores of encoders go by this name.
_MODE = "actcompile"


@dataclass(frozen=True)
class Format:
    """How one tensor is encoded."""

    bits: int
    group_size: int
    dtype: torch.dtype
    numel: sympy.Expr
    seed: str
    salt_key: int


class Encoder(ir.Pointwise):
    """One result of an encoder, as a pointwise node over the elements of what is encoded, in storage order."""

    # Attributes of a frozen dataclass: set by ``create_encoder``.
    part: str
    format: Format

    def store_output(
        self, output_name: str | None, indexer: Callable[[Sequence[sympy.Expr]], Any], vars: Sequence[sympy.Expr]
    ) -> Any:
        """Stores under a mode that ``EncodingKernel`` knows; the seed's load says that the node depends on it."""
        ops.load(self.format.seed, sympy.S.Zero)
        (position,) = vars
        mode: Any = f"{_MODE}:{self.part}"
        return ops.store(output_name or "unnamed", position, self.make_loader()(vars), mode=mode)


def is_fusable(numel: sympy.Expr, group_size: int) -> bool:
    """Whether kernels can encode ``numel`` elements: whole groups, and none of the settings that change tiles."""
    return (
        V.graph.sizevars.statically_known_multiple_of(numel, group_size)
        and V.graph.sizevars.statically_known_gt(numel, 0)
        and group_size <= _LARGEST_TILE
        and not inductor_config.combo_kernels
        and not inductor_config.triton.multi_kernel
        and not inductor_config.triton.prefer_nd_tiling
        and not inductor_config.triton.tile_reductions
    )


def create_encoder(
    flat: ir.TensorBox, seed: ir.TensorBox, bits: int, group_size: int, salt: int
) -> tuple[ir.TensorBox, ir.TensorBox, ir.TensorBox]:
    """Codes, scale and zero of ``flat [numel]``, as nodes that fuse."""
    install()
    (numel,) = flat.get_size()
    groups = num_groups(numel, group_size)
    form = Format(bits, group_size, flat.get_dtype(), numel, seed.get_name(), mix_seed(salt))
    results = {
        "codes": (torch.uint8, groups * (group_size * bits // 8)),
        "scale": (torch.bfloat16, groups),
        "zero": (form.dtype, groups),
    }
    codes, scale, zero = (_create(flat, part, form, dtype, size) for part, (dtype, size) in results.items())
    return codes, scale, zero


def _create(flat: ir.TensorBox, part: str, form: Format, dtype: torch.dtype, size: sympy.Expr) -> ir.TensorBox:
    device = flat.get_device_or_error()
    data = Encoder(device=device, dtype=dtype, inner_fn=flat.make_loader(), ranges=flat.get_size())
    object.__setattr__(data, "part", part)
    object.__setattr__(data, "format", form)
    layout = ir.FixedLayout(device, dtype, [size], [sympy.S.One])
    buffer = ir.ComputedBuffer(name=None, layout=layout, data=data)
    buffer.name = V.graph.register_buffer(buffer)
    V.graph.register_operation(buffer)
    return ir.TensorBox.create(buffer)


def _encoders(nodes: Any) -> Iterator[Encoder]:
    """The encoders among nodes of the scheduler."""
    for node in nodes:
        buffer = getattr(node, "node", None)
        if isinstance(buffer, ir.ComputedBuffer) and isinstance(buffer.data, Encoder):
            yield buffer.data


class EncodingKernel(TritonKernel):
    """A Triton kernel that may hold encoders."""

    def __init__(self, tiling: dict[str, sympy.Expr], **kwargs: Any) -> None:
        features = kwargs.get("features")
        if features is not None and (formats := [encoder.format for encoder in _encoders(features.scheduler_nodes())]):
            kwargs |= _configuration(features.reduction_numel, formats)
        self._encoded: dict[tuple[str, Format], str] = {}
        super().__init__(tiling, **kwargs)

    def want_no_x_dim(self) -> bool:
        """Rows keep their dimension of size 1: without it, torch 2.11 fails at loads that only rows index."""
        return False

    def store(self, name: str, index: sympy.Expr, value: Any, mode: Any = None) -> None:
        """Stores a result of an encoder; all others as ever."""
        if not str(mode).startswith(_MODE):
            super().store(name, index, value, mode)
            return
        (encoder,) = _encoders([self.current_node])
        encoded = self._encode(index, value, encoder.format)
        pointer, form = self.args.output(name), encoder.format
        if encoder.part == "codes":
            low_bits, high_bits = (*PLANES[form.bits], 0)[:2]
            groups = self.index_to_str(num_groups(form.numel, form.group_size))
            store = self._helper("store_codes")
            codes = f"{encoded}_codes, {encoded}_group, {encoded}_exists"
            line = f"{store}({pointer}, {codes}, {groups}, {low_bits}, {high_bits})"
        else:
            line = f"tl.store({pointer} + {encoded}_group, {encoded}_{encoder.part}, {encoded}_exists)"
        self.stores.writeline(DeferredLine(name, line))

    def _encode(self, index: sympy.Expr, value: Any, form: Format) -> str:
        """Writes the encoder's call, once for its three results; the prefix of their names."""
        key = (str(value), form)
        if key not in self._encoded:
            prefix = self._encoded[key] = f"encoded{len(self._encoded)}"
            shape, numel = self.dense_size_str(), " * ".join(self.dense_size_list())
            tile = f"tl.broadcast_to({value}, {shape}), {self._tile_position(index)}"
            # Arguments, so that layers share a kernel; of such a name, since others are told apart by divisibility; and
            # halves, since integers have the 32 bits of the kernel's indices.
            salts = ", ".join(self.args.seed_offset("load_seed_offset", half) for half in _halves(form.salt_key))
            levels = 2**form.bits - 1
            constants = f"{_TRITON_DTYPES[form.dtype]}, {levels}, {form.group_size}, {numel}"
            names = ", ".join(f"{prefix}_{part}" for part in ("codes", "scale", "zero", "group", "exists"))
            call = f"{self._helper('encode_tile')}({tile}, {self.args.input(form.seed)}, {salts}, {constants})"
            self.compute.writeline(f"{names} = {call}")
        return self._encoded[key]

    def _tile_position(self, index: sympy.Expr) -> str:
        """Position of the first element of a program's tile, and how many follow, it included.

        A tile is a run of consecutive elements of the tensor or, with a reduction, of one row; it ends where they do.
        """
        starts = {}
        for symbol in index.free_symbols & self.range_tree_nodes.keys():
            entry = self.range_tree_nodes[symbol]
            starts[symbol] = sympy_subs(entry.expr, {entry.root.index_sym(): _offset(entry.root)})
        inner = self.active_range_trees()[-1]
        return f"{self.index_to_str(sympy_subs(index, starts))}, {inner.prefix}numel - {_offset(inner)}"

    def _helper(self, function: str) -> str:
        """The name of one of ours in the generated source."""
        return self.helper_functions.add(_HELPERS.format(function=function), base_name=function)


def _offset(tree: Any) -> sympy.Symbol:
    """Where a program's tile begins along a dimension of its kernel."""
    return sympy.Symbol(f"{tree.prefix}offset", integer=True, nonnegative=True)


def _halves(key: int) -> tuple[int, int]:
    """The low and the high half of a 64-bit number, signed."""
    low, high = key & 0xFFFFFFFF, key >> 32
    return low - 2**32 * (low >> 31), high


def _configuration(row: sympy.Expr, formats: Sequence[Format]) -> dict[str, Any]:
    """Arguments of a kernel whose tiles hold whole groups; ``row`` is what a reduction reduces, or 1."""
    fixed: dict[str, Any] = {"override_cooperative_reduction": False}
    if row == 1:
        tile = max(_TILE, *(form.group_size for form in formats))
        return {**fixed, "fixed_config": FixedTritonConfig({"XBLOCK": tile, "num_warps": 1})}
    length = next_power_of_2(int(row))
    nbytes = min(length, _LONGEST_ROW) * max(form.dtype.itemsize for form in formats)
    num_warps = max(1, nbytes // (32 * _ROW_NBYTES_PER_THREAD))
    block = {"XBLOCK": 1, "num_warps": num_warps}
    if length > _LONGEST_ROW:
        block["R0_BLOCK"] = _LONGEST_ROW
    persistent = {"override_persistent_reduction": length <= _LONGEST_ROW}
    return {**fixed, **persistent, "fixed_config": FixedTritonConfig(block)}


def _keeps_groups_whole(node1: Any, node2: Any) -> bool:
    """Whether the kernel of both nodes has tiles of whole groups."""
    encoders = list(_encoders([*node1.get_nodes(), *node2.get_nodes()]))
    if not encoders:
        return True
    # Kinds of kernels with tiles of their own are subclasses.
    if any(
        type(node) not in (SchedulerNode, FusedSchedulerNode) or node.is_template() or node.is_split_scan()
        for node in (node1, node2)
    ):
        return False
    (_, group1), (_, group2) = node1.group, node2.group
    reduced = [group for node, group in ((node1, group1), (node2, group2)) if node.is_reduction()]
    if len(reduced) == 2 and reduced[0] != reduced[1]:
        return False
    return all(
        isinstance(row, sympy.Integer) and row % encoder.format.group_size == 0 and encoder.format.numel == numel * row
        for numel, row in reduced
        for encoder in encoders
    )


@functools.cache
def install() -> None:
    """Lets Inductor's Triton scheduling know encoders. Graphs without them are scheduled as before."""
    scheduling: Any = TritonScheduling
    # Since 2.14 nodes ask the class that Triton's is derived from how they are tiled.
    simd: Any = SIMDScheduling
    can_fuse, tiling_and_scores = scheduling.can_fuse, simd.get_tiling_and_scores.__func__

    def can_fuse_whole_groups(self: TritonScheduling, node1: Any, node2: Any) -> bool:
        return _keeps_groups_whole(node1, node2) and can_fuse(self, node1, node2)

    def one_tiling(cls: type[SIMDScheduling], nodes: Any, numel: Any, reduction_numel: Any = 1, *rest: Any) -> Any:
        if any(_encoders(nodes)):
            return cls.create_tiling([numel], [reduction_numel]), None
        return tiling_and_scores(cls, nodes, numel, reduction_numel, *rest)

    scheduling.kernel_type = EncodingKernel
    scheduling.can_fuse = scheduling.can_fuse_vertical = scheduling.can_fuse_horizontal = can_fuse_whole_groups
    simd.get_tiling_and_scores = classmethod(one_tiling)

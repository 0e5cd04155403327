"""Describes every saved tensor of a pair of graphs. Reads only."""

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols, guard_or_false

from .passes._attention_bias import is_unaligned_bias
from .passes._cones import cone, cone_inputs, num_flops
from .passes._fx import (
    GraphPair,
    Slot,
    graph_outputs,
    hint,
    is_tensor,
    upper_bound,
)
from .passes._naming import module_path, operator_name, source_line
from .passes._noise_paths import unsafe_placeholders
from .passes._views import VALUE_PRESERVING_OPS, storage, value_chain
from .passes._weight_grads import WeightGrad, WeightGrads
from .passes.held import HeldValues, is_product
from .passes.snapshot_inputs import is_snapshot, written_by
from .plan import Recomputation, Role, SavedTensor
from .triton_kernels._layout import storage_permutation

aten = torch.ops.aten

# Of a language model the keys and values of all layers are among them, unless it is told not to return its cache.
RETURNED = (
    "the caller holds it: it is an output of the graph; return it no more (caches: use_cache=False) to compress it"
)

# dtypes that the codecs take.
FLOATS = frozenset({torch.float32, torch.bfloat16, torch.float16})
INTEGERS = frozenset({torch.int64, torch.int32, torch.int16})

# Operators that reduce over elements: their results are small, and an error in one spreads over all it was made of.
_REDUCTIONS = (
    *("var_mean", "var", "mean", "sum", "amax", "amin", "logsumexp", "native_layer_norm", "native_group_norm"),
    *("_native_batch_norm_legit", "_native_batch_norm_legit_functional", "native_batch_norm", "std", "norm"),
    *("_fused_rms_norm", "linalg_vector_norm", "max", "min"),
)
_MATRIX_PRODUCTS = frozenset({aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default})

# Operators between a tensor and its reduction: views, a residual added, a square.
_NEAR = 5
# A result this many times smaller than what it was reduced from is a statistic.
_STATISTIC_RATIO = 8

# Results of attention other than its output: log-sum-exp and the state of its random numbers.
_ATTENTION = "_scaled_dot_product"

# A constant beyond this is there to mask; groups that hold one lose everything else to its range.
_MASK_MAGNITUDE = 1e30
_MASK_CARRIERS = VALUE_PRESERVING_OPS | frozenset(
    {
        aten.where.self,
        aten.masked_fill.Scalar,
        aten.masked_fill.Tensor,
        aten.add.Tensor,
        aten.sub.Tensor,
        aten.rsub.Scalar,
        aten.mul.Tensor,
        aten.full.default,
        aten.full_like.default,
        aten.scalar_tensor.default,
        aten.slice.Tensor,
        aten.minimum.default,
        torch.ops.prims.convert_element_type.default,
    }
)


def analyze(pair: GraphPair) -> list[SavedTensor]:
    """One row per slot of ``pair``, in its order."""
    order = {node: position for position, node in enumerate(pair.backward.graph.nodes)}
    gradients = _reached_gradients(pair.backward.graph, order)
    # What goes to other graphs of the same call, nobody keeps.
    returned = {storage(node) for node in pair.user_outputs if isinstance(node, fx.Node) and not pair.is_part}
    weights, keys = WeightGrads(pair.backward.graph, pair.input_roles), {slot.source: slot.key for slot in pair.slots}
    held = HeldValues(pair)
    num_marks = sum(hint(n.meta["val"].numel()) for n, role in pair.roles.items() if role is Role.PADDING)
    rows = []
    for slot in pair.slots:
        readers = weights.of(slot.placeholder)
        row = _describe(pair, slot, returned, _is_weight(held, slot, bool(readers)))
        # One operator may yield several gradients, not all of which read this.
        is_leaf = len(gradients[slot.placeholder]) == 1 or len(readers) == 1
        kind = "leaf" if is_leaf else "path"
        recomputation = _recomputation(slot, keys)
        num_rows = _num_rows(slot.placeholder, readers)
        rows.append(
            replace(
                row,
                kind=kind,
                is_layer_input=bool(readers),
                num_rows=num_rows,
                is_marked=num_rows > 0 and num_rows == num_marks,
                recomputation=recomputation,
            )
        )
    return _without_harm(pair, rows)


def _without_harm(pair: GraphPair, rows: Sequence[SavedTensor]) -> list[SavedTensor]:
    """``rows``, with an obstacle where noise would pass what may make more of it."""
    placeholders = {slot.key: slot.placeholder for slot in pair.slots}
    noisy = [placeholders[row.key] for row in rows if not row.obstacle and row.dtype in FLOATS]
    unsafe = unsafe_placeholders(pair, noisy)
    return [replace(row, obstacle=row.obstacle or unsafe.get(placeholders[row.key], "")) for row in rows]


def _num_rows(placeholder: fx.Node, readers: Sequence[WeightGrad]) -> int:
    """Rows of the one matrix that all readers multiply by; 0 when there is none."""
    features = {reader.in_features for reader in readers if reader.reads_rows_of(placeholder)}
    # A layer may read features of width 0: an optional branch that is switched off.
    if len(features) != 1 or 0 in features or not all(reader.reads_rows_of(placeholder) for reader in readers):
        return 0
    return hint(placeholder.meta["val"].numel()) // features.pop()


def _is_weight(held: HeldValues, slot: Slot, is_layer_input: bool) -> bool:
    """Whether a slot's tensor is computed from parameters and buffers alone and is no activation."""
    is_held = slot.source.op != "placeholder" and held.is_held(slot.source)
    return is_held and not held.is_activation(slot.source, is_layer_input)


def _describe(pair: GraphPair, slot: Slot, returned: set[fx.Node], is_weight: bool) -> SavedTensor:
    source, value = slot.source, slot.source.meta["val"]
    role = pair.roles[source] if source.op == "placeholder" else Role.ACTIVATION
    root = storage(source)
    if root.op == "placeholder" and root is not source:
        role = pair.roles[root]
    return SavedTensor(
        key=slot.key,
        name=source.name,
        op=operator_name(source),
        module=module_path(source),
        source=source_line(source),
        shape=tuple(hint(size) for size in value.shape),
        symbolic_shape=tuple(str(size) for size in value.shape),
        dtype=value.dtype,
        numel=hint(value.numel()),
        row_length=_row_length(source),
        nbytes=hint(value.numel()) * value.element_size(),
        role=role,
        index_range=_index_range(value_chain(source)[-1]),
        obstacle=_obstacle(slot, role, root in returned, is_weight, _is_copy_of_input(pair, source)),
        movable=role in (Role.ACTIVATION, Role.BOUNDARY)
        and root not in returned
        and not _is_written_back(slot)
        and not free_unbacked_symbols(value)
        and not is_unaligned_bias(slot.placeholder),
    )


def _row_length(source: fx.Node) -> int:
    """Elements of a row of ``source``: of what a matrix product yields, or what is reduced row by row as in
    normalizations, the last dimension in memory. 0 where it has no rows, or where these are of symbolic size.
    """
    root = value_chain(source)[-1]
    own, whole = _last_in_memory(source.meta["val"]), _last_in_memory(root.meta["val"])
    if root.target in _MATRIX_PRODUCTS and whole % max(1, own) == 0:
        # Heads of one token are parts of its row.
        return whole
    return own if own and _is_reduced(root, hint(source.meta["val"].numel()) // own) else 0


def _last_in_memory(value: torch.Tensor) -> int:
    """The size of the last dimension in memory, what is expanded left out; 0 where it is symbolic or the only one."""
    layout = zip(value.shape, value.stride(), strict=True)
    sizes = [1 if guard_or_false(stride == 0) else size for size, stride in layout]
    order = storage_permutation(sizes, value.stride())
    lengths = [sizes[dim] for dim in order if not guard_or_false(sizes[dim] == 1)]
    return lengths[-1] if len(lengths) > 1 and isinstance(lengths[-1], int) else 0


def _is_reduced(node: fx.Node, num_rows: int) -> bool:
    """Whether ``node``, or what a few operators make of its elements, is reduced to ``num_rows`` numbers, or was
    multiplied by such: the backward multiplies by them once more.
    """
    if any(_numel(source) == num_rows for source in node.all_input_nodes):
        return True
    nodes, numel = {node}, hint(node.meta["val"].numel())
    for _ in range(_NEAR):
        users = {user for one in nodes for user in one.users}
        if any(_numel(user) == num_rows for user in users if operator_name(user) in _REDUCTIONS):
            return True
        nodes = {user for user in users if is_tensor(user) and _numel(user) == numel and not is_product(user)}
    return False


def _numel(node: fx.Node) -> int:
    """Elements of the first tensor that ``node`` yields."""
    value = node.meta.get("val")
    first = value[0] if isinstance(value, tuple | list) and value else value
    return hint(first.numel()) if isinstance(first, torch.Tensor) else 0


def _recomputation(slot: Slot, keys: Mapping[fx.Node, str]) -> Recomputation | None:
    nodes = cone(slot.source, keys)
    return None if nodes is None else Recomputation(num_flops(nodes), tuple(keys[node] for node in cone_inputs(nodes)))


def _obstacle(slot: Slot, role: Role, is_returned: bool, is_weight: bool, is_copy: bool) -> str:
    """Why a tensor must stay exact, or an empty string."""
    source = slot.source
    value = source.meta["val"]
    if role in (Role.PARAMETER, Role.BUFFER, Role.INPUT, Role.PADDING, Role.SEED):
        return f"the {role} is there anyway"
    if is_returned:
        return RETURNED
    if _is_written_back(slot):
        return "the backward writes it"
    if free_unbacked_symbols(value):
        return "its size is known only when it runs"
    if value.dtype in (torch.bool, *INTEGERS):
        return ""
    if not value.dtype.is_floating_point and not value.dtype.is_complex:
        return "it is narrow already"
    if value.dtype not in FLOATS:
        return f"no codec takes {str(value.dtype).removeprefix('torch.')}"
    if is_copy:
        return "it is a copy of an input that may change before the backward"
    if is_weight:
        return "it is computed from parameters alone"
    if is_statistic(source):
        return "it is a statistic: small, and an error would spread over all it sums up"
    if _carries_mask(source):
        return "it holds the huge constants of a mask"
    if is_unaligned_bias(slot.placeholder):
        return "attention's kernel needs the padding of its rows"
    return ""


def _is_written_back(slot: Slot) -> bool:
    """Whether the backward writes into the tensor itself."""
    return any(slot.placeholder in written_by(user) for user in slot.placeholder.users)


def _is_copy_of_input(pair: GraphPair, source: fx.Node) -> bool:
    """Whether ``source`` was copied from what the model reads and no codes would be stored of."""
    return is_snapshot(source) and pair.roles.get(storage(source.all_input_nodes[0])) is not Role.BOUNDARY


def is_statistic(node: fx.Node) -> bool:
    """Whether ``node`` was reduced from something much larger, pointwise steps after the reduction included."""
    node = storage(node)
    if operator_name(node).startswith(_ATTENTION):
        return node.target is operator.getitem and node.args[1:] != (0,)
    pending, seen = [node], set()
    while pending:
        # A part of a statistic is one.
        current = storage(pending.pop())
        if current in seen or current.op != "call_function":
            continue
        seen.add(current)
        numel = hint(current.meta["val"].numel()) if is_tensor(current) else 0
        above = [n for n in current.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]
        if current.target is operator.getitem:
            above = [n for source in current.all_input_nodes for n in source.all_input_nodes if is_tensor(n)]
        largest = max((hint(n.meta["val"].numel()) for n in above), default=0)
        if operator_name(current) in _REDUCTIONS:
            if largest >= _STATISTIC_RATIO * numel:
                return True
        elif largest <= numel:
            # What repeats a statistic lies in less memory, a part of one in more.
            alike = [n for n in above if hint(n.meta["val"].numel()) == numel]
            pending.extend(n for n in alike if hint(storage(n).meta["val"].numel()) >= numel)
    return False


def _carries_mask(node: fx.Node) -> bool:
    """Whether a constant as large as those of attention masks reaches ``node`` without a bounded function between."""
    pending, seen = [node], set()
    while pending:
        current = storage(pending.pop())
        if current in seen:
            continue
        seen.add(current)
        if current.op == "call_function" and current.target in _MASK_CARRIERS:
            constants = (arg for arg in current.args if isinstance(arg, float | int))
            if any(abs(constant) > _MASK_MAGNITUDE for constant in constants):
                return True
            pending.extend(current.all_input_nodes)
    return False


def _index_range(node: fx.Node) -> int | None:
    """The number of values that integers can take because of the operator that made them, if that is known."""
    while operator_name(node) in _REARRANGES:
        node = value_chain(node.all_input_nodes[0])[-1]
    producer, position = node, 0
    if node.target is operator.getitem:
        producer, position = node.all_input_nodes[0], node.args[1]  # type: ignore[assignment]
    num_dims = _INDEX_RESULTS.get((operator_name(producer), position))
    if num_dims is None:
        return None
    sizes = [upper_bound(size) for size in producer.all_input_nodes[0].meta["val"].shape[-num_dims:]]
    return None if None in sizes else math.prod(size for size in sizes if size is not None)


# Operators whose result holds elements of their first argument, and nothing else.
_REARRANGES = frozenset({"repeat", "clone", "flip", "roll", "index", "index_select", "gather", "take_along_dim"})

# (operator, result) -> how many trailing dimensions of its input the indices run over; 0 means all.
_INDEX_RESULTS: dict[tuple[str, object], int] = {
    ("max_pool2d_with_indices", 1): 2,
    ("max_pool3d_with_indices", 1): 3,
    ("adaptive_max_pool2d", 1): 2,
    ("adaptive_max_pool3d", 1): 3,
    ("argmax", 0): 0,
    ("argmin", 0): 0,
    ("topk", 1): 0,
    ("sort", 1): 0,
    ("max", 1): 0,
    ("min", 1): 0,
}


def _reached_gradients(graph: fx.Graph, order: dict[fx.Node, int]) -> dict[fx.Node, frozenset[int]]:
    """For every backward node, the positions of the gradients that it reaches."""
    reached: dict[fx.Node, frozenset[int]] = {}
    ends: dict[fx.Node, set[int]] = {}
    for position, node in enumerate(graph_outputs(graph)):
        if isinstance(node, fx.Node):
            ends.setdefault(node, set()).add(position)
    for node in sorted(order, key=order.__getitem__, reverse=True):
        positions = set(ends.get(node, ()))
        for user in node.users:
            positions |= reached.get(user, frozenset())
        reached[node] = frozenset(positions)
    return reached

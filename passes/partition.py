"""Splits the joint graph: what must be kept for the backward at all. Lossless.

    recompute="none"     what torch.compile saves
    recompute="cheap"    what is left when pointwise operators, normalizations and embeddings run again in the backward,
                         no matrix product does, and the residual stream is stored, not summed up again
    recompute="full"     the same, and graph inputs with which the backward repeats matrix products if the plan says so

What is saved is then normalised:

    1. saved(view(x))                   ->  saved(x), view again in the backward
    2. saved(a(x)), saved(b(x))         ->  saved(x) once, where a and b only rearrange x (views, clones)
    3. saved(expand(x))                 ->  saved(x), expanded again: grouped keys and values before they are repeated
    4. saved(permute(parameter))        ->  saved(parameter)

The tensor that is saved in place of others never has more elements than they have. Of graph inputs that may hold
something else by the time of the backward, copies are saved (snapshot_inputs.py).
"""

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch._functorch.config as functorch_config
from torch import fx
from torch._functorch.compile_utils import fx_graph_cse
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._guards import TracingContext, tracing

from actcompile.plan import Role

from ._fx import GraphPair, Slot, fake_mode, first_user, hint, input_index, retire
from ._views import value_chain
from .crossing import Crossing, saved_nbytes
from .drop_zero_rows import drop_zero_rows
from .pin_unstable import pin_unstable, unfold
from .recompute import offer_inputs
from .remake_copies import remake_copies
from .rerun_attention import rerun_attention
from .snapshot_inputs import mark_changing_inputs, snapshot_inputs

# Bans on recomputing that "cheap" lifts; the ban on what is used far apart stays, it keeps the residual stream.
_CHEAP = {"ban_recompute_long_fusible_chains": False, "ban_recompute_materialized_backward": False}


def partition(
    joint: fx.GraphModule,
    joint_inputs: Sequence[object],
    *,
    recompute: str,
    lossy: bool,
    input_roles: Sequence[Role],
    num_fwd_outputs: int,
    is_part: bool = False,
    static_lifetime_input_indices: Sequence[int] = (),
    **kwargs: Any,
) -> GraphPair:
    """Splits ``joint``, which it changes.

    Args:
        joint: The joint graph.
        joint_inputs: Its inputs, as AOTAutograd hands them to a partitioner.
        recompute: "none", "cheap" or "full".
        lossy: Whether saved tensors may come back with noise, so that what is unstable is computed in the
            forward and attention's backward runs on its own operands.
        input_roles: Roles of the graph's inputs.
        num_fwd_outputs: Outputs of the joint graph that belong to the forward.
        is_part: Whether other graphs of the same call read what the graph returns.
        static_lifetime_input_indices: Inputs that are there anyway, as torch has it; of these, parameters alone stay as
            they are until the backward.
        **kwargs: What else AOTAutograd hands to a partitioner.
    """
    mark_changing_inputs(joint, input_roles)
    drop_zero_rows(joint)
    cheap = recompute != "none"
    if cheap:
        _embeddings_as_indexing(joint.graph)
    settings, num_outputs = dict(_CHEAP) if cheap else {}, num_fwd_outputs
    if lossy:
        joint.graph = fx_graph_cse(joint.graph)
        num_outputs = pin_unstable(joint, num_fwd_outputs, input_roles)
        # Functions that stand in one node look alike, and have sizes that are not theirs.
        settings |= {"cse": False, "ban_recompute_reductions": False}
    lasting = [i for i in static_lifetime_input_indices if i < len(input_roles) and input_roles[i] is Role.PARAMETER]
    with functorch_config.patch(settings):
        forward, backward = min_cut_rematerialization_partition(
            joint, joint_inputs, num_fwd_outputs=num_outputs, static_lifetime_input_indices=lasting, **kwargs
        )
    for module in (forward, backward):
        unfold(module.graph)
    num_pinned = num_outputs - num_fwd_outputs
    pair = GraphPair.from_partition(forward, backward, num_fwd_outputs, num_pinned, input_roles, is_part)
    _share_saved_values(pair)
    if cheap:
        remake_copies(pair)
    if lossy:
        rerun_attention(pair)
    snapshot_inputs(pair)
    if recompute == "full":
        offer_inputs(pair)
    return pair


def is_region(joint: fx.GraphModule, input_roles: Sequence[Role]) -> bool:
    """Whether ``joint`` is what a region computes that the user had compiled once for all of its calls.

    AOTAutograd splits such subgraphs first, by the same partitioner; the seed is no input of theirs.
    """
    inputs = joint.graph.find_nodes(op="placeholder")
    return all(input_index(node) != len(input_roles) - 1 for node in inputs)


def partition_region(
    joint: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Splits a region as torch.compile does: of what it saves, the graph around it has the rows, all exact."""
    return min_cut_rematerialization_partition(joint, joint_inputs, **kwargs)  # type: ignore[no-any-return]


def _embeddings_as_indexing(graph: fx.Graph) -> None:
    """Looking up rows again costs no more than decoding them; the partitioner repeats it under this name alone."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.embedding.default):
        weight, indices = node.args[:2]
        node.target, node.args, node.kwargs = torch.ops.aten.index.Tensor, (weight, [indices]), {}


def baseline(
    joint: fx.GraphModule, joint_inputs: Sequence[object], input_roles: Sequence[Role], **kwargs: Any
) -> Callable[[], dict[Crossing | None, int]]:
    """Bytes that torch.compile would save for ``joint``, what others hold left out, once somebody asks.

    What crosses to or from other graphs is given by its place, all else under None.
    """
    untouched = fx.GraphModule(joint, _copy(joint.graph))

    @functools.cache
    def nbytes() -> dict[Crossing | None, int]:
        with _traced_again(untouched.graph):
            forward, _ = min_cut_rematerialization_partition(untouched, joint_inputs, **kwargs)
        return saved_nbytes(forward.graph, kwargs["num_fwd_outputs"], input_roles)

    return nbytes


def _traced_again(graph: fx.Graph) -> AbstractContextManager[object]:
    """What ``graph`` was traced under: the partitioner makes values of its own for random operators that it repeats."""
    mode, current = fake_mode(graph), TracingContext.try_get()
    return nullcontext() if current is not None and current.fake_mode is mode else tracing(TracingContext(mode))


def _copy(graph: fx.Graph) -> fx.Graph:
    """A copy to be partitioned, not to be run: without the calling convention of its inputs."""
    copied = fx.Graph()
    output = copied.output(copied.graph_copy(graph, {}))
    output.meta = dict(graph.output_node().meta)
    return copied


def _share_saved_values(pair: GraphPair) -> None:
    """Saves the values that several saved tensors rearrange once; see the module docstring."""
    groups: dict[fx.Node, list[Slot]] = {}
    for slot in pair.slots:
        groups.setdefault(value_chain(slot.source)[-1], []).append(slot)
    for root, slots in groups.items():
        direct = next((slot for slot in slots if slot.source is root), None)
        if direct is None and not _worth_saving(pair, root, slots):
            continue
        received = [slot.placeholder for slot in slots]
        chains = [value_chain(slot.source)[:-1] for slot in slots]
        keeper = direct or slots[0]
        placeholder = keeper.placeholder if direct else pair.replace(keeper, [root])[0]
        for slot, old, chain in zip(slots, received, chains, strict=True):
            if old is not placeholder:
                _rebuild(pair.backward.graph, chain, placeholder, old)
            if slot is not keeper:
                slot.outputs, slot.placeholders = [], []
    pair.sync()


def _worth_saving(pair: GraphPair, root: fx.Node, slots: Sequence[Slot]) -> bool:
    if root.op == "placeholder":
        return pair.roles.get(root) is Role.PARAMETER
    numel = hint(slots[0].source.meta["val"].numel())
    return len(slots) > 1 or hint(root.meta["val"].numel()) < numel


def _rebuild(graph: fx.Graph, chain: Sequence[fx.Node], root: fx.Node, old: fx.Node) -> None:
    """Applies ``chain`` (last operator first) to ``root`` right before the first user of ``old``, and drops ``old``."""
    value = root
    with graph.inserting_before(first_user(old)):
        for node in reversed(chain):
            (above,) = node.all_input_nodes
            value = graph.node_copy(node, {above: value}.__getitem__)
    retire(old, value)

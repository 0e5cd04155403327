"""What may be stored for one saved tensor, in how many bytes, and with what noise. Pure."""

import math
from dataclasses import replace
from fnmatch import fnmatchcase

import torch

from .choices import CODE_BITS, EXACT_BITS
from .config import Config
from .passes._noise import SMALLEST_GROUP
from .plan import Action, Decision, Profile, Pruning, Role, SavedTensor, Sensitivity
from .triton_kernels._topk_sizes import sparsified_nbytes
from .triton_kernels.pack_bool import packed_nbytes
from .triton_kernels.quantize import quantized_nbytes
from .triton_kernels.rows import num_kept_rows, sampled_nbytes

# Integer types from the narrowest, with the number of non-negative values each holds.
_NARROW_TYPES = ((torch.uint8, 2**8), (torch.int16, 2**15), (torch.int32, 2**31))

# Smaller tensors stay on the device: starting a transfer takes about 10 us, in which 25 GB/s move a quarter of this,
# about what codes take.
OFFLOAD_MIN_NBYTES = 2**20

NO_FEWER_BYTES = Decision(Action.KEEP, "codes would take no fewer bytes", by_size=True)
UNKNOWN_NOISE = Decision(Action.KEEP, "its sensitivity is not known: it was not rounded while the graph was probed")
RECOMPUTED = Decision(Action.RECOMPUTE, "computed again in the backward: there is no room for it")


def stored_nbytes(row: SavedTensor, decision: Decision) -> int:
    """Bytes of the device's memory that ``decision`` stores for ``row``, metadata included."""
    return 0 if decision.offload else encoded_nbytes(row, decision)


def host_nbytes(row: SavedTensor, decision: Decision) -> int:
    """Bytes of the host's memory that ``decision`` stores for ``row``, metadata included."""
    return encoded_nbytes(row, decision) if decision.offload else 0


def encoded_nbytes(row: SavedTensor, decision: Decision) -> int:
    """Bytes that ``decision`` stores for ``row``, wherever, metadata included."""
    match decision.action:
        case Action.KEEP:
            return row.nbytes
        case Action.PACK:
            return packed_nbytes(row.numel)
        case Action.NARROW:
            assert decision.dtype is not None
            return row.numel * decision.dtype.itemsize
        case Action.QUANTIZE:
            assert decision.bits is not None and decision.group_size is not None
            return quantized_nbytes(row.numel, decision.bits, decision.group_size, row.dtype)
        case Action.SPARSIFY:
            return sparsified_nbytes(row.numel, *decision.pruning, row.dtype)
        case Action.SAMPLE:
            return _sampled_nbytes(row, decision)
        case Action.PRUNE:
            assert decision.nbytes is not None
            return decision.nbytes
        case Action.RECOMPUTE:
            return 0


def _sampled_nbytes(row: SavedTensor, decision: Decision) -> int:
    assert decision.rows is not None
    num_rows = num_kept_rows(decision.rows, row.num_rows)
    numel, marks = num_rows * (row.numel // row.num_rows), packed_nbytes(row.num_rows) if decision.padded else 0
    rows = replace(decision, action=Action.KEEP if decision.bits is None else Action.QUANTIZE)
    stored = encoded_nbytes(replace(row, numel=numel, nbytes=numel * row.dtype.itemsize), rows)
    return stored + sampled_nbytes(num_rows, 0, row.dtype) + marks


def fitting_group_size(row_length: int, group_size: int) -> int:
    """The group size for rows of ``row_length`` elements where ``group_size`` is set.

    A group that holds parts of two rows would give the noise of the one with the larger range to the other, however
    much that is multiplied by: in LayerNorm by the inverse of its deviation. So groups are the largest power of two up
    to ``group_size`` that divides a row; below 64 elements, where scales and zeros would outweigh that, they stay.
    """
    divisor = math.gcd(row_length, group_size)
    return divisor if divisor >= SMALLEST_GROUP else group_size


def nbytes_at(row: SavedTensor, bits: float, config: Config) -> float:
    """Bytes of codes of ``bits``, which may lie between two widths, with scales and zeros."""
    group_size = fitting_group_size(row.row_length, config.group_size)
    without = quantized_nbytes(row.numel, 0, group_size, row.dtype)
    return without + (quantized_nbytes(row.numel, 8, group_size, row.dtype) - without) * bits / 8


def noise_of(row: SavedTensor, decision: Decision, profile: Profile, level: float | None = None) -> float:
    """What a decision adds to E|g' - g|^2, with ``level`` as of ``Sensitivity.noise``; infinite where the sensitivity
    of ``row`` to it is not known.
    """
    known = profile.sensitivities.get(row.key)
    if decision.action is Action.SAMPLE:
        return _sampling_noise(known, decision, level)
    if decision.bits is None:
        return 0.0
    if known is None:
        return math.inf
    if decision.action is Action.SPARSIFY:
        return known.pruned.get(decision.pruning, math.inf)
    return known.noise(decision.bits, level)


def _sampling_noise(known: Sensitivity | None, decision: Decision, level: float | None) -> float:
    if known is None or known.sampled is None or decision.rows is None:
        return math.inf
    # A row that is kept counts as many times more as there are others, and so does its noise.
    return known.sampled + (0.0 if decision.bits is None else known.noise(decision.bits, level) / decision.rows)


def decide(row: SavedTensor, config: Config, bits: int | None) -> Decision:
    """The decision for one row: lossless steps, and codes of ``bits`` where these help; what settings say for its
    module wins.
    """
    obstacle = row.obstacle or setting_against(row, config)
    if obstacle:
        return Decision(Action.KEEP, obstacle)
    if row.numel < config.smallest_numel:
        return Decision(Action.KEEP, f"it has fewer than {config.smallest_numel} elements (min_numel)", by_size=True)
    if row.dtype == torch.bool:
        return Decision(Action.PACK, "a mask needs one bit per element")
    if not row.dtype.is_floating_point:
        return _narrow(row)
    reason = "uniform bits until the first backward is probed" if config.automatic else "uniform bits"
    override = find_override(row, config)
    if override is not None:
        pattern, bits = override
        reason = f"its module matches {pattern!r} (overrides)"
        if bits == EXACT_BITS:
            return Decision(Action.KEEP, reason)
    if override is None and row.is_layer_input and not config.automatic:
        for pruning in config.prunings:
            pruned = sparsified(f"weight gradients alone read it (sparsity={config.sparsity:g})", row, pruning)
            if encoded_nbytes(row, pruned) < row.nbytes:
                return pruned
    if override is None and row.num_rows and config.rows is not None and not config.automatic:
        sampled = _sampled(f"weight gradients alone read it (rows={config.rows:g})", row, config, bits)
        if encoded_nbytes(row, sampled) < row.nbytes:
            return sampled
    if bits is None:
        return Decision(Action.KEEP, "the settings are lossless")
    group_size = fitting_group_size(row.row_length, config.group_size)
    decision = Decision(Action.QUANTIZE, reason + _caution(row), bits=bits, group_size=group_size)
    return decision if encoded_nbytes(row, decision) < row.nbytes else NO_FEWER_BYTES


def find_override(row: SavedTensor, config: Config) -> tuple[str, int] | None:
    """The pattern and bits that ``config.overrides`` sets for the module of ``row``."""
    return next((pair for pair in config.override_pairs if fnmatchcase(row.module, pair[0])), None)


def setting_against(row: SavedTensor, config: Config) -> str:
    """Why settings keep the tensors of this module exact, or an empty string."""
    for pattern in config.skip:
        if fnmatchcase(row.module, pattern):
            return f"its module matches {pattern!r} (skip)"
    return ""


def ways_to_store(row: SavedTensor, config: Config) -> list[Decision]:
    """What may be stored for a row that can be quantized."""
    reason = "least noise at these bytes" + _caution(row)
    group_size = fitting_group_size(row.row_length, config.group_size)
    ways = [
        *(Decision(Action.QUANTIZE, reason, bits=bits, group_size=group_size) for bits in CODE_BITS),
        *(sparsified("least noise at these bytes", row, pruning) for pruning in config.prunings),
    ]
    if row.num_rows and config.rows is not None:
        ways += [_sampled("least noise at these bytes", row, config, bits) for bits in (4, 8, None)]
    smaller = [way for way in ways if stored_nbytes(row, way) < row.nbytes]
    return [*smaller, Decision(Action.KEEP, "exact is worth its bytes")]


def _sampled(reason: str, row: SavedTensor, config: Config, bits: int | None) -> Decision:
    return Decision(
        Action.SAMPLE,
        reason + _caution(row),
        bits=bits,
        group_size=None if bits is None else fitting_group_size(row.numel // row.num_rows, config.group_size),
        rows=config.rows,
        padded=row.is_marked,
    )


def sparsified(reason: str, row: SavedTensor, pruning: Pruning) -> Decision:
    """The decision to prune ``row``."""
    keep, block, bits = pruning
    return Decision(Action.SPARSIFY, reason + _caution(row), bits=bits, keep=keep, block=block)


def may_recompute(row: SavedTensor, config: Config) -> bool:
    """Whether the backward may compute ``row`` again, from tensors that may be noisy."""
    if row.recomputation is None or row.role is not Role.ACTIVATION or not row.dtype.is_floating_point:
        return False
    if row.obstacle or row.numel < config.smallest_numel:
        return False
    return not setting_against(row, config) and find_override(row, config) is None


def may_offload(row: SavedTensor) -> bool:
    """Whether moving ``row`` to the host frees enough of the device's memory to be worth a transfer."""
    return row.movable and row.nbytes >= OFFLOAD_MIN_NBYTES


def offloaded(decision: Decision) -> Decision:
    """``decision``, with what it stores in the host's memory."""
    return replace(decision, offload=True, reason=f"{decision.reason}; in the host's memory meanwhile")


def _caution(row: SavedTensor) -> str:
    return "; memory falls once the caller drops the tensor" if row.role is Role.BOUNDARY else ""


def _narrow(row: SavedTensor) -> Decision:
    if row.index_range is None:
        return Decision(Action.KEEP, "the range of its integers is not known")
    for dtype, num_values in _NARROW_TYPES:
        if row.index_range <= num_values and dtype.itemsize < row.dtype.itemsize:
            return Decision(Action.NARROW, f"its integers lie below {row.index_range}", dtype=dtype)
    return Decision(Action.KEEP, "its integers need their width", by_size=True)

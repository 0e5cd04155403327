"""Settings: what to compress and how far."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from ._config_checks import CHECKS, check_level
from ._inductor_options import instead_of
from .choices import AUTO_PRUNINGS, CODE_BITS, DEFAULT_BITS, DEFAULT_MIN_NUMEL, EXACT_BITS, LEVELS, SPARSE_BLOCK
from .errors import ConfigError
from .plan import Action, Plan, Pruning
from .triton_kernels._topk_sizes import VALUE_BITS, num_kept

# From here on, codes lose less than pruning, except where few elements carry everything.
_MANY_BITS = 3


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the compiler; frozen and checked when made.

    Args:
        bits: Code bits per compressed element, metadata (a bf16 scale and a zero point per group) on top: 1, 2, 3, 4, 6
            or 8; with ``auto`` their mean, any number from 1 to 8. 32 keeps every tensor's own bits, so that only the
            lossless passes run. Default 4.
        memory: Bytes saved for the backward of one step: int, a string as "6GiB", or a float in (0, 1], the share of
            what torch.compile saves. Bits are chosen by sensitivities, unless ``auto`` is False. Where several
            calls share a graph or a step has several graphs, it holds from the second step on.
        noise: Predicted E|g' - g|^2 / |g|^2 over the trainable parameters: the fewest bytes that reach it.
        auto: Per-tensor bits from sensitivities, measured in the first step, which is interpreted, stores 3 bits per
            element at the least, and takes about twice the memory of a compiled one where samples meet, as in batch
            normalization (``profile`` on a small batch avoids that); otherwise all get the same.
        group_size: Elements that share one scale, at the most: a power of two from 32 to 4096. Where rows, the last
            dimension in memory, are no multiple of it, the largest power of two that divides them, so that no group
            holds parts of two; below 64 elements, and where that size is dynamic, rows share groups.
        sparsity: Share of elements dropped from what weight gradients alone read: of each 256 elements, the
            largest are stored, in ``sparse_value_bits``, and the others count as zero. Input gradients stay exact; what
            else is saved gets ``bits``. With ``auto``, which prunes where that is best anyway, no other share.
        sparse_value_bits: Bits of the values that are left: 16, 8 or 4; with ``auto``, any of them.
        pruning: "samples" repeats Back Razor for a comparison, interpreted: linear layers, convolutions, attention and
            LayerNorm store the largest elements of each sample, and drop the share ``sparsity``.
        rows: Share of the rows, those of tokens, that are stored of what weight gradients alone read, in codes of
            ``bits``: large ones for certain, others at random, weighted so that the mean is exact. The products of
            weight gradients become smaller by as much. With ``auto``, where that is best.
        padding: Name of the model's argument that is zero for padding, [batch, tokens]: only other tokens are sampled,
            and while ``rows`` is enough for them, nothing is left out. Where padding has a gradient, that of the weight
            is nan.
        recompute: "none" saves what torch.compile saves; "cheap" also recomputes what needs no matrix product; "full"
            repeats matrix products too, where ``memory`` cannot be met at 4 bits (at level L0 without loss) otherwise
            and ``offload`` is off.
        offload: Moves what is stored, codes and exact tensors, to the host's memory until the backward needs it; with
            ``memory``, which counts the device's bytes, only what does not fit at 4 bits.
        min_numel: Tensors with fewer elements stay exact. Default 4096.
        skip: Module-name patterns, as of fnmatch, whose tensors stay exact.
        overrides: Module-name pattern -> code bits of its tensors, 1, 2, 3, 4, 6 or 8, or 32 for exact, whatever the
            target or a plan says; the first pattern that matches counts. Kept as pairs.
        seed: Of the rounding noise; the default is torch.initial_seed().
        profile_every: Training steps between two probes, each an interpreted step. Bits change, and graphs are compiled
            again, where that is worth it; noise above its target raises them. Default: one probe.
        plan: A Plan, or the path of a saved one, that is followed as it is.
        check: Compares the first gradient with the exact one, and raises ``GradientError`` with a tensor's name where
            their distance is not what rounding it explains. That step is interpreted, takes as long as about ten, and
            holds what is saved exactly, too.
        level: One of GACT's names ("L0", "L1", "L1.1", "L1.2", ...); fields given beside it win.
        lowering: "inductor" compiles the graphs; "eager" interprets the same graphs, for tests and debugging.

    Raises:
        ConfigError: For a value that a field cannot have, or two that exclude each other.
    """

    bits: float | None = None
    memory: int | float | str | None = None
    noise: float | None = None
    auto: bool | None = None
    group_size: int = 256
    sparsity: float | None = None
    pruning: str = "blocks"
    sparse_value_bits: int = 16
    rows: float | None = None
    padding: str | None = None
    recompute: str = "cheap"
    offload: bool | None = None
    min_numel: int | None = None
    skip: tuple[str, ...] = ()
    overrides: Mapping[str, int] | tuple[tuple[str, int], ...] = ()
    seed: int | None = None
    profile_every: int | None = None
    plan: Plan | str | os.PathLike[str] | None = None
    check: bool = False
    level: str | None = None
    lowering: str = "inductor"
    _level_settings: Mapping[str, Any] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        check_level(self.level)
        object.__setattr__(self, "_level_settings", LEVELS[self.level] if self.level else {})
        if isinstance(self.overrides, Mapping):
            # The caller's dict may change later, and has no hash.
            object.__setattr__(self, "overrides", tuple(self.overrides.items()))
        for check in CHECKS:
            check(self)

    @classmethod
    def from_level(cls, level: str, **overrides: Any) -> "Config":
        """The settings of one of GACT's optimization levels; ``overrides`` win.

        Raises:
            ConfigError: For a level that does not exist.
        """
        return cls(level=level, **overrides)

    @classmethod
    def back_razor(cls, sparsity: float = 0.8, **settings: Any) -> "Config":
        """The settings that repeat Back Razor's rule, for a comparison.

        Args:
            sparsity: Share of each sample to drop, in [0, 1).
            **settings: Other fields, such as ``skip``.

        Raises:
            ConfigError: For a share outside of that, or a setting that the rule leaves no room for.

        Source: Jiang et al., "Back Razor", NeurIPS 2022.
        """
        return cls(pruning="samples", sparsity=sparsity, **settings)

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> "Config":
        """Settings from the ``options`` of torch.compile.

        Raises:
            ConfigError: For a key that is no field.
        """
        known = cls.names()
        for name in options:
            if name not in known:
                remedy = instead_of(name, options[name]) or f"use one of {', '.join(known)}"
                raise ConfigError(
                    f"options must be fields of actcompile.Config, mode or inductor, got {name!r}: {remedy}"
                )
        values: dict[str, Any] = dict(options)
        if isinstance(values.get("skip"), list):
            values["skip"] = tuple(values["skip"])
        return cls(**values)

    @classmethod
    def names(cls) -> list[str]:
        """Names of the settings."""
        return [f.name for f in fields(cls) if f.init]

    def setting(self, name: str) -> Any:
        """A field's value where it was given, else the level's, else None."""
        value = getattr(self, name)
        return self._level_settings.get(name) if value is None else value

    @property
    def code_bits(self) -> int | None:
        """Bits of every code while all have the same, or None when tensors keep their own."""
        average = self.average_bits
        return None if average is None else max(bits for bits in CODE_BITS if bits <= average)

    @property
    def average_bits(self) -> float | None:
        """Mean bits of all codes, or None when tensors keep their own."""
        bits = self.setting("bits")
        if bits == EXACT_BITS:
            return None
        return DEFAULT_BITS if bits is None or self.memory is not None or self.noise is not None else float(bits)

    @property
    def automatic(self) -> bool:
        """Whether every tensor gets bits of its own, by its sensitivity."""
        if self.plan is not None or self.average_bits is None:
            return False
        return bool(self.setting("auto")) or (self.auto is None and (self.memory or self.noise) is not None)

    @property
    def offloads(self) -> bool:
        """Whether what is stored may be moved to the host's memory."""
        return bool(self.setting("offload"))

    @property
    def prunings(self) -> tuple[Pruning, ...]:
        """What tensors may be pruned to, from the fewest bytes: as ``sparsity`` says, or what ``auto`` chooses from."""
        if self.sparsity is None:
            return AUTO_PRUNINGS if self.automatic else ()
        kept = num_kept(self.sparsity, SPARSE_BLOCK)
        widths = sorted(VALUE_BITS) if self.automatic else [self.sparse_value_bits]
        return tuple(Pruning(kept, SPARSE_BLOCK, bits) for bits in widths)

    @property
    def prunes_seldom(self) -> bool:
        """Whether so many bits are left on average that pruning is worth it for few tensors."""
        has_bits = self.memory is None and self.noise is None and self.sparsity is None
        return has_bits and (self.average_bits or EXACT_BITS) >= _MANY_BITS

    @property
    def lossy(self) -> bool:
        """Whether any saved tensor may come back with an error; a plan must be resolved."""
        chosen = (
            self.plan.lossy
            if isinstance(self.plan, Plan)
            else (self.code_bits, self.sparsity, self.rows) != (None, None, None)
        )
        return chosen or any(bits != EXACT_BITS for _, bits in self.override_pairs)

    @property
    def override_pairs(self) -> tuple[tuple[str, int], ...]:
        """The pairs of ``overrides``."""
        assert isinstance(self.overrides, tuple)
        return self.overrides

    @property
    def partition_mode(self) -> str:
        """What ``recompute`` says, or what the plan needs."""
        planned = isinstance(self.plan, Plan) and any(d.action is Action.RECOMPUTE for d in self.plan.values())
        return "full" if planned else self.recompute

    @property
    def smallest_numel(self) -> int:
        """Elements below which a tensor stays exact."""
        return DEFAULT_MIN_NUMEL if self.min_numel is None else self.min_numel

    def resolved(self) -> "Config":
        """These settings with the plan read from its file.

        Raises:
            ConfigError: When the file is no plan.
        """
        if self.plan is None or isinstance(self.plan, Plan):
            return self
        return replace(self, plan=Plan.load(self.plan))

"""Settings: what to compress and how far."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from .errors import ConfigError
from .plan import Action, Plan, Pruning
from .triton_kernels._topk_sizes import VALUE_BITS, num_kept

# Bits that a code can have; EXACT_BITS keeps every tensor's own bits, so that only the lossless passes run.
CODE_BITS = (1, 2, 3, 4, 6, 8)
EXACT_BITS = 32
DEFAULT_BITS = 4
DEFAULT_MIN_NUMEL = 4096

# Elements of which ``sparsity`` drops a share, and what ``auto`` chooses from: 1.2 to 2.8 bits per element in float32.
SPARSE_BLOCK = 256
AUTO_PRUNINGS = (
    Pruning(2, 16, 4),
    Pruning(2, 16, 8),
    Pruning(51, SPARSE_BLOCK, 4),
    Pruning(51, SPARSE_BLOCK, 8),
)

# GACT's optimization levels (conf.py of its release), as settings of this package.
LEVELS: Mapping[str, Mapping[str, Any]] = {
    "L0": {"bits": EXACT_BITS},
    "L1": {"bits": 4},
    "L1.1": {"bits": 8},
    "L1.2": {"bits": 2},
    "L2": {"bits": 4, "auto": True},
    "L2.1": {"bits": 3, "auto": True},
    "L2.2": {"bits": 2, "auto": True},
    "L3": {"bits": 4, "auto": True, "offload": True},
    "swap": {"bits": EXACT_BITS, "offload": True},
    "L4bit-swap": {"bits": 4, "offload": True},
}

# From here on, codes lose less than pruning, except where few elements carry everything.
_MANY_BITS = 3

RECOMPUTE = ("none", "cheap", "full")
LOWERINGS = ("inductor", "eager")
PRUNING_RULES = ("blocks", "samples")

# Back Razor's rule says by itself what is stored.
_NOT_WITH_SAMPLES = (
    *("rows", "padding"),
    *("bits", "memory", "noise", "auto", "sparse_value_bits", "offload", "min_numel", "overrides", "profile_every"),
    *("plan", "level"),
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the compiler; frozen and checked when made.

    Args:
        bits: Code bits per compressed element, metadata (a bf16 scale and a zero point per group) on top: 1, 2, 3, 4, 6
            or 8; with ``auto`` their mean, any number from 1 to 8. 32 keeps every tensor's own bits, so that only the
            lossless passes run. Default 4.
        memory: Bytes saved for the backward of one step: int, a string as "6GiB", or a float in (0, 1], the share of
            what torch.compile saves. Bits are chosen by sensitivities, unless ``auto`` is False.
        noise: Predicted E|g' - g|^2 / |g|^2 over the trainable parameters: the fewest bytes that reach it.
        auto: Per-tensor bits from sensitivities, measured in the first step, which is interpreted and takes about twice
            the memory of a compiled one where samples meet, as in batch normalization (``profile`` on a small batch
            avoids that); otherwise all get the same.
        group_size: Elements that share one scale: a power of two from 32 to 4096.
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
    level: str | None = None
    lowering: str = "inductor"
    _level_settings: Mapping[str, Any] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        _check_level(self.level)
        object.__setattr__(self, "_level_settings", LEVELS[self.level] if self.level else {})
        if isinstance(self.overrides, Mapping):
            # The caller's dict may change later, and has no hash.
            object.__setattr__(self, "overrides", tuple(self.overrides.items()))
        for check in _CHECKS:
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
        known = [f.name for f in fields(cls) if f.init]
        for name in options:
            if name not in known:
                raise ConfigError(
                    f"options must be fields of actcompile.Config, mode or inductor, got {name!r}: use one of "
                    f"{', '.join(known)}"
                )
        values: dict[str, Any] = dict(options)
        if isinstance(values.get("skip"), list):
            values["skip"] = tuple(values["skip"])
        return cls(**values)

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


def parse_nbytes(text: str) -> int:
    """Bytes of a string such as "6GiB", "512 MB" or "1048576".

    Raises:
        ConfigError: For anything else.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGT]?)(i?)B)?\s*", text)
    if match is None:
        raise ConfigError(f'memory must be a number of bytes such as "6GiB" or "500MB", got {text!r}')
    number, prefix, binary = match.groups()
    power = " KMGT".index(prefix) if prefix else 0
    return int(float(number) * (1024 if binary else 1000) ** power)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_level(level: Any) -> None:
    if level is not None and level not in LEVELS:
        raise ConfigError(f"level must be one of {', '.join(LEVELS)}, got {level!r}")


def _check_targets(config: Config) -> None:
    given = [name for name in ("bits", "memory", "noise") if getattr(config, name) is not None]
    if len(given) > 1:
        values = ", ".join(f"{name}={getattr(config, name)!r}" for name in given)
        raise ConfigError(f"at most one of bits, memory and noise can be the target, got {values}: keep one of them")
    if config.noise is not None and config.auto is False:
        raise ConfigError(f"noise needs sensitivities, got noise={config.noise!r} and auto=False: leave auto out")
    others = [*given, *(name for name in ("level", "offload", "sparsity", "rows") if getattr(config, name))]
    if config.plan is not None and others:
        raise ConfigError(f"a plan already says what is stored, got plan and {', '.join(others)}: give one of them")


def _check_bits(config: Config) -> None:
    bits = config.setting("bits")
    if bits is None:
        return
    if config.setting("auto"):
        if isinstance(bits, bool) or not isinstance(bits, int | float) or not (1 <= bits <= 8 or bits == EXACT_BITS):
            raise ConfigError(f"bits must be a mean from 1 to 8, or {EXACT_BITS} for lossless, got {bits!r}")
        return
    if isinstance(bits, bool) or not isinstance(bits, int | float) or bits not in (*CODE_BITS, EXACT_BITS):
        raise ConfigError(
            f"bits must be one of {', '.join(map(str, CODE_BITS))}, or {EXACT_BITS} for lossless, while every tensor "
            f"gets the same (auto=False), got {bits!r}: choose the nearest of them"
        )


def _check_memory(config: Config) -> None:
    memory = config.memory
    if isinstance(memory, str):
        parse_nbytes(memory)
    elif memory is not None and (isinstance(memory, bool) or not isinstance(memory, int | float) or memory <= 0):
        raise ConfigError(f'memory must be bytes, a string as "6GiB" or a float in (0, 1], got {memory!r}')
    elif isinstance(memory, float) and memory > 1:
        raise ConfigError(f"memory as a float is a share in (0, 1], got {memory!r}: give bytes as an int or a string")


def _check_numbers(config: Config) -> None:
    group_size = config.group_size
    if not _is_int(group_size) or not 32 <= group_size <= 4096 or group_size & (group_size - 1):
        raise ConfigError(f"group_size must be a power of two from 32 to 4096, got {group_size!r}: 256 is the default")
    sparsity = config.sparsity
    is_number = isinstance(sparsity, int | float) and not isinstance(sparsity, bool)
    if sparsity is not None and not (is_number and 0 <= sparsity < 1):
        raise ConfigError(f"sparsity must be a share of dropped elements in [0, 1), got {sparsity!r}: try 0.8")
    rows = config.rows
    if rows is not None and not (isinstance(rows, int | float) and not isinstance(rows, bool) and 0 < rows <= 1):
        raise ConfigError(f"rows must be a share of rows to store in (0, 1], got {rows!r}: try 0.3")
    if config.sparse_value_bits not in VALUE_BITS:
        raise ConfigError(
            f"sparse_value_bits must be one of {', '.join(map(str, VALUE_BITS))}, got {config.sparse_value_bits!r}: "
            "choose the nearest of them"
        )
    if config.noise is not None and not (isinstance(config.noise, int | float) and config.noise > 0):
        raise ConfigError(f"noise must be a positive relative variance, got {config.noise!r}: try 0.01")
    for name, least in (("min_numel", 0), ("profile_every", 1)):
        value = getattr(config, name)
        if value is not None and (not _is_int(value) or value < least):
            raise ConfigError(f"{name} must be an integer from {least} up, got {value!r}")
    if config.seed is not None and (not _is_int(config.seed) or not -(2**63) <= config.seed < 2**64):
        raise ConfigError(f"seed must be a 64-bit integer, got {config.seed!r}")


def _check_choices(config: Config) -> None:
    for name, choices in (("recompute", RECOMPUTE), ("lowering", LOWERINGS), ("pruning", PRUNING_RULES)):
        value = getattr(config, name)
        if value not in choices:
            raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    for name in ("auto", "offload"):
        value = getattr(config, name)
        if value is not None and not isinstance(value, bool):
            raise ConfigError(f"{name} must be True or False, got {value!r}")
    if not isinstance(config.skip, tuple) or not all(isinstance(pattern, str) for pattern in config.skip):
        raise ConfigError(
            f'skip must be a tuple of module-name patterns such as ("head", "*.norm"), got {config.skip!r}'
        )
    if config.plan is not None and not isinstance(config.plan, Plan | str | Path | os.PathLike):
        raise ConfigError(f"plan must be an actcompile.Plan or the path of a saved one, got {config.plan!r}")


def _check_overrides(config: Config) -> None:
    rule = 'overrides must map module-name patterns to bits, such as {"head": 8, "*.norm": 32}'
    pairs = config.overrides
    if not isinstance(pairs, tuple) or not all(isinstance(pair, tuple) and len(pair) == 2 for pair in pairs):
        raise ConfigError(f"{rule}, got {pairs!r}")
    for pattern, bits in pairs:
        if not isinstance(pattern, str):
            raise ConfigError(f"{rule}, got the pattern {pattern!r}")
        if not _is_int(bits) or bits not in (*CODE_BITS, EXACT_BITS):
            raise ConfigError(
                f"overrides must give one of {', '.join(map(str, CODE_BITS))} bits, or {EXACT_BITS} for exact, got "
                f"{bits!r} for {pattern!r}: choose the nearest of them"
            )


def _check_rows(config: Config) -> None:
    if None not in (config.rows, config.sparsity) and not config.automatic:
        raise ConfigError(
            "rows and sparsity both say what is stored of layer inputs, got "
            f"rows={config.rows!r} and sparsity={config.sparsity!r}: give one of them, or auto=True, which chooses"
        )
    if config.padding is not None and not (isinstance(config.padding, str) and config.padding.isidentifier()):
        raise ConfigError(f'padding must be the name of an argument, as "attention_mask", got {config.padding!r}')
    if config.padding is not None and config.rows is None and config.plan is None:
        raise ConfigError(
            f"padding needs the share of rows to store, got padding={config.padding!r} and rows=None: give rows=0.5, "
            "or what the longest batch needs"
        )


def _check_pruning(config: Config) -> None:
    if config.pruning != "samples":
        return
    if config.sparsity is None:
        raise ConfigError("pruning='samples' needs the share to drop, got sparsity=None: give sparsity=0.8")
    values = [(name, getattr(config, name)) for name in _NOT_WITH_SAMPLES]
    others = [f"{name}={value!r}" for name, value in values if value not in (None, False, (), _DEFAULTS[name])]
    if others:
        raise ConfigError(
            "pruning='samples' says by itself what is stored, as Back Razor does, got it beside "
            f"{', '.join(others)}: leave out one of them"
        )


_DEFAULTS: Mapping[str, Any] = {f.name: f.default for f in fields(Config)}
_CHECKS = (
    _check_targets,
    _check_bits,
    _check_memory,
    _check_numbers,
    _check_choices,
    _check_overrides,
    _check_rows,
    _check_pruning,
)

"""What settings may be, and which exclude each other: every error names rule, value and remedy."""

import os
import re
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .choices import CODE_BITS, EXACT_BITS, LEVELS, LOWERINGS, PRUNING_RULES, RECOMPUTE
from .errors import ConfigError
from .plan import Plan
from .triton_kernels._topk_sizes import VALUE_BITS

if TYPE_CHECKING:
    from .config import Config

DEFAULT_VALUE_BITS = 16
# Back Razor's rule says by itself what is stored.
_NOT_WITH_SAMPLES = (
    *("rows", "padding"),
    *("bits", "memory", "noise", "auto", "sparse_value_bits", "offload", "min_numel", "overrides", "profile_every"),
    *("plan", "level"),
)


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


def check_level(level: Any) -> None:
    if level is not None and level not in LEVELS:
        raise ConfigError(f"level must be one of {', '.join(LEVELS)}, got {level!r}")


def _check_targets(config: "Config") -> None:
    given = [name for name in ("bits", "memory", "noise") if getattr(config, name) is not None]
    if len(given) > 1:
        values = ", ".join(f"{name}={getattr(config, name)!r}" for name in given)
        raise ConfigError(f"at most one of bits, memory and noise can be the target, got {values}: keep one of them")
    if config.noise is not None and config.auto is False:
        raise ConfigError(f"noise needs sensitivities, got noise={config.noise!r} and auto=False: leave auto out")
    others = [*given, *(name for name in ("level", "offload", "sparsity", "rows") if getattr(config, name))]
    if config.plan is not None and others:
        raise ConfigError(f"a plan already says what is stored, got plan and {', '.join(others)}: give one of them")


def _check_bits(config: "Config") -> None:
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


def _check_memory(config: "Config") -> None:
    memory = config.memory
    if isinstance(memory, str):
        parse_nbytes(memory)
    elif memory is not None and (isinstance(memory, bool) or not isinstance(memory, int | float) or memory <= 0):
        raise ConfigError(f'memory must be bytes, a string as "6GiB" or a float in (0, 1], got {memory!r}')
    elif isinstance(memory, float) and memory > 1:
        raise ConfigError(f"memory as a float is a share in (0, 1], got {memory!r}: give bytes as an int or a string")


def _check_numbers(config: "Config") -> None:
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


def _check_choices(config: "Config") -> None:
    for name, choices in (("recompute", RECOMPUTE), ("lowering", LOWERINGS), ("pruning", PRUNING_RULES)):
        value = getattr(config, name)
        if value not in choices:
            raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    for name in ("auto", "offload"):
        value = getattr(config, name)
        if value is not None and not isinstance(value, bool):
            raise ConfigError(f"{name} must be True or False, got {value!r}")
    if not isinstance(config.check, bool):
        raise ConfigError(f"check must be True or False, got {config.check!r}")
    if not isinstance(config.skip, tuple) or not all(isinstance(pattern, str) for pattern in config.skip):
        raise ConfigError(
            f'skip must be a tuple of module-name patterns such as ("head", "*.norm"), got {config.skip!r}'
        )
    if config.plan is not None and not isinstance(config.plan, Plan | str | Path | os.PathLike):
        raise ConfigError(f"plan must be an actcompile.Plan or the path of a saved one, got {config.plan!r}")


def _check_overrides(config: "Config") -> None:
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


def _check_rows(config: "Config") -> None:
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


def _check_pruning(config: "Config") -> None:
    if config.pruning != "samples":
        return
    if config.sparsity is None:
        raise ConfigError("pruning='samples' needs the share to drop, got sparsity=None: give sparsity=0.8")
    defaults = {f.name: f.default for f in fields(config)}
    values = [(name, getattr(config, name)) for name in _NOT_WITH_SAMPLES]
    others = [f"{name}={value!r}" for name, value in values if value not in (None, False, (), defaults[name])]
    if others:
        raise ConfigError(
            "pruning='samples' says by itself what is stored, as Back Razor does, got it beside "
            f"{', '.join(others)}: leave out one of them"
        )


def _check_needs(config: "Config") -> None:
    """Settings that were given for the sake of another one, which is not there."""
    if config.pruning == "samples":
        return
    if config.profile_every is not None and not config.automatic:
        raise ConfigError(
            f"profile_every probes again what auto chose bits by, got profile_every={config.profile_every!r} where "
            f"nothing chooses bits (auto={config.setting('auto')!r}, bits={config.setting('bits')!r}, "
            f"plan={config.plan!r}): set auto=True, memory or noise, without a plan, or leave profile_every out"
        )
    if config.sparse_value_bits != DEFAULT_VALUE_BITS and config.sparsity is None:
        raise ConfigError(
            f"sparse_value_bits are those of values that sparsity leaves, got {config.sparse_value_bits!r} and "
            "sparsity=None: give sparsity=0.8, or leave sparse_value_bits out"
        )


def without_effect(config: "Config") -> list[str]:
    """One line for each setting that changes nothing beside the others."""
    defaults = {f.name: f.default for f in fields(config)}
    given = {name for name, default in defaults.items() if getattr(config, name, default) != default}
    found = _without_effect(config, given)
    return [
        f"{name} has no effect beside {reason}, got {name}={getattr(config, name)!r}: leave one of them out"
        for name, reason in found.items()
    ]


def _without_effect(config: "Config", given: set[str]) -> dict[str, str]:
    """Names of settings -> what takes their effect."""
    if config.pruning == "samples":
        return dict.fromkeys(sorted(given & {"check", "group_size", "recompute", "seed"}), "pruning='samples'")
    found = {}
    if config.plan is not None:
        return dict.fromkeys(sorted(given & {"auto", "group_size"}), "a plan, which says what is stored")
    if config.average_bits is None:
        lossless = f"bits={EXACT_BITS}" if config.level is None else f"level={config.level!r}"
        found.update(dict.fromkeys(sorted(given & {"noise", "auto"}), f"{lossless}, which leaves nothing to choose"))
        if not config.lossy:
            found.update(dict.fromkeys(sorted(given & {"group_size", "seed"}), f"{lossless}, which rounds nothing"))
    if config.recompute == "full" and (config.memory is None or config.offloads):
        found["recompute"] = f"memory={config.memory!r} and offload={config.offloads}: it is for memory that is not met"
    if config.automatic and "sparse_value_bits" in given:
        found["sparse_value_bits"] = "auto, which chooses among all of them"
    return found


CHECKS = (
    _check_targets,
    _check_bits,
    _check_memory,
    _check_numbers,
    _check_choices,
    _check_overrides,
    _check_rows,
    _check_pruning,
    _check_needs,
)

"""Inductor's settings among a user's options: which there are, and where they belong."""

import difflib
from collections.abc import Mapping
from typing import Any, get_origin

from .errors import ConfigError

# What interpreted graphs follow, too.
_FOR_ALL_LOWERINGS = {"fallback_random"}


def instead_of(name: str, value: Any) -> str:
    """The remedy for an option ``name`` that is one of Inductor's, or an empty string."""
    return f'it is a setting of Inductor\'s, give {{"inductor": {{{name!r}: {value!r}}}}}' if name in _known() else ""


def check_inductor(given: Any) -> None:
    """Checks names and types of Inductor's settings.

    Raises:
        ConfigError: For anything that is no dict of them.
    """
    if not isinstance(given, dict):
        raise ConfigError(
            f"inductor must be a dict of Inductor's settings, got {given!r}: "
            'give {"inductor": {"max_autotune": True}}'
        )
    known = _known()
    for name, value in given.items():
        if name not in known:
            closest = difflib.get_close_matches(str(name), known, 3, 0.5)
            raise ConfigError(
                f"inductor must hold settings of torch._inductor.config, got {name!r}: "
                + (f"the closest are {', '.join(map(repr, closest))}" if closest else "leave it out")
            )
        kind = _settings().get_type(name)
        # Types with parameters do not say what belongs to them.
        if get_origin(kind) is None and not isinstance(value, kind):
            raise ConfigError(
                f"inductor must hold values of the right types, got {name!r}: {value!r}: give a {kind.__name__}"
            )


def check_compiles(settings: Mapping[str, Any]) -> None:
    """Checks that Inductor, with ``settings``, decomposes and compiles what it is not told to leave alone.

    Raises:
        ConfigError: In mode="lite", also where the environment sets it: whole operators of torch's would run, codecs
            among them, and what they compute on the way to the backward could not be seen.
    """
    if settings.get("fallback_by_default", _settings().fallback_by_default):
        raise ConfigError(
            "mode must be one in which Inductor compiles what it can, got mode='lite' (fallback_by_default=True): "
            "leave it out, or TORCHINDUCTOR_LITE_MODE from the environment"
        )


def without_effect_beside(lowering: str, mode: str | None, inductor: Mapping[str, Any]) -> list[str]:
    """One line for each of Inductor's settings where graphs are interpreted."""
    if lowering != "eager":
        return []
    given = {"mode": mode} if mode is not None else {}
    given.update({name: value for name, value in inductor.items() if name not in _FOR_ALL_LOWERINGS})
    return [
        f"{name} is for what Inductor compiles, got {name}={value!r} beside lowering='eager', which interprets the "
        "graphs: leave one of them out"
        for name, value in given.items()
    ]


def _known() -> dict[str, Any]:
    return _settings().get_config_copy()  # type: ignore[no-any-return]


def _settings() -> Any:
    # Importing this package shall stay cheap.
    import torch._inductor.config

    return torch._inductor.config

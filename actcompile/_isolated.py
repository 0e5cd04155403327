"""Calls a model without leaving traces: what explain and profile share."""

import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FunctionType, MethodType
from typing import Any

import torch

from ._torch import own_code

_CONTAINERS = (dict, list, set)


def fresh(model: Callable[..., Any], loss: Callable[[Any], Any] | None = None) -> Callable[..., Any]:
    """``model``, and ``loss`` of what it returns, behind a function that no other call compiled."""

    def call(*args: Any, **kwargs: Any) -> Any:
        output = model(*args, **kwargs)
        return output if loss is None else loss(output)

    return own_code(call)  # type: ignore[arg-type]


def reachable_modules(model: object) -> Iterator[torch.nn.Module]:
    """The modules that ``model`` is or, when it is a function, names."""
    pending, seen = [model], set()
    while pending:
        current = pending.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        match current:
            case torch.nn.Module():
                yield current
                pending.extend(current.children())
            case MethodType():
                pending.extend((current.__self__, current.__func__))
            case functools.partial():
                pending.extend((current.func, *current.args, *current.keywords.values()))
            case FunctionType():
                named = inspect.getclosurevars(current)
                pending.extend((*named.nonlocals.values(), *named.globals.values()))


@contextmanager
def unchanged(modules: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Puts the attributes of ``modules`` back at the end, with the contents of those that are dicts, lists or sets."""
    attributes = [dict(vars(module)) for module in modules]
    contents = [
        (value, copy.copy(value)) for known in attributes for value in known.values() if isinstance(value, _CONTAINERS)
    ]
    try:
        yield
    finally:
        for value, content in contents:
            value.clear()
            value.extend(content) if isinstance(value, list) else value.update(content)
        for module, known in zip(modules, attributes, strict=True):
            vars(module).clear()
            vars(module).update(known)

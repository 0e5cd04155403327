"""What autograd's functions have saved, read from the graph that they form."""

from collections.abc import Iterator
from typing import Any

import torch

from ._torch import tree_leaves


def grad_fns(result: Any) -> list[Any]:
    """The functions that made the tensors in ``result``."""
    tensors = (leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))
    return [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]


def saved_by(function: Any) -> Iterator[torch.Tensor]:
    """The tensors that ``function`` has saved; reading them calls the hooks that they were saved with."""
    # A function written in Python has one attribute for all of them, one of torch's an attribute for each.
    for name in dir(function):
        if name.startswith("_saved_") or name == "saved_tensors":
            yield from (value for value in tree_leaves(getattr(function, name)) if isinstance(value, torch.Tensor))

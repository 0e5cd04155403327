"""How much the samples of a batch count in its gradient.

A gradient is a sum over samples, but not of equal parts: what a classifier is sure of adds next to nothing. Most
backwards first compute the gradient of what the loss reads, and all else is linear in that: noise in a sample adds what
goes with the square of its part.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, fx

from .passes._fx import is_tensor, tangent_dependent


def bottleneck(graph: fx.Graph, dims: Mapping[str, int]) -> fx.Node | None:
    """The last node of a backward with a batch that all passes through what comes from tangents; None without one.

    Args:
        graph: The backward.
        dims: Where the batch lies, by name of the node.
    """
    dependent = tangent_dependent(graph)
    position = {node: index for index, node in enumerate(graph.nodes)}
    found: fx.Node | None = None
    last_read = -1
    for node in graph.nodes:
        if node not in dependent or node.op == "output":
            continue
        if last_read > position[node] or (node.op == "placeholder" and last_read >= 0):
            # Something goes past it; of several tangents each goes past the others.
            found = None if node.op == "placeholder" else found
        elif node.name in dims and is_tensor(node) and node.meta["val"].is_floating_point():
            found = node
        last_read = max([last_read, *(position[user] for user in node.users)])
    return found


def squares(value: Tensor, dim: int, count: int) -> list[float]:
    """The sums of squares of ``count`` equal parts of ``value`` along ``dim``."""
    return [float(torch.linalg.vector_norm(part.float())) ** 2 for part in value.chunk(count, dim)]

"""What a family of models is, and how one is built from Hugging Face's configurations."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY = 512

# Builds a model in training mode whose call on the batch gives a loss, everything with the seed that is set.
Build = Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family of models.

    Args:
        name: As in the table.
        build: Makes the model and its batch.
        needs: The package that it comes from, besides torch.
        narrow: Whether it is also measured in bfloat16 and under autocast.
        quick: Whether the ordinary suite runs it.
    """

    name: str
    build: Build
    needs: str = ""
    narrow: bool = False
    quick: bool = False


class Objective(nn.Module):
    """A model with a function of its output and the rest of the batch that gives the loss."""

    def __init__(self, model: nn.Module, loss: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, x: Tensor, *targets: Tensor) -> Tensor:
        """The loss of one batch."""
        return self.loss(self.model(x), *targets)


class Named(nn.Module):
    """A model of Hugging Face's that is called with named tensors."""

    def __init__(self, model: nn.Module, names: tuple[str, ...], loss: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.model = model
        self.names = names
        self.loss = loss

    def forward(self, *values: Tensor) -> Tensor:
        """The loss of one batch."""
        return self.loss(self.model(**dict(zip(self.names, values, strict=True))))


def own_loss(output: Any) -> Tensor:
    """The loss that the model returns."""
    result: Tensor = output.loss
    return result


def mean_square(output: Any) -> Tensor:
    """Of the last hidden state, weighted so that normalization leaves a gradient."""
    state: Tensor = output.last_hidden_state.float()
    weights = torch.linspace(-1, 1, state[0].numel(), device=state.device).view(state.shape[1:])
    return (state * weights).mean() + (state.tanh() - weights).square().mean()


def from_transformers(
    kind: str,
    batch: Callable[[], Mapping[str, Tensor]],
    loss: Callable[[Any], Tensor] = own_loss,
    config: str | None = None,
    **settings: Any,
) -> Build:
    """A builder for the class ``kind`` of transformers.

    Args:
        kind: Name of the model's class.
        batch: Makes the named tensors.
        loss: What is minimized of the model's output.
        config: Name of the configuration's class; that of the model when left out.
        **settings: Fields of the configuration.
    """

    def build() -> tuple[nn.Module, tuple[Tensor, ...]]:
        import transformers

        model_class = getattr(transformers, kind)
        config_class = getattr(transformers, config) if config else model_class.config_class
        model = model_class(config_class(**settings)).train()
        values = batch()
        return Named(model, tuple(values), loss), tuple(values.values())

    return build

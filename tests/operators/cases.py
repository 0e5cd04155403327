"""Cases of PyTorch's own databases of operators (OpInfo) and modules, their inputs made activations.

Every tensor that an operator differentiates is the product of data and a constant identity matrix: its value is exact,
no pass computes it again, and so the backward reads what was stored of it. The gradient that counts is that of a zero
which is added to the data, element by element, and those of a module's parameters.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

SEED = 0


@dataclass(frozen=True, kw_only=True)
class Case:
    """One operator on one sample of its inputs.

    Args:
        name: Of the operator, its variant and the position of the sample.
        operator: Of a list of the differentiated tensors, and the others.
        data: What is differentiated.
        others: Further tensors.
        module: Whose parameters count, too.
    """

    name: str
    operator: Callable[[list[Tensor], list[Tensor]], Any]
    data: tuple[Tensor, ...]
    others: tuple[Tensor, ...]
    module: nn.Module | None = None


def operator_names() -> list[str]:
    """All operators of OpInfo that have a gradient in float32, their variants told apart by a dot."""
    return sorted({_full_name(info) for info in _operators()})


def module_names() -> list[str]:
    """All modules of the database that take float32."""
    return sorted({info.name for info in _modules()})


def operator_cases(name: str, samples: int) -> Iterator[Case]:
    """At most ``samples`` cases of an operator: the largest and some spread over all."""
    for info in _operators():
        if _full_name(info) == name:
            torch.manual_seed(SEED)
            made = list(info.sample_inputs("cpu", torch.float32, requires_grad=True))
            for position in _chosen([_numel((s.input, s.args, s.kwargs)) for s in made], samples):
                sample = made[position]
                yield _operator_case(f"{name} #{position}", info.op, sample)


def module_cases(name: str, samples: int) -> Iterator[Case]:
    """At most ``samples`` cases of a module."""
    for info in _modules():
        if info.name == name:
            torch.manual_seed(SEED)
            made = info.module_inputs_func(info, device="cpu", dtype=torch.float32, requires_grad=True, training=True)
            for position in _chosen([_numel(_arguments(m.forward_input)) for m in made], samples):
                yield _module_case(f"{name} #{position}", info.module_cls, made[position])


def _operators() -> list[Any]:
    from torch.testing._internal.common_methods_invocations import op_db

    return [info for info in op_db if info.supports_autograd and torch.float32 in info.dtypes]


def _modules() -> list[Any]:
    from torch.testing._internal.common_modules import module_db

    return [info for info in module_db if torch.float32 in info.dtypes]


def _full_name(info: Any) -> str:
    return f"{info.name}.{info.variant_test_name}" if info.variant_test_name else str(info.name)


def _numel(value: Any) -> int:
    return sum(leaf.numel() for leaf in tree_flatten(value)[0] if isinstance(leaf, Tensor))


def _chosen(numels: list[int], samples: int) -> list[int]:
    """Positions: that of the most elements, then others at equal distances."""
    if not numels:
        return []
    largest = max(range(len(numels)), key=numels.__getitem__)
    spread = [i * len(numels) // samples for i in range(samples)]
    return list(dict.fromkeys([largest, *spread, *range(len(numels))]))[:samples]


def _operator_case(name: str, operator: Callable[..., Any], sample: Any) -> Case:
    split = _Split((sample.input, sample.args, sample.kwargs))

    def call(data: list[Tensor], others: list[Tensor]) -> Any:
        value, args, kwargs = split.joined(data, others)
        return operator(value, *args, **kwargs)

    return Case(name=name, operator=call, data=split.data, others=split.others)


def _module_case(name: str, module_class: type[nn.Module], made: Any) -> Case:
    args, kwargs = _arguments(made.constructor_input)
    module = module_class(*args, **kwargs).train()
    split = _Split(_arguments(made.forward_input))

    def call(data: list[Tensor], others: list[Tensor]) -> Any:
        args, kwargs = split.joined(data, others)
        return module(*args, **kwargs)

    return Case(name=name, operator=call, data=split.data, others=split.others, module=module)


def _arguments(made: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (made.args, made.kwargs) if made is not None else ((), {})


class _Split:
    """Arguments parted into what is differentiated, other tensors, and what is neither."""

    def __init__(self, arguments: Any) -> None:
        leaves, self._spec = tree_flatten(arguments)
        self._constants = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        tensors = [(i, leaf) for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        wanted = [(i, leaf) for i, leaf in tensors if leaf.requires_grad and leaf.dtype == torch.float32]
        rest = [(i, leaf) for i, leaf in tensors if not (leaf.requires_grad and leaf.dtype == torch.float32)]
        self._wanted, self._rest = [i for i, _ in wanted], [i for i, _ in rest]
        self.data = tuple(leaf.detach().clone() for _, leaf in wanted)
        self.others = tuple(leaf.detach() for _, leaf in rest)

    def joined(self, data: list[Tensor], others: list[Tensor]) -> Any:
        """The arguments with these tensors."""
        leaves = list(self._constants)
        for position, value in zip(self._wanted, data, strict=True):
            leaves[position] = value
        for position, value in zip(self._rest, others, strict=True):
            leaves[position] = value
        return tree_unflatten(leaves, self._spec)

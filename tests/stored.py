"""What autograd really holds for the backward, whoever says how much that is."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, fx

from actcompile._saved import grad_fns, saved_by
from actcompile._torch import compile_pair, interpret_plainly


def plain(graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """A backend: torch.compile's graphs, interpreted."""
    return compile_pair(graph, inputs, partitioner=None, interpret=interpret_plainly, settings={})


def stored_nbytes(result: Any, held: Sequence[Tensor]) -> int:
    """Bytes of the memory that the functions behind ``result`` have saved, each once, what is ``held`` left out."""
    pending, seen = grad_fns(result), set()
    memory: dict[int, int] = {}
    while pending:
        function = pending.pop()
        if function in seen:
            continue
        seen.add(function)
        pending.extend(above for above, _ in function.next_functions if above is not None)
        for tensor in (*saved_by(function), *getattr(function, "_tensors_no_vc_check", ())):
            storage = tensor.untyped_storage()
            memory[storage._cdata] = storage.nbytes()
    for tensor in held:
        memory.pop(tensor.untyped_storage()._cdata, None)
    return sum(memory.values())

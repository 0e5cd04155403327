"""What a report cannot show: code that no graph has, and why; settings without an effect.

Why Dynamo left code out, and its remedy, is read from the counters that it keeps of the whole process.
"""

import re
from collections.abc import Mapping, Sequence

import torch

from . import _patterns, records
from ._torch import is_skipped_at_the_top, untraced_reasons
from .steps import Call

# Reasons that were there when reports were last forgotten.
_forgotten: dict[str, int] = {}
# Where Dynamo's own remedy is not all that it takes.
_MORE = {
    # Its operator for CPUs saves a None, which AOTAutograd refuses; seen in 2.11 to 2.15.
    "LSTM(": "for an LSTM on a CPU set torch.backends.mkldnn.enabled = False besides",
}


def notes_on(
    calls: Sequence[Call], model: torch.nn.Module | None = None, before: Mapping[str, int] | None = None
) -> list[str]:
    """Notes on a report of ``calls``.

    Args:
        calls: The calls, or none.
        model: Whose calls they are, if that is known.
        before: Dynamo's counts that are not to be reported; those of the last ``forget`` when left out.
    """
    found = untraced_reasons()
    known = _forgotten if before is None else before
    lines = [_line(reason, count - known.get(reason, 0)) for reason, count in found.items()]
    left_out = [line for line in lines if line]
    left_out += _read_by_norms(model) if left_out and model is not None else []
    notes = [f"not traced, and not compressed: {line}" for line in left_out]
    if not calls:
        notes = _reasons_for_nothing(model) + notes
    for call in calls:
        config = call.record.config
        notes += _patterns.unmatched(config, (o.record.sites for o in calls if o.record.config == config))
    return list(dict.fromkeys(notes))


def _read_by_norms(model: torch.nn.Module) -> list[str]:
    """Batch normalization without a momentum reads the number of batches so far; no setting lets Dynamo trace that."""
    kind = torch.nn.modules.batchnorm._BatchNorm
    names = [name for name, part in model.named_modules() if isinstance(part, kind) and part.momentum is None]
    return [f"{', '.join(names)}: BatchNorm(momentum=None) reads a number; give it a momentum, as 0.1"] if names else []


def _reasons_for_nothing(model: torch.nn.Module | None) -> list[str]:
    if model is not None and is_skipped_at_the_top(model):
        return [
            "Nothing is compressed: Module.compile has no effect on modules of torch's own "
            f"({type(model).__name__}), use actcompile.transform(model)"
        ]
    if records.num_without_backward and not records.finished():
        return [
            "Nothing is compressed: the graphs compiled so far need no gradient; call the model with gradients enabled "
            "and parameters that require them"
        ]
    return []


def forget() -> None:
    """Leaves out what was counted until now."""
    _forgotten.clear()
    _forgotten.update(untraced_reasons())
    _patterns.forget()


def _line(reason: str, count: int) -> str:
    """Dynamo's title, what it happened to, its explanation and the first of its hints, on one line; of 0 nothing."""
    if count <= 0:
        return ""
    title, _, rest = reason.partition("\n")
    context = _first(rest, "Developer debug context")
    parts = [
        f"{title.strip().rstrip('.')}{f' ({context})' if context else ''}",
        _first(rest, "Explanation"),
        _first(rest, "Hint"),
        *(more for sign, more in _MORE.items() if sign in context),
    ]
    return f"{count}x {'; '.join(part.rstrip('.') for part in parts if part)}"


def _first(text: str, label: str) -> str:
    found = re.search(rf"^\s*{label}: (.+?)$", text, re.MULTILINE)
    return " ".join(found.group(1).split()) if found else ""

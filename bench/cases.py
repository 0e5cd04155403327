"""Small models in the middle of training, on real data, whose noise is predicted and measured.

Dropout is off, so that all noise is that of rounding. All are interpreted (``lowering="eager"``): the graphs and the
codecs are those that get compiled.
"""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import actcompile
from actcompile import Config, Plan, records
from actcompile.choices import EXACT_BITS
from actcompile.decisions import stored_nbytes
from actcompile.plan import Action, Decision, Profile, Pruning, SavedTensor

from .data import real_batches
from .gradients import flat, gradients, train, without_dropout
from .models import WORKLOADS, Batch, Workload
from .replay import Replay, Way

SIZES: Mapping[str, Mapping[str, int]] = {
    "gpt": {"layers": 2, "batch": 4},
    "llama": {"layers": 2, "batch": 4, "width": 128},
    "bert": {"layers": 2, "batch": 8},
    "bert_plain": {"layers": 2, "batch": 8},
    "resnet18": {"batch": 8},
    "vit": {"layers": 2, "batch": 8},
    "gcn": {},
}
GROUP_SIZE = Config().group_size


@dataclass(frozen=True)
class Case:
    """A model after some training steps and the batch of the next one.

    Args:
        name: Of the workload.
        workload: The model.
        batch: One that it has not seen.
        square: |g|^2 of its exact gradient.
    """

    name: str
    workload: Workload
    batch: Batch
    square: float

    def compiled(self, **options: Any) -> Callable[..., Any]:
        """The model through this package, interpreted."""
        actcompile.reset()
        return torch.compile(self.workload.model, backend="act", options={"lowering": "eager", **options})

    def profile(self) -> tuple[Sequence[SavedTensor], Profile]:
        """Rows and sensitivities, from the first step with ``auto``."""
        call = self.compiled(auto=True)
        gradients(self.workload.model, self.workload.loss(call, self.batch))
        (record,) = records.finished()
        assert record.profile is not None
        return record.rows, record.profile

    def noise(self, call: Callable[..., Any], draws: Iterable[int]) -> list[float]:
        """|g' - g|^2 in as many training steps through ``call`` as there are ``draws``, with eager's gradient as g."""
        exact = flat(gradients(self.workload.model, self.workload.loss(self.workload.model, self.batch)))
        steps = (gradients(self.workload.model, self.workload.loss(call, self.batch)) for _ in draws)
        return [float((flat(found) - exact).square().sum()) for found in steps]

    def replay(self) -> Replay:
        """The same step with noise in chosen tensors.

        Raises:
            RuntimeError: When its exact gradient is not that of eager.
        """
        replay = Replay(self.workload, self.batch)
        square = sum(float(gradient.double().square().sum()) for gradient in replay.exact().values())
        if abs(square - self.square) > 1e-3 * self.square:
            raise RuntimeError(
                f"the interpreted graphs of {self.name} must have eager's gradient, |g|^2 = {self.square:g}, got "
                f"{square:g}: a tensor was missed"
            )
        return replay


def prepare(name: str, steps: int, data: Path) -> Case:
    """The model ``name`` after ``steps`` training steps in eager."""
    torch._dynamo.reset()
    workload, task = without_dropout(WORKLOADS[name](**SIZES[name])), name.removesuffix("_plain")
    batches = real_batches(task, workload.batch, data)
    train(task, workload, batches, steps, workload.model)
    batch = next(batches)
    square = float(flat(gradients(workload.model, workload.loss(workload.model, batch))).square().sum())
    return Case(name, workload, batch, square)


def prepare_family(name: str, steps: int) -> Case:
    """A family of tests/families with its own batch, after ``steps`` training steps on it; dropout is the same always.

    Raises:
        ValueError: For a name that no family has.
    """
    from tests.families.goals import FAMILIES

    family = next((family for family in FAMILIES if family.name == name), None)
    if family is None:
        raise ValueError(f"families must be among {', '.join(sorted(f.name for f in FAMILIES))}, got {name!r}")
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, batch = family.build()

    def apply(call: Callable[..., Any], *values: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(0)
        return call(*values)  # type: ignore[no-any-return]

    workload, optimizer = Workload(model, batch, apply), torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(steps):
        gradients(model, workload.loss(model))
        optimizer.step()
    square = float(flat(gradients(model, workload.loss(model))).square().sum())
    return Case(name, workload, batch, square)


def mean_noise(noise: Callable[[Iterable[int]], list[float]], draws: int) -> tuple[float, float, int]:
    """The mean of |g' - g|^2, its standard error, and the number of draws.

    Args:
        noise: Measures it in the draws that it is given.
        draws: The fewest; as many again are added up to eight times while the error is above 5 percent of the mean.
    """
    squares: list[float] = []
    for start in range(0, 8 * draws, draws):
        squares += noise(range(start, start + draws))
        mean, error = statistics.fmean(squares), statistics.stdev(squares) / len(squares) ** 0.5
        if error <= 0.05 * mean:
            break
    return mean, error, len(squares)


def predicted(ways: Mapping[str, Way], profile: Profile) -> float:
    """The noise of tensors that are stored in these ways; of several together more than of each alone."""
    known = [(profile.sensitivities[key], way) for key, way in ways.items() if key in profile.sensitivities]
    if len(known) == 1:
        return sum(value.pruned[way] if isinstance(way, Pruning) else value.variance[way] for value, way in known)
    level = profile.level(ways.items())
    return sum(value.pruned[way] if isinstance(way, Pruning) else value.noise(way, level) for value, way in known)


def ways_of(plan: Plan) -> dict[str, Way]:
    """Bits of the tensors that ``plan`` rounds, and what is kept of those that it prunes."""
    return {
        key: decision.pruning if decision.action is Action.SPARSIFY else decision.bits
        for key, decision in plan.items()
        if decision.bits is not None
    }


def ways_nbytes(rows: Sequence[SavedTensor], ways: Mapping[str, Way]) -> int:
    """Bytes stored for ``rows`` in these ways, scales and zero points included; those not named stay exact."""
    return sum(stored_nbytes(row, _decision(ways.get(row.key, EXACT_BITS))) for row in rows)


def _decision(way: Way) -> Decision:
    if isinstance(way, Pruning):
        return Decision(Action.SPARSIFY, "measured", bits=way.value_bits, keep=way.keep, block=way.block)
    if way == EXACT_BITS:
        return Decision(Action.KEEP, "measured")
    return Decision(Action.QUANTIZE, "measured", bits=way, group_size=GROUP_SIZE)

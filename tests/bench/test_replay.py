"""A replayed step has the gradients of a training step."""

import pytest
import torch

import actcompile
from bench.gradients import flat, gradients
from bench.models import make_gpt
from bench.replay import Replay


def test_gradients_are_those_of_training_steps() -> None:
    workload = make_gpt(layers=1, width=64, ff=128, batch=2, tokens=64)
    exact = flat(gradients(workload.model, workload.loss(workload.model)))
    replay = Replay(workload, workload.batch)
    found = torch.cat([gradient.flatten().double() for gradient in replay.exact().values()])
    # The compiler has the parameters in another order.
    torch.testing.assert_close(found.sort().values, exact.sort().values, rtol=1e-4, atol=1e-6)
    every = {row.key: 4 for row in replay.rows}
    replayed = replay.noise(every, range(16))
    actcompile.reset()
    call = torch.compile(workload.model, backend="act", options={"bits": 4, "lowering": "eager"})
    trained = [float((flat(gradients(workload.model, workload.loss(call))) - exact).square().sum()) for _ in range(16)]
    assert sum(replayed) == pytest.approx(sum(trained), rel=0.2)


def test_noise_in_one_tensor_is_all_that_changes() -> None:
    workload = make_gpt(layers=1, width=64, ff=128, batch=2, tokens=64)
    replay = Replay(workload, workload.batch)
    exact, first = replay.exact(), replay.rows[0].key
    noisy = replay.gradients({first: 2}, 0)
    assert 0 < replay.distance(noisy) == pytest.approx(replay.distance({}, noisy))
    replay.start_from({first: 2}, 0)
    assert replay.distance(noisy) == 0
    replay.start_from({}, 0)
    assert replay.distance(exact) == 0

"""A training step in the code that Inductor generates for CUDA, run in Triton's interpreter."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from actcompile._explain import traced_records
from actcompile.config import Config
from bench.models import make_gpt

from ..virtual_cuda import generate, run
from .conftest import INTERPRETED

if not INTERPRETED:
    pytest.skip("runs in Triton's interpreter", allow_module_level=True)

VOCABULARY = 64


def inputs_of(graph: fx.GraphModule) -> list[Tensor]:
    """Random parameters and tokens."""
    values = [node.meta["val"] for node in graph.graph.find_nodes(op="placeholder")]
    return [
        torch.randn(value.shape) / 16 if value.is_floating_point() else torch.randint(VOCABULARY, value.shape)
        for value in values
    ]


@pytest.mark.parametrize("recompute", ["none", "cheap"])
def test_gpt(recompute: str, tmp_path: Path) -> None:
    """What the graphs compute when each operator runs by itself."""
    workload = make_gpt(layers=1, width=256, heads=4, ff=512, vocabulary=VOCABULARY, batch=2, tokens=16)
    config = Config(bits=4, auto=False, recompute=recompute)
    (record,) = traced_records(workload.model, lambda: (workload.batch, {}), workload.batch, config)
    assert record.step is not None
    graphs: list[Any] = [record.step._forward, record.step._backward]
    forward, backward = map(copy.deepcopy, graphs)
    inputs = inputs_of(forward)
    outputs = forward(*inputs)
    saved = [*outputs[1:], torch.ones(())]

    got = run(generate(graphs[0]), inputs, tmp_path)
    torch.testing.assert_close(got[0], outputs[0])
    codes = [(a, b) for a, b in zip(got, outputs, strict=True) if a.dtype == torch.uint8]
    # Sums in another order move an element past its threshold now and then.
    assert len(codes) == {"none": 12, "cheap": 7}[recompute]
    assert all((a != b).float().mean() < 0.01 for a, b in codes)

    gradients = run(generate(graphs[1], is_backward=True), saved, tmp_path)
    for actual, expected in zip(gradients, backward(*saved), strict=True):
        assert (actual is None) == (expected is None)
        if actual is not None:
            torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-3)

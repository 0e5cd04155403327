"""What the generated code reads and writes of each saved tensor, as exact numbers."""

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from actcompile._explain import traced_records
from actcompile.config import Config
from actcompile.passes.lower import free_inputs
from bench.models import Workload, make_bert, make_gpt, make_resnet

from ..generated_code import Call, GeneratedCode
from ..virtual_cuda import CUDA, generate

pytestmark = pytest.mark.slow

ENCODERS = ("torch.ops.actcompile.quantize.default", "torch.ops.actcompile.quantize_compiled.default")
DECODER = "torch.ops.actcompile.dequantize.default"


@dataclass(frozen=True)
class Traffic:
    """Numbers of tensors, decoded ones counted once for each kernel that decodes them."""

    encoded_where_computed: int
    encoded_alone: int
    decoded_where_read: int
    decoded_alone: int
    # Of decoded tensors in memory, by generated kernels.
    reads_from_memory: int


def gpt() -> Workload:
    return make_gpt(layers=2, width=512, heads=8, ff=2048, batch=4, tokens=256)


def bert() -> Workload:
    return make_bert(layers=2)


@functools.cache
def generated(
    make: Callable[[], Workload], device: torch.device = CUDA, **options: Any
) -> tuple[GeneratedCode, GeneratedCode]:
    """Forward and backward at 4 bits; in bfloat16 on CUDA."""
    workload = make()
    dtype = torch.bfloat16 if device == CUDA else torch.float32
    workload.model.to(dtype)
    batch = tuple(value.to(dtype) if value.is_floating_point() else value for value in workload.batch)
    config = Config(bits=4, auto=False, **options)
    (record,) = traced_records(lambda *batch: workload.loss(workload.model, batch), lambda: (batch, {}), batch, config)
    assert record.step is not None
    forward, backward = record.step._forward, record.step._backward
    for node in forward.graph.find_nodes(op="call_function", target=torch.ops.actcompile.quantize.default):
        if device != CUDA:
            node.target = torch.ops.actcompile.quantize_compiled.default
    free_inputs(forward.graph)
    return generate(forward, device=device), generate(backward, is_backward=True, device=device)


def num_encoded(call: Call, code: GeneratedCode) -> int:
    """Tensors that a call encodes."""
    return code.kernels[call.name].count("= encode_tile0(") if call.is_kernel else call.name in ENCODERS


def num_decoded_alone(call: Call) -> int:
    """Tensors that a call decodes to memory, if it does nothing else."""
    if call.name == DECODER:
        return 1
    decoded = {name.rpartition("_part")[0] for name in call.reads}
    # Each has three parts and becomes one buffer.
    is_alone = call.is_kernel and len(call.reads) == 3 * len(decoded) and call.writes.total() == len(decoded)
    return len(decoded) if is_alone and "" not in decoded else 0


def measure(forward: GeneratedCode, backward: GeneratedCode) -> Traffic:
    encoders = [call for call in forward.calls if num_encoded(call, forward)]
    # Three results and nothing else.
    alone = [call for call in encoders if call.writes.total() == 3 * num_encoded(call, forward)]
    decoders = [call for call in backward.calls if num_decoded_alone(call)]
    decoded = {name for call in decoders for name in call.writes}
    kernels = [call for call in backward.calls if call.is_kernel and call not in decoders]
    return Traffic(
        encoded_where_computed=sum(num_encoded(call, forward) for call in encoders if call not in alone),
        encoded_alone=len(alone),
        decoded_where_read=sum(name.endswith("_part1") for call in kernels for name in call.reads),
        decoded_alone=sum(map(num_decoded_alone, decoders)),
        reads_from_memory=sum(call.reads[name] for call in kernels for name in decoded),
    )


# Transformers encode the inputs of LayerNorm and GELU in those operators' kernels and decode them in those of their
# backwards, two for LayerNorm. What attention and convolutions save comes from libraries and goes to libraries. Batch
# normalization runs through channels, groups do not: its result is encoded alone. What BERT's classifier picks of its
# last layer are small tensors of one token, each encoded alone.
@pytest.mark.parametrize(
    ("make", "options", "expected"),
    [
        (gpt, {"recompute": "cheap"}, Traffic(7, 8, 11, 8, 0)),
        (gpt, {"recompute": "none"}, Traffic(15, 8, 13, 15, 0)),
        (bert, {"recompute": "cheap"}, Traffic(10, 11, 13, 12, 0)),
        (make_resnet, {"recompute": "cheap"}, Traffic(2, 17, 26, 6, 0)),
    ],
)
def test_models(make: Callable[[], Workload], options: dict[str, str], expected: Traffic) -> None:
    forward, backward = generated(make, **options)
    assert measure(forward, backward) == expected


@pytest.mark.parametrize(
    ("make", "expected"),
    [(gpt, Traffic(0, 15, 17, 2, 0)), (bert, Traffic(0, 21, 13, 10, 0)), (make_resnet, Traffic(0, 19, 21, 0, 0))],
)
def test_models_on_the_cpu(make: Callable[[], Workload], expected: Traffic) -> None:
    """Each encoder reads the tensor again: most are in the cache, and its code takes no time to compile."""
    assert measure(*generated(make, torch.device("cpu"))) == expected


def test_producers_read_once_and_write_value_and_codes() -> None:
    forward, _ = generated(gpt, recompute="none")
    encoders = [call for call in forward.calls if num_encoded(call, forward)]
    assert all(count == 1 for call in encoders for count in (*call.reads.values(), *call.writes.values()))
    gelu = [call for call in encoders if "libdevice.erf" in forward.kernels[call.name]]
    for call in gelu:
        # Its input and the seed; its result and twice codes, scale and zero.
        assert (len(call.reads), len(call.writes)) == (2, 7)
    layer_norm = [call for call in encoders if "libdevice.rsqrt" in forward.kernels[call.name]]
    for call in layer_norm[1:-1]:
        # What is added to the residual stream, weight, bias and seed; the new residual stream, its normalized form,
        # mean and deviation, and twice codes, scale and zero.
        assert (len(call.reads), len(call.writes)) in ((5, 10), (6, 10))
    assert (len(gelu), len(layer_norm)) == (2, 5)
    # Layers share their kernels.
    assert len({call.name for call in gelu}) == 1


def test_cheap_recomputation_encodes_what_two_operators_read() -> None:
    """The input of GELU: a library computes it, GELU and its encoder read it together."""
    forward, _ = generated(gpt)
    gelu = [call for call in forward.calls if call.is_kernel and "libdevice.erf" in forward.kernels[call.name]]
    assert [(len(call.reads), len(call.writes), num_encoded(call, forward)) for call in gelu] == [(2, 4, 1)] * 2


def test_probabilities_of_a_vocabulary_are_encoded_where_they_are_computed() -> None:
    """The kernel of the rows' statistics holds no whole groups: it would write them to memory in float32."""
    make = functools.partial(make_gpt, layers=1, width=64, heads=2, ff=256, batch=4, tokens=256, vocabulary=5000)
    forward, _ = generated(make)
    written = re.findall(r"empty_strided_cuda\(\(1024, 5000\), .*, (.*)\)", forward.source)
    assert written == ["torch.bfloat16"]


def test_layers_share_kernels() -> None:
    forward, backward = generated(gpt)
    deeper_forward, deeper_backward = generated(
        lambda: make_gpt(layers=4, width=512, heads=8, ff=2048, batch=4, tokens=256)
    )
    assert len(deeper_forward.kernels) <= len(forward.kernels) + 1
    assert len(deeper_backward.kernels) == len(backward.kernels)

"""lower: what Inductor makes of the codecs gives the bits of the operators."""

import functools
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.compile_fx import compile_fx
from torch._inductor.utils import run_and_get_code
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from actcompile.passes import lower
from actcompile.passes.insert_codecs import insert_codecs
from actcompile.passes.lower import compiled_formats, lower_codecs
from actcompile.passes.pack_masks import pack_masks
from actcompile.plan import Action, Decision
from actcompile.triton_kernels.quantize import PLANES

from .pairs import Traced, text, trace

GROUP_SIZE = 64
LAYOUTS = {
    "one group": torch.Size([64]),
    "one element": torch.Size([1]),
    "rest": torch.Size([3, 50]),
    "rows": torch.Size([2, 3, 96]),
    "channels_last": torch.Size([2, 3, 8, 8]),
    "permuted": torch.Size([5, 6, 7]),
}


def tensor(layout: str, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(LAYOUTS[layout])
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    return (x.permute(2, 0, 1) if layout == "permuted" else x).to(dtype)


def compiled(function: Callable[..., Any], inputs: list[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return list(compile_fx(make_fx(function)(*inputs), inputs)(*inputs))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dequantize(dtype: torch.dtype) -> None:
    seed = torch.tensor(7)
    cases = [(bits, tensor(layout, dtype)) for bits in PLANES for layout in LAYOUTS]
    encoded = [torch.ops.actcompile.quantize(x, bits, GROUP_SIZE, seed, 3) for bits, x in cases]

    def decode_all(*parts: Tensor) -> list[Tensor]:
        return [
            torch.ops.actcompile.dequantize(*parts[3 * i : 3 * i + 3], bits, GROUP_SIZE, x.shape, x.stride(), x.dtype)
            for i, (bits, x) in enumerate(cases)
        ]

    parts = [part for triple in encoded for part in triple]
    for got, expected, (bits, x) in zip(compiled(decode_all, parts), decode_all(*parts), cases, strict=True):
        assert got.dtype == dtype and got.shape == x.shape and got.stride() == expected.stride(), (bits, x.shape)
        assert torch.equal(got, expected), (bits, x.shape)
        assert (got.float() - x.float()).abs().max() <= (x.float().max() - x.float().min()) / (2**bits - 1) * 1.02


@pytest.mark.slow
def test_decoding_fuses_into_what_reads_it() -> None:
    """A decoded tensor that a pointwise operator reads is never written to memory."""
    x = tensor("rest")
    codes, scale, zero = torch.ops.actcompile.quantize(x, 4, GROUP_SIZE, torch.tensor(7), 3)

    def function(codes: Tensor, scale: Tensor, zero: Tensor) -> list[Tensor]:
        decoded = torch.ops.actcompile.dequantize(codes, scale, zero, 4, GROUP_SIZE, x.shape, x.stride(), x.dtype)
        return [decoded * 2.0 + 1.0]

    torch._inductor.metrics.reset()
    (got,) = compiled(function, [codes, scale, zero])
    assert torch._inductor.metrics.generated_kernel_count == 1
    assert torch.equal(got, function(codes, scale, zero)[0])


@pytest.mark.slow
def test_rows_that_cut_groups_are_decoded_in_vectors() -> None:
    x, weight = torch.randn(8, 384), torch.randn(384)
    parts = torch.ops.actcompile.quantize(x, 4, 256, torch.tensor(7), 3)

    def scale_rows(*parts: Tensor) -> list[Tensor]:
        return [torch.ops.actcompile.dequantize(*parts, 4, 256, x.shape, x.stride(), x.dtype) * weight]

    got, (code,) = run_and_get_code(compiled, scale_rows, list(parts))
    assert "Vectorized<uint8_t>::loadu" in code and code.count("empty_strided_cpu(") == 1
    assert torch.equal(got[0], scale_rows(*parts)[0])


@pytest.mark.slow
def test_channels_that_cut_groups_are_decoded_to_memory() -> None:
    """Loops over channels stay what they are without compression: without divisions, in vectors."""
    x = torch.randn(2, 3, 6, 6)
    parts = torch.ops.actcompile.quantize(x, 4, GROUP_SIZE, torch.tensor(7), 3)

    def sum_channels(*parts: Tensor) -> list[Tensor]:
        decoded = torch.ops.actcompile.dequantize(*parts, 4, GROUP_SIZE, x.shape, x.stride(), x.dtype)
        return [(decoded - decoded.amax((0, 2, 3), keepdim=True)).sum((0, 2, 3))]

    got, (code,) = run_and_get_code(compiled, sum_channels, list(parts))
    assert "uint8_t" in code and "div_floor_integer" not in code
    torch.testing.assert_close(got, sum_channels(*parts))


@pytest.mark.slow
def test_unpack_bool() -> None:
    masks = [tensor(layout) > 0 for layout in LAYOUTS]
    packed = [torch.ops.actcompile.pack_bool(mask) for mask in masks]

    def unpack_all(*packed: Tensor) -> list[Tensor]:
        return [
            torch.ops.actcompile.unpack_bool(part, mask.shape, mask.stride())
            for part, mask in zip(packed, masks, strict=True)
        ]

    for got, mask in zip(compiled(unpack_all, packed), masks, strict=True):
        assert got.dtype == torch.bool and got.stride() == mask.stride()
        assert torch.equal(got, mask)


@pytest.mark.parametrize(
    "view", [lambda mask: mask, lambda mask: mask.t(), lambda mask: mask.t().unsqueeze(1).expand(4, 3, 8)]
)
def test_masks_written_as_bytes_are_packed_in_their_own_order(view: Callable[[Tensor], Tensor]) -> None:
    with FakeTensorMode():
        graph = make_fx(lambda x: torch.ops.actcompile.pack_bool(view(x > 0)))(torch.randn(8, 4))
    (encoder,) = graph.graph.find_nodes(op="call_function", target=torch.ops.actcompile.pack_bool.default)
    lower._pack_bytes(encoder)
    graph.recompile()
    x = torch.randn(8, 4)
    mask = view(x > 0)
    assert torch.equal(torch.ops.actcompile.unpack_bool(graph(x), mask.shape, mask.stride()), mask)


def test_attention_reads_what_was_decoded_without_copies() -> None:
    q, k, v = (torch.randn(2, 32, 48).unflatten(2, (3, 2, 8)).unbind(2)[i].transpose(1, 2) for i in range(3))
    parts = [p for x in (q, k, v) for p in torch.ops.actcompile.quantize(x, 4, GROUP_SIZE, torch.tensor(7), 3)]

    def attend_twice(*parts: Tensor) -> list[Tensor]:
        decoded = [
            torch.ops.actcompile.dequantize(*parts[i : i + 3], 4, GROUP_SIZE, q.shape, q.stride(), q.dtype)
            for i in (0, 3, 6)
        ]
        attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return [attend(*decoded)[0], attend(*decoded, is_causal=True)[0]]

    got, (code,) = run_and_get_code(compiled, attend_twice, parts)
    assert code.count("empty_strided_cpu(") == 3
    for result, expected in zip(got, attend_twice(*parts), strict=True):
        assert torch.equal(result, expected)


def test_encoders_point_to_their_compiled_bodies() -> None:
    traced = trace(lambda w, x: (x @ w).square(), torch.randn(8, 8, requires_grad=True), torch.randn(16, 8))
    plan = traced.keep_all(mm=Decision(Action.QUANTIZE, "test", bits=4, group_size=32))
    insert_codecs(traced.pair, plan)
    before = text(traced.pair.forward), text(traced.pair.backward)
    lower_codecs(traced.pair, plan)
    once = text(traced.pair.forward)
    assert once == before[0].replace("= quantize(", "= quantize_compiled(")
    assert compiled_formats(traced.pair) == [(4, 32, torch.float32)]
    assert text(traced.pair.backward) == before[1]
    lower_codecs(traced.pair, plan)
    assert text(traced.pair.forward) == once


def masked() -> Traced:
    w = torch.randn(8, 8, requires_grad=True)
    return trace(lambda w, x: torch.where(x @ w > 0, x @ w, 0.0), w, torch.ones(4, 8))


def test_masks_are_packed_from_bytes() -> None:
    traced = masked()
    plan = traced.keep_all(gt=Decision(Action.PACK, "test"))
    pack_masks(traced.pair, plan)
    lower_codecs(traced.pair, plan)
    lines = text(traced.pair.forward).splitlines()
    first = lines.index("gt = gt(mm, 0)") + 1
    assert lines[first : first + 3] == [
        "convert_element_type_default = convert_element_type(gt, float32)",
        "convert_element_type_default_1 = convert_element_type(convert_element_type_default, uint8)",
        "pack_bool_default = pack_bytes(convert_element_type_default_1)",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_masks_are_written_as_bytes(layout: str) -> None:
    x = tensor(layout)

    def pack(x: Tensor) -> list[Tensor]:
        numbers = torch.ops.prims.convert_element_type(x > 0, torch.float32)
        return [torch.ops.actcompile.pack_bytes(torch.ops.prims.convert_element_type(numbers, torch.uint8))]

    (got,), (code,) = run_and_get_code(compiled, pack, [x])
    assert "bool*" not in code
    assert torch.equal(got, torch.ops.actcompile.pack_bool(x > 0))


def test_graph_without_encoders_is_unchanged() -> None:
    traced = masked()
    plan = traced.keep_all()
    before = text(traced.pair.forward), text(traced.pair.backward)
    lower_codecs(traced.pair, plan)
    assert (text(traced.pair.forward), text(traced.pair.backward)) == before


@pytest.mark.parametrize("name", ["quantize", "quantize_compiled", "pack_bool", "quantized_weight_grad"])
def test_inductor_knows_operators_before_it_meets_them(name: str) -> None:
    code = (
        "import torch, actcompile.passes.lower as lower\n"
        "from torch._inductor.lowering import lowerings, needs_realized_inputs\n"
        f"operator = torch.ops.actcompile.{name}.default\n"
        "print(operator in lowerings and operator in needs_realized_inputs)"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


def test_libraries_get_decoders_of_their_own() -> None:
    """What a pointwise operator reads as well would otherwise be decoded to memory for both."""

    def function(codes: Tensor, scale: Tensor, zero: Tensor, weight: Tensor) -> list[Tensor]:
        x = torch.ops.actcompile.dequantize(codes, scale, zero, 4, GROUP_SIZE, [8, 64], [64, 1], torch.float32)
        return [x.t() @ weight, x.sin()]

    codes = torch.ops.actcompile.quantize(torch.randn(8, 64), 4, GROUP_SIZE, torch.tensor(7), 3)
    weight = torch.randn(8, 16)
    graph = make_fx(function)(*codes, weight)
    (decoder,) = graph.graph.find_nodes(op="call_function", target=torch.ops.actcompile.dequantize.default)
    lower._split(decoder)
    graph.recompile()
    decoders = graph.graph.find_nodes(op="call_function", target=torch.ops.actcompile.dequantize.default)
    assert [[user.name for user in decoder.users] for decoder in decoders] == [["sin"], ["t"]]
    for got, expected in zip(graph(*codes, weight), function(*codes, weight), strict=True):
        assert torch.equal(got, expected)
    for decoder in decoders:
        lower._split(decoder)
    assert len(graph.graph.find_nodes(op="call_function", target=torch.ops.actcompile.dequantize.default)) == 2


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [256, 768, 1024, 8192])
def test_fused_encoders_on_a_gpu(width: int, dtype: torch.dtype) -> None:
    """Codes that producers' kernels write have the bits of the operator; so has what readers' kernels decode."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    quantize, dequantize = torch.ops.actcompile.quantize, torch.ops.actcompile.dequantize
    x, weight = (torch.randn(*shape, device="cuda", dtype=dtype) for shape in ((512, width), (width,)))
    seed = torch.tensor(7, device="cuda")

    def encode(bits: int, x: Tensor, weight: Tensor, seed: Tensor) -> list[Tensor]:
        y = torch.nn.functional.layer_norm(x, (width,), weight)
        z = torch.nn.functional.gelu(y)
        return [y, z, *quantize(y, bits, 256, seed, 1), *quantize(z, bits, 256, seed, 2)]

    def decode(bits: int, *codes: Tensor) -> list[Tensor]:
        return [dequantize(*codes, bits, 256, [512, width], [width, 1], dtype).float() * 2.0]

    for bits in PLANES:
        y, z, *encoded = compiled(functools.partial(encode, bits), [x, weight, seed])
        expected = [*quantize(y, bits, 256, seed, 1), *quantize(z, bits, 256, seed, 2)]
        for got, one in zip(encoded, expected, strict=True):
            torch.testing.assert_close(got, one, rtol=0, atol=0)
        (got,), (one,) = compiled(functools.partial(decode, bits), expected[:3]), decode(bits, *expected[:3])
        torch.testing.assert_close((got / 2.0).to(dtype), (one / 2.0).to(dtype), rtol=0, atol=0)

"""Kernels that Inductor generates around encoders and decoders, compiled as in ``offline``: offline_generated.csv.

    python -m tests.triton_kernels.offline_generated    writes it anew

The kernels are GELU that encodes its input and its result; LayerNorm that does so after adding to the residual stream;
and GELU's backward that decodes its input.
"""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from triton.compiler import ASTSource, compile

import actcompile.passes.lower  # noqa: F401  lowers the operators
from actcompile.triton_kernels.quantize import PLANES

from ..virtual_cuda import generate, kernels_loaded, trace
from .offline import TARGETS, VERSIONS, Case, write_table

TABLE = Path(__file__).with_suffix(".csv")
GENERATED_VERSIONS = f"{VERSIONS}, torch {torch.__version__.partition('+')[0]}"

GROUP_SIZE = 256
ROWS, WIDTH = 16384, 1024
WIDTHS = {"layer_norm_quantize": WIDTH, "layer_norm_4096_quantize": 4096, "layer_norm_8192_quantize": 8192}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
quantize, dequantize = torch.ops.actcompile.quantize, torch.ops.actcompile.dequantize

# What Inductor's heuristics might choose where it is not fixed.
_BLOCKS = {"pointwise": {"XBLOCK": 1024, "num_warps": 4}}


def cases() -> Iterator[Case]:
    """All rows of the table."""
    for kernel in ("gelu_quantize", *WIDTHS, "dequantize_gelu_backward"):
        for target in ("sm_80", "sm_90"):
            yield from (Case(kernel, bits, "bf16", target) for bits in PLANES)
            yield from (Case(kernel, 4, dtype, target) for dtype in DTYPES if dtype != "bf16")


def compile_case(case: Case) -> Any:
    """Generates the kernel and compiles it."""
    function, inputs = _describe(case)
    ((name, source),) = generate(trace(function, *inputs)).kernels.items()
    with tempfile.TemporaryDirectory() as folder, kernels_loaded(Path(folder), lambda *loaded: loaded) as load:
        kernel, heuristic, options = load(None, name, source)
        blocks = dict(options.get("config") or _BLOCKS[heuristic])
        num_warps = blocks.pop("num_warps")
        constants = {name: size for name, size in blocks.items() if name in kernel.arg_names}
        types = options["triton_meta"]["signature"]
        signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
        source = ASTSource(kernel, signature, constants, options["triton_meta"]["configs"][0])
        return compile(source, target=TARGETS[case.target], options={"num_warps": num_warps})


def _describe(case: Case) -> tuple[Callable[..., Any], list[Tensor]]:
    dtype, seed = DTYPES[case.dtype], torch.tensor(0)

    def encode(x: Tensor, y: Tensor, seed: Tensor) -> list[Tensor]:
        return [y, *quantize(x, case.bits, GROUP_SIZE, seed, 1), *quantize(y, case.bits, GROUP_SIZE, seed, 2)]

    def gelu(x: Tensor, seed: Tensor) -> list[Tensor]:
        return encode(x, F.gelu(x), seed)

    def layer_norm(x: Tensor, y: Tensor, weight: Tensor, seed: Tensor) -> list[Tensor]:
        x = x + y
        return [x, *encode(x, F.layer_norm(x, weight.shape, weight), seed)]

    def gelu_backward(grad: Tensor, *codes: Tensor) -> list[Tensor]:
        x = dequantize(*codes, case.bits, GROUP_SIZE, grad.shape, grad.stride(), grad.dtype)
        return [torch.ops.aten.gelu_backward(grad, x)]

    x = torch.empty(ROWS, WIDTHS.get(case.kernel, WIDTH), dtype=dtype)
    if case.kernel in WIDTHS:
        return layer_norm, [x, x, x[0], seed]
    if case.kernel == "gelu_quantize":
        return gelu, [x, seed]
    groups = ROWS * WIDTH // GROUP_SIZE
    codes = torch.empty(groups * GROUP_SIZE * case.bits // 8, dtype=torch.uint8)
    return gelu_backward, [x, codes, torch.empty(groups, dtype=torch.bfloat16), torch.empty(groups, dtype=dtype)]


if __name__ == "__main__":
    write_table(TABLE, ((case, compile_case(case)) for case in cases()), GENERATED_VERSIONS)

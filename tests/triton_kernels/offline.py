"""Compiles kernels without a GPU, and what the compiled code takes: the rows of offline.csv.

    python -m tests.triton_kernels.offline    writes offline.csv anew

A row holds, per thread, the registers, the bytes spilled to memory, and the loads and stores of global memory as
"number x bits" (copies of global to shared memory count as loads); per program, its warps and the bytes of shared
memory. The kernel of weight gradients has a row for each of its tiles, rows x outputs x inputs; those of pruning have
"keep:block" in their names and the bits of their values.
"""

import csv
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from actcompile.triton_kernels import (
    _pack_bool_kernel,
    _positions_kernel,
    _quantize_kernel,
    _topk_kernel,
    _weight_grad_kernel,
)
from actcompile.triton_kernels.quantize import PLANES

TABLE = Path(__file__).with_suffix(".csv")
VERSIONS = f"triton {triton.__version__}"
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = ("fp32", "bf16", "fp16")
CODECS = {
    "quantize": (_quantize_kernel._quantize_kernel, _quantize_kernel.QUANTIZE_ELEMENTS_PER_THREAD),
    "dequantize": (_quantize_kernel._dequantize_kernel, _quantize_kernel.DEQUANTIZE_ELEMENTS_PER_THREAD),
}
MASKS = {"pack_bool": _pack_bool_kernel._pack_bool_kernel, "unpack_bool": _pack_bool_kernel._unpack_bool_kernel}
SPARSE = {
    "sparsify 51:256": _topk_kernel._sparsify_kernel,
    "densify 51:256": _topk_kernel._densify_kernel,
    "sparsify 2:16": _positions_kernel._sparsify_positions_kernel,
    "densify 2:16": _positions_kernel._densify_positions_kernel,
    "sparsify 2:4": _positions_kernel._sparsify_positions_kernel,
    "densify 2:4": _positions_kernel._densify_positions_kernel,
}
# Bits of values and dtypes: each width, each dtype and each way to store them once.
SPARSE_FORMATS = {"51:256": ((16, "fp32"), (8, "bf16"), (4, "bf16")), "2:16": ((4, "bf16"),), "2:4": ((16, "fp16"),)}
WEIGHT_GRADS = {
    "weight_grad {BLOCK_M}x{BLOCK_N}x{BLOCK_K}".format(**config.kwargs): config
    for config in (*_weight_grad_kernel.HALF_CONFIGS, *_weight_grad_kernel.FULL_CONFIGS)
}
WIDE = [name for name, config in WEIGHT_GRADS.items() if _weight_grad_kernel.is_wide(config)]
# Their dtypes differ in the instruction that multiplies alone, so that all bits are compiled for one of them.
WEIGHT_GRAD_BITS = {"bf16": tuple(PLANES), "fp16": (4,), "fp32": (4, 6)}
_TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# Width of an access in AMD's assembly.
_AMD_BITS = {"byte": 8, "short": 16, "dword": 32, "dwordx2": 64, "dwordx3": 96, "dwordx4": 128}


class Case(NamedTuple):
    """One kernel as its launcher compiles it: the key of a row. Masks have 1 bit and the dtype "u8"."""

    kernel: str
    bits: int
    dtype: str
    target: str


def cases() -> Iterator[Case]:
    """All rows of the table."""
    for target in TARGETS:
        for kernel in CODECS:
            yield from (Case(kernel, bits, dtype, target) for bits in PLANES for dtype in DTYPES)
        yield from (Case(kernel, 1, "u8", target) for kernel in MASKS)
        for kernel in SPARSE:
            yield from (Case(kernel, bits, dtype, target) for bits, dtype in SPARSE_FORMATS[kernel.split()[1]])
        for kernel, config in WEIGHT_GRADS.items():
            for dtype, widths in WEIGHT_GRAD_BITS.items():
                if config in _weight_grad_kernel.CONFIGS[_TORCH_DTYPES[dtype]]:
                    yield from (Case(kernel, bits, dtype, target) for bits in widths)


def compile_case(case: Case, group_size: int = 256, aligned: bool = True, parts: bool = False) -> Any:
    """Compiles as a launch would: pointers, and sizes if ``aligned``, are multiples of 16.

    ``parts`` are those of a weight gradient whose rows are split, stored the other way round.
    """
    describe = _describe_weight_grad if case.kernel in WEIGHT_GRADS else _describe_codec
    describe = _describe_sparse if case.kernel in SPARSE else describe
    kernel, options, types = describe(case, group_size)
    if parts:
        options |= {"TRANSPOSED": True}
        types |= {"out_ptr": "*fp32"}
    constants = {name: value for name, value in options.items() if name in kernel.arg_names}
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    # The columns of a weight gradient are whole groups; wide tiles are for sizes that are aligned, but for the rows.
    always = {"K", "N", "stride_m"} if case.kernel in WIDE else {"K"}
    sizes = always | {"n", "nbytes", "M", "N", "split_rows", "stride_m"} if aligned else always
    divisible = [name for name in types if name.endswith("_ptr") or name in sizes]
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in divisible if name in signature}
    source = ASTSource(kernel, signature, constants, attributes)
    backend_options = {name: value for name, value in options.items() if name not in constants}
    return compile(source, target=TARGETS[case.target], options=backend_options)


def _describe_codec(case: Case, group_size: int) -> tuple[Any, dict[str, Any], dict[str, str]]:
    """Kernel, constants and options, types of the other arguments."""
    if case.kernel in MASKS:
        types = {"mask_ptr": "*u8", "packed_ptr": "*u8", "n": "i64", "nbytes": "i64"}
        return MASKS[case.kernel], {"BLOCK": _pack_bool_kernel.BLOCK}, types
    kernel, elements_per_thread = CODECS[case.kernel]
    options = _quantize_kernel.launch_options(case.bits, group_size, elements_per_thread)
    types = {"x_ptr": f"*{case.dtype}", "seed_ptr": "*i64", "codes_ptr": "*u8", "scale_ptr": "*bf16"}
    return kernel, options, types | {"zero_ptr": f"*{case.dtype}", "salt_key": "i64", "n": "i64", "num_groups": "i64"}


def _describe_sparse(case: Case, group_size: int) -> tuple[Any, dict[str, Any], dict[str, str]]:
    """The same; the kernel's name says what a group is."""
    keep, block = map(int, case.kernel.split()[1].split(":"))
    types = {"x_ptr": f"*{case.dtype}", "seed_ptr": "*i64", "index_ptr": "*u8", "scale_ptr": "*bf16"}
    types |= {"values_ptr": "*u8" if case.bits < 16 else "*fp16" if case.dtype == "fp16" else "*bf16"}
    types |= {"zero_ptr": f"*{case.dtype}", "salt_key": "i64", "n": "i64", "num_groups": "i64"}
    return SPARSE[case.kernel], _topk_kernel.launch_options(keep, block, case.bits), types


def _describe_weight_grad(case: Case, group_size: int) -> tuple[Any, dict[str, Any], dict[str, str]]:
    """The same for a contiguous gradient, of whose stride of 1 a launch makes a constant."""
    options = _weight_grad_kernel.format_options(case.bits, group_size, transposed=False)
    options |= {"stride_n": 1, **WEIGHT_GRADS[case.kernel].all_kwargs()}
    types = {"grad_ptr": f"*{case.dtype}", "codes_ptr": "*u8", "scale_ptr": "*bf16", "zero_ptr": f"*{case.dtype}"}
    types |= {"out_ptr": f"*{case.dtype}", **dict.fromkeys(("M", "N", "K", "split_rows", "stride_m"), "i32")}
    return _weight_grad_kernel._weight_grad_kernel, options, types


def read_row(compiled: Any) -> dict[str, str]:
    """What the compiled code takes."""
    registers, spilled_nbytes = (_amd_usage if "amdgcn" in compiled.asm else _nvidia_usage)(compiled)
    accesses = _amd_accesses if "amdgcn" in compiled.asm else _nvidia_accesses
    return {
        "warps": str(compiled.metadata.num_warps),
        "registers": registers,
        "spilled_nbytes": spilled_nbytes,
        "shared_nbytes": str(compiled.metadata.shared),
        "loads": _histogram(accesses(compiled, "load")),
        "stores": _histogram(accesses(compiled, "store")),
    }


def _histogram(widths: list[int]) -> str:
    return " ".join(f"{count}x{bits}" for bits, count in sorted(Counter(widths).items(), reverse=True))


def _nvidia_usage(compiled: Any) -> tuple[str, str]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", cubin.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    numbers = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    return numbers["REG"], str(int(numbers["STACK"]) + int(numbers["LOCAL"]))


def _nvidia_accesses(compiled: Any, direction: str) -> list[int]:
    ptx = compiled.asm["ptx"]
    pattern = {"load": "ld", "store": "st"}[direction] + r"\.global[\w.:]*?(?:\.v(\d))?\.[bsuf](\d+)"
    copied = re.findall(r"cp\.async\.c[ag]\.shared\.global.*?, (0x\w+|\d+),", ptx) if direction == "load" else []
    widths = [int(count or 1) * int(bits) for count, bits in re.findall(pattern, ptx)]
    return widths + [8 * int(nbytes, 0) for nbytes in copied]


def _amd_usage(compiled: Any) -> tuple[str, str]:
    numbers = dict(re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s+(\d+)", compiled.asm["amdgcn"]))
    return numbers["vgpr_count"], numbers["private_segment_fixed_size"]


def _amd_accesses(compiled: Any, direction: str) -> list[int]:
    pattern = rf"\s(?:global|buffer|flat)_{direction}_[us]?(byte|short|dword(?:x\d)?)"
    return [_AMD_BITS[width] for width in re.findall(pattern, compiled.asm["amdgcn"])]


def read_table(path: Path = TABLE) -> tuple[str, dict[Case, dict[str, str]]]:
    """The versions of what compiled a table, and its rows."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    versions = {row.pop("versions") for row in rows}
    assert len(versions) == 1, versions
    keys = [Case(row.pop("kernel"), int(row.pop("bits")), row.pop("dtype"), row.pop("target")) for row in rows]
    return versions.pop(), dict(zip(keys, rows, strict=True))


def write_table(path: Path, compiled: Iterable[tuple[Case, Any]], versions: str = VERSIONS) -> None:
    """Writes a table anew."""
    rows = [case._asdict() | read_row(kernel) | {"versions": versions} for case, kernel in compiled]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    write_table(TABLE, ((case, compile_case(case)) for case in cases()))

"""Compiles kernels without a GPU, and what the compiled code takes: the rows of offline.csv.

    python -m tests.triton_kernels.offline    writes offline.csv anew

A row holds, per thread, the registers, the bytes spilled to memory, and the loads and stores of global memory as
"number x bits"; per program, its warps and the bytes of shared memory.
"""

import csv
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from actcompile.triton_kernels import _pack_bool_kernel, _quantize_kernel
from actcompile.triton_kernels.quantize import PLANES

TABLE = Path(__file__).with_suffix(".csv")
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


def compile_case(case: Case, group_size: int = 256, aligned: bool = True) -> Any:
    """Compiles as a launch would: pointers, and sizes if ``aligned``, are multiples of 16."""
    if case.kernel in MASKS:
        kernel, options = MASKS[case.kernel], {"BLOCK": _pack_bool_kernel.BLOCK}
        types = {"mask_ptr": "*u8", "packed_ptr": "*u8", "n": "i64", "nbytes": "i64"}
    else:
        kernel, elements_per_thread = CODECS[case.kernel]
        options = _quantize_kernel.launch_options(case.bits, group_size, elements_per_thread)
        types = {"x_ptr": f"*{case.dtype}", "seed_ptr": "*i64", "codes_ptr": "*u8", "scale_ptr": "*bf16"}
        types |= {"zero_ptr": f"*{case.dtype}", "salt_key": "i64", "n": "i64", "num_groups": "i64"}
    constants = {name: value for name, value in options.items() if name in kernel.arg_names}
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    divisible = [name for name in types if name.endswith("_ptr") or (aligned and name in ("n", "nbytes"))]
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in divisible if name in signature}
    source = ASTSource(kernel, signature, constants, attributes)
    backend_options = {name: value for name, value in options.items() if name not in constants}
    return compile(source, target=TARGETS[case.target], options=backend_options)


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
    pattern = {"load": "ld", "store": "st"}[direction] + r"\.global[\w.:]*?(?:\.v(\d))?\.[bsuf](\d+)"
    return [int(count or 1) * int(bits) for count, bits in re.findall(pattern, compiled.asm["ptx"])]


def _amd_usage(compiled: Any) -> tuple[str, str]:
    numbers = dict(re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s+(\d+)", compiled.asm["amdgcn"]))
    return numbers["vgpr_count"], numbers["private_segment_fixed_size"]


def _amd_accesses(compiled: Any, direction: str) -> list[int]:
    pattern = rf"\s(?:global|buffer|flat)_{direction}_[us]?(byte|short|dword(?:x\d)?)"
    return [_AMD_BITS[width] for width in re.findall(pattern, compiled.asm["amdgcn"])]


def read_table() -> tuple[str, dict[Case, dict[str, str]]]:
    """The version of Triton that compiled the table, and its rows."""
    with TABLE.open(newline="") as file:
        rows = list(csv.DictReader(file))
    versions = {row.pop("triton") for row in rows}
    assert len(versions) == 1, versions
    keys = [Case(row.pop("kernel"), int(row.pop("bits")), row.pop("dtype"), row.pop("target")) for row in rows]
    return versions.pop(), dict(zip(keys, rows, strict=True))


def main() -> None:
    """Compiles everything and writes the table."""
    rows = [case._asdict() | read_row(compile_case(case)) | {"triton": triton.__version__} for case in cases()]
    with TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()

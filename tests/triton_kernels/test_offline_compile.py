"""Every kernel compiled for sm_80 and sm_90 without a GPU: nothing spills, and the arithmetic stays IEEE."""

import re
import subprocess
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from actcompile.triton_kernels.quantize import PLANES

from .conftest import INTERPRETED

triton = pytest.importorskip("triton")
if INTERPRETED:
    pytest.skip("compiles kernels, which the interpreter replaces", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource, compile  # noqa: E402

from actcompile.triton_kernels import _pack_bool_kernel, _quantize_kernel  # noqa: E402

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
ARCHITECTURES = (80, 90)
DTYPES = ("fp32", "bf16", "fp16")
ELEMENTS_PER_THREAD = {
    _quantize_kernel._quantize_kernel: _quantize_kernel.QUANTIZE_ELEMENTS_PER_THREAD,
    _quantize_kernel._dequantize_kernel: _quantize_kernel.DEQUANTIZE_ELEMENTS_PER_THREAD,
}


@pytest.fixture(autouse=True)
def _fresh_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))


def compile_for(kernel: Any, types: dict[str, str], options: dict[str, Any], arch: int, aligned: bool = True) -> Any:
    """Compiles as a launch would: pointers, and sizes if ``aligned``, are multiples of 16."""
    constants = {name: value for name, value in options.items() if name in kernel.arg_names}
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    divisible = [name for name in types if name.endswith("_ptr") or (aligned and name in ("n", "nbytes"))]
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in divisible if name in signature}
    source = ASTSource(kernel, signature, constants, attributes)
    backend_options = {name: value for name, value in options.items() if name not in constants}
    return compile(source, target=GPUTarget("cuda", arch, 32), options=backend_options)


def compile_codec(kernel: Any, bits: int, dtype: str, arch: int, group_size: int = 256, aligned: bool = True) -> Any:
    """Compiles a kernel of ``quantize`` as its launcher would."""
    types = {"x_ptr": f"*{dtype}", "seed_ptr": "*i64", "codes_ptr": "*u8", "scale_ptr": "*bf16"}
    types |= {"zero_ptr": f"*{dtype}", "salt_key": "i64", "n": "i64", "num_groups": "i64"}
    options = _quantize_kernel.launch_options(bits, group_size, ELEMENTS_PER_THREAD[kernel])
    return compile_for(kernel, types, options, arch, aligned)


def assert_in_registers(compiled: Any, folder: Path) -> None:
    """No stack and no local memory: nothing spilled."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    usage = subprocess.run([CUOBJDUMP, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True)
    numbers = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage.stdout))
    assert numbers["STACK"] == numbers["LOCAL"] == "0", usage.stdout
    assert 0 < int(numbers["REG"]) <= 128, usage.stdout


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", PLANES)
def test_codecs(bits: int, dtype: str, arch: int, tmp_path: Path) -> None:
    for kernel in ELEMENTS_PER_THREAD:
        compiled = compile_codec(kernel, bits, dtype, arch)
        assert_in_registers(compiled, tmp_path)
        # What bit-exactness rests on.
        ptx = compiled.asm["ptx"]
        assert "fma." not in ptx
        assert ".ftz" not in ptx
        assert ".approx" not in ptx
        encodes = kernel is _quantize_kernel._quantize_kernel
        assert ("div.rn.f32" in ptx) == encodes
        # The interpreter, whose minima and maxima all pass nan on, cannot tell these.
        assert ("max.NaN.f32" in ptx) == encodes
        assert "min.NaN.f32" not in ptx


@pytest.mark.parametrize("group_size", [32, 64, 1024, 16384])
def test_group_sizes(group_size: int, tmp_path: Path) -> None:
    for kernel, bits in product(ELEMENTS_PER_THREAD, (1, 8)):
        assert_in_registers(compile_codec(kernel, bits, "bf16", 90, group_size), tmp_path)


def test_sizes_that_are_no_multiple_of_16(tmp_path: Path) -> None:
    for kernel in ELEMENTS_PER_THREAD:
        assert_in_registers(compile_codec(kernel, 4, "fp32", 90, aligned=False), tmp_path)


def test_masks_keep_wide_loads_and_stores() -> None:
    encode, decode = (compile_codec(kernel, 4, "bf16", 90).asm["ptx"] for kernel in ELEMENTS_PER_THREAD)
    assert "ld.global.v4.b32" in encode
    assert "st.global.v4.b32" in decode


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("name", ["_pack_bool_kernel", "_unpack_bool_kernel"])
def test_pack_bool(name: str, aligned: bool, arch: int, tmp_path: Path) -> None:
    types = {"mask_ptr": "*u8", "packed_ptr": "*u8", "n": "i64", "nbytes": "i64"}
    options = {"BLOCK": _pack_bool_kernel.BLOCK}
    compiled = compile_for(getattr(_pack_bool_kernel, name), types, options, arch, aligned)
    assert_in_registers(compiled, tmp_path)

"""Which weight gradients to decode inside of the product: measured times, kept per device.

For one product of a decoded tensor the kernel of ``weight_grad`` competes with "decode, then multiply"; for several,
their kernels together with one decoding and all products. Times come from, in this order:

    1. the user's table, in Inductor's cache directory, of this very kernel, torch and Triton
    2. the table that the package ships, ``weight_grad_times.csv``
    3. a measurement on random data, when a graph is compiled that needs it; it extends the user's table

Keys are exact: device, sizes, bits, group size, dtype and layout. Without a time, on other devices than CUDA, and for
float32 where torch multiplies in TF32, the answer is "decode, then multiply".

The answer changes the order of summation in a gradient, so its last bits, and nothing else: ranks that measured
differently disagree by no more than two devices do. A table is replaced in one step; of two ranks that write at the
same time, one's row is lost and measured again some day.
"""

import csv
import functools
import hashlib
import importlib.metadata
import logging
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

# Seen in torch 2.11 to 2.15.
from torch._inductor.runtime.cache_dir_utils import cache_dir
from torch._subclasses.fake_tensor import unset_fake_temporarily

from .quantize import num_groups

log = logging.getLogger(__name__)

SHIPPED = Path(__file__).with_name("weight_grad_times.csv")

# Older GPUs have no matrix units for what the kernel multiplies.
MIN_CAPABILITY = (8, 0)


class Product(NamedTuple):
    """A weight gradient [out_features, in_features], or transposed, that sums over ``rows``: the key of a time."""

    device: str
    rows: int
    out_features: int
    in_features: int
    bits: int
    group_size: int
    dtype: str
    transposed: int


class Times(NamedTuple):
    """Milliseconds: decoding inside of the product; decoding and then multiplying; decoding alone."""

    inside_ms: float
    apart_ms: float
    decode_ms: float


Table = dict[tuple[str, ...], Times]


def inside_pays(products: Sequence[Product], device: torch.device) -> bool:
    """Whether the kernels of all ``products`` of one decoded tensor beat decoding it once and multiplying."""
    times = [known for product in products if (known := find_times(product, device)) is not None]
    if len(times) < len(products):
        return False
    decoded_once_ms = sum(known.apart_ms for known in times) - sum(known.decode_ms for known in times[1:])
    return sum(known.inside_ms for known in times) < decoded_once_ms


def device_name(device: torch.device) -> str:
    """What tables call ``device``."""
    return torch.cuda.get_device_name(device) if is_measurable(device) else device.type


def is_measurable(device: torch.device) -> bool:
    """Whether the kernel runs on ``device``, here and now."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability(device) >= MIN_CAPABILITY


def find_times(product: Product, device: torch.device) -> Times | None:
    """Times of ``product`` from a table or, on its device, from a measurement that is then kept."""
    multiplies_in_tf32 = product.dtype == "float32" and torch.backends.cuda.matmul.fp32_precision == "tf32"
    if not is_measurable(device) or multiplies_in_tf32:
        return None
    row_key, known = key(product), _known()
    if row_key not in known:
        measured = _measure_or_explain(product, device)
        if measured is None:
            return None
        known[row_key] = measured
        extend_table(user_table(), {row_key: measured})
        log.info("%s: %s", product, measured)
    return known[row_key]


def _measure_or_explain(product: Product, device: torch.device) -> Times | None:
    from triton.errors import TritonError

    try:
        return measure(product, device)
    except (RuntimeError, TritonError) as error:
        # Out of memory, or a kernel that does not compile for this device: neither may stop the training.
        log.warning("%s could not be measured, so it is decoded before the product: %s", product, error)
        return None


def measure(product: Product, device: torch.device) -> Times:
    """Times ``product`` on random data, whichever mode of tracing surrounds the call."""
    from triton.testing import do_bench

    with unset_fake_temporarily(), torch.no_grad(), torch.cuda.device(device):
        runs = candidates(product, device)
        return Times(*(do_bench(run, return_mode="median") for run in runs))


def candidates(product: Product, device: torch.device) -> tuple[Callable[[], torch.Tensor], ...]:
    """What the fields of ``Times`` time."""
    rows, in_features, bits, group_size = product.rows, product.in_features, product.bits, product.group_size
    dtype, transposed = getattr(torch, product.dtype), bool(product.transposed)
    # The user's generator stays where it is.
    generator = torch.Generator(device).manual_seed(0)
    grad_out = torch.randn(rows, product.out_features, generator=generator, device=device).to(dtype)
    groups = num_groups(rows * in_features, group_size)
    nbytes = groups * group_size * bits // 8
    codes = torch.randint(256, (nbytes,), generator=generator, device=device, dtype=torch.uint8)
    scale = torch.full((groups,), 2.0**-bits, device=device, dtype=torch.bfloat16)
    zero = torch.full((groups,), -0.5, device=device, dtype=dtype)
    encoded = (codes, scale, zero, bits, group_size)
    operators = torch.ops.actcompile

    def inside() -> torch.Tensor:
        return operators.quantized_weight_grad(grad_out, *encoded, in_features, transposed)

    def decode() -> torch.Tensor:
        return operators.dequantize(*encoded, [rows, in_features], [in_features, 1], dtype)

    def apart() -> torch.Tensor:
        return decode().t() @ grad_out if transposed else grad_out.t() @ decode()

    return inside, apart, decode


def user_table() -> Path:
    """The file that measurements extend: one for each version of the kernels, torch and Triton."""
    folder = Path(__file__).parent
    digest = hashlib.sha256()
    for name in ("_quantize_kernel.py", "_weight_grad_kernel.py"):
        digest.update((folder / name).read_bytes())
    digest.update(f"{torch.__version__} {importlib.metadata.version('triton')}".encode())
    return Path(cache_dir()) / "actcompile" / f"weight_grad_times_{digest.hexdigest()[:16]}.csv"


@functools.cache
def _known() -> Table:
    """Both tables, read once."""
    return {**read_table(SHIPPED), **read_table(user_table())}


def key(product: Product) -> tuple[str, ...]:
    """The cells of a table that name ``product``."""
    return tuple(map(str, product))


def read_table(path: Path) -> Table:
    """The rows of ``path``; none where there is no such file or it has other columns."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        header, *rows = [*csv.reader(file)] or [[]]
    if header != [*Product._fields, *Times._fields]:
        log.warning("%s has other columns than this version's: not read", path)
        return {}
    width = len(Product._fields)
    return {tuple(row[:width]): Times(*map(float, row[width:])) for row in rows}


def extend_table(path: Path, measured: Mapping[tuple[str, ...], Times]) -> None:
    """Adds rows to ``path``, which other processes may read and replace meanwhile."""
    rows = {**read_table(path), **measured}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", newline="", dir=path.parent, suffix=".tmp", delete=False) as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow([*Product._fields, *Times._fields])
            writer.writerows([*cells, *(f"{value:.6g}" for value in times)] for cells, times in rows.items())
        os.replace(file.name, path)
    except OSError as error:
        log.warning("%s could not be written, so other processes measure again: %s", path, error)

"""The product that decodes in registers against "decode, then multiply"."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from actcompile.triton_kernels.quantize import FLOAT_DTYPES, PLANES, dequantize_reference, quantize_reference
from actcompile.triton_kernels.weight_grad import quantized_weight_grad_reference

from .conftest import INTERPRETED

pytest.importorskip("triton")
kernel = pytest.importorskip("actcompile.triton_kernels._weight_grad_kernel")

pytestmark = pytest.mark.usefixtures("interpreter_handles_bfloat16")

GROUP_SIZE = 256
SEED = 2024


def operands(
    rows: int, out_features: int, in_features: int, bits: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Whole numbers, whose products and sums float32 holds exactly: every order of summation gives the same bits."""
    generator = torch.Generator().manual_seed(rows + bits)
    groups = rows * in_features // GROUP_SIZE
    grad_out = torch.randint(-4, 5, (rows, out_features), generator=generator).to(device, dtype)
    codes = torch.randint(256, (groups * GROUP_SIZE * bits // 8,), generator=generator, dtype=torch.uint8).to(device)
    scale = torch.randint(1, 4, (groups,), generator=generator).to(device, torch.bfloat16)
    zero = torch.randint(-8, 9, (groups,), generator=generator).to(device, dtype)
    return grad_out, (codes, scale, zero)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("bits", PLANES)
def test_kernel_equals_reference(bits: int, dtype: torch.dtype, transposed: bool, device: torch.device) -> None:
    """Every tile, rows and columns that are no multiples of it, with and without a split."""
    grad_out, encoded = operands(70, 37, 512, bits, dtype, device)
    expected = quantized_weight_grad_reference(grad_out, *encoded, bits, GROUP_SIZE, 512, transposed)
    for config, splits in zip(kernel.CONFIGS[dtype], itertools.cycle((1, 4)), strict=False):
        actual = kernel.launch_weight_grad(
            grad_out, *encoded, bits, GROUP_SIZE, 512, transposed, splits=splits, config=config
        )
        assert actual.dtype == dtype and actual.is_contiguous()
        assert torch.equal(actual, expected), (config, splits)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_error_bound(dtype: torch.dtype, device: torch.device) -> None:
    """That of the format's docstring, against the exact sums."""
    rows = 300
    x, grad_out = (torch.randn(rows, width, device=device).to(dtype) for width in (256, 40))
    encoded = quantize_reference(x, 4, GROUP_SIZE, torch.tensor(SEED, device=device), 0)
    decoded = dequantize_reference(*encoded, 4, GROUP_SIZE, x.shape, x.stride(), dtype).double()
    exact, magnitude = grad_out.double().t() @ decoded, grad_out.double().abs().t() @ decoded.abs()
    bound = rows * 2.0**-23 * magnitude + exact.abs() * torch.finfo(dtype).eps / 2
    for config, splits in itertools.product(kernel.CONFIGS[dtype], (1, 2)):
        actual = kernel.launch_weight_grad(
            grad_out, *encoded, 4, GROUP_SIZE, 256, False, splits=splits, config=config
        ).double()
        assert ((actual - exact).abs() <= bound).all(), (config, splits)


@pytest.mark.parametrize("group_size", [64, 128, 1024])
def test_group_sizes(group_size: int, device: torch.device) -> None:
    x, grad_out = torch.randn(50, 1024, device=device), torch.ones(50, 33, device=device)
    config = next(config for config in kernel.FULL_CONFIGS if config.kwargs["BLOCK_K"] == 64)
    for bits in PLANES:
        encoded = quantize_reference(x, bits, group_size, torch.tensor(SEED, device=device), 0)
        arguments = (grad_out, *encoded, bits, group_size, 1024, False)
        actual = kernel.launch_weight_grad(*arguments, splits=1, config=config)
        torch.testing.assert_close(actual, quantized_weight_grad_reference(*arguments), rtol=1e-5, atol=1e-4)


def test_strides_of_the_gradient(device: torch.device) -> None:
    grad_out, encoded = operands(70, 37, 256, 4, torch.float32, device)
    expected = quantized_weight_grad_reference(grad_out, *encoded, 4, GROUP_SIZE, 256, False)
    wide = torch.full((140, 50), torch.nan, device=device)
    wide[::2, 5:42] = grad_out
    for strided in (grad_out.t().contiguous().t(), wide[::2, 5:42]):
        actual = kernel.launch_weight_grad(
            strided, *encoded, 4, GROUP_SIZE, 256, False, splits=1, config=kernel.FULL_CONFIGS[0]
        )
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("bits", PLANES)
def test_nan_reaches_its_own_column_alone(bits: int, device: torch.device) -> None:
    x, grad_out = torch.randn(50, 512, device=device), torch.ones(50, 33, device=device)
    x[7, 300] = torch.inf
    encoded = quantize_reference(x, bits, GROUP_SIZE, torch.tensor(SEED, device=device), 0)
    arguments = (grad_out, *encoded, bits, GROUP_SIZE, 512, False)
    actual = kernel.launch_weight_grad(*arguments, splits=1, config=kernel.FULL_CONFIGS[0])
    assert actual.isnan().nonzero()[:, 1].unique().tolist() == [300]
    expected = quantized_weight_grad_reference(*arguments)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("transposed", [False, True])
def test_broken_groups_and_nothing_beyond_the_end(transposed: bool, device: torch.device) -> None:
    """A group that holds nan reaches its own columns alone; the rest of poisoned memory stays as it was."""
    grad_out, (codes, scale, zero) = operands(40, 37, 512, 4, torch.float32, device)
    scale[3], poison = torch.nan, 77.0
    expected = quantized_weight_grad_reference(grad_out, codes, scale, zero, 4, GROUP_SIZE, 512, transposed)
    assert expected.isnan().sum() == 37 * GROUP_SIZE
    out = torch.full((37 * 512 + 1024,), poison, device=device)
    # What lies behind the operands is read nowhere: it would make everything nan.
    behind = [torch.cat([t.flatten(), t.new_full((512,), 255)]) for t in (codes,)]
    behind += [torch.cat([t.flatten(), t.new_full((512,), torch.nan)]) for t in (grad_out, scale, zero)]
    codes, grad_out, scale, zero = behind
    options = kernel.format_options(4, GROUP_SIZE, transposed)
    config = kernel.FULL_CONFIGS[2]
    grid = (1, 512 // config.kwargs["BLOCK_K"], 1)
    kernel._weight_grad_kernel[grid](
        grad_out, codes, scale, zero, out, 40, 37, 512, 40, 37, 1, **options, **config.all_kwargs()
    )
    torch.testing.assert_close(out[:-1024].view_as(expected), expected, rtol=0, atol=0, equal_nan=True)
    assert out[-1024:].eq(poison).all()


def test_no_rows_and_no_columns(device: torch.device) -> None:
    for rows, out_features in ((0, 37), (4, 0)):
        grad_out, encoded = operands(rows, out_features, 256, 4, torch.float32, device)
        actual = kernel.launch_weight_grad(
            grad_out, *encoded, 4, GROUP_SIZE, 256, False, splits=1, config=kernel.FULL_CONFIGS[0]
        )
        assert torch.equal(actual, torch.zeros(out_features, 256, device=device))


def test_tuning(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tuner tries every tile of the dtype that lies within a group, and keeps the fastest."""
    tuned, tried = kernel._tuned_kernel, []

    def run_once(launch: Callable[[], None], quantiles: object) -> list[float]:
        launch()
        tried.append(len(tried))
        return [3.0, 3.0, 3.0] if len(tried) != 2 else [1.0, 1.0, 1.0]

    if INTERPRETED:
        monkeypatch.setattr(tuned, "_do_bench", run_once)
    grad_out, encoded = operands(70, 48, 256, 4, torch.bfloat16, device)
    arguments = (grad_out, *encoded, 4, GROUP_SIZE, 256, False)
    expected = quantized_weight_grad_reference(*arguments)
    for _ in range(2):
        assert torch.equal(kernel.launch_weight_grad(*arguments, splits=2), expected)
    if INTERPRETED:
        assert len(tried) == len(kernel.HALF_CONFIGS)
        assert tuned.best_config is kernel.HALF_CONFIGS[1]


def test_only_tiles_within_a_group_are_tried() -> None:
    arguments = {"grad_ptr": torch.empty(0), "N": 48, "stride_m": 48, "stride_n": 1}
    fitting = kernel.fitting_configs([], arguments, GROUP_SIZE=64)
    assert fitting == [config for config in kernel.FULL_CONFIGS if config.kwargs["BLOCK_K"] == 64]


@pytest.mark.parametrize("uneven", [{"N": 37}, {"stride_m": 37}, {"stride_n": 64}])
def test_wide_tiles_are_for_aligned_rows(uneven: dict[str, int]) -> None:
    arguments = {"grad_ptr": torch.empty(0, dtype=torch.bfloat16), "N": 48, "stride_m": 48, "stride_n": 1}
    assert kernel.fitting_configs([], arguments, GROUP_SIZE=256) == list(kernel.HALF_CONFIGS)
    narrow = [config for config in kernel.HALF_CONFIGS if not kernel.is_wide(config)]
    assert kernel.fitting_configs([], {**arguments, **uneven}, GROUP_SIZE=256) == narrow != []


def test_splits_fill_the_device() -> None:
    assert kernel.num_splits(8192, 1024, 1024, 132) == 2
    assert kernel.num_splits(8192, 256, 256, 132) == 16
    assert kernel.num_splits(1500, 256, 256, 132) == 2
    assert kernel.num_splits(8192, 4096, 4096, 132) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_tuned_launch(dtype: torch.dtype) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    grad_out, encoded = operands(4096, 384, 768, 4, dtype, torch.device("cuda"))
    expected = quantized_weight_grad_reference(grad_out, *encoded, 4, GROUP_SIZE, 768, False)
    arguments = (grad_out, *encoded, 4, GROUP_SIZE, 768, False)
    once, again = (torch.ops.actcompile.quantized_weight_grad(*arguments) for _ in range(2))
    assert torch.equal(once, expected) and torch.equal(again, expected)

"""Speed of the codecs beside a copy of the same tensor, and of codecs compiled together with their neighbours.

What a step runs: kernels on a CUDA device; on the CPU the compiled encoder and the decoders that Inductor makes. Runs
of a codec, of the copy and of all else in a row alternate in one process. The best run counts first: on the CPU, a
result whose memory comes fresh from the system takes several times as long, the copy's as well as the codec's.

GB/s are bytes of the exact tensor per second, whatever is read and written for them.

``--parts weight_grad`` compares products that decode in registers with "decode, then multiply" on a CUDA device, for
layers of GPTs from 768 to 4096 wide. Its times have a file of their own, with the columns of the table that the package
ships; ``--ship`` adds them to that table.

``--parts rows`` compares weight gradients from sampled rows with the dense product, sampling included; in a file of its
own, too.
"""

import argparse
import functools
import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor
from torch.nn.functional import gelu, layer_norm

import actcompile.passes.lower  # noqa: F401  teaches Inductor the codecs
from actcompile.meter import measure_steps
from actcompile.triton_kernels import _compiled_topk  # noqa: F401  defines the compiled operators
from actcompile.triton_kernels import _weight_grad_times as weight_grad_times
from actcompile.triton_kernels.quantize import PLANES
from actcompile.triton_kernels.rows import sampled_nbytes

from .harness import MIB, append_row, pick_device

OPS = torch.ops.actcompile
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
GROUP_SIZE = 256
WIDTH = 1024

# Rows, out_features, in_features: attention's output, the MLP's way up and down.
TOKENS = 8192
LAYERS = [
    (TOKENS, *features)
    for width in (768, 1024, 2048, 4096)
    for features in ((width, width), (4 * width, width), (width, 4 * width))
]

# Elements kept of each block, bits of their values.
PRUNED = [(51, 256, 16), (51, 256, 8), (2, 16, 4)]

# Rows, out_features, in_features of layers whose rows are sampled, and the share of rows that is kept.
SAMPLED = [(TOKENS, 512, 512), (TOKENS, 2048, 512)]
SHARE = 0.3

Runs = dict[str, Callable[[], object]]


def encoder(x: Tensor, bits: int) -> Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]:
    """The operator that a compiled graph runs on ``x``'s device."""
    operator, seed = OPS.quantize if x.is_cuda else OPS.quantize_compiled, torch.tensor(7, device=x.device)
    return lambda values: operator(values, bits, GROUP_SIZE, seed, 3)


def decoder(x: Tensor, bits: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Back to a tensor like ``x``."""
    shape, stride, dtype = list(x.shape), list(x.stride()), x.dtype
    return lambda codes, scale, zero: OPS.dequantize(codes, scale, zero, bits, GROUP_SIZE, shape, stride, dtype)


def codec_runs(x: Tensor, bits: int) -> Runs:
    """Both directions on their own, and the copy."""
    encode, decode = encoder(x, bits), compiled(decoder(x, bits))
    encoded = encode(x)
    return {"copy": x.clone, "encode": lambda: encode(x), "decode": lambda: decode(*encoded)}


def pruning_runs(x: Tensor, keep: int, block: int, value_bits: int) -> Runs:
    """Both directions of pruning, as a compiled graph runs them on ``x``'s device, and the copy."""
    sparsify, densify = (OPS.sparsify, OPS.densify) if x.is_cuda else (OPS.sparsify_compiled, OPS.densify_compiled)
    seed, kept = torch.tensor(7, device=x.device), (keep, block, value_bits)
    parts, layout = sparsify(x, *kept, seed, 3), (list(x.shape), list(x.stride()), x.dtype)
    return {
        "copy": x.clone,
        f"sparsify {keep}:{block}": lambda: sparsify(x, *kept, seed, 3),
        f"densify {keep}:{block}": lambda: densify(*parts, *kept, *layout),
    }


def mask_runs(mask: Tensor) -> Runs:
    """Both directions of masks, and the copy."""
    shape, packed = list(mask.shape), OPS.pack_bool(mask)
    unpack = compiled(lambda part: OPS.unpack_bool(part, shape))
    return {"copy": mask.clone, "pack_bool": lambda: OPS.pack_bool(mask), "unpack_bool": lambda: unpack(packed)}


def neighbour_runs(x: Tensor, bits: int) -> Runs:
    """Codecs with a producer or a consumer, in one compiled function and ("apart") in one for each."""
    encode, decode = encoder(x, bits), decoder(x, bits)
    encoded, gradient = encode(x), torch.randn_like(x)
    runs: Runs = {"copy": x.clone}

    def normalize(values: Tensor) -> Tensor:
        return layer_norm(values, [WIDTH])

    def with_codes(values: Tensor) -> list[Tensor]:
        return [values, *encode(values)]

    for name, produce in (("gelu", gelu), ("layer_norm", normalize)):
        together = compiled(lambda values, produce=produce: with_codes(produce(values)))
        alone = compiled(produce)
        runs[f"{name}, encode"] = lambda together=together: together(x)
        runs[f"{name}, encode apart"] = lambda alone=alone: with_codes(alone(x))

    def consume(values: Tensor, gradient: Tensor) -> Tensor:
        return torch.ops.aten.gelu_backward(gradient, values)

    together = compiled(lambda gradient, *parts: consume(decode(*parts), gradient))
    consume_alone, decode_alone = compiled(consume), compiled(decode)
    runs["decode, gelu_backward"] = lambda: together(gradient, *encoded)
    runs["decode, gelu_backward apart"] = lambda: consume_alone(decode_alone(*encoded), gradient)
    return runs


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` compiled by Inductor, for one size."""
    return torch.compile(function, dynamic=False)


def measure(runs: Runs, nbytes: int, rounds: int) -> Iterator[dict[str, Any]]:
    """One row for each but the copy: best and median times, also as multiples of the copy's."""
    measure_steps(runs, 2)
    times = measure_steps(runs, rounds)
    for name in list(runs)[1:]:
        row: dict[str, Any] = {"kernel": name}
        for prefix, pick in (("best_", min), ("", statistics.median)):
            elapsed_ms, copy_ms = pick(times[name]), pick(times["copy"])
            row[f"{prefix}ms"], row[f"{prefix}copy_ms"] = round(elapsed_ms, 3), round(copy_ms, 3)
            row[f"{prefix}ratio"] = round(elapsed_ms / copy_ms, 3)
        yield {**row, "best_gb_per_s": round(nbytes / row["best_ms"] / 1e6, 2)}


def cases(parts: Sequence[str], dtypes: Sequence[str], widths: Sequence[int], nbytes: int) -> Iterator[tuple[Any, ...]]:
    """Dtype, bits, and what to run for them."""
    device = pick_device()
    for dtype in dtypes:
        numel = nbytes // DTYPES[dtype].itemsize
        x = torch.randn(numel // WIDTH, WIDTH, device=device).to(DTYPES[dtype])
        for bits in widths if "codecs" in parts else ():
            yield dtype, bits, codec_runs(x, bits)
        for keep, block, value_bits in PRUNED if "pruning" in parts else ():
            yield dtype, value_bits, pruning_runs(x, keep, block, value_bits)
        if "neighbours" in parts:
            yield dtype, 4, neighbour_runs(x, 4)
    if "masks" in parts:
        yield "bool", 1, mask_runs(torch.rand(nbytes, device=device) < 0.5)


def weight_grad_rows(dtypes: Sequence[str], widths: Sequence[int], ships: bool) -> Iterator[dict[str, Any]]:
    """Times of weight gradients, one row each; none without a device to measure on."""
    device = pick_device()
    if not weight_grad_times.is_measurable(device):
        print(f"weight_grad: left out, its kernel does not run on {device.type}")
        return
    name = weight_grad_times.device_name(device)
    for (rows, out_features, in_features), dtype, bits in itertools.product(LAYERS, dtypes, widths):
        product = weight_grad_times.Product(name, rows, out_features, in_features, bits, GROUP_SIZE, dtype, 0)
        times = weight_grad_times.measure(product, device)
        if ships:
            weight_grad_times.extend_table(weight_grad_times.SHIPPED, {weight_grad_times.key(product): times})
        row = {**product._asdict(), **{key: round(value, 4) for key, value in times._asdict().items()}}
        append_row("kernels_weight_grad", row)
        yield {**row, "speedup": round(times.apart_ms / times.inside_ms, 3)}


def sampling_rows(dtypes: Sequence[str], rounds: int) -> Iterator[dict[str, Any]]:
    """Best times of weight gradients from sampled rows, of the sampling and of the dense product, one row each."""
    device = pick_device()
    seed = torch.tensor(7, device=device)
    for (rows, out_features, in_features), dtype in itertools.product(SAMPLED, dtypes):
        x = torch.randn(rows, in_features, device=device).to(DTYPES[dtype])
        grad_out = torch.randn(rows, out_features, device=device).to(DTYPES[dtype])
        num_rows = round(SHARE * rows)
        sampled = OPS.sample_rows(x, None, num_rows, seed, 3)
        runs: Runs = {
            "dense_ms": functools.partial(torch.mm, grad_out.t(), x),
            "sample_ms": functools.partial(OPS.sample_rows, x, None, num_rows, seed, 3),
            "product_ms": functools.partial(OPS.sampled_weight_grad, grad_out, *sampled),
        }
        measure_steps(runs, 2)
        best = {name: round(min(times), 4) for name, times in measure_steps(runs, rounds).items()}
        row = {"dtype": dtype, "rows": rows, "out_features": out_features, "in_features": in_features}
        row |= {
            "num_rows": num_rows,
            "stored_ratio": round(sampled_nbytes(num_rows, in_features, x.dtype) / x.nbytes, 4),
        }
        row |= {**best, "speedup": round(best["dense_ms"] / (best["sample_ms"] + best["product_ms"]), 3)}
        append_row("kernels_rows", {**row, "rounds": rounds})
        yield row


def main() -> None:
    """Measures, appends rows and prints the table."""
    parser = argparse.ArgumentParser("python -m bench.kernels", description=__doc__)
    parts = ["codecs", "masks", "neighbours", "pruning"]
    parser.add_argument(
        "--parts", nargs="+", choices=[*parts, "rows", "weight_grad"], default=parts, help="what to measure"
    )
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="of the tensors")
    parser.add_argument("--bits", type=int, nargs="+", choices=PLANES, default=list(PLANES), help="of the codes")
    large = 1024 if pick_device().type == "cuda" else 64
    parser.add_argument("--mib", type=int, default=large, help="size of the exact tensor")
    parser.add_argument("--rounds", type=int, default=20, help="timed runs of each")
    parser.add_argument("--ship", action="store_true", help="add times of weight gradients to the package's table")
    options = parser.parse_args()
    table = []
    with torch.no_grad():
        for dtype, bits, runs in cases(options.parts, options.dtypes, options.bits, options.mib * MIB):
            for row in measure(runs, options.mib * MIB, options.rounds):
                table.append({"dtype": dtype, "bits": bits, "mib": options.mib, **row})
                append_row("kernels", {**table[-1], "rounds": options.rounds})
            print(f"{dtype}, {bits} bits: measured", flush=True)
            torch._dynamo.reset()
        if "weight_grad" in options.parts:
            gradients = list(weight_grad_rows(options.dtypes, options.bits, options.ship))
            print(tabulate(gradients, headers="keys"))
        if "rows" in options.parts:
            print(tabulate(list(sampling_rows(options.dtypes, options.rounds)), headers="keys"))
    print(tabulate(table, headers="keys"))


if __name__ == "__main__":
    main()

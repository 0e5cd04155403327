"""What Back Razor's profiler counts, what is left of known tensors, and that its models train."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import actcompile
from actcompile import Config
from bench.back_razor_accounting import BATCH, DENSE_ROW, THEIRS, explain_vit, make_vit
from bench.back_razor_energy import FORMATS, energy_kept
from bench.back_razor_memory import variants
from bench.back_razor_models import make_backbone, make_deeplab, make_mobilenet, rte_lengths
from bench.harness import MIB
from bench.models import Workload

# As found by running the profiler's formulas: MB per sample and, with CIFAR-10's parameters, of 128 samples.
PROFILED = {
    DENSE_ROW: (147.7, 19234),
    "Back Razor 80%, fp16": (34.5, 4743),
    "Back Razor 90%, fp16": (28.0, 3912),
    "Back Razor 95%, fp16": (24.8, 3496),
    "Back Razor 97%, fp16": (23.5, 3330),
    "Back Razor 80%, 8 bits": (18.9, 2745),
    "Back Razor 90%, 8 bits": (16.7, 2470),
    "Back Razor 97%, 8 bits": (15.2, 2277),
}
TINY = {"image_size": 32, "patch_size": 8, "num_hidden_layers": 1, "hidden_size": 256, "num_attention_heads": 4}


@pytest.mark.parametrize("name", PROFILED)
def test_their_rows_are_those_of_their_profiler(name: str) -> None:
    sample, total = PROFILED[name]
    peak = THEIRS[name].peak_nbytes()
    assert peak / MIB == pytest.approx(sample, abs=0.06)
    parameters = 4 * 85_806_346
    assert (BATCH * peak + parameters) / MIB == pytest.approx(total, abs=0.5)


def test_parameters_are_those_of_their_model() -> None:
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in make_vit().parameters()) == 85_806_346


def test_saved_bytes_are_affine_in_the_batch() -> None:
    model, config = make_vit(**TINY), Config(sparsity=0.8, sparse_value_bits=8, min_numel=0)
    # Batches whose tensors are whole groups of codes, down to the logits of 10 classes.
    reports = [explain_vit(model, batch, config) for batch in (128, 256, 512)]
    small, medium, large = (report.saved_nbytes for report in reports)
    assert 0 < large - medium == 2 * (medium - small)
    small, medium, large = (report.baseline_nbytes for report in reports)
    assert 0 < large - medium == 2 * (medium - small)


def test_energy_is_what_is_not_lost() -> None:
    assert energy_kept(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 4.0])) == pytest.approx(16 / 25)
    assert energy_kept(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 9.0])) == pytest.approx(0)


@pytest.mark.parametrize(
    ("name", "energy", "bits"),
    [
        # Two elements of each 16 are 3, the others 1.
        ("2:16, 16 bits", 18 / 32, 0.5 + 2),
        ("3:16, 16 bits", 19 / 32, 0.75 + 3),
        # Of 256, 32 are 3.
        ("20% of 256, 16 bits", (32 * 9 + 19) / 512, 1 + 51 / 16),
        ("10% of 256, 16 bits", 26 * 9 / 512, 1 + 26 / 16),
        # 52 elements are to be kept: as many as the threshold's are ones, and those are all.
        ("samples 20%, fp16", 1, 1 + 16),
        # The threshold is 3, and 32 elements have it.
        ("samples 10%, fp16", 32 * 9 / 512, 1 + 32 / 16),
        ("1 bits", 1, 1 + (16 + 32) / 256),
    ],
)
def test_known_tensors_keep_known_energies(name: str, energy: float, bits: float) -> None:
    x = torch.ones(4, 16, 16)
    x[..., 3:5] = 3
    nbytes, stored = FORMATS[name](x)
    assert energy_kept(x, stored) == pytest.approx(energy)
    assert 8 * nbytes / x.numel() == pytest.approx(bits)


def test_backbones_have_the_sizes_of_their_papers() -> None:
    images = torch.empty(1, 3, 224, 224, device="meta")
    with torch.device("meta"):
        assert make_backbone()(images).shape == (1, 320, 7, 7)
        assert make_backbone(output_stride=16)(images).shape == (1, 320, 14, 14)
    parameters = make_mobilenet(1, size=32).model.parameters()
    assert sum(parameter.numel() for parameter in parameters) == 3_504_872


@pytest.mark.parametrize("make", [lambda: make_mobilenet(2, size=64), lambda: make_deeplab(2, size=33)])
@pytest.mark.parametrize("options", [{"sparsity": 0.8}, {"sparsity": 0.8, "pruning": "samples"}])
def test_models_train_a_step(make: Callable[[], Workload], options: dict[str, object]) -> None:
    workload = make()
    for module in workload.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    expected = workload.loss(workload.model)
    call = torch.compile(workload.model, backend="act", options={"lowering": "eager", **options})
    loss = workload.loss(call)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in workload.model.parameters())


def test_back_razor_leaves_the_head_of_deeplab_dense() -> None:
    workload = make_deeplab(2, size=33)
    workload.loss(variants("deeplab")["Back Razor 70%"].compile(workload.model)).backward()
    pruned = {row.module for row in actcompile.report(workload.model).rows if row.action == "prune"}
    assert pruned and not any("head" in module for module in pruned)


def test_rte_is_as_long_as_its_pairs(tmp_path: Path) -> None:
    path = tmp_path / "train.tsv"
    path.write_text(
        'index\tsentence1\tsentence2\tlabel\n0\tA "quoted" word.\tYes.\tentailment\n1\tOne\tTwo\tentailment\n'
    )
    assert rte_lengths(path) == [6 + 2 + 3, 1 + 1 + 3]
    with pytest.raises(FileNotFoundError, match="name it by --data"):
        rte_lengths(tmp_path / "none.tsv")

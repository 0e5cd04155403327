"""pack_masks: bool tensors at one bit per element."""

import pytest
import torch

from actcompile.passes.pack_masks import pack_masks
from actcompile.plan import Action, Decision

from .pairs import Traced, text, trace

PACK = Decision(Action.PACK, "test")


def masked() -> Traced:
    w = torch.randn(8, 8, requires_grad=True)
    return trace(lambda w, x: torch.where(x @ w > 0.5, x @ w, 2.0), w, torch.randn(5, 8))


def test_packed_bytes_cross_in_place_of_the_mask() -> None:
    traced = masked()
    pack_masks(traced.pair, traced.keep_all(gt=PACK))
    assert text(traced.pair.forward) == "\n".join(
        [
            "primals_1 = input",
            "primals_2 = input",
            "primals_3 = input",
            "mm = mm(primals_2, primals_1)",
            "gt = gt(mm, 0.5)",
            "pack_bool_default = pack_bool(gt)",
            "full_default = full([], 2.0, float32, strided, cpu, False)",
            "where = where(gt, mm, full_default)",
            "permute = permute(primals_2, [1, 0])",
            "return [where, pack_bool_default, permute]",
        ]
    )
    assert text(traced.pair.backward) == "\n".join(
        [
            "gt_part0 = input",
            "permute = input",
            "tangents_1 = input",
            "full_default_1 = full([], 0.0, float32, strided, cpu, False)",
            "unpack_bool_default = unpack_bool(gt_part0, [5, 8], [8, 1])",
            "where_1 = where(unpack_bool_default, tangents_1, full_default_1)",
            "mm_2 = mm(permute, where_1)",
            "return [mm_2, None, None]",
        ]
    )


def test_numbers_are_the_same() -> None:
    traced = masked()
    before = traced.run()
    pack_masks(traced.pair, traced.keep_all(gt=PACK))
    torch.testing.assert_close(traced.run(), before, rtol=0, atol=0)


def test_one_bit_per_element_crosses() -> None:
    traced = masked()
    pack_masks(traced.pair, traced.keep_all(gt=PACK))
    (packed,) = traced.pair.slots[0].outputs
    assert packed.meta["val"].dtype == torch.uint8
    assert packed.meta["val"].shape == (5,)


def test_keeping_everything_changes_nothing() -> None:
    traced = masked()
    before = text(traced.pair.forward), text(traced.pair.backward)
    pack_masks(traced.pair, traced.keep_all())
    assert (text(traced.pair.forward), text(traced.pair.backward)) == before


def test_running_twice_raises() -> None:
    traced = masked()
    plan = traced.keep_all(gt=PACK)
    pack_masks(traced.pair, plan)
    with pytest.raises(ValueError, match="pack_bool takes"):
        pack_masks(traced.pair, plan)

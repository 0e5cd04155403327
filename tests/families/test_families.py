"""Model families trained with compressed activations: the right gradient, from few bytes."""

import pytest

from tests.families.family import Family
from tests.families.goals import EXEMPT, FAMILIES, cases, complaints, is_installed
from tests.families.measuring import measure

ALL = cases()
QUICK = [family for family in FAMILIES if family.quick]


def check(family: Family, precision: str) -> None:
    """Raises where a goal is missed."""
    if not is_installed(family):
        pytest.skip(f"needs {family.needs}")
    missed = [f"{row.bits} bits: {complaint}" for row in measure(family, precision) for complaint in complaints(row)]
    assert not missed, missed


@pytest.mark.families
@pytest.mark.parametrize(("family", "precision"), ALL, ids=[f"{f.name}, {precision}" for f, precision in ALL])
def test_family(family: Family, precision: str) -> None:
    check(family, precision)


@pytest.mark.parametrize("family", QUICK, ids=[family.name for family in QUICK])
def test_quick_family(family: Family) -> None:
    check(family, "fp32")


def test_table_is_consistent() -> None:
    names = [family.name for family in FAMILIES]
    assert len(set(names)) == len(names) >= 60
    known = {(family.name, precision) for family, precision in ALL}
    assert known >= set(EXEMPT) and all(exempt.reason for exempt in EXEMPT.values())

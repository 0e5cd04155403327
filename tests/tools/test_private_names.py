"""What of torch's private names another release has, and how."""

import zipfile
from pathlib import Path

import pytest

from tools.private_names import FOLDERS, ROOT, differences, installed, main, uses
from tools.torch_sources import TorchSources

OURS = """
import torch
import torch._settings as settings
from torch._compile import lowered, Kernel, scheduled
from torch._compile.deep import Line

class Ours(Kernel):
    def store(self, name):
        return settings.fast and torch._C._use_count(name)
"""

BEFORE = {
    "version.py": "__version__ = '2.0.0'",
    "_settings.py": "fast = True",
    "_compile/__init__.py": "from .deep import *\nfrom .other import run as scheduled",
    "_compile/deep.py": """
from dataclasses import dataclass

class Base:
    def store(self, name): ...

class Kernel(Base):
    def __init__(self, tiling): ...

@dataclass
class Line:
    node: int
    size: int = 0

if True:
    def lowered(x: int, *, y=None) -> int: ...
""",
    "_compile/other.py": "def run(graph): ...",
}
KERNEL = BEFORE["_compile/deep.py"]
# What the other release has instead -> what the table has to say.
CHANGES = {
    "nothing": ({}, []),
    "annotations": ({"_compile/deep.py": KERNEL.replace("x: int", "x: object")}, []),
    "gone": ({"_settings.py": "slow = True"}, [("torch._settings.fast", "gone")]),
    "optional": ({"_compile/other.py": "def run(graph, *, fast=0): ..."}, [("torch._compile.scheduled", "takes more")]),
    "required": ({"_compile/other.py": "def run(graph, fast): ..."}, [("torch._compile.scheduled", "changed")]),
    "order": ({"_compile/other.py": "def run(fast=0, graph=0): ..."}, [("torch._compile.scheduled", "changed")]),
    "field": ({"_compile/deep.py": KERNEL.replace("size:", "nbytes:")}, [("torch._compile.deep.Line", "changed")]),
    "overridden": (
        {"_compile/deep.py": KERNEL.replace("self, name", "self, name, mode=None")},
        [("torch._compile.Kernel.store", "changed")],
    ),
}


def library(folder: Path, **changed: str) -> Path:
    """A wheel of a torch with these files."""
    folder.mkdir()
    with zipfile.ZipFile(folder / "torch.whl", "w") as wheel:
        for name, text in ({"__init__.py": ""} | BEFORE | changed).items():
            wheel.writestr(f"torch/{name}", text)
    return folder / "torch.whl"


@pytest.mark.parametrize("change", CHANGES)
def test_differences_of_names_that_are_used(change: str, tmp_path: Path) -> None:
    changed, expected = CHANGES[change]
    base = TorchSources(library(tmp_path / "base"))
    other = TorchSources(library(tmp_path / "other", **changed))
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "file.py").write_text(OURS)
    found = differences(uses([tmp_path / "ours"]), base, other)
    assert [(difference.use.name, difference.state) for difference in found] == expected


def test_every_name_of_this_package_is_in_the_installed_torch(capsys: pytest.CaptureFixture[str]) -> None:
    """What the sources say nothing of would be gone, or written in C++."""
    known, used = TorchSources(installed()), uses([ROOT / folder for folder in FOLDERS])
    assert len(used) > 100
    assert [name for name, use in used.items() if known.find(name) is None and not use.is_overridden] == []
    assert main([str(installed())]) == 0
    assert ": 0 differ" in capsys.readouterr().out


def test_signatures_are_those_of_the_installed_torch() -> None:
    find = TorchSources(installed()).find
    assert str(find("torch._inductor.codegen.wrapper.ReuseLine")).startswith("(node, reused_as, delete_old=")
    assert str(find("torch._dynamo.maybe_mark_dynamic")).startswith("(t, index")
    assert find("torch._inductor.no_such_name") is None


def test_a_folder_without_torch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="that holds it"):
        TorchSources(tmp_path)

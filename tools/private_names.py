"""Compares the private names of torch that this package uses with another release, without importing it.

    python -m tools.private_names torch-2.16.0-cp312-cp312-manylinux_2_28_x86_64.whl
    python -m tools.private_names .versions/2.14/lib/python3.12/site-packages --base torch-2.13.0-...whl

Lists names that are gone, signatures that changed, and those that only take more; the first two end with status 1. Not
seen are names that a string spells, and what objects have that a function returns.
"""

import argparse
import ast
import importlib.util
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tabulate import tabulate

from .torch_sources import Definition, TorchSources

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("actcompile", "passes", "triton_kernels")


@dataclass
class Use:
    """A name of torch's, the files that it is used in, and whether classes of ours override it."""

    name: str
    files: list[str] = field(default_factory=list)
    is_overridden: bool = False


@dataclass(frozen=True)
class Difference:
    """What became of a name: "gone", "changed" or "takes more"."""

    use: Use
    state: str
    before: Definition
    after: Definition | None

    @property
    def is_harmless(self) -> bool:
        """Whether what is here still works."""
        return self.state == "takes more"


def uses(folders: Sequence[Path]) -> dict[str, Use]:
    """The private names of torch that the files in ``folders`` use."""
    found: dict[str, Use] = {}
    for path in sorted(file for folder in folders for file in folder.rglob("*.py")):
        names = _Names()
        names.visit(ast.parse(path.read_text()))
        for name, is_overridden in names.found:
            use = found.setdefault(name, Use(name))
            use.is_overridden |= is_overridden
            if path.name not in use.files:
                use.files.append(path.name)
    return found


class _Names(ast.NodeVisitor):
    """Collects what a file imports from torch, and what it takes out of that by attributes."""

    def __init__(self) -> None:
        self.found: list[tuple[str, bool]] = []
        self._meaning: dict[str, str] = {}

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._note(alias.name)
            self._meaning[alias.asname or alias.name.partition(".")[0]] = (
                alias.name if alias.asname else alias.name.partition(".")[0]
            )

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.level == 0 and node.module is not None:
            for alias in node.names:
                self._meaning[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                self._note(f"{node.module}.{alias.name}")

    def visit_Attribute(self, node: ast.Attribute) -> None:
        name = self._resolved(node)
        if name is None:
            self.generic_visit(node)
        else:
            self._note(name)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for base in filter(None, map(self._resolved, node.bases)):
            for item in node.body:
                if isinstance(item, ast.FunctionDef):
                    self._note(f"{base}.{item.name}", is_overridden=True)
        self.generic_visit(node)

    def _resolved(self, node: ast.AST) -> str | None:
        if isinstance(node, ast.Name):
            return self._meaning.get(node.id)
        above = self._resolved(node.value) if isinstance(node, ast.Attribute) else None
        return f"{above}.{node.attr}" if above is not None and isinstance(node, ast.Attribute) else None

    def _note(self, name: str, is_overridden: bool = False) -> None:
        if _is_private(name):
            self.found.append((name, is_overridden))


def _is_private(name: str) -> bool:
    """Whether torch says nothing about how long ``name`` stays; operators are no names of modules."""
    package, *parts = name.split(".")
    is_hidden = any(part == "experimental" or (part.startswith("_") and not part.startswith("__")) for part in parts)
    return package == "torch" and is_hidden and parts[0] != "ops"


def differences(used: Mapping[str, Use], base: TorchSources, other: TorchSources) -> Iterator[Difference]:
    """What is not in ``other`` as it is in ``base``; names that ``base`` does not define are left out."""
    for use in used.values():
        before, after = base.find(use.name), other.find(use.name)
        if before is None or after == before:
            continue
        if after is None:
            yield Difference(use, "gone", before, after)
        else:
            # What is overridden is called with whatever is new.
            is_fine = after.takes_calls_of(before) and not use.is_overridden
            yield Difference(use, "takes more" if is_fine else "changed", before, after)


def installed() -> Path:
    """The folder that holds the torch of this environment."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise SystemExit("torch must be installed to be compared with, got none: name another by --base")
    return Path(spec.origin).parent.parent


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; returns the exit status."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        "python -m tools.private_names", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("torch", type=Path, help="a wheel of torch, or a folder that holds it, as site-packages")
    parser.add_argument("--base", type=Path, default=None, help="the same, to compare with; default: what is installed")
    given = parser.parse_args(arguments)
    base, other = TorchSources(given.base or installed()), TorchSources(given.torch)
    used = uses([ROOT / folder for folder in FOLDERS])
    found = list(differences(used, base, other))
    num_unknown = sum(base.find(name) is None and not use.is_overridden for name, use in used.items())
    print(
        f"{len(used)} private names, {base.version} -> {other.version}: {len(found)} differ; the sources of "
        f"{base.version} say nothing of {num_unknown}"
    )
    if found:
        rows = [(d.use.name, ", ".join(d.use.files), d.state, str(d.before), str(d.after or "")) for d in found]
        print(tabulate(rows, ["name", "used in", "state", "before", "after"], maxcolwidths=[None, None, None, 50, 50]))
    return int(not all(difference.is_harmless for difference in found))


if __name__ == "__main__":
    sys.exit(main())

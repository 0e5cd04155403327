"""What a release of torch defines, read from a wheel or an installation without importing it."""

import ast
import functools
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_SUFFIXES = (".py", "/__init__.py", ".pyi", "/__init__.pyi")

# Names that lead to each other through imports end here.
_MOST_STEPS = 30


@dataclass(frozen=True)
class Parameter:
    """One parameter of a signature; ``kind`` is that of ``inspect``: "/", "", "*args", "*" or "**"."""

    name: str
    kind: str
    has_default: bool

    def __str__(self) -> str:
        prefix = {"*args": "*", "**": "**"}.get(self.kind, "")
        return f"{prefix}{self.name}{'=' if self.has_default else ''}"


@dataclass(frozen=True)
class Definition:
    """What a name stands for: a module, class, function or value; ``parameters`` of what can be called, without
    annotations, or None.
    """

    kind: str
    parameters: tuple[Parameter, ...] | None = None

    def __str__(self) -> str:
        return self.kind if self.parameters is None else f"({', '.join(map(str, self.parameters))})"

    def takes_calls_of(self, earlier: "Definition") -> bool:
        """Whether whatever calls ``earlier`` may call this: what is new is optional, and comes last or by keyword."""
        if earlier.parameters is None or self.parameters is None:
            return earlier.kind == self.kind
        by_place = [[p for p in side if p.kind in ("/", "")] for side in (earlier.parameters, self.parameters)]
        added = [parameter for parameter in self.parameters if parameter not in earlier.parameters]
        return (
            set(earlier.parameters) <= set(self.parameters)
            and by_place[0] == by_place[1][: len(by_place[0])]
            and all(parameter.has_default or parameter.kind in ("*args", "**") for parameter in added)
        )


class TorchSources:
    """The sources of torch below ``path``: a wheel, or a folder that holds the package.

    Raises:
        ValueError: When there is no torch in it.
    """

    def __init__(self, path: str | Path) -> None:
        self._read = _reader(Path(path))
        if self._module("torch") is None:
            raise ValueError(f"path must be a wheel of torch or a folder that holds it, as site-packages, got {path!s}")
        self.version = _version(self._read("torch/version.py") or "")

    def find(self, name: str) -> Definition | None:
        """What a dotted name stands for; None where the sources do not say, as for what is written in C++."""
        return self._find(name.split("."), _MOST_STEPS)

    def _find(self, parts: Sequence[str], steps: int) -> Definition | None:
        for length in range(len(parts), 0, -1):
            module = ".".join(parts[:length])
            names = self._module(module)
            if names is None:
                continue
            if length == len(parts):
                return Definition("module")
            return self._inside(module, parts[length:], steps - 1) if steps else None
        return None

    def _inside(self, module: str, rest: Sequence[str], steps: int) -> Definition | None:
        names = self._module(module) or {}
        found = names.get(rest[0])
        if isinstance(found, str):
            return self._find([*found.split("."), *rest[1:]], steps) if steps else None
        if isinstance(found, ast.ClassDef):
            return self._of_class(module, found, rest[1:], steps)
        if isinstance(found, ast.FunctionDef | ast.AsyncFunctionDef):
            return Definition("function", tuple(_parameters(found.args)))
        if found is not None:
            return Definition("value")
        # Where a module hands on all names of another.
        stars = (value for key, value in names.items() if key.startswith("*") and isinstance(value, str))
        found_there = (self._find([*star.split("."), *rest], steps) for star in stars if steps)
        return next((definition for definition in found_there if definition is not None), None)

    def _of_class(self, module: str, node: ast.ClassDef, rest: Sequence[str], steps: int) -> Definition | None:
        body = _bindings(node.body, module, is_package=False)
        if not rest:
            made = self._of_class(module, node, ["__init__"], steps)
            fields = tuple(_fields(node))
            own = Definition("class", fields) if fields and _is_dataclass(node) else None
            return own or Definition("class", None if made is None else made.parameters)
        found = body.get(rest[0])
        if isinstance(found, ast.ClassDef):
            return self._of_class(module, found, rest[1:], steps)
        if isinstance(found, ast.FunctionDef | ast.AsyncFunctionDef):
            return Definition("function", tuple(_parameters(found.args)))
        if found is not None:
            return Definition("value")
        bases = (_dotted(base) for base in node.bases)
        inherited = (self._inside(module, [*base, *rest], steps - 1) for base in bases if base and steps)
        return next((definition for definition in inherited if definition is not None), None)

    @functools.cache  # noqa: B019  lives as long as the program
    def _module(self, name: str) -> dict[str, ast.AST | str] | None:
        """Names that a module binds: a definition, or the dotted name that it was imported from."""
        for suffix in _SUFFIXES:
            text = self._read(name.replace(".", "/") + suffix)
            if text is not None:
                return _bindings(ast.parse(text).body, name, is_package="__init__" in suffix)
        return None


def _reader(path: Path) -> Callable[[str], str | None]:
    if zipfile.is_zipfile(path):
        archive = zipfile.ZipFile(path)
        members = set(archive.namelist())
        return lambda name: archive.read(name).decode() if name in members else None
    return lambda name: (path / name).read_text() if (path / name).is_file() else None


def _version(text: str) -> str:
    values = (node.value for node in ast.parse(text).body if isinstance(node, ast.Assign | ast.AnnAssign))
    return next((str(v.value) for v in values if isinstance(v, ast.Constant) and isinstance(v.value, str)), "")


def _bindings(body: Sequence[ast.stmt], module: str, is_package: bool) -> dict[str, ast.AST | str]:
    """What statements bind, those inside of conditions included; the last binding of a name counts."""
    names: dict[str, ast.AST | str] = {}
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names[node.name] = node
        elif isinstance(node, ast.Import):
            for alias in node.names:
                first = alias.name.partition(".")[0]
                names[alias.asname or first] = alias.name if alias.asname else first
        elif isinstance(node, ast.ImportFrom):
            origin = _origin(node, module, is_package)
            for position, alias in enumerate(node.names):
                key = f"*{origin}{position}" if alias.name == "*" else alias.asname or alias.name
                names[key] = origin if alias.name == "*" else f"{origin}.{alias.name}"
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            names |= dict.fromkeys(_targets(node), node)
        else:
            for inner in _inner_bodies(node):
                names |= _bindings(inner, module, is_package)
    return names


def _inner_bodies(node: ast.stmt) -> Iterator[Sequence[ast.stmt]]:
    if isinstance(node, ast.If | ast.Try | ast.With | ast.For):
        yield from (handler.body for handler in getattr(node, "handlers", ()))
        yield getattr(node, "orelse", [])
        # What is bound where all goes well counts.
        yield node.body


def _targets(node: ast.AST) -> Iterator[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    for target in targets:
        for item in target.elts if isinstance(target, ast.Tuple) else [target]:
            if isinstance(item, ast.Name):
                yield item.id


def _origin(node: ast.ImportFrom, module: str, is_package: bool) -> str:
    if not node.level:
        return node.module or ""
    package = module.split(".")
    kept = package[: len(package) - node.level + is_package]
    return ".".join([*kept, *([node.module] if node.module else [])])


def _dotted(node: ast.AST) -> list[str]:
    """The parts of a name with dots; nothing for other expressions. ``Generic[T]`` is ``Generic``."""
    if isinstance(node, ast.Subscript):
        return _dotted(node.value)
    if isinstance(node, ast.Attribute):
        above = _dotted(node.value)
        return [*above, node.attr] if above else []
    return [node.id] if isinstance(node, ast.Name) else []


def _is_dataclass(node: ast.ClassDef) -> bool:
    decorators = [item.func if isinstance(item, ast.Call) else item for item in node.decorator_list]
    names = [_dotted(item)[-1:] for item in [*decorators, *node.bases]]
    return any(name in (["dataclass"], ["ir_dataclass"], ["NamedTuple"]) for name in names)


def _fields(node: ast.ClassDef) -> Iterator[Parameter]:
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            yield Parameter(item.target.id, "", item.value is not None)


def _parameters(arguments: ast.arguments) -> Iterator[Parameter]:
    by_place = [*((arg, "/") for arg in arguments.posonlyargs), *((arg, "") for arg in arguments.args)]
    first_default = len(by_place) - len(arguments.defaults)
    for position, (arg, kind) in enumerate(by_place):
        yield Parameter(arg.arg, kind, position >= first_default)
    if arguments.vararg is not None:
        yield Parameter(arguments.vararg.arg, "*args", False)
    for arg, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        yield Parameter(arg.arg, "*", default is not None)
    if arguments.kwarg is not None:
        yield Parameter(arguments.kwarg.arg, "**", False)

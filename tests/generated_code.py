"""Reads the code that Inductor writes for a graph: its kernels, and what each call reads and writes."""

import operator
import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Call:
    """One call of the wrapper: a kernel that Inductor wrote or a function of a library.

    ``reads`` and ``writes`` hold how often each buffer is read and written: for a Triton kernel, by the loads and
    stores in its source; for a C++ kernel and a library's function, once for each that it is given or returns.
    """

    name: str
    reads: Counter[str]
    writes: Counter[str]

    @property
    def is_kernel(self) -> bool:
        """Whether Inductor wrote it."""
        return self.name.startswith(("triton_", "cpp_"))


@dataclass(frozen=True)
class GeneratedCode:
    """The module that Inductor wrote for one graph."""

    source: str

    @cached_property
    def kernels(self) -> dict[str, str]:
        """Name -> source of each kernel."""
        pattern = r"^(\w+) = async_compile\.(?:triton|cpp_pybinding)\(.*?, r?'''(.*?)^'''"
        return dict(re.findall(pattern, self.source, re.DOTALL | re.MULTILINE))

    @cached_property
    def calls(self) -> list[Call]:
        """All calls, in the order in which they run."""
        body = self.source[self.source.index("    def call(self, args):") :]
        kernels = r"^ +((?:triton|cpp)_\w+)(?:\.run)?\((.*)\)$"
        functions = r"^ +(?:(\w+) = )?(torch\.ops\.[\w.]+|extern_kernels\.\w+)\((.*)\)$"
        found = [
            (match.start(), self._kernel_call(*match.groups())) for match in re.finditer(kernels, body, re.MULTILINE)
        ]
        found += [
            (match.start(), _function_call(body, *match.groups()))
            for match in re.finditer(functions, body, re.MULTILINE)
        ]
        return [call for _, call in sorted(found, key=operator.itemgetter(0))]

    def _kernel_call(self, name: str, text: str) -> Call:
        source, given = self.kernels[name], re.split(r", (?![^()]*\))", text)
        if name.startswith("cpp_"):
            (declared,) = re.findall(r"void +kernel\((.*?)\)", source, re.DOTALL)
            pointers = list(zip(declared.split(","), given, strict=True))
            reads = [buffer for pointer, buffer in pointers if "const " in pointer or "in_out_ptr" in pointer]
            return Call(
                name, Counter(reads), Counter(buffer for pointer, buffer in pointers if "const " not in pointer)
            )
        buffers = dict(zip(parameters(source), given, strict=False))
        loads = re.findall(r"tl\.load\((\w+)", source)
        stores = re.findall(r"(?:tl\.store|store_codes\d)\((\w+)", source)
        return Call(name, Counter(buffers[name] for name in loads), Counter(buffers[name] for name in stores))


def _function_call(body: str, result: str | None, name: str, text: str) -> Call:
    """A call whose results are taken out of ``result``, or written to what is given as ``out``."""
    before, _, out = text.partition("out=")
    taken = re.findall(rf"^ +(\w+) = {result}(?:\[\d\])?$", body, re.MULTILINE) if result else []
    return Call(name, Counter(re.findall(r"\b[a-z]\w*\d\b", before)), Counter([*taken, *re.findall(r"^\w+", out)]))


def parameters(kernel: str) -> list[str]:
    """Names of a Triton kernel's parameters."""
    (text,) = re.findall(r"^def \w+\((.*)\):$", kernel, re.MULTILINE)
    return [part.partition(":")[0].strip() for part in text.split(",")]

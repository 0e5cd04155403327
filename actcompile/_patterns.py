"""Module-name patterns of ``skip`` and ``overrides`` that match nothing, and what may have been meant."""

import difflib
import logging
import re
from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase

from .config import Config

log = logging.getLogger(__name__)

_MAX_CLOSEST = 3
# Of difflib's ratio, from 0 to 1.
_SIMILAR = 0.5

_warned: set[str] = set()


def unmatched(config: Config, sites: Iterable[Iterable[str]]) -> list[str]:
    """One line for each pattern of ``config`` that fits no module of graphs with these ``sites`` (``call_sites``)."""
    modules = {site.rpartition("/")[0] for graph in sites for site in graph}
    given = [("skip", pattern) for pattern in config.skip]
    given += [("overrides", pattern) for pattern, _ in config.override_pairs]
    return [
        f"{field} must name modules that the model calls, got {pattern!r}, which matches none of them: "
        f"{_remedy(pattern, modules)}"
        for field, pattern in given
        if not any(fnmatchcase(module, pattern) for module in modules)
    ]


def warn(lines: Iterable[str]) -> None:
    """Logs each of ``lines`` once."""
    for line in lines:
        if line not in _warned:
            _warned.add(line)
            log.warning("%s", line)


def forget() -> None:
    """Lets all lines be logged again."""
    _warned.clear()


def _remedy(pattern: str, modules: Collection[str]) -> str:
    below = f"{pattern}.*"
    if any(fnmatchcase(module, below) for module in modules):
        return f"it holds modules that are called, write {below!r}"
    names = sorted({_folded(module) for module in modules if module})
    closest = sorted(((_likeness(pattern, name), name) for name in names), key=lambda found: (-found[0], found[1]))
    similar = [repr(name) for ratio, name in closest[:_MAX_CLOSEST] if ratio >= _SIMILAR]
    if similar:
        return f"the closest are {', '.join(similar)}"
    return f"there are {', '.join(map(repr, names[:_MAX_CLOSEST]))}{' ...' if len(names) > _MAX_CLOSEST else ''}"


def _folded(module: str) -> str:
    """ "blocks.3.fc" -> "blocks.*.fc": a pattern, the same for all layers."""
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", module)


def _likeness(pattern: str, name: str) -> float:
    """How alike both are, or their last parts."""
    pairs = ((pattern, name), (pattern.rpartition(".")[2], name.rpartition(".")[2]))
    ratios = (difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs if set(pair[0]) - {"*"})
    return max(ratios, default=0.0)

"""Whom to cite for a method."""

from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Cited(Protocol):
    """Anything that names its source."""

    citation: str


def citation(method: Cited) -> str:
    """Return the BibTeX of the papers that a method and its parts come from, each once.

    Args:
        method: a method of attribution, as an instance (then with its curvature, solver, or the methods that it blends) or a
            class.

    >>> from retrograd import Implicit, TracIn
    >>> print(citation(TracIn())[:27])
    @inproceedings{pruthi2020tr
    >>> citation(Implicit()).count("@"), citation(Implicit).count("@")          # EK-FAC's two papers, one of them cited by both
    (3, 2)
    """
    entries: dict[str, str] = {}
    for text in _sources(method):
        for entry in text.strip().split("\n@"):
            entry = entry if entry.startswith("@") else "@" + entry
            entries.setdefault(entry.partition(",")[0], entry)
    return "\n".join(entries.values())


def _sources(part: Any) -> Iterator[str]:
    if isinstance(getattr(part, "citation", None), str):
        yield part.citation
    if is_dataclass(part) and not isinstance(part, type):
        for field in fields(part):
            value = getattr(part, field.name)
            for inner in value if isinstance(value, Sequence) and not isinstance(value, str) else [value]:
                yield from _sources(inner)

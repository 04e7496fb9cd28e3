"""Whom to cite for a method."""

from typing import Protocol, runtime_checkable


@runtime_checkable
class Cited(Protocol):
    """Anything that names its source."""

    citation: str


def citation(method: Cited) -> str:
    """Return the BibTeX of the paper that a method comes from.

    Args:
        method: a method of attribution, as an instance or a class.

    >>> from retrograd import TracIn
    >>> print(citation(TracIn())[:27])
    @inproceedings{pruthi2020tr
    """
    return method.citation

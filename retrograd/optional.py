"""Packages that only some features need."""

from importlib import import_module
from types import ModuleType

from retrograd.errors import MissingDependency


def optional(name: str, extra: str) -> ModuleType:
    """Import a package that is not among the core dependencies.

    Args:
        name: the module to import.
        extra: the extra of retrograd that installs it.

    Raises:
        MissingDependency: it is not installed, with what to do.
    """
    try:
        return import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise MissingDependency(
            f"this needs the package {package}. Install it with: pip install 'retrograd[{extra}]'."
        ) from error

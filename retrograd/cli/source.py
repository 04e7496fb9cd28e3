"""A function that is named on the command line: ``path/to/script.py:function`` or ``package.module:function``."""

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from retrograd.errors import InputError


@dataclass(frozen=True)
class Source:
    """The place of a function.

    Attributes:
        module: name of its module, the stem of the file for a script.
        function: its own name.
        script: the file, if it is in one.

    >>> Source.of("package.module:load")
    Source(module='package.module', function='load', script=None)
    """

    module: str
    function: str
    script: Path | None = None

    @staticmethod
    def of(text: str) -> "Source":
        """Read ``path/to/script.py:function`` or ``package.module:function``.

        Raises:
            InputError: it is neither, there is no such file, or its name is taken.
        """
        place, _, function = text.rpartition(":")
        if not place or not function.isidentifier():
            raise InputError(f"SOURCE is path/to/script.py:function or package.module:function, got {text!r}.")
        script = Path(place)
        if script.suffix != ".py":
            if not all(part.isidentifier() for part in place.split(".")):
                raise InputError(f"{place} is neither the name of a module nor a file that ends with .py.")
            return Source(place, function)
        if not script.is_file():
            raise InputError(f"there is no file {script}.")
        if script.stem in sys.modules:
            raise InputError(f"{script} is called like a module that is loaded already, {script.stem}. Rename it.")
        return Source(script.stem, function, script)

    @contextmanager
    def importable(self) -> Iterator[None]:
        """Let what lies beside the script, or in the working folder, be imported meanwhile, as Python does for its script."""
        folder = str((self.script.parent if self.script else Path()).resolve())
        sys.path.insert(0, folder)
        try:
            yield
        finally:
            with suppress(ValueError):  # somebody took it away
                sys.path.remove(folder)
            if self.script:
                sys.modules.pop(self.module, None)

    def imported(self) -> ModuleType | None:
        """Import the module; None if there is none. Errors in it are those of whoever wrote it."""
        if self.script is None:
            try:
                return importlib.import_module(self.module)
            except ModuleNotFoundError as error:
                if error.name is None or not f"{self.module}.".startswith(f"{error.name}."):
                    raise  # the module is there and misses another one
                return None
        spec = importlib.util.spec_from_file_location(self.module, self.script.resolve())
        if spec is None or spec.loader is None:
            return None
        module = importlib.util.module_from_spec(spec)
        sys.modules[self.module] = module  # as an import does: dataclasses look their module up
        spec.loader.exec_module(module)
        return module

    def named(self, module: ModuleType | None) -> Callable[[], Any]:
        """Return the function.

        Raises:
            InputError: there is no such module, or no such function in it.
        """
        if module is None:
            raise InputError(
                f"there is no module {self.module}, neither in this folder nor among the installed packages. The name of a "
                "script ends with .py."
            )
        found = getattr(module, self.function, None)
        if not callable(found):
            own = [thing for thing in vars(module).values() if inspect.isfunction(thing) and thing.__module__ == self.module]
            names = ", ".join(one.__name__ for one in own if not one.__name__.startswith("_"))
            raise InputError(f"{self.script or self.module} has no function {self.function}. It has: {names or 'none'}.")
        return found

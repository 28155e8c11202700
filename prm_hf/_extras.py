"""What a room of the package needs besides torch, asked for before it is imported; names that are loaded late."""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from typing import Any


def require(room: str, *modules: str, extra: str = "trl") -> None:
    """Raises ImportError with the pip command unless `modules` are installed."""
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise ImportError(f'`{room}` needs {", ".join(missing)}: pip install "prm-hf[{extra}]"', name=missing[0])


def load_late(
    package: str, modules: Mapping[str, str], check: Callable[[str], None] | None = None
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The `__getattr__` and `__dir__` of a package that imports a module when a name of it is first used.

    Args:
        package: its `__name__`.
        modules: by name the module of the package that has it.
        check: is called with a name before its module is imported, and may raise ImportError.
    """

    def load(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        if check is not None:
            check(name)
        return getattr(importlib.import_module(f".{modules[name]}", package), name)

    return load, lambda: sorted({*vars(sys.modules[package]), *modules})

"""What a room of the package needs besides torch, asked for before it is imported."""

import importlib.util


def require(room: str, *modules: str, extra: str = "trl") -> None:
    """Raises ImportError with the pip command unless `modules` are installed."""
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise ImportError(f'`{room}` needs {", ".join(missing)}: pip install "prm-hf[{extra}]"', name=missing[0])

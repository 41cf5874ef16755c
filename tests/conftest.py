"""Kernels run in Triton's interpreter here, repaired; the choice is made before anything imports triton."""

import importlib.util
import os

os.environ.setdefault("TRITON_INTERPRET", "1")

if os.environ["TRITON_INTERPRET"] == "1" and importlib.util.find_spec("triton"):
    from tests import interpreter

    interpreter.install()


def pytest_collection_modifyitems(items: list) -> None:
    """Slow tests first, so that no worker is left alone with one at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)

"""Scripts of the recipes as modules."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Factory: the module of a script, which finds its neighbours as when it is run."""
    monkeypatch.syspath_prepend(str(RECIPES))
    return importlib.import_module

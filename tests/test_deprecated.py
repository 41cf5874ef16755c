"""Module paths and names before the layers: they still import and unpickle, with a DeprecationWarning."""

from __future__ import annotations

import importlib
import io
import pickle
import sys
import warnings
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch

import fused_attn
from fused_attn import Mask, deprecated, modules, spec, testing
from fused_attn.runtime import dispatch


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """The old modules are imported anew in each test, and are gone after it."""
    names = {f"fused_attn.{old}" for old in deprecated.MOVED}

    def forget() -> None:
        for name in names & set(sys.modules):
            parent, _, child = name.rpartition(".")
            vars(sys.modules.get(parent, fused_attn)).pop(child, None)
        for name in names:
            sys.modules.pop(name, None)

    forget()
    yield
    forget()


@pytest.mark.parametrize("old", deprecated.MOVED)
def test_an_old_path_is_the_new_module(old: str) -> None:
    new = importlib.import_module(f"fused_attn.{deprecated.MOVED[old]}")
    with pytest.warns(DeprecationWarning) as caught:
        module = importlib.import_module(f"fused_attn.{old}")
    assert str(caught[-1].message) == f"fused_attn.{old} is {new.__name__} now"
    assert module is new or old == "launch"
    names = [name for name in vars(new) if not name.startswith("__")]
    assert names and all(getattr(module, name) is getattr(new, name) for name in names)


@pytest.mark.filterwarnings("ignore:fused_attn.:DeprecationWarning")
def test_what_is_replaced_through_an_old_path_is_replaced() -> None:
    with mock.patch("fused_attn.dispatch.run", 5):
        assert dispatch.run == 5
    names: dict[str, Any] = {}
    exec("from fused_attn.masks import *", names)
    assert names["Mask"] is Mask


def test_the_finder_is_installed_once() -> None:
    deprecated.install()
    assert sum(type(x).__name__ == "_Finder" for x in sys.meta_path) == 1


def test_the_warning_points_at_the_import() -> None:
    with pytest.warns(DeprecationWarning) as caught:
        import fused_attn.masks  # noqa: F401

        _ = spec.BackendError
    assert {x.filename for x in caught} == {__file__}


@pytest.mark.parametrize("name", ("BackendError", "Problem", "HALF", "Dropout"))
def test_names_of_spec(name: str) -> None:
    with pytest.warns(DeprecationWarning, match=rf"^fused_attn.spec.{name} is fused_attn.spec\.\w+\.{name} now$"):
        getattr(spec, name)


@pytest.mark.parametrize("name", ("Problem", "HALF", "PARAMETERS", "allowed", "gradients", "results"))
def test_names_of_testing(name: str) -> None:
    with pytest.warns(DeprecationWarning, match=rf"^fused_attn.testing.{name} is fused_attn.testing\.\w+\.{name} now$"):
        getattr(testing, name)


@pytest.mark.parametrize("name", ("nothing", "_finite_scores", "__wrapped__"))
def test_other_names_are_absent(name: str) -> None:
    for package in (spec, testing):
        with pytest.raises(AttributeError, match=f"module '{package.__name__}' has no attribute '{name}'"):
            getattr(package, name)
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'fused_attn\.nothing'"):
        importlib.import_module("fused_attn.nothing")


def test_new_names_give_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for module in (fused_attn, spec, testing):
            for name in dir(module):
                getattr(module, name)


def renamed(x: Any, new: str, old: str) -> bytes:
    """A pickle of x as a version with the old name made it. Protocol 0 is text."""
    text = pickle.dumps(x, protocol=0)
    assert new.encode() in text
    return text.replace(new.encode(), old.encode())


def test_an_old_mask_unpickles() -> None:
    mask = Mask.lengths(torch.tensor([3, 5]))
    with pytest.warns(DeprecationWarning, match=r"fused_attn\.masks"):
        assert pickle.loads(renamed(mask, "fused_attn.spec.masks", "fused_attn.masks")) == mask


def test_an_old_error_unpickles() -> None:
    error = fused_attn.BackendError("no")
    with pytest.warns(DeprecationWarning, match=r"fused_attn\.spec\.BackendError"):
        found = pickle.loads(renamed(error, "fused_attn.spec.problem", "fused_attn.spec"))
    assert type(found) is fused_attn.BackendError and found.args == error.args


def test_an_old_module_loads() -> None:
    module, x = modules.MultiheadAttention(16, 2), torch.randn(3, 2, 16)
    old = renamed(module, "_no_fast_path", "_here")
    assert torch.equal(pickle.load(io.BytesIO(old))(x, x, x)[0], module(x, x, x)[0])

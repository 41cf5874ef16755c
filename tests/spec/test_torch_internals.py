"""torch's private names mean what the package takes them to mean, and stand in one file."""

from __future__ import annotations

import ast
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.nested._internal.nested_tensor import NestedTensor
from torch.profiler import ProfilerActivity, profile

from fused_attn.spec import torch_internals as internals
from tests import PACKAGE


def inside(transform: Callable, question: Callable[[Tensor], object]) -> object:
    """What a question answers about a tensor inside a transform of torch.func."""
    answers = []

    def function(x: Tensor) -> Tensor:
        answers.append(question(x))
        return x.sum()

    transform(function)(torch.ones(3))
    return answers[0]


def jvp(function: Callable) -> Callable:
    return lambda x: torch.func.jvp(function, (x,), (x,))


TRANSFORMS = {"vmap": torch.func.vmap, "grad": torch.func.grad, "jvp": jvp}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_of_torch_func(name: str) -> None:
    def ask(x: Tensor) -> tuple[bool, bool, bool]:
        return internals.functorch_active(), internals.is_functorch_wrapped(x), internals.is_batched(x)

    assert inside(TRANSFORMS[name], ask) == (True, True, name == "vmap")
    assert ask(torch.ones(3)) == (False, False, False)


@pytest.mark.parametrize("transform", (torch.func.grad, jvp))
def test_functorch_disabled_leaves_tensors_from_outside_to_autograd(transform: Callable) -> None:
    x = torch.ones(3, requires_grad=True)

    def ask(_: Tensor) -> tuple[bool, bool, bool]:
        with internals.functorch_disabled():
            y = x * 2
        return internals.is_functorch_wrapped(x * 2), internals.is_functorch_wrapped(y), y.requires_grad

    assert inside(transform, ask) == (True, False, True)


def test_wrappers_of_torch_func_open_from_the_outermost() -> None:
    def ask(x: Tensor) -> tuple[bool, bool, tuple[int, ...]]:
        inner = internals.unwrap_functorch(x)
        return internals.is_batched(x), internals.is_batched(inner), tuple(internals.unwrap_functorch(inner).shape)

    assert inside(lambda f: torch.func.vmap(torch.func.grad(f)), lambda x: ask(x[None].sum(0))) == (False, True, (3,))


def test_batched_cotangents_are_distinguished_from_vmap() -> None:
    x, found = torch.ones(3, requires_grad=True), []
    y = x * 2
    y.register_hook(lambda g: found.append((internals.is_autograd_batched(g), internals.is_batched(g))))
    torch.autograd.grad(y, x, torch.eye(3), is_grads_batched=True)
    torch.autograd.grad(x * 1, x, torch.ones(3))
    assert found[0] in ((True, False), (False, True))  # autograd's own kind, or vmap's in a torch that uses it
    assert not internals.is_autograd_batched(x)


def test_forward_ad_active() -> None:
    assert not internals.forward_ad_active()
    with forward_ad.dual_level():
        assert internals.forward_ad_active()
    assert inside(jvp, lambda _: internals.forward_ad_active())
    assert not inside(torch.func.grad, lambda _: internals.forward_ad_active())
    assert not internals.forward_ad_active()


def test_tracing_of_torch_jit() -> None:
    found = []
    torch.jit.trace(lambda x: found.append(internals.jit_tracing()) or x + 1, torch.ones(3), check_trace=False)
    assert found == [True]
    assert not internals.jit_tracing()


OBSERVERS: dict[str, Callable[[], AbstractContextManager]] = {
    "forward AD": forward_ad.dual_level,
    "fake tensors": FakeTensorMode,
    "a default device": lambda: torch.device("meta"),
    "a profiler": lambda: profile(activities=[ProfilerActivity.CPU], acc_events=True),
}


@pytest.mark.parametrize("name", OBSERVERS)
def test_observed(name: str) -> None:
    assert not internals.observed()
    with OBSERVERS[name]():
        assert internals.observed()
        assert internals.dispatch_mode_count() == (name == "fake tensors")
        assert internals.function_mode_count() == (name == "a default device")
        assert internals.profiler_enabled() == (name == "a profiler")
    assert not internals.observed()


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_observed_inside_torch_func(transform: Callable) -> None:
    assert inside(transform, lambda _: internals.observed())


def test_autograd_modes_are_not_observed() -> None:
    for mode in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), nullcontext()):
        with mode:
            assert not internals.observed()


def test_fake_tensors() -> None:
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(torch.ones(3))
    assert internals.is_fake(fake)
    assert not internals.is_fake(torch.ones(3))
    assert not internals.is_fake(torch.ones(3, device="meta"))
    with mode:
        assert inside(torch.func.grad, internals.is_fake)


def test_below_autograd_makes_no_graph() -> None:
    x = torch.ones(3, requires_grad=True)
    with internals.below_autograd():
        y = x * 2
        assert torch.is_grad_enabled()
    assert not y.requires_grad
    assert (x * 2).requires_grad


def test_settings_of_torch() -> None:
    before = torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()
    try:
        for precision, deterministic in (("high", True), ("highest", False)):
            torch.set_float32_matmul_precision(precision)
            torch.use_deterministic_algorithms(deterministic)
            assert internals.float32_matmul_precision() == precision
            assert internals.deterministic_algorithms() == deterministic
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.use_deterministic_algorithms(before[1])


@pytest.mark.parametrize("device", ("cpu", "cuda"))
@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")
def test_autocast_of_any_device(device: str) -> None:
    assert not internals.any_autocast()
    before = torch.is_autocast_enabled(device)
    torch.set_autocast_enabled(device, True)
    try:
        assert internals.any_autocast()
    finally:
        torch.set_autocast_enabled(device, before)
    assert not internals.any_autocast()


def test_versions_and_views() -> None:
    x = torch.ones(4)
    first = internals.version(x)
    x[:2].zero_()
    assert internals.version(x) == first + 1
    assert internals.is_view(x[:2])
    assert not internals.is_view(x)


def test_zero_tensors() -> None:
    zero = torch._efficientzerotensor(3)
    assert internals.is_zero_tensor(zero)
    assert not internals.is_zero_tensor(zero.clone()) and not internals.is_zero_tensor(torch.zeros(3))


@pytest.mark.parametrize("causal", (False, True))
def test_sdpa_on_cpu(causal: bool) -> None:
    q, k, v = (torch.randn(1, 2, length, 8, requires_grad=True) for length in (5, 5, 5))
    out, lse = internals.sdpa_on_cpu(q.detach(), k.detach(), v.detach(), 0.0, causal, scale=0.5)
    scores = (q.double() @ k.double().mT * 0.5).masked_fill(torch.ones(5, 5).triu(1).bool() & causal, -torch.inf)
    torch.testing.assert_close(lse, scores.logsumexp(-1).float().detach())
    public = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=0.5)
    assert torch.equal(out, public)
    dout = torch.randn_like(out)
    grads = internals.sdpa_on_cpu_backward(dout, q.detach(), k.detach(), v.detach(), out, lse, 0.0, causal, scale=0.5)
    for got, expected in zip(grads, torch.autograd.grad(public, (q, k, v), dout), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize(("transposed", "dim"), ((False, 1), (True, 2)))
def test_jagged(transposed: bool, dim: int) -> None:
    x = torch.nested.nested_tensor_from_jagged(torch.ones(9, 2, 4), torch.tensor([0, 2, 9]))
    x = x.transpose(1, 2) if transposed else x
    assert internals.jagged_dim(x) == dim
    assert internals.jagged_bounds(x) == {"min_seqlen": None, "max_seqlen": None}
    assert internals.jagged_longest(x) == 7
    assert internals.jagged_bounds(x)["max_seqlen"] == 7


# ---------------------------------------------------------------------------------------------------------- one file

TENSOR_NAMES = {x for kind in (Tensor, NestedTensor) for x in dir(kind) if x.startswith("_") and not x.startswith("__")}


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def private_names(path: Path) -> list[str]:
    """The private names of torch, of its modules, and of its tensors that a file uses."""
    found, of_torch = [], {"torch"}
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [(x.asname or x.name.split(".")[0], x.name) for x in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [(x.asname or x.name, f"{node.module}.{x.name}") for x in node.names]
        else:
            continue
        names = [(bound, name) for bound, name in names if name.split(".")[0] == "torch"]
        of_torch |= {bound for bound, _ in names}
        found += [name for _, name in names if any(map(private, name.split(".")))]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and private(node.attr):
            root = node.value
            while isinstance(root, ast.Attribute):
                root = root.value
            owner = root.id if isinstance(root, ast.Name) else ""
            if owner in of_torch or (node.attr in TENSOR_NAMES and owner not in ("self", "cls")):
                found.append(ast.unparse(node))
    return found


FILES = [path for path in PACKAGE.rglob("*.py") if path.name != "torch_internals.py" and "triton" not in path.parts]


@pytest.mark.parametrize("path", FILES, ids=lambda path: "/".join(path.relative_to(PACKAGE).parts))
def test_private_names_are_in_one_file(path: Path) -> None:
    assert private_names(path) == []


def test_private_names_are_found(tmp_path: Path) -> None:
    lines = (
        "import torch._dynamo",
        "from torch._C import _is_tracing",
        "from torch.autograd import _profiler_enabled, forward_ad as fw",
        "fw._current_level",
        "torch.ops.aten._foreach_add",
        "x.grad._version",
        "torch.__version__, self._version, x._fields, fw.unpack_dual",
    )
    path = tmp_path / "file.py"
    path.write_text("\n".join(lines))
    assert private_names(path) == [
        "torch._dynamo", "torch._C._is_tracing", "torch.autograd._profiler_enabled", "fw._current_level",
        "torch.ops.aten._foreach_add", "x.grad._version",
    ]  # fmt: skip

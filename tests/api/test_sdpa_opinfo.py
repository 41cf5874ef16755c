"""torch's own samples for scaled_dot_product_attention, through ours: forward and gradient.

torch's list lacks grouped heads with a length that differs and values of another width; they are added here.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing._internal.common_methods_invocations import op_db

import fused_attn
from fused_attn import testing
from fused_attn.spec.problem import HALF
from fused_attn.testing.cases import Case
from fused_attn.testing.inputs import Inputs
from tests.parity import within_budget

OPERATOR = next(op for op in op_db if op.name == "nn.functional.scaled_dot_product_attention")
BACKENDS = ("triton", "sdpa", "tiled", "reference")


@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
    query: Tensor
    key: Tensor
    value: Tensor
    options: dict

    def __str__(self) -> str:
        shapes = "-".join("x".join(map(str, x.shape)) for x in (self.query, self.key, self.value))
        words = [f"{k}={tuple(v.shape) if isinstance(v, Tensor) else v}" for k, v in self.options.items()]
        return "-".join([shapes, *words])


def _more(dtype: torch.dtype) -> list[Sample]:
    """Groups and Dv != D; all leading ranks that torch takes."""

    def make(*shapes: tuple[int, ...], **options: object) -> Sample:
        generator = torch.Generator().manual_seed(len(shapes[0]))
        return Sample(*(torch.randn(s, generator=generator, dtype=dtype) for s in shapes), options)

    flags = torch.arange(5)[:, None] + 2 >= torch.arange(7)
    return [
        make((2, 6, 5, 8), (2, 2, 7, 8), (2, 2, 7, 8), enable_gqa=True),
        make((2, 6, 5, 8), (2, 3, 7, 8), (2, 3, 7, 4), enable_gqa=True, is_causal=True),
        make((2, 5, 3, 8), (2, 1, 7, 8), (2, 1, 7, 12), enable_gqa=True, attn_mask=torch.zeros(3, 7, dtype=dtype)),
        make((3, 2, 6, 5, 8), (3, 2, 2, 7, 8), (3, 2, 2, 7, 8), enable_gqa=True),
        make((6, 5, 8), (2, 7, 8), (2, 7, 8), enable_gqa=True),
        make((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 16)),
        make((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 1), is_causal=True),
        make((5, 8), (7, 8), (7, 4)),
        make((5, 8), (7, 8), (7, 4), attn_mask=flags),
        make((3, 5, 8), (3, 7, 8), (3, 7, 8), attn_mask=flags.expand(3, 5, 7)),
        make((2, 2, 3, 5, 8), (2, 2, 3, 7, 8), (2, 2, 3, 7, 8), attn_mask=flags.expand(2, 2, 1, 5, 7)),
        make((2, 1, 5, 8), (1, 3, 7, 8), (2, 3, 7, 8)),
        make((2, 3, 5, 8), (7, 8), (1, 7, 4), is_causal=True),
        make((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8), attn_mask=flags.float().log().to(dtype), scale=0.7),
    ]


@functools.cache
def samples(dtype: torch.dtype) -> list[Sample]:
    """torch's samples without dropout, whose numbers are not ours to repeat, and then our own."""
    found = []
    for sample in OPERATOR.sample_inputs("cpu", dtype):
        options = {k: v for k, v in sample.kwargs.items() if v is not None}
        if options.get("dropout_p", 0.0) == 0.0:
            found.append(Sample(sample.input, *sample.args, options))
    return found + _more(dtype)


COUNT = len(samples(torch.float32))


def test_opinfo_has_samples() -> None:
    kinds = {(x.query.ndim, *sorted(x.options)) for x in samples(torch.float32)[: -len(_more(torch.float32))]}
    assert COUNT >= 27 and {kind[0] for kind in kinds} >= {3, 4}
    assert any("attn_mask" in kind for kind in kinds) and any("is_causal" in kind for kind in kinds)


def _folded(sample: Sample, mask_grad: bool) -> Inputs:
    """The sample as a four-dimensional problem for the oracle: leading dims spelled out and folded."""
    gqa = sample.options.get("enable_gqa", False)
    tail = 3 if gqa else 2
    lead = torch.broadcast_shapes(*(x.shape[:-tail] for x in (sample.query, sample.key, sample.value)))

    def fold(x: Tensor) -> Tensor:
        x = x.expand(*lead, *x.shape[-tail:])
        heads = x.shape[-3] if x.ndim > 2 else 1
        return x.reshape(-1, heads, *x.shape[-2:])

    q, k, v = map(fold, (sample.query, sample.key, sample.value))
    options = {"causal": sample.options.get("is_causal", False), "alignment": "top_left"}
    options["scale"] = sample.options.get("scale")
    clean = {"q": q, "k": k, "v": v}
    mask = sample.options.get("attn_mask")
    if mask is not None:
        whole = (*(lead if not gqa else (*lead, sample.query.shape[-3])), q.shape[2], k.shape[2])
        mask = mask.expand(whole).reshape(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
        if mask.dtype == torch.bool:
            options["mask"] = mask
        else:
            clean["bias"] = mask
    tensors = {name: x.detach().clone().requires_grad_(name != "bias" or mask_grad) for name, x in clean.items()}
    dout = torch.randn(*q.shape[:3], v.shape[3], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return Inputs(Case(str(sample)), tensors, options, clean, dout.to(q.dtype), None)


@pytest.mark.parametrize(
    ("dtype", "backend"),
    # What is interpreted takes longest, and the parity tests have it in both half types.
    [pytest.param(dtype, x, marks=pytest.mark.nightly if (x, dtype) == ("triton", torch.bfloat16) else [])
     for dtype in (torch.float32, torch.bfloat16) for x in BACKENDS],
)  # fmt: skip
@pytest.mark.parametrize("index", range(COUNT))
def test_sample(index: int, dtype: torch.dtype, backend: str) -> None:
    """Against the float64 oracle, by the tolerance rule; the shape against torch's own answer."""
    sample = samples(dtype)[index]
    leaves = [x.detach().clone().requires_grad_() for x in (sample.query, sample.key, sample.value)]
    options = sample.options | {"backend": backend}
    try:
        out = fused_attn.scaled_dot_product_attention(*leaves, **options)
    except fused_attn.BackendError as refusal:
        assert backend == "sdpa" or (backend == "triton" and "triton is not installed" in str(refusal))
        pytest.skip(str(refusal))
    torchs = torch.nn.functional.scaled_dot_product_attention(sample.query, sample.key, sample.value, **sample.options)
    assert out.shape == torchs.shape and out.dtype == torchs.dtype

    inputs = _folded(sample, mask_grad=False)
    expected = testing.expect(inputs)
    grads = torch.autograd.grad(out, leaves, inputs.dout.view(out.shape))
    got = {"out": out.reshape(expected.oracle["out"].shape)}
    if dtype in HALF:
        # These samples reach to 9 and saturate the softmax. A gradient is then the small difference of large terms, of
        # which one holds the rounded output; in half precision torch's own operator misses the budget too.
        testing.compare(inputs, got, expected, str(sample))
        return
    # Where a leading dim was broadcast, its gradient is a sum that the tolerance rule knows nothing of.
    for name, leaf, grad in zip("qkv", leaves, grads, strict=True):
        assert grad.shape == leaf.shape and grad.isfinite().all()
        if leaf.numel() == inputs.tensors[name].numel():
            got[name] = grad.reshape(inputs.tensors[name].shape)
    testing.compare(inputs, got, expected, str(sample))


@pytest.mark.parametrize("backend", ("tiled", "reference", "triton"))
@pytest.mark.parametrize("shape", ((5, 7), (1, 7), (3, 1, 7), (2, 1, 5, 7), (2, 3, 5, 7), (1,)), ids=str)
def test_float_mask_gradient(shape: tuple[int, ...], backend: str) -> None:
    """A float attn_mask is a bias, and its gradient comes in its own shape."""
    generator = torch.Generator().manual_seed(2)
    leaves = [torch.randn(*s, generator=generator) for s in ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 4), shape)]
    leaves = [x.requires_grad_() for x in leaves]
    if backend == "triton":
        pytest.importorskip("triton")
    got = fused_attn.scaled_dot_product_attention(*leaves, backend=backend)
    double = [x.detach().double().requires_grad_() for x in leaves]
    expected = torch.nn.functional.scaled_dot_product_attention(*double)
    (grad,) = torch.autograd.grad(got.square().sum(), leaves[3])
    (exact,) = torch.autograd.grad(expected.square().sum(), double[3])
    assert grad.shape == leaves[3].shape
    single = [x.detach().requires_grad_() for x in leaves]
    plain = torch.autograd.grad(torch.nn.functional.scaled_dot_product_attention(*single).square().sum(), single[3])[0]
    # Each entry of the mask sums at most 6 terms P (|dP| + |delta|), both at most 2 max|v|^2 Dv.
    absolute = torch.full_like(exact, 6 * 2 * 2 * double[2].detach().abs().amax().item() ** 2 * 4)
    testing.assert_within_budget("attn_mask", grad, exact, plain, absolute, torch.float32)


def test_broadcast_gradients() -> None:
    """Leading dims that were broadcast: the gradient is summed back."""
    shapes = ((2, 1, 5, 8), (1, 3, 7, 8), (3, 7, 4))
    values = [torch.randn(s, dtype=torch.float64) for s in shapes]

    def results(call: Callable[..., Tensor], dtype: torch.dtype, **options: str) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in values]
        out = call(*leaves, **options)
        return [out.detach(), *torch.autograd.grad(out.sin().sum(), leaves)]

    torchs = torch.nn.functional.scaled_dot_product_attention
    oracle, plain = results(torchs, torch.float64), results(torchs, torch.float32)
    for backend in ("tiled", "reference"):
        got = results(fused_attn.scaled_dot_product_attention, torch.float64, backend=backend)
        for name, *columns in zip(("out", "dq", "dk", "dv"), got, oracle, plain, strict=True):
            within_budget(name, *columns)


@pytest.mark.parametrize("backend", ("tiled", "reference"))
def test_dropout_samples_run(backend: str) -> None:
    """torch's samples with dropout: right shape, and the expected value over many seeds is the undropped answer."""
    torch.manual_seed(0)
    seen = [x for x in OPERATOR.sample_inputs("cpu", torch.float64) if x.kwargs.get("dropout_p", 0.0) > 0]
    assert seen
    for sample in seen:
        q, (k, v) = sample.input, sample.args
        ours = fused_attn.scaled_dot_product_attention(q, k, v, **sample.kwargs, backend=backend)
        assert ours.shape == torch.nn.functional.scaled_dot_product_attention(q, k, v, **sample.kwargs).shape
    q, k, v = (torch.randn(1, 1, 6, 4, dtype=torch.float64) for _ in range(3))
    runs = torch.stack([fused_attn.scaled_dot_product_attention(q, k, v, dropout_p=0.5, backend=backend)
                        for _ in range(400)])  # fmt: skip
    exact = fused_attn.scaled_dot_product_attention(q, k, v, backend=backend)
    assert ((runs.mean(0) - exact).abs() <= 5 * runs.std(0) / 400**0.5).all()

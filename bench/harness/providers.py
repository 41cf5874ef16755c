"""fused_attn and its peers as uniform callables.

A provider binds one sample and is then called without arguments; its backward is autograd's. It refuses an unsupported
sample with NotImplementedError when it binds.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fused_attn
from bench.harness.samples import Sample
from fused_attn import tuning
from fused_attn.backends.triton import hopper, settings
from fused_attn.scores import Distance
from fused_attn.spec.problem import Problem

OURS = {"triton": "triton", "hopper": "hopper", "hopper unordered": "hopper"}  # provider: backend
KERNELS = {"triton": ("forward", "dkdv", "dq"), "hopper": ("hopper_forward", "hopper_backward")}

Call = Callable[[], Any]  # out, or (out, lse) where the case returns it


@dataclass(frozen=True)
class Provider:
    """One implementation of attention.

    bind: makes the callable of a sample. scope: entered around every call and backward. no_backward: why a sample has
    no backward, if so. inexact: approximates by design, so that its error is recorded but not judged. words: keywords
    of fused_attn's public call; only fused_attn has them, and its failures count as failures of the run.
    """

    name: str
    bind: Callable[[Sample], Call]
    scope: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    no_backward: Callable[[Sample], str | None] = lambda x: None
    config: Callable[[Sample], str] = lambda x: ""
    inexact: bool = False
    words: dict[str, Any] | None = field(default=None, compare=False)

    @property
    def ours(self) -> bool:
        return self.words is not None


# -------------------------------------------------------------------------------------------------------------- ours


@contextlib.contextmanager
def pinned(configs: dict[str, tuning.Config]) -> Iterator[None]:
    """Override kernel configurations, in the backward too.

    On a GPU autograd runs the backward in another thread, where this thread's override would not hold.
    """
    with tuning.override(**configs), torch.autograd.set_multithreading_enabled(False):
        yield


def ours(
    backend: str | None = "triton",
    name: str = "",
    configs: dict[str, tuning.Config] | None = None,
    deterministic: bool | None = None,
) -> Provider:
    """fused_attn's public call; configs overrides kernel configurations, backend None is the default choice."""
    words = {"backend": backend} | ({} if deterministic is None else {"deterministic": deterministic})

    def bind(x: Sample) -> Call:
        kwargs, qkv = x.inputs.kwargs | words, x.inputs.qkv
        if x.case.lengths:
            return lambda: fused_attn.attention_varlen(*qkv, **kwargs).transpose(0, 1)[None]  # the layout of q
        return lambda: fused_attn.attention(*qkv, **kwargs)

    def config(x: Sample) -> str:
        if x.case.lengths:
            return ""
        chosen = fused_attn.explain(*x.inputs.qkv, **x.inputs.kwargs | words).backend
        found = [chosen] if backend is None and chosen else []
        return ", ".join([*found, *tiles(chosen, x.problem)])

    scope = (lambda: pinned(configs)) if configs else contextlib.nullcontext
    return Provider(name or backend or "fused_attn", bind, scope, config=config, words=words)


def tiles(backend: str | None, p: Problem) -> list[str]:
    """Configurations of the main kernels of a backend for a problem."""
    if backend not in KERNELS:
        return []
    config = hopper._config if backend == "hopper" else settings.config
    return [f"{kernel} {spelled(config(kernel, p))}" for kernel in KERNELS[backend]]


def spelled(c: tuning.Config) -> str:
    """A configuration without spaces."""
    return str(c).replace(" ", "")


# ------------------------------------------------------------------------------------------------------------- peers


OTHER = ("score but the dot product", "normalizer but softmax")


def refuse(x: Sample, who: str, *lacking: str) -> None:
    """Raise if a sample has a feature that a peer lacks; lacking: names of the table below."""
    p = x.problem
    there = {
        "softcap": p.softcap is not None,
        "bias": p.bias is not None,
        "ALiBi": p.slopes is not None,
        "sink": p.sink is not None,
        "tensor mask": p.mask is not None,
        "interval mask": x.span == "other",
        "tensor scale": isinstance(p.scale, Tensor),
        "dropout": p.dropout is not None,
        "log-sum-exp to return": p.return_lse,
        "grouped heads": p.group > 1,
        "score but the dot product": p.score is not None,
        "normalizer but softmax": p.normalizer != "softmax",
    }
    if found := [name for name in lacking if there[name]]:
        raise NotImplementedError(f"{who} has no {', no '.join(found)}")


def allowed(p: Problem) -> Tensor | None:
    """Intervals, pattern and tensor mask as one bool mask, None if every key is visible."""
    if p.unbounded:
        return p.mask
    rows, cols = (torch.arange(n, device=p.q.device) for n in p.shape[2:])
    grid = p.visible(rows, cols)
    alike = torch.equal(grid[:, :, :1].expand_as(grid), grid)  # torch is faster with a broadcast row
    grid = grid[:, :, :1] if alike else grid
    return grid if p.mask is None else grid & p.mask


def _sdpa(name: str, backend: SDPBackend | None) -> Provider:
    """SDPA by one of its kernels, or by its default."""

    def bind(x: Sample) -> Call:
        refuse(x, "SDPA", *OTHER, "softcap", "ALiBi", "sink", "tensor scale", "log-sum-exp to return")
        p, causal = x.problem, x.span == "causal" and x.problem.mask is None and x.problem.bias is None
        mask = None if causal else allowed(p)
        if p.bias is not None and mask is not None:
            raise NotImplementedError("SDPA takes a bias or a mask, not both")
        words: dict[str, Any] = {"scale": p.scale, "is_causal": causal, "enable_gqa": p.group > 1}
        words |= {"attn_mask": mask if p.bias is None else p.bias, "dropout_p": x.case.dropout_p}
        return lambda: F.scaled_dot_product_attention(p.q, p.k, p.v, **words)

    return Provider(name, bind, contextlib.nullcontext if backend is None else lambda: sdpa_kernel(backend))


def _naive(x: Sample) -> Call:
    """Attention with the full score matrix in eager PyTorch. An additive score broadcasts q and k to M x N x D.

    The mask and the ALiBi distances are computed beforehand.
    """
    p, (m, n) = x.problem, x.problem.shape[2:]
    seen = allowed(p)
    hidden = None if seen is None else ~seen
    scale = p.scale.view(-1, 1, 1) if isinstance(p.scale, Tensor) else p.scale
    if p.slopes is not None:
        i, j = (torch.arange(size, device=p.q.device) for size in (m, n))
        distance = (i[:, None] + p.offset - j).abs().to(p.q.dtype)
    sink = p.q.new_zeros(p.q.shape[1]) if p.normalizer == "softmax1" else p.sink

    def call() -> Any:
        k, v = (t if p.group == 1 else t.repeat_interleave(p.group, 1) for t in (p.k, p.v))
        s = _products(p, k) * scale
        if p.softcap is not None:
            s = p.softcap * torch.tanh(s / p.softcap)
        if p.bias is not None:
            s = s + p.bias
        if p.slopes is not None:
            s = s - p.slopes[..., None, None] * distance
        if hidden is not None:
            s = s.masked_fill(hidden, -torch.inf)
        if sink is not None:
            s = torch.cat([s, sink[:, None, None].expand(*s.shape[:-1], 1)], -1)
        weights = torch.sigmoid(s) if p.sigmoid else torch.softmax(s, -1)
        if sink is not None:
            weights = weights[..., :-1]
        if x.case.dropout_p:
            weights = torch.dropout(weights, x.case.dropout_p, True)
        out = weights @ v
        return (out, torch.logsumexp(s.float(), -1)) if p.return_lse else out

    return call


def _products(p: Problem, k: Tensor) -> Tensor:
    """Scores (B, Hq, M, N), with k repeated for each query head; a distance as a product and two norms, which avoids
    M x N x D."""
    if p.score is None:
        return p.q @ k.mT
    if not isinstance(p.score, Distance):
        return p.score.materialize(p.q, k, p.q.dtype)
    rows, keys = (x.square().sum(-1) / 2 for x in (p.q, k))
    return (p.q @ k.mT - rows[..., None] - keys[..., None, :]) / torch.as_tensor(p.score.h).view(-1, 1, 1) ** 2


def _flex(x: Sample) -> Call:
    refuse(x, "FlexAttention", *OTHER, "sink", "dropout", "log-sum-exp to return")
    from torch._functorch import config
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    config.donated_buffer = False  # else the backward cannot be timed on a retained graph
    torch._dynamo.reset()
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    p, (m, n) = x.problem, x.problem.shape[2:]
    if _no_flex_backward(x):  # it refuses tensors that require grad, even under no_grad
        p = p.replace(**{name: t.detach() for name, t in p.tensors().items()})
    seen = _flex_mask(p)
    ids = (None, None) if p.pattern is None else (p.pattern.q_ids, p.pattern.kv_ids)
    grids = (p.mask, None if p.pattern is None else p.pattern.blocks)
    shape = [max(1 if t is None else t.shape[d] for t in grids) for d in (0, 1)]
    shape[0] = max(shape[0], *(1 if t is None else t.shape[0] for t in (p.span.lo, p.span.hi, *ids)))
    block_mask = create_block_mask(seen, *(s if s > 1 else None for s in shape), m, n, p.q.device) if seen else None
    words: dict[str, Any] = {"block_mask": block_mask, "enable_gqa": p.group > 1}
    words["scale"] = 1.0 if isinstance(p.scale, Tensor) else p.scale
    score = _flex_score(p)
    return lambda: compiled(p.q, p.k, p.v, score_mod=score, **words)


def _flex_score(p: Problem) -> Callable | None:
    """score_mod for FlexAttention, or None."""
    scale, cap, bias, slopes = (x if isinstance(x, Tensor) else None for x in (p.scale, p.softcap, p.bias, p.slopes))
    cap = p.softcap if cap is None else cap
    if all(x is None for x in (scale, cap, bias, slopes)):
        return None
    scale = scale if scale is None or scale.ndim else scale.expand(p.q.shape[1])
    strides = None if bias is None else [int(size > 1) for size in bias.shape]

    def score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if scale is not None:
            s = s * scale[h]
        if cap is not None:
            s = cap * torch.tanh(s / cap)
        if bias is not None:
            s = s + bias[b * strides[0], h * strides[1], i * strides[2], j * strides[3]]
        if slopes is not None:
            s = s - (slopes[h] if slopes.ndim == 1 else slopes[b, h]) * (i + p.offset - j).abs()
        return s

    return score


def _flex_mask(p: Problem) -> Callable | None:
    """mask_mod for FlexAttention, or None if every key is visible."""
    span, mask, pattern = p.span, p.mask, p.pattern
    if p.unbounded and mask is None:
        return None
    left, right, lo, hi = span.left, span.right, span.lo, span.hi
    strides = None if mask is None else [int(size > 1) for size in mask.shape]

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        yes = j >= 0
        if left is not None:
            yes = yes & ((j >= i + left) | (j < span.sinks))
        if right is not None:
            yes = yes & (j <= i + right)
        if lo is not None:
            yes = yes & (j >= lo[b if lo.shape[0] > 1 else 0, i])
        if hi is not None:
            yes = yes & (j < hi[b if hi.shape[0] > 1 else 0, i])
        if pattern is not None and pattern.q_ids is not None:
            q, k = pattern.q_ids, pattern.kv_ids
            yes = yes & (q[b if q.shape[0] > 1 else 0, i] == k[b if k.shape[0] > 1 else 0, j])
        if pattern is not None and pattern.blocks is not None:
            x = pattern.blocks
            which = b if x.shape[0] > 1 else 0, h if x.shape[1] > 1 else 0
            yes = yes & x[(*which, i // pattern.height, j // pattern.width)]
        if mask is not None:
            yes = yes & mask[b * strides[0], h * strides[1], i * strides[2], j * strides[3]]
        return yes

    return seen


def _no_flex_backward(x: Sample) -> str | None:
    return "compiled FlexAttention has no backward on the CPU" if x.problem.q.device.type == "cpu" else None


NAIVE = Provider("naive", _naive)
PROVIDERS = (
    *(ours(backend, name, deterministic=False if "unordered" in name else None) for name, backend in OURS.items()),
    _sdpa("cudnn", SDPBackend.CUDNN_ATTENTION),
    _sdpa("flash", SDPBackend.FLASH_ATTENTION),
    _sdpa("efficient", SDPBackend.EFFICIENT_ATTENTION),
    _sdpa("math", SDPBackend.MATH),
    Provider("flex", _flex, no_backward=_no_flex_backward),
    NAIVE,
)
TORCH = _sdpa("torch", None)
COMPILED = tuple(x for x in PROVIDERS if x.name in (*OURS, "flex"))

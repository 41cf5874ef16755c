"""The "hopper" backend: Gluon kernels for sm_90. Portable kernels run a backward that the one-pass kernel cannot."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from ...spec.problem import HALF, Problem, Span
from ...tuning import Config, config, validated
from ...tuning.select import SHARED
from . import launcher, portable, settings

ARCHITECTURE = "sm_90"
HEAD_DIMS = (64, 128, 256)  # of tiles
WASTE = 4 / 3  # the most that padding may multiply the head dim by


@functools.cache
def _device_code() -> Any:
    """The kernels and their descriptors; imported on first use, because they import triton."""
    from types import SimpleNamespace

    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from ...kernels import hopper_backward, hopper_backward_wide, hopper_forward, types
    from . import views

    return SimpleNamespace(
        forward=hopper_forward.hopper_forward_kernel,
        prepare=hopper_backward.hopper_prepare_kernel,
        backward=hopper_backward.hopper_backward_kernel,
        wide=hopper_backward_wide.hopper_backward_kernel,
        finish=hopper_backward.hopper_finish_kernel,
        Descriptor=TensorDescriptor,
        layout=gl.NVMMASharedLayout.get_default_for,
        flat=gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1),
        dtypes={torch.float16: gl.float16, torch.bfloat16: gl.bfloat16, torch.float32: gl.float32},
        types=types,
        views=views,
    )


def why_not(p: Problem) -> list[str]:
    """Every reason why these kernels cannot run p. The device is checked first: Gluon aborts the process on other
    GPUs."""
    reasons = _machine(p.q.device)
    if p.q.dtype not in HALF:
        reasons.append(f"{p.q.dtype} is not supported; float16 and bfloat16 are")
    d, dv = p.q.shape[3], p.v.shape[3]
    if d != dv:
        reasons.append(f"v's head dim {dv} is not q's, {d}")
    elif (tile := _tile_dim(d)) is None or tile > WASTE * d:
        reasons.append(f"head dim {d} is not near enough below one of {HEAD_DIMS} to be padded to it")
    elif d % 8:
        reasons.append(f"head dim {d} is not a multiple of 8, so rows of the output do not lie on a grid of 16 bytes")
    elif p.bias is not None and tile == HEAD_DIMS[-1]:
        reasons.append(f"registers do not hold a bias beside head dim {d}")
    lacking = {
        "a tensor mask": p.mask, "dropout": p.dropout, "an additive score": p.w,
        "a term for each row and key": p.key_terms, "a sigmoid": p.sigmoid or None,
        "a mask that is no interval": p.needs_block_mask or None, "a ragged batch": p.ragged,
    }  # fmt: skip
    reasons += [f"{name} is not supported" for name, x in lacking.items() if x is not None]
    if p.span.lo is not None or p.span.hi is not None:
        reasons.append("a mask with bounds for each row is not supported; causal and window are")
    elif not p.empty and _visible_keys(p)[0] >= _visible_keys(p)[1]:
        reasons.append("every row is fully masked")
    for name, x in (("q", p.q), ("k", p.k), ("v", p.v)):
        if not _copyable(x):
            reasons.append(f"{name}'s rows do not lie apart on a grid of 16 bytes: strides {tuple(x.stride())}")
    return reasons


def unproven(p: Problem) -> list[str]:
    """Why a call that names no backend does not come here yet."""
    kernels = ["hopper_forward"] if p.deterministic else ["hopper_forward", "hopper_backward"]
    return [
        f"{name} has no validated row for this head dim in the {ARCHITECTURE} tuning table; reached only by name"
        for name in kernels
        if not validated(name, ARCHITECTURE, p.q.dtype, p.q.shape[3], p.v.shape[3], with_modifiers=_has_modifiers(p))
    ]


def _machine(device: torch.device) -> list[str]:
    if not settings.INSTALLED:
        return ["triton is not installed"]
    if device.type != "cuda" or torch.version.hip:
        return ["needs an NVIDIA GPU of compute capability 9.0"]
    found = torch.cuda.get_device_capability(device)
    return [] if found == (9, 0) else [f"needs compute capability 9.0, this GPU has {found[0]}.{found[1]}"]


_multiprocessors = settings.multiprocessors


def _tile_dim(d: int) -> int | None:
    return next((x for x in HEAD_DIMS if d <= x), None)


def _copyable(x: Tensor) -> bool:
    """True if TMA can copy boxes of x: pointer and strides are multiples of 16 bytes, and rows are contiguous."""
    per = 16 // x.element_size()
    apart = [s for n, s in zip(x.shape[:3], x.stride(), strict=False) if n > 1]
    return x.stride(3) == 1 and _aligned(x) and all(s > 0 and s % per == 0 for s in apart)


def _aligned(x: Tensor) -> bool:
    """True if x is aligned to 16 bytes, or has no address yet (while tracing, or in a subclass): the operator checks
    again."""
    if torch.compiler.is_compiling() or type(x) not in (Tensor, torch.nn.Parameter):
        return True
    try:
        return x.data_ptr() % 16 == 0
    except RuntimeError:
        return True


def _visible_keys(p: Problem) -> tuple[int, int]:
    """The keys that some row may attend to, as (first, last), last excluded."""
    _, _, m, n = p.shape
    left, right = p.span.left, p.span.right
    return max(0, left or 0), n if right is None else min(n, m + right)


def _moved(span: Span, by: int) -> Span:
    """The same interval for rows and keys that are counted from elsewhere: (first row - first key) grows by `by`."""
    left, right = (None if x is None else x + by for x in (span.left, span.right))
    return Span(left, right)


def _has_modifiers(p: Problem) -> bool:
    """True if the tuning table's rows for modified scores apply. Masks and dropout never reach these kernels."""
    return any(x is not None for x in (p.softcap, p.bias, p.slopes)) or not isinstance(p.scale, float)


def _config(kernel: str, p: Problem) -> Config:
    return config(kernel, ARCHITECTURE, p.q.dtype, p.q.shape[3], p.v.shape[3], with_modifiers=_has_modifiers(p))


def _descriptor(x: Tensor, rows: int) -> Any:
    """A TMA descriptor with boxes of `rows` rows of one head. Elements outside x read as zeros and are not written."""
    code = _device_code()
    box = [1, 1, rows, _tile_dim(x.shape[3])]
    # TMA checks the stride of a dim of size 1 too, which may be anything.
    strides = [8 if n == 1 else s for n, s in zip(x.shape[:3], x.stride(), strict=False)]
    return code.Descriptor(x, list(x.shape), [*strides, 1], box, code.layout(box, code.dtypes[x.dtype]))


record = portable.record  # nothing here reads values


def forward(p: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, lse, peak, log_sum); call under no_grad."""
    code = _device_code()
    b, hq, m, _ = p.shape
    # Invisible keys may hold NaN, so the kernel does not get them.
    first, last = _visible_keys(p)
    k, v = p.k, p.v
    if last - first < p.shape[3]:
        k, v = (x[:, :, first:last] for x in (k, v))
    span = _moved(p.span, -first)
    out = p.empty_out()
    found = p.empty_lse(), p.empty_lse(), p.empty_lse()
    c = _config("hopper_forward", p)
    d = _tile_dim(p.q.shape[3])
    tiles = -(-m // (c.BLOCK_M * c.consumers)) * b * hq
    with settings.device_of(p.q):
        launcher.launch(
            code.forward,
            min(tiles, _multiprocessors(p.q.device)),
            _descriptor(p.q, c.BLOCK_M),
            _descriptor(k, c.BLOCK_N),
            _descriptor(v, c.BLOCK_N),
            _descriptor(out, c.BLOCK_M),
            code.types.Normaliser(*found),
            code.views.score(p, None),
            code.views.span(span),
            None if p.sink is None else p.sink.contiguous(),
            *(m, last - first, hq, b * hq, settings.wave(p, hq)),
            GROUP=p.group,
            CONSUMERS=c.consumers,
            STAGES=c.num_stages,
            PING=c.pingpong,
            OWN_OUT=2 * _bytes(c.consumers * c.BLOCK_M, d) + 2 * _bytes(c.num_stages * c.BLOCK_N, d) <= TILE_MEMORY,
            # The tiles at which registers hold the float32 weights without spills, as in the static table.
            UNPACKED=c.consumers == 2 and c.BLOCK_N + d // 2 <= (96 if _has_modifiers(p) else 160),
            num_warps=c.num_warps,
        )
    return out, *found


TILE_MEMORY = SHARED[ARCHITECTURE] - 1024  # for tiles; the rest is for barriers


def _bytes(rows: int, d: int) -> int:
    """Bytes of shared memory of a tile in half precision."""
    return 2 * rows * d


def backward(
    p: Problem, out: Tensor, peak: Tensor, log_sum: Tensor, dout: Tensor, dlse: Tensor | None, needs: frozenset[str]
) -> dict[str, Tensor]:
    """The gradients that needs names; call under no_grad. In one pass over the keys if possible, else by the portable
    kernels."""
    with settings.device_of(p.q):
        form = _OnePass if _one_pass(p, needs) else portable._Backward
        return form(p, out, peak, log_sum, dout, dlse, needs).run()


def _one_pass(p: Problem, needs: frozenset[str]) -> bool:
    """True if the one-pass backward can run p. It adds dq in any order, unless the configuration is an ordered one."""
    if _has_modifiers(p) or not needs >= {"q", "k", "v"} or needs - {"q", "k", "v", "sink"}:
        return False
    if not 0 < p.scale < math.inf:
        return False
    first, last = _rows_with_keys(p)
    if p.sink is not None and (first > 0 or last < p.shape[2]):
        return False  # fully masked rows also contribute to the sink's gradient
    return not p.deterministic or _config("hopper_backward", p).ordered


def _rows_with_keys(p: Problem) -> tuple[int, int]:
    """The rows that may attend to some key, as (first, last), last excluded."""
    _, _, m, n = p.shape
    left, right = p.span.left, p.span.right
    return max(0, -(right or 0)), m if left is None else min(m, n - left)


WIDE = 256  # head dim from which a consumer's registers cannot hold both dk and dv
FINE = 32  # rows per program of prepare and finish; row numbers are padded to a multiple


class _OnePass(portable._Backward):
    """The one-pass backward in Gluon. The kernel gets only rows that have a key and keys that have a row."""

    def run(self) -> dict[str, Tensor]:
        p, code = self.p, _device_code()
        views = code.views
        b, hq, m, n = p.shape
        hkv, d = p.k.shape[1], p.q.shape[3]
        c = _config("hopper_backward", p)
        tile = _tile_dim(d)
        rows, keys = slice(*_rows_with_keys(p)), slice(*_visible_keys(p))
        lead = -rows.start % FINE
        padded = -(-(rows.stop - rows.start) // c.BLOCK_M) * c.BLOCK_M
        length = -(-(lead + max(m, rows.start + padded)) // FINE) * FINE
        semaphores = 1 + b * hq * (length // c.BLOCK_M) if c.ordered else 0
        memory = p.q.new_empty(b * hq * m * d + semaphores, dtype=torch.float32)
        sums = memory[: b * hq * m * d].view(b, hq, m, d)
        known = code.types.SplitRowNumbers(*(memory.new_empty((b * hq, length)) for _ in range(3)))
        dout = self.dout if _copyable(self.dout) else self.dout.contiguous()
        launcher.launch(
            code.prepare,
            length // FINE * b * hq,
            *(views.view(x) for x in (self.out, dout)),
            self.peak,
            self.log_sum,
            self.dlse,
            known,
            views.view(sums),
            *(m, rows.start, rows.stop, lead, length, hq, b * hq),
            D=d,
            BLOCK_D=tile,
            BLOCK_M=FINE,
            num_warps=c.num_warps,
        )
        dk, dv = (self.grads[name][:, :, keys] for name in ("k", "v"))
        wide = tile >= WIDE
        if wide:
            box = [1, c.BLOCK_M, tile // 4]
        else:
            box = [1, c.BLOCK_M, tile // 2] if c.BLOCK_M == c.BLOCK_N else [1, c.BLOCK_M // 2, tile]
        visited = sums.view(b * hq, m, d)[:, rows]
        span = _moved(p.span, rows.start - keys.start)
        launcher.launch(
            code.wide if wide else code.backward,
            -(-(keys.stop - keys.start) // (c.BLOCK_N * (1 if wide else 2))) * b * hkv,
            _descriptor(p.q[:, :, rows], c.BLOCK_M),
            *(_descriptor(x[:, :, keys], c.BLOCK_N) for x in (p.k, p.v)),
            _descriptor(dout[:, :, rows], c.BLOCK_M),
            *(code.Descriptor(x.view(-1), [x.numel()], [1], [c.BLOCK_M], code.flat) for x in known),
            code.Descriptor(
                visited, list(visited.shape), [m * d, d, 1], box, code.layout(box, code.dtypes[visited.dtype])
            ),
            *(_descriptor(x, c.BLOCK_N) for x in (dk, dv)),
            memory[-semaphores:].zero_().view(torch.int32) if semaphores else None,
            views.transposed_span(span, keys.stop - keys.start),
            p.scale,
            p.scale * math.log2(math.e),
            *(rows.stop - rows.start, keys.stop - keys.start, hkv, b * hkv, settings.wave(p, hkv)),
            *(length, lead + rows.start),
            GROUP=p.group,
            STAGES=c.num_stages,
            ORDERED=c.ordered,
            OVERLAP=c.overlap,
            num_warps=c.num_warps,
        )
        launcher.launch(
            code.finish,
            -(-m // FINE) * b * hq,
            *(views.view(x) for x in (sums, self.grads["q"])),
            p.scale,
            *(m, hq, b * hq),
            D=d,
            BLOCK_D=tile,
            BLOCK_M=FINE,
            num_warps=c.num_warps,
        )
        for unseen in (slice(0, keys.start), slice(keys.stop, n)):
            if unseen.start < unseen.stop:
                self.grads["k"][:, :, unseen] = 0
                self.grads["v"][:, :, unseen] = 0
        if "sink" in self.needs:
            delta = known.delta.view(b, hq, length)[:, :, lead : lead + m]
            self._keep("sink", -(self._sink_weights() * delta).sum((0, 2)))
        return self.grads

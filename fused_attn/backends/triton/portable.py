"""The "triton" backend: allocate, choose a configuration, launch. Nothing here reads values, only metadata."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ...spec.problem import HALF, Problem
from ...spec.ragged import padded as padded_sequences
from ...spec.ragged import sums as sequence_sums
from ...tuning import Config
from ...tuning.select import SHARED, padded
from . import launcher, settings

MAX_HEAD_DIM = 512


@functools.cache
def _device_code() -> Any:
    """The kernels and their views; imported on first use, because they import triton."""
    from types import SimpleNamespace

    from ...kernels import backward, forward, types
    from . import additive, block_mask, tile_scheduler, views

    return SimpleNamespace(
        forward=forward.forward_kernel,
        delta=backward.delta_kernel,
        dkdv=backward.dkdv_kernel,
        dq=backward.dq_kernel,
        dbias=backward.dbias_kernel,
        additive=additive,
        tile_scheduler=tile_scheduler,
        types=types,
        views=views,
        block_mask=block_mask,
    )


def why_not(p: Problem) -> list[str]:
    """Every reason why these kernels cannot run p."""
    reasons = []
    if not settings.INSTALLED:
        reasons.append("triton is not installed")
    device = p.q.device
    if device.type == "cpu":
        if not settings.interpreted():
            reasons.append("tensors are on the CPU, and TRITON_INTERPRET is not 1")
        elif p.q.dtype == torch.bfloat16 and settings.INSTALLED and settings.multiplies_bit_patterns():
            reasons.append("this Triton's interpreter computes bfloat16 wrongly (triton issue 11584); float16 is right")
    elif device.type != "cuda":
        reasons.append(f"no kernels for {device.type} devices")
    elif not torch.version.hip and torch.cuda.get_device_capability(device)[0] < 8:
        reasons.append("needs compute capability 8.0 or newer")
    if p.q.dtype not in (*HALF, torch.float32):
        reasons.append(f"{p.q.dtype} is not supported; float16, bfloat16 and float32 are")
    for name, x in (("q", p.q), ("v", p.v)):
        if x.shape[3] > MAX_HEAD_DIM:
            reasons.append(f"{name}'s head dim {x.shape[3]} is above {MAX_HEAD_DIM}")
    return reasons or _too_large(p)


def _too_large(p: Problem) -> list[str]:
    """Where even the smallest tiles, 16 x 16, are more than the shared memory of the device holds."""
    arch = settings.architecture(p.q.device)
    if p.q.dtype in HALF or arch not in SHARED or arch == "gfx942":  # there, operands of products stay in registers
        return []
    if not p.differentiable:
        return []
    # The backward holds a tile of each of q, k, v and dout.
    need = 2 * 16 * 4 * (padded(p.q.shape[3]) + padded(p.v.shape[3]))
    if need <= SHARED[arch]:
        return []
    return [
        f"the backward in float32 needs {need} bytes of shared memory for these head dims, {arch} has {SHARED[arch]}"
    ]


def _forward_config(p: Problem) -> tuple[Config, tuple[Any, Any]]:
    """The configuration, and TMA descriptors of k and v or (None, None). Without descriptors the kernel needs registers
    for pointers, and takes the row for kernels with modifiers."""
    c = settings.config("forward" if p.w is None else "additive_forward", p)
    if not c.descriptors:
        return c, (None, None)
    k, v = (_device_code().views.descriptor(x, c.BLOCK_N) for x in (p.k, p.v))
    if k is None or v is None:
        return settings.config("forward", p, with_modifiers=True), (None, None)
    return c, (k, v)


def record(work: Any, given: tuple[Tensor | None, ...]) -> tuple[Any, Any]:
    """The results of work(*given), and a replay of it: nothing here reads values."""
    from .recording import record

    return record(work, given)


def forward(p: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, lse, peak, log_sum); call under no_grad."""
    code = _device_code()
    views, tile_scheduler = code.views, code.tile_scheduler
    b, hq = p.shape[:2]
    out = p.empty_out()
    found = p.empty_normaliser()
    c, descriptors = _forward_config(p)
    with settings.device_of(p.q):
        launcher.launch(
            code.forward,
            tile_scheduler.programs(p, c.BLOCK_M, hq),
            *(views.view(x) for x in (p.q, p.k, p.v, out)),
            None if p.sigmoid else code.types.Normaliser(*found),
            code.additive.score(p),
            code.block_mask.row_span(p, c),
            views.plane_view(p.mask, p.shape),
            None if p.sink is None else p.sink.contiguous(),
            views.dropout(p),
            tile_scheduler.ragged(p, c.BLOCK_M),
            *descriptors,
            *tile_scheduler.lengths(p),
            *(hq, b * hq, settings.wave(p, hq)),
            **settings.constants(c, p),
            OVERLAP=c.overlap,
        )
    return out, *found


def backward(
    p: Problem, out: Tensor, peak: Tensor, log_sum: Tensor, dout: Tensor, dlse: Tensor | None, needs: frozenset[str]
) -> dict[str, Tensor]:
    """The gradients that needs names; call under no_grad. Deterministic: every sum is in a fixed order."""
    with settings.device_of(p.q):
        return _Backward(p, out, peak, log_sum, dout, dlse, needs).run()


class _Backward:
    """One backward pass. needs decides which kernels run and what each writes."""

    def __init__(
        self, p: Problem, out: Tensor, peak: Tensor, log_sum: Tensor, dout: Tensor, dlse: Tensor | None,
        needs: frozenset[str],
    ) -> None:  # fmt: skip
        self.p, self.out, self.dout, self.needs = p, out, dout, needs
        self.peak, self.log_sum = peak.contiguous(), log_sum.contiguous()
        self.dlse = None if dlse is None else dlse.contiguous()
        self.code = _device_code()
        self.views, self.tile_scheduler = self.code.views, self.code.tile_scheduler
        self.grads: dict[str, Tensor] = {}
        # Sums of dx over each row and over each column, if needed.
        self.row_sums: Tensor | None = None
        self.column_sums: Tensor | None = None
        tensors = p.tensors()
        for name in needs & {"q", "k", "v"}:
            self.grads[name] = torch.empty_like(tensors[name])

    def run(self) -> dict[str, Tensor]:
        p, needs = self.p, self.needs
        self.known = None if p.sigmoid else self._row_numbers()
        form = self._bias_form() if "bias" in needs else None
        columns = form == "columns" or "key_terms" in needs
        rows = form == "rows" or "row_terms" in needs
        per_row = needs & {"q", "scale", "softcap", "slopes"} or form == "dense" or (rows and p.sigmoid)
        if p.w is not None:
            self._additive(form == "dense", columns, rows and p.sigmoid)
        if p.w is None and (needs & {"k", "v"} or columns):
            self._dkdv(columns)
        if p.w is None and per_row:
            self._dq(form == "dense", rows and p.sigmoid)
        if form == "shared":
            self._dbias()
        if rows:
            self.row_sums = self.row_sums if p.sigmoid else self._row_gradient()
        if form == "rows":
            self._keep("bias", _sum_to(self._by_sequence(self.row_sums)[..., None], p.bias.shape))
        if form == "columns":
            self._keep("bias", _sum_to(self._by_sequence(self.column_sums, True)[:, :, None], p.bias.shape))
        for name, sums in (("row_terms", self.row_sums), ("key_terms", self.column_sums)):
            if name in needs:
                self._keep(name, sums)
        if "sink" in needs:
            self._keep("sink", -(self._sink_weights() * self.known.delta).sum((0, 2)))
        return self.grads

    def _keep(self, name: str, value: Tensor) -> None:
        """Store a gradient in the parameter's dtype and memory order."""
        own = self.p.tensors()[name]
        self.grads[name] = torch.empty_like(own).copy_(value.view(own.shape))

    def _by_sequence(self, x: Tensor, by_keys: bool = False) -> Tensor:
        """Row or key numbers of a packed batch in the padded layout of bias."""
        ragged = self.p.ragged
        if ragged is None:
            return x
        return padded_sequences(x, *((ragged.k, ragged.max_k) if by_keys else (ragged.q, ragged.max_q)))

    def _bias_form(self) -> str:
        """How the bias's gradient is computed: the cheapest exact way for its shape."""
        b, hq, m, n = self.p.shape
        have = self.p.bias.shape
        if have[3] != n:
            return "rows"  # at most one value per row: closed form
        if have[2] != m:
            return "columns"  # one value per key: column sums in the key-major kernel
        return "dense" if (have[0], have[1]) == (b, hq) else "shared"

    def _row_numbers(self) -> Any:
        """RowNumbers for the other kernels."""
        p = self.p
        b, hq, m, _ = p.q.shape  # rows are independent, whatever their sequence
        normaliser = torch.empty_like(self.log_sum, dtype=torch.int64)
        known = self.code.types.RowNumbers(normaliser, torch.empty_like(self.log_sum))
        c = settings.config("delta", p)
        launcher.launch(
            self.code.delta,
            -(-m // c.BLOCK_M) * b * hq,
            self.views.view(self.out),
            self._operands[3],
            self.peak,
            self.log_sum,
            self.dlse,
            known,
            *(m, hq, b * hq),
            DV=p.v.shape[3],
            BLOCK_DV=padded(p.v.shape[3]),
            BLOCK_M=c.BLOCK_M,
            num_warps=c.num_warps,
        )
        return known

    @functools.cached_property
    def _operands(self) -> tuple[Any, ...]:
        p = self.p
        return tuple(map(self.views.view, (p.q, p.k, p.v, self.dout)))

    @functools.cached_property
    def _planes(self) -> tuple[Any, Any, Any]:
        p = self.p
        return _device_code().additive.score(p), self.views.plane_view(p.mask, p.shape), self.views.dropout(p)

    def _inputs(self, span: Any, ragged: Any) -> tuple[Any, ...]:
        """The first arguments of the kernels that recompute weights."""
        score, mask, dropout = self._planes
        return *self._operands, self.known, score, span, mask, dropout, ragged

    def _wanted(self, name: str) -> Any:
        return self.views.view(self.grads[name]) if name in self.needs else None

    def _dkdv(self, columns: bool) -> None:
        p = self.p
        (b, hq, _, _), hkv = p.shape, p.k.shape[1]
        of_keys = p.q.shape[0], hq, p.k.shape[2]
        sums = self.column_sums = p.q.new_empty(of_keys, dtype=torch.float32) if columns else None
        c = settings.config("dkdv", p)
        inputs = self._inputs(self.code.block_mask.key_span(p, c), self.tile_scheduler.ragged(p, c.BLOCK_N, True))
        dk, dv = self._wanted("k"), self._wanted("v")
        both = dv is not None and (dk is not None or columns)
        for outputs in ((dk, None, sums), (None, dv, None)) if c.split and both else ((dk, dv, sums),):
            launcher.launch(
                self.code.dkdv,
                self.tile_scheduler.programs(p, c.BLOCK_N, hkv, True),
                *inputs,
                self.code.types.KeyGradients(*outputs),
                *self.tile_scheduler.lengths(p),
                *(hkv, b * hkv, settings.wave(p, hkv)),
                **settings.constants(c, p),
            )

    def _dq(self, dense: bool, totals: bool) -> None:
        p, needs = self.p, self.needs
        b, hq, _, _ = p.shape
        per_row = ("scale", "softcap", "slopes")
        sums = {x: p.q.new_empty(p.q.shape[:3], dtype=torch.float32) for x in per_row if x in needs}
        self.row_sums = p.q.new_empty(p.q.shape[:3], dtype=torch.float32) if totals else None
        bias = self._dense_bias() if dense else None
        c = settings.config("dq", p)
        launcher.launch(
            self.code.dq,
            self.tile_scheduler.programs(p, c.BLOCK_M, hq),
            *self._inputs(self.code.block_mask.row_span(p, c), self.tile_scheduler.ragged(p, c.BLOCK_M)),
            self.code.types.RowGradients(self._wanted("q"), bias, *(sums.get(x) for x in per_row), self.row_sums),
            *self.tile_scheduler.lengths(p),
            *(hq, b * hq, settings.wave(p, hq)),
            **settings.constants(c, p),
        )
        self._keep_sums(sums)

    def _keep_sums(self, sums: dict[str, Tensor], by_keys: bool = False) -> None:
        """Reduce row or key sums (B, Hq, length) to the gradients of the parameters that they are named after."""
        ragged = self.p.ragged
        for name, x in sums.items():
            own = self.p.tensors()[name]
            if own.ndim == 2:
                starts = None if ragged is None else ragged.k if by_keys else ragged.q
                self._keep(name, x.sum(2) if starts is None else sequence_sums(x, starts))
            else:
                self._keep(name, x.sum() if own.ndim == 0 else x.sum((0, 2)))

    def _dense_bias(self) -> Any:
        """The gradient of a bias with one entry per score; zeroed first if some tiles are not visited."""
        whole = self.p.unbounded and self.p.ragged is None
        self.grads["bias"] = (torch.empty_like if whole else torch.zeros_like)(self.p.bias)
        return self.views.plane_output(self.grads["bias"], self.p.shape)

    def _additive(self, dense: bool, columns: bool, rows: bool) -> None:
        """Every gradient but a shared bias's, in one pass."""
        p = self.p
        wanted = self.needs & {"q", "k", "w", "scale", "softcap", "slopes"}
        wanted |= {name for name, there in (("columns", columns), ("rows", rows)) if there}
        sums = self.code.additive.backward(
            p, settings.config("additive_backward", p), self._operands[3], self.known, self._planes,
            self.grads.get("v"), self._dense_bias() if dense else None, wanted, settings.wave(p, p.k.shape[1]),
            settings.precision(p), settings.multiprocessors(p.q.device),
        )  # fmt: skip
        self.column_sums, self.row_sums = sums.columns.pop("columns", None), sums.rows
        self.grads |= {name: x for name, x in sums.grads.items() if name != "w"}
        if "w" in sums.grads:
            self._keep("w", sums.grads["w"])
        self._keep_sums(sums.columns, by_keys=True)

    def _dbias(self) -> None:
        p = self.p
        b, hq, m, n = p.shape
        self.grads["bias"] = torch.empty_like(p.bias)
        shared = p.bias.shape[:2]
        c = settings.config("dbias", p)
        launcher.launch(
            self.code.dbias,
            -(-m // c.BLOCK_M) * -(-n // c.BLOCK_N) * shared.numel(),
            *self._inputs(self.code.block_mask.pair_span(p), self.tile_scheduler.ragged(p, c.BLOCK_M, in_order=True)),
            self.views.plane_output(self.grads["bias"], p.shape),
            *(m, n, *self.tile_scheduler.lengths(p), b, hq, *shared),
            **settings.constants(c, p),
        )

    def _sink_weights(self) -> Tensor:
        """(B, Hq, M): the sink's share of each row's denominator."""
        peak = self.peak * self.p.scale if self._planes[0].folds.value else self.peak
        share = torch.exp(self.p.sink.float()[:, None] - peak - self.log_sum)
        return torch.where(self.log_sum == -torch.inf, 0.0, share)

    def _row_gradient(self) -> Tensor:
        """(B, Hq, M): the sum of dx over a row. It is dlse + delta * P_sink, because weights and sink sum to one."""
        total = torch.zeros_like(self.log_sum) if self.dlse is None else self.dlse.float()
        if self.p.sink is not None:
            return total + self.known.delta * self._sink_weights()
        return torch.where(self.log_sum == -torch.inf, 0.0, total)


def _sum_to(x: Tensor, shape: torch.Size) -> Tensor:
    """x summed over the dims where shape is 1 and x is not."""
    dims = [i for i, (have, want) in enumerate(zip(x.shape, shape, strict=True)) if have != want and want == 1]
    return x.sum(dims, keepdim=True) if dims else x

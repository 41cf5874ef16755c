"""Break one line at a time and see the suite go red: python tests/mutants.py [words of names to run].

Each mutation is applied in a copy of the tree and faced with the tests that attack its fault.
Exit status 1 if one survives, if its text is gone, or if its tests cannot run or are red without it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LEFT_BEHIND = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "out", "results", "*.egg-info")
GREEN, RED = 0, 1  # pytest's exit statuses: all passed; some failed


@dataclass(frozen=True)
class Mutant:
    """A line to break, and the tests that must see it: a file of tests/ and an expression for -k."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, str]


def _known_faults(expression: str) -> tuple[str, str]:
    return "backends/test_known_faults.py", expression


def _operators(expression: str) -> tuple[str, str]:
    return "runtime/test_operators.py", expression


def _flash(expression: str) -> tuple[str, str]:
    return "compat/test_flash_attn.py", expression


def _hopper(expression: str) -> tuple[str, str]:
    return "kernels/test_hopper.py", expression


def _hopper_backward(expression: str) -> tuple[str, str]:
    return "kernels/test_hopper_backward.py", expression


def _statistics(expression: str) -> tuple[str, str]:
    return "api/test_statistics.py", expression


def _decode(expression: str) -> tuple[str, str]:
    return "api/test_decode.py", expression


def _extreme(expression: str) -> tuple[str, str]:
    return "backends/test_extreme_scores.py", expression


_launches = ("backends/test_launches.py", "test_launches and not under")


MUTANTS = (
    # rows that see nothing, or nothing at first
    Mutant("the backward uses the -inf LSE of a masked row", "kernels/backward.py",
           'tl.where(log == float("-inf"), float("inf"), log * LOG2E)', "log * LOG2E",
           _known_faults("test_masked_rows and triton and bias")),
    Mutant("division by a zero denominator", "fused_attn/backends/tiled/attention.py",
           "o.div_(total.masked_fill(total == 0, 1))", "o.div_(total)", _known_faults("test_masked_rows and tiled")),
    Mutant("the oracle divides by zero", "fused_attn/backends/reference.py",
           "visible = total != 0", "visible = total == total", _known_faults("test_masked_rows and reference")),
    Mutant("-inf minus -inf in the running maximum", "kernels/softmax.py",
           "m_i = tl.full([BLOCK_M], LOWEST, tl.float32)", 'm_i = tl.full([BLOCK_M], float("-inf"), tl.float32)',
           _known_faults("first_tile_masked and triton")),
    Mutant("-inf minus -inf, tiled", "fused_attn/backends/tiled/attention.py",
           "peak = finite_peak(new)", "peak = new",
           _known_faults("test_masked_rows and tiled or first_tile_masked and tiled")),
    Mutant("the running maximum starts at 0", "kernels/softmax.py",
           "m_i = tl.full([BLOCK_M], LOWEST, tl.float32)", "m_i = tl.full([BLOCK_M], 0.0, tl.float32)",
           _known_faults("negative_logits and triton")),
    Mutant("a finite number in place of -inf", "kernels/softmax.py",
           "m_i = tl.full([BLOCK_M], LOWEST, tl.float32)", "m_i = tl.full([BLOCK_M], -50000.0, tl.float32)",
           _known_faults("finite_sentinel and triton")),
    # numbers at the edge
    Mutant("the running maximum is rounded differently from the scores", "kernels/softmax.py",
           "p = tl.exp2((x - peak[:, None]) * factor)",
           "p = tl.exp2(x * factor - (peak * factor)[:, None] * 0.9999999)",
           _known_faults("huge_equal and triton")),
    Mutant("invisible keys are loaded", "kernels/spans.py",
           "return (y >= reach.visit.first) & (y < reach.visit.last)", "return (y >= 0) & (y < reach.visit.last + 64)",
           _known_faults("garbage and triton and (window or causal)")),
    Mutant("padding is loaded", "kernels/spans.py",
           "return tl.max(sees(reach, y).to(tl.int32), 0) > 0", "return y >= 0",
           _known_faults("garbage and triton and (lengths or segments)")),
    Mutant("the oracle multiplies padding", "fused_attn/backends/reference.py",
           "return x if p.all_keys_visible else torch.where(p.visible_keys()[..., None], x, 0.0)", "return x",
           _known_faults("garbage and reference")),
    Mutant("invisible keys inside a tile are multiplied, tiled", "fused_attn/backends/tiled/workspace.py",
           "torch.where(keys, k, 0)", "k", ("backends/test_parity.py", "segments_gap and tiled")),
    Mutant("invisible values inside a tile are multiplied, tiled", "fused_attn/backends/tiled/workspace.py",
           "torch.where(keys, v, 0)", "v", ("backends/test_parity.py", "segments_gap and tiled")),
    Mutant("keys whose id no row has are multiplied, triton", "fused_attn/backends/triton/block_mask.py",
           "torch.where(reached, start, m), torch.where(reached, stop, 0)", "start, stop",
           ("backends/test_parity.py", "runs_cross and triton")),
    Mutant("keys whose id no row has are multiplied, tiled", "fused_attn/spec/visibility.py",
           "p.span.lo is not None or p.span.hi is not None or p.pattern is not None",
           "p.span.lo is not None or p.span.hi is not None", ("backends/test_parity.py", "runs_cross and tiled")),
    Mutant("a NaN score is skipped", "kernels/softmax.py",
           "    peak = tl.maximum(m_i, tl.max(x, 1))\n",
           '    x = tl.where(x == x, x, float("-inf"))\n    peak = tl.maximum(m_i, tl.max(x, 1))\n',
           _known_faults("nan_and_infinity_propagate and triton")),
    Mutant("torch's kernel is trusted with NaN", "fused_attn/backends/sdpa/kernel.py",
           "if not max(-least, most) <= (LARGEST if limit is None else limit):", "if False:",
           _known_faults("nan_and_infinity_propagate and sdpa")),
    Mutant("torch's kernel is trusted with rows of only NaN", "fused_attn/backends/sdpa/kernel.py",
           "not (lse.all() or _finite_scores(q, k, mask, self.scale))", "False",
           ("backends/test_sdpa_kernel.py", "scale_of_zero")),
    Mutant("keys read past the end of a piece are not masked", "fused_attn/backends/sdpa/kernel.py",
           "        if piece.tail:\n", "        if False:\n",
           ("backends/test_sdpa_kernel.py", "invisible_keys_are_skipped and lengths and not of")),
    Mutant("invisible values are multiplied by torch's kernel", "fused_attn/backends/sdpa/kernel.py",
           "        if self.overread:\n", "        if False:\n",
           ("backends/test_sdpa_kernel.py", "invisible_keys_may_hold and v-nan")),
    Mutant("lengths are those of the last call", "fused_attn/backends/sdpa/kernel.py",
           "if last is not None and last[0] == lengths:", "if last is not None:",
           ("backends/test_sdpa_kernel.py", "read_changed_values and lengths-inference")),
    Mutant("padding is that of the last call", "fused_attn/backends/sdpa/kernel.py",
           "if last is not None and torch.equal(last[0], visible):", "if last is not None:",
           ("backends/test_sdpa_kernel.py", "read_changed_values and padding and inference")),
    Mutant("an additive mask holds 1 instead of 0", "fused_attn/backends/sdpa/kernel.py",
           ".clamp_max_(0)", "", ("backends/test_sdpa_kernel.py", "vector_instructions")),
    Mutant("a mask with a hole counts as padding", "fused_attn/backends/sdpa/pieces.py",
           "if any(c and c != z - a for", "if any(False for", ("backends/test_sdpa_kernel.py", "other_masks and hole")),
    Mutant("torch's backward is trusted with huge normalisers", "fused_attn/backends/sdpa/kernel.py",
           "LARGE = 64.0", "LARGE = math.inf", ("backends/test_sdpa_kernel.py", "finite_minimum or equal_large")),
    Mutant("pieces that share keys overwrite each other's gradients", "fused_attn/backends/sdpa/pieces.py",
           "if own is None or (own and own[0].keys.start < last.get(batch.start, 0)):", "if own is None:",
           ("backends/test_sdpa_kernel.py", "other_spans and prefix")),
    Mutant("torch's kernel is differentiated twice without the mask", "fused_attn/backends/sdpa/kernel.py",
           "self.template.replace(q=q, k=k, v=v, bias=mask)", "self.template.replace(q=q, k=k, v=v)",
           ("backends/test_sdpa_kernel.py", "second_derivatives and mask")),
    Mutant("a negative scale is folded into the maximum", "fused_attn/backends/triton/views.py",
           "isinstance(p.scale, float) and 0 < p.scale < math.inf", "isinstance(p.scale, float)",
           _known_faults("test_scale and triton")),
    # extents
    Mutant("the last, shorter tile counts as full", "kernels/spans.py",
           "full_last = tl.min(tl.where(some, hi, limit)) // BLOCK * BLOCK",
           "full_last = tl.cdiv(tl.min(tl.where(some, hi, limit)), BLOCK) * BLOCK",
           _known_faults("lengths_around and triton")),
    Mutant("rows past the end are stored", "kernels/forward.py",
           "m, rows < tile.M, out_tile",
           "m, rows < tile.M + 1, out_tile", _known_faults("lengths_around and triton")),
    Mutant("batch and head offsets stay int32", "kernels/memory.py",
           "(b.to(tl.int64) * decode_int(view.strides[0]) + h.to(tl.int64) * decode_int(view.strides[1]))",
           "(b * decode_int(view.strides[0]).to(tl.int32) + h * decode_int(view.strides[1]).to(tl.int32))",
           _known_faults("beyond_int32")),
    Mutant("offsets inside a tile stay int32", "fused_attn/backends/triton/views.py",
           "wide = max(strides[2:]) * LONGEST_TILE >= 2**31", "wide = False", _known_faults("beyond_int32")),
    Mutant("an empty problem is launched", "fused_attn/runtime/ops.py",
           'backend_module("tiled" if p.empty else backend)', "backend_module(backend)",
           _known_faults("zero_sizes and triton")),
    Mutant("no keys, no sink", "fused_attn/backends/tiled/attention.py",
           "        log_sum.copy_(p.sink[:, None])\n", "        pass\n", _known_faults("zero_sizes and tiled")),
    Mutant("the diagonal itself is masked", "kernels/spans.py",
           "shift + decode_int(span.right) + 1)", "shift + decode_int(span.right))",
           _known_faults("(unequal_lengths or diagonal) and triton")),
    Mutant("the alignments are exchanged", "fused_attn/spec/spans.py",
           'return 0 if alignment == "top_left" else n - m', 'return n - m if alignment == "top_left" else 0',
           _known_faults("diagonal")),
    # masks that are no interval
    Mutant("ids are ordered, not equal", "kernels/spans.py",
           "reach.pattern.ids[:, None] == tl.load", "reach.pattern.ids[:, None] <= tl.load",
           ("backends/test_parity.py", "runs and triton")),
    Mutant("one sink too many", "kernels/spans.py",
           "(y < decode_int(reach.span.sinks))", "(y <= decode_int(reach.span.sinks))",
           ("backends/test_parity.py", "window_sinks and triton")),
    Mutant("full tiles are read from the list of partial ones", "kernels/spans.py",
           "tl.load(visit.block_mask + visit.leading + ordinal) * BLOCK", "tl.load(visit.block_mask + ordinal) * BLOCK",
           ("backends/test_parity.py", "blocks and triton")),
    Mutant("the additive backward skips partial tiles", "kernels/additive.py",
           "tl.load(visit.block_mask + index) != 0", "tl.load(visit.block_mask + index) == 2",
           ("backends/test_parity.py", "additive_window_sinks and triton")),
    Mutant("a tile is full if its span is", "fused_attn/backends/triton/block_mask.py",
           "return some, some & whole & full", "return some, some & whole", ("spec/test_patterns.py", "masks_cover")),
    Mutant("a tile between sinks and window counts as full", "fused_attn/backends/triton/block_mask.py",
           "(far <= begin.clamp_min(span.sinks))", "(far >= 0)", ("spec/test_patterns.py", "masks_cover")),
    Mutant("tiles are compared by the first id of their range only", "fused_attn/spec/patterns.py",
           "(_buckets(q) @ _buckets(k).mT > 0)", "(q_low == k_low)", ("spec/test_patterns.py", "masks_cover")),
    Mutant("the last block of a tile is left out", "fused_attn/spec/patterns.py",
           "keys[:, -1] // self.width + 1", "keys[:, -1] // self.width", ("spec/test_patterns.py", "masks_cover")),
    Mutant("a partial pattern tile counts as full, tiled", "fused_attn/backends/tiled/tiles.py",
           "self.pattern[keys.start // PATTERN_BLOCK] == ALL", "self.pattern[keys.start // PATTERN_BLOCK] != NONE",
           ("backends/test_parity.py", "runs and tiled")),
    Mutant("the wider of two windows is dropped", "fused_attn/spec/spans.py",
           "return None if included else", "return None if included or True else", ("spec/test_patterns.py",
           "intersection")),
    Mutant("the bias gradient of tiles that are not visited is uninitialized", "fused_attn/backends/triton/portable.py",
           "whole = self.p.unbounded and", "whole = self.p.span.unbounded and",
           ("backends/test_parity.py", "bias_dense_blocks and triton")),
    # memory, dims and tiles
    Mutant("dout is assumed contiguous", "fused_attn/backends/triton/portable.py",
           "p, self.out, self.dout, self.needs = p, out, dout, needs",
           "p, self.out, self.dout, self.needs = p, out, torch.as_strided(dout, out.shape, out.stride()), needs",
           _known_faults("strides_of_dout and triton")),
    Mutant("a stride of 0 becomes 1", "fused_attn/backends/triton/views.py",
           "0 if n == 1 else s for n, s", "0 if n == 1 else max(s, 1) for n, s",
           _known_faults("expanded_keys and triton")),
    Mutant("unaligned strides are counted in 16 bytes", "fused_attn/backends/triton/views.py",
           "all(s % per == 0 for s in strides[:3])", "True", _known_faults("test_unaligned and triton")),
    Mutant("stores exceed the head dim", "kernels/memory.py",
           "mask = live[:, None] & (tl.arange(0, BLOCK_D) < D)[None, :]\n    tl.store",
           "mask = live[:, None] & (tl.arange(0, BLOCK_D) < BLOCK_D)[None, :]\n    tl.store",
           _known_faults("test_unaligned and triton or head_dims and triton")),
    Mutant("the default scale uses the padded head dim", "fused_attn/api/bind.py",
           "return q.shape[3] ** -0.5 if", "return max(16, q.shape[3]) ** -0.5 if",
           _known_faults("head_dims and triton")),
    Mutant("query heads of a group read different key-value heads", "kernels/memory.py",
           "tile.batch, tile.memory_head * GROUP + i", "tile.batch, tile.memory_head + i",
           _known_faults("groups_and_value and triton")),
    Mutant("gradients of a group are not summed", "kernels/forward.py",
           "start_pointer(k, tile, tile.h // GROUP", "start_pointer(k, tile, tile.h * 0",
           _known_faults("groups_and_value and triton")),
    Mutant("the overlapped loop skips its last tile", "kernels/spans.py",
           "            state = absorb(context, state, ahead, start, False)\n    else",
           "            state = absorb(context, state, ahead, begin, False)\n    else",
           _known_faults("every_tile and overlap")),
    Mutant("TMA descriptors point to another batch", "kernels/memory.py",
           "desc.load([tile.batch, h, tile.key + start, 0])", "desc.load([tile.batch * 0, h, tile.key + start, 0])",
           _known_faults("every_tile and descriptors")),
    Mutant("TMA descriptors have another tile size", "kernels/memory.py",
           "desc.load([tile.batch, h, tile.key + start, 0])", "desc.load([tile.batch, h, tile.key, 0])",
           _known_faults("every_tile and descriptors")),
    Mutant("TMA descriptors for memory that TMA cannot copy", "fused_attn/backends/triton/views.py",
           "unit * x.element_size() != 16 or any(n > 1 and s == 0 for n, s in apart)", "unit * x.element_size() != 16",
           ("backends/test_launches.py", "test_launches and not under")),
    Mutant("a replay uses the TMA descriptor of another tensor", "fused_attn/backends/triton/recording.py",
           "({self._name(x.base)}, {rest})", "({self.given[1]}, {rest})",
           ("backends/test_launches.py", "test_launches and not under")),
    Mutant("a tile is assumed to have 32 keys", "kernels/modifiers.py",
           "return (m + tl.arange(0, plane.BLOCK_M))[:, None], (n + tl.arange(0, plane.BLOCK_N))[None, :]",
           "return (m + tl.arange(0, plane.BLOCK_M))[:, None], "
           "(n + tl.arange(0, plane.BLOCK_N) % 32)[None, :]", _known_faults("every_tile and plain")),
    # the Gluon kernels, whose waits, arrivals and fences test_hopper.py leaves out itself
    Mutant("sm_90: keys past the end are visible", "kernels/hopper_forward.py",
           "allowed = j < c.N\n", "allowed = j < c.N + 1\n", _hopper("test_forward and plain")),
    Mutant("sm_90: rows past the end get an LSE", "kernels/hopper_forward.py",
           "log_sum, rows < c.M)", "log_sum, rows < c.M + 1)", _hopper("test_forward and plain")),
    Mutant("sm_90: the diagonal itself is masked", "kernels/hopper_forward.py",
           "(j <= i + decode_int(c.span.right))", "(j < i + decode_int(c.span.right))",
           _hopper("test_forward and causal")),
    Mutant("sm_90: every query head reads the first keys", "kernels/hopper_forward.py",
           "fetch(k, [b, h // c.GROUP, n, 0]", "fetch(k, [b, h * 0, n, 0]", _hopper("test_forward and gqa_3_of_2")),
    Mutant("sm_90: only the first tile counts as partial", "kernels/hopper_forward.py",
           "partial = gl.maximum(visited.total - visited.full, 1)", "partial = 1", _hopper("test_forward and causal")),
    Mutant("sm_90: the remainder of the last round is not computed", "kernels/hopper_forward.py",
           "if rounds * programs + program < total:", "if False:", _hopper("test_every_number_of_programs")),
    Mutant("sm_90: keys past the end contribute gradients", "kernels/hopper_backward.py",
           "stop = gl.where(j < c.N, c.BLOCK_M, 0)", "stop = j * 0 + c.BLOCK_M",
           _hopper_backward("padded_keys_give_no_nan")),
    Mutant("sm_90: the diagonal contributes no gradients", "kernels/hopper_backward.py",
           "(decode_int(c.span.right) + 1 - m)", "(decode_int(c.span.right) - m)",
           _hopper_backward("test_gradients and window")),
    Mutant("sm_90: the LSE's gradient is left out", "kernels/hopper_backward.py",
           "row_delta -= tl.load(dlse + offs, mask=seeing, other=0.0).to(tl.float32)", "row_delta -= 0.0",
           _hopper_backward("test_gradients and lse")),
    # gradients, modifiers, dropout
    Mutant("dkdv runs only if dk is needed", "fused_attn/backends/triton/portable.py",
           '(needs & {"k", "v"} or', '(needs & {"k"} or', _known_faults("single_gradients and triton")),
    Mutant("only one of the operators' needs is passed on", "fused_attn/runtime/autograd.py",
           "needs = list(needs_input_grad[: len(DIFFERENTIABLE)])",
           "needs = [needs_input_grad[0]] * len(DIFFERENTIABLE)", _known_faults("single_gradients and tiled")),
    Mutant("the cap's slope is left out", "kernels/modifiers.py",
           "return dx * (1.0 - t * t)", "return dx", _known_faults("softcap_comes and triton")),
    Mutant("the mask is capped", "fused_attn/backends/reference.py",
           "return s if p.mask is None else s.masked_fill(~p.mask, -torch.inf)",
           "return s if p.mask is None else s.masked_fill(~p.mask, -1.0)",
           _known_faults("softcap_comes and reference")),
    Mutant("the bias is added before the cap's scale", "kernels/modifiers.py",
           "return t * plane.own.cap", "return t * plane.own.cap * plane.own.cap",
           _known_faults("softcap_comes and triton")),
    Mutant("the sink's gradient has the wrong sign", "fused_attn/backends/triton/portable.py",
           "-(self._sink_weights() * self.known.delta)", "(self._sink_weights() * self.known.delta)",
           _known_faults("test_sink and triton")),
    Mutant("the sink is left out of the denominator", "kernels/softmax.py",
           "l_i = l_i * share + tl.exp2((sink - top) * LOG2E)", "l_i = l_i * share",
           _known_faults("test_sink and triton")),
    Mutant("the LSE is in base 2", "kernels/softmax.py",
           "log = tl.log2(l_i) * LN2", "log = tl.log2(l_i)", _known_faults("gradient_of_lse_only and triton")),
    Mutant("the LSE's gradient is dropped", "kernels/backward.py",
           "total -= tl.load(dlse + offs, mask=rows < M, other=0.0).to(tl.float32)", "total -= 0.0",
           _known_faults("gradient_of_lse_only and triton or test_sink and triton")),
    Mutant("the dropout mask is not applied to dv", "kernels/backward.py",
           "sent = tl.where(kept, p, 0.0)", "sent = p", _known_faults("backward_uses and triton")),
    Mutant("philox has ten rounds", "kernels/modifiers.py",
           "rng + 1).to(tl.uint32),\n        7,\n", "rng + 1).to(tl.uint32),\n        10,\n",
           _known_faults("dropout_mask_is and triton")),
    Mutant("rows and keys are exchanged in key-major tiles", "kernels/modifiers.py",
           "w1, w2 = w2, w1", "pass", _known_faults("backward_uses and triton")),
    Mutant("the seed is a constant", "fused_attn/api/bind.py",
           "torch.randint(2**63 - 1, (2,), device=q.device)", "torch.tensor((1, 2), device=q.device)",
           _known_faults("dropout_from and tiled")),
    Mutant("the seed is not drawn from torch's generator", "fused_attn/api/bind.py",
           "torch.randint(2**63 - 1, (2,), device=q.device)",
           'torch.tensor([__import__("random").getrandbits(62) for _ in "12"], device=q.device)',
           _known_faults("checkpoint and tiled")),
    Mutant("the head is left out of the counter", "kernels/modifiers.py",
           "zero + plane.tile.head.to(tl.uint32)", "zero", _known_faults("dropout_mask_is and triton")),
    Mutant("the documented generator changes", "fused_attn/spec/dropout.py",
           "c0.mul_(0xD2511F53)", "c0.mul_(0xD2511F55)", ("spec/test_problem.py", "philox or dropout_is")),
    # numbers that are not Gaussian, many heads
    Mutant("earlier sums are not rescaled", "kernels/softmax.py",
           "return p, alpha, peak, l_i * alpha + tl.sum(p, 1)", "return p, alpha, peak, l_i + tl.sum(p, 1)",
           _known_faults("(not_gaussian or exact_result) and triton")),
    Mutant("the maximum of a tile is ignored", "fused_attn/backends/tiled/attention.py",
           "total = total * shrink + s.sum(-1, keepdim=True)",
           "total = total * shrink + s.sum(-1, keepdim=True) - 1",
           _known_faults("(not_gaussian or exact_result) and tiled")),
    Mutant("heads are numbered along the grid's second axis", "fused_attn/backends/triton/launch_cache.py",
           "kernel[(grid,)]", "kernel[(1, grid)]", _known_faults("many_heads and not pytorch")),
    # the operators and the public functions
    Mutant("the fake implementation's out is contiguous", "fused_attn/runtime/ops.py",
           "return p.empty_out(), p.empty_lse()", "return p.empty_out().contiguous(), p.empty_lse()",
           _operators("fake_tensors and tiled and bshd")),
    Mutant("out aliases q", "fused_attn/runtime/autograd.py",
           "_setup_context(ctx, args, result)\n        ctx.context",
           "result = (args[0], *result[1:])\n        _setup_context(ctx, args, result)\n        ctx.context",
           _operators("outputs_never_alias and tiled and plain")),
    Mutant("lengths are specialised", "kernels/forward.py",
           '@triton.jit(do_not_specialize=["M", "N", "HEADS", "BATCHED_HEADS", "WAVE"])', "@triton.jit",
           _operators("no_compilation")),
    # what is remembered of a launch and of a call
    Mutant("addresses are left out of a launch's signature", "fused_attn/backends/triton/launch_cache.py",
           "classes += x.dtype, x.data_ptr() % 16 == 0", "classes += x.dtype, True", _launches),
    Mutant("widths are left out of a launch's signature", "fused_attn/backends/triton/launch_cache.py",
           "if -0x80000000 <= x < 0x80000000:", "if True:", _launches),
    Mutant("1 is classified as any integer", "fused_attn/backends/triton/launch_cache.py",
           'add("1" if x == 1 else "i32" if', 'add("i32" if', _launches),
    Mutant("divisibility is left out of a launch's signature", "fused_attn/backends/triton/launch_cache.py",
           '"i32" if x & 15 else "i32x16"', '"i32"', _launches),
    Mutant("kept tuples share one class", "fused_attn/backends/triton/launch_cache.py",
           "found = classify(x)", "found = (tuple,)", _launches),
    Mutant("buffers of 2 GB count as short, on AMD", "fused_attn/backends/triton/launch_cache.py",
           "add(x.untyped_storage().nbytes() < 2**31)", "pass", _launches),
    Mutant("constants are left out of a launch's signature", "fused_attn/backends/triton/launch_cache.py",
           "return id(kernel), *classes, *options.items(), kinds", "return id(kernel), *classes, kinds", _launches),
    Mutant("constants in tuples are left out of a launch's signature",
           "fused_attn/backends/triton/launch_cache.py",
           "found = constexpr, type(x.value), x.value", "found = constexpr, type(x.value)", _launches),
    Mutant("strides are left out of a call's key", "fused_attn/runtime/call_cache.py",
           "x.shape, x.stride(), x.dtype, x.device", "x.shape, x.dtype, x.device", _launches),
    Mutant("addresses are left out of a call's key", "fused_attn/runtime/call_cache.py",
           "x.requires_grad, where & 15", "x.requires_grad", _launches),
    Mutant("the negation bit of a tensor is ignored", "fused_attn/runtime/call_cache.py",
           "if not where or x.is_neg():", "if not where:", _launches),
    Mutant("grad mode is left out of a call's key", "fused_attn/runtime/call_cache.py",
           "is_grad_enabled(), is_inference_mode_enabled(), det", "is_inference_mode_enabled(), det", _launches),
    Mutant("1, 1.0 and True are equal in a call's key", "fused_attn/runtime/call_cache.py",
           "_key(tensors, (layout, kinds, requested, values))",
           "_key(tensors, (layout, requested, values))", _launches),
    Mutant("shared starts are left out of a packed call's key", "fused_attn/runtime/call_cache.py",
           "values += (extra[0][0] is extra[0][1],)", "pass", ("runtime/test_call_cache.py", "packed")),
    Mutant("cached packed batches are not checked", "fused_attn/runtime/call_cache.py",
           "if packed and (tensors[0] is None or checks.readable(tensors[0])):", "if False:",
           ("runtime/test_call_cache.py", "packed")),
    Mutant("bfloat16 runs in an interpreter that multiplies bit patterns",
           "fused_attn/backends/triton/settings.py",
           "product.data.item() == 0x3F80 * 0x3F80 % 2**16", "False", _known_faults("unrepaired_interpreter")),
    Mutant("a replay allocates in the memory order of another tensor", "fused_attn/backends/triton/recording.py",
           "self.templates.setdefault(_metadata(x, x.device), name)",
           "next((n for k, n in self.templates.items() if (k[0], k[2]) == (x.shape, x.dtype)), name)", _launches),
    Mutant("old module paths are gone", "fused_attn/deprecated.py",
           "sys.meta_path.append(_Finder())", "pass", ("test_deprecated.py", "old_path or old_mask")),
    Mutant("torch's kernel is run again after it was wrong", "fused_attn/runtime/call_cache.py",
           '"tiled" if known else name', "name", ("runtime/test_call_cache.py", "kernel_got_wrong")),
    Mutant("a replay ignores tuning.override", "fused_attn/backends/triton/recording.py",
           "self.work is None or launcher.launch is not launcher.LAUNCH or overrides()",
           "self.work is None or launcher.launch is not launcher.LAUNCH", _launches),
    Mutant("a replay ignores a replaced launcher", "fused_attn/backends/triton/recording.py",
           "if self.work is None or launcher.launch is not launcher.LAUNCH or", "if self.work is None or", _launches),
    Mutant("a replay assumes the current device", "fused_attn/backends/triton/recording.py",
           "if launch_cache.launch_context() != self.context:", "if False:", _launches),
    Mutant("a replay keeps its stream", "fused_attn/backends/triton/recording.py",
           "context[0].get_current_stream(context[1]) if context else None", "0", _launches),
    Mutant("launch hooks are skipped", "fused_attn/backends/triton/launch_cache.py",
           'if getattr(enter, "calls", enter) or', "if", _launches),
    Mutant("work that writes to a tensor is replayed", "fused_attn/backends/triton/recording.py",
           "func._schema.is_mutable or", "", _launches),
    Mutant("operators that a result needs are left out of a replay", "fused_attn/backends/triton/recording.py",
           "needed |= line.uses", "pass", _launches),
    Mutant("backward computes under autocast", "fused_attn/runtime/ops.py",
           "with torch.autocast(p.q.device.type, enabled=False):", "with torch.enable_grad():",
           _operators("backward_under and tiled")),
    Mutant("float32 is left out of autocast", "fused_attn/runtime/autocast.py",
           "CASTABLE = (torch.float16, torch.bfloat16, torch.float32)", "CASTABLE = (torch.float16, torch.bfloat16)",
           _operators("autocast_with and tiled")),
    Mutant("out and lse are kept on the context", "fused_attn/runtime/autograd.py",
           "ctx.save_for_backward(*inputs[: ops.TENSOR_COUNT], out.data, *normaliser)",
           "ctx.kept = output; ctx.save_for_backward(*inputs[: ops.TENSOR_COUNT], out, *normaliser)",
           _operators("no_tensor_leaks and tiled")),
    Mutant("a mask together with is_causal is accepted", "fused_attn/api/sdpa.py",
           'if as_bool("is_causal", options.causal) and attn_mask is not None:', "if False:",
           ("api/test_errors.py", "test_sdpa and mask and causal")),
    Mutant("autocast is queried for meta tensors", "fused_attn/runtime/autocast.py",
           "return torch.amp.is_autocast_available(device) and", "return",
           ("runtime/test_meta.py", "backward_under_autocast")),
    Mutant("a fake tensor's address is read", "fused_attn/backends/triton/hopper.py",
           " or type(x) not in (Tensor, torch.nn.Parameter):", ":", ("runtime/test_meta.py", "explain")),
    Mutant("the SDPA wrapper refuses a head dim of 0", "fused_attn/api/bind.py",
           'if shape[-1] == 0 and layout != "sdpa":', "if shape[-1] == 0:",
           ("api/test_sdpa_shapes.py", "head_dim_of_zero")),
    Mutant("heads of value are taken for heads of key", "fused_attn/api/sdpa.py",
           "if enable_gqa and key.shape[-3] != value.shape[-3]:", "if False:",
           ("api/test_sdpa_shapes.py", "groups_of")),
    Mutant("value may have another length than key", "fused_attn/api/bind.py",
           "if of_v[-2] != of_k[-2]:", "if False:", ("api/test_errors.py", "test_sdpa and lengths")),
    Mutant("key-value heads that do not divide the query heads are accepted", "fused_attn/api/bind.py",
           "if heads and (kv_heads == 0 or heads % kv_heads):", "if False:",
           ("api/test_errors.py", "groups and divide")),
    # ragged batches
    Mutant("every sequence's diagonal begins at its first key", "kernels/memory.py",
           "shift = (n - m) * decode_int(ragged.aligned)", "shift = zero",
           ("backends/test_parity.py", "triton and ragged_bottom_right")),
    Mutant("row numbers of every sequence are stored at the first one's rows", "kernels/memory.py",
           "* tile.rows + tile.row", "* tile.rows",
           ("backends/test_parity.py", "triton and ragged_bottom_right")),
    Mutant("features of packed sequences have no padding between them", "kernels/scores.py",
           "(GAP // PEAKS + 1)", "0", ("backends/test_parity.py", "triton and ragged_additive")),
    Mutant("slopes of the first sequence get all gradients", "fused_attn/backends/triton/portable.py",
           "sequence_sums(x, starts))", "sequence_sums(x, starts * 0 + starts[-1:]))",
           ("backends/test_parity.py", "triton and ragged_window")),
    # scores and normalizers
    Mutant("a program does not wait for its semaphore", "kernels/additive.py",
           'sem="acquire") != c.plane.tile.index', 'sem="acquire") < 0', ("kernels/test_additive.py", "any_order")),
    Mutant("a program takes one ticket", "kernels/additive.py",
           "        ticket = tl.atomic_add(gradients.ticket, 1)\n", "        ticket = tiles * BATCHED_HEADS\n",
           ("kernels/test_additive.py", "persistent_programs")),
    Mutant("pairs past the limit", "kernels/scores.py",
           "SAFE: tl.constexpr = tl.constexpr(11.0)", "SAFE: tl.constexpr = tl.constexpr(12.0)",
           ("kernels/test_additive.py", "tile_by_tile")),
    Mutant("the second weight of a pair is dropped", "kernels/scores.py",
           "a * (-2.0 * w1)", "a * (-2.0 * w0)", ("backends/test_parity.py", "triton and additive-float16")),
    Mutant("the slope of tanh is 1", "kernels/additive.py",
           "slope = du - sent * t", "slope = du", ("backends/test_parity.py", "triton and additive-float32")),
    Mutant("the slope of tanh is 1, tiled", "fused_attn/backends/tiled/additive.py",
           "grad_input(block_ds.mT, t, grad_input=t)", "grad_input(block_ds.mT, t * 0, grad_input=t)",
           ("backends/test_parity.py", "tiled and additive-float32")),
    Mutant("a sigmoid's slope lacks 1 - p", "kernels/backward.py",
           "return p * (1.0 - p) * dp", "return p * dp", ("backends/test_parity.py", "triton and sigmoid-float32")),
    Mutant("a sigmoid gives masked keys a weight", "kernels/forward.py",
           "            p = tl.where(see, p, 0.0)", "            p = p * 1.0",
           ("backends/test_parity.py", "triton and sigmoid_causal")),
    Mutant("terms of keys are left out", "kernels/modifiers.py",
           "key_base(plane.tile) + key)", "key_base(plane.tile) + key) * 0.0",
           ("backends/test_parity.py", "triton and distance-float32")),
    Mutant("terms of rows are left out", "kernels/modifiers.py",
           "row_base(plane.tile) + row)", "row_base(plane.tile) + row) * 0.0",
           ("backends/test_parity.py", "triton and distance_scalar")),
    Mutant("row sums of a sigmoid use the softmax formula", "fused_attn/backends/triton/portable.py",
           "self.row_sums = self.row_sums if p.sigmoid else self._row_gradient()",
           "self.row_sums = self._row_gradient()",
           ("backends/test_parity.py", "triton and sigmoid_bias_rows")),
    Mutant("squares of large vectors overflow", "fused_attn/scores.py",
           "torch.linalg.vector_norm(x / largest, dim=-1, keepdim=True) * largest",
           "torch.linalg.vector_norm(x, dim=-1, keepdim=True)", ("test_scores.py", "ignores_the_length")),
    Mutant("padding reaches a score's parameter", "fused_attn/scores.py",
           "if not p.all_keys_visible:", "if False:",
           ("backends/test_parity.py", "tiled and cosine_causal_gqa")),
    Mutant("a distance is not moved to the origin", "fused_attn/scores.py",
           "middle = torch.where(near, middle, 0)", "middle = middle * 0",
           ("test_scores.py", "far_from_the_origin and tiled")),
    Mutant("q . w overflows float16", "fused_attn/scores.py",
           "(largest / LARGE).clamp_min(1)", "(largest / LARGE).clamp(1, 1)",
           ("test_scores.py", "beyond_float16 and triton")),
    Mutant("softmax1 is a softmax", "fused_attn/spec/problem.py",
           "sink=p.q.new_zeros(p.q.shape[1], dtype=p.lse_dtype)", "sink=None",
           ("backends/test_parity.py", "tiled and softmax1-float32")),
    # statistics and maps of the weights
    Mutant("statistics: entropy of a fully masked row", "kernels/statistics.py",
           "tl.where(fully_masked, 0.0, part * (t_i + depth * l_i))", "part * (t_i + depth * l_i)",
           _statistics("fully_masked and triton")),
    Mutant("statistics: a masked key gets NaN from a row of NaN", "kernels/statistics.py",
           'return tl.where(x == float("-inf"), 0.0, p)', "return p", _statistics("nan and triton")),
    Mutant("statistics: a masked key gets NaN from a row of NaN, tiled",
           "fused_attn/backends/tiled/statistics.py",
           "masked = s == -torch.inf if self.log.isnan().any() else None", "masked = None",
           _statistics("nan and tiled")),
    Mutant("statistics: the largest logit skips NaN", "kernels/statistics.py",
           'top = tl.where(nan > 0, float("nan"), top)', "top = top", _statistics("nan_propagates and triton")),
    Mutant("statistics: keys past the end of a tile are stored", "kernels/statistics.py",
           "p, mask=c.chosen[:, None] & (cols < c.plane.tile.N - n))", "p, mask=c.chosen[:, None])",
           _statistics("rows_and_heads and triton")),
    Mutant("statistics: a map ignores the requested heads", "kernels/statistics.py",
           "h = tl.load(heads + shown % SHOWN_HEADS)", "h = shown % SHOWN_HEADS",
           _statistics("rows_and_heads and triton")),
    Mutant("statistics: every head reads the first key-value head", "fused_attn/spec/problem.py",
           "slice(h // self.group, h // self.group + 1)", "slice(0, 1)", _statistics("rows_and_heads and tiled")),
    Mutant("statistics: a sink is left out of the denominator", "kernels/statistics.py",
           "d += tl.exp2((logit - shift) * LOG2E)", "d += 0.0", _statistics("every_case and sink")),
    Mutant("statistics: entropy mixes nats and bits", "kernels/statistics.py",
           "depth = shift - c + tl.log2(d) * LN2", "depth = shift - c + tl.log2(d)",
           _statistics("every_case and plain")),
    Mutant("statistics: entropy is not rescaled to the new maximum", "kernels/statistics.py",
           "rise = tl.where(l_i == 0.0, 0.0, (peak - m_i) * l_i)", "rise = 0.0", _statistics("every_case and plain")),
    Mutant("statistics: entropy is not rescaled to the new maximum, tiled",
           "fused_attn/backends/tiled/statistics.py",
           "(shift - finite_peak(self.m)) * self.total", "0", _statistics("long_rows and tiled")),
    Mutant("ties are in any order, tiled", "fused_attn/backends/tiled/statistics.py",
           "if ties.any():", "if False:", _statistics("ties_take and tiled")),
    Mutant("a key is ranked twice", "kernels/statistics.py",
           "keys < c.bound[:, None]", "keys <= c.bound[:, None]", _statistics("ties_take and triton")),
    Mutant("0.0 and -0.0 are not a tie", "kernels/statistics.py",
           "tl.where(x == 0.0, 0.0, x).to", "x.to", _statistics("all_weights_equal and triton")),
    Mutant("top_k beyond the number of keys is accepted", "fused_attn/api/statistics.py", "if top_k > n:", "if False:",
           _statistics("options_of_wrong_types")),
    Mutant("backward through statistics gives zero silently", "fused_attn/api/statistics.py",
           "without_derivative(message, results, *p.tensors().values())",
           "found",
           _statistics("backward_raises and tiled")),
    Mutant("derivatives: arguments are not separated", "fused_attn/spec/transforms.py",
           "x.view_as(x) if x is not None and need else x", "x",
           ("runtime/test_second_derivatives.py", "of_one_tensor and plain")),
    Mutant("derivatives: keys between sinks and window are read", "fused_attn/backends/tiled/attention.py",
           "visibility(p) if p.span.sinks else tensor_visibility(p)", "tensor_visibility(p)",
           ("runtime/test_second_derivatives.py", "test_every_case and window_sinks_wide")),
    Mutant("derivatives: tangents of a cotangent are ignored", "fused_attn/spec/transforms.py",
           "return torch.is_grad_enabled() or forward_mode(dout, dlse)", "return torch.is_grad_enabled()",
           ("runtime/test_second_derivatives.py", "forward_mode_of_a_backward and tiled")),
    Mutant("derivatives: an out changed in place is used", "fused_attn/spec/transforms.py",
           "return version(self._counter) != self._first", "return False", ("runtime/test_in_place.py", "changed_out")),
    Mutant("append: two sequences may share a page", "fused_attn/spec/decoding.py", "hit = held > first[pages]",
           "hit = held > self.page", ("api/test_decode_writes.py", "(one_page or leftpad) and tiled")),
    Mutant("append: pages before a leftpad are checked",
           "fused_attn/runtime/decode_ops.py", "cache.check_writes(leftpad)",
           "cache.check_writes()", ("api/test_decode_writes.py", "leftpad and tiled")),
    Mutant("append: two sequences may share a row", "fused_attn/spec/decoding.py",
           "if self.index is not None and len(self.index.unique()) < len(self.index):", "if False:",
           ("api/test_decode_writes.py", "one_row and tiled")),
    Mutant("append: expanded caches are accepted",
           "fused_attn/spec/decoding.py", "if storage.overlaps_itself(x):", "if False:",
           ("api/test_decode_writes.py", "overlap_themselves and tiled")),
    Mutant("append: overlapping caches are accepted", "fused_attn/spec/decoding.py",
           "if storage.overlap(self.k, self.v):", "if False:",
           ("api/test_decode_writes.py", "overlap_themselves and tiled")),
    Mutant("append: only first addresses are compared", "fused_attn/spec/storage.py",
           "ranges.setdefault(step, [0, 0])[side] +=", "ranges.setdefault(step, [0, 0])[0] +=",
           ("api/test_decode_writes.py", "exact")),
    Mutant("cache: a shared page is written", "fused_attn/api/paged_cache.py",
           "shared = self._to_copy(entries) if tokens else []", "shared: list = []",
           ("api/test_paged_cache.py", "test_pages")),
    Mutant("cache: pages are never freed", "fused_attn/api/paged_cache.py",
           "self._references[page] -= 1", "self._references[page] -= 0", ("api/test_paged_cache.py", "test_pages")),
    Mutant("cache: a fork copies no values", "fused_attn/api/paged_cache.py",
           "for data in (self.k, self.v):\n            data[:, new]",
           "for data in (self.k,):\n            data[:, new]",
           ("api/test_paged_cache.py", "test_pages")),
    Mutant("cache: full pages are copied too", "fused_attn/api/paged_cache.py",
           "if x.length % self.page_size and", "if x.pages and", ("api/test_paged_cache.py", "test_pages")),
    Mutant("cache: copies reserve no page", "fused_attn/api/paged_cache.py",
           "wanted = len(shared) + sum", "wanted = sum", ("api/test_paged_cache.py", "a_full_cache")),
    Mutant("flash_attn: windows are mirrored", "fused_attn/compat/flash_arguments.py",
           "left, right = (x if", "right, left = (x if", _flash("test_dense and window")),
    Mutant("flash_attn: packed sequences are aligned top left", "fused_attn/compat/flash_attn.py",
           'max_seqlen_k=longest_k, alignment="bottom_right"', 'max_seqlen_k=longest_k, alignment="top_left"',
           _flash("test_varlen and causal")),
    Mutant("flash_attn: queries over pages have the first positions", "fused_attn/compat/flash_pages.py",
           "row = row + (longest - rows)[sequence]", "row = row + 0", _flash("test_varlen_over_pages")),
    Mutant("flash_attn: rotary pairs are the other convention's", "fused_attn/compat/flash_attn.py",
           "rotary_sin, rotary_interleaved)", "rotary_sin, not rotary_interleaved)",
           ("compat/test_flash_kvcache.py", "test_kvcache and rotary")),
    Mutant("flash_attn: leftpad is forgotten", "fused_attn/compat/flash_attn.py",
           "cache_leftpad=cache_leftpad", "cache_leftpad=None",
           ("compat/test_flash_kvcache.py", "test_kvcache and leftpad")),
    Mutant("flash_attn: the backward ignores the given log-sum-exp", "fused_attn/compat/flash_passes.py",
           "torch.exp(own_lse - lse)", "torch.ones_like(lse)", ("compat/test_flash_passes.py", "parts")),
    Mutant("flash_attn: S_dmask is that of the first sequence", "fused_attn/compat/flash_probabilities.py",
           "torch.arange(b * heads, (b + 1) * heads", "torch.arange(0, heads",
           ("compat/test_flash_passes.py", "dropped")),
    Mutant("bert_padding: unused tokens count as used", "fused_attn/compat/bert_padding.py",
           "used.sum(-1, dtype=torch.int32)", "placed.sum(-1, dtype=torch.int32)",
           ("compat/test_bert_padding.py", "test_unpad_and_pad")),
    Mutant("jagged: keys use the offsets of the queries", "fused_attn/api/nested.py",
           "starts if keys == rows else k.offsets().int()", "starts",
           ("api/test_nested.py", "test_attention and plain")),
    Mutant("jagged: out has new offsets", "fused_attn/api/nested.py",
           "values, like.offsets(), jagged_dim", "values, like.offsets().clone(), jagged_dim",
           ("api/test_nested.py", "shares_the_offsets")),
    Mutant("jagged: a Mask that holds a tensor is accepted", "fused_attn/api/nested.py",
           "or (isinstance(mask, Mask) and mask.remainder)", "", ("api/test_nested.py", "test_errors")),
    Mutant("transformers: unregister leaves the function in place", "fused_attn/compat/transformers.py",
           "            owner[name] = value\n        for", "            pass\n        for",
           ("compat/test_flash_attention_2.py", "scopes_nest")),
    Mutant("transformers: own attention is accepted", "fused_attn/compat/transformers.py",
           "            _check_class(self, is_init_check)\n", "            pass\n",
           ("compat/test_transformers_models.py", "refused and Bloom")),
    Mutant("transformers: a selection of keys is ignored", "fused_attn/compat/transformers.py",
           "    if indices is not None:\n", "    if False:\n",
           ("compat/test_transformers_models.py", "sample and V32")),
    Mutant("gpt: every cached step has position 0", "examples/gpt.py",
           "else (len(memory), memory", "else (0, memory",
           ("examples/test_examples.py", "the_same_with_a_cache")),
    # The row maximum and the log of the sum stay apart
    Mutant("tiled: maximum and log of the sum are subtracted as one", "fused_attn/backends/tiled/workspace.py",
           "torch.add(log_sum * -LOG2E, s.sub_(peak), alpha=LOG2E, out=s)", "s.sub_(peak + log_sum).mul_(LOG2E)",
           _extreme("equal_logits and tiled")),
    Mutant("triton: maximum and log of the sum are subtracted as one, folded scale", "kernels/backward.py",
           "(s - peak) * (plane.own.scale * LOG2E) - log2_sum",
           "(s - (peak + log2_sum / (plane.own.scale * LOG2E))) * (plane.own.scale * LOG2E)",
           _extreme("equal_logits and triton")),
    Mutant("triton: maximum and log of the sum are subtracted as one", "kernels/backward.py",
           "(value(plane, s, t, m, n, TRANSPOSED) - peak) * LOG2E - log2_sum",
           "(value(plane, s, t, m, n, TRANSPOSED) - (peak + log2_sum / LOG2E)) * LOG2E",
           _extreme("rows_filled and triton")),
    Mutant("triton: the sink's share uses unscaled products", "fused_attn/backends/triton/portable.py",
           "self.peak * self.p.scale if self._planes[0].folds.value else self.peak", "self.peak",
           _extreme("sink and triton")),
    Mutant("triton: a sink above the maximum is not in the log of the sum", "kernels/softmax.py",
           "return out, logit + log, peak, rise + log", "return out, logit + log, peak, log",
           _extreme("sink and triton")),
    Mutant("tiled: the sink is subtracted from the rounded sum", "fused_attn/backends/tiled/attention.py",
           "p.sink.to(dtype)[:, None, None] - peak - log_sum", "p.sink.to(dtype)[:, None, None] - (peak + log_sum)",
           _extreme("sink and tiled")),
    Mutant("splits of a decode have equal weights", "kernels/combine.py",
           "tl.sum(p * sums[None, :], 1)", "tl.sum(p, 1)", _extreme("split_decoding")),
    Mutant("sm_90: maximum and log of the sum are subtracted as one", "kernels/hopper_backward.py",
           "    w = s - shared.peak.index(stage).load(COLUMN)[None, :]\n"
           "    w = gl.exp2(w * c.factor - shared.log2_sum.index(stage).load(COLUMN)[None, :])",
           "    w = shared.peak.index(stage).load(COLUMN) * c.factor + shared.log2_sum.index(stage).load(COLUMN)\n"
           "    w = gl.exp2(s * c.factor - w[None, :])", _extreme("hopper")),
    # Compilers
    Mutant("symbolic sizes are looked up in tuples", "fused_attn/spec/checks.py",
           "return any(x == choice for choice in choices)", "return x in choices",
           _operators("dynamic_with_parameters and (sink or bias)")),
    Mutant("a compiled function keeps the traced environment variable", "fused_attn/runtime/environment.py",
           "def __getattr__(name: str) -> str | None:",
           'backend = os.environ.get("FUSED_ATTN_BACKEND")\n\n\ndef __getattr__(name: str) -> str | None:',
           _operators("follows_the_environment")),
    # Caches: what is read of them, where a sequence is cut, and what comes of the parts
    Mutant("splits without keys are merged", "kernels/combine.py",
           "written = index < count", "written = index < PARTS", _decode("test_parity and triton-3 and plain")),
    Mutant("keys before a leftpad are visible", "kernels/decode.py",
           "tl.maximum(first, begin + part * size)", "begin + part * size",
           _decode("test_parity and triton and leftpad")),
    Mutant("a tile with a tree mask counts as full", "kernels/decode.py",
           "tl.minimum(tiles.full, tl.maximum(trunk - begin, 0) // BLOCK)", "tiles.full",
           _decode("test_parity and triton and tree")),
    Mutant("triton: every sequence has the first one's tree mask", "kernels/decode.py",
           "span.tree.ptr + b.to(tl.int64) * decode_int(span.tree.strides[0]) + rows", "span.tree.ptr + rows",
           _decode("test_parity and triton and tree_of_each")),
    Mutant("tiled: every sequence has the first one's tree mask", "fused_attn/spec/decoding.py",
           "tree[b if len(tree) > 1 else 0]", "tree[0]", _decode("test_parity and tiled and tree_of_each")),
    Mutant("the offset inside a page is ignored", "kernels/memory.py",
           "load_rows(view, head + page_offset(view, page), start % pages.size,",
           "load_rows(view, head + page_offset(view, page), start * 0,",
           _decode("test_parity and triton and pages_of_64")),
    Mutant("split positions depend on the capacity", "fused_attn/backends/triton/decode.py",
           "return max(1, -(-n // INVARIANT)), INVARIANT", "return max(1, -(-n // INVARIANT)), c.BLOCK_N",
           _decode("test_bits_do_not_depend_on_the_batch and triton")),
    Mutant("new keys are rotated by the negative angle", "kernels/append.py",
           "x * cos - y * sin,", "x * cos + y * sin,", _decode("test_append and triton and halves")),
)  # fmt: skip


def run(tests: tuple[str, str], root: Path) -> tuple[int, str]:
    """pytest's exit status, and its last lines."""
    file, expression = tests
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", "", f"tests/{file}",
               "-k", expression]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, env=environment, check=False)
    return done.returncode, "\n".join((done.stdout + done.stderr).splitlines()[-15:])


def face(mutant: Mutant | None, tests: tuple[str, str]) -> tuple[int, str, float]:
    """The tests' verdict on a copy of the tree, with the mutation made in it."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory) / "tree"
        shutil.copytree(ROOT, root, ignore=LEFT_BEHIND)
        if mutant is not None:
            file = root / mutant.file
            text = file.read_text()
            if text.count(mutant.old) != 1:
                return -1, f"{mutant.file} holds the text {text.count(mutant.old)} times", 0.0
            file.write_text(text.replace(mutant.old, mutant.new))
        status, tail = run(tests, root)
    return status, tail, time.monotonic() - began


def main(words: list[str]) -> int:
    chosen = [m for m in MUTANTS if not words or any(word in m.name or word in m.file for word in words)]
    jobs = int(os.environ.get("JOBS", "2"))
    wrong = 0
    with ThreadPoolExecutor(jobs) as pool:
        suites = list(dict.fromkeys(m.tests for m in chosen))
        print(f"{len(suites)} selections of tests without a mutation", flush=True)
        for tests, (status, tail, seconds) in zip(suites, pool.map(lambda t: face(None, t), suites), strict=True):
            if status != GREEN:
                wrong += 1
                print(f"NOT GREEN  {seconds:5.1f} s  {tests[0]} -k {tests[1]!r}\n{tail}")
        print(f"{len(chosen)} mutations", flush=True)
        verdicts = pool.map(lambda m: face(m, m.tests), chosen)
        for mutant, (status, tail, seconds) in zip(chosen, verdicts, strict=True):
            # A crash of the interpreter by a wild pointer is a red test as well; an error of collection is not.
            red = status == RED or status < -1
            verdict = "red" if red else "SURVIVED" if status == GREEN else "NOT RUN"
            print(f"{verdict:9}  {seconds:5.1f} s  {mutant.name}", flush=True)
            if not red:
                wrong += 1
                print(tail)
    print(f"{len(chosen)} mutations, {wrong} wrong")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

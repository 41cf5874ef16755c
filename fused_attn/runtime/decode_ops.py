"""torch.library operators of decoding: `append` and `decode`.

Both check index tensors when they run, not when they are traced (see `Cache.check`). `append` writes into the caches
and returns the rotated q, or an empty tensor without rotary embedding. The Triton backend is imported when it is first
used.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula, sdpa_flop_count

from ..backends import reference
from ..backends.tiled import attention as tiled
from ..spec import state
from ..spec.decoding import Cache, Decode, Rotary

TRITON_MODULE = "fused_attn.backends.triton.decode"
SEQUENTIAL: dict[str, Any] = {"tiled": tiled.forward, "reference": reference.attention}  # one sequence after another

_library = torch.library.Library("fused_attn", "FRAGMENT")
_library.define(
    "append(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor lengths, Tensor? page_table, Tensor? index, "
    "Tensor? leftpad, Tensor k_new, Tensor v_new, Tensor q, Tensor? cos, Tensor? sin, bool interleaved, bool advance, "
    "str backend) -> Tensor"
)
_library.define(
    "decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor? lengths, Tensor? page_table, Tensor? index, "
    "Tensor? leftpad, Tensor? tree, Tensor? scale, Tensor? softcap, Tensor? slopes, Tensor? sink, SymInt added, "
    "float scale_value, float? softcap_value, SymInt? left, SymInt? right, SymInt? splits, bool batch_invariant, "
    "str backend) -> (Tensor out, Tensor lse)"
)


def triton_module() -> Any:
    """The module that launches the kernels of both operators."""
    return importlib.import_module(TRITON_MODULE)


# ------------------------------------------------------------------------------------------------------------ append


def append(
    cache: Cache, leftpad: Tensor | None, k: Tensor, v: Tensor, q: Tensor, rotary: Rotary | None, advance: bool,
    backend: str, untraced: bool = False,
) -> Tensor:  # fmt: skip
    """Append k, rotated, and v to each sequence, and return q, rotated."""
    cos, sin, interleaved = (None, None, False) if rotary is None else (rotary.cos, rotary.sin, rotary.interleaved)
    run: Any = _append if untraced else torch.ops.fused_attn.append
    rotated_q = run(
        cache.k, cache.v, cache.lengths, cache.table, cache.index, leftpad, k, v, q, cos, sin, interleaved, advance,
        backend,
    )  # fmt: skip
    return q if rotary is None else rotated_q


def _append(
    k_cache: Tensor, v_cache: Tensor, lengths: Tensor, table: Tensor | None, index: Tensor | None,
    leftpad: Tensor | None, k: Tensor, v: Tensor, q: Tensor, cos: Tensor | None, sin: Tensor | None, interleaved: bool,
    advance: bool, backend: str,
) -> Tensor:  # fmt: skip
    cache = Cache(k_cache, v_cache, lengths, table, index, added=k.shape[1])
    rotary = None if cos is None or sin is None else Rotary(cos, sin, interleaved)
    cache.check(leftpad)
    cache.check_writes(leftpad)
    if rotary is not None:
        rotary.check(cache, max(k.shape[1], q.shape[1] if advance else 1))
    if backend == "triton":
        return triton_module().append(cache, k, v, q, rotary, advance)
    if rotary is None:
        cache.append(k, v)
        return q.new_empty(0)
    cache.append(rotary.rotated(k, cache.positions(k.shape[1])), v)
    return rotary.rotated(q, cache.positions(q.shape[1], advance))


def _append_fake(*args: Any) -> Tensor:
    q, cos = args[8:10]
    return q.new_empty(0 if cos is None else q.shape)


# ------------------------------------------------------------------------------------------------------------ decode


def decode(d: Decode, backend: str, untraced: bool = False) -> tuple[Tensor, Tensor]:
    """(out, lse) by a backend. untraced: nothing traces the call, so the operator is bypassed, which is faster."""
    if untraced:
        return _run(d, backend)
    scale_is_tensor, cap_is_tensor = isinstance(d.scale, Tensor), isinstance(d.softcap, Tensor)
    cache = d.cache
    return torch.ops.fused_attn.decode(
        d.q, cache.k, cache.v, cache.lengths, cache.table, cache.index, d.leftpad, d.tree,
        d.scale if scale_is_tensor else None, d.softcap if cap_is_tensor else None, d.slopes, d.sink, cache.added,
        1.0 if scale_is_tensor else d.scale, None if cap_is_tensor else d.softcap, d.left, d.right, d.splits,
        d.batch_invariant, backend,
    )  # fmt: skip


def rebuild(args: tuple[Any, ...]) -> tuple[Decode, str]:
    """The inverse of `decode`'s flat arguments."""
    q, k, v, lengths, table, index, leftpad, tree, scale, cap, slopes, sink, added, *rest, backend = args
    scale_value, cap_value, left, right, splits, batch_invariant = rest
    found = Decode(
        q, Cache(k, v, lengths, table, index, added), scale_value if scale is None else scale,
        cap_value if cap is None else cap, slopes, sink, left, right, leftpad, tree, splits, batch_invariant,
    )  # fmt: skip
    return found, backend


def _decode(*args: Any) -> tuple[Tensor, Tensor]:
    return _run(*rebuild(args))


def _run(d: Decode, backend: str) -> tuple[Tensor, Tensor]:
    d.check()
    if backend == "triton" and not d.empty:
        return triton_module().decode(d)
    out, lse = state.empty(d.empty_out(), d.empty_lse())
    for b, p in enumerate(d.problems() if not d.empty else ()):
        found, found_lse, *_ = SEQUENTIAL[backend](p)
        out[b] = found[0].transpose(0, 1)
        lse[b] = found_lse[0]
    return out, lse


def _decode_fake(*args: Any) -> tuple[Tensor, Tensor]:
    d, _ = rebuild(args)
    return d.empty_out(), d.empty_lse()


for _name, _function, _fake in (("append", _append, _append_fake), ("decode", _decode, _decode_fake)):
    _library.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fused_attn::{_name}", _fake)


@register_flop_formula(torch.ops.fused_attn.decode)
def _decode_flops(
    q: Any, k: Any, v: Any, lengths: Any, table: Any, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    """Two products for each score with a key within capacity; lengths are not read."""
    b, m, heads, d = q
    keys = k[1] * (1 if table is None else table[1])
    return sdpa_flop_count((b, heads, m, d), (b, heads, keys, d), (b, heads, keys, v[3]))

"""The private names of torch that the package uses, each with the reason why no public one serves.

`tests/spec/test_torch_internals.py` checks their meaning on the oldest and the newest supported torch. C functions
are bound directly, without a wrapper. The lookup in torch._C, which takes microseconds, is done once, here.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import fake_tensor
from torch.autograd import forward_ad

# No public function reports whether a torch.func transform is active.
functorch_active = torch._C._are_functorch_transforms_active

# No public context manager suspends torch.func transforms.
functorch_disabled = torch._C._DisableFuncTorch

# torch.func has no public function that inspects its wrapper tensors.
is_functorch_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
is_batched = torch._C._functorch.is_batchedtensor
unwrap_functorch = torch._C._functorch.get_unwrapped

# torch.autograd.grad(..., is_grads_batched=True) uses an older batched tensor type, without a public test.
is_autograd_batched = torch._C._functorch.is_legacy_batchedtensor

# torch.no_grad also skips autograd, but still dispatches through its layer and disables grad mode in the operator.
below_autograd = torch._C._AutoDispatchBelowAutograd

# Counts modes such as FakeTensorMode; torch.utils._python_dispatch is private too.
dispatch_mode_count = torch._C._len_torch_dispatch_stack

# Counts modes such as `with torch.device(...)`; torch.overrides has no public count.
function_mode_count = torch._C._len_torch_function_stack

# torch.autograd.profiler has no public function that reports a running profiler.
profiler_enabled = torch._C._autograd._profiler_enabled

# torch.jit.is_tracing, torch.are_deterministic_algorithms_enabled and torch.get_float32_matmul_precision are Python
# wrappers of these three, too slow for the call cache, which uses them at every attention call.
jit_tracing = torch._C._is_tracing
deterministic_algorithms = torch._C._get_deterministic_algorithms
float32_matmul_precision = torch._C._get_float32_matmul_precision

# torch.is_autocast_enabled needs a device type, and raises for those without autocast.
any_autocast = torch._C._is_any_autocast_enabled

# No public function recognizes a fake tensor inside wrappers.
is_fake = fake_tensor.is_fake

# torch's attention kernel for the CPU: the public function does not return the log-sum-exp.
sdpa_on_cpu = torch._scaled_dot_product_flash_attention_for_cpu
sdpa_on_cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

# A tensor's count of in-place changes; torch's notes on autograd document only this private name.
version = attrgetter("_version")

# torch has no public test for the zero tensors without memory that forward-mode AD creates.
is_zero_tensor = Tensor._is_zerotensor

# Tensor._base, the other test for a view, is private too.
is_view = Tensor._is_view


def forward_ad_active() -> bool:
    """True inside forward_ad.dual_level and torch.func.jvp. There is no public function."""
    return forward_ad._current_level >= 0


def observed() -> bool:
    """True while torch transforms, traces or profiles. One function, because the call cache uses it at every call."""
    return (
        forward_ad._current_level >= 0
        or functorch_active()
        or dispatch_mode_count() > 0
        or function_mode_count() > 0
        or jit_tracing()
        or profiler_enabled()
    )


def jagged_dim(x: Any) -> int:
    """The dimension of a jagged tensor whose length varies. torch.nested has no public function for it."""
    return x._ragged_idx


def jagged_bounds(x: Any) -> dict[str, Any]:
    """The shortest and longest length, None where unknown without synchronization. There is no public function."""
    return {"min_seqlen": x._maybe_min_seqlen, "max_seqlen": x._maybe_max_seqlen}


def jagged_longest(x: Any) -> int:
    """The longest length, read from the offsets if not known yet. There is no public function."""
    return x._get_max_seqlen()

"""The private names of torch that the package uses, under plain names, each with the reason why no public one serves.

`tests/spec/test_torch_internals.py` checks what they mean on the oldest and the newest supported torch. C functions
are bound as they are, so that a call costs no more than one by torch's name. The search of torch._C's thousands of
names, which costs microseconds, is done once, here.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import fake_tensor
from torch.autograd import forward_ad

# No public function tells whether a transform of torch.func is active.
functorch_active = torch._C._are_functorch_transforms_active

# No public context manager suspends the transforms of torch.func.
functorch_disabled = torch._C._DisableFuncTorch

# torch.func has no public function that inspects its wrappers: of any transform, of vmap, and the tensor inside.
is_functorch_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
is_batched = torch._C._functorch.is_batchedtensor
unwrap_functorch = torch._C._functorch.get_unwrapped

# The batches of torch.autograd.grad(..., is_grads_batched=True) are tensors of an older kind, without a public test.
is_autograd_batched = torch._C._functorch.is_legacy_batchedtensor

# torch.no_grad also skips autograd, but dispatches through its layer and switches grad mode off for the operator.
below_autograd = torch._C._AutoDispatchBelowAutograd

# Modes such as FakeTensorMode; torch.utils._python_dispatch, which has functions for them, is private too.
dispatch_mode_count = torch._C._len_torch_dispatch_stack

# Modes such as a torch.device in a with statement; torch.overrides has no public count.
function_mode_count = torch._C._len_torch_function_stack

# torch.autograd.profiler has no public function that tells whether a profiler runs.
profiler_enabled = torch._C._autograd._profiler_enabled

# torch.jit.is_tracing, torch.are_deterministic_algorithms_enabled and torch.get_float32_matmul_precision are Python
# functions around these three, which the call cache calls at every attention call.
jit_tracing = torch._C._is_tracing
deterministic_algorithms = torch._C._get_deterministic_algorithms
float32_matmul_precision = torch._C._get_float32_matmul_precision

# torch.is_autocast_enabled asks for one type of device, and fails for those without autocast.
any_autocast = torch._C._is_any_autocast_enabled

# No public function tells a tensor without data, inside wrappers too.
is_fake = fake_tensor.is_fake

# torch's attention kernel for the CPU: the public function keeps the log-sum-exp to itself.
sdpa_on_cpu = torch._scaled_dot_product_flash_attention_for_cpu
sdpa_on_cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

# A tensor's number of in-place changes, described in torch's notes on autograd under this name alone.
version = attrgetter("_version")

# torch has no public test for tensors of zeros without memory, which forward-mode AD makes.
is_zero_tensor = Tensor._is_zerotensor

# Tensor._base, the other test for a view, is private too.
is_view = Tensor._is_view


def forward_ad_active() -> bool:
    """True inside forward_ad.dual_level and torch.func.jvp; no public function tells."""
    return forward_ad._current_level >= 0


def observed() -> bool:
    """True while torch transforms, traces or profiles: one function, because the call cache calls it at every call."""
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
    """The shortest and longest length as far as known without a synchronisation; no public function tells."""
    return {"min_seqlen": x._maybe_min_seqlen, "max_seqlen": x._maybe_max_seqlen}


def jagged_longest(x: Any) -> int:
    """The longest length, read from the offsets where it is not known yet. torch.nested has no public function."""
    return x._get_max_seqlen()

"""Peers in packages of their own. They are optional; each says why it cannot run.

Written from the signatures and samples of sageattention 1.0.6, nvidia-cudnn-frontend 1.19.0 and xformers 0.0.35. None
has run on a GPU here; xformers was called up to its error that it has no operator for the CPU. The adapters are small:
plain or causal attention, checked before it is timed like every provider.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

from bench.harness.providers import OTHER, Call, Provider, refuse
from bench.harness.samples import Sample
from bench.harness.table import version

MODIFIERS = (*OTHER, "softcap", "bias", "ALiBi", "sink", "tensor mask", "interval mask", "tensor scale", "dropout",
             "log-sum-exp to return")  # fmt: skip
WHEELS = {"sageattention": "1.0.6", "nvidia-cudnn-frontend": "1.19.0", "xformers": "0.0.35"}


def required(x: Sample, distribution: str, module: str) -> Any:
    """A peer's module; raises with every reason why it is not available."""
    reasons = [] if x.problem.q.device.type == "cuda" else ["it needs a GPU"]
    if version(distribution) is None:
        reasons.append(f"it is not installed (pip install {distribution}=={WHEELS[distribution]})")
    if reasons:
        raise NotImplementedError(f"{distribution}: {'; '.join(reasons)}")
    return importlib.import_module(module)


def _sage(x: Sample) -> Call:
    sageattn = required(x, "sageattention", "sageattention").sageattn
    refuse(x, "sageattention", *MODIFIERS)
    p = x.problem
    if p.q.shape[3] not in (64, 96, 128):
        raise NotImplementedError(f"sageattention takes head dims 64, 96 and 128, not {p.q.shape[3]}")
    # It subtracts the mean of the keys in place, which would change the input of the next provider.
    q, k, v = p.q.detach(), p.k.detach().clone(), p.v.detach()
    return lambda: sageattn(q, k, v, tensor_layout="HND", is_causal=x.span == "causal", sm_scale=p.scale)


def _frontend(x: Sample) -> Call:
    cudnn = required(x, "nvidia-cudnn-frontend", "cudnn")
    refuse(x, "the cuDNN frontend adapter", *MODIFIERS)
    p = x.problem
    handle = cudnn.create_handle()
    cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
    kinds = {torch.float16: cudnn.data_type.HALF, torch.bfloat16: cudnn.data_type.BFLOAT16}
    if p.q.dtype not in kinds:
        raise NotImplementedError(f"cuDNN's attention takes float16 and bfloat16, not {p.q.dtype}")
    graph = cudnn.pygraph(
        handle=handle, io_data_type=kinds[p.q.dtype], intermediate_data_type=cudnn.data_type.FLOAT,
        compute_data_type=cudnn.data_type.FLOAT,
    )  # fmt: skip
    given = {graph.tensor_like(t): t.detach() for t in (p.q, p.k, p.v)}
    q, k, v = given
    band = 0 if x.span == "causal" else None
    o, _ = graph.sdpa(
        name="sdpa", q=q, k=k, v=v, generate_stats=False, attn_scale=p.scale, diagonal_band_right_bound=band
    )
    like = p.empty_out()
    o.set_output(True).set_dim(list(like.shape)).set_stride(list(like.stride()))
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    graph.check_support()
    graph.build_plans()
    workspace = torch.empty(max(1, graph.get_workspace_size()), dtype=torch.uint8, device=p.q.device)

    def call() -> torch.Tensor:
        out = torch.empty_like(like)
        graph.execute(given | {o: out}, workspace, handle=handle)
        return out

    return call


def _xformers(x: Sample) -> Call:
    ops = required(x, "xformers", "xformers.ops")
    refuse(x, "the xformers adapter", *MODIFIERS, "grouped heads")
    p = x.problem
    words = {"attn_bias": ops.LowerTriangularMask() if x.span == "causal" else None, "scale": p.scale}
    q, k, v = (t.transpose(1, 2) for t in (p.q, p.k, p.v))  # it takes (B, M, H, D) with any strides but the last
    return lambda: ops.memory_efficient_attention(q, k, v, **words).transpose(1, 2)


def _named(distribution: str) -> Any:
    return lambda x: f"{distribution} {version(distribution)}"


PEERS = (
    Provider(
        "sage", _sage, no_backward=lambda x: "it is for inference", config=_named("sageattention"), inexact=True
    ),
    Provider(
        "cudnn_frontend", _frontend, no_backward=lambda x: "only its forward is called here",
        config=_named("nvidia-cudnn-frontend"),
    ),
    Provider("xformers", _xformers, config=_named("xformers")),
)  # fmt: skip

"""The problems that bench.static compiles: small CPU tensors with the strides and alignment of real ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bench.compiler import decoding
from fused_attn.api.bind import bind
from fused_attn.backends.triton.statistics import ADDITIVE
from fused_attn.scores import Additive, Distance
from fused_attn.spec.options import Options
from fused_attn.spec.problem import Mask, Problem, Ragged
from fused_attn.tuning import Config, config, override

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
MODIFIED = (
    "mask",
    "bias",
    "bias_batch",
    "bias_keys",
    "softcap",
    "alibi",
    "dropout",
    "lengths",
    "segments",
    "ids",
    "blocks",
    "window_sinks",
    "distance",
    "additive",
    "sigmoid",
    "ragged_additive",
    "ragged_bias",
)
BATCH, HEADS, LENGTH = 2, 4, 512


@dataclass(frozen=True)
class Case:
    """One direction of one problem; `feature` names the modifier, mask or layout."""

    direction: str
    dtype: str
    d: int
    feature: str = "plain"

    @property
    def kernels(self) -> tuple[str, ...]:
        """Names of the launched kernels."""
        if self.direction in decoding.DIRECTIONS:
            return decoding.kernels(self.direction, self.feature)
        if self.direction in ("forward", "hopper_forward"):
            return (self.direction, *(("schedule",) if self.feature == "ragged" else ()))
        if self.direction == "hopper_backward":
            others = self.feature == "plain"  # identical for every feature
            return (*(("hopper_prepare", "hopper_finish") if others else ()), "hopper_backward")
        if self.direction == "statistics":
            # top_k only changes the row statistics.
            others = {"top_k": (), "ragged": ("key_mass",)}.get(self.feature, ("key_mass", "map"))
            return ("row_statistics", *others)
        if self.feature.endswith("additive"):
            return ("delta", "additive_prepare", "additive_backward")
        if self.feature == "sigmoid":
            return ("dkdv", "dq")
        return ("delta", "dkdv", "dq", *(("dbias",) if self.feature in ("bias_batch", "ragged_bias") else ()))

    @property
    def with_modifiers(self) -> bool:
        """True for rows of modified scores in the tuning tables."""
        return self.feature in MODIFIED

    def config(self, kernel: str, arch: str) -> Config:
        """The tuning-table configuration of a kernel; kernels around the one-pass backward share its configuration."""
        if self.direction in decoding.DIRECTIONS:
            return decoding.chosen(arch, getattr(torch, DTYPES[self.dtype]), self.d, self.feature)
        if self.direction == "hopper_backward":
            kernel = self.direction
        elif kernel == "schedule":
            kernel = "forward"
        if self.feature.endswith("additive"):
            others = dict.fromkeys(("forward", "additive_prepare"), "additive_forward")
            kernel = (others | ADDITIVE).get(kernel, kernel)
        # Statistics read no values; v is a placeholder with one column.
        dv = 1 if self.direction == "statistics" else self.d
        d = dv if kernel.startswith("additive") else self.d
        found = config(kernel, arch, getattr(torch, DTYPES[self.dtype]), d, dv, with_modifiers=self.with_modifiers)
        return replace(found, ordered=True) if self.feature == "ordered" else found

    def consumers(self, arch: str, configs: dict[str, dict[str, Any]]) -> dict[str, int]:
        """Number of consumer warp groups by kernel, for warp-specialised kernels; configs as in `launcher`."""
        if not self.direction.startswith("hopper"):
            return {}
        kernel = self.direction
        chosen = Config.from_row(configs[kernel]) if kernel in configs else self.config(kernel, arch)
        return {kernel: chosen.consumers}

    def launcher(self, configs: dict[str, dict[str, Any]]) -> Callable[[], Any]:
        """A call of the launch path; configs overrides tuning-table rows by kernel."""
        from fused_attn.backends.triton import hopper, portable, statistics

        scope = {kernel: Config.from_row(row) for kernel, row in configs.items()}
        if self.direction in decoding.DIRECTIONS:
            dtype = getattr(torch, DTYPES[self.dtype])
            return decoding.launcher(self.direction, dtype, self.d, self.feature, scope)
        p = self.problem()
        if self.feature == "ordered":
            scope.setdefault("hopper_backward", self.config("hopper_backward", "sm_90"))
        backend = hopper if self.direction.startswith("hopper") else portable

        def forward() -> Any:
            with override(**scope):
                return backend.forward(p)

        def backward() -> Any:
            out = p.empty_out()
            normaliser = (torch.zeros_like(p.empty_lse()) for _ in range(2))
            with override(**scope):
                return backend.backward(p, out, *normaliser, torch.zeros_like(out), None, frozenset(p.tensors()))

        def inspect() -> None:
            with override(**scope):
                statistics.statistics(p, True, True, True, 8 if self.feature == "top_k" else 0)
                if p.ragged is None:
                    statistics.weights(p, [0, LENGTH - 1], [0])

        if self.direction == "statistics":
            return torch.no_grad()(inspect)
        return torch.no_grad()(backward if self.direction.endswith("backward") else forward)

    def problem(self) -> Problem:
        dtype = getattr(torch, DTYPES[self.dtype])
        kv_heads = 2 if self.feature == "gqa" else HEADS

        def zeros(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype)

        q = zeros(BATCH, HEADS, LENGTH, self.d)
        k, v = (zeros(BATCH, kv_heads, LENGTH, self.d) for _ in range(2))
        v = k[..., :1] if self.direction == "statistics" else v
        lengths = torch.full((BATCH,), LENGTH)
        starts = torch.tensor([0, LENGTH // 4, LENGTH], dtype=torch.int32)
        ragged = Ragged(starts, starts.clone(), LENGTH, LENGTH, "bottom_right")
        ids, slopes = torch.arange(LENGTH) // 100, zeros(HEADS, dtype=torch.float32)
        options: dict[str, Callable[[], dict[str, Any]]] = {
            "plain": dict,
            "top_k": dict,
            "ordered": dict,
            "gqa": dict,
            "causal": lambda: {"causal": True},
            "window": lambda: {"window": (128, 128)},
            "lengths": lambda: {"mask": Mask.lengths(lengths)},
            "segments": lambda: {"mask": Mask.segments(ids, sorted=True)},
            "ids": lambda: {"mask": Mask.segments(ids, sorted=False)},
            "blocks": lambda: {"mask": Mask.blocks(torch.eye(4, dtype=torch.bool), 128), "causal": True},
            "window_sinks": lambda: {"mask": Mask.window(128, 0, sinks=4)},
            "mask": lambda: {"mask": torch.ones(BATCH, 1, LENGTH, LENGTH, dtype=torch.bool)},
            "bias": lambda: {"bias": zeros(BATCH, HEADS, LENGTH, LENGTH)},
            "bias_batch": lambda: {"bias": zeros(1, HEADS, LENGTH, LENGTH)},
            "bias_keys": lambda: {"bias": zeros(BATCH, 1, 1, LENGTH)},
            "softcap": lambda: {"softcap": 30.0},
            "alibi": lambda: {"alibi_slopes": slopes},
            "sink": lambda: {"sink": zeros(HEADS, dtype=torch.float32)},
            "dropout": lambda: {"dropout_p": 0.1, "seed": 7},
            "distance": lambda: {"score": Distance(8.0)},
            "additive": lambda: {"score": Additive(zeros(HEADS, self.d))},
            "sigmoid": lambda: {"normalizer": "sigmoid", "return_lse": False},
            "ragged": lambda: {"ragged": ragged},
            "ragged_causal": lambda: {"ragged": ragged, "causal": True},
            "ragged_additive": lambda: {"ragged": ragged, "score": Additive(zeros(HEADS, self.d))},
            "ragged_bias": lambda: {"ragged": ragged, "bias": zeros(1, HEADS, LENGTH, LENGTH), "alibi_slopes": slopes},
        }
        if self.feature.startswith("ragged"):
            q, k, v = (x[:1] for x in (q, k, v))
        # The one-pass backward needs deterministic=False, except for the feature "ordered".
        deterministic = self.direction != "hopper_backward" or self.feature == "ordered"
        given = {"return_lse": True, "deterministic": deterministic} | options[self.feature]()
        packed = given.pop("ragged", None)
        return bind(q, k, v, Options(**given), packed).lower()


SEEN = ("top_k", "mask", "softcap", "causal", "additive", "sigmoid")
RICH = (
    "gqa", "bias_keys", "mask", "softcap", "alibi", "dropout", "sink", "window", "segments", "ids", "blocks",
    "distance", "sigmoid",
)  # fmt: skip
DIMS, ODD = (16, 32, 64, 128, 256, 512), (40, 72, 88)
HOPPER_BACKWARD = ("plain", "causal", "window", "gqa", "sink", "ordered")
HOPPER_DIMS, HOPPER = (64, 128, 256), ("plain", "causal", "window", "gqa", "softcap", "alibi", "sink")


def cases(target: str) -> list[Case]:
    """Cases for a target: every row of its tuning table in half and single precision, and odd head dims.

    "bias_batch" launches every kernel that has a row for modified scores. Statistics kernels have no rows and fewer
    cases. The reference GPU (sm_90) also gets every feature, and float16.
    """
    heads = [("bf16", d, "plain") for d in (*DIMS, *ODD)] + [("fp32", d, "plain") for d in DIMS]
    heads += [("bf16", d, "bias_batch") for d in DIMS]
    heads += [("bf16", 64, "additive")]
    heads += [("bf16", 128, "ragged")]
    if target == "sm_90":
        heads += [("bf16", d, feature) for d in (64, 128, 256) for feature in ("bias", "causal")]
        heads += [("bf16", 64, "ragged"), *(("bf16", d, "ragged_causal") for d in (64, 128))]
        heads += [("bf16", 64, "ragged_additive"), ("bf16", 128, "ragged_bias")]
        heads += [("bf16", 128, feature) for feature in RICH] + [("fp16", 128, "plain")]
        heads += [("bf16", d, "additive") for d in (128, 256)] + [("fp32", 64, "additive")]
    found = [Case(direction, *rest) for rest in heads for direction in ("forward", "backward")]
    found += [Case(*x) for x in decoding.cases(target)]
    found += [Case("statistics", "bf16", d) for d in DIMS[1:]] + [Case("statistics", "bf16", 128, "top_k")]
    if target == "sm_90":
        found += [Case("statistics", "bf16", 64, feature) for feature in SEEN]
        found += [Case("statistics", "bf16", 64, "ragged")]
        found += [Case("statistics", "bf16", 72), Case("statistics", "fp32", 64), Case("statistics", "fp16", 128)]
        found += [Case("hopper_forward", "bf16", d, feature) for d in HOPPER_DIMS for feature in HOPPER]
        found += [Case("hopper_forward", "bf16", d, "bias") for d in HOPPER_DIMS[:-1]]
        found += [Case("hopper_backward", "bf16", d, feature) for d in HOPPER_DIMS for feature in HOPPER_BACKWARD]
        found += [Case(f"hopper_{x}", *rest) for x in ("forward", "backward") for rest in (("fp16", 128), ("bf16", 96))]
    return found

"""Constants, elementary functions, and the one matrix product."""

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """a @ b in float32, plus acc unless it is None. PRECISION applies to float32 operands only."""
    if acc is None:
        return tl.dot(a, b, input_precision=PRECISION)
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def pair(high, low):
    """Pack two float32 into one int64, to read both with one load."""
    bits = low.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    return (high.to(tl.int32, bitcast=True).to(tl.int64) << 32) | bits


@triton.jit
def unpair(x):
    """The inverse of pair."""
    return (x >> 32).to(tl.int32).to(tl.float32, bitcast=True), x.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def tanh(x):
    """1 - 2 / (1 + exp(2x)), and near zero, where that cancels, the odd series to x**9."""
    y = x * x
    series = x * (1.0 + y * (-0.33333334 + y * (0.13333334 + y * (-0.05396825 + y * 0.021869488))))
    return tl.where(tl.abs(x) < 0.25, series, 1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * LOG2E))))


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)). The exponential may overflow to inf, which gives 0."""
    return 1.0 / (1.0 + tl.exp2(x * -LOG2E))


@triton.jit
def reciprocal(x, FAST: tl.constexpr):
    """1 / x. FAST: NVIDIA's approximate instruction, with a relative error of about 2**-23."""
    if FAST:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x

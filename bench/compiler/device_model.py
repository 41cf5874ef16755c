"""Resources of a multiprocessor, and a model of the clocks that one loop iteration takes.

For one iteration of one program, the model counts the clocks in which the tensor cores, the special function unit and
the issue slots of a multiprocessor are busy. An iteration costs at least the largest of the three, plus the
exponentials that wait for a product, unless another resident program overlaps them. Memory is not modelled: use it to
compare tiles of one kernel, not to predict times.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from bench.compiler.machine_code import Loop

KIB = 1024


@dataclass(frozen=True)
class Device:
    """One multiprocessor (NVIDIA) or compute unit (AMD); fma_per_clock is for half precision with float32 sums."""

    arch: str
    shared_per_program: int
    shared: int
    reserved: int
    warps: int
    programs: int
    fma_per_clock: int
    mufu_per_clock: int = 16

    @property
    def amd(self) -> bool:
        return self.arch.startswith("gfx")

    @property
    def lanes(self) -> int:
        return 64 if self.amd else 32

    def occupancy(self, registers: int, shared: int, warps: int, tensor_columns: int = 0) -> int:
        """Programs resident on one multiprocessor."""
        if shared > self.shared_per_program:
            return 0
        # Registers are allocated to warps in blocks, from one of four partitions.
        block = 8 if self.amd else 256
        per_warp = -(-registers * (1 if self.amd else 32) // block) * block
        by_registers = (512 if self.amd else 16384) // max(per_warp, 1) * 4 // warps
        by_shared = self.shared // (shared + self.reserved) if shared + self.reserved else self.programs
        # Tensor memory (sm_100) has 512 columns, allocated in powers of two from 32.
        columns = max(32, 1 << (tensor_columns - 1).bit_length()) if tensor_columns else 0
        by_columns = 512 // columns if columns else self.programs
        return min(by_registers, by_shared, by_columns, self.warps // warps, self.programs)


DEVICES = {
    x.arch: x
    for x in (
        Device("sm_80", 163 * KIB, 164 * KIB, KIB, 64, 32, 1024),
        Device("sm_89", 99 * KIB, 100 * KIB, KIB, 48, 24, 512),
        Device("sm_90", 227 * KIB, 228 * KIB, KIB, 64, 32, 2048),
        Device("sm_100", 227 * KIB, 228 * KIB, KIB, 64, 32, 4096),
        Device("sm_120", 99 * KIB, 100 * KIB, KIB, 48, 24, 512),
        Device("gfx942", 64 * KIB, 64 * KIB, 0, 32, 32, 1024),
    )
}


@dataclass(frozen=True)
class Clocks:
    """Busy clocks of a multiprocessor in one loop iteration of one program."""

    tensor: float
    mufu: float
    issue: float

    def trip(self, hidden: float, programs: int) -> float:
        """Clocks per iteration and program, if a share `hidden` of the softmax overlaps the program's own products."""
        exposed = 0.0 if programs > 1 else (1 - hidden) * max(self.mufu, self.issue)
        return max(self.tensor + exposed, self.mufu, self.issue)


def product_fma(op: str) -> int:
    """Multiply-adds per warp of one matrix instruction; a wgmma is shared by four warps."""
    if match := re.match(r"[HQ]GMMA\.(\d+)x(\d+)x(\d+)", op):
        return int(match[1]) * int(match[2]) * int(match[3]) // 4
    if match := re.match(r"HMMA\.(16)(8)(\d+)\b", op):
        return 16 * 8 * int(match[3])
    if match := re.match(r"v_mfma_f32_(\d+)x(\d+)x(\d+)", op):
        return int(match[1]) * int(match[2]) * int(match[3])
    return 0


def clocks(loop: Loop, device: Device, warps: int, fma: float | None = None) -> Clocks:
    """fma overrides the number of multiply-adds per iteration, where instructions do not show their shape."""
    if fma is None:
        fma = warps * sum(product_fma(x.op) for x in loop.body)
    mufu = sum(x.op.startswith("MUFU") or x.op.startswith(("v_exp", "v_log", "v_rcp")) for x in loop.body)
    # Four schedulers issue one instruction a clock each.
    return Clocks(
        fma / device.fma_per_clock, warps * mufu * device.lanes / device.mufu_per_clock, warps * len(loop.body) / 4
    )

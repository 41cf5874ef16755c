"""The one-pass Gluon backward in the emulator; see test_hopper.py, whose small machine and rules it shares."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace

import pytest
import torch

pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper")

from fused_attn import testing
from fused_attn.api.bind import bind
from fused_attn.backends.triton import hopper
from fused_attn.spec.options import Options
from fused_attn.testing import CASES, Case
from fused_attn.tuning import Config, override
from fused_attn.tuning.select import table
from tests import KERNELS
from tests.emulator import Fault, emulated
from tests.emulator.mutations import Mutation, mutations
from tests.kernels.test_hopper import ACCEPTED, FORWARD, HALF, pretend


@dataclass(frozen=True)
class Form:
    """wide: by the kernel for head dims of which a consumer holds either dk or dv."""

    config: Config
    wide: bool

    def __str__(self) -> str:
        c = self.config
        words = {"wide": self.wide, "overlap": c.overlap, "ordered": c.ordered}
        return "-".join([f"{c.BLOCK_M}x{c.BLOCK_N}x{c.num_stages}", *(word for word, so in words.items() if so)])


NARROW = tuple(
    Form(Config(m, 16, 4, stages, overlap, consumers=2, ordered=ordered), False)
    for m, stages, overlap in ((16, 2, True), (32, 2, False), (16, 3, True), (32, 1, False))
    for ordered in (False, True)
)
WIDE = tuple(
    Form(Config(m, 16, 4, stages, consumers=2, ordered=ordered), True)
    for m, stages in ((16, 2), (32, 3))
    for ordered in (True, False)
)
FORMS = (*NARROW, *WIDE)
# Larger tiles, for the cases.
ROOMY = tuple(
    Form(Config(m, 32, 4, 2, consumers=2, ordered=ordered), wide)
    for m, wide in ((32, False), (64, False), (32, True))
    for ordered in (False, True)
)


@pytest.fixture(autouse=True)
def host(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)


def _served() -> list[tuple[str, torch.dtype]]:
    """Every case whose gradients are the kernel's, if they need not be deterministic; in one dtype each."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        pretend(patch)
        for n, (name, dtype) in enumerate(ACCEPTED):
            inputs = testing.make_inputs(name, dtype)
            problem = replace(inputs.problem().lower(), deterministic=False)
            given = inputs.case.score is None  # the gradients of what a score is lowered to are not the caller's
            if given and inputs.leaves and hopper._one_pass(problem, frozenset(inputs.leaves)):
                found[name] = dtype if n % 2 else found.get(name, dtype)
    return list(found.items())


SERVED = _served()
Prepared = tuple[testing.Inputs, testing.Expected, torch.Tensor, tuple[torch.Tensor, torch.Tensor]]


@functools.lru_cache(32)
def _prepared(case: Case, dtype: torch.dtype) -> Prepared:
    """Inputs, what to expect of them, and what a forward has left."""
    inputs = testing.make_inputs(case, dtype)
    expected = testing.expect(inputs)
    with torch.no_grad(), emulated(), override(hopper_forward=FORWARD[1]):
        out, _, *normaliser = hopper.forward(inputs.problem().lower())
    return inputs, expected, out, tuple(normaliser)


def gradients(
    case: Case, dtype: torch.dtype, form: Form, seed: int, codes: Mapping | None = None
) -> dict[str, torch.Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hopper, "WIDE", 16 if form.wide else 1024)
        return _gradients(
            case, dtype, form.config, seed, codes, "hopper_backward_wide" if form.wide else "hopper_backward"
        )


def _gradients(
    case: Case, dtype: torch.dtype, config: Config, seed: int, codes: Mapping | None, file: str
) -> dict[str, torch.Tensor]:
    """file: the one whose kernel computes them."""
    inputs, _, out, normaliser = _prepared(case, dtype)
    problem = replace(inputs.problem().lower(), deterministic=config.ordered)
    dout = torch.zeros_like(out) if inputs.dout is None else inputs.dout
    running = emulated(seed, ordered=config.ordered, codes=codes, deadline=200_000)
    with torch.no_grad(), override(hopper_backward=config), running as emulation:
        found = hopper.backward(problem, out, *normaliser, dout, inputs.dlse, frozenset(inputs.leaves))
    inputs.check_untouched()
    files = [machine.kernel.partition(".")[0] for machine in emulation.machines]
    assert files == ["hopper_backward", file, "hopper_backward"]
    return found


def compared(case: Case, dtype: torch.dtype, form: Form, seed: int, codes: Mapping | None = None) -> None:
    """A case's gradients, held to their budget."""
    found = gradients(case, dtype, form, seed, codes)
    inputs, expected, *_ = _prepared(case, dtype)
    testing.compare(inputs, found, expected, case.name)


@pytest.mark.parametrize(("name", "dtype"), SERVED, ids=lambda x: str(x).removeprefix("torch."))
def test_gradients(name: str, dtype: torch.dtype) -> None:
    seed = list(CASES).index(name)
    compared(CASES[name], dtype, ROOMY[seed % len(ROOMY)], seed)


def test_many_cases_are_supported() -> None:
    """A kernel that serves nothing would pass everything."""
    assert len(SERVED) > 50


@pytest.mark.parametrize("form", ROOMY, ids=str)
def test_padded_keys_give_no_nan(form: Form, monkeypatch: pytest.MonkeyPatch) -> None:
    """They read as zeros, beside which a row of scores near -256 has a weight of inf: inf * 0 must not reach dq."""
    monkeypatch.setattr(hopper, "WIDE", 16 if form.wide else 1024)
    q, k = torch.full((1, 1, 40, 16), -8.0), torch.full((1, 1, 41, 16), 8.0)
    generator = torch.Generator().manual_seed(0)
    v, dout = torch.randn(1, 1, 41, 16, generator=generator), torch.randn(1, 1, 40, 16, generator=generator)
    q, k, v, dout = (x.bfloat16() for x in (q, k, v, dout))
    problem = replace(bind(q, k, v, Options()), deterministic=form.config.ordered)
    with torch.no_grad(), override(hopper_forward=FORWARD[0], hopper_backward=form.config), emulated():
        out, lse, *normaliser = hopper.forward(problem)
        found = hopper.backward(problem, out, *normaliser, dout, None, frozenset("qkv"))
    assert lse.max() < -200
    assert all(x.isfinite().all() for x in found.values())


@pytest.mark.parametrize("key", [key for key in table("sm_90") if key.startswith("hopper_backward/")])
@pytest.mark.parametrize("ordered", (False, True))
def test_shipped_configuration(key: str, ordered: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it stands in the table: it fits the shared memory, and its tiles, tails and padding come out right."""
    monkeypatch.undo()
    monkeypatch.setattr(hopper, "_machine", lambda device: [])
    monkeypatch.setattr(hopper, "_multiprocessors", lambda device: 2)
    row, d = table("sm_90")[key], int(key.split("/")[2])
    m, n = 2 * row["BLOCK_M"] + 17, 2 * row["BLOCK_N"] + 12
    case = Case("shipped", hq=2, hkv=1, m=m, n=n, d=d - 8, alignment="top_left", window=(70, 60))
    config = replace(Config.from_row(row), ordered=ordered)
    found = _gradients(case, torch.bfloat16, config, 0, None, "hopper_backward_wide" if d == 256 else "hopper_backward")
    inputs, expected, *_ = _prepared(case, torch.bfloat16)
    testing.compare(inputs, found, expected, key)


# --------------------------------------------------------------------------------------------------------- the protocol

CONTENDED = (
    Case("contended", hq=2, hkv=1, m=40, n=70, d=16, return_lse=True),
    Case("contended_causal", b=2, hq=2, hkv=1, m=70, d=16, causal=True),
    Case("contended_window", hq=2, m=70, n=90, d=16, window=(20, 5), alignment="bottom_right"),
)


def prove(seed: int, codes: Mapping | None = None, forms: tuple[Form, ...] = FORMS) -> None:
    """One problem in one form and under one schedule, all of the seed's choosing."""
    form = forms[seed % len(forms)]
    compared(CONTENDED[(seed + seed // len(forms)) % len(CONTENDED)], HALF[seed % 2], form, seed, codes)


@pytest.mark.parametrize("seed", range(36))
def test_protocol(seed: int) -> None:
    prove(seed)


@pytest.mark.parametrize("form", [form for form in FORMS if form.config.ordered], ids=str)
def test_same_bits(form: Form) -> None:
    """Whoever runs first, the ordered sums have the same bits."""
    first, *others = (gradients(CONTENDED[1], torch.bfloat16, form, seed) for seed in range(5))
    assert all(torch.equal(first[name], other[name]) for other in others for name in first)


def test_unordered_bits() -> None:
    """The others have not, which shows that whoever could run first does."""
    case = Case("unordered", hq=1, m=64, n=224, d=64)
    first, *others = (gradients(case, torch.float16, NARROW[0], seed) for seed in range(8))
    assert all(torch.equal(first[name], other[name]) for other in others for name in "kv")
    assert not all(torch.equal(first["q"], other["q"]) for other in others)


PROOFS = {"hopper_backward.py": FORMS, "hopper_backward_wide.py": WIDE}
MUTATIONS = [mutation for name in PROOFS for mutation in mutations(KERNELS / name)]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_mutation(mutation: Mutation) -> None:
    """Leaving it out, or flipping its phase, makes the proof fail under one of the seeds."""
    codes = mutation.codes()
    for seed in range(36):
        try:
            prove(seed, codes, PROOFS[mutation.file.name])
        except (Fault, AssertionError):
            return
    pytest.fail("nothing notices")

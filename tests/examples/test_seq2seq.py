"""examples/seq2seq.py: its data, its model with every score, and a smaller training run."""

from __future__ import annotations

import datetime
import random
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import fused_attn
from tests.examples.test_examples import drawn, loaded, refused, verdict


@pytest.fixture(scope="module")
def seq2seq() -> ModuleType:
    return loaded("seq2seq")


# ---------------------------------------------------------------------------------------------------------- the pairs

NUMBERS = {
    1: ("一", "one"),
    10: ("十", "ten"),
    15: ("十五", "fifteen"),
    20: ("二十", "twenty"),
    110: ("一百一十", "one hundred ten"),
    115: ("一百一十五", "one hundred fifteen"),
    305: ("三百零五", "three hundred five"),
    1005: ("一千零五", "one thousand five"),
    10_005: ("一万零五", "ten thousand five"),
    10_050: ("一万零五十", "ten thousand fifty"),
    10_500: ("一万零五百", "ten thousand five hundred"),
    15_000: ("一万五千", "fifteen thousand"),
    100_000: ("十万", "one hundred thousand"),
    101_000: ("十万一千", "one hundred one thousand"),
    10_010_005: ("一千零一万零五", "ten million ten thousand five"),
    12_345_678: (
        "一千二百三十四万五千六百七十八",
        "twelve million three hundred forty five thousand six hundred seventy eight",
    ),
}
DATES = {
    (2024, 3, 5): ("二〇二四年三月五日", "march fifth twenty twenty four"),
    (2000, 1, 1): ("二〇〇〇年一月一日", "january first two thousand"),
    (2009, 10, 12): ("二〇〇九年十月十二日", "october twelfth two thousand nine"),
    (2010, 11, 20): ("二〇一〇年十一月二十日", "november twentieth twenty ten"),
    (1900, 12, 31): ("一九〇〇年十二月三十一日", "december thirty first nineteen hundred"),
    (1905, 2, 13): ("一九〇五年二月十三日", "february thirteenth nineteen oh five"),
    (1984, 8, 28): ("一九八四年八月二十八日", "august twenty eighth nineteen eighty four"),
}


@pytest.mark.parametrize("n", NUMBERS)
def test_numbers(seq2seq: ModuleType, n: int) -> None:
    assert (seq2seq.chinese_number(n), " ".join(seq2seq.english_number(n))) == NUMBERS[n]


@pytest.mark.parametrize("date", DATES, ids=str)
def test_dates(seq2seq: ModuleType, date: tuple[int, int, int]) -> None:
    day = datetime.date(*date)
    assert (seq2seq.chinese_date(day), " ".join(seq2seq.english_date(day))) == DATES[date]


def read_chinese(text: str) -> int:
    """The number that Chinese words say, by their grammar alone: digit times unit, all of it times ten thousand."""
    total, section, digit = 0, 0, 0
    for x in text:
        if x in "一二三四五六七八九":
            digit = "〇一二三四五六七八九".index(x)
        elif x == "万":
            total, section, digit = (section + digit) * 10_000, 0, 0
        elif x != "零":
            section, digit = section + (digit or 1) * {"十": 10, "百": 100, "千": 1000}[x], 0
    return total + section + digit


def read_english(words: list[str], ones: list[str], tens: list[str]) -> int:
    total, section = 0, 0
    for x in words:
        if x == "hundred":
            section *= 100
        elif x in ("thousand", "million"):
            total, section = total + section * {"thousand": 1000, "million": 1_000_000}[x], 0
        else:
            section += ones.index(x) if x in ones else 10 * (tens.index(x) + 2)
    return total + section


def test_numbers_read_back(seq2seq: ModuleType) -> None:
    draw = random.Random(0)
    for n in (*range(1, 3000), *(seq2seq.random_number(draw) for _ in range(3000)), 99_999_999):
        assert read_chinese(seq2seq.chinese_number(n)) == n
        assert read_english(seq2seq.english_number(n), seq2seq.ONES, seq2seq.TENS) == n


def test_there_are_enough_pairs(seq2seq: ModuleType) -> None:
    """The dates alone are 73,049, all different in both languages."""
    days = (seq2seq.LAST - seq2seq.FIRST).days + 1
    dates = [seq2seq.FIRST + datetime.timedelta(i) for i in range(days)]
    assert days == len({seq2seq.chinese_date(x) for x in dates}) == len({str(seq2seq.english_date(x)) for x in dates})
    assert days == 73_049


def test_corpus(seq2seq: ModuleType) -> None:
    training, heldout = seq2seq.corpus(40, 10, longest=30, seed=1)
    assert seq2seq.corpus(40, 10, longest=30, seed=1) == (training, heldout) != seq2seq.corpus(40, 10, 30, seed=2)
    for pairs, each in ((training, 40), (heldout, 10)):
        lengths = [len(source) for source, _ in pairs]
        assert {n: lengths.count(n) for n in lengths} == dict.fromkeys(range(5, 31), each)
    sources = [source for source, _ in training + heldout]
    assert len(set(sources)) == len(sources), "no sentence stands in both parts, or twice in one"
    assert max(len(target) for _, target in training + heldout) <= 30
    vocabulary = seq2seq.Vocabulary()
    for source, target in training + heldout:
        for tokens in (list(source), target):
            assert [vocabulary.words[i] for i in vocabulary(tokens)] == tokens


def read_date(text: str) -> datetime.date:
    year, month, day = re.fullmatch("(.*)年(.*)月(.*)日", text).groups()
    digits = "".join(str("〇一二三四五六七八九".index(x)) for x in year)
    return datetime.date(int(digits), read_chinese(month), read_chinese(day))


def test_sentences(seq2seq: ModuleType) -> None:
    """Every kind of them; what comes last in Chinese, the sum, comes first in English."""
    found = seq2seq.corpus(100, 0, longest=30, seed=0)[0]
    assert {(x.count("年"), "元" in x) for x, _ in found} == {(n, money) for n in range(3) for money in (False, True)}
    for source, target in found:
        if not set(source) & set("日元"):
            assert target == seq2seq.english_number(read_chinese(source))
            continue
        day, since, until, verb, number = re.fullmatch(
            "(?:从(?P<since>.+日)到(?P<until>.+日)|(?P<day>.+日))?(?:(?P<verb>[付收欠])(?P<number>.+)元)?", source
        ).group("day", "since", "until", "verb", "number")
        expected = []
        if verb:
            words = {"付": "paid", "收": "received", "欠": "owed"}
            expected = [words[verb], *seq2seq.english_number(read_chinese(number)), "yuan"]
        if day:
            expected += [*(["on"] if verb else []), *seq2seq.english_date(read_date(day))]
        elif since:
            expected += ["from", *seq2seq.english_date(read_date(since)), "to", *seq2seq.english_date(read_date(until))]
        assert target == expected


# ---------------------------------------------------------------------------------------------------------- the model


@pytest.fixture
def pairs(seq2seq: ModuleType) -> list[Any]:
    return seq2seq.corpus(8, 0, longest=14, seed=0)[0]


def built(seq2seq: ModuleType, score: str | None) -> Any:
    torch.manual_seed(0)
    return seq2seq.Translator(seq2seq.Vocabulary(), score, 32)


def tensors(seq2seq: ModuleType, model: Any, pairs: list[Any]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    return [model.vocabulary(x) for x, _ in pairs], [model.vocabulary(x) for _, x in pairs]


SCORES = ("additive", "bilinear", "cosine", "distance", "dot")


@pytest.mark.parametrize("score", [*SCORES, None])
def test_a_few_steps(seq2seq: ModuleType, pairs: list[Any], score: str | None) -> None:
    """Every parameter that the model uses moves, and the loss falls."""
    model = built(seq2seq, score)
    sources, targets = tensors(seq2seq, model, pairs)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model.loss(sources, targets)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    assert all(x.grad is not None and x.grad.abs().sum() > 0 for x in model.parameters() if x.numel())


@torch.inference_mode()
@pytest.mark.parametrize("score", SCORES)
def test_alignment(seq2seq: ModuleType, pairs: list[Any], score: str) -> None:
    """The weights are those by the score's definition, and their averages are the context."""
    model = built(seq2seq, score)
    source = pairs[-1][0]
    weights, words = model.alignment(source)
    assert weights.shape == (len(words), len(source)) and words[-1] == "<end>"
    memory = model.encode([model.vocabulary(source)])
    given = model.vocabulary(["<begin>", *words[:-1]])[None]
    states, _ = model.decoder(model.embedding(given), model.first(memory.last)[None])
    q, k = model.query(states)[0], model.key(memory.states)[0]
    x = model.parameter
    scores = {
        "additive": lambda: torch.tanh(q[:, None] + k) @ x,
        "bilinear": lambda: q @ x @ k.T * q.shape[1] ** -0.5,
        "cosine": lambda: x * torch.nn.functional.cosine_similarity(q[:, None], k[None], dim=-1),
        "distance": lambda: -torch.cdist(q, k).square() / (2 * x**2),
        "dot": lambda: q @ k.T * q.shape[1] ** -0.5,
    }[score]()
    torch.testing.assert_close(weights, scores.softmax(-1))
    torch.testing.assert_close(model.context(states, memory)[0], weights @ memory.states[0])


@pytest.mark.parametrize("score", [*SCORES, None])
def test_padding_changes_nothing(seq2seq: ModuleType, pairs: list[Any], score: str | None) -> None:
    """A short sentence among longer ones is translated as it is by itself, and its loss is its own."""
    model = built(seq2seq, score)
    sources, targets = tensors(seq2seq, model, [pairs[0], pairs[-1]])
    assert len(sources[0]) < len(sources[1])
    together = model.translate(sources)
    assert together == [*model.translate(sources[:1]), *model.translate(sources[1:])]
    words = torch.tensor([len(x) + 1 for x in targets])
    alone = torch.stack([model.loss([x], [y]) for x, y in zip(sources, targets, strict=True)])
    torch.testing.assert_close(model.loss(sources, targets), (alone * words).sum() / words.sum())


def test_models_differ_only_in_their_context(seq2seq: ModuleType) -> None:
    attended, last = (built(seq2seq, score) for score in ("dot", None))
    of_attention = sum(x.numel() for x in (*attended.query.parameters(), *attended.key.parameters()))
    sizes = [sum(x.numel() for x in model.parameters()) for model in (attended, last)]
    assert sizes[0] - of_attention == sizes[1]
    memory = last.encode([last.vocabulary("五百二十五"), last.vocabulary("十五日")])
    context = last.context(torch.zeros(2, 3, 32), memory)
    assert torch.equal(context, torch.stack([memory.last] * 3, dim=1))


# ------------------------------------------------------------------------------------------------------- the judgement


def test_exact(seq2seq: ModuleType) -> None:
    """A translation with one word too many, too few or wrong is no translation."""

    class Half:
        vocabulary = seq2seq.Vocabulary()

        def translate(self, sources: list[torch.Tensor]) -> list[list[str]]:
            return [["ten", "yuan"]] * len(sources)

    right, short, long = ["ten", "yuan"], ["ten"], ["ten", "yuan", "yuan"]
    pairs = [("十元", right), ("十元", short), ("十元十", long), ("十元十", ["yuan", "ten"]), ("十", right)]
    assert seq2seq.exact(Half(), pairs) == {1: 1.0, 2: 0.5, 3: 0.0}


GOOD, FALLING = dict.fromkeys(range(5, 31), 0.99), {n: 1 - n / 31 for n in range(5, 31)}


@pytest.mark.parametrize(
    ("curves", "marks"),
    [
        ((GOOD, FALLING), [True, True]),
        ((dict.fromkeys(GOOD, 0.97), FALLING), [False, True]),
        ((GOOD, dict.fromkeys(GOOD, 0.5)), [True, False]),  # it does not fall
        ((FALLING, FALLING), [False, False]),  # it is no worse
        ((dict.fromkeys(GOOD, float("nan")), FALLING), [False, False]),
    ],
)
def test_verdict(seq2seq: ModuleType, curves: tuple[Any, Any], marks: list[bool]) -> None:
    table, kept = seq2seq.verdict(list(curves), 0.98)
    assert kept == all(marks)
    assert [("ok" in x, "BROKEN" in x) for x in table.columns[-1].cells] == [(mark, not mark) for mark in marks]


PICTURES = ["seq2seq_alignment.png", "seq2seq_length.png", "seq2seq_top_k.png"]


@pytest.mark.nightly
def test_training(seq2seq: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A smaller size of what `python examples/seq2seq.py` trains: shorter sentences, fewer of them, a smaller model."""
    small = "--longest 14 --pairs 300 --heldout 20 --size 96 --batch 32 --steps 400 --rate 5e-3 --accuracy 0.8"
    assert seq2seq.main([*small.split(), "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert verdict(said, "attention at every step") == verdict(said, "the encoder's last state") == ["ok"]
    assert "3000 pairs to train on, 200 held out; score: additive" in said
    assert drawn(tmp_path) == PICTURES


@pytest.mark.parametrize("steps", [3, 10])  # of ten steps, a tenth would be one
def test_a_short_training(seq2seq: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture, steps: int) -> None:
    """As few pairs as are allowed, of which the held-out ones may have no sum of a day; its promise is broken."""
    small = f"--longest 14 --pairs 1 --heldout 1 --size 16 --batch 10 --steps {steps}"
    assert seq2seq.main([*small.split(), "--out", str(tmp_path)]) == 1
    assert verdict(capsys.readouterr().out, "attention at every step") == ["BROKEN"]
    assert drawn(tmp_path) == PICTURES


def test_batches_end_with_an_error(seq2seq: ModuleType, pairs: list[Any]) -> None:
    for given, size in ((pairs, len(pairs) + 1), (pairs, 0), ([], 1)):
        with pytest.raises(ValueError, match=f"size: expected 1 to {len(given)}"):
            next(seq2seq.batches(given, seq2seq.Vocabulary(), size, seed=0))
    (sources, targets) = next(seq2seq.batches(pairs, seq2seq.Vocabulary(), len(pairs), seed=0))
    assert len(sources) == len(targets) == len(pairs)


@pytest.mark.parametrize("writable", [True, False])
def test_labels_are_readable(seq2seq: ModuleType, monkeypatch: pytest.MonkeyPatch, writable: bool) -> None:
    """Without a font for Chinese, each character is labelled by its meaning in letters that matplotlib's font has."""
    monkeypatch.setattr(fused_attn.viz, "writable", lambda text: writable)
    found = seq2seq.labels("从二〇到零十百千万年月日付收欠元")
    assert found[:2] == (["从 from", "二 2"] if writable else ["from", "2"])
    assert all(x.isascii() for x in found) != writable
    characters = {x for source, _ in seq2seq.corpus(40, 0, 30, seed=0)[0] for x in source}
    assert characters <= set(seq2seq.MEANINGS)


@pytest.mark.parametrize(
    "options",
    [
        *["--pairs 0", "--pairs x", "--heldout 0", "--steps 2", "--batch 0", "--size 0", "--size 33"],
        *["--longest 13", "--longest 31", "--rate 0", "--rate nan", "--accuracy 1.1", "--seed -1", "--device moon"],
        *["--batch 64 --pairs 2 --longest 14", "--batch 27 --pairs 1"],
    ],
)
def test_refuses(seq2seq: ModuleType, options: str, capsys: pytest.CaptureFixture) -> None:
    refused(seq2seq.parsed, options, capsys)

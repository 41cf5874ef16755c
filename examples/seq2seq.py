"""Translation by recurrent networks with attention, on generated sentence pairs: `python examples/seq2seq.py`.

An encoder reads a Chinese sentence about dates and sums of money, character by character; a decoder writes it in
English, word by word. At each step the decoder's state is scored against all states of the encoder, their weighted sum
is the context vector, and a feed-forward layer maps context and state to the next word. For comparison, the same model
is trained with the encoder's last state as the context of every step. English puts the amount before the date and the
month before the year, and counts in thousands where Chinese counts in ten thousands, so the word order changes.

    二〇二四年三月五日付一万零五元    paid ten thousand five yuan on march fifth twenty twenty four

The exit status is 1 if attention translates a smaller share of the held-out sentences exactly than --accuracy, or if
the model without attention is not worse on long sentences.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import math
import random
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import runner

with runner.imports():
    import devices
    import torch
    from matplotlib.figure import Figure
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.table import Table
    from torch import Tensor, nn
    from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

    import fused_attn

CURVES = "attention at every step", "the encoder's last state"  # the two models, by their context
SHORTEST, LONGEST = 5, 30  # characters of a Chinese sentence
SCORES = ("additive", "bilinear", "cosine", "distance", "dot")

# ------------------------------------------------------------------------------------------------------------ the pairs

DIGITS = "〇一二三四五六七八九"
ONES = [
    "", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen",
    "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
]  # fmt: skip
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
MONTHS = [
    "january", "february", "march", "april", "may", "june", "july", "august", "september", "october", "november",
    "december",
]  # fmt: skip
ORDINALS = {
    "one": "first", "two": "second", "three": "third", "five": "fifth", "eight": "eighth", "nine": "ninth",
    "twelve": "twelfth", "twenty": "twentieth", "thirty": "thirtieth",
}  # fmt: skip
VERBS = {"付": "paid", "收": "received", "欠": "owed"}
MEANINGS = {
    **{x: str(i) for i, x in enumerate(DIGITS)}, "零": "zero", "十": "10", "百": "100", "千": "1000", "万": "10000",
    "年": "year", "月": "month", "日": "day", "元": "yuan", "从": "from", "到": "to", **VERBS,
}  # fmt: skip
Pair = tuple[str, list[str]]  # a Chinese sentence, and the words of the English one
FIRST, LAST = datetime.date(1900, 1, 1), datetime.date(2099, 12, 31)


def chinese_number(n: int) -> str:
    """1 <= n < 10**8 in Chinese: 15 is 十五, 110 一百一十, 10005 一万零五, 10001000 一千万一千."""
    high, low = divmod(n, 10_000)
    text = f"{_thousands(high)}万" if high else ""
    text += "零" if high and 0 < low < 1000 else ""
    text += _thousands(low)
    return text.removeprefix("一") if text.startswith("一十") else text


def _thousands(n: int) -> str:
    """0 <= n < 10**4: one 零 for each run of zeros between digits."""
    text, zero = "", False
    for unit, value in (("千", 1000), ("百", 100), ("十", 10), ("", 1)):
        digit = n // value % 10
        if digit:
            text += ("零" if zero and text else "") + DIGITS[digit] + unit
        zero = not digit
    return text


def english_number(n: int) -> list[str]:
    """1 <= n < 10**9 in English: 10005 is ten thousand five."""
    words = []
    for value, unit in ((1_000_000, "million"), (1000, "thousand"), (100, "hundred")):
        if n >= value:
            words += [*english_number(n // value), unit]
            n %= value
    if n >= 20:
        words.append(TENS[n // 10 - 2])
        n %= 10
    return [*words, ONES[n]] if n else words


def english_year(year: int) -> list[str]:
    """A year as it is read: nineteen eighty four, nineteen oh five, nineteen hundred, two thousand five."""
    century, rest = divmod(year, 100)
    if 2000 <= year < 2010:
        return english_number(year)
    if rest == 0:
        return [*english_number(century), "hundred"]
    return [*english_number(century), *(["oh", ONES[rest]] if rest < 10 else english_number(rest))]


def chinese_date(date: datetime.date) -> str:
    year = "".join(DIGITS[int(x)] for x in str(date.year))
    return f"{year}年{chinese_number(date.month)}月{chinese_number(date.day)}日"


def english_date(date: datetime.date) -> list[str]:
    *tens, last = english_number(date.day)
    return [MONTHS[date.month - 1], *tens, ORDINALS.get(last, f"{last}th"), *english_year(date.year)]


def random_number(draw: random.Random) -> int:
    """1 to 8 digits, each count equally likely; a third of the digits after the first are zero."""
    digits = [draw.randint(1, 9), *(draw.choice((0, 0, 0, *range(1, 10), 5)) for _ in range(draw.randint(0, 7)))]
    return int("".join(map(str, digits)))


def random_date(draw: random.Random) -> datetime.date:
    return FIRST + datetime.timedelta(draw.randrange((LAST - FIRST).days + 1))


def random_pair(draw: random.Random) -> Pair:
    """A number, or a sentence with one or two dates, a sum paid, received or owed, or both."""
    days = draw.choice((0, 0, 1, 2))
    if not days and draw.random() < 0.5:
        number = random_number(draw)
        return chinese_number(number), english_number(number)
    source, target = "", []
    if not days or draw.random() < 0.7:
        number, verb = random_number(draw), draw.choice("付收欠")
        source, target = f"{verb}{chinese_number(number)}元", [VERBS[verb], *english_number(number), "yuan"]
    dates = [random_date(draw) for _ in range(days)]
    if days == 1:
        source = chinese_date(*dates) + source
        target += [*(["on"] if target else []), *english_date(*dates)]
    elif days == 2:
        source = f"从{chinese_date(dates[0])}到{chinese_date(dates[1])}{source}"
        target += ["from", *english_date(dates[0]), "to", *english_date(dates[1])]
    return source, target


def corpus(training: int, heldout: int, longest: int, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Training and held-out pairs: these numbers of each source length from 5 to `longest` characters."""
    draw = random.Random(seed)
    by_length: dict[int, dict[str, list[str]]] = {length: {} for length in range(SHORTEST, longest + 1)}
    missing = len(by_length) * (training + heldout)
    for _ in range(max(10 * missing, 1000)):  # there may be fewer of the shortest
        source, target = random_pair(draw)
        pairs = by_length.get(len(source))
        if pairs is not None and source not in pairs and len(pairs) < training + heldout:
            pairs[source] = target
            missing -= 1
            if not missing:
                break
    parts = [list(pairs.items()) for pairs in by_length.values()]
    return [x for part in parts for x in part[heldout:]], [x for part in parts for x in part[:heldout]]


class Vocabulary:
    """The characters and words of all pairs, numbered; 0 is padding."""

    def __init__(self) -> None:
        words = [*DIGITS, *"零十百千万年月日元从到", *VERBS, *ONES[1:], *TENS, *MONTHS]
        words += [*VERBS.values(), "hundred", "thousand", "million", "oh", "yuan", "on", "from", "to"]
        words += [ORDINALS.get(x, f"{x}th") for x in (*ONES[1:], "twenty", "thirty")]
        self.words = ["", "<begin>", "<end>", *dict.fromkeys(words)]
        self.number = {word: i for i, word in enumerate(self.words)}
        self.begin, self.end = self.number["<begin>"], self.number["<end>"]

    def __call__(self, tokens: Iterable[str]) -> Tensor:
        return torch.tensor([self.number[x] for x in tokens])

    def texts(self, numbers: Tensor) -> list[list[str]]:
        """numbers (B, M) -> the words of each row before its end."""
        sentences = [[self.words[i] for i in row] for row in numbers.tolist()]
        return [row[: row.index("<end>")] if "<end>" in row else row for row in sentences]


@dataclass
class Memory:
    """The encoder's output for a batch: states (B, N, D), their lengths (B,), and the last states (B, D)."""

    states: Tensor
    lengths: Tensor
    last: Tensor


class Translator(nn.Module):
    """A bidirectional GRU as encoder, a GRU as decoder, and attention by one of SCORES; None: no attention."""

    def __init__(self, vocabulary: Vocabulary, score: str | None, size: int) -> None:
        super().__init__()
        words = len(vocabulary.words)
        self.vocabulary, self.kind = vocabulary, score
        self.embedding = nn.Embedding(words, size // 2, padding_idx=0)
        self.encoder = nn.GRU(size // 2, size // 2, batch_first=True, bidirectional=True)
        self.first = nn.Sequential(nn.Linear(size, size), nn.Tanh())
        self.decoder = nn.GRU(size // 2, size, batch_first=True)
        self.output = nn.Sequential(nn.Linear(2 * size, size), nn.Tanh(), nn.Linear(size, words))
        # Luong's bilinear score compares the states themselves; the others compare projections.
        projected = score not in (None, "bilinear")
        self.query, self.key = (nn.Linear(size, size // 2) if projected else nn.Identity() for _ in range(2))
        self.parameter = nn.Parameter({
            "additive": torch.randn(size // 2) / math.sqrt(size / 2),
            "bilinear": torch.randn(size, size) / math.sqrt(size),
            "cosine": torch.tensor(10.0),
            "distance": torch.tensor(1.0),
        }.get(score, torch.zeros(0)))  # fmt: skip

    def score(self) -> object:
        """The score argument of `fused_attn.attention`."""
        return "dot" if self.kind == "dot" else getattr(fused_attn.scores, self.kind.capitalize())(self.parameter)

    def encode(self, sources: list[Tensor]) -> Memory:
        lengths = torch.tensor([len(x) for x in sources])
        embedded = self.embedding(self.padded(sources))
        packed = pack_padded_sequence(embedded, lengths, batch_first=True, enforce_sorted=False)  # lengths on the CPU
        states, last = self.encoder(packed)
        states = pad_packed_sequence(states, batch_first=True)[0]
        return Memory(states, lengths.to(states.device), last.transpose(0, 1).flatten(1))

    def padded(self, sentences: list[Tensor]) -> Tensor:
        """Sentences as one padded tensor (B, M), on the model's device."""
        return pad_sequence(sentences, batch_first=True).to(self.embedding.weight.device)

    def arguments(self, states: Tensor, memory: Memory) -> dict[str, Any]:
        """Arguments of attention: one head, M decoder states as queries, N encoder states as keys."""
        return {
            "q": self.query(states)[:, None], "k": self.key(memory.states)[:, None], "score": self.score(),
            "mask": fused_attn.Mask.lengths(memory.lengths),
        }  # fmt: skip

    def context(self, states: Tensor, memory: Memory) -> Tensor:
        """Context vectors (B, M, D) for decoder states (B, M, D): encoder states averaged by attention."""
        if self.kind is None:
            return memory.last[:, None].expand_as(states)
        return fused_attn.attention(v=memory.states[:, None], **self.arguments(states, memory))[:, 0]

    def decode(self, words: Tensor, hidden: Tensor, memory: Memory) -> tuple[Tensor, Tensor]:
        """(logits (B, M, words) of the word after each of words (B, M), the decoder's last state)."""
        states, hidden = self.decoder(self.embedding(words), hidden)
        return self.output(torch.cat([self.context(states, memory), states], dim=-1)), hidden

    def loss(self, sources: list[Tensor], targets: list[Tensor]) -> Tensor:
        """Mean cross entropy of the targets' words, with teacher forcing."""
        memory = self.encode(sources)
        begin, end = (torch.tensor([x]) for x in (self.vocabulary.begin, self.vocabulary.end))
        inputs = self.padded([torch.cat([begin, x]) for x in targets])
        labels = self.padded([torch.cat([x, end]) for x in targets])
        logits, _ = self.decode(inputs, self.first(memory.last)[None], memory)
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=0)

    @torch.inference_mode()
    def translate(self, sources: list[Tensor]) -> list[list[str]]:
        """Greedy decoding, until the end or LONGEST words."""
        memory = self.encode(sources)
        hidden = self.first(memory.last)[None]
        words = torch.full((len(sources), 1), self.vocabulary.begin, device=hidden.device)
        for _ in range(LONGEST + 1):
            logits, hidden = self.decode(words[:, -1:], hidden, memory)
            words = torch.cat([words, logits.argmax(-1)], dim=1)
        return self.vocabulary.texts(words[:, 1:])

    @torch.inference_mode()
    def alignment(self, source: str) -> tuple[Tensor, list[str]]:
        """(weights (M, N) of the characters for each word, the M words of the translation including its end)."""
        memory = self.encode([self.vocabulary(source)])
        words = [*self.translate([self.vocabulary(source)])[0], "<end>"]
        inputs = self.padded([self.vocabulary(["<begin>", *words[:-1]])])
        states, _ = self.decoder(self.embedding(inputs), self.first(memory.last)[None])
        return fused_attn.attention_map(**self.arguments(states, memory))[0, 0], words


# --------------------------------------------------------------------------------------------- training and evaluation


def batches(pairs: list[Pair], vocabulary: Vocabulary, size: int, seed: int) -> Iterator[tuple[list[Tensor], ...]]:
    """Endless (sources, targets) of sentences of similar length, which need little padding."""
    if not 0 < size <= len(pairs):
        raise ValueError(f"size: expected 1 to {len(pairs)}, the number of pairs, got {size}")
    draw = random.Random(seed)
    numbers = [(vocabulary(source), vocabulary(target)) for source, target in pairs]
    while True:
        order = sorted(numbers, key=lambda pair: len(pair[0]) + 3 * draw.random())
        starts = list(range(0, len(order) - size + 1, size))
        draw.shuffle(starts)
        for start in starts:
            sources, targets = zip(*order[start : start + size], strict=True)
            yield list(sources), list(targets)


def train(model: Translator, pairs: list[Pair], options: argparse.Namespace, advance: Callable[[float], None]) -> None:
    optimizer = torch.optim.Adam(model.parameters())
    warmup = max(0.1, 2 / options.steps)  # OneCycleLR divides by the number of warmup steps minus one
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.rate, options.steps, pct_start=warmup)
    size = min(options.batch, len(pairs))  # `corpus` may return fewer pairs than requested
    endless = batches(pairs, model.vocabulary, size, options.seed)
    for sources, targets in itertools.islice(endless, options.steps):
        loss = model.loss(sources, targets)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        advance(loss.item())


def exact(model: Translator, pairs: list[Pair]) -> dict[int, float]:
    """The share of exactly translated sentences, by length in characters."""
    right: dict[int, list[bool]] = {}
    for start in range(0, len(pairs), 256):
        sources, targets = zip(*pairs[start : start + 256], strict=True)
        written = model.translate([model.vocabulary(x) for x in sources])
        for source, target, words in zip(sources, targets, written, strict=True):
            right.setdefault(len(source), []).append(words == target)
    return {length: statistics.fmean(x) for length, x in sorted(right.items())}


def draw_curves(curves: list[dict[int, float]], path: Path) -> None:
    """Draw accuracy against length, one curve per model."""
    axes = Figure(figsize=(7, 4), layout="constrained").add_subplot()
    for name, curve, marker in zip(CURVES, curves, "os", strict=True):
        axes.plot(list(curve), [100 * x for x in curve.values()], marker=marker, ms=4, label=name)
    axes.set(xlabel="characters of the Chinese sentence", ylabel="translated exactly, %", ylim=(-3, 103))
    axes.set_title("Dates and sums from Chinese to English, held-out sentences")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left")
    with runner.complete(path) as part:
        axes.figure.savefig(part, dpi=120)


def thirds(curve: dict[int, float]) -> tuple[float, float]:
    """Mean accuracy on the shortest third of the lengths, and on the longest third."""
    values = list(curve.values())
    third = max(1, len(values) // 3)
    return statistics.fmean(values[:third]), statistics.fmean(values[-third:])


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = runner.parser(__doc__)
    parser.add_argument("--score", choices=SCORES, default="additive", help="attention score (default %(default)s)")
    runner.add_numbers(
        parser,
        ("accuracy", runner.Within(float, 0, 1), 0.98, "share of sentences that attention must translate"),
        (
            "longest",
            runner.Within(int, 14, LONGEST),
            LONGEST,
            "characters of the longest sentence",
        ),  # 14: sums of a day
        ("pairs", runner.Within(int, 1, 100_000), 1000, "training pairs of each length"),
        ("heldout", runner.Within(int, 1, 100_000), 40, "held-out pairs of each length"),
        ("steps", runner.Within(int, 3), 1000, "training steps"),
        ("batch", runner.Within(int, 1), 64, "pairs per step"),
        ("size", runner.Within(int, 2), 128, "size of a state, an even number"),
        ("rate", runner.Within(float, 1e-6, 1), 4e-3, "peak learning rate"),
        ("seed", runner.SEED, 0, "seed of the weights and the sentences"),
    )
    devices.add_option(parser)
    options = parser.parse_args(arguments)
    if options.size % 2:
        parser.error(f"--size must be even, not {options.size}")
    most = options.pairs * (options.longest - SHORTEST + 1)
    if options.batch > most:
        parser.error(f"--batch must be at most {most}, the number of pairs to train on, not {options.batch}")
    return options


def trained(
    score: str | None, training: list[Pair], options: argparse.Namespace, progress: Progress, task: TaskID
) -> Translator:
    torch.manual_seed(options.seed)
    model = Translator(Vocabulary(), score, options.size)
    model.to(options.device)
    train(model, training, options, lambda loss: progress.update(task, advance=1, loss=loss))
    return model


def labels(source: str) -> list[str]:
    """Each character of a sentence with its meaning, or only the meaning if no font has the character."""
    drawn = fused_attn.viz.writable(source)
    return [f"{x} {MEANINGS[x]}" if drawn else MEANINGS[x] for x in source]


def show(model: Translator, source: str, console: Console, out: Path) -> None:
    """Show the alignment of a translation as pictures and as a list."""
    weights, words = model.alignment(source)
    characters, title = labels(source), f"A held-out Chinese sentence, {model.kind} attention"
    with runner.complete(out / "seq2seq_alignment.png") as part:
        fused_attn.viz.heatmap(weights, words, characters, title=title, path=part)
    with runner.complete(out / "seq2seq_top_k.png") as part:
        fused_attn.viz.top_k(weights, words, characters, 2, title=title, path=part)
    console.print(f"\n{source}  {' '.join(words[:-1])}", highlight=False)
    heaviest = fused_attn.viz.top_k(weights, words, list(source), 1)
    origins = (f"{word} {character} {weight:.2f}" for word, [(character, weight)] in zip(words, heaviest, strict=True))
    console.print(f"Each word, the character that weighed most, its weight: {', '.join(origins)}", highlight=False)


def verdict(curves: list[dict[int, float]], accuracy: float) -> tuple[Table, bool]:
    """The table of both models' accuracy, and whether all promises hold."""
    table = Table(title="\nHeld-out sentences translated exactly")
    for heading in ("context", "all", "shortest third", "longest third", "expected", ""):
        table.add_column(heading, justify="left" if heading == "context" else "right")
    means = [(statistics.fmean(curve.values()), *thirds(curve)) for curve in curves]
    (attended, _, far), (_, near, lost) = means
    promises = (
        (f"all >= {accuracy:.0%}", attended >= accuracy),
        ("falls with length, below the other", lost < near and lost < far),
    )
    for name, values, (promise, kept) in zip(CURVES, means, promises, strict=True):
        shares = (f"{x:.1%}" for x in values)
        table.add_row(name, *shares, promise, "[green]ok[/]" if kept else "[red]BROKEN[/]")
    return table, all(kept for _, kept in promises)


def main(arguments: list[str] | None = None) -> int:
    options, console = parsed(arguments), Console(width=max(120, Console().width))
    runner.prepare(options.out)
    training, heldout = corpus(options.pairs, options.heldout, options.longest, options.seed)
    console.print(f"{len(training)} pairs to train on, {len(heldout)} held out; score: {options.score}")
    columns = TextColumn("{task.description:26}"), BarColumn(), TextColumn("{task.completed}/{task.total} steps")
    times = TextColumn("loss {task.fields[loss]:.4f}"), TimeElapsedColumn(), TimeRemainingColumn()
    with runner.counted(Progress(*columns, *times, console=console)) as progress:
        tasks = [progress.add_task(name, start=False, total=options.steps, loss=math.nan) for name in CURVES]
        models = []
        for score, task in zip((options.score, None), tasks, strict=True):
            progress.start_task(task)
            models.append(trained(score, training, options, progress, task))
    curves = [exact(model, heldout) for model in models]
    draw_curves(curves, options.out / "seq2seq_length.png")
    sums_of_a_day = [x for x, _ in heldout if x.count("年") == 1 and x.endswith("元")]
    shown = sums_of_a_day or [x for x, _ in heldout]
    show(models[0], shown[len(shown) // 2], console, options.out)
    table, kept = verdict(curves, options.accuracy)
    console.print(table)
    names = ", ".join(str(options.out / f"seq2seq_{x}.png") for x in ("length", "alignment", "top_k"))
    console.print(f"Pictures: {names}", highlight=False, soft_wrap=True)
    return int(not kept)


if __name__ == "__main__":
    torch.set_num_threads(1)  # the products are too small for several threads
    runner.run(main)

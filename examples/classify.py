"""Fine-tuning a pretrained BERT to classify sentences with fused_attn: `python examples/classify.py`.

MiniLM (six layers of twelve heads, from an installed package; nothing is downloaded) learns to classify the sentences
of law.csv, which were written for this example, by eight areas of law. Every fourth sentence of an area is held out.
The six layers and a linear layer on the mean of a sentence's token states are trained twice, from the same weights on
the same padded batches: with torch's SDPA, and with fused_attn on a backend chosen by name (the Triton kernels on CUDA,
otherwise tiled PyTorch). Both run in float32, and without dropout, whose random numbers differ from torch's.

classify_words.png shows the weights of the words of some held-out sentences. A weight is an integrated gradient
(Sundararajan, Taly and Yan, 2017): the gradient of the predicted area's log odds by a word's embedding, averaged on the
straight path from [MASK]'s embeddings to those of all words, times the difference of the two. The weights of a sentence
add up to the difference of the log odds.

The exit status is 1 if one of these promises is broken: the first 20 losses agree to a relative 1e-5, and the last one
to 1%; at most a tenth of the held-out sentences is misclassified; and masking the heaviest word of a sentence lowers
the log odds of the predicted area more than masking another word does, on average over the sentences shown.
"""

from __future__ import annotations

import argparse
import csv
import re
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import runner

with runner.imports():
    import devices
    import matplotlib.pyplot as plt
    import minilm
    import torch
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap
    from promises import Promise, same_losses, verdicts
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table
    from torch import Tensor, nn
    from torch.nn import functional as F

    import fused_attn.compat.transformers

plt.switch_backend("Agg")

SENTENCES = Path(__file__).with_name("law.csv")
FOURTH = 4  # one of so many sentences is held out
ERRORS_ALLOWED = 0.1
RATE, HEAD_RATE, WARMUP = 5e-5, 5e-3, 6  # learning rates of the pretrained layers and of the new one; warmup steps
POINTS = 32  # of the integral over gradients
Tokens = dict[str, Tensor]


class Sentence(NamedTuple):
    text: str
    area: str


def read(areas: int) -> tuple[list[Sentence], list[Sentence]]:
    """(training, held-out) sentences of the first areas."""
    by_area: dict[str, list[Sentence]] = defaultdict(list)
    with SENTENCES.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            by_area[row["area"]].append(Sentence(**row))
    chosen = list(by_area.values())[:areas]
    train = [x for same in chosen for i, x in enumerate(same) if i % FOURTH != FOURTH - 1]
    return train, [x for same in chosen for x in same[FOURTH - 1 :: FOURTH]]


# --- the model


class Classifier(nn.Module):
    """Sentences -> logits (B, areas): a linear layer on the mean of a sentence's last hidden states."""

    def __init__(self, tokenizer: Callable, encoder: nn.Module, areas: list[str]) -> None:
        super().__init__()
        self.tokenizer, self.encoder, self.areas = tokenizer, encoder, areas
        self.head = nn.Linear(encoder.config.hidden_size, len(areas))

    def tokens(self, texts: list[str]) -> Tokens:
        """Padded tokens, with their attention_mask."""
        return dict(self.tokenizer(texts, padding=True, return_tensors="pt").to(self.encoder.device))

    def forward(self, tokens: Tokens) -> Tensor:
        return self.head(minilm.pooled(self.encoder, tokens))

    def labels(self, sentences: list[Sentence]) -> Tensor:
        return torch.tensor([self.areas.index(x.area) for x in sentences])

    @torch.no_grad()
    def predict(self, sentences: list[Sentence], batch: int = 32) -> Tensor:
        """The likeliest area of each sentence, (len(sentences),) on the CPU."""
        parts = [sentences[i : i + batch] for i in range(0, len(sentences), batch)]
        return torch.cat([self(self.tokens([x.text for x in part])).argmax(1) for part in parts]).cpu()


def log_odds(logits: Tensor, area: Tensor) -> Tensor:
    """logits (B, areas), area (B,) -> (B,): log odds of the area against all others."""
    own, others = logits.gather(1, area[:, None]), logits.scatter(1, area[:, None], -torch.inf)
    return own[:, 0] - others.logsumexp(1)


# --- the training


@dataclass
class Run:
    """One training: a model, its attention, its loss at each step, its time, and its predictions."""

    name: str
    implementation: str
    backend: str | None
    model: Classifier
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    predictions: Tensor | None = None


def start(
    name: str,
    implementation: str,
    backend: str | None,
    areas: list[str],
    seed: int,
    device: torch.device | str = "cpu",
) -> Run:
    """A model before training: MiniLM's weights, and a last layer whose weights depend only on the seed."""
    torch.manual_seed(seed)
    tokenizer, encoder = minilm.load()
    return Run(name, implementation, backend, Classifier(tokenizer, encoder, areas).to(device))


def batches(train: list[Sentence], options: argparse.Namespace) -> list[list[Sentence]]:
    """Each sentence once per epoch, in an order that depends only on the seed."""
    generator = torch.Generator().manual_seed(options.seed)
    orders = [torch.randperm(len(train), generator=generator) for _ in range(options.epochs)]
    return [[train[i] for i in part] for order in orders for part in order.split(options.batch)]


def training(run: Run, steps: list[list[Sentence]]) -> Iterator[None]:
    """Train run's model by one step per iteration, without its embeddings."""
    model = run.model
    groups = [
        {"params": model.encoder.encoder.parameters(), "lr": RATE},
        {"params": model.head.parameters(), "lr": HEAD_RATE},
    ]
    # BERT's epsilon, large enough that the rounding errors in the gradients of key biases, which are 0, move nothing.
    optimizer = torch.optim.AdamW(groups, eps=1e-6)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARMUP, 1 - step / len(steps))
    )
    model.encoder.embeddings.requires_grad_(False)
    for sentences in steps:
        begin = time.perf_counter()
        logits = model(model.tokens([x.text for x in sentences]))
        loss = F.cross_entropy(logits, model.labels(sentences).to(logits.device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        devices.wait(logits.device)
        run.seconds += time.perf_counter() - begin
        run.losses.append(loss.item())
        yield


def trained(
    train: list[Sentence], held_out: list[Sentence], options: argparse.Namespace, console: Console
) -> tuple[Run, Run]:
    """(fused_attn's, torch's), trained one after the other."""
    areas = list(dict.fromkeys(x.area for x in train))
    backend = devices.shown(options.device)
    variants = ("torch SDPA", "sdpa", None), (f"fused_attn, {backend}", fused_attn.compat.transformers.NAME, backend)
    runs = [start(*variant, areas, options.seed, options.device) for variant in variants]
    steps = batches(train, options)
    columns = TextColumn("{task.description:32}"), BarColumn(), TextColumn("{task.completed}/{task.total}")
    with runner.counted(Progress(*columns, TimeElapsedColumn(), console=console)) as progress:
        task = progress.add_task("", total=len(runs) * len(steps))
        for run in runs:
            with minilm.attention_by(run.model.encoder, run.implementation, run.backend):
                for _ in training(run, steps):
                    progress.update(task, advance=1, description=f"{run.name}: loss {run.losses[-1]:.3f}")
                run.predictions = run.model.predict(held_out)
        progress.update(task, description="done")
    return runs[1], runs[0]


# --- weights of the words


@dataclass
class WordWeights:
    """A sentence, its words, their weights, and the log odds lost by masking each word alone."""

    sentence: Sentence
    predicted: str
    words: list[str]
    weights: list[float]
    costs: list[float]

    def heaviest(self) -> int:
        return max(range(len(self.words)), key=self.weights.__getitem__)

    def cost_of_others(self) -> float:
        return statistics.mean(x for i, x in enumerate(self.costs) if i != self.heaviest())


def integrated_gradients(model: Classifier, tokens: Tokens, area: Tensor) -> Tensor:
    """(B, N): the part of each token in the change of area's (B,) log odds on the path from [MASK] to the tokens."""
    ids, mask = tokens["input_ids"], model.tokenizer.mask_token_id
    special = torch.isin(ids, torch.tensor(model.tokenizer.all_special_ids, device=ids.device))
    embedding = model.encoder.get_input_embeddings()
    with torch.no_grad():
        masked, whole = embedding(torch.where(special, ids, mask)), embedding(ids)
    total = torch.zeros_like(whole)
    for i in range(POINTS):
        x = masked.lerp(whole, (i + 0.5) / POINTS).requires_grad_()
        logits = model({"inputs_embeds": x, "attention_mask": tokens["attention_mask"]})
        total += torch.autograd.grad(log_odds(logits, area).sum(), x)[0]
    return ((whole - masked) * total / POINTS).sum(-1)


def token_positions(model: Classifier, text: str) -> list[tuple[str, list[int]]]:
    """The words, separated by white space, and the positions of their tokens."""
    offsets = model.tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    return [
        (word[0], [i for i, (begin, end) in enumerate(offsets) if word.start() <= begin < end <= word.end()])
        for word in re.finditer(r"\S+", text)
    ]


def word_weights(model: Classifier, sentences: list[Sentence]) -> list[WordWeights]:
    """The weights of each sentence's words for its predicted area."""
    tokens = model.tokens([x.text for x in sentences])
    area = model.predict(sentences).to(model.encoder.device)
    results = []
    for sentence, own, weights in zip(sentences, area, integrated_gradients(model, tokens, area), strict=True):
        words = token_positions(model, sentence.text)
        single = model.tokens([sentence.text] * (len(words) + 1))  # the last row stays unmasked
        for row, (_, positions) in enumerate(words):
            single["input_ids"][row, positions] = model.tokenizer.mask_token_id
        with torch.inference_mode():
            odds = log_odds(model(single), own.expand(len(words) + 1))
        sums = [weights[positions].sum().item() for _, positions in words]
        costs = (odds[-1] - odds[:-1]).tolist()
        results.append(WordWeights(sentence, model.areas[own], [word for word, _ in words], sums, costs))
    return results


def to_show(held_out: list[Sentence], predictions: Tensor, areas: list[str], errors: int = 2) -> list[Sentence]:
    """The first held-out sentence of each area, and the first misclassified ones."""
    wrong = [x for x, i in zip(held_out, predictions, strict=True) if x.area != areas[i]]
    first = [next(x for x in held_out if x.area == area) for area in areas]
    return list(dict.fromkeys(first + wrong[:errors]))


def draw(shown: list[WordWeights], path: Path) -> None:
    """Draw one sentence per line; red words speak for the predicted area, blue ones against it."""
    size, margin = 10, 26  # points, characters
    wide, high = 0.602 * size / 72, 0.36  # a character of the font, a line, in inches
    columns = margin + max(len(x.sentence.text) for x in shown) + 2
    figure, axes = plt.subplots(figsize=(columns * wide, (len(shown) + 3) * high), layout="constrained")
    axes.set(xlim=(0, columns), ylim=(len(shown) - 0.4, -0.6), title="Weight of each word for the predicted area")
    axes.axis("off")
    # The middle of the colour map, where black text is readable.
    colours = ListedColormap(plt.get_cmap("RdBu_r")(torch.linspace(0.2, 0.8, 256).numpy()))
    font = {"family": "DejaVu Sans Mono", "size": size, "va": "center"}
    for line, x in enumerate(shown):
        right = x.predicted == x.sentence.area
        label = x.predicted if right else f"{x.predicted}, not {x.sentence.area}"
        axes.text(margin - 2, line, label, ha="right", color="black" if right else "#b03030", **font)
        largest, column = max(map(abs, x.weights)), margin
        for word, weight in zip(x.words, x.weights, strict=True):
            box = {"facecolor": colours(0.5 + 0.5 * weight / largest), "edgecolor": "none", "pad": 1.5}
            axes.text(column, line, word, bbox=box, **font)
            column += len(word) + 1
    scale = ScalarMappable(plt.Normalize(-1, 1), colours)
    label = "weight ÷ the sentence's largest"
    figure.colorbar(scale, ax=axes, orientation="horizontal", shrink=0.3, aspect=40, label=label)
    with runner.complete(path) as part:
        figure.savefig(part, dpi=120)
    plt.close(figure)


# --- results


def error_rate(run: Run, held_out: list[Sentence]) -> float:
    return (run.predictions != run.model.labels(held_out)).double().mean().item()


def promises(ours: Run, theirs: Run, held_out: list[Sentence], shown: list[WordWeights]) -> list[Promise]:
    others = statistics.mean(x.cost_of_others() for x in shown)
    heaviest = statistics.mean(x.costs[x.heaviest()] for x in shown)
    return [
        *same_losses(ours.losses, theirs.losses),
        (f"share of held-out sentences misclassified, {ours.name}", error_rate(ours, held_out), ERRORS_ALLOWED),
        ("log odds lost by masking another word (at most: by masking the heaviest one)", others, heaviest),
    ]


def confusion(run: Run, held_out: list[Sentence]) -> Table:
    areas = run.model.areas
    right = sum(x.area == areas[i] for x, i in zip(held_out, run.predictions, strict=True))
    counts = Counter((x.area, areas[i]) for x, i in zip(held_out, run.predictions, strict=True))
    table = Table(
        title=f"\n{right} of {len(held_out)} held-out sentences classified correctly by {run.name} "
        f"({right / len(held_out):.1%}); rows are the true area",
        box=None,
    )
    for heading in ("", *areas):
        table.add_column(heading, justify="right")
    for true in areas:
        cells = [str(counts[true, x]) if counts[true, x] else "·" for x in areas]
        table.add_row(true, *(f"[bold]{cell}[/]" if x == true else cell for x, cell in zip(areas, cells, strict=True)))
    return table


def figures(runs: tuple[Run, Run], held_out: list[Sentence]) -> Table:
    table = Table(title="\nThe trainings")
    for heading in ("attention", "first loss", "last loss", "held-out accuracy", "seconds of training"):
        table.add_column(heading, justify="right" if table.columns else "left")
    for run in runs:
        accuracy = 1 - error_rate(run, held_out)
        table.add_row(
            run.name, f"{run.losses[0]:.5f}", f"{run.losses[-1]:.5f}", f"{accuracy:.1%}", f"{run.seconds:.1f}"
        )
    return table


def arguments(command: list[str] | None) -> argparse.Namespace:
    parser = runner.parser(__doc__)
    runner.add_numbers(
        parser,
        ("areas", runner.Within(int, 2, 8), 8, "areas of law, the first ones of the file"),
        ("epochs", runner.Within(int, 1, 100), 3, "passes over the training sentences"),
        ("batch", runner.Within(int, 1, 100), 16, "sentences per step"),
        ("seed", runner.SEED, 0, "seed of the last layer's weights and the batches"),
    )
    devices.add_option(parser)
    return parser.parse_args(command)


def note(ours: Run, theirs: Run, train: list[Sentence], batch: int) -> str:
    """`devices.note` for the attention of the first batch."""
    call = minilm.attention_call(ours.model.encoder, ours.model.tokens([x.text for x in train[:batch]]))
    trained = {name: call[name].clone().requires_grad_() for name in "qkv"}
    return devices.note(str(ours.backend), ours.seconds, theirs.seconds, **call | trained)


def main(command: list[str] | None = None) -> int:
    options = arguments(command)
    runner.prepare(options.out)
    train, held_out = read(options.areas)
    console = Console(width=max(120, Console().width))
    ours, theirs = trained(train, held_out, options, console)
    with minilm.attention_by(ours.model.encoder, ours.implementation, ours.backend):
        shown = word_weights(ours.model, to_show(held_out, ours.predictions, ours.model.areas))
    console.print(
        f"{len(train)} training sentences, {len(held_out)} held out. Trained on {options.device}.", highlight=False
    )
    console.print(confusion(ours, held_out))
    console.print(figures((ours, theirs), held_out))
    console.print(note(ours, theirs, train, options.batch), highlight=False, soft_wrap=True)
    console.print("\nThe words with the largest weights in some held-out sentences, by predicted area:\n")
    for x in shown:
        order = sorted(range(len(x.words)), key=x.weights.__getitem__, reverse=True)
        words = ", ".join(x.words[i].strip(".,;:?") for i in order[:3])
        console.print(f"{x.predicted:>12}  {words}", highlight=False)
    console.print()
    table, broken = verdicts(promises(ours, theirs, held_out, shown))
    console.print(table)
    path = options.out / "classify_words.png"
    draw(shown, path)
    console.print(f"Weights of the words: {path}", highlight=False, soft_wrap=True)
    if broken:
        console.print(f"[red]{broken} of the promises are broken.[/]")
    return int(broken > 0)


if __name__ == "__main__":
    runner.run(main)

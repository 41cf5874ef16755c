"""A character-level GPT trained on this repository's text with fused_attn: `python examples/gpt.py`.

A decoder-only Transformer is trained twice, from the same weights on the same batches: with fused_attn's causal
attention on a backend chosen by name (the Triton kernels on CUDA, otherwise tiled PyTorch), and with torch's SDPA. The
two take their steps in turn, in float32. The text is README.md, CONTRIBUTING.md and the sources of the package and its
kernels, read from this checkout; nothing is downloaded. The last tenth of each file is held out. Then the fused_attn
model generates a text twice: with a `PagedKVCache`, which computes each character's keys and values once, and without
a cache.

The exit status is 1 if one of these promises is broken: the first 20 losses agree to a relative 1e-5, and the last one
to 1%; the held-out losses of both models are below the entropy of the character frequencies; and both texts are equal.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads slow down a machine that is in use

import runner

with runner.imports():
    import devices
    import matplotlib.pyplot as plt
    import torch
    from promises import FIRST, FIRST_ALLOWED, LAST_ALLOWED, Promise, apart, same_losses, verdicts
    from rich.console import Console
    from rich.panel import Panel
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table
    from rich.text import Text
    from torch import Tensor, nn
    from torch.nn import functional as F

    import fused_attn

plt.switch_backend("Agg")

PAGE = 16  # characters per page of the cache
SOURCES = ("README.md", "CONTRIBUTING.md", "fused_attn/**/*.py", "kernels/*.py")
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of tensors (B, H, M, D), by the backend of fused_attn named for this device."""
    return fused_attn.attention(q, k, v, causal=True, backend=devices.shown(q.device))


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same by torch's SDPA."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


# --- the text


@dataclass(frozen=True)
class Corpus:
    characters: str  # a token is an index into it
    train: Tensor  # (tokens,)
    held_out: Tensor  # (tokens,)

    def encode(self, text: str) -> Tensor:
        return torch.tensor([self.characters.index(x) for x in text])

    def decode(self, tokens: Tensor) -> str:
        return "".join(self.characters[i] for i in tokens.tolist())

    def entropy(self) -> float:
        """The loss, in nats per character, of predicting by the training text's character frequencies."""
        frequency = self.train.bincount(minlength=len(self.characters)).float() / len(self.train)
        return -torch.special.xlogy(frequency, frequency).sum().item()


def read(root: Path = runner.ROOT) -> Corpus:
    """This checkout's text, with the last tenth of each file held out."""
    texts = [path.read_text(encoding="utf-8") for pattern in SOURCES for path in sorted(root.glob(pattern))]
    characters = "".join(sorted(set("".join(texts))))
    index = {x: i for i, x in enumerate(characters)}
    train, held_out = [], []
    for text in texts:
        cut = len(text) * 9 // 10
        train += [index[x] for x in text[:cut]]
        held_out += [index[x] for x in text[cut:]]
    return Corpus(characters, torch.tensor(train), torch.tensor(held_out))


def windows(tokens: Tensor, starts: Tensor, context: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """(inputs, targets), each (len(starts), context): a character's target is the next character."""
    taken = tokens[starts[:, None] + torch.arange(context + 1)].to(device)
    return taken[:, :-1], taken[:, 1:]


# --- the model


def rotary(positions: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin (M, dim/2) of the rotary embedding's angles m·10000^(-2i/dim), for each m of positions (M,)."""
    half = dim // 2
    frequency = 10000.0 ** (-torch.arange(half, device=positions.device) / half)
    angle = positions[:, None] * frequency
    return angle.cos(), angle.sin()


def rotate(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate each pair (i, i + D/2) of x (B, H, M, D) by its angle, as cos and sin (M, D/2)."""
    cos, sin = angles
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)


class Block(nn.Module):
    """Attention and feed-forward layers, each with a residual connection, on x (B, M, width)."""

    def __init__(self, width: int, heads: int, attend: Attend) -> None:
        super().__init__()
        self.heads, self.attend = heads, attend
        self.norm = nn.LayerNorm(width, bias=False)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width, bias=False),
            nn.Linear(width, 4 * width, bias=False),
            nn.GELU(),
            nn.Linear(4 * width, width, bias=False),
        )

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], attend: Attend | None = None) -> Tensor:
        """angles: `rotary` of the rows' positions. attend: None: the block's own."""
        attend = attend or self.attend
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, H, M, D) each
        x = x + self.out(attend(rotate(q, angles), rotate(k, angles), v).transpose(1, 2).flatten(2))
        return x + self.feed_forward(x)


class GPT(nn.Module):
    """tokens (B, M) -> logits (B, M, characters). Input and output share the embedding."""

    def __init__(self, characters: int, width: int, heads: int, layers: int, attend: Attend) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, width)
        self.blocks = nn.ModuleList(Block(width, heads, attend) for _ in range(layers))
        self.norm = nn.LayerNorm(width, bias=False)
        # Small initial weights keep rounding errors from growing. With a standard deviation of width**-0.5 errors grow
        # tenfold every dozen steps, even between torch's attention and itself in float64, until losses differ by 1%.
        for name, weight in self.named_parameters():
            if weight.dim() == 2:  # residual branches are scaled by the number of layers
                residual = name.endswith(("out.weight", "feed_forward.3.weight"))
                nn.init.normal_(weight, std=0.02 / (math.sqrt(2 * layers) if residual else 1))

    def forward(self, tokens: Tensor, memory: Memory | None = None) -> Tensor:
        """memory: keys and values of the preceding characters; those of tokens are appended. It requires B = 1."""
        x, count = self.embedding(tokens), tokens.shape[1]
        first, attends = (0, [None] * len(self.blocks)) if memory is None else (len(memory), memory.attends(count))
        angles = rotary(torch.arange(first, first + count, device=x.device), x.shape[-1] // self.blocks[0].heads)
        for block, attend in zip(self.blocks, attends, strict=True):
            x = block(x, angles, attend)
        return F.linear(self.norm(x), self.embedding.weight)


class Memory:
    """Keys and values of the characters read so far: one sequence of a paged cache with a layer per block."""

    def __init__(self, model: GPT, context: int) -> None:
        characters, heads = model.embedding.weight, model.blocks[0].heads
        self.cache = fused_attn.PagedKVCache(
            math.ceil(context / PAGE), PAGE, heads, characters.shape[1] // heads, num_layers=len(model.blocks),
            dtype=characters.dtype, device=characters.device,
        )  # fmt: skip
        self.text = self.cache.allocate()

    def __len__(self) -> int:
        return self.cache.length(self.text)

    def attends(self, count: int) -> list[Attend]:
        """For each block, causal attention that appends `count` characters to the cache and attends to all of it."""
        page_table, cache_seqlens = self.cache.extend([self.text], count)

        def attend(k_cache: Tensor, v_cache: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, M, H, D) each
            out = fused_attn.attention_decode(
                q, k_cache, v_cache, page_table=page_table, cache_seqlens=cache_seqlens, k_new=k, v_new=v, causal=True,
                backend=devices.shown(q.device),
            )  # fmt: skip
            return out.transpose(1, 2)

        return [functools.partial(attend, *layer) for layer in zip(self.cache.k, self.cache.v, strict=True)]

    def clear(self) -> None:
        self.cache.truncate(self.text, 0)


def loss_of(model: GPT, inputs: Tensor, targets: Tensor) -> Tensor:
    """The mean cross entropy, in nats per character."""
    return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


@torch.inference_mode()
def held_out_loss(model: GPT, tokens: Tensor, context: int, batch: int) -> float:
    """The mean loss over consecutive windows of tokens."""
    starts = torch.arange(0, len(tokens) - context, context)
    device = model.embedding.weight.device
    losses = [len(x) * loss_of(model, *windows(tokens, x, context, device)).item() for x in starts.split(batch)]
    return sum(losses) / len(starts)


def first_read(length: int, context: int) -> int:
    """The first character that the model reads of a text of this length: 0, until the text is longer than `context`.

    Then the older half of the context is dropped at once. If one character were dropped at a time, the cache would be
    useless: from the second block on, keys and values depend on all characters visible to them, dropped ones included.
    """
    half = max(1, context // 2)
    return max(0, math.ceil((length - context) / half) * half)


@torch.inference_mode()
def generate(
    model: GPT,
    tokens: Tensor,
    length: int,
    context: int,
    temperature: float,
    seed: int,
    cached: bool = True,
    written: Callable[[], object] = lambda: None,
) -> Tensor:
    """Return tokens (M,) with `length` more, each sampled from the model's prediction after those from `first_read` on.

    cached: compute each character once, and again when the older half is dropped; otherwise compute all characters at
    each step. written: called after each character.
    """
    generator = torch.Generator().manual_seed(seed)
    memory, last_first = Memory(model, context) if cached else None, 0
    for _ in range(length):
        first = first_read(len(tokens), context)
        if memory is not None and first > last_first:
            memory.clear()
        last_first = first
        known = 0 if memory is None else len(memory)
        logits = model(tokens[None, first + known :], memory)[0, -1]
        sampled = torch.multinomial((logits / temperature).softmax(-1).cpu(), 1, generator=generator)
        tokens = torch.cat((tokens, sampled.to(tokens.device)))
        written()
    return tokens


# --- the training


@dataclass
class Run:
    """One training: a model, its loss at each step, and its time."""

    name: str
    model: GPT
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    held_out: float = math.nan


def start(name: str, attend: Attend, corpus: Corpus, options: argparse.Namespace) -> Run:
    """A model before training. Its weights depend only on the seed."""
    torch.manual_seed(options.seed)
    return Run(
        name, GPT(len(corpus.characters), options.width, options.heads, options.layers, attend).to(options.device)
    )


def training(run: Run, corpus: Corpus, options: argparse.Namespace) -> Iterator[None]:
    """Train run's model by one step per iteration. The batches depend only on the seed."""
    generator = torch.Generator().manual_seed(options.seed)
    matrices = [x for x in run.model.parameters() if x.dim() == 2]
    vectors = [x for x in run.model.parameters() if x.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=options.rate, betas=(0.9, 0.95))

    def rate(step: int) -> float:
        """Linear warmup over the first twentieth of the steps, then cosine decay to a tenth."""
        warmup = (step + 1) / max(1, options.steps // 20)
        return min(warmup, 0.55 + 0.45 * math.cos(math.pi * step / options.steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    for _ in range(options.steps):
        starts = torch.randint(len(corpus.train) - options.context, (options.batch,), generator=generator)
        begin = time.perf_counter()
        loss = loss_of(run.model, *windows(corpus.train, starts, options.context, options.device))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        devices.wait(options.device)
        run.seconds += time.perf_counter() - begin
        run.losses.append(loss.item())
        yield


def trained(corpus: Corpus, options: argparse.Namespace, console: Console) -> tuple[Run, Run]:
    """(fused_attn's, torch's), from the same weights on the same batches. Alternating steps make times comparable."""
    ways = (f"fused_attn, {devices.shown(options.device)}", fused), ("torch SDPA", sdpa)
    runs = [start(name, attend, corpus, options) for name, attend in ways]
    columns = TextColumn("{task.description:28}"), BarColumn(), TextColumn("{task.completed}/{task.total}")
    with runner.counted(Progress(*columns, TimeElapsedColumn(), console=console)) as progress:
        task = progress.add_task("", total=options.steps)
        for _ in zip(*(training(run, corpus, options) for run in runs), strict=True):
            progress.update(task, advance=1, description=f"loss {runs[0].losses[-1]:.3f} and {runs[1].losses[-1]:.3f}")
        for run in runs:
            progress.update(task, description="the held-out text")
            run.held_out = held_out_loss(run.model, corpus.held_out, options.context, options.batch)
        progress.update(task, description="done")
    return runs[0], runs[1]


# --- results


@dataclass(frozen=True)
class Writing:
    """A text generated twice, and the seconds until each of its characters was written."""

    cached: Tensor  # (tokens,)
    recomputed: Tensor  # (tokens,)
    seconds_cached: list[float]
    seconds_recomputed: list[float]

    def promise(self) -> Promise:
        return "characters that differ without the cache", (self.cached != self.recomputed).sum().item(), 0

    def pays_from(self) -> int:
        """The number of characters from which on the cache was faster; more than their number if it never was."""
        behind = [x >= y for x, y in zip(self.seconds_cached, self.seconds_recomputed, strict=True)]
        return 1 + max((i for i, late in enumerate(behind, 1) if late), default=0)

    def __str__(self) -> str:
        length, cached, recomputed = len(self.seconds_cached), self.seconds_cached[-1], self.seconds_recomputed[-1]
        times = f"Writing {length} characters took {cached:.2f} s with a cache and {recomputed:.2f} s without it"
        if self.pays_from() > length:
            return f"{times}. A cache pays for longer texts: without it, each character costs more than the last."
        return (
            f"{times}, {recomputed / cached:.1f} times as long. The cache paid from {self.pays_from()} characters on."
        )


def write(model: GPT, prompt: Tensor, options: argparse.Namespace) -> Writing:
    texts, seconds = [], []
    for cached in (True, False):
        generate(model, prompt, 1, options.context, 0.7, options.seed, cached)  # leaves one-time costs out of the times
        times, begin = [], time.perf_counter()
        texts.append(
            generate(
                model, prompt, options.length, options.context, 0.7, options.seed, cached,
                written=lambda times=times, begin=begin: times.append(time.perf_counter() - begin),
            )
        )  # fmt: skip
        seconds.append(times)
    return Writing(*texts, *seconds)


def promises(ours: Run, theirs: Run, entropy: float) -> list[Promise]:
    held_out = [
        (f"held-out loss, {run.name} (at most: that of character frequencies alone)", run.held_out, entropy)
        for run in (ours, theirs)
    ]
    return [*same_losses(ours.losses, theirs.losses), *held_out]


def figures(runs: tuple[Run, Run], entropy: float) -> Table:
    table = Table(title=f"\nLosses in nats per character; {entropy:.3f} by character frequencies alone")
    for heading in ("attention", "first loss", "last loss", "mean of last 10", "held-out loss", "seconds of training"):
        table.add_column(heading, justify="right" if table.columns else "left")
    for run in runs:
        late = run.losses[-10:]
        values = run.losses[0], run.losses[-1], sum(late) / len(late), run.held_out
        table.add_row(run.name, *(f"{x:.4f}" for x in values), f"{run.seconds:.1f}")
    return table


def draw(ours: Run, theirs: Run, entropy: float, path: Path) -> None:
    """Draw both loss curves, and their relative difference below."""
    steps = range(1, len(ours.losses) + 1)
    figure, (above, below) = plt.subplots(
        2, 1, figsize=(7.4, 6.2), sharex=True, height_ratios=(3, 2), layout="constrained"
    )
    above.plot(steps, theirs.losses, color="#d1742f", lw=3, alpha=0.6, label=theirs.name)
    above.plot(steps, ours.losses, color="#1f5fa8", lw=1, label=ours.name)
    above.axhline(entropy, color="#999999", ls="--", lw=1, label="character frequencies")
    above.set(ylabel="loss, nats per character", title="A character GPT on this repository's text")
    above.legend()
    below.semilogy(steps, apart(ours.losses, theirs.losses), ".", color="#1f5fa8", ms=4)  # equal losses show no dot
    below.hlines(FIRST_ALLOWED, 1, FIRST, color="#b03030", lw=2)
    below.plot(steps[-1], LAST_ALLOWED, "_", color="#b03030", ms=12, mew=2, label="allowed")
    below.set(xlabel="step", ylabel="relative difference")
    below.legend()
    with runner.complete(path) as part:
        figure.savefig(part, dpi=120)
    plt.close(figure)


def arguments(command: list[str] | None, corpus: Corpus) -> argparse.Namespace:
    parser = runner.parser(__doc__)
    positive = runner.Within(int, 1)
    runner.add_numbers(
        parser,
        ("steps", positive, 500, "training steps"),
        ("batch", positive, 8, "windows per step"),
        ("context", positive, 160, "characters per window; above 128 rows and above 512 keys take several tiles"),
        ("layers", positive, 4, "layers of attention and feed-forward"),
        ("heads", positive, 4, "attention heads of a layer"),
        ("width", positive, 128, "model width, a multiple of twice the heads"),
        ("length", positive, 500, "characters to write at the end"),
        ("seed", runner.SEED, 0, "seed of the weights, the batches and the written text"),
        ("rate", runner.Within(float, 1e-6, 1), 2e-3, "peak learning rate"),
    )
    parser.add_argument("--prompt", default="def ", help="start of the written text (default %(default)r)")
    devices.add_option(parser)
    options = parser.parse_args(command)
    if options.width % (2 * options.heads):
        parser.error(f"--width must be a multiple of twice --heads, {2 * options.heads}, not {options.width}")
    if options.context >= len(corpus.held_out):
        parser.error(f"--context must be less than the held-out text, {len(corpus.held_out)}, not {options.context}")
    unknown = "".join(sorted(set(options.prompt) - set(corpus.characters)))
    if not options.prompt or unknown:
        lacking = f" without {unknown!r}, which the training text does not contain" if unknown else ""
        parser.error(f"--prompt must be at least one character{lacking}, not {options.prompt!r}")
    return options


def main(command: list[str] | None = None) -> int:
    corpus = read()
    options = arguments(command, corpus)
    runner.prepare(options.out)
    console = Console(width=max(120, Console().width))
    ours, theirs = trained(corpus, options, console)
    weights = sum(x.numel() for x in ours.model.parameters())
    entropy = corpus.entropy()
    written = write(ours.model, corpus.encode(options.prompt).to(options.device), options)
    console.print(
        f"{len(corpus.train):,} characters of this repository, {len(corpus.characters)} different ones; "
        f"{len(corpus.held_out):,} held out. {weights:,} weights. Trained on {options.device}.",
        highlight=False,
    )
    console.print(Panel(Text(corpus.decode(written.cached)), title=f"written through {ours.name}"))
    console.print(str(written), highlight=False, soft_wrap=True)
    console.print(figures((ours, theirs), entropy))
    q = torch.ones(
        options.batch, options.heads, options.context, options.width // options.heads,
        device=options.device, requires_grad=True,
    )  # fmt: skip
    forced = devices.shown(options.device)
    line = devices.note(forced, ours.seconds, theirs.seconds, q=q, k=q, v=q, causal=True)
    console.print(line, highlight=False, soft_wrap=True)
    table, broken = verdicts([*promises(ours, theirs, entropy), written.promise()])
    console.print(table)
    draw(ours, theirs, entropy, options.out / "gpt_losses.png")
    console.print(f"Both curves: {options.out / 'gpt_losses.png'}", highlight=False, soft_wrap=True)
    if broken:
        console.print(f"[red]{broken} of the promises are broken.[/]")
    return int(broken > 0)


if __name__ == "__main__":
    runner.run(main)

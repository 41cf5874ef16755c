"""Plots of attention weights labelled by tokens: a heatmap, and the keys with the largest weights of each query.

matplotlib draws, and is imported only when a plot is made. Labels use the families of rcParams["font.family"], then
installed fallback fonts for the characters that those lack. If no installed font has a character, its token is
labelled by index (#0 is the first) and a warning names the character.

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

# Tried in this order for characters that the families of rcParams["font.family"] lack; then every other installed font.
FALLBACKS = (
    "Noto Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans CJK KR", "Noto Sans SC", "Noto Sans JP",
    "Noto Sans KR", "Source Han Sans", "PingFang SC", "Hiragino Sans", "Apple SD Gothic Neo", "Microsoft YaHei",
    "Yu Gothic", "Malgun Gothic", "WenQuanYi Zen Hei", "Arial Unicode MS", "Noto Sans Symbols 2", "Symbola",
    "Segoe UI Symbol", "Apple Symbols",
)  # fmt: skip


def heatmap(
    weights: Any,
    queries: Sequence[str] | None = None,
    keys: Sequence[str] | None = None,
    *,
    title: str = "",
    axes: Axes | None = None,
    path: str | os.PathLike | None = None,
) -> Axes:
    """Draw attention weights (M, N) as a heatmap: rows are queries, columns are keys, brighter is larger.

    Args:
        weights: (M, N), a floating tensor on any device or a numpy array, such as
            `attention_map(q, k, heads=[h])[b, 0]`. NaN is drawn blank.
        queries, keys: M and N tokens, or strings of M and N characters; None numbers them from 0. Invisible tokens,
            such as a newline, are labelled by their `repr`.
        title: of the plot.
        axes: matplotlib axes to draw on; the caller saves their figure. None makes a new figure without pyplot,
            available as `.figure` of the returned axes.
        path: file to save the new figure to; the suffix selects the format. Not with axes.

    Returns the matplotlib axes.
    Raises ValueError or TypeError for invalid sizes and types, ImportError without matplotlib.

    >>> import torch, fused_attn
    >>> weights = torch.tensor([[0.25, 0.75], [1.0, 0.0]])
    >>> fused_attn.viz.heatmap(weights, ["the", "cat"], ["le", "chat"], title="layer 0").get_title()
    'layer 0'
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
    axes.set(xlabel="key", ylabel="query")
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
    """The k keys with the largest weights of each query, in descending order; also drawn if axes or path is given.

    Args:
        weights: (M, N), as in `heatmap`; or, with indices, (M, K) with K >= k and descending rows, as
            `attention_stats(q, k, top_k=K)` returns for one batch and head.
        queries, keys: M and N tokens, as in `heatmap`.
        k: number of keys, 1 <= k <= N. The lower index comes first in a tie.
        indices: None, or integers (M, K): the key of each weight, -1 for none.
        title, axes, path: as in `heatmap`.

    Returns M lists of (key, weight), shorter than k where indices are -1.
    Raises ValueError or TypeError for invalid sizes and types, ImportError when drawing without matplotlib.

    >>> import torch, fused_attn
    >>> q, k = torch.zeros(1, 1, 2, 8), torch.zeros(1, 1, 4, 8)
    >>> stats = fused_attn.attention_stats(q, k, top_k=2)
    >>> weights, indices = stats.top_k_weights[0, 0], stats.top_k_indices[0, 0]
    >>> fused_attn.viz.top_k(weights, "ab", "wxyz", 2, indices=indices)
    [[('w', 0.25), ('x', 0.25)], [('w', 0.25), ('x', 0.25)]]
    """
    weights, indices, rows, columns = _heaviest(weights, indices, queries, keys, as_int("k", k))
    _one_of(axes, path)
    if axes is not None or path is not None:
        axes = axes or _new_axes(2.0 + 1.3 * weights.shape[1], 1.0 + 0.3 * len(rows))
        _draw_table(axes, weights, indices, rows, columns, title)
        _saved(axes, path)
    pairs = zip(weights.tolist(), indices.tolist(), strict=True)
    return [[(columns[j], weight) for weight, j in zip(*row, strict=True) if j >= 0] for row in pairs]


def writable(text: str) -> bool:
    """True if the installed fonts have every character of the text. Needs matplotlib.

    >>> import fused_attn
    >>> fused_attn.viz.writable("the cat")
    True
    """
    return not _fonts({x for x in text if not x.isspace()})[1]


def _draw_table(
    axes: Axes, weights: Tensor, indices: Tensor, queries: Sequence[str], keys: Sequence[str], title: str
) -> None:
    """A heatmap of weights (M, k) with the key written in each cell."""
    families, (rows, columns), title = _written([queries, keys], title)
    m, k = weights.shape
    shown = weights.masked_fill(indices < 0, torch.nan)
    axes.imshow(shown.tolist(), cmap="magma", vmin=0, aspect="auto")
    half = shown.nan_to_num(0.0).max().item() / 2
    for i in range(m):
        for rank in range(k):
            weight, j = weights[i, rank].item(), int(indices[i, rank])
            if j >= 0:
                colour = "black" if weight > half else "white" if weight <= half else "grey"  # NaN
                label = f"{columns[j]}  {weight:.2f}"
                axes.text(rank, i, label, ha="center", va="center", color=colour, **_text(families))
    axes.set_xticks(range(k), [str(rank + 1) for rank in range(k)])
    axes.set_yticks(range(m), rows, **_text(families))
    axes.set(xlabel="rank of key", ylabel="query")
    axes.set_title(title, **_text(families))


# ---------------------------------------------------------------------------------------------------------- arguments


def _floats(weights: Any) -> Tensor:
    """weights as float64 on the CPU."""
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
    result = list(labels)
    if not all(isinstance(x, str) for x in result):
        raise TypeError(f"{name}: expected strings, got {describe(labels)}")
    return result


def _checked(weights: Any, queries: Any, keys: Any) -> tuple[Tensor, list[str], list[str]]:
    """(weights (M, N) as float64 on the CPU, labels of rows, labels of columns)."""
    weights = _floats(weights)
    rows, columns = (_labels(*x) for x in zip(("queries", "keys"), (queries, keys), weights.shape, strict=True))
    if tuple(weights.shape) != (len(rows), len(columns)) or 0 in weights.shape:
        expected = f"{(len(rows), len(columns))}, (queries, keys), none 0"
        raise ValueError(f"weights: expected the shape {expected}; got {tuple(weights.shape)}")
    return weights, rows, columns


def _heaviest(weights: Any, indices: Any, queries: Any, keys: Any, k: int) -> tuple[Tensor, Tensor, list, list]:
    """(weights and indices (M, k) in descending order, labels of rows, labels of all columns)."""
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
        raise ValueError(f"path: must be None with axes, whose figure the caller saves; got {describe(path)}")


# -------------------------------------------------------------------------------------------------- figures and labels


def _new_axes(width: float, height: float) -> Axes:
    """Axes in a new figure of about this size in inches, without pyplot."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib, which is missing: pip install matplotlib") from error
    figure = Figure(figsize=(min(max(width, 3.5), 40), min(max(height, 2.5), 40)), layout="constrained")
    return figure.add_subplot()


def _saved(axes: Axes, path: str | os.PathLike | None) -> Axes:
    if path is not None:
        axes.get_figure(root=True).savefig(path, dpi=120)  # type: ignore[union-attr]
    return axes


def _text(families: list[str]) -> dict[str, Any]:
    """Text properties of labels; "$" is not parsed as math."""
    return {"fontfamily": families, "parse_math": False}


def _visible(token: str) -> str:
    return token if token.isprintable() and token.strip() else repr(token)


def _written(labels: list[Sequence[str]], title: str) -> tuple[list[str], list[list[str]], str]:
    """(font families, the labels and the title, without characters that no font has)."""
    visible = [[_visible(token) for token in tokens] for tokens in labels]
    families, missing = _fonts(set(title).union(*map("".join, visible)) - {"\n"})
    if missing:
        _warn(missing)
    written = [[f"#{i}" if missing & set(x) else x for i, x in enumerate(tokens)] for tokens in visible]
    return families, written, "".join("?" if x in missing else x for x in title)


def _fonts(characters: set[str]) -> tuple[list[str], set[str]]:
    """(a list for `fontfamily` that covers the characters, the characters that no installed font has)."""
    from matplotlib import rcParams

    families = list(rcParams["font.family"])
    missing = characters.difference(*(_covered(family, characters) for family in families))
    for family, path in _installed() if missing else ():
        if missing & _glyphs(path, missing):
            covered = _covered(family, missing)
            families += [family] if covered else []
            missing = missing - covered
    return families, missing


def _covered(family: str, characters: set[str]) -> set[str]:
    """The characters that matplotlib draws with this family: those in the file that it selects, the regular face."""
    from matplotlib import font_manager

    try:
        properties = font_manager.FontProperties(family=[family])
        return _glyphs(font_manager.findfont(properties, fallback_to_default=False), characters)
    except ValueError:  # no such family
        return set()


def _glyphs(path: str, characters: set[str]) -> set[str]:
    from matplotlib import font_manager

    font = font_manager.get_font(path)
    # Bitmap fonts, such as colour emoji, have fixed sizes, which matplotlib cannot draw.
    return {x for x in characters if font.get_char_index(ord(x))} if font.scalable else set()


def _installed() -> list[tuple[str, str]]:
    """(family, path) of every installed font, those of FALLBACKS first."""
    from matplotlib import font_manager

    manager = font_manager.fontManager
    known = {os.path.realpath(font.fname) for font in manager.ttflist}
    for path in sorted(font_manager.findSystemFonts()):  # ttflist is a cache, without fonts installed later
        if os.path.realpath(path) not in known:
            with contextlib.suppress(Exception):  # an unreadable file
                manager.addfont(path)
    order = {family: i for i, family in enumerate(FALLBACKS)}
    # "Last Resort" fonts have a placeholder for every character.
    fonts = [
        (font.name, font.fname)
        for font in manager.ttflist
        if "last resort" not in font.name.lower() and os.path.isfile(font.fname)
    ]
    return sorted(fonts, key=lambda font: (order.get(font[0], len(order)), font))


def _warn(missing: set[str]) -> None:
    shown = sorted(missing)
    # By code point too: the terminal may lack the glyphs as well.
    names = ", ".join(f"{x} (U+{ord(x):04X})" for x in shown[:3])
    more = f" and {len(shown) - 3} more" if len(shown) > 3 else ""
    warnings.warn(f"no installed font has {names}{more}; tokens with them are labelled by index", stacklevel=4)

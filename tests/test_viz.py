"""fused_attn.viz: the content of its pictures and their fonts, without a warning of matplotlib."""

from __future__ import annotations

import doctest
import io
import math
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fused_attn import Mask, attention_map, attention_stats, viz

matplotlib = pytest.importorskip("matplotlib")
pytest.importorskip("fontTools")

from fontTools.fontBuilder import FontBuilder  # noqa: E402
from fontTools.pens.ttGlyphPen import TTGlyphPen  # noqa: E402
from matplotlib import font_manager  # noqa: E402

QUERIES, KEYS = ["march", "5"], ["三", "月", "五", "日"]
WEIGHTS = torch.tensor([[0.5, 0.25, 0.25, 0.0], [0.125, 0.0, 0.625, 0.25]])


def font(path: Path, family: str, characters: str, style: str) -> Path:
    """A font file with a square for each of the characters."""
    pen = TTGlyphPen(None)
    for i, corner in enumerate([(0, 0), (0, 700), (700, 700), (700, 0)]):
        (pen.lineTo if i else pen.moveTo)(corner)
    pen.closePath()
    names = [".notdef", *(f"u{ord(x):X}" for x in characters)]
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap({ord(x): f"u{ord(x):X}" for x in characters})
    builder.setupGlyf(dict.fromkeys(names, pen.glyph()))
    builder.setupHorizontalMetrics(dict.fromkeys(names, (1000, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": family, "styleName": style})
    builder.setupOS2(usWeightClass=700 if style == "Bold" else 400)
    builder.setupPost()
    builder.save(path)
    return path


class Machine:
    """A machine whose fonts are matplotlib's own, and those that are installed here."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.files = directory, [str(directory / "broken.ttf")]
        Path(self.files[0]).write_bytes(b"no font")

    def install(self, family: str, characters: str, style: str = "Regular") -> None:
        self.files.append(str(font(self.directory / f"{family} {style}.ttf", family, characters, style)))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Machine]:
    found, manager = Machine(tmp_path), font_manager.fontManager
    own = [entry for entry in manager.ttflist if entry.fname.startswith(matplotlib.get_data_path())]
    monkeypatch.setattr(manager, "ttflist", own)
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: found.files)
    manager._findfont_cached.cache_clear()
    yield found
    manager._findfont_cached.cache_clear()


def labels(axes: Any) -> tuple[list[str], list[str]]:
    """What stands at the rows and at the columns, once every glyph has been drawn."""
    axes.figure.savefig(io.BytesIO())
    return [x.get_text() for x in axes.get_yticklabels()], [x.get_text() for x in axes.get_xticklabels()]


def messages(call: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(x.message) for x in caught]


# -------------------------------------------------------------------------------------------------------------- fonts


def test_no_font_has_them(machine: Machine) -> None:
    """Tokens without glyphs are labelled by index, the others by themselves; the warning names the characters."""
    (message,) = messages(lambda: viz.heatmap(WEIGHTS, QUERIES, KEYS))
    assert message.startswith("no installed font has 三 (U+4E09), 五 (U+4E94), 日 (U+65E5) and 1 more; ")
    with pytest.warns(UserWarning, match="labelled by index"):
        axes = viz.heatmap(WEIGHTS, QUERIES, ["三", "of", "五日", "é"], title="三 days")
    assert labels(axes) == (QUERIES, ["#0", "of", "#2", "é"])
    assert axes.get_title() == "? days"


@pytest.mark.parametrize("character", ["〇", "ア", "한", "\U00020000", "ก", "🙂"])
def test_the_warning_names_the_character(machine: Machine, character: str) -> None:
    (message,) = messages(lambda: viz.heatmap(WEIGHTS, [character, "b"], list("abcd")))
    assert message == (
        f"no installed font has {character} (U+{ord(character):04X}); tokens with them are labelled by index"
    )


def test_a_font_newer_than_matplotlibs_list(machine: Machine) -> None:
    machine.install("Brush", "三月五日")
    axes = viz.heatmap(WEIGHTS, QUERIES, KEYS, title="三月")
    assert labels(axes) == (QUERIES, KEYS) and axes.get_title() == "三月"
    assert axes.get_xticklabels()[0].get_fontfamily() == [*matplotlib.rcParams["font.family"], "Brush"]


def test_fallback_fonts(machine: Machine) -> None:
    """FALLBACKS in their order, then the others by name; a font that adds no character is not used."""
    for family, characters in (("A", "三"), ("B", "三月"), (viz.FALLBACKS[2], "五"), (viz.FALLBACKS[1], "三五")):
        machine.install(family, characters)
    with pytest.warns(UserWarning, match="no installed font has 日"):
        axes = viz.heatmap(WEIGHTS, QUERIES, KEYS)
    assert labels(axes) == (QUERIES, ["三", "月", "五", "#3"])
    own = matplotlib.rcParams["font.family"]
    assert axes.get_xticklabels()[0].get_fontfamily() == [*own, viz.FALLBACKS[1], "B"]


def test_what_only_the_bold_face_has(machine: Machine) -> None:
    """Is not written in the regular one."""
    machine.install("Brush", "三月", "Regular")
    machine.install("Brush", "三月五日", "Bold")
    with pytest.warns(UserWarning, match="no installed font has 五 .*, 日 "):
        axes = viz.heatmap(WEIGHTS, QUERIES, KEYS)
    assert labels(axes) == (QUERIES, ["三", "月", "#2", "#3"])
    machine.install("Pen", "五日")
    assert labels(viz.heatmap(WEIGHTS, QUERIES, KEYS)) == (QUERIES, KEYS)


def test_the_fonts_that_the_caller_chose_come_first(machine: Machine) -> None:
    machine.install("Chosen", "三月五日")
    machine.install("Another", "三月五日")
    font_manager.fontManager.addfont(machine.files[1])
    with matplotlib.rc_context({"font.family": ["DejaVu Sans", "Chosen"]}):
        axes = viz.heatmap(WEIGHTS, QUERIES, KEYS)
        assert labels(axes) == (QUERIES, KEYS)
    assert axes.get_xticklabels()[0].get_fontfamily() == ["DejaVu Sans", "Chosen"]


# ----------------------------------------------------------------------------------------------------------- pictures


def test_heatmap(tmp_path: Path) -> None:
    path = tmp_path / "map.png"
    given = WEIGHTS.to(torch.bfloat16).requires_grad_()
    axes = viz.heatmap(given, QUERIES, list("abcd"), title="a map", path=path)
    assert axes.images[0].get_array().tolist() == WEIGHTS.tolist()
    assert labels(axes) == (QUERIES, list("abcd")) and axes.get_title() == "a map"
    assert path.read_bytes().startswith(b"\x89PNG")
    drawn = matplotlib.image.imread(path)[..., :3]
    box = axes.get_window_extent()
    corner = drawn[int(len(drawn) * (1 - box.y1 / axes.figure.bbox.height)) + 8, int(box.x0 * 1.2) + 8]
    assert corner == pytest.approx(matplotlib.colormaps["magma"](0.5 / 0.625)[:3], abs=0.02), "the first row on top"


def test_labels_are_written_as_they_are(machine: Machine) -> None:
    axes = viz.heatmap(WEIGHTS, ["$x_1$", "\n"], ["", " ", "a b", "it's\t"], title="$\\frac$")
    assert labels(axes) == (["$x_1$", "'\\n'"], ["''", "' '", "a b", '"it\'s\\t"'])


def test_nan_is_blank() -> None:
    image = viz.heatmap(WEIGHTS.masked_fill(WEIGHTS == 0.5, math.nan), QUERIES, list("abcd")).images[0]
    assert image.get_array().mask.tolist() == (WEIGHTS == 0.5).tolist()
    labels(viz.heatmap(WEIGHTS * math.nan, QUERIES, list("abcd")))


def test_axes_of_the_caller(tmp_path: Path) -> None:
    figure = matplotlib.figure.Figure()
    left, right = figure.subplots(1, 2)
    assert viz.heatmap(WEIGHTS, QUERIES, list("abcd"), axes=left) is left
    assert viz.top_k(WEIGHTS, QUERIES, list("abcd"), 1, axes=right) == [[("a", 0.5)], [("c", 0.625)]]
    assert [len(x.images) for x in (left, right)] == [1, 1]
    for draw in (viz.heatmap, viz.top_k):
        with pytest.raises(ValueError, match="path: must be None with axes"):
            draw(WEIGHTS, QUERIES, list("abcd"), axes=left, path=tmp_path / "x.png")
    assert not list(tmp_path.iterdir())


def test_top_k(machine: Machine) -> None:
    """Heaviest first, ties to the lower index, repeated tokens apart; and the same drawn."""
    keys = ["a", "b", "b", "日"]
    expected = [[("a", 0.5), ("b", 0.25), ("b", 0.25)], [("b", 0.625), ("日", 0.25), ("a", 0.125)]]
    assert viz.top_k(WEIGHTS, QUERIES, keys) == expected
    axes = matplotlib.figure.Figure().add_subplot()
    with pytest.warns(UserWarning, match="no installed font has 日"):
        assert viz.top_k(WEIGHTS, QUERIES, keys, axes=axes) == expected
    assert labels(axes) == (QUERIES, ["1", "2", "3"])
    cells = {x.get_position(): x.get_text() for x in axes.texts}
    assert cells == {
        (0, 0): "a  0.50", (1, 0): "b  0.25", (2, 0): "b  0.25",
        (0, 1): "b  0.62", (1, 1): "#3  0.25", (2, 1): "a  0.12",
    }  # fmt: skip


def test_top_k_of_statistics(tmp_path: Path) -> None:
    """Of weights and indices as attention_stats gives them, with missing places."""
    weights = torch.tensor([[0.75, 0.25, 0.0], [0.0, 0.0, 0.0]])
    indices = torch.tensor([[2, 0, -1], [-1, -1, -1]])
    got = viz.top_k(weights, QUERIES, KEYS, 3, indices=indices)
    assert got == [[("五", 0.75), ("三", 0.25)], []]
    assert viz.top_k(weights, QUERIES, KEYS, 1, indices=indices) == [[("五", 0.75)], []]
    axes = matplotlib.figure.Figure().add_subplot()
    viz.top_k(weights, QUERIES, list("abcd"), 2, indices=indices, axes=axes)
    assert axes.images[0].get_array().mask.tolist() == [[False, False], [True, True]]
    assert [x.get_text() for x in axes.texts] == ["c  0.75", "a  0.25"]
    path = tmp_path / "k.png"
    viz.top_k(weights, QUERIES, list("abcd"), 2, indices=indices, path=path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_top_k_agrees_with_the_map() -> None:
    """Statistics in linear memory and whole rows name the same keys, and no key beyond the length."""
    q, k = (torch.randn(1, 2, n, 8, generator=torch.Generator().manual_seed(n)) for n in (2, 4))
    asked = {"mask": Mask.lengths(torch.tensor([2]))}
    stats = attention_stats(q, k, top_k=3, **asked)
    found = viz.top_k(stats.top_k_weights[0, 1], QUERIES, KEYS, indices=stats.top_k_indices[0, 1])
    weights = attention_map(q, k, heads=[1], **asked)[0, 0]
    for of_statistics, of_map in zip(found, viz.top_k(weights, QUERIES, KEYS, 2), strict=True):
        assert [key for key, _ in of_statistics] == [key for key, _ in of_map]
        assert {key for key, _ in of_map} == {"三", "月"}
        assert [weight for _, weight in of_statistics] == pytest.approx([weight for _, weight in of_map])


def test_ties_of_many_keys() -> None:
    keys = [str(j) for j in range(500)]
    weights = torch.full((2, 500), 1 / 512).index_fill(1, torch.tensor([7]), 0.0)
    got = viz.top_k(weights, QUERIES, keys, 500)
    assert [[key for key, _ in row] for row in got] == [[*keys[:7], *keys[8:], "7"]] * 2


def test_top_k_shows_nan() -> None:
    axes = matplotlib.figure.Figure().add_subplot()
    ((key, weight),), _ = viz.top_k(WEIGHTS.masked_fill(WEIGHTS == 0.0, math.nan), QUERIES, list("abcd"), 1, axes=axes)
    assert key == "d" and math.isnan(weight)
    labels(axes)


def test_arrays_characters_and_numbers() -> None:
    """Arrays of numpy are weights, a string is its characters, and labels that are not given are numbers."""
    expected = viz.top_k(WEIGHTS, ["a", "b"], ["c", "d", "e", "f"], 2)
    array = WEIGHTS.numpy()
    array.flags.writeable = False
    assert viz.top_k(array, "ab", "cdef", 2) == expected
    numbered = viz.top_k(WEIGHTS, k=2)
    assert [["cdef"[int(key)] for key, _ in row] for row in numbered] == [[key for key, _ in row] for row in expected]
    values, indices = WEIGHTS.topk(2)
    assert viz.top_k(values.numpy(), k=2, indices=indices.numpy()) == numbered
    axes = viz.heatmap(array)
    assert [x.get_text() for x in axes.get_xticklabels()] == ["0", "1", "2", "3"]


WRONG: dict[str, tuple[type[Exception], str, Any]] = {
    "shape": (ValueError, r"weights: expected the shape \(2, 3\).*got \(2, 4\)", (WEIGHTS, QUERIES, list("abc"))),
    "four dimensions": (ValueError, r"got \(1, 1, 2, 4\)", (WEIGHTS[None, None], QUERIES, KEYS)),
    "empty": (ValueError, "none 0", (torch.zeros(2, 0), QUERIES, [])),
    "integers": (TypeError, "weights: expected a floating tensor or array, got torch.int64", (WEIGHTS.long(),)),
    "array of integers": (TypeError, "floating tensor or array, got torch.int64", (WEIGHTS.long().numpy(),)),
    "a list": (TypeError, r"weights: expected a floating tensor or array, got list \[\[1.0\]\]", ([[1.0]],)),
    "characters": (ValueError, r"weights: expected the shape \(2, 3\).*got \(2, 4\)", (WEIGHTS, QUERIES, "abc")),
    "numbers": (TypeError, r"queries: expected strings, got list \[1, 2\]", (WEIGHTS, [1, 2], KEYS)),
    "a tensor": (TypeError, "keys: expected strings, got torch.float32 tensor of", (WEIGHTS, QUERIES, WEIGHTS)),
    "another order": (TypeError, "weights: .*got torch.int64 tensor of shape", (WEIGHTS.long(), WEIGHTS, QUERIES)),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_arguments(what: str) -> None:
    error, words, given = WRONG[what]
    with pytest.raises(error, match=words):
        viz.heatmap(*given)
    if what != "empty":
        with pytest.raises(error, match=words):
            viz.top_k(*given)


def test_wrong_arguments_of_top_k() -> None:
    with pytest.raises(TypeError, match=r"k: expected an int, got list \['a'\]"):
        viz.top_k(WEIGHTS, QUERIES, KEYS, ["a"])  # type: ignore[arg-type]
    for k in (0, 5):
        with pytest.raises(ValueError, match=f"k: expected 1 to 4, the number of keys, got {k}"):
            viz.top_k(WEIGHTS, QUERIES, KEYS, k)
    index = torch.zeros(2, 4, dtype=torch.int32)
    for bad, words in (
        (WEIGHTS, "expected integers .*float32"),
        (index[:, :1], r"expected integers \(M, 2 or more\), got torch.int32 tensor of shape \(2, 1\)"),
        ([[0, 1]], r"expected integers \(M, 2 or more\), got list"),
        (index + 4, "expected -1 to 3, got 4 to 4"),
        (index - 2, "expected -1 to 3, got -2 to -2"),
    ):
        with pytest.raises(ValueError, match=f"indices: {words}"):
            viz.top_k(WEIGHTS, QUERIES, KEYS, 2, indices=bad)
    with pytest.raises(ValueError, match=r"weights: expected the shape \(2, 3\), that of indices"):
        viz.top_k(WEIGHTS, QUERIES, KEYS, 2, indices=index[:, :3])


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The list needs none; a picture says what is missing."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    assert viz.top_k(WEIGHTS, QUERIES, KEYS, 1) == [[("三", 0.5)], [("五", 0.625)]]
    with pytest.raises(ImportError, match="need matplotlib, which is missing: pip install matplotlib"):
        viz.heatmap(WEIGHTS, QUERIES, KEYS)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        viz.top_k(WEIGHTS, QUERIES, KEYS, path=tmp_path / "x.png")


def test_writable(machine: Machine) -> None:
    assert viz.writable("chat é\n5") and viz.writable("")
    assert not viz.writable("三") and not viz.writable("5 三")


def test_examples() -> None:
    assert doctest.testmod(viz, raise_on_error=True).attempted >= 12

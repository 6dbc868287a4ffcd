"""Figures as files: they are whole, the same twice, ask for nothing from elsewhere, and show what strangers wrote as it is."""

from __future__ import annotations

import re
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import matplotlib as mpl
import matplotlib.style
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from support import files_no_larger_than, make_record, make_spec, python_path
from test_exports import HOSTILE, TRAINED, answers, board, losses, perplexities

from prunebench.errors import StoreError
from prunebench.plugins import load_registry
from prunebench.report.canvas import STYLE, styles_of
from prunebench.report.drawing import draw_curves, draw_tradeoff
from prunebench.report.figures import Figures, figures_of
from prunebench.report.grids import draw_heats, draw_overlap, draw_phases
from prunebench.report.labels import MISSING, MOST_CHARACTERS, shown
from prunebench.report.marks import Hollow
from prunebench.report.matrices import ERROR, SPARSITY, Heat, OverlapSquare
from prunebench.report.palette import Palette
from prunebench.report.plots import palette_of, write_covers, write_plots
from prunebench.results.beside import beside
from prunebench.results.board import build_board
from prunebench.results.published import load_published
from prunebench.results.records import RunRecord
from prunebench.results.store import ResultStore

TOP = Path(__file__).parents[1]
RESULTS = TOP / "results"
SVG = "{http://www.w3.org/2000/svg}"


def figures(*records: RunRecord) -> Figures:
    return figures_of(board(*records), records, (), lambda _: None)


def few() -> Figures:
    """One section with a table, and all other kinds."""
    made = figures(losses("dense", "dense", None, 0.0), losses("magnitude", "0.5", None, 0.3), losses("wanda", "0.5", 0, 0.2))
    heat = Heat("tiny", "box", "wanda", ERROR, ("q", "k"), (0, 1), np.array([[0.1, 0.2], [np.nan, 9.0]]), ("a",))
    square = OverlapSquare("tiny", "box", ("wanda", "magnitude"), np.array([[1.0, 0.4], [0.4, 1.0]]), ("a", "b"), 0.33)
    return replace(made, heats=(heat,), overlaps=(square,))


def in_style(draw: Callable[[], Figure]) -> Figure:
    with matplotlib.style.context(["default", dict(STYLE)]):
        return draw()


# Files


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_plots(few(), tmp_path_factory.mktemp("drawn"))


def test_every_figure_is_an_svg_and_a_png(drawn: list[Path]) -> None:
    assert [path.name for path in drawn] == [
        f"{stem}.{kind}"
        for stem in (
            "tradeoff-tiny-perplexity-on-salesforce-wikitext-wikitext-2-raw-v1-test-window-512-50-unstructured",
            "phases-tiny-perplexity-on-salesforce-wikitext-wikitext-2-raw-v1-test-window-512-50-unstructured",
            "error-tiny",
            "overlap-tiny",
        )
        for kind in ("svg", "png")
    ]
    assert sorted(drawn) == sorted(drawn[0].parent.iterdir())  # nothing is left beside them
    for path in drawn:
        content = path.read_bytes()
        if path.suffix == ".svg":
            root = ElementTree.fromstring(content)
            assert root.tag == f"{SVG}svg"
            assert len(list(root.iter(f"{SVG}path"))) > 20
        else:
            width, height = struct.unpack(">II", content[16:24])
            assert content.startswith(b"\x89PNG\r\n\x1a\n")
            assert width == 1440
            assert 250 < height < 2200


def test_nothing_tells_when_or_by_what_they_were_made(drawn: list[Path]) -> None:
    for path in drawn:
        content = path.read_bytes()
        assert not re.search(rb"20\d\d-\d\d-\d\d|Matplotlib|tEXt|iTXt|tIME", content), path.name


def test_pictures_ask_for_nothing_from_elsewhere(drawn: list[Path]) -> None:
    """Every reference of an SVG leads into itself; the addresses that are left name formats."""
    for path in drawn[::2]:
        for element in ElementTree.parse(path).iter():
            assert element.tag.removeprefix(SVG) not in ("script", "foreignObject", "a")
            for name, value in element.attrib.items():
                if name.endswith("href"):
                    assert value.startswith(("#", "data:image/png;base64,")), value
                assert "url(" not in value.replace("url(#", "")


def test_the_same_figures_are_the_same_bytes(drawn: list[Path], tmp_path: Path) -> None:
    for first, second in zip(drawn, write_plots(few(), tmp_path), strict=True):
        assert first.read_bytes() == second.read_bytes(), first.name


def test_what_a_user_has_set_for_matplotlib_changes_nothing(drawn: list[Path], tmp_path: Path) -> None:
    with mpl.rc_context({"font.size": 30, "axes.grid": False, "lines.linewidth": 9, "svg.hashsalt": "theirs"}):
        before = dict(mpl.rcParams)
        for first, second in zip(drawn, write_plots(few(), tmp_path), strict=True):
            assert first.read_bytes() == second.read_bytes(), first.name
        assert dict(mpl.rcParams) == before


def test_names_are_unique_whatever_the_titles(tmp_path: Path) -> None:
    titles = ["a/b", "a b", "a:b", "../../x", "", "ß" * 300]
    squares = tuple(replace(few().overlaps[0], title=title) for title in titles)
    written = write_plots(replace(few(), sections=(), heats=(), overlaps=squares), tmp_path)
    assert len({path.name for path in written}) == 2 * len(titles)
    assert {path.parent for path in written} == {tmp_path}
    assert [path.stem for path in written[:6:2]] == ["overlap-a-b", "overlap-a-b-2", "overlap-a-b-3"]


def test_maps_of_one_kind_are_one_picture_and_uniform_sparsity_none(tmp_path: Path) -> None:
    [heat] = few().heats
    found = replace(heat, what=SPARSITY)
    heats = (found, heat, replace(found, method="b"), replace(heat, method="b"), replace(heat, title="other"))
    flat = replace(found, title="flat", values=np.array([[50.0, 50.1], [50.2, np.nan]]))
    written = write_plots(Figures((), (*heats, flat), ()), tmp_path)
    assert [path.name for path in written[::2]] == ["found-tiny.svg", "error-tiny.svg", "error-other.svg"]


def test_seconds_of_the_same_runs_are_drawn_once(tmp_path: Path) -> None:
    [section] = figures(losses("wanda", "0.5", 0, 0.2)).sections
    again = replace(section, tradeoffs=(), curves=None)
    written = write_plots(Figures((again, again), (), ()), tmp_path)
    assert [path.name[:6] for path in written] == ["phases"] * 2


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    with files_no_larger_than(1000), pytest.raises(StoreError, match="cannot be written"):
        write_plots(few(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_pyplot_and_torch_are_not_loaded() -> None:
    code = "import sys, prunebench.report.plots; print([m for m in ('matplotlib.pyplot', 'torch') if m in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=python_path_env(), check=True)
    assert ran.stdout == "[]\n"


def python_path_env() -> dict[str, str]:
    return {"PYTHONPATH": python_path(TOP / "tests"), "HOME": "/", "PATH": ""}


# What is in a picture


def markers(axes: Axes) -> list[tuple[float, float, str, str]]:
    """Single marks: where they are, their shape and their colour."""
    return [
        (float(line.get_xdata()[0]), float(line.get_ydata()[0]), str(line.get_marker()), to_hex(line.get_color()))  # type: ignore[index,arg-type]
        for line in axes.lines
        if len(np.atleast_1d(line.get_xdata())) == 1 and line.get_marker() not in ("None", None)
    ]


def test_marks_stand_where_value_and_cost_say() -> None:
    made = figures(*perplexities())
    panels = list(made.sections[0].tradeoffs[:2])
    assert [one.cost for one in panels] == ["prune s", "peak MiB"]
    figure = in_style(lambda: draw_tradeoff(panels, palette_of(made)))
    for axes, one in zip(figure.axes, panels, strict=True):
        expected = {(one.cost, mark.cost(one.cost), mark.value) for mark in one.marks}
        assert {(one.cost, across, up) for across, up, *_ in markers(axes)} == expected
        assert {shape for *_, shape, _ in markers(axes)} == {"o"}
    pale = [line.get_alpha() for line in figure.axes[0].lines if line.get_color() == "#008060"]
    assert pale == [pytest.approx(0.35)]  # magnitude shared its machine


def test_the_front_is_a_staircase() -> None:
    made = figures(losses("magnitude", "0.5", None, 0.3, seconds=1.0), losses("wanda", "0.5", 0, 0.2, seconds=5.0))
    panel = made.sections[0].tradeoffs[0]
    assert panel.front == ("magnitude", "wanda")
    figure = in_style(lambda: draw_tradeoff([panel], palette_of(made)))
    [front] = [line for line in figure.axes[0].lines if line.get_drawstyle() == "steps-post"]
    places = [(mark.prune_seconds, mark.value) for mark in panel.marks[::-1]]
    assert list(zip(*front.get_data(), strict=True)) == places


def test_published_numbers_are_hollow() -> None:
    made = figures(*perplexities())
    panel = made.sections[0].tradeoffs[0]
    value = panel.marks[0].value + 1
    with_paper = replace(panel, published=(Hollow("Wanda, table 2", panel.marks[0].method, panel.marks[0].target, value),))
    figure = in_style(lambda: draw_tradeoff([with_paper], palette_of(made)))
    hollow = [line for line in figure.axes[0].lines if line.get_fillstyle() == "none"]
    assert [(line.get_xdata(), line.get_ydata()) for line in hollow] == [([panel.marks[0].prune_seconds], [value])]
    assert legend(figure)[-1] == "published: Wanda, table 2"
    curves = made.sections[0].curves
    assert curves is not None
    papers = tuple(Hollow("A, table 1", "wanda", target, 77.0) for target in ("0.6", "2:4", "0.9"))
    figure = in_style(lambda: draw_curves(replace(curves, published=papers), palette_of(made), None))
    left, right = figure.axes
    [ours] = [across for across, up, _, colour in markers(right) if colour == "#0072b2" and up != 77.0]
    for axes, expected in ((left, 60.0), (right, ours)):
        [place] = [across for across, up, *_ in markers(axes) if up == 77.0]
        assert place == pytest.approx(expected)


def legend(figure: Figure) -> list[str]:
    found = figure.axes[-1].get_legend()
    assert found is not None
    return [text.get_text().replace("\n", " ") for text in found.get_texts()]


def test_perplexities_over_sparsity_are_on_a_logarithmic_axis_and_accuracies_are_not() -> None:
    made = figures(*perplexities())
    curves = made.sections[0].curves
    assert curves is not None
    assert {axes.get_yscale() for axes in in_style(lambda: draw_curves(curves, palette_of(made), None)).axes} == {"log"}
    shares = figures(*[answers("magnitude", target, [1, 0, 1, 1] * 20) for target in ("0.5", "0.6")])
    of_shares = shares.sections[0].curves
    assert of_shares is not None
    figure = in_style(lambda: draw_curves(of_shares, palette_of(shares), None))
    assert [axes.get_yscale() for axes in figure.axes] == ["linear"]
    assert figure.axes[0].get_ylabel() == "accuracy % (higher is better)"


def test_what_was_retrained_has_a_picture_of_its_own(tmp_path: Path) -> None:
    records = [losses("imp", target, 0, 0.1, TRAINED) for target in ("0.5", "0.6")]
    written = write_plots(figures(*perplexities()[:-1], *records), tmp_path)
    assert len([path for path in written if path.name.startswith("sparsity")]) == 4


def test_bars_are_as_long_as_their_seconds() -> None:
    bars = figures(*perplexities()).sections[0].phases[0]
    figure = in_style(lambda: draw_phases(bars))
    left, right = figure.axes
    lengths = [[patch.get_width() for patch in container] for container in left.containers]  # type: ignore[attr-defined]
    assert lengths == [pytest.approx(list(part)) for part in bars.phases.values()]
    shares = [[patch.get_width() for patch in container] for container in right.containers]  # type: ignore[attr-defined]
    assert np.sum(shares, axis=0) == pytest.approx([100.0] * len(bars.methods))
    assert [text.get_text() for text in left.texts] == ["2*" if shared else "2" for shared in bars.marked]


def test_heat_maps_share_a_scale_and_leave_holes() -> None:
    [heat] = few().heats
    other = replace(heat, values=np.array([[0.2, 0.2], [0.2, 5.0]]))
    figure = in_style(lambda: draw_heats([heat, other]))
    first, second = (axes.images[0] for axes in figure.axes[:2])
    assert first.get_clim() == second.get_clim() == (0.1, 9.0)
    assert np.ma.getmaskarray(first.get_array()).tolist() == [[False, False], [True, False]]
    empty = replace(heat, values=np.full((2, 2), np.nan))
    assert in_style(lambda: draw_heats([empty])).axes


def test_squares_of_any_size() -> None:
    for count in (1, 2, 24):
        square = OverlapSquare("t", "box", ("label " * 30,) * count, np.eye(count), ("a",) * count, 0.3)
        figure = in_style(lambda square=square: draw_overlap(square))  # type: ignore[misc]
        numbers = [text.get_text() for text in figure.axes[0].texts]
        assert len(numbers) == (count * count if count <= 14 else 0)
        for label in figure.axes[0].get_yticklabels():
            assert label.get_window_extent().x0 >= 0


# Looks


def test_a_method_looks_the_same_in_every_figure() -> None:
    palette = Palette(["wanda", "theirs", "magnitude + perp"])
    for others in (["wanda"], ["theirs", "wanda"], ["wanda", "magnitude + perp"]):
        style = styles_of(others, palette)["wanda"]
        assert (style.colour, style.marker, style.fill) == ("#0072b2", "o", "full")


def test_methods_of_one_look_are_filled_differently() -> None:
    methods = [f"wanda + perp[subset={name}]" for name in ("all", "norms", "biases")]
    styles = styles_of(methods, Palette(methods))
    assert len({style.fill for style in styles.values()}) == 3
    assert {style.marker for style in styles.values()} == {"s"}


def test_neither_title_nor_legend_nor_labels_overlap() -> None:
    """By the boxes that the picture is laid out with."""
    named = [losses(f"wanda + perp[subset={name * 9}]", "2:4", index, 0.1) for index, name in enumerate("abcdefgh")]
    made = figures(*perplexities(), *named)
    panels = [one for one in made.sections[0].tradeoffs if one.title.endswith("2:4")]
    figure = in_style(lambda: draw_tradeoff(panels, palette_of(made)))
    key = figure.axes[-1].get_legend()
    assert key is not None
    box = key.get_window_extent()
    assert box.x1 <= figure.bbox.x1
    assert box.y0 >= 0
    for axes in figure.axes:
        assert not box.overlaps(axes.get_window_extent())
    [title, foot] = [text.get_window_extent() for text in figure.texts]
    assert not box.overlaps(title)
    assert not foot.overlaps(figure.axes[0].get_tightbbox())
    assert title.x1 <= figure.bbox.x1
    assert foot.x1 <= figure.bbox.x1


# Strangers

TEXTS = ("<script>alert(1)</script>", r"$\frac{1}{2}$ $$ $", "]]> --> &amp; <!-- ", HOSTILE, "x" * 9000, "\u202e\x00 中文")


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_hostile_names_are_shown_as_they_are(text: str, tmp_path: Path) -> None:
    record = losses("wanda", "0.5", 0, 0.2)
    steps = tuple(step.model_copy(update={"text": text}) for step in record.spec.steps)
    spec = record.spec.model_copy(update={"steps": steps, "model": record.spec.model.model_copy(update={"name": text})})
    made = figures(record.model_copy(update={"spec": spec, "machine": text}))
    [heat], [square] = few().heats, few().overlaps
    heat = replace(heat, title=text, machine=text, method=text, roles=(text, text), what=text)
    made = replace(made, heats=(heat,), overlaps=(replace(square, title=text, labels=(text, "other")),))
    written = write_plots(made, tmp_path)
    assert len(written) == 8
    for path in written[::2]:
        root = ElementTree.fromstring(path.read_bytes())
        assert not list(root.iter(f"{SVG}script"))


def test_text_is_cut_and_spelt_where_the_font_has_no_letter() -> None:
    assert shown("wanda é $x$") == "wanda é $x$"
    assert shown("中\n\x1b[2J") == MISSING + r" \x1b[2J"
    assert len(shown("x" * 9000)) == MOST_CHARACTERS


# What is committed


def test_covers_are_of_the_section_with_most_points(tmp_path: Path) -> None:
    one = [make_record(make_spec("wanda", target, 0, model="small"), 60.0) for target in ("0.5", "0.6")]
    made = figures(*perplexities(), *one)
    assert [path.name for path in write_covers(made, tmp_path)] == ["tradeoff.svg", "sparsity.svg"]
    assert b"tiny: perplexity" in (tmp_path / "sparsity.svg").read_bytes()
    assert b"tiny: perplexity" in (tmp_path / "tradeoff.svg").read_bytes()
    assert write_covers(figures(one[0]), tmp_path / "none") == []


def test_covers_of_nothing_but_retrained_rows(tmp_path: Path) -> None:
    methods = ("wanda + perp", "magnitude + perp")
    made = [make_record(make_spec(m, target, 0, recipe=TRAINED), 60.0) for target in ("0.5", "0.6") for m in methods]
    assert len(write_covers(figures(*made), tmp_path)) == 2


def test_the_readme_shows_the_committed_pictures() -> None:
    text = (TOP / "README.md").read_text(encoding="utf-8")
    for name in ("tradeoff.svg", "sparsity.svg"):
        assert f"](results/{name})" in text
        assert (RESULTS / name).stat().st_size < 300_000


def test_the_committed_pictures_are_what_the_committed_records_give(tmp_path: Path) -> None:
    """Numbers may differ in the last digits, as they do between processors."""
    store = ResultStore(RESULTS, pytest.fail)
    latest = store.latest()
    records = [stored.record for stored in latest]
    placed = beside(load_published(RESULTS / "published"), records)
    found = build_board(latest, load_registry().revisions(), store.items)
    made = figures_of(found, records, placed, store.masks, store.items)
    for path in write_covers(made, tmp_path):
        committed, fresh = ((folder / path.name).read_text(encoding="utf-8") for folder in (RESULTS, tmp_path))
        number = re.compile(r"(?<![\w#])-?\d+\.?\d*(?:e-?\d+)?")
        told = "run `prunebench report --covers results`"
        assert number.sub("0", unnamed(committed)) == number.sub("0", unnamed(fresh)), told
        pairs = zip(number.findall(unnamed(committed)), number.findall(unnamed(fresh)), strict=True)
        assert all(abs(float(one) - float(other)) < 0.02 for one, other in pairs), told


def unnamed(svg: str) -> str:
    """Without the ids that hash what they name to the last digit."""
    return re.sub(r"\b[mp][0-9a-f]{10}\b", "id", svg)

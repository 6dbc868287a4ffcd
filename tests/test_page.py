"""The HTML page without a browser: its size, its bytes, what strangers can write into it, and that it asks for nothing."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
import time
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from pages import TRAINED, board_of, figures, many, page_of, run_of
from plotly.offline import get_plotlyjs
from support import Ran, make_record, make_spec

from prunebench.report import page as page_module
from prunebench.report.axes import value_axis
from prunebench.report.charts import curves_chart, heat_chart, phases_chart, tradeoff_chart
from prunebench.report.marks import Hollow
from prunebench.report.matrices import OVERLAP
from prunebench.report.page import as_json, to_html
from prunebench.report.palette import COLOURS, INK, PHASES, Palette, family
from prunebench.report.panels import MOST_FACTS, Panels, rerun
from prunebench.report.specifications import rounded, shown
from prunebench.report.wording import coded, sort_key
from prunebench.results.beside import HEADINGS, Beside
from prunebench.results.board import build_board
from prunebench.results.leaderboard import cells, columns, table_title
from prunebench.results.published import load_published
from prunebench.results.records import EvalSpec, Failure, RunRecord
from prunebench.results.store import ResultStore, Stored

VOID = {"meta", "link", "input", "br", "hr", "img"}
FOREIGN = {"circle", "rect", "path"}
"""Of SVG, which close themselves."""

PUBLISHED = Path(__file__).parents[1] / "results" / "published"

MOST_BYTES = 6_000_000
MOST_SECONDS = 20.0


class Reader(HTMLParser):
    """Reads a page as a browser does: elements, attributes, texts of cells, scripts."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.scripts: list[tuple[dict[str, str], str]] = []
        self.headings: list[int] = []
        self.tables: list[list[list[str]]] = []
        self.text: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if re.fullmatch(r"h[1-6]", tag) and "dialog" not in self.open:
            self.headings.append(int(tag[1]))
        if tag == "script":
            self.scripts.append(({name: value or "" for name, value in attrs}, ""))
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag not in VOID | FOREIGN:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in FOREIGN:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + data)
        elif {"td", "th"} & {*self.open}:
            self.tables[-1][-1][-1] += data
        else:
            self.text.append(data)

    @property
    def data(self) -> dict[str, Any]:
        return dict(json.loads(next(text for facts, text in self.scripts if facts.get("id") == "data")))


@pytest.fixture(scope="module")
def records() -> list[RunRecord]:
    return many(147)  # all of one model


@pytest.fixture(scope="module")
def page(records: list[RunRecord]) -> str:
    return page_of(records)


@pytest.fixture(scope="module")
def read(page: str) -> Reader:
    return Reader(page)


# The file


def test_five_hundred_records_are_small_and_quick() -> None:
    records = many(500)
    board = board_of(records)  # its statistics are the board's own time
    started = time.perf_counter()
    text = to_html(board, records, figures(board, records))
    seconds = time.perf_counter() - started
    assert len(records) == 500
    assert len(Reader(text).data["records"]) == 500
    assert len(text.encode()) < MOST_BYTES
    assert seconds < MOST_SECONDS


def test_equal_records_give_equal_bytes(records: list[RunRecord], page: str) -> None:
    assert page_of(records[::-1]) == page


def test_it_is_well_formed_and_says_what_it_is(read: Reader, page: str) -> None:
    assert page.startswith('<!doctype html>\n<html lang="en">')
    assert page.count("<title>prunebench: pruning methods compared</title>") == 1
    assert read.headings[0] == 1
    assert read.headings.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(read.headings, read.headings[1:], strict=False))
    scopes = [value for tag, name, value in read.attributes if tag == "th" and name == "scope"]
    assert {*scopes} == {"row", "col"}
    assert len(scopes) == page.count("<th ")


def test_ids_are_there_once(read: Reader) -> None:
    ids = [value for _, name, value in read.attributes if name == "id"]
    assert len(ids) == len({*ids})
    inside = {value[1:] for _, name, value in read.attributes if name == "href" and value.startswith("#")}
    assert inside <= {*ids}


def test_it_refers_to_nothing_outside(page: str, read: Reader) -> None:
    without_data = re.sub(r"(?s)<script.*?</script>", "", page)
    links = [value for _, name, value in read.attributes if name in ("href", "src", "srcset", "action", "poster", "data")]
    assert links
    assert all(value.startswith(("#", "data:")) for value in links)
    assert not re.search(r"url\(|@import|https?://", without_data)
    assert not re.search(r"fetch\(|XMLHttpRequest|WebSocket|sendBeacon|import\(", read.scripts[-1][1])


def test_only_its_own_two_scripts_may_run(page: str, read: Reader) -> None:
    policy = next(
        value for tag, name, value in read.attributes if tag == "meta" and name == "content" and "script-src" in value
    )
    (data, _), (packed, plotly), (own, script) = read.scripts
    assert (data["type"], packed["type"], own) == ("application/json", "text/plain", {})
    assert gzip.decompress(base64.b64decode(plotly)).decode() == get_plotlyjs()
    for text in (script, get_plotlyjs()):
        assert f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" in policy
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-eval" not in policy
    assert "connect-src" not in policy


def test_no_records_are_a_page_too() -> None:
    read = Reader(page_of([]))
    assert "There are no results yet" in "".join(read.text)
    assert read.tables == []


# What strangers write

EVIL = (
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "javascript:alert(1)",
    "\"'><svg onload=alert(1)>",
    "{{ 7 * 7 }} {% raw %} ${1} `x`",
    "<!-- <script> ]]> \u2028\u2029\u202e\x00\x1b[31m",
    "<a href='javascript:alert(1)'>x</a> %{x} &lt;b&gt;",
)


def hostile(evil: str) -> list[RunRecord]:
    """Records with this in every text that is theirs to choose."""
    found = []
    for method, target, seed in (("dense", "dense", None), (f"wanda[x={evil}]", "0.5", 0), (evil, "0.6", 1), (evil, "0.5", 0)):
        record = run_of(method, target, seed, model=f"m {evil}", machine=f"box {evil}")
        conditions = record.spec.evals[0].conditions | {"data": evil, evil: evil, "attention": evil, "dtype": evil}
        model = record.spec.model.model_copy(update={"source": evil, "dtype": evil, "weights": evil})
        text = record.spec.recipe.calibration and record.spec.recipe.calibration.model_copy(
            update={"name": evil, "split": evil}
        )
        recipe = record.spec.recipe.model_copy(update={"calibration": text, "sampler": evil})
        evals = (EvalSpec(text=evil, revision=1, conditions=conditions),)
        spec = record.spec.model_copy(update={"model": model, "recipe": recipe, "evals": evals})
        score = record.scores["perplexity"].model_copy(
            update={"conditions": conditions, "unit": f"unit {evil}", "parts": {evil: 1.0}, "items_file": evil}
        )
        step = record.steps[0].model_copy(
            update={"pruner": evil, "distribution": evil, "version": evil, "options": {evil: evil}, "notes": {evil: [evil]}}
            | {"phases": {evil: 1.0, "update": 2.0}, "reused": [evil]}
        )
        made = record.provenance.model_copy(
            update={"suite": evil, "tuned": evil, "command": f"prunebench run {evil}", "commit": evil, "packages": {evil: evil}}
            | {"python": evil, "platform": evil, "device": evil, "driver": evil, "executor": evil, "started": evil}
        )
        audit = record.audit and record.audit.model_copy(
            update={
                "matrices": [
                    one.model_copy(update={"name": f"layers.{i}.{evil}"}) for i, one in enumerate(record.audit.matrices)
                ]
            }
        )
        changes = {"spec": spec, "scores": {evil: score}, "steps": [step], "provenance": made, "audit": audit, "id": spec.id}
        found.append(record.model_copy(update=changes))
    failure = Failure(kind="error", type=evil, message=evil, step=evil)
    failed = {"status": "failed", "failure": failure, "reason": evil, "scores": {}, "steps": [], "audit": None, "id": "f" * 12}
    refused = {"status": "refused", "reason": evil, "scores": {}, "steps": [], "audit": None, "id": "e" * 12}
    return [*found, found[1].model_copy(update=failed), found[1].model_copy(update=refused)]


@pytest.mark.parametrize("evil", EVIL)
def test_what_strangers_write_is_text_and_nothing_else(evil: str) -> None:
    text = page_of(hostile(evil))
    read, clean = Reader(text), Reader(page_of(hostile("x")))
    assert len(read.scripts) == 3
    assert {tag for tag, _, _ in read.attributes} <= {tag for tag, _, _ in clean.attributes}
    assert {name for _, name, _ in read.attributes} == {name for _, name, _ in clean.attributes}
    assert not any(name.startswith("on") for _, name, _ in read.attributes)
    hrefs = [value for _, name, value in read.attributes if name in ("href", "src")]
    assert all(value.startswith(("#", "data:,")) for value in hrefs)
    assert not re.search("[\u2028\u2029\x00\x1b\u202e]", text)
    assert "alert" not in read.scripts[-1][1]
    assert "<" not in read.scripts[0][1]
    for chart in read.data["charts"]:  # plotly reads tags
        texts = [[trace.get("name"), trace.get("text")] for trace in chart["data"]]
        assert "<" not in json.dumps([chart["layout"], texts])


def test_strangers_texts_are_kept_as_they_are() -> None:
    evil = EVIL[0]
    read = Reader(page_of(hostile(evil)))
    assert any(evil in cell for table in read.tables for row in table for cell in row)
    assert any(evil in json.dumps(group, ensure_ascii=False).replace("\\", "") for group in read.data["groups"])
    assert any(name == "data-tip" and evil in value for _, name, value in read.attributes)


def test_plotly_gets_no_tags() -> None:
    assert shown("a <b> & c\n\x1b") == "a &lt;b&gt; &amp; c \\x1b"


def test_json_in_a_page_ends_nothing() -> None:
    data = {"a": "</script><!--&\u2028\u2029", "b": [1, None, "é"]}
    assert not {*"<>&\u2028\u2029"} & {*as_json(data)}
    assert json.loads(as_json(data)) == data


# Tables


def test_page_and_board_never_differ(records: list[RunRecord], read: Reader) -> None:
    tables = iter(read.tables)
    for section in board_of(records).sections:
        for table in section.tables:
            heading, *rows = next(tables)
            assert heading == columns(section, table)
            assert rows == [cells(section, table, row) for row in table.rows]
    assert list(tables) == []


def test_bold_is_whom_nobody_beats(records: list[RunRecord], page: str) -> None:
    best = [
        row
        for section in board_of(records).sections
        for table in section.tables
        for row in table.rows
        if row.rank and row.rank.best
    ]
    assert best
    assert page.count('<tr class="best"') == len(best)


def test_a_row_says_its_interval_seeds_and_runs(read: Reader) -> None:
    tips = [value.split("\n") for _, name, value in read.attributes if name == "data-tip"]
    tip = next(tip for tip in tips if tip[0] == "sparsegpt")
    assert re.fullmatch(r"perplexity \d+\.\d\d ± \d+\.\d\d", tip[1])
    assert re.fullmatch(r"vs dense % \+[\d.]+ \[\+?[-\d.]+, \+[\d.]+\], 95% interval, p [\d.e-]+", tip[2])
    assert any(re.fullmatch(r"seeds 0, 1, 2: [\d.]+, [\d.]+, [\d.]+", line) for line in tip)
    assert re.fullmatch(r"runs [0-9a-f]{12}, [0-9a-f]{12}, [0-9a-f]{12}", tip[-1])


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("", None),
        ("–", None),
        ("deterministic", None),
        ("31.81", 31.81),
        ("1,234.50", 1234.5),
        ("102.18 ± 0.35", 102.18),
        ("+2.2 [+0.4, +4.0]", 2.2),
        ("-0.3 [-1.5, +1.0]", -0.3),
        ("220.66*", 220.66),
        ("3", 3.0),
        ("3-15", 3.0015),
        ("12.5 / 3.0", 12.5),
        ("51.20 ≈", 51.2),
    ],
)
def test_cells_are_sorted_by_their_numbers(text: str, key: float | None) -> None:
    assert sort_key(text) == (None if key is None else pytest.approx(key))


def test_notes_are_parted_at_code() -> None:
    assert coded("Reproduce: `prunebench run x`.") == [
        {"text": "Reproduce: ", "code": False},
        {"text": "prunebench run x", "code": True},
        {"text": ".", "code": False},
    ]


# Records


def test_every_row_and_point_leads_to_its_records(read: Reader) -> None:
    data = read.data
    named = {key for _, name, value in read.attributes if name == "data-runs" for key in value.split()}
    named |= {key for point in data["points"] for key in point["runs"]}
    assert named == data["records"].keys()
    for record in data["records"].values():
        assert all(0 <= place < len(data["groups"]) for place in record["groups"])
        titles = [data["groups"][place]["title"] for place in record["groups"]]
        assert titles[0] == "Result"
        assert titles[-2:] == ["Provenance", "Packages"]


def test_equal_groups_are_kept_once(read: Reader) -> None:
    groups = [json.dumps(group) for group in read.data["groups"]]
    assert len(groups) == len({*groups})
    assert sum(group["title"] == "Packages" for group in read.data["groups"]) <= 2


def test_one_id_on_two_machines() -> None:
    one, other = run_of("wanda", "0.5", 0, machine="box"), run_of("wanda", "0.5", 0, machine="a bigger box")
    panels = Panels.of([one, other], lambda record: "checked")
    assert one.id == other.id
    assert [*panels.records] == [f"box/{one.id}", f"a-bigger-box/{one.id}"]
    assert panels.keys([one.id], "a bigger box") == [f"a-bigger-box/{one.id}"]
    assert panels.keys([one.id]) == [f"box/{one.id}"]
    assert panels.keys(["unknown"]) == []
    assert ["trust", "checked"] in [list(fact) for fact in panels.groups[0]["facts"]]


def test_what_is_in_no_table_is_listed() -> None:
    assert "out of memory in block 3" in page_of([run_of("gblm", "0.9", 0, status="failed", reason="out of memory in block 3")])
    refused = page_of([run_of("wanda", "0.9", 0, status="refused", reason="its widths are odd")])
    assert "Refused runs" in refused
    assert "its widths are odd" in refused
    old = [run_of("wanda", "0.5", 0), run_of("dense", "dense", None)]
    board = build_board([Stored(f"{record.id}.json", record) for record in old], {"wanda": 2})
    outdated = to_html(board, old, figures(board, old))
    assert "Outdated runs" in outdated
    assert old[0].id in Reader(outdated).data["records"]


@pytest.mark.parametrize(
    ("command", "again"),
    [
        ("prunebench run wiki7m --results …/out", "prunebench run wiki7m --only 'tiny wanda 0.5, seed 0' --again"),
        ("prunebench run a/b.toml --only x --jobs 2", "prunebench run a/b.toml --only 'tiny wanda 0.5, seed 0' --again"),
        (
            "prunebench run wiki7m --method 'wanda' --again --model m",
            "prunebench run wiki7m --method wanda --model m --only 'tiny wanda 0.5, seed 0' --again",
        ),
        ("prunebench run 'x; rm -rf ~'", "prunebench run 'x; rm -rf ~' --only 'tiny wanda 0.5, seed 0' --again"),
        ("prunebench run", None),
        ("rm -rf ~", None),
        ("prunebench run 'open", None),
        ("prunebench run --results x", None),
    ],
)
def test_the_command_that_reruns_a_run(command: str, again: str | None) -> None:
    record = make_record(make_spec())
    made = record.provenance.model_copy(update={"command": command})
    assert rerun(record.model_copy(update={"provenance": made})) == again


def test_published_numbers_stand_beside_ours() -> None:
    number = next(one for one in load_published(PUBLISHED) if one.comparable)
    placed = [Beside(number, "off", ours=number.value + 1, seeds=3), Beside(number, "not run")]
    read = Reader(page_of([], placed))
    assert read.tables == [[[*HEADINGS], list(placed[0].cells())]]
    assert "reproduced 0, off 1, not run 1" in "".join(read.text)


# Figures


def test_a_trade_off_has_its_front_bands_and_published_numbers(records: list[RunRecord]) -> None:
    board = board_of(records)
    drawn = figures(board, records).sections[0].tradeoffs[0]
    figure = type(drawn)(**{**vars(drawn), "published": (Hollow("Paper, table 1", "wanda", "0.5", 70.0),)})
    chart = tradeoff_chart(figure, Palette([mark.method for mark in figure.marks]), list)
    front, *points, hollow = chart["data"]
    assert front["mode"] == "lines"
    assert len(front["x"]) == len(figure.front)
    assert front["x"] == sorted(front["x"])
    assert len(points) == len(figure.marks)
    assert all(point["error_y"]["array"][0] > 0 for point in points)
    assert hollow["marker"]["symbol"] == "circle-open"
    assert hollow["customdata"][0]["runs"] == []
    assert chart["layout"]["dense"] == figure.dense
    assert "lower is better" in chart["label"]


def test_curves_have_a_logarithmic_axis_and_patterns_beside_them(records: list[RunRecord]) -> None:
    board = board_of(records)
    curves = figures(board, records).sections[0].curves
    assert curves is not None
    chart = curves_chart(curves, Palette([curve.method for curve in curves.curves]), list)
    assert chart["layout"]["yaxis"]["type"] == "log"
    assert chart["layout"]["xaxis"]["ticktext"] == ["50%", "60%", "70%", "2:4", "4:8"]
    assert chart["layout"]["xaxis"]["tickvals"] == sorted(chart["layout"]["xaxis"]["tickvals"])
    dotted = [trace for trace in chart["data"] if trace.get("line", {}).get("dash") == "dot"]
    assert dotted == []  # what was retrained has one target only
    assert any(item["name"].endswith(", retrained") and item["methods"] == [TRAINED] for item in chart["legend"])


def test_bars_of_phases_add_up(records: list[RunRecord]) -> None:
    board = board_of(records)
    bars = figures(board, records).sections[0].phases[0]
    chart = phases_chart(bars, list)
    assert [trace["name"] for trace in chart["data"]] == list(bars.phases)
    assert len(chart["layout"]["annotations"]) == len(bars.methods)
    assert chart["layout"]["xaxis"]["range"][1] >= max(map(sum, zip(*bars.phases.values(), strict=True)))


def test_heat_maps_are_short(records: list[RunRecord]) -> None:
    board = board_of(records)
    figure = figures(board, records).heats[0]
    chart = heat_chart(figure, list)
    assert chart["grid"]["across"] == [str(block) for block in range(8)]
    assert "customdata" not in chart["data"][0]
    assert len(as_json(chart)) < 3000


@pytest.mark.parametrize(
    "values",
    [
        [1.0],
        [0.0],
        [-3.0, 5.0],
        [0.001, 4000.0],
        [53.9, 69.1],
        [1e-9, 2e-9],
        [100.0, 100.001],
        [float("nan"), 2.0],
        [],
        [1e300],
    ],
)
@pytest.mark.parametrize("always", [True, False])
def test_axes_hold_their_values_and_have_ticks(values: list[float], always: bool) -> None:
    axis = value_axis(values, always=always)
    assert axis.low < axis.high
    assert all(axis.low <= value <= axis.high for value in values if value == value)
    assert 1 <= len(axis.ticks) <= 12
    assert all(axis.low <= tick <= axis.high for tick in axis.ticks)
    assert not axis.logarithmic or axis.low > 0


def test_a_method_looks_the_same_everywhere() -> None:
    palette = Palette(["wanda", "wanda + perp[steps=3]", "theirs", "others"])
    assert palette.look("wanda").colour == palette.look("wanda + perp").colour == palette.look("wanda[a=1]").colour == 0
    assert palette.look("wanda").shape != palette.look("wanda + perp").shape
    assert palette.look("dense + perp").colour == INK
    assert palette.look("theirs").colour != palette.look("others").colour
    assert family("wanda[a=1] + perp[b=2]") == "wanda + perp"


def luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def custom(page: str, theme: int) -> dict[str, str]:
    """The page's own colours: light, or dark."""
    blocks = re.findall(r"--ground: [^}]*", page)
    return dict(re.findall(r"--([a-z0-9]+): (#[0-9a-f]{6})", blocks[theme]))


@pytest.mark.parametrize("theme", [0, 1])
def test_texts_and_marks_stand_out(page: str, theme: int) -> None:
    own = custom(page, theme)
    assert {"ground", "surface", "ink", "soft", "accent", "wash"} <= own.keys()
    for paper in ("ground", "surface", "wash"):
        assert all(contrast(own[text], own[paper]) >= 4.5 for text in ("ink", "soft", "accent"))
    assert all(contrast(pair[theme], own["surface"]) >= 3.0 for pair in COLOURS)


def test_both_ways_into_the_dark_are_one(page: str) -> None:
    _, forced, preferred = re.findall(r"--ground: [^}]*", page)
    assert re.sub(r"\s+", " ", forced).strip() == re.sub(r"\s+", " ", preferred).strip()
    assert {"calibration", "training", "other"} <= PHASES.keys()


# The command


def test_the_command_writes_the_page(tmp_path: Path, command: Callable[..., Ran]) -> None:
    store = ResultStore(tmp_path / "results", pytest.fail)
    for record in (run_of("dense", "dense", None), run_of("wanda", "0.5", 0), run_of("magnitude", "0.5", None)):
        store.write(record)
    file = tmp_path / "out" / "report.html"
    ran = command("report", "--results", tmp_path / "results", "--html", file)
    assert ran.code == 0
    assert str(file) in ran.out.replace("\n", "")
    read = Reader(file.read_text(encoding="utf-8"))
    assert len(read.data["records"]) == 3
    assert ["trust", "reported"] in read.data["groups"][0]["facts"]
    assert [path.name for path in file.parent.iterdir()] == ["report.html"]


def test_long_lists_are_cut_and_counted() -> None:
    record = run_of("wanda", "0.5", 0)
    step = record.steps[0].model_copy(update={"notes": {f"note {index}": "x" * 5000 for index in range(200)}})
    [group] = [g for g in Panels.of([record.model_copy(update={"steps": [step]})]).groups if g["title"] == "Step: wanda"]
    assert len(group["facts"]) == MOST_FACTS + 1
    assert group["facts"][-1] == ["…", f"{200 + 4 - MOST_FACTS} more"]
    assert group["facts"][50][1].endswith("… (5,000 characters)")


def test_pairs_of_methods_find_room_or_are_counted(records: list[RunRecord], monkeypatch: pytest.MonkeyPatch) -> None:
    board = board_of(records)
    drawn = figures(board, records)
    pair = replace(drawn.heats[0], what=OVERLAP, method="a / b")
    heats = (*[pair] * 3, *drawn.heats[:2])
    one = len(as_json(rounded(heat_chart(drawn.heats[0], lambda ids: [*ids]))))
    monkeypatch.setattr(page_module, "MOST_HEATS", int(3.5 * one))
    text = to_html(board, records, replace(drawn, heats=heats))
    assert "2 more pairs of methods found no room on this page." in text
    assert text.count(": sparsity %</option>") == 2
    assert text.count(">a / b: overlap of removed weights</option>") == 1


def test_titles_of_tables_lead_to_figures(records: list[RunRecord]) -> None:
    board = board_of(records)
    drawn = figures(board, records).sections
    for section, own in zip(board.sections, drawn, strict=True):
        titles = {f"{section.title}, {table_title(table)}" for table in section.tables}
        assert {figure.title for figure in (*own.tradeoffs, *own.phases)} <= titles

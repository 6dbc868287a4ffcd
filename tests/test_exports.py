"""The board as CSV, LaTeX and JSON: what stands in them, that strangers' text stays text, and that others can read them."""

from __future__ import annotations

import csv
import io
import json
import math
import random
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from support import C4_TEXT, CONDITIONS, cases, make_record, make_spec

from prunebench.results.beside import beside
from prunebench.results.board import Board, build_board
from prunebench.results.exports import EXPORT_SCHEMA, ExportedBoard, exported, to_json
from prunebench.results.latex import MOST_PARTS, latex, to_latex
from prunebench.results.published import load_published
from prunebench.results.records import Recipe, RunRecord, SampleRecord
from prunebench.results.sheet import COLUMNS, to_csv
from prunebench.results.sheet_text import defused
from prunebench.results.store import Stored

RESULTS = Path(__file__).parents[1] / "results"
LOSSES = SampleRecord(column="nll", exponential=True, documents="document")
ANSWERS = SampleRecord(column="right", strata="stratum", tasks="task")
HOSTILE = "=cmd|' /C calc'!A1 \\end{table} $x_1^2$ 50% #1 ~a & \"b\" <c> `d` é 中 \n\x1b[2J"
TRAINED = Recipe(training=C4_TEXT, training_tokens=4096)


def losses(method: str, target: str, seed: int | None, above: float, recipe: Recipe | None = None, **changes: Any) -> RunRecord:
    """A run whose 60 windows lose `above` more than those of a common text, and a little at random."""
    noise = np.random.default_rng([0 if seed is None else seed + 1, len(method)])
    nll = np.random.default_rng(7).normal(4, 0.5, 60) + above + noise.normal(0, 0.01, 60) * (above > 0)
    made = make_record(make_spec(method, target, seed, recipe=recipe), **changes)
    items = {"nll": nll.tolist(), "document": [index // 3 for index in range(60)]}
    return scored(made, items=items, sample=LOSSES, value=math.exp(nll.mean()))


def answers(method: str, target: str, right: Sequence[int], tasks: int = 2) -> RunRecord:
    """A run's answers to so many tasks of as many questions each."""
    task = [f"task_{index * tasks // len(right)}" for index in range(len(right))]
    parts = {name: float(np.mean([r for r, t in zip(right, task, strict=True) if t == name])) for name in dict.fromkeys(task)}
    items = {"right": list(right), "task": task, "stratum": task, "choices": [2] * len(right)}
    value = float(np.mean(list(parts.values())))
    made = make_record(make_spec(method, target, None), unit="accuracy", higher_is_better=True)
    return scored(made, items=items, sample=ANSWERS, value=value, parts=parts)


def scored(record: RunRecord, **changes: Any) -> RunRecord:
    [(name, score)] = record.scores.items()
    return record.model_copy(update={"scores": {name: score.model_copy(update=changes)}})


def board(*records: RunRecord) -> Board:
    return build_board(Stored(f"box/tiny/{index:03}.json", record) for index, record in enumerate(records))


def perplexities() -> list[RunRecord]:
    """Three targets; wanda and random cannot be told apart, magnitude is worse; one method is at one target only."""
    found = [losses("dense", "dense", None, 0.0)]
    for target, more in (("0.5", 0.0), ("0.6", 0.1), ("2:4", 0.2)):
        found += [losses("magnitude", target, None, 0.3 + more, shared_machine=True)]
        found += [losses("wanda", target, seed, 0.2 + more) for seed in range(3)]
        found += [losses("random", target, seed, 0.2 + more) for seed in range(3)]
    return [*found, losses("perp[steps=60,learning_rate=0.003]", "2:4", 0, 0.5)]


def questions(tasks: int = 2) -> list[RunRecord]:
    draw = np.random.default_rng(3)
    right = (draw.random(240) < 0.9).astype(int)
    worse = right * (draw.random(240) < 0.6)
    return [answers("dense", "dense", right.tolist(), tasks), answers("magnitude", "0.5", worse.tolist(), tasks)]


def rows(found: Board) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(to_csv(found))))


# CSV


def test_every_row_of_every_table_is_a_line_of_raw_numbers() -> None:
    found = board(*perplexities())
    lines = rows(found)
    assert len(lines) == sum(len(table.rows) for section in found.sections for table in section.tables) == 3 * 4 + 1
    [wanda] = [line for line in lines if line["method"] == "wanda" and line["target"] == "0.5"]
    [row] = [row for row in found.sections[0].tables[0].rows if row.method == "wanda"]
    assert row.versus is not None
    assert row.rank is not None
    assert float(wanda["value"]) == row.mean
    assert float(wanda["standard_deviation"]) == row.spread
    assert float(wanda["difference"]) == math.expm1(row.versus.estimate)
    assert float(wanda["difference_low"]) == math.expm1(row.versus.low)
    assert wanda["difference_unit"] == "share of dense"
    assert (wanda["rank_low"], wanda["rank_high"], wanda["best"]) == ("1", "2", "True")
    assert (wanda["seeds"], wanda["ids"].split(";")) == ("3", list(row.ids))
    assert (wanda["machine"], wanda["model"], wanda["unit"]) == ("box", "tiny", "perplexity")
    assert wanda["evaluation"] == "perplexity on Salesforce/wikitext (wikitext-2-raw-v1, test), window 512"
    assert (wanda["prune_seconds"], wanda["peak_bytes"], wanda["costs_ranked"]) == ("2.0", str(300 << 20), "True")
    assert (wanda["sparsity_prunable"], wanda["sparsity_total"], wanda["coverage"]) == ("0.5", "0.25", "0.996")
    assert list(wanda) == list(COLUMNS)


def test_what_there_is_not_is_empty() -> None:
    lines = rows(board(*perplexities()))
    dense, magnitude = lines[0], next(line for line in lines if line["method"] == "magnitude")
    assert (dense["method"], dense["pruned"], dense["seeds"]) == ("dense", "False", "0")
    for name in ("standard_deviation", "rank_low", "best", "difference", "difference_unit", "tuned", "training", "parts"):
        assert dense[name] == "", name
    assert (magnitude["standard_deviation"], magnitude["costs_ranked"], magnitude["best"]) == ("", "False", "False")


def test_questions_have_flips_and_parts_and_their_own_unit() -> None:
    [_, line] = rows(board(*questions()))
    assert line["difference_unit"] == line["unit"] == "accuracy"
    assert -1 < float(line["difference_low"]) < float(line["difference"]) < float(line["difference_high"]) < 0
    assert 0 < float(line["right_to_wrong"]) < 1
    assert json.loads(line["parts"]).keys() == {"task_0", "task_1"}


def test_pandas_reads_the_numbers_back() -> None:
    frame = pd.read_csv(io.StringIO(to_csv(board(*perplexities()))))
    assert frame["value"].dtype == frame["difference_high"].dtype == frame["prune_seconds"].dtype == np.float64
    assert frame["pruned"].dtype == np.bool_
    assert frame.groupby("target")["value"].min().round(3).to_dict().keys() == {"0.5", "0.6", "2:4"}


@pytest.mark.parametrize(
    ("text", "cell"),
    [
        ("=1+2", "'=1+2"),
        ("+1", "'+1"),
        ("-1", "'-1"),
        ("@SUM(A1)", "'@SUM(A1)"),
        ("\t=1", "' =1"),
        ("\r\n=1", "'  =1"),
        (" =1", "' =1"),
        ("＝1+2", "'＝1+2"),
        ("'=1", "''=1"),
        ("wanda", "wanda"),
        ("a=1", "a=1"),
        ("", ""),
    ],
)
def test_no_text_is_a_formula(text: str, cell: str) -> None:
    assert defused(text) == cell


def test_nothing_of_strangers_is_a_formula_or_a_line_of_its_own() -> None:
    conditions = CONDITIONS | {"data": HOSTILE}
    spec = make_spec(HOSTILE, conditions=conditions, model=HOSTILE)
    text = to_csv(board(make_record(spec, machine=HOSTILE, unit=HOSTILE)))
    assert "\x1b" not in text
    [line] = list(csv.reader(io.StringIO(text)))[1:]
    for cell in line:
        assert not cell.startswith(("=", "+", "-", "@", "\t", "\r")), cell
    assert len(text.splitlines()) == 2


# JSON


def test_json_is_the_whole_board_and_fits_its_schema() -> None:
    refused = make_record(make_spec("wanda", "4:8"), status="refused", reason="172 is no multiple of 8.")
    failed = make_record(make_spec("gblm"), status="failed", kind="oom")
    text = to_json(board(*perplexities(), refused, failed))
    data = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert data["schema"] == EXPORT_SCHEMA
    [section] = data["sections"]
    assert (section["conditions"]["window"], section["unit"], section["higher_is_better"]) == (512, "perplexity", False)
    assert [table["target"] for table in section["tables"]] == ["0.5", "0.6", "2:4"]
    row = next(row for row in section["tables"][0]["rows"] if row["method"] == "wanda")
    assert (row["seeds"], len(row["values"]), row["best"]) == ([0, 1, 2], 3, True)
    assert [run["reason"] for run in data["refused"]] == ["172 is no multiple of 8."]
    assert [run["method"] for run in data["failed"]] == ["gblm"]
    assert ExportedBoard.model_validate_json(text) == exported(board(*perplexities(), refused, failed))


def test_the_schema_says_of_every_field_what_it_is() -> None:
    schema = ExportedBoard.model_json_schema()
    for name, part in {"board": schema, **schema["$defs"]}.items():
        for field, fact in part.get("properties", {}).items():
            assert fact.get("description"), f"{name}.{field}"
    assert "schema" in schema["properties"]
    assert all(COLUMNS.values())


def test_what_is_no_number_is_null() -> None:
    none = scored(losses("wanda", "0.5", 0, 0.1), value=None)
    data = json.loads(to_json(board(losses("dense", "dense", None, 0.0), none)))
    row = data["sections"][0]["tables"][0]["rows"][1]
    assert (row["value"], row["values"], row["difference"]) == (None, [None], {
        "estimate": None,
        "low": None,
        "high": None,
        "unit": "share of dense",
    })  # fmt: skip
    few = [scored(record, items={name: values[:2] for name, values in next(iter(record.scores.values())).items.items()})
           for record in (losses("wanda", "0.5", 0, 0.1), losses("gblm", "0.5", 0, 0.2))]  # fmt: skip
    [table] = json.loads(to_json(board(losses("dense", "dense", None, 0.0), *few)))["sections"][0]["tables"]
    assert table["detectable"] is None


def test_published_numbers_are_there_with_their_status() -> None:
    papers = load_published(RESULTS / "published")
    found = exported(board(), beside(papers, [])).published
    assert len(found) == len(papers)
    assert {one.status for one in found} == {"not run", "not comparable", "copy"}
    assert all(one.ours is None for one in found)


@pytest.mark.parametrize("write", [to_csv, to_latex, to_json])
def test_equal_records_give_equal_bytes(write: Any) -> None:
    files = [Stored(f"box/tiny/{n:03}.json", record) for n, record in enumerate([*perplexities(), *questions()])]
    expected = write(build_board(files))
    random.Random(0).shuffle(files)
    assert write(build_board(files)) == expected


# LaTeX

COMMANDS = {
    *("begin", "end", "centering", "setlength", "belowcaptionskip", "tabcolsep", "caption", "label", "small", "footnotesize"),
    *("scriptsize", "multicolumn", "cmidrule", "toprule", "midrule", "bottomrule", "textbf", "texttt", "rlap", "pm", "dagger"),
    *("par", "smallskip", "linewidth", "raggedright", "times", "approx", "mu", "ldots", "textbackslash", "textasciitilde"),
    *("textasciicircum", "textless", "textgreater", "textbar", "c", "r", "v"),
}
SIGNS = set("\\{}$&#%_, `'^~\"")
TOKEN = re.compile(r"\\(?:[A-Za-z]+|.)|[{}$&#_^~]|[^\\{}$&#_^~]+", re.DOTALL)


def faults(text: str) -> list[str]:
    """What of LaTeX is not as strict as what we write: environments, braces, columns, bare specials, commands not ours."""
    body = "\n".join(line for line in text.splitlines() if not line.startswith("%"))
    found = [] if text.isascii() else ["not plain ASCII"]
    if re.search(r"(?<!\\)%", body):
        found.append("a comment in the midst of text")
    inside: list[str] = []
    math_on = False
    for token in TOKEN.findall(body):
        if token == "{":
            inside.append("{")
        elif token == "}":
            if not inside or inside.pop() != "{":
                found.append("a brace too many")
        elif token == "$":
            math_on = not math_on
        elif token in "#~" or (token in "_^" and not math_on):
            found.append(f"a bare {token}")
        elif token.startswith("\\") and token[1:] not in COMMANDS | SIGNS:
            found.append(f"the command {token}")
    if inside or math_on:
        found.append("something is left open")
    names: list[str] = []
    for kind, name in re.findall(r"\\(begin|end)\{(\w+)\}", body):
        if kind == "begin":
            names.append(name)
        elif not names or names.pop() != name:
            found.append(f"{name} ends and did not begin")
    found += [f"{name} does not end" for name in names]
    outside = re.sub(r"\\begin\{tabular\}.*?\\end\{tabular\}", "", body, flags=re.DOTALL)
    if re.search(r"(?<!\\)&", outside):
        found.append("an & outside a table")
    for inner in re.findall(r"\\begin\{tabular\}(.*?)\\end\{tabular\}", body, re.DOTALL):
        found += column_faults(inner)
    return found


def column_faults(inner: str) -> list[str]:
    spec, body = inner.split("\n", 1)
    wanted = len(re.findall(r"[lcr]", re.sub(r"@\{.*?\}", "", spec)))
    rows = re.sub(r"\\(toprule|midrule|bottomrule|cmidrule\(\w+\)\{[-\d]+\}) ?\n?", "", body).split(r" \\")
    assert not rows[-1].strip()
    found = []
    for row in rows[:-1]:
        if row.strip().startswith(("[", "*")):
            found.append(f"a row that \\\\ takes for its option: {row}")
        cells = re.split(r"(?<!\\)&", row)
        widths = [int(each[1]) if (each := re.match(r"\s*\\multicolumn\{(\d+)\}\{", cell)) else 1 for cell in cells]
        if sum(widths) != wanted:
            found.append(f"{sum(widths)} columns, not {wanted}: {row.strip()}")
    return found


def latex_rows(text: str) -> dict[str, str]:
    """Lines of tables by the name of their method, without type."""
    lines = [line for line in text.splitlines() if line.endswith(r" \\") and "&" in line]
    plainly = [re.sub(r"\\scriptsize|\\rlap|[{}$]", "", line.removesuffix(r" \\")) for line in lines]
    return {cells[0].strip(): " ".join(map(str.strip, cells[1:])).strip() for cells in (line.split("&") for line in plainly)}


def test_targets_stand_side_by_side_under_the_dense_model() -> None:
    text = to_latex(board(*perplexities()))
    assert faults(text) == []
    assert text.count(r"\begin{table}") == 1
    found = latex_rows(text)
    assert found["Method"] == r"\multicolumn2c50\% \multicolumn2c60\% \multicolumn2c2:4"
    assert list(found)[1:3] == ["Method", "dense"]
    assert r" & \multicolumn{4}{c}{unstructured} & \multicolumn{2}{c}{$N{:}M$} \\" in text
    assert r"\cmidrule(lr){2-5} \cmidrule(lr){6-7}" in text
    assert found["dense"].startswith(r"\multicolumn6c")
    assert found["perp^a"].startswith(r"\multicolumn2c-- \multicolumn2c--")
    assert r"$^{a}$\,perp[steps=60, learning\_rate=0.003]." in text


def test_bold_and_daggers_rest_on_tests() -> None:
    found = latex_rows(to_latex(board(*perplexities())))
    assert found["magnitude"].count("textbf") == 0
    bold = {name: row.count("textbf") for name, row in found.items() if name in ("wanda", "random")}
    daggers = {name: row.count("dagger") for name, row in found.items() if name in ("wanda", "random")}
    assert bold == {"wanda": 3, "random": 3}
    assert sum(daggers.values()) == 3, "at each target one of the two has the better mean"
    assert r"\,\pm\," in found["wanda"]
    assert r"\pm" not in found["magnitude"]


def test_a_caption_says_what_a_reader_needs() -> None:
    found = board(*perplexities())
    [caption] = re.findall(r"\\caption\{(.*)\}\n", to_latex(found))
    data = exported(found).sections[0]
    for part in (
        "tiny: perplexity on Salesforce/wikitext (wikitext-2-raw-v1, test), window 512 (lower is better).",
        "740 windows of 512 tokens, float32.",
        r"Calibration: 128 $\times$ 512 tokens of allenai/c4 (en, train).",
        "Means over 1 to 3 seeds with their standard deviation; deterministic methods ran once.",
        "paired tests over the same windows, with Holm's correction",
        rf"Conditions \texttt{{{data.conditions_fingerprint}}}, recipe \texttt{{{data.recipe_fingerprint}}}, machine box.",
        r"$^{\dagger}$",
    ):
        assert part in caption


def test_one_target_has_room_for_intervals_ranks_and_costs() -> None:
    records = [record for record in perplexities() if record.spec.target in ("dense", "0.5")]
    text = to_latex(board(*records))
    assert faults(text) == []
    found = latex_rows(text)
    assert re.fullmatch(r"\\textbf[\d.]+ \\,\\pm\\,[\d.]+ \+[\d.]+ \[\+[\d.]+, \+[\d.]+\] 1--2 2.00 300", found["random"]) or (
        re.fullmatch(r"\\textbf[\d.]+ \\,\\pm\\,[\d.]+ \+[\d.]+ \[\+[\d.]+, \+[\d.]+\] 1--2 2.00 300", found["wanda"])
    )
    assert found["magnitude"].endswith(r"3 2.00^* 300^*")
    assert "others took cores" in text


def test_tasks_have_columns_while_there_is_room() -> None:
    few, many = to_latex(board(*questions(3))), to_latex(board(*questions(MOST_PARTS + 1)))
    assert faults(few) == faults(many) == []
    assert r"task\_2" in few
    assert r"task\_" not in many
    assert "paired tests" not in few, "one row has no rank"


def test_retrained_rows_have_a_table_of_their_own_under_their_controls() -> None:
    records = [
        *perplexities(),
        losses("dense + perp", "dense", 0, 0.01, TRAINED),
        losses("magnitude + perp", "0.5", 0, 0.1, TRAINED),
        losses("magnitude + perp", "0.6", 0, 0.12, TRAINED),
    ]
    text = to_latex(board(*records))
    assert faults(text) == []
    first, second = text.split(r"\begin{table}")[1:]
    assert "retrained on 4,096 tokens of allenai/c4" in second
    assert "retrained" not in first
    assert list(latex_rows(second))[1:] == ["Method", "dense", "dense + perp", "magnitude + perp"]
    labels = re.findall(r"\\label\{(.*?)\}", text)
    assert len(set(labels)) == 2


def test_more_targets_than_fit_are_another_table() -> None:
    targets = ["0.1", "0.2", "0.3", "0.4", "0.5", "0.6", "0.7", "2:4"]
    text = to_latex(board(losses("dense", "dense", None, 0.0), *(losses("magnitude", target, None, 0.1) for target in targets)))
    assert faults(text) == []
    assert text.count(r"\begin{table}") == 2
    assert len(set(re.findall(r"\\label\{(.*?)\}", text))) == 2


def test_a_dense_model_that_knows_nothing_has_no_table() -> None:
    silent = [scored(record, conditions=CONDITIONS | {"eval": "generation", "least_of_dense": 0.99}) for record in questions()]
    text = to_latex(board(*silent))
    assert r"\begin" not in text
    assert "% No tables: The dense model gets" in text


@pytest.mark.parametrize(
    ("text", "written"),
    cases(
        {
            "specials": (r"a_b & 50% #1 {x} $y$ \z", r"a\_b \& 50\% \#1 \{x\} \$y\$ \textbackslash{}z"),
            "signs": ("~ ^ < > |", r"\textasciitilde{} \textasciicircum{} \textless{} \textgreater{} \textbar{}"),
            "ligatures": ("--a ,,b ''c", r"-{}-a ,{},b '{}'c"),
            "accents": ("é ñ Ü", r"\'{e} \~{n} \"{U}"),
            "other scripts": ("中", "(U+4E2D)"),
            "lines": ("a\n\nb\x1b", r"a b\textbackslash{}x1b"),
        }
    ),
)
def test_text_becomes_plain_tex(text: str, written: str) -> None:
    assert latex(text) == written


def hostile() -> Board:
    conditions = CONDITIONS | {"data": HOSTILE, "dtype": HOSTILE}
    recipe = Recipe(calibration=C4_TEXT.model_copy(update={"name": HOSTILE}), samples=4, length=16)
    records = []
    for target in ("0.5", "2:4"):
        for method in (HOSTILE, f"[x={HOSTILE}]", "*", f"a[note={HOSTILE}] + b[c=1]"):
            spec = make_spec(method, target, conditions=conditions, model=HOSTILE, recipe=recipe)
            records.append(make_record(spec, machine=HOSTILE, unit=HOSTILE))
    return board(*records)


def test_strangers_cannot_write_tex() -> None:
    text = to_latex(hostile())
    assert faults(text) == []
    assert len(re.findall(r"(?m)^\\end\{table\}$", text)) == 1


@pytest.mark.parametrize(
    "wrong",
    [
        r"\begin{table} x_1 \end{table}",
        r"\begin{table} \input{x} \end{table}",
        r"\begin{table} 5 % x \end{table}",
        r"\begin{table} $x \end{table}",
        r"\begin{table} } \end{table}",
        r"\begin{table}",
        "\\begin{tabular}{lr}\na & b & c \\\\\n\\end{tabular}",
        "\\begin{tabular}{lr}\n[a & b \\\\\n\\end{tabular}",
        "a & b",
        "é",
    ],
)
def test_the_check_finds_faults(wrong: str) -> None:
    assert faults(wrong)


ENGINE = next(filter(None, map(shutil.which, ("pdflatex", "tectonic", "lualatex", "xelatex"))), None)


@pytest.mark.skipif(ENGINE is None, reason="no TeX engine here (pdflatex, tectonic, lualatex, xelatex)")
def test_tex_takes_it(tmp_path: Path) -> None:
    assert ENGINE is not None
    tables = "\n\\clearpage\n".join(to_latex(found) for found in (board(*perplexities()), board(*questions(7)), hostile()))
    text = f"\\documentclass{{article}}\n\\usepackage{{booktabs}}\n\\begin{{document}}\n{tables}\\end{{document}}\n"
    (tmp_path / "paper.tex").write_text(text, encoding="ascii")
    options = [] if ENGINE.endswith("tectonic") else ["-interaction=nonstopmode", "-halt-on-error"]
    ran = subprocess.run([ENGINE, *options, "paper.tex"], cwd=tmp_path, capture_output=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stdout[-2000:]
    assert (tmp_path / "paper.pdf").stat().st_size > 10_000

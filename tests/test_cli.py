"""The commands: what they do, and one sentence and exit code 2 for every request that cannot be met."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from support import Bench, Ran, cases, run_command, tree
from transformers import AutoModelForCausalLM, AutoTokenizer

import prunebench
from prunebench import plugins
from prunebench.cli.running import _limited
from prunebench.results.content import checksum
from prunebench.results.records import RunRecord
from prunebench.results.store import ResultStore
from prunebench.spec import Job, Needs, Pruner
from prunebench.targets import parse_target
from prunebench.toolkit import keep_mask, magnitude_scores, walk

Command = Callable[..., Ran]
COMMANDS = ("list", "run", "show", "report", "export", "prune", "eval")


@dataclass
class Stranger(Pruner):
    """Prunes by magnitude, or fails first."""

    name: ClassVar[str] = "stranger"

    how: str = "well"

    def needs(self) -> Needs:
        return Needs.CALIBRATION

    def prune(self, job: Job) -> None:
        SEEN.append(job.calibration)
        if self.how == "raise":
            raise ValueError("it broke\nin two lines, the second of which is long enough for any terminal that there is " * 2)
        if self.how == "exit":
            raise SystemExit(0)
        for block in walk(job):
            for matrix in block.matrices:
                matrix.keep(keep_mask(magnitude_scores(matrix.weight), job.target, group="row"))


SEEN: list[torch.Tensor] = []


@pytest.fixture(autouse=True)
def here(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to stand in, but for a suite and a few files that cannot be used."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    SEEN.clear()
    Path("small.toml").write_text(bench.suite_text("dense", "magnitude", "wanda"))
    Path("misspelt.toml").write_text(bench.suite_text("dense").replace("samples", "sampels"))
    Path("binary.toml").write_bytes(b"\x00\xff\xfe")
    for name in ("calibration", "evaluation"):
        Path(f"{name}.txt").symlink_to(bench.folder / f"{name}.txt")
    Path("tiny").symlink_to(bench.model)
    return tmp_path


@pytest.fixture
def traps(here: Path, bench: Bench) -> None:
    """Files and folders that cannot be used."""
    np.save("outside.npy", np.full((4, 16), 300))
    np.save("negative.npy", np.full((4, 16), -1))
    np.save("broken-numbers.npy", np.ones((4, 16)))
    np.save("flat.npy", np.ones(16, dtype=np.int64))
    np.save("long.npy", np.ones((4, 65), dtype=np.int64))
    np.save("pickle.npy", np.array([{}], dtype=object), allow_pickle=True)
    Path("text.npy").write_text("this is no array")
    Path("short.txt").write_text("= A =\n\nSome words here.\n= B =\n\nOther words are here.\n= C =\n\nThe end.\n")
    Path("empty.txt").touch()
    Path("latin.txt").write_bytes(b"caf\xe9")
    Path("file").touch()
    for name in ("full", "no-model", "no-weights", "pickled", "with-code", "cut"):
        Path(name).mkdir()
    Path("full/something").touch()
    for name in ("no-weights", "pickled", "with-code", "cut"):
        shutil.copy(bench.model / "config.json", name)
    Path("pickled/pytorch_model.bin").touch()
    Path("with-code/config.json").write_text('{"auto_map": {"AutoModelForCausalLM": "theirs.Model"}}')
    shutil.copy(bench.model / "model.safetensors", "with-code")
    Path("cut/config.json").write_text('{"model_type": "lla')
    shutil.copy(bench.model / "model.safetensors", "cut")


PRUNE = "prune tiny --out out --samples 4 --length 16 --calibration calibration.txt"
TOKENS = "prune tiny --out out --step wanda --target 0.5 --calibration-tokens"
WANDA = "prune tiny --out out --step wanda --target 0.5"
PERP = "prune tiny --out out --step magnitude --step perp --target 0.5"

WRONG = {
    "unknown pruner": (
        f"{PRUNE} --step wnada --target 0.5",
        "there is no pruner 'wnada'; did you mean 'wanda'? Known: dense, ",
    ),
    "unknown pruner of run": ("run small.toml --method magnitud", "there is no pruner 'magnitud'; did you mean 'magnitude'?"),
    "unknown option": (
        f"{PRUNE} --step magnitude[grup=row] --target 0.5",
        "magnitude has no option 'grup'; did you mean 'group'? Its options: group (matrix | row).",
    ),
    "option of one without any": (f"{PRUNE} --step wanda[x=1] --target 0.5", "wanda has no option 'x'. Its options: none."),
    "wrong option": (f"{PRUNE} --step magnitude[group=column] --target 0.5", "the option group is matrix | row, and 'column'"),
    "unreadable step": (f"{PRUNE} --step magnitude[group --target 0.5", "cannot read the step 'magnitude[group'"),
    "no step": ("run small.toml --method ''", "a method needs at least one step."),
    "all": (
        f"{PRUNE} --step wanda --target 1.0",
        "the target 1.0 is out of range: a share of zeros is at least 0 and below 1.",
    ),
    "negative": (f"{PRUNE} --step wanda --target=-0.1", "the target '-0.1' is not one: write a share of zeros like 0.5"),
    "turned round": (f"{PRUNE} --step wanda --target 4:2", "the target 4:2 is out of range: N:M keeps N of every M weights"),
    "none kept": (f"{PRUNE} --step wanda --target 0:4", "the target 0:4 is out of range"),
    "word": (f"{PRUNE} --step wanda --target abc", "the target 'abc' is not one"),
    "dense has no target": (f"{PRUNE} --step dense --target 0.5", "the steps dense prune nothing, so the target 0.5 cannot be"),
    "misspelt suite": (
        "run misspelt.toml",
        "the suite misspelt.toml, at calibration.sampels: there is no key 'sampels'; did you",
    ),
    "binary suite": ("run binary.toml", "the suite binary.toml cannot be read as TOML"),
    "suite that is no suite": ("run file", "the suite file lacks suite."),
    "missing suite": ("run nosuch.toml", "there is no suite 'nosuch.toml'. Known: llama-2-7b, "),
    "nearly a suite": ("run quickstat", "there is no suite 'quickstat'; did you mean 'quickstart'?"),
    "missing model": ("prune huge --step magnitude --target 0.5 --out out", "there is no model 'huge': no folder of that name"),
    "missing model of eval": ("eval ./huge", "there is no model './huge'"),
    "missing model of run": ("run small.toml --model huge", "there is no model 'huge'"),
    "hub model": ("eval org/huge", "the Hub model org/huge needs a revision"),
    "folder without model": ("eval ./no-model", "./no-model is a folder without a config.json"),
    "folder without weights": ("eval no-weights", "the folder of no-weights holds no .safetensors file."),
    "pickled weights": (
        "eval pickled",
        "pickled has only pickled weights (pytorch_model.bin), which can run any code; convert",
    ),
    "code": ("eval with-code", "with-code wants to run code that comes with it; allow it by name (--allow remote-code)"),
    "cut settings": ("eval cut", "cut/config.json cannot be read"),
    "foreign tokens": (f"{TOKENS} outside.npy", "outside.npy holds the token 300, outside the model's vocabulary of 300."),
    "negative tokens": (f"{TOKENS} negative.npy", "negative.npy holds the token -1, outside the model's vocabulary of 300."),
    "no tokens": (f"{TOKENS} broken-numbers.npy", "broken-numbers.npy must hold integers, and holds float64."),
    "flat tokens": (f"{TOKENS} flat.npy", "flat.npy must hold [samples, length] token ids, and its shape is [16]."),
    "long tokens": (f"{TOKENS} long.npy", "calibration sequences of 65 tokens are longer than the model's context of 64."),
    "long training": (
        f"{PERP} --training long.npy",
        "training sequences of 65 tokens are longer than the model's context of 64.",
    ),
    "no training": (PERP, "needs training text, and the suite has no [training] (`prune` takes --training)."),
    "pickled tokens": (f"{TOKENS} pickle.npy", "pickle.npy cannot be read as a numpy array"),
    "text for tokens": (f"{TOKENS} text.npy", "text.npy cannot be read as a numpy array"),
    "missing tokens": (f"{TOKENS} missing.npy", "the file missing.npy does not exist"),
    "text file for tokens": (
        f"{TOKENS} calibration.txt",
        "--calibration-tokens takes a file whose name ends with .npy, not 'calib",
    ),
    "short text": (
        f"{WANDA} --calibration short.txt --samples 8 --length 60",
        "8 samples of 60 tokens need at least 2 documents longer than that, and 0 of 3 are; the longest usable length is 19.",
    ),
    "few documents": (f"{WANDA} --calibration short.txt --samples 80 --length 2", "there are too few documents for any length"),
    "beyond the context": (f"{WANDA} --calibration calibration.txt --length 65", "longer than the model's context of 64."),
    "missing text": (f"{WANDA} --calibration missing.txt", "the file missing.txt does not exist"),
    "empty text": (f"{WANDA} --calibration empty.txt", "the file empty.txt is empty."),
    "text of another time": (f"{WANDA} --calibration latin.txt", "the file latin.txt cannot be read as UTF-8 text"),
    "unknown text": (f"{WANDA} --calibration c5", "there is no text source 'c5'; did you mean 'c4'?"),
    "text beyond reach": (WANDA, "cannot be loaded from the Hub"),
    "output not empty": (f"{WANDA} --out full", "the output folder full exists and is not empty; name another."),
    "output is a file": (f"{WANDA} --out file", "the output folder file exists and is not empty; name another."),
    "output under a file": (f"{WANDA} --out file/out", "the output folder file/out cannot be made"),
    "unknown pruner and a deep output": (
        f"{PRUNE} --step wnada --target 0.5 --out a/b/c",
        "there is no pruner 'wnada'",
    ),
    "results under a file": ("run small.toml --results file/results", "the results folder file/results cannot be written"),
    "results is a file": ("run small.toml --results file", "the results folder file cannot be written"),
    "board under a file": ("report --results . --out file/board.md", "nothing can be written to file: file is no folder."),
    "page that is a folder": ("report --results . --html tiny", "tiny cannot be written: it is a folder."),
    "drawings in a file": ("report --results . --plots file", "nothing can be written to file: file is no folder."),
    "board of no folder": ("report --results nosuch --out board.md", "there is no folder nosuch, so there are no records"),
    "export of no folder": ("export out --results nosuch", "there is no folder nosuch, so there are no records to export."),
    "export over other things": ("export full --results .", "the folder full holds other things, for example"),
    "export to a file": ("export file --results .", "file is no folder."),
    "export of nothing": ("export out --results full", "there are no records, and so no data set."),
    "time limit of this process": (
        "run small.toml --executor inline --timeout 9",
        "--timeout needs --executor subprocess: nothing can stop",
    ),
    "memory limit of this process": (
        "run small.toml --executor inline --memory 9",
        "--memory needs --executor subprocess: nothing can stop",
    ),
    "several at a time in this process": (
        "run small.toml --executor inline --jobs 2",
        "--jobs 2 needs another --executor than inline, which has one process.",
    ),
    "several on one GPU": ("run small.toml --device cuda:99 --jobs 2", "the device cuda:99 is not there"),
    "an ending that there is not": (
        "run small.toml --retry ooms",
        "there is no ending 'ooms'; did you mean 'oom'? Known: audit, error, failed, killed, nan, oom, refused, timeout.",
    ),
    "a Ray for others": ("run small.toml --ray-address auto --machine x --device cpu", "--ray-address needs --executor ray."),
    "a cluster without a name": (
        "run small.toml --executor slurm --device cuda",
        "runs on a cluster need --machine, a name for its nodes, and --device, cpu or cuda: neither can be seen from here.",
    ),
    "a Ray cluster whose device nobody said": (
        "run small.toml --executor ray --ray-address auto --machine nodes",
        "runs on a cluster need --machine",
    ),
    "Slurm that is not told how long": (
        "run small.toml --executor slurm --device cuda --machine nodes --dry-run",
        "how long",
    ),
    "no GPU": ("run small.toml --device cuda:99", "the device cuda:99 is not there: this machine has"),
    "unknown device": ("run small.toml --device tpu", "cuda:N+M for several GPUs or cuda+ for all, not 'tpu'."),
    "device of another kind": ("eval tiny --device meta", "cuda:N+M for several GPUs or cuda+ for all, not 'meta'."),
    "unknown dtype": (
        f"{PRUNE} --step wanda --target 0.5 --dtype float8",
        "--dtype is one of float32, bfloat16, float16, float64,",
    ),
    "unknown dtype of eval": ("eval tiny --dtype int8", "--dtype is one of"),
    "unknown executor": (
        "run small.toml --executor inlin",
        "there is no executor 'inlin'; did you mean 'inline'? Known: inline,",
    ),
    "nothing matches": (
        "run small.toml --only sparsegpt",
        "no run of small.toml contains 'sparsegpt'; runs are called, for example, 'tiny wanda 0.5, seed 0'.",
    ),
    "unknown record": ("show abc", "no record in results has an id that begins with 'abc'."),
    "allow": (
        f"{PRUNE} --step wanda --target 0.5 --allow everything",
        "--allow is one of pickle, remote-code, not 'everything'.",
    ),
    "allow of eval": ("eval tiny --allow everything", "--allow is one of pickle, remote-code, not 'everything'."),
    "unknown evaluation": (
        "eval tiny --eval perplexit",
        "there is no evaluation 'perplexit'; did you mean 'perplexity'? Known: ",
    ),
    "option of an evaluation": (
        "eval tiny --eval perplexity[widow=8]",
        "perplexity has no option 'widow'; did you mean 'window'?",
    ),
    "window of one": ("eval tiny --eval perplexity[window=1]", "a window is at least 2 tokens"),
    "window beyond the context": ("eval tiny --eval perplexity[data=evaluation.txt,window=65]", "the model's context of 64."),
    "text shorter than a window": ("eval tiny --eval perplexity[data=short.txt,window=60]", "fewer than one window of 60."),
    "refused": (f"{PRUNE} --step wanda --target 3:5", "16 input columns, not a multiple of 5, so 3:5 has no meaning for it."),
}


@pytest.mark.usefixtures("traps")
@pytest.mark.parametrize(("line", "said"), cases(WRONG))
def test_a_wrong_request_is_one_sentence_and_writes_nothing(line: str, said: str, here: Path, command: Command) -> None:
    before = tree(here)
    ran = command(*shlex.split(line))
    assert said in ran.complaint
    assert tree(here) == before


USAGE = {
    "unknown flag": ("run small.toml --nosuch", "No such option"),
    "unknown command": ("rnu small.toml", "No such command"),
    "missing argument": ("run", "Missing argument"),
    "missing option": ("prune tiny --step wanda --out out", "Missing option"),
    "word for a number": (f"{PRUNE} --step wanda --target 0.5 --seed first", "Invalid value for '--seed'"),
    "number out of range": (f"{PRUNE} --step wanda --target 0.5 --batch-size 0", "Invalid value for '--batch-size'"),
    "no time": ("run small.toml --timeout 0", "Invalid value for '--timeout'"),
    "nothing": ("", ""),
}


@pytest.mark.parametrize(("line", "said"), cases(USAGE))
def test_a_wrong_command_line_ends_with_2(line: str, said: str, here: Path, command: Command) -> None:
    before = tree(here)
    ran = command(*shlex.split(line))
    assert ran.code == 2
    assert said in ran.err
    assert "Traceback" not in ran.err + ran.out
    assert tree(here) == before


@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_a_terminal_and_shows_an_example(name: str, command: Command) -> None:
    ran = command(name, "--help")
    assert (ran.code, ran.err) == (0, "")
    assert max(map(len, ran.out.splitlines())) <= 80
    assert f"Example: prunebench {name}" in ran.out
    assert "…" not in ran.out.replace("opt=value,…", "").replace("step[…]", "")


def test_help_keeps_the_brackets(command: Command) -> None:
    """They are markup to the library that prints them."""
    assert "NAME[opt=value,…]" in command("prune", "--help").out
    told = command("eval", "--help").out
    assert "NAME[opt=value,…]" in told
    assert "perplexity[data=text.txt,window=256]" in told


def test_help_lists_every_command(command: Command) -> None:
    ran = command("--help")
    assert (ran.code, ran.err) == (0, "")
    assert max(map(len, ran.out.splitlines())) <= 80
    for name in COMMANDS:
        assert re.search(rf"│ {name} ", ran.out)


def test_version(command: Command) -> None:
    assert command("--version") == Ran(0, f"{prunebench.__version__}\n", "")


def test_debug_shows_where_it_went_wrong(command: Command) -> None:
    ran = command("--debug", "run", "nosuch")
    assert ran.code == 2
    assert ran.err.startswith("Traceback (most recent call last):")
    assert "load_suite" in ran.err
    assert ran.err.endswith("\nerror: there is no suite 'nosuch'. Known: " + ran.err.rpartition("Known: ")[2])


@pytest.mark.slow
def test_the_real_command_says_the_same(here: Path) -> None:
    before = tree(here)
    ran = run_command("run", "small.toml", "--method", "magnitud", cwd=here)
    assert "did you mean 'magnitude'?" in ran.complaint
    assert ran.out == ""
    assert tree(here) == before
    traced = run_command("--debug", "run", "nosuch", cwd=here)
    assert traced.code == 2
    assert "Traceback" in traced.err


# list


def test_list_as_json(command: Command) -> None:
    ran = command("list", "--json")
    assert (ran.code, ran.err) == (0, "")
    found = json.loads(ran.out)
    assert {"dense", "random", "magnitude", "wanda"} <= found["pruners"].keys()
    assert {"quickstart", "wiki7m"} <= set(found["suites"])
    assert found["broken"] == []
    magnitude = found["pruners"]["magnitude"]
    assert (magnitude["distribution"], magnitude["revision"]) == ("prunebench", 1)
    assert magnitude["summary"] == "Remove the entries of smallest magnitude."
    assert magnitude["options"][0].items() >= {"name": "group", "type": "matrix | row", "default": "matrix"}.items()
    assert [option["name"] for option in found["evals"]["perplexity"]["options"]] == ["data", "window", "windows"]


def test_list_shows_options_and_what_failed_to_load(
    command: Command, register: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    register(Stranger)
    broken = plugins.Broken("theirs", "their-plugin", "ImportError: no module named 'x[y]'")
    monkeypatch.setattr(plugins.load_registry(), "broken", [broken])
    ran = command("list")
    assert (ran.code, ran.err) == (0, "")
    told = " ".join(ran.out.split())
    for part in (
        "magnitude Remove the entries of smallest magnitude. prunebench",
        "group = matrix matrix | row;",
        "stranger Prunes by magnitude, or fails first. their-plugin 1.2.3",
        "perplexity Perplexity of a causal language model on a text.",
        "suites llama-2-7b",
        "theirs (their-plugin): ImportError: no module named 'x[y]'",
    ):
        assert part in told
    assert json.loads(command("list", "--json").out)["broken"] == [vars(broken)]


# run


def records(folder: Path | str = "results") -> list[RunRecord]:
    complaints: list[str] = []
    found = [stored.record for stored in ResultStore(Path(folder), complaints.append).all()]
    assert complaints == []
    return found


def test_run_does_what_is_missing(here: Path, command: Command) -> None:
    ran = command("run", "small.toml", "--executor", "inline", "--only", "dense")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.splitlines()[0] == "1 run to do."
    assert re.search(r"^\[  1/1\] ok tiny dense: perplexity [\d.]+  \([\d.]+ s\)$", ran.out, re.MULTILINE)
    ran = command("run", "small.toml", "--executor", "inline")
    assert ran.code == 0
    assert ran.out.splitlines()[0] == "2 runs to do; 1 found done."
    assert ran.out.splitlines()[-1] == "2 ok, 0 refused, 0 failed; records in results."
    before = tree(here)
    assert command("run", "small.toml", "--executor", "inline") == Ran(0, "0 runs to do; 3 found done.\n", "")
    assert tree(here) == before
    assert [record.status for record in records()] == ["ok"] * 3
    assert {record.provenance.command for record in records()} == {
        "prunebench run small.toml --executor inline --only dense",
        "prunebench run small.toml --executor inline",
    }


def test_again_and_another_machine(command: Command) -> None:
    arguments = ("run", "small.toml", "--executor", "inline", "--only", "magnitude", "--machine")
    command(*arguments, "My Machine")
    assert {path.parent.parent.name for path in Path("results").glob("*/*/*.json")} == {"my-machine"}
    assert command(*arguments, "My Machine", "--again").out.startswith("1 run to do.\n")
    assert command(*arguments, "other").out.startswith("1 run to do.\n")
    assert command(*arguments, "other").out.startswith("0 runs to do; 1 found done.\n")
    assert len(records()) == 3


def test_one_command_warns_once_of_a_broken_record(done: list[RunRecord], command: Command) -> None:
    path = next(Path("results").glob("here/tiny/wanda*.json"))
    path.write_text(path.read_text()[:1000])
    for more in ((), ("--again",), ("--retry", "failed")):
        ran = command("run", "small.toml", "--machine", "here", "--dry-run", *more)
        assert re.fullmatch(r"warning: skipped here/tiny/wanda[^\n]*\n", ran.err)


def test_checkpoints_are_found_from_any_folder(tmp_path: Path, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = ResultStore(Path("results"), pytest.fail)
    [request] = _limited(bench.requests(tmp_path, "magnitude"), store, timeout=None, memory=None, checkpoint_every=1, keep=None)
    assert Path(request.checkpoints or "").parent == tmp_path / "results" / ".journal"


def test_dry_run_writes_nothing(here: Path, command: Command) -> None:
    before = tree(here)
    ran = command("run", "small.toml", "--dry-run")
    assert (ran.code, ran.err) == (0, "")
    lines = ran.out.splitlines()
    for line, label in zip(lines, ("tiny dense", "tiny magnitude 0.5", "tiny wanda 0.5, seed 0"), strict=False):
        assert re.fullmatch(rf" to do  [0-9a-f]{{12}} +\d+ s +\d+ MiB  {label}", line)
    assert lines[3] == "3 to do, 0 done; nothing was run."
    assert tree(here) == before
    command("run", "small.toml", "--executor", "inline", "--only", "dense")
    before = tree(here)
    ran = command("run", "small.toml", "--dry-run")
    (done,) = records()
    assert re.search(rf"(?m)^  done  {done.id} +tiny dense$", ran.out)
    assert "2 to do, 1 done; nothing was run." in ran.out
    assert tree(here) == before


def test_a_failed_run_ends_with_1_and_a_refused_one_does_not(command: Command, register: Callable[..., None]) -> None:
    register(Stranger)
    arguments = ("run", "small.toml", "--executor", "inline", "--method")
    ran = command(*arguments, "stranger[how=raise]", "--method", "magnitude")
    assert (ran.code, ran.err) == (1, "")
    assert "2 ok, 0 refused, 1 failed" in ran.out
    Path("small.toml").write_text(Path("small.toml").read_text().replace('"0.5"', '"3:5"'))
    ran = command(*arguments, "magnitude")
    assert (ran.code, ran.err) == (0, "")
    assert "0 ok, 1 refused, 0 failed" in ran.out
    assert sorted(record.status for record in records()) == ["failed", "ok", "ok", "refused"]


def test_methods_and_models_of_the_command_line(here: Path, bench: Bench, command: Command) -> None:
    shutil.copytree(bench.model, here / "other")
    method = "magnitude[group=row] + random"
    ran = command("run", "small.toml", "--executor", "inline", "--model", "other", "--model", "tiny", "--method", method)
    assert ran.code == 0
    found = {record.spec.method: record for record in records()}
    assert {record.spec.model.name for record in records()} == {"other"}, "the same weights"
    assert set(found) == {"dense", method}, "a table needs the dense model, asked for or not"
    assert [step.pruner for step in found[method].steps] == ["magnitude", "random"]


# show and report


@pytest.fixture
def done(command: Command) -> list[RunRecord]:
    """Three records."""
    command("run", "small.toml", "--executor", "inline", "--machine", "here")
    return records()


def test_show_finds_a_record_by_its_first_digits(done: list[RunRecord], command: Command) -> None:
    (record,) = [record for record in done if record.spec.method == "wanda"]
    length = next(n for n in range(1, 13) if sum(other.id.startswith(record.id[:n]) for other in done) == 1)
    ran = command("show", record.id[:length])
    assert (ran.code, ran.err) == (0, "")
    told = " ".join(ran.out.split())
    for part in (
        f"tiny, wanda at 0.5, seed 0, on here (`{record.id}`)",
        "status ok",
        "calibration 4 x 16 of calibration.txt",
        "step wanda revision 1 (prunebench",
        "zeros 50.0000% of prunable weights",
        f"perplexity {record.scores['perplexity'].value:.6g}",
        "made by prunebench run small.toml --executor inline --machine here",
    ):
        assert part in told
    assert command("show", record.id).out == ran.out


def test_show_shows_all_that_begin_so(done: list[RunRecord], command: Command) -> None:
    out = command("show", "").out
    assert [record.id in out for record in done] == [True] * 3


def test_report_prints_the_board_and_writes_it(done: list[RunRecord], here: Path, command: Command) -> None:
    before = tree(here)
    ran = command("report")
    assert (ran.code, ran.err) == (0, "")
    for part in ("tiny: perplexity on evaluation.txt, window 16", "50% unstructured", "dense", "magnitude", "wanda"):
        assert part in ran.out
    assert tree(here) == before
    ran = command("report", "--out", "board/leaderboard.md")
    assert (ran.code, ran.err) == (0, "")
    first = Path("board/leaderboard.md").read_bytes()
    for record in done:
        assert f"{record.scores['perplexity'].value:.2f}" in first.decode()
    command("report", "--out", "again.md")
    assert Path("again.md").read_bytes() == first
    assert tree(here).keys() - before.keys() == {"board", "board/leaderboard.md", "again.md"}


def test_report_of_one_section_and_as_a_picture(done: list[RunRecord], command: Command) -> None:
    assert "tiny: perplexity" in command("report", "--only", "evaluation.txt").out
    assert "tiny: perplexity" not in command("report", "--only", "nothing like it").out
    assert command("report", "--picture", "board.svg").code == 0
    picture = Path("board.svg").read_text(encoding="utf-8")
    assert picture.startswith("<svg")
    assert "magnitude" in picture
    assert "url(http" not in picture


def test_the_board_and_the_records_for_other_programs(done: list[RunRecord], command: Command) -> None:
    ran = command("report", "--csv", "board.csv", "--latex", "board.tex", "--json", "board.json", "--only", "evaluation.txt")
    assert (ran.code, ran.err) == (0, "")
    methods = {record.spec.method for record in done}
    assert {line.split(",")[1] for line in Path("board.csv").read_text().splitlines()} == {"model", "tiny"}
    rows = [row for table in json.loads(Path("board.json").read_text())["sections"][0]["tables"] for row in table["rows"]]
    assert {row["method"] for row in rows} == methods
    assert "\\toprule" in Path("board.tex").read_text()
    ran = command("export", "set")
    assert (ran.code, ran.err) == (0, "")
    assert f"rows: runs {len(done)}, " in ran.out
    assert {path.name for path in Path("set").iterdir()} == {"README.md", "runs.parquet", "scores.parquet", "matrices.parquet"}


def test_report_without_records(command: Command) -> None:
    Path("results").mkdir()
    ran = command("report", "--out", "board.md")
    assert (ran.code, ran.err) == (0, "")
    assert "There are no results yet" in ran.out
    assert "There are no results yet" in Path("board.md").read_text()


def test_a_broken_record_is_skipped_with_a_warning(done: list[RunRecord], command: Command) -> None:
    path = next(Path("results").glob("here/tiny/wanda*.json"))
    path.write_text(path.read_text()[:1000])
    ran = command("report")
    assert ran.code == 0
    assert re.fullmatch(r"warning: skipped here/tiny/wanda[^\n]*\n", ran.err)
    assert "magnitude" in ran.out


# prune


def pruned(command: Command, *more: Any, step: str = "wanda", target: str = "0.5", out: str = "out") -> Ran:
    return command(*PRUNE.replace("--out out", "").split(), "--step", step, "--target", target, "--out", out, *more)


@pytest.mark.parametrize("target", ["0.5", "0.3", "2:4", "4:8", "0.50", "3e-1"])
def test_prune_writes_a_model_that_transformers_loads(target: str, bench: Bench, command: Command) -> None:
    ran = pruned(command, target=target)
    assert (ran.code, ran.err) == (0, "")
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in Path("out").iterdir()} == names | {"prunebench.json", "mask.safetensors"}
    model, dense = (AutoModelForCausalLM.from_pretrained(folder) for folder in ("out", bench.model))
    matrices = {name for name, _ in dense.named_parameters() if "proj" in name}
    assert len(matrices) == 14
    wanted = parse_target(target)
    for (name, weight), (_, before) in zip(model.named_parameters(), dense.named_parameters(), strict=True):
        if name not in matrices:
            assert torch.equal(weight, before)
            continue
        gone = weight == 0
        assert torch.equal(weight[~gone], before[~gone])
        if ":" in target:
            keep, of = map(int, target.split(":"))
            assert ((~gone).view(-1, of).sum(dim=1) == keep).all()
        else:
            assert (gone.sum(dim=1) == int(float(target) * weight.shape[1])).all()
    ids = AutoTokenizer.from_pretrained("out")("Leon lost at chess.", return_tensors="pt")["input_ids"]
    assert torch.equal(ids, AutoTokenizer.from_pretrained(bench.model)("Leon lost at chess.", return_tensors="pt")["input_ids"])
    assert torch.isfinite(model(input_ids=ids).logits).all()
    content = json.loads(Path("out/prunebench.json").read_text())
    assert content["checksum"] == checksum(content)
    del content["checksum"]
    record = RunRecord.model_validate(content)
    assert (record.status, record.spec.method, record.spec.target) == ("ok", "wanda", str(wanted))
    assert record.audit is not None
    zeros = sum(int((parameter == 0).sum()) for name, parameter in model.named_parameters() if name in matrices)
    assert record.audit.zeros == record.audit.removed == zeros


def test_masks_are_bits_in_c_order(command: Command) -> None:
    pruned(command, target="0.3")
    weights = load_file("out/model.safetensors")
    with safe_open("out/mask.safetensors", framework="np") as file:
        facts = file.metadata()
        shapes = json.loads(facts["shapes"])
        assert facts["format"] == "prunebench-mask-1"
        assert set(file.keys()) == set(shapes) == {name.removesuffix(".weight") for name in weights if "proj" in name}
        for name, (rows, columns) in shapes.items():
            packed = file.get_tensor(name)
            assert packed.dtype == np.uint8
            assert packed.shape == (-(-rows * columns // 8),)
            keep = np.unpackbits(packed)[: rows * columns].reshape(rows, columns).astype(bool)
            assert np.array_equal(keep, weights[f"{name}.weight"].numpy() != 0)
            assert keep.sum() == rows * (columns - int(columns * 0.3))


def test_token_files_are_used_as_they_are(bench: Bench, command: Command, register: Callable[..., None]) -> None:
    register(Stranger)
    tokens = np.random.default_rng(0).integers(0, 300, (5, 24)).astype(np.uint16)
    np.save("mine.npy", tokens)
    ran = pruned(command, "--calibration-tokens", "mine.npy", "--seed", 3, step="stranger")
    assert ran.code == 0
    assert len(SEEN) == 1
    assert torch.equal(SEEN[0], torch.from_numpy(tokens.astype(np.int64)))
    recipe = written_record().spec.recipe
    assert recipe.calibration is not None
    assert (recipe.sampler, recipe.samples, recipe.length, recipe.calibration.name) == ("as given", 5, 24, "mine.npy")


def test_calibration_text_is_sampled_by_the_seed(command: Command, register: Callable[..., None]) -> None:
    register(Stranger)
    for seed, out in ((0, "a"), (1, "b"), (0, "c")):
        assert pruned(command, "--seed", seed, step="stranger", out=out).code == 0
    one, other, again = SEEN
    assert one.shape == (4, 16)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_the_same_request_gives_the_same_bytes(command: Command) -> None:
    for out in ("a", "b"):
        pruned(command, out=out)
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert Path("a", name).read_bytes() == Path("b", name).read_bytes()
    one, other = load_file("a/mask.safetensors"), load_file("b/mask.safetensors")
    assert all(torch.equal(one[name], other[name]) for name in one.keys() | other.keys())


def test_steps_are_taken_in_order(command: Command, register: Callable[..., None]) -> None:
    register(Stranger)
    assert pruned(command, "--step", "magnitude[group=row]", step="stranger").code == 0
    record = written_record()
    assert record.spec.method == "stranger + magnitude[group=row]"
    assert [step.pruner for step in record.steps] == ["stranger", "magnitude"]


def test_prune_fills_an_empty_folder_and_makes_those_above(command: Command) -> None:
    Path("out").mkdir()
    assert pruned(command).code == 0
    assert pruned(command, out="a/b/c").code == 0
    assert Path("out/config.json").read_bytes() == Path("a/b/c/config.json").read_bytes()
    assert {path.stat().st_mode & 0o777 for path in Path("out").iterdir()} == {0o644}


def test_dense_can_be_written_too(bench: Bench, command: Command) -> None:
    assert pruned(command, step="dense", target="dense").code == 0
    before, after = load_file(bench.model / "model.safetensors"), load_file("out/model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert load_file("out/mask.safetensors") == {}


def test_the_dtype_is_that_asked_for(command: Command) -> None:
    assert pruned(command, "--dtype", "bfloat16").code == 0
    assert {tensor.dtype for name, tensor in load_file("out/model.safetensors").items()} == {torch.bfloat16}
    assert written_record().spec.model.dtype == "bfloat16"


def test_a_refused_pruning_writes_nothing(here: Path, command: Command) -> None:
    before = tree(here)
    ran = pruned(command, target="3:5", out="a/out")
    assert ran.complaint.endswith("so 3:5 has no meaning for it. Nothing was written.\n")
    assert tree(here) == before


@pytest.mark.parametrize(
    ("how", "said"), [("raise", "it broke in two lines, the second"), ("exit", "error: sys.exit was called, with '0'.")]
)
def test_a_failed_pruning_ends_with_1_and_writes_nothing(
    how: str, said: str, here: Path, command: Command, register: Callable[..., None]
) -> None:
    """Also where a method ends the program as if all were well."""
    register(Stranger)
    before = tree(here)
    ran = pruned(command, step=f"stranger[how={how}]", out="a/out")
    assert ran.code == 1
    assert re.fullmatch(r"error: [^\n]+ Nothing was written\.\n", ran.err)
    assert said in ran.err
    assert tree(here) == before


def test_an_interrupted_pruning_ends_with_130_and_writes_nothing(
    here: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("prunebench.bench.runner.take_step", interrupted)
    before = tree(here)
    ran = pruned(command)
    assert ran.code == 130
    assert ran.err == "interrupted; finished runs are kept, and the same command goes on from here.\n"
    assert tree(here) == before


def written_record() -> RunRecord:
    """The record beside a pruned model."""
    content = json.loads(Path("out/prunebench.json").read_text())
    assert content.pop("checksum") == checksum(content)
    return RunRecord.model_validate(content)


# eval


EVAL = "perplexity[data=evaluation.txt,window=16,windows=4]"


def scores(ran: Ran) -> dict[str, Any]:
    assert (ran.code, ran.err) == (0, "")
    found: dict[str, Any] = json.loads(ran.out)
    assert found.keys() == {"scores"}
    return found["scores"]


def plain_perplexity(folder: Path | str, windows: int = 4) -> float:
    """By transformers alone."""
    ids = AutoTokenizer.from_pretrained(folder)(Path("evaluation.txt").read_text(encoding="utf-8"))["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        losses = [model(input_ids=w[None], labels=w[None]).loss for w in torch.tensor(ids[: 16 * windows]).view(-1, 16)]
    return float(torch.stack(losses).double().mean().exp())


def test_eval_of_a_dense_and_a_pruned_model(command: Command) -> None:
    pruned(command)
    dense, sparse = (scores(command("eval", folder, "--eval", EVAL, "--json")) for folder in ("tiny", "out"))
    assert dense.keys() == sparse.keys() == {"perplexity"}
    for folder, found in (("tiny", dense), ("out", sparse)):
        score = found["perplexity"]
        assert score["value"] == pytest.approx(plain_perplexity(folder), rel=1e-5)
        assert (score["unit"], score["higher_is_better"]) == ("perplexity", False)
        assert "items" not in score
    one, other = dense["perplexity"]["conditions"], sparse["perplexity"]["conditions"]
    assert (one["window"], one["windows"], one["dtype"], one["data"]) == (16, 4, "float32", "evaluation.txt")
    assert {key for key in one if one[key] != other[key]} == {"weights"}, "so that the two numbers may be compared"
    assert dense["perplexity"]["value"] != sparse["perplexity"]["value"]


def test_eval_says_the_value_and_its_conditions(command: Command) -> None:
    value = scores(command("eval", "tiny", "--eval", EVAL, "--json"))["perplexity"]["value"]
    ran = command("eval", "tiny", "--eval", EVAL)
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith(f"perplexity: {value:.6g}  (")
    assert "window=16, windows=4" in " ".join(ran.out.split())


def test_eval_does_not_take_a_model_for_its_own_dense_one(command: Command) -> None:
    ran = command("eval", "tiny", "--eval", EVAL.replace("perplexity", "divergence"))
    assert ran.code == 2
    assert "give the evaluation to a suite" in ran.complaint


def test_eval_of_two_texts(command: Command) -> None:
    other = EVAL.replace("windows=4", "windows=2")
    found = scores(command("eval", "tiny", "--eval", EVAL, "--eval", other, "--json"))
    assert found.keys() == {EVAL, other}
    assert found[other]["value"] == pytest.approx(plain_perplexity("tiny", 2), rel=1e-5)


def test_eval_of_tokens(command: Command) -> None:
    ids = AutoTokenizer.from_pretrained("tiny")(Path("evaluation.txt").read_text(encoding="utf-8"))["input_ids"]
    np.save("flat.npy", np.array(ids[:64]))
    np.save("windows.npy", np.array(ids[:64]).reshape(4, 16))
    for name in ("flat", "windows"):
        found = scores(command("eval", "tiny", "--eval", f"perplexity[data={name}.npy,window=16]", "--json"))
        assert found["perplexity"]["value"] == pytest.approx(plain_perplexity("tiny"), rel=1e-5)


def test_eval_of_a_model_that_computes_no_numbers(bench: Bench, here: Path, command: Command) -> None:
    shutil.copytree(bench.model, here / "broken")
    model = AutoModelForCausalLM.from_pretrained("broken")
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    model.save_pretrained("broken")
    ran = command("eval", "broken", "--eval", EVAL)
    assert ran.code == 1
    assert re.fullmatch(r"error: the likelihood of 4 of 4 windows is not finite[^\n]*\n", ran.err)


def test_a_cut_model_is_a_wrong_request(bench: Bench, here: Path, command: Command) -> None:
    shutil.copytree(bench.model, here / "cut")
    path = here / "cut" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:20_000])
    assert (
        "the weights of cut cannot be read: model.safetensors is cut short" in command("eval", "cut", "--eval", EVAL).complaint
    )

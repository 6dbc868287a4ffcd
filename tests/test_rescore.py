"""`run --keep-masks` and `rescore` by the commands: what is kept and told, what can be scored again, and what cannot."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import Bench, Ran, make_record, make_spec, tiny
from transformers import PreTrainedTokenizerFast

from prunebench.bench import room
from prunebench.bench.mask_bank import only_what_is_here, remove_half_written
from prunebench.bench.plan import Keeping
from prunebench.bench.rescorings import chosen
from prunebench.errors import RequestError
from prunebench.plugins import load_registry
from prunebench.results.records import KeptMasks, RunRecord
from prunebench.results.store import ResultStore, Stored

Command = Callable[..., Ran]
KEPT = KeptMasks(file=f"masks/{'a' * 64}.safetensors", hash="a" * 64, bytes=8)


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run(bench: Bench, command: Command) -> Callable[..., Ran]:
    """Runs a small suite in this process."""

    def do(*options: object, methods: tuple[str, ...] = ("wanda", "sparsegpt[block_size=8]")) -> Ran:
        Path("small.toml").write_text(bench.suite_text(*methods))
        return command("run", "small.toml", "--executor", "inline", "--machine", "here", *options)

    return do


@pytest.fixture
def rescore(bench: Bench, command: Command) -> Callable[..., Ran]:
    """Scores again in this process, with another window unless it is told."""

    def do(*options: object, window: int = 32) -> Ran:
        use = f"perplexity[data={bench.evaluation},window={window},windows={64 // window}]"
        given = ["--eval", use, "--model", bench.model, "--executor", "inline", "--machine", "here"]
        return command("rescore", *options, *given)

    return do


def records() -> dict[str, RunRecord]:
    """The latest, by method; those that were scored again by `again METHOD`."""
    found = [stored.record for stored in ResultStore(Path("results"), pytest.fail).latest()]
    return {
        ("again " if record.rescored_from else "") + record.spec.steps[0].text.partition("[")[0]: record for record in found
    }


@pytest.fixture
def no_pruning(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Pruners that may not prune, but for the null one."""

    def forbidden(self: Any, job: Any) -> None:
        raise AssertionError(f"{self.name} was asked to prune")

    def forbid() -> None:
        for name, entry in load_registry().pruners.items():
            if name != "dense":
                monkeypatch.setattr(entry.cls, "prune", forbidden)

    return forbid


# Keeping


def test_what_will_be_kept_is_said_first(run: Callable[..., Ran]) -> None:
    dry = run("--keep-masks", "--dry-run")
    assert "will be kept in results/masks." in dry.out
    assert not Path("results").exists()
    ran = run("--keep-masks")
    assert (ran.code, ran.err) == (0, "")
    told = [line for line in ran.out.splitlines() if "will be kept" in line]
    assert told == [line for line in dry.out.splitlines() if "will be kept" in line]
    assert ran.out.index("will be kept") < ran.out.index("runs to do")
    assert "will be kept" not in run().out


def test_settled_runs_without_masks_are_told_and_left_alone(run: Callable[..., Ran]) -> None:
    run()
    before = records()
    ran = run("--keep-masks")
    assert "2 runs done have no masks; --again makes them.\n0 runs to do; 3 found done." in ran.out
    assert "2 runs done have no masks; --again makes them." in run("--keep-masks", "--dry-run").out
    assert records() == before
    assert run("--keep-masks", "--again").code == 0
    assert "no masks" not in run("--keep-masks").out
    assert "1 run done has no masks, or not the weights that go with them; --again makes them." in run("--keep-weights").out
    assert {record.id for record in records().values()} == {record.id for record in before.values()}


def test_a_disk_without_room_is_a_wrong_request(run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1 << 20})())
    for options in ((), ("--dry-run",)):
        assert "has 1 MiB free: name another --results" in run("--keep-masks", *options).complaint
    assert not Path("results").exists()
    assert run().code == 0


def test_show_tells_what_was_kept(run: Callable[..., Ran], rescore: Callable[..., Ran], command: Command) -> None:
    run("--keep-masks")
    found = records()
    wanda, sparsegpt = (found[name].masks for name in ("wanda", "sparsegpt"))
    assert wanda is not None
    assert sparsegpt is not None
    shown = command("show", found["wanda"].id).out
    assert wanda.file in shown.replace("\n", "")
    assert f"`prunebench rescore {found['wanda'].id}`" in shown
    assert "cannot be scored again: the method changes more than its masks say" in command("show", found["sparsegpt"].id).out
    rescore(found["wanda"].id)
    assert f"are those of {found['wanda'].id}" in command("show", records()["again wanda"].id).out


def test_masks_on_another_disk_are_not_in_the_record(bench: Bench, tmp_path: Path) -> None:
    record = make_record(masks=KEPT)
    found = only_what_is_here(record, tmp_path)
    assert found.masks is None
    assert "masks not kept" in found.steps[-1].notes
    assert "masks not kept" not in record.steps[-1].notes
    (tmp_path / "masks").mkdir()
    (tmp_path / KEPT.file).touch()
    assert only_what_is_here(record, tmp_path) == record
    weights = KEPT.model_copy(update={"weights_file": f"masks/{'b' * 64}.safetensors", "weights_hash": "b" * 64})
    assert only_what_is_here(record.model_copy(update={"masks": weights}), tmp_path).masks is None


def test_what_a_kill_left_half_written_goes_and_nothing_else(bench: Bench, tmp_path: Path) -> None:
    (request,) = bench.requests(tmp_path, "wanda")
    request = replace(request, keep=Keeping(str(tmp_path)))
    (tmp_path / "masks").mkdir()
    mine, others, whole = (f"{request.spec.id}-here-x.tmp", "0123456789ab-here-x.tmp", f"{'a' * 64}.safetensors")
    for name in (mine, others, whole):
        (tmp_path / "masks" / name).touch()
    remove_half_written(replace(request, keep=None))
    assert len(list((tmp_path / "masks").iterdir())) == 3
    remove_half_written(request)
    assert {path.name for path in (tmp_path / "masks").iterdir()} == {others, whole}


# Scoring again


def test_masks_are_scored_under_new_conditions_without_pruning(
    run: Callable[..., Ran], rescore: Callable[..., Ran], bench: Bench, command: Command, no_pruning: Callable[[], None]
) -> None:
    run("--keep-weights", methods=("wanda", "sparsegpt[block_size=8]", "magnitude"))
    first = records()
    no_pruning()
    ran = rescore("--all")
    assert (ran.code, ran.err) == (0, "")
    assert "4 runs to do." in ran.out
    assert "4 ok, 0 refused, 0 failed" in ran.out
    found = [stored.record for stored in ResultStore(Path("results"), pytest.fail).latest()]
    assert len(found) == 8
    for record in found:
        if record.rescored_from is None:
            continue
        earlier = first[record.spec.steps[0].text.partition("[")[0]]
        assert record.rescored_from == earlier.id
        same = ("machine", "steps", "audit", "masks", "extra_parameters", "status")
        assert [name for name in same if getattr(record, name) != getattr(earlier, name)] == []
        unlike = {"evals": ()}
        assert record.spec.model_copy(update=unlike) == earlier.spec.model_copy(update=unlike)
        assert record.scores["perplexity"].conditions["window"] == 32
        assert record.prune_seconds == earlier.prune_seconds
        assert record.provenance.command.startswith("prunebench rescore --all")
    assert sum(record.rescored_from is None and record.spec.method == "dense" for record in found) == 2
    assert "0 runs to do; 3 found done." in rescore("--all").out
    board = command("report").out
    assert "window 32" in board


def test_a_new_run_gives_what_scoring_again_gave(run: Callable[..., Ran], rescore: Callable[..., Ran], bench: Bench) -> None:
    run("--keep-masks", methods=("wanda",))
    rescore("--all")
    again = records()["again wanda"]
    assert again.provenance.suite == records()["wanda"].provenance.suite, "a tuning suite's runs stay a means"
    use = f"perplexity[data={bench.evaluation},window=32,windows=2]"
    Path("small.toml").write_text(bench.suite_text("wanda", evals=[use]))
    from prunebench.bench import runner

    (_, request) = bench.requests(Path(), "dense", "wanda", evals=[use])
    anew = runner.run(request, lambda *_: None, "inline")
    assert anew.id == again.id, "so that `run` finds it done"
    assert anew.scores["perplexity"].items == again.scores["perplexity"].items


def test_the_same_conditions_are_found_done_unless_again(run: Callable[..., Ran], rescore: Callable[..., Ran]) -> None:
    run("--keep-masks", methods=("wanda",))
    first = records()["wanda"]
    assert "0 runs to do; 1 found done." in rescore(first.id, window=16).out
    assert "1 run to do." in rescore(first.id, "--again", window=16).out
    again = records()["again wanda"]
    assert (again.id, again.rescored_from) == (first.id, first.id)
    assert again.scores["perplexity"].items == first.scores["perplexity"].items


def test_only_what_is_missing_is_measured(run: Callable[..., Ran], command: Command, bench: Bench) -> None:
    run("--keep-masks", methods=("wanda",))
    uses = [f"perplexity[data={bench.evaluation},window={window},windows={64 // window}]" for window in (16, 32)]
    given = [part for use in uses for part in ("--eval", use)]
    ran = command("rescore", "--all", *given, "--model", bench.model, "--executor", "inline", "--machine", "here")
    assert ran.code == 0
    assert [score.conditions["window"] for score in records()["again wanda"].scores.values()] == [32]


def test_what_cannot_be_scored_again_is_listed_with_the_reason(run: Callable[..., Ran], rescore: Callable[..., Ran]) -> None:
    run("--keep-masks", methods=("wanda", "sparsegpt[block_size=8]"))
    run(methods=("magnitude",))
    found = records()
    ran = rescore("--all")
    said = " ".join(ran.out.split())
    assert f"cannot be scored again: {found['sparsegpt'].id}: the method changes more than its masks say" in said
    assert (
        f"cannot be scored again: {found['magnitude'].id}: its masks were not kept; run it with --keep-masks --again." in said
    )
    assert ran.code == 0
    assert set(records()) == {*found, "again wanda"}


REFUSED = {
    "masks that were not kept": ("magnitude", (), "its masks were not kept; run it with --keep-masks --again"),
    "weights that were not kept": ("sparsegpt", (), "that was not kept: it was not asked for with --keep-weights"),
    "the dense model": ("dense", (), "nothing was pruned"),
    "another model": ("wanda", ("--model", "other"), "has another weights than the record's; name the right one with --model"),
    "a model that is not there": ("wanda", ("--model", "nowhere"), "there is no model 'nowhere'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_one_that_cannot_is_a_wrong_request(
    name: str, run: Callable[..., Ran], bench: Bench, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, options, said = REFUSED[name]
    run("--keep-masks", methods=("magnitude",) if method == "magnitude" else ("wanda", "sparsegpt[block_size=8]"))
    if method == "magnitude":
        for path in Path("results").rglob("magnitude*.json"):
            path.unlink()
        run(methods=("magnitude",))
    shape = {"vocab_size": 300, "max_position_embeddings": 64, "num_hidden_layers": 2, "bos_token_id": 0, "eos_token_id": 0}
    tiny("llama", seed=1, dtype=torch.float32, **shape).save_pretrained("other")
    PreTrainedTokenizerFast.from_pretrained(bench.model).save_pretrained("other")
    use = f"perplexity[data={bench.evaluation},window=32,windows=2]"
    before = set(Path("results").rglob("*"))
    given = ["--model", bench.model, *options]
    ran = command("rescore", records()[method].id[:8], "--eval", use, *given, "--executor", "inline", "--machine", "here")
    assert said in ran.complaint
    assert set(Path("results").rglob("*")) == before


def test_masks_that_were_changed_are_found_before_any_work(run: Callable[..., Ran], rescore: Callable[..., Ran]) -> None:
    run("--keep-masks", methods=("wanda",))
    record = records()["wanda"]
    assert record.masks is not None
    path = Path("results", record.masks.file)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert "cut short or changed after its record was written" in rescore(record.id).complaint
    assert "no run in results can be scored again" in rescore("--all").err


def test_text_that_was_seen_is_no_evaluation(run: Callable[..., Ran], command: Command, bench: Bench) -> None:
    run("--keep-masks", methods=("wanda",))
    given = ["--eval", f"perplexity[data={bench.calibration},window=16]", "--model", bench.model, "--machine", "here"]
    said = command("rescore", records()["wanda"].id, *given).complaint
    assert "calibration.txt was its calibration text, and would be its evaluation's" in said


WRONG: dict[str, tuple[list[str], str]] = {
    "no run": (["--eval", "perplexity"], "takes the ids of runs, or --all"),
    "runs and all": (["ab", "--all", "--eval", "perplexity"], "takes the ids of runs, or --all"),
    "nothing to measure": (["--all"], "what to measure with --eval"),
    "no such evaluation": (["--all", "--eval", "perplexitee"], "there is no evaluation 'perplexitee'; did you mean"),
    "no such id": (["zz", "--eval", "perplexity"], "no run has an id that begins with 'zz'"),
    "no records": (["--all", "--eval", "perplexity"], "no run in results can be scored again"),
    "an executor": (["--all", "--eval", "perplexity", "--executor", "ray"], "--executor of rescore is subprocess or inline"),
    "what is allowed": (["--all", "--eval", "perplexity", "--allow", "all"], "--allow is one of pickle"),
    "a device": (["--all", "--eval", "perplexity", "--device", "tpu"], "--device is cpu"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_requests(name: str, command: Command) -> None:
    options, said = WRONG[name]
    assert said in command("rescore", *options).complaint
    assert not Path("results").exists()


def stored(record: RunRecord) -> Stored:
    return Stored("x.json", record)


def test_the_record_that_kept_most_is_chosen() -> None:
    note = KEPT.model_copy(update={"note": "no weights"})
    early, late = "2026-01-01T00:00:00+00:00", "2026-01-02T00:00:00+00:00"
    kept, without = make_record(masks=KEPT, started=early), make_record(started=late)
    noted, there = make_record(masks=note, started=late), make_record(masks=KEPT, machine="elsewhere", started=late)
    failed = make_record(status="failed", started=late)
    assert chosen(map(stored, (kept, without, noted, failed)), [], "box") == [kept]
    assert chosen(map(stored, (without, noted, failed)), [], "box") == [noted]
    assert chosen(map(stored, (kept, there)), [kept.id[:4]], "box") == [kept]
    assert chosen(map(stored, (without, there)), [], "box") == [there]
    assert chosen(map(stored, (failed, make_record(make_spec("dense", "dense", None)))), [], "box") == []
    again = make_record(make_spec("wanda", "0.5", 1), masks=KEPT, rescored_from=kept.id)
    assert chosen(map(stored, (kept, again)), [], "box") == [kept]
    assert chosen([stored(again)], [], "box") == [again], "the first one's record is gone"


def test_the_beginning_of_several_ids_names_none() -> None:
    found = [stored(make_record(make_spec("wanda", "0.5", seed), masks=KEPT)) for seed in range(40)]
    digits = [each.record.id[0] for each in found]
    often = max(digits, key=digits.count)
    with pytest.raises(RequestError, match=f"runs have an id that begins with '{often}'"):
        chosen(found, [often], "box")


def test_a_record_of_the_bank_is_json_that_is_read_again(run: Callable[..., Ran]) -> None:
    run("--keep-weights", methods=("sparsegpt[block_size=8]",))
    (path,) = Path("results").rglob("sparsegpt*.json")
    kept = json.loads(path.read_text())["masks"]
    assert kept["note"] is None
    assert sum(Path("results", kept[name]).stat().st_size for name in ("file", "weights_file")) == kept["bytes"]

"""The hand-over to another interpreter and back, by a stand-in; and llm-compressor itself where its interpreter is named."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from prunebench_llmcompressor import VARIABLE, LlmCompressorSparseGpt, LlmCompressorWanda, interpreter

from prunebench.spec import Job, JobFacts, Pruner
from prunebench.targets import NM, Target, Unstructured
from prunebench.testing import CHECKS, make_job, tiny_model
from prunebench.toolkit import InputNorm, keep_mask, walk, wanda_scores

PEERS: list[type[Pruner]] = [LlmCompressorWanda, LlmCompressorSparseGpt]
TARGETS: list[Target] = [Unstructured(0.5), NM(2, 4), NM(1, 4)]
NAMED = os.environ.get(VARIABLE)
with_peer = pytest.mark.skipif(not NAMED, reason=f"{VARIABLE} names no interpreter with llm-compressor")

STAND_IN = """#!{python}
import json, sys
from pathlib import Path
import numpy as np
from safetensors.numpy import load_file, save_file

folder = Path(sys.argv[2])
request, model = json.loads((folder / "request.json").read_text()), load_file(folder / "model" / "model.safetensors")
arguments, pruned = request["arguments"], {{}}
zeros, of = map(int, arguments["mask_structure"].split(":"))
for name in request["matrices"]:
    weight = model[name + ".weight"].copy()
    if of:
        groups = weight.reshape(-1, of)
        gone = np.argsort(abs(groups), axis=1, kind="stable")[:, :zeros]
        np.put_along_axis(groups, gone, 0, axis=1)
    elif "block_size" in arguments:  # one too many a slab, and survivors that change
        for start in range(0, weight.shape[1], arguments["block_size"]):
            slab = weight[:, start : start + arguments["block_size"]]
            least = np.sort(abs(slab), axis=None)[int(slab.size * arguments["sparsity"])] if arguments["sparsity"] else -1
            slab[abs(slab) <= least] = 0
            slab *= 2
    else:
        gone = np.argsort(abs(weight), axis=1, kind="stable")[:, : int(weight.shape[1] * arguments["sparsity"])]
        np.put_along_axis(weight, gone, 0, axis=1)
    pruned[name] = np.ascontiguousarray(weight)
save_file(pruned, folder / "pruned.safetensors")
tokens = np.load(folder / "tokens.npy")
(folder / "notes.json").write_text(json.dumps({{"tokens": list(tokens.shape), "dtype": request["dtype"]}}))
"""


def script(folder: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is run in place of an interpreter."""
    path = folder / "stand-in"
    path.write_text(source)
    path.chmod(0o755)
    monkeypatch.setenv(VARIABLE, str(path))


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(tmp_path, STAND_IN.format(python=sys.executable), monkeypatch)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("check", ["target_met", "declared_changes", "nothing_left", "saves", "zero_sparsity", "silent"])
@pytest.mark.parametrize("pruner", PEERS)
def test_laws_with_a_stand_in(pruner: type[Pruner], check: str) -> None:
    CHECKS[check](pruner, "llama" if check != "saves" else "opt")


@pytest.mark.usefixtures("stand_in")
def test_what_is_handed_over_and_noted() -> None:
    notes: dict[str, object] = {}
    model = tiny_model("qwen3").to(torch.float32)
    pruner = LlmCompressorSparseGpt(block_size=8)
    job = make_job(pruner, model, Unstructured(0.5), notes=notes)
    pruner.prune(job)
    slabs = sum(-(-matrix.shape[1] // 8) for matrix in job.anatomy.matrices)
    assert notes == {"tokens": [7, 8], "dtype": "float32", "extra_zeros": {"llm-compressor's": slabs}}


def facts(pruner: Pruner, target: Target = TARGETS[0], family: str = "llama", earlier: tuple[str, ...] = ()) -> JobFacts:
    found: JobFacts = make_job(pruner, tiny_model(family)).anatomy.facts(target, earlier)  # type: ignore[attr-defined]
    return found


@pytest.mark.parametrize("pruner", PEERS)
def test_refusals(pruner: type[Pruner], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(VARIABLE, sys.executable)
    assert pruner().refuses(facts(pruner())) is None
    assert "earlier steps" in (pruner().refuses(facts(pruner(), earlier=("wanda",))) or "")
    assert "Conv1D" in (pruner().refuses(facts(pruner(), family="gpt2")) or "")
    assert "cut groups" in (LlmCompressorSparseGpt(block_size=6).refuses(facts(pruner(), NM(2, 4))) or "")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "none"))
    assert "which is no file" in (pruner().refuses(facts(pruner())) or "")
    monkeypatch.delenv(VARIABLE)
    if interpreter() is None:
        assert f"set {VARIABLE} to the interpreter" in (pruner().refuses(facts(pruner())) or "")


def test_a_peer_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(tmp_path, "#!/bin/sh\necho much >&2\necho 'no such thing' >&2\nexit 3\n", monkeypatch)
    pruner = LlmCompressorWanda()
    with pytest.raises(RuntimeError, match=r"^llm-compressor ended with exit code 3: no such thing$"):
        pruner.prune(make_job(pruner, tiny_model()))


# llm-compressor itself


@with_peer
@pytest.mark.parametrize("family", ["llama", "qwen3", "opt"])
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_its_wanda_is_wanda(family: str, target: Target) -> None:
    theirs, ours = (make_job(LlmCompressorWanda(), tiny_model(family), target) for _ in range(2))
    LlmCompressorWanda().prune(theirs)
    for block in walk(ours):
        norms = block.collect(InputNorm)
        for matrix in block.matrices:
            matrix.keep(keep_mask(wanda_scores(matrix.weight, norms[matrix]), target, "row"))
    for one, other in zip(theirs.anatomy.matrices, ours.anatomy.matrices, strict=True):
        assert torch.equal(one.weight, other.weight), one.name


def error(job: Job, dense: dict[str, torch.Tensor]) -> float:
    """The first block's squared errors on the inputs of its matrices that read the block's input or its norm."""
    first = job.anatomy.blocks[0].matrices[0]
    inputs: list[torch.Tensor] = []
    with first.module.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, 1))), torch.no_grad():
        job.model(job.calibration_tokens)
    return float(((first.weight - dense[first.name]) @ inputs[0].t()).square().sum())


@with_peer
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_its_sparsegpt_reconstructs(target: Target) -> None:
    found = {}
    for peer in PEERS:
        job = make_job(peer(), tiny_model(), target)
        dense = {matrix.name: matrix.weight.clone() for matrix in job.anatomy.matrices}
        peer().prune(job)
        found[peer] = error(job, dense)
    assert 0 < found[LlmCompressorSparseGpt] < found[LlmCompressorWanda]

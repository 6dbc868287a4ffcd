"""The evaluation `speed`, with kernels of our own on the CPU: what is replaced, what is timed, and what is said otherwise."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import Bench, eval_job, fingerprint, tiny
from transformers import PreTrainedModel

from prunebench.bench import runner
from prunebench.bench.evals import clocks, serving, sparse_kernels
from prunebench.bench.evals import speed as speed_module
from prunebench.bench.evals.layer_speed import points
from prunebench.bench.evals.sparse_kernels import KERNELS, Kernel, Product, dense_product, pattern_of, replaced
from prunebench.bench.evals.speed import Speed
from prunebench.bench.lodging import NoRoomError
from prunebench.errors import DataError, OptionError, RequestError
from prunebench.results.board import build_board
from prunebench.results.leaderboard import to_markdown
from prunebench.results.recomputed import value_of
from prunebench.results.store import ResultStore
from prunebench.spec import EvalFacts, Score
from prunebench.targets import NM, Target, Unstructured, parse_target
from prunebench.toolkit import keep_mask
from prunebench.toolkit.anatomy import find_anatomy
from prunebench.toolkit.placement import Resident

SMALL = Speed(batches=(2, 1), prompt=4, tokens=2)


def facts_of(model: PreTrainedModel) -> EvalFacts:
    return EvalFacts(model.config, None, "none", ".")


def pruned(model: PreTrainedModel, target: Target) -> PreTrainedModel:
    other = copy.deepcopy(model)
    for matrix in find_anatomy(other).matrices:
        matrix.keep(keep_mask(matrix.weight.abs().float(), target))
    return other


def measure(model: PreTrainedModel, dense: PreTrainedModel | None = None, evaluation: Speed = SMALL, **more: Any) -> Score:
    job = eval_job(evaluation, model, facts_of(model), dense=dense)
    for name, value in more.items():
        setattr(job, name, value)
    return evaluation.measure(job)


def rows_of(score: Score) -> list[dict[str, Any]]:
    return [dict(zip(score.items, row, strict=True)) for row in zip(*score.items.values(), strict=True)]


class Fake:
    """A kernel that counts its products, takes its time over each, and refuses or spoils some shapes."""

    now = 0.0
    """The time on the tests' own clock: seconds that kernels and models say they take."""

    def __init__(self, seconds: float = 0.0, refused: tuple[int, int] | None = None, wrong: bool = False) -> None:
        self.calls: Counter[tuple[int, ...]] = Counter()
        self._seconds, self._refused, self._wrong = seconds, refused, wrong

    def kernel(self, name: str = "fake", pattern: str = "2:4") -> Kernel:
        return Kernel(name, frozenset({pattern}), lambda device, dtype: "", self.make)

    def make(self, weight: torch.Tensor) -> Product:
        if self._refused in (tuple(weight.shape), (0, 0)):
            raise RuntimeError("this shape is\nnot for me")
        kept = dense_product(2 * weight if self._wrong else weight.clone())

        def product(inputs: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            self.calls[tuple(weight.shape)] += 1
            Fake.now += self._seconds
            return kept(inputs, bias)

        return product


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> list[Kernel]:
    """A table of kernels of the test's own, and a clock that only they set forward."""

    def elapsed(work: Callable[[], object], times: int, _device: torch.device) -> float:
        began = Fake.now
        for _ in range(times):
            work()
        return Fake.now - began + 1e-6 * times

    found: list[Kernel] = []
    monkeypatch.setattr(sparse_kernels, "KERNELS", found)
    monkeypatch.setattr(speed_module, "KERNELS", found)
    monkeypatch.setitem(clocks.SLICE, "cpu", 1e-5)
    for module in (clocks, serving):
        monkeypatch.setattr(module, "ROUNDS", 1)
        monkeypatch.setattr(module, "elapsed", elapsed)
    return found


def test_patterns_are_found_in_the_weights() -> None:
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    for text in ("2:4", "4:8", "1:4"):
        found = pattern_of(weight * keep_mask(weight.abs(), parse_target(text)))
        assert found == ("2:4" if text == "1:4" else text)
    assert pattern_of(weight) == "dense"
    assert pattern_of(weight * keep_mask(weight.abs(), Unstructured(0.5))) == "unstructured"
    assert pattern_of(weight[:, :6] * keep_mask(weight[:, :6].abs(), Unstructured(0.5))) == "unstructured"
    transposed = (weight * keep_mask(weight.abs(), NM(2, 4))).t().contiguous().t()
    assert pattern_of(transposed) == "2:4"


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_every_pruned_matrix_is_multiplied_by_the_kernel(family: str, table: list[Kernel]) -> None:
    """gpt2 stores its matrices the other way round, opt has biases; afterwards the model is what it was."""
    dense = tiny(family)
    model = pruned(dense, NM(2, 4))
    before, fake = fingerprint(model), Fake()
    table.append(fake.kernel())
    score = measure(model, dense)
    matrices = find_anatomy(model).matrices
    assert set(fake.calls) == {matrix.shape for matrix in matrices}
    assert all(torch.equal(tensor, before[name]) for name, tensor in fingerprint(model).items())
    assert not any("forward" in vars(module) for module in model.modules())
    rows = rows_of(score)
    whole = [row for row in rows if row["shape"] == "whole model"]
    assert [(row["phase"], row["batch"], row["tokens"]) for row in whole] == [
        ("decode", 1, 1),
        ("decode", 2, 2),
        ("prefill", 1, 4),
        ("prefill", 2, 8),
    ]
    assert {row["kernel"] for row in whole} == {f"fake {len(matrices)} of {len(matrices)}"}
    assert score.value == whole[0]["speed_up"] == pytest.approx(whole[0]["dense_ms"] / whole[0]["sparse_ms"], rel=1e-3)
    layers = rows[len(whole) :]
    assert {row["shape"] for row in layers} == {f"{outputs}x{inputs}" for outputs, inputs in fake.calls}
    assert [(row["phase"], row["batch"], row["tokens"]) for row in layers[:4]] == [
        (point.phase, point.batch, point.tokens) for point in points((1, 2), 4)
    ]
    assert all(row["dense_ms"] > 0 and row["sparse_ms"] > 0 and row["kernel"] == "fake" for row in layers)
    assert (score.unit, score.higher_is_better, score.sample, score.reason) == ("speed-up", True, None, "")
    assert score.parts["decode, batch 2"] == whole[1]["speed_up"]
    assert score.parts["decode, batch 1: pruned tokens/s"] == pytest.approx(1e3 / whole[0]["sparse_ms"], abs=0.1)
    assert score.parts["prefill, batch 2: dense tokens/s"] == pytest.approx(8e3 / whole[3]["dense_ms"], abs=0.1)


def test_a_slow_kernel_is_a_loss_and_a_slow_dense_model_a_gain(table: list[Kernel]) -> None:
    evaluation = Speed(batches=(1,), prompt=2, tokens=1)
    dense = tiny()
    model = pruned(dense, NM(2, 4))
    table.append(Fake(seconds=1.0).kernel())
    lost = measure(model, dense, evaluation)
    assert lost.value == pytest.approx(1e-6 / 21, rel=1e-3)
    assert lost.reason == ""

    def slow(*_: object) -> None:
        Fake.now += 2.5

    for matrix in find_anatomy(dense).matrices:
        matrix.module.register_forward_hook(slow)
    gained = measure(model, dense, evaluation)
    assert gained.value == pytest.approx(2.5)
    assert rows_of(gained)[0]["dense_ms"] == pytest.approx(1000 * 21 * 2.5)


def test_of_two_kernels_the_quicker_one_takes_the_model(table: list[Kernel]) -> None:
    slow, quick = Fake(seconds=1.0), Fake(seconds=0.5)
    table += [slow.kernel("slow"), quick.kernel("quick")]
    model = pruned(tiny(), NM(2, 4))
    score = measure(model, tiny(), Speed(batches=(1,), prompt=2, tokens=1))
    assert rows_of(score)[0]["kernel"] == "quick 21 of 21"
    assert {row["kernel"] for row in rows_of(score)[2:]} == {"slow", "quick"}


def test_a_shape_that_a_kernel_refuses_stays_dense_and_says_so(table: list[Kernel]) -> None:
    model = pruned(tiny(), NM(2, 4))
    shape = find_anatomy(model).matrices[0].shape
    fake = Fake(refused=shape)
    table.append(fake.kernel())
    score = measure(model, tiny())
    mine = [row for row in rows_of(score) if row["shape"] == f"{shape[0]}x{shape[1]}"]
    assert [(row["note"], row["sparse_ms"], row["dense_ms"]) for row in mine] == [("RuntimeError: this shape is", 0.0, 0.0)]
    taken = sum(matrix.shape != shape for matrix in find_anatomy(model).matrices)
    assert rows_of(score)[0]["kernel"] == f"fake {taken} of 21"
    assert shape not in fake.calls
    assert score.value is not None


@pytest.mark.parametrize(("fake", "note"), [(Fake(refused=(0, 0)), "this shape is"), (Fake(wrong=True), "wrong products")])
def test_a_kernel_that_takes_nothing_or_multiplies_wrongly_gives_no_value(fake: Fake, note: str, table: list[Kernel]) -> None:
    table.append(fake.kernel())
    score = measure(pruned(tiny(), NM(2, 4)), tiny())
    assert (score.value, score.reason) == (None, "no kernel takes these shapes")
    assert all(note in row["note"] for row in rows_of(score)[4:])
    assert "decode, batch 1" not in score.parts
    assert score.parts["decode, batch 1: dense tokens/s"] > 0


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        (Unstructured(0.5), "no kernel for unstructured masks"),
        (NM(4, 8), "no kernel for 4:8 masks"),
        (NM(2, 4), "no kernel for 2:4 masks on this device: it needs a CUDA device"),
    ],
    ids=str,
)
def test_without_a_kernel_there_is_a_reason_and_the_dense_speed(target: Target, reason: str) -> None:
    """With the kernels that PyTorch has."""
    score = measure(pruned(tiny(), target), tiny())
    assert (score.value, score.reason) == (None, reason)
    assert set(score.parts) == {f"{p}, batch {b}: dense tokens/s" for p in ("decode", "prefill") for b in (1, 2)}
    assert {row["shape"] for row in rows_of(score)} == {"whole model"}
    assert {row["sparse_ms"] for row in rows_of(score)} == {0.0}


def test_another_pattern_may_have_a_kernel_too(table: list[Kernel]) -> None:
    table.append(Fake().kernel("macko", "unstructured"))
    assert measure(pruned(tiny(), Unstructured(0.5)), tiny()).value is not None
    assert measure(pruned(tiny(), NM(2, 4)), tiny()).reason == "no kernel for 2:4 masks"


def test_the_dense_model_is_what_others_are_measured_against() -> None:
    def never() -> PreTrainedModel:
        raise AssertionError("the dense model is loaded a second time")

    job = eval_job(SMALL, tiny(), facts_of(tiny()))
    job.dense = never
    score = SMALL.measure(job)
    assert (score.value, score.reason) == (1.0, "")
    assert score.parts["decode, batch 1: dense tokens/s"] > 0


def test_a_model_that_was_not_pruned_here_is_compared_with_itself(table: list[Kernel]) -> None:
    def unknown() -> PreTrainedModel:
        raise RequestError("nobody knows.")

    table.append(Fake().kernel())
    job = eval_job(SMALL, pruned(tiny(), NM(2, 4)), facts_of(tiny()))
    job.dense = unknown
    score = SMALL.measure(job)
    assert score.value is not None
    assert "its own weights, their zeros stored" in rows_of(score)[0]["note"]

    def too_large() -> PreTrainedModel:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def no_room() -> PreTrainedModel:
        raise NoRoomError

    for job.dense in (too_large, no_room):
        assert "no memory for the dense model" in rows_of(SMALL.measure(job))[0]["note"]


def test_compressed_weights_for_which_there_is_no_memory_are_told(table: list[Kernel]) -> None:
    fake, asked = Fake(), [0]

    def make(weight: torch.Tensor) -> Product:
        asked[0] += 1
        if asked[0] > 20:  # four are made to be timed
            raise torch.OutOfMemoryError("CUDA out of memory")
        return fake.make(weight)

    table.append(Kernel("fake", frozenset({"2:4"}), lambda device, dtype: "", make))
    score = measure(pruned(tiny(), NM(2, 4)), tiny())
    assert (score.value, score.reason) == (None, "out of memory")
    assert len(rows_of(score)) == 4 + 4 * 4
    assert score.parts["decode, batch 1: dense tokens/s"] > 0


def test_a_model_that_is_not_whole_is_not_timed() -> None:
    assert measure(tiny(), placement=Resident("cpu")).reason == "the model is not whole on the device"
    with torch.device("meta"):
        nowhere = type(tiny())(tiny().config)
    assert measure(nowhere).reason == "the model is not whole on the device"


def test_batches_for_which_there_is_no_memory_are_named(monkeypatch: pytest.MonkeyPatch, table: list[Kernel]) -> None:
    table.append(Fake().kernel())
    first = [2]

    def serve(forms: Any, prompts: torch.Tensor, new_tokens: int) -> Any:
        if len(prompts) >= first[0]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return serving.serve_alike(forms, prompts, new_tokens)

    monkeypatch.setattr(speed_module, "serve_alike", serve)
    model = pruned(tiny(), NM(2, 4))
    rows = rows_of(score := measure(model, tiny()))
    assert [(row["batch"], row["note"] == "out of memory") for row in rows[:3]] == [(1, False), (2, True), (1, False)]
    assert score.value == rows[0]["speed_up"]
    first[0] = 1
    assert (measure(model, tiny()).value, measure(model, tiny()).reason) == (None, "out of memory")


def test_conditions_say_what_seconds_depend_on() -> None:
    said = SMALL.conditions(facts_of(tiny()))
    assert said["batches"] == [1, 2]
    assert (said["prompt"], said["written"], said["kernels"]) == (4, 2, ["cusparselt", "cutlass"])
    assert said["torch"] == torch.__version__
    assert said["device"]
    context = tiny().config.max_position_embeddings
    assert Speed(tokens=4).conditions(facts_of(tiny()))["prompt"] == min(512, context - 4)
    with pytest.raises(DataError, match="do not fit"):
        Speed(prompt=context, tokens=1).conditions(facts_of(tiny()))
    with pytest.raises(DataError, match="do not fit"):
        Speed(tokens=context).conditions(facts_of(tiny()))
    for wrong in ({"batches": ()}, {"batches": (0, 1)}, {"prompt": -1}, {"tokens": 0}):
        with pytest.raises(OptionError, match="speed"):
            Speed(**wrong)  # type: ignore[arg-type]


class FakeGraphs:
    """What of `torch.cuda` a recording needs: streams that are names, and graphs that do the work when they are replayed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, failure: Exception | None = None) -> None:
        self.now, self.log, self._failure = "own", [], failure
        for name in ("current_stream", "stream", "graph", "set_stream"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "Stream", lambda _device: SimpleNamespace(wait_stream=lambda _other: None))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: self.log.append("replay")))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda _device: None)

    def current_stream(self, _device: object) -> SimpleNamespace:
        return SimpleNamespace(wait_stream=lambda _other: None, name=self.now)

    @contextmanager
    def stream(self, _stream: object) -> Iterator[None]:
        self.log.append("side")
        yield

    @contextmanager
    def graph(self, _graph: object) -> Iterator[None]:
        self.now = "recording"
        yield
        if self._failure is not None:  # and nobody goes back
            raise self._failure
        self.now = "own"

    def set_stream(self, stream: SimpleNamespace) -> None:
        self.now = stream.name


def test_work_is_warmed_up_aside_recorded_and_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeGraphs(monkeypatch)
    replay = clocks.launched(lambda: fake.log.append(fake.now), torch.device("cuda"), "graph")
    replay()
    assert fake.log == ["side", *["own"] * clocks.WARM_UP, "recording", "replay"]
    work = fake.log.clear
    assert clocks.launched(work, torch.device("cuda"), "eager") == work


@pytest.mark.parametrize(
    ("failure", "raised"),
    [
        (RuntimeError("operation not permitted when stream is capturing"), clocks.CannotRecord),
        (torch.OutOfMemoryError("CUDA out of memory"), torch.OutOfMemoryError),
    ],
    ids=["forbidden", "oom"],
)
def test_a_recording_that_fails_leaves_the_stream_as_it_was(
    failure: Exception, raised: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeGraphs(monkeypatch, failure)
    with pytest.raises(raised):
        clocks.launched(lambda: None, torch.device("cuda"), "graph")
    assert fake.now == "own"


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_pytorchs_tensors_are_given_matrices_and_give_what_a_linear_layer_does(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the weight as it is in place of a compressed one; they take no more than two dimensions."""

    class Compressed:
        @staticmethod
        def from_dense(weight: torch.Tensor) -> torch.Tensor:
            assert weight.is_contiguous()
            warnings.warn("a prototype", UserWarning, stacklevel=1)
            return weight

    def linear(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        assert inputs.dim() == 2
        return (weight @ inputs.t() + (0 if bias is None else bias[:, None])).t()  # as they are laid out there

    back_end = {"cusparselt": "CUSPARSELT", "cutlass": "CUTLASS"}[kernel.name]
    monkeypatch.setattr(torch.sparse, f"SparseSemiStructuredTensor{back_end}", Compressed)
    weight, inputs, bias = torch.randn(8, 12).t(), torch.randn(2, 3, 8), torch.randn(12)
    expected = [torch.nn.functional.linear(inputs, weight, b) for b in (None, bias)]
    product = kernel.make(weight)
    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    for b, wanted in zip((None, bias), expected, strict=True):
        torch.testing.assert_close(product(inputs, b), wanted)


def test_what_was_replaced_comes_back_after_an_error() -> None:
    model = tiny()
    matrix = find_anatomy(model).matrices[0]
    hooked: list[int] = []
    matrix.module.register_forward_hook(lambda *_: hooked.append(1))
    inputs = torch.ones(1, matrix.shape[1])

    def work() -> None:
        with replaced([matrix], {matrix.name: lambda inputs, _: inputs + 5}):
            assert torch.equal(matrix.module(inputs), inputs + 5)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()
    assert matrix.module(inputs).shape[1] == matrix.shape[0]
    assert "forward" not in vars(matrix.module)
    assert len(hooked) == 2


def greedy(model: PreTrainedModel, ids: torch.Tensor, count: int) -> list[torch.Tensor]:
    """The tokens that come behind the prompts, without a cache."""
    found = []
    with torch.no_grad():
        for _ in range(count):
            found.append(model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1))
            ids = torch.cat([ids, found[-1]], dim=1)
    return found


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs that are no graphs: the work is warmed up as for one, and then done each time."""

    def launched(work: Callable[[], object], _device: torch.device, launch: str) -> Callable[[], object]:
        for _ in range(clocks.WARM_UP if launch == "graph" else 0):
            work()
        return work

    monkeypatch.setattr(serving, "launched", launched)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma2"])
@pytest.mark.parametrize("launch", ["eager", "graph"])
@pytest.mark.usefixtures("recorded")
def test_sessions_write_what_greedy_decoding_without_a_cache_does(family: str, launch: clocks.Launch) -> None:
    """Time and again, also with keys and values in one place, as graphs need them."""
    model = tiny(family).eval()
    prompts = serving.random_prompts(2, 5, model.config.vocab_size, torch.device("cpu"))
    expected = greedy(model, prompts, 4)
    with torch.inference_mode():
        session = serving.Session(model, prompts, 3, launch)
        for _ in range(2):
            session.prefill()
            assert torch.equal(session.token, expected[0])
            session.decode()
            assert torch.equal(session.token, expected[3])


def test_what_cannot_be_recorded_is_launched_alike_in_both_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[tuple[str, str]] = []

    def serve(model: str, _prompts: torch.Tensor, _new_tokens: int, launch: str) -> serving.Served:
        tried.append((model, launch))
        if (model, launch) == ("pruned", "graph"):
            raise clocks.CannotRecord
        return serving.Served(1.0, 2.0)

    monkeypatch.setattr(serving, "serve", serve)
    monkeypatch.setattr(serving, "launches", lambda _device: ("graph", "eager"))
    forms: Any = [lambda: ("dense", nullcontext()), lambda: ("pruned", nullcontext())]
    launch, served = serving.serve_alike(forms, torch.zeros(1, 1), 1)
    assert (launch, len(served)) == ("eager", 2)
    assert tried == [("dense", "graph"), ("pruned", "graph"), ("dense", "eager"), ("pruned", "eager")]


def test_runs_keep_the_reason_and_the_board_shows_it_without_a_rank(bench: Bench, tmp_path: Path) -> None:
    evals = [bench.perplexity, "speed[batches=1,prompt=4,tokens=2]"]
    store = ResultStore(tmp_path / "results", pytest.fail)
    for request in bench.requests(tmp_path, "dense", "magnitude", "wanda", evals=evals):
        record = runner.run(request, lambda *_: None, "inline")
        assert record.status == "ok", record.reason
        store.write(record)
        score = record.scores["speed"]
        if record.spec.target == "dense":
            assert (score.value, score.reason) == (1.0, None)
        else:
            assert (score.value, score.reason) == (None, "no kernel for unstructured masks")
        assert score.conditions["device"] == record.provenance.device
        assert value_of(score.items, score) == score.value
        assert value_of(score.items, score.model_copy(update={"value": 3.0})) == 1.0
    board = build_board(store.latest())
    [section] = [section for section in board.sections if section.score == "speed"]
    assert all(row.rank is None for table in section.tables for row in table.rows)
    text = to_markdown(board)
    assert "speed on random tokens" in text
    assert "No value of wanda: no kernel for unstructured masks." in text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_pytorchs_kernels_run_on_a_gpu() -> None:
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 64}
    dense = tiny("llama", torch.bfloat16, **shape).to("cuda")
    model = pruned(dense, NM(2, 4))
    job = eval_job(SMALL, model, facts_of(model), dense=dense)
    job.device = torch.device("cuda")
    score = SMALL.measure(job)
    assert score.value is not None, (score.reason, rows_of(score))
    assert {row["kernel"] for row in rows_of(score)[4:]} <= {kernel.name for kernel in KERNELS}
    assert any(row["note"].startswith("graph") for row in rows_of(score))

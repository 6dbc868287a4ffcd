"""What no implementation avoids: a machine's best rates, kept with it, and the floors that are counted by them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import Bench, Ran, cases
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from prunebench.bench import estimate, machine_rates
from prunebench.bench.estimate import with_predictions
from prunebench.bench.floors import CACHED, moved_bytes, product_seconds, step_floors
from prunebench.bench.machine_rates import measured_rates
from prunebench.bench.plan import Planner
from prunebench.bench.rates import Rates
from prunebench.bench.runner import run
from prunebench.bench.suite import load_suite
from prunebench.effort import Effort, EffortFacts
from prunebench.errors import WriteError
from prunebench.options import parse_step
from prunebench.plugins import load_registry
from prunebench.results.machines import FILE, MachineRates, read_machine
from prunebench.results.records import RunRecord
from prunebench.results.store import ResultStore
from prunebench.targets import parse_target
from prunebench.testing.models import make_job, random_tokens, tiny_model
from prunebench.toolkit import phases
from prunebench.toolkit.loading import ModelSource, shape_of
from prunebench.toolkit.model_shape import ModelShape
from prunebench.toolkit.phases import PhaseClock
from prunebench.toolkit.stream import evaluating

SHAPE = ModelShape(
    parameters=2600,
    multiplied=2600,
    layers=2,
    hidden=10,
    vocabulary=20,
    context=64,
    matrices=((40, 10), (10, 40)) * 2,
    inputs=(10, 40) * 2,
)


def rates(threads: int = 0, **changes: Any) -> MachineRates:
    """One operation and one byte a second, unless told otherwise."""
    products = {"float32": 1.0, "bfloat16": 1.0, "float16": 1.0}
    known = {"device": "a", "driver": None, "torch": torch.__version__, "products": products, "copied": 1.0, "measured": "now"}
    return MachineRates(**known | {"threads": threads} | changes)


# The machine


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Everything takes a second, whatever it is; how many rates were measured."""
    measured: list[float] = []

    def second(work: Callable[[], object], device: torch.device, seconds: float) -> float:
        work()
        measured.append(seconds)
        return 1.0

    monkeypatch.setattr(machine_rates, "quickest", second)
    monkeypatch.setattr(machine_rates, "SIDES_ON_HOST", (4, 8))
    monkeypatch.setattr(machine_rates, "COPIED_ON_HOST", 1000)
    return measured


def test_rates_are_the_best_of_the_sizes_and_of_one_thread(quick: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_rates, "LONGEST", 100.0)
    found = measured_rates(torch.device("cpu"), "a", None, "2")
    assert found.products == dict.fromkeys(("float32", "bfloat16", "float16"), 2 * 8**3)
    assert (found.copied, found.uploaded, found.threads) == (2000.0, None, 1), "bytes that are read, and bytes written"
    assert len(quick) == (3 + 1) * 2 + 1, "float32 in two ways"
    assert torch.get_num_threads() == 1


def test_after_a_slow_product_no_larger_one_is_tried(quick: list[float]) -> None:
    found = measured_rates(torch.device("cpu"), "a", None, "2")
    assert set(found.products.values()) == {2 * 4**3}
    assert len(quick) == (3 + 1) + 1


def test_a_gpu_is_measured_as_it_is_and_in_tf32_and_over_the_bus(quick: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device without memory, which takes the same ways."""
    monkeypatch.setattr(machine_rates, "SIDES_ON_DEVICE", (4,))
    monkeypatch.setattr(machine_rates, "COPIED_ON_DEVICE", 1000)
    monkeypatch.setattr(machine_rates, "UPLOADED", 10)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    found = measured_rates(torch.device("meta"), "a GPU", "1", "2")
    assert found.products == dict.fromkeys(("float32", "bfloat16", "float16", "tf32"), 2 * 4**3)
    assert (found.copied, found.uploaded, found.threads, found.driver) == (2000.0, 10.0, 0, "1")
    assert len(quick) == 4 + 2


def test_what_does_not_fit_a_device_is_not_measured(quick: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    made = torch.full

    def full(size: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        if size == (8, 8):
            raise torch.OutOfMemoryError
        return made(size, *args, **kwargs)

    monkeypatch.setattr(machine_rates, "LONGEST", 100.0)
    monkeypatch.setattr(machine_rates.torch, "full", full)
    assert set(measured_rates(torch.device("cpu"), "a", None, "2").products.values()) == {2 * 4**3}
    monkeypatch.setattr(machine_rates, "SIDES_ON_HOST", (8,))
    with pytest.raises(torch.OutOfMemoryError):
        measured_rates(torch.device("cpu"), "a", None, "2")
    assert len(quick) == (3 + 1) + 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_rates_of_a_gpu() -> None:
    found = measured_rates(torch.device("cuda"), "a GPU", "1", "2")
    assert found.products["bfloat16"] > found.products["tf32"] > found.products["float32"] > 1e12
    assert found.copied > 10 * (found.uploaded or 0) > 1e10
    assert torch.cuda.memory_reserved() < 1 << 30, "given back"


def test_threads_multiply_what_was_measured_of_one() -> None:
    two = rates(1, products={"float32": 3.0}, copied=5.0, uploaded=7.0).times(2)
    assert (two.threads, two.products, two.copied, two.uploaded) == (2, {"float32": 6.0}, 10.0, 7.0)
    assert rates(0).times(2) == rates(0), "a GPU's threads are all at work"


@pytest.mark.usefixtures("own_cache")
def test_a_machine_is_measured_once_and_again_for_another_torch_or_device(
    quick: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = lambda folder: machine_rates.machine_rates(tmp_path / folder, "box", "cpu")  # noqa: E731
    found = find("box")
    many = len(quick)
    assert many
    assert find("box") == found
    assert find("elsewhere") == found, "the user's cache knows it"
    assert len(quick) == many
    data = json.loads((tmp_path / "box" / FILE).read_text(encoding="utf-8"))
    assert (data["format"], data["machine"], list(data["rates"])) == (1, "box", ["cpu"])
    assert data["rates"]["cpu"]["torch"] == torch.__version__
    monkeypatch.setattr(machine_rates.machine, "device_name", lambda _: "another")
    assert find("box").device == "another"
    assert len(quick) == 2 * many
    monkeypatch.setattr(machine_rates.torch, "__version__", "99")
    assert find("box").torch == "99"
    assert len(quick) == 3 * many


@pytest.mark.usefixtures("own_cache", "quick")
def test_rates_of_other_devices_of_the_machine_stay(tmp_path: Path) -> None:
    machine_rates.machine_rates(tmp_path, "box", "cpu")
    data = json.loads((tmp_path / FILE).read_text(encoding="utf-8"))
    data["rates"]["cuda"] = {**data["rates"].pop("cpu"), "device": "a GPU", "driver": "1"}
    (tmp_path / FILE).write_text(json.dumps(data), encoding="utf-8")
    machine_rates.machine_rates(tmp_path, "box", "cpu")
    assert {name: known.device for name, known in read_machine(tmp_path, "box").rates.items()}["cuda"] == "a GPU"


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '{"format": 2, "machine": "box", "rates": {}}',
        '{"format": 1, "machine": "other", "rates": {}}',
        '{"format": 1, "machine": "box", "rates": {"cpu": {"copied": NaN}}}',
        "[" * 100_000,
    ],
)
def test_a_file_that_says_nothing_of_the_machine_counts_as_absent(content: str, tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(content, encoding="utf-8")
    assert read_machine(tmp_path, "box").rates == {}


@pytest.mark.parametrize(
    "changes",
    [
        {"copied": 0.0},
        {"uploaded": 0.0},
        {"threads": -1},
        *({"products": {"float32": rate}} for rate in (0.0, -1.0, float("nan"), float("inf"))),
    ],
)
@pytest.mark.usefixtures("own_cache", "quick")
def test_rates_that_cannot_be_are_measured_anew_also_where_the_cache_has_them(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = machine_rates.machine_rates(tmp_path / "box", "box", "cpu")
    path = tmp_path / "box" / FILE
    data = json.loads(path.read_text(encoding="utf-8"))
    data["rates"]["cpu"] |= changes
    path.write_text(json.dumps(data), encoding="utf-8")
    assert read_machine(path.parent, "box").rates == {}
    monkeypatch.setattr(machine_rates, "load_json", lambda *_: data["rates"]["cpu"])
    assert machine_rates.machine_rates(path.parent, "box", "cpu").products == honest.products


@pytest.mark.usefixtures("own_cache", "quick")
def test_a_link_out_of_the_results_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "aside").mkdir()
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "box").symlink_to(tmp_path / "aside")
    with pytest.raises(WriteError, match="leads out"):
        machine_rates.machine_rates(tmp_path / "results" / "box", "box", "cpu")


def test_the_store_leaves_the_file_alone(tmp_path: Path) -> None:
    store = ResultStore(tmp_path, pytest.fail)
    folder = store.folder_of_machine("Box 1")
    folder.mkdir()
    (folder / FILE).write_text("{}", encoding="utf-8")
    assert folder == tmp_path / "box-1"
    assert store.all() == store.latest() == []


# The formula


@pytest.mark.parametrize(
    ("effort", "seconds"),
    cases(
        {
            "a pass": ({"blocks": 100, "phase": "propagation"}, 100 * 2 * 1600),
            "a pass whose last outputs nobody reads": ({"blocks": 100, "phase": "statistics"}, 100 * 2 * 800),
            "a pass that a graph avoids": ({"blocks": 100, "held": 300, "phase": "propagation"}, 0.0),
            "a way back through a block": ({"blocks": 100, "graph": 1, "phase": "statistics"}, 0.8 * 100 * 2 * 1600),
            "head": ({"head": 100, "phase": "statistics"}, 100 * 2 * 200),
            "a head that is not trained": ({"head": 300, "phase": "training"}, 200 * 2 * 200),
            "Gram matrices": ({"grams": 100, "phase": "statistics"}, 100 * 2 * (10**2 + 40**2)),
            "factors": ({"factors": 3, "phase": "update"}, 2 * (10**3 + 40**3)),
            "sweeps": ({"sweeps": 1, "phase": "update"}, 2 * (40 * 10**2 + 10 * 40**2)),
            "another dtype": ({"blocks": 1, "phase": "propagation", "dtype": "bfloat16"}, 2 * 1600 / 4),
            "training, on a GPU in TF32": ({"blocks": 1, "phase": "training", "dtype": "float32"}, 2 * 1600 / 2),
            "a slow dtype": ({"blocks": 1, "phase": "propagation", "dtype": "float16"}, 2 * 1600),
            "a dtype that was not measured": ({"blocks": 1, "phase": "propagation", "dtype": "float64"}, 0.0),
        }
    ),
)
def test_products_take_what_the_formula_says(effort: dict[str, Any], seconds: float) -> None:
    machine = rates(products={"float32": 1.0, "tf32": 2.0, "bfloat16": 4.0, "float16": 0.1})
    assert product_seconds(Effort(**effort), SHAPE, "float32", machine, whole=False) == pytest.approx(seconds)


@pytest.mark.parametrize(("dtype", "rate"), [("bfloat16", 9.0), ("float16", 9.0), ("float32", 3.0)])
def test_gradients_are_in_tf32_where_the_model_is_in_16_bits_and_else_in_three_of_its_products(dtype: str, rate: float) -> None:
    machine = rates(products={"float32": 1.0, "tf32": 9.0, "bfloat16": 12.0, "float16": 12.0})
    effort = Effort(phase="statistics", blocks=100, graph=1, dtype="float32")
    assert product_seconds(effort, SHAPE, dtype, machine, whole=False) == pytest.approx(0.8 * 100 * 2 * 1600 / rate)


def test_through_a_whole_model_every_gradient_but_the_first_blocks_is_asked_for() -> None:
    effort = Effort(phase="statistics", blocks=300, graph=1)
    found = product_seconds(effort, SHAPE, "float32", rates(), whole=True)
    assert found == pytest.approx(300 * 2 * 1600 * (1 - 1 / 4))


@pytest.mark.parametrize(("dtype", "rate"), [("float32", 3.0), ("bfloat16", 12.0), ("float64", None)])
def test_gram_matrices_are_summed_at_the_rate_of_the_models_dtype(dtype: str, rate: float | None) -> None:
    """And float32 on a GPU may be three products in TF32."""
    machine = rates(products={"float32": 1.0, "tf32": 9.0, "bfloat16": 12.0})
    found = product_seconds(Effort(phase="statistics", grams=100), SHAPE, dtype, machine, whole=False)
    assert found == pytest.approx(100 * 2 * (10**2 + 40**2) / rate if rate else 0.0)


def test_of_experts_only_those_count_that_a_token_goes_to() -> None:
    shape = ModelShape(**vars(SHAPE) | {"active": 2400 - 1200})
    assert product_seconds(Effort(phase="propagation", blocks=1), shape, "float32", rates(), False) == 2 * 400
    assert product_seconds(Effort(phase="statistics", grams=1), shape, "float32", rates(), False) == 2 * (100 + 1600) / 4


WIDE = ModelShape(
    parameters=1,
    multiplied=1,
    layers=2,
    hidden=8192,
    vocabulary=9,
    context=64,
    matrices=((8192, 8192),) * 4,
    inputs=(8192,) * 4,
)


@pytest.mark.parametrize(
    ("effort", "moved"),
    cases(
        {
            "weights are read": ({"blocks": 1.0}, 4 * 8192**2 * 2),
            "states are read and written": ({"blocks": 16384.0, "held": 32768.0}, 8 * 8192**2 + 2 * 2 * 2 * 16384 * 8192),
            "states that a cache holds": ({"blocks": 8192.0, "held": 8192.0}, 8 * 8192**2),
            "looks to score": ({"looks": 12.0, "phase": "scoring"}, 8 * 8192**2),
            "looks to update, twice": ({"looks": 16.0, "phase": "update"}, 2 * 8 * 8192**2),
            "looks of an optimiser": ({"looks": 16.0, "phase": "training"}, 0),
            "Gram matrices": ({"grams": 1.0, "phase": "statistics"}, 4 * 4 * 8192**2),
        }
    ),
)
def test_bytes_are_those_that_no_cache_holds(effort: dict[str, Any], moved: float) -> None:
    assert CACHED == 2 * 8192**2
    assert moved_bytes(Effort(**{"phase": "propagation"} | effort), WIDE, "bfloat16") == moved


def test_what_fits_a_cache_moves_at_no_known_rate() -> None:
    for phase in ("propagation", "scoring", "update"):
        assert moved_bytes(Effort(phase=phase, blocks=99, held=99, grams=99, looks=99), SHAPE, "float32") == 0


def test_a_floor_is_the_larger_of_work_and_moves_and_a_sweep_chooses_in_its_own_phase() -> None:
    efforts = [
        Effort(phase="propagation", blocks=1),
        Effort(phase="scoring", looks=12),
        Effort(phase="update", looks=8, sweeps=1),
        Effort(phase="other"),
    ]
    bytes_of_weights = 8 * 8192**2
    found = step_floors(efforts, WIDE, "bfloat16", rates())
    assert found["propagation"] == pytest.approx(2 * 4 * 8192**2, rel=1e-5)
    assert found.keys() == {"propagation", "update"}
    slow_to_move = step_floors(efforts, WIDE, "bfloat16", rates(copied=1e-9))
    assert slow_to_move["propagation"] == pytest.approx(bytes_of_weights * 1e9, rel=1e-5)
    assert slow_to_move["update"] == pytest.approx(2 * bytes_of_weights * 1e9, rel=1e-5)
    assert step_floors(efforts[1:2], WIDE, "bfloat16", rates(copied=2.0)) == {
        "scoring": pytest.approx(bytes_of_weights / 2, rel=1e-5)
    }


# Against what is computed


class Counting(TorchDispatchMode):
    """Counts the operations of all matrix products that run in it, by their shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0.0
        aten = torch.ops.aten
        self._in_place: dict[Any, Callable[..., float]] = {
            aten.addmm_: lambda _, first, second, **__: 2 * first.shape[0] * first.shape[1] * second.shape[1],
            aten.addmv_: lambda _, first, __, **___: 2 * first.shape[0] * first.shape[1],
            torch.ops.mkldnn._linear_pointwise: lambda rows, weight, *_, **__: 2 * rows.numel() * weight.shape[0],
            aten.linalg_cholesky_ex: lambda gram, *_, **__: gram.shape[-1] ** 3 / 3,
            aten.cholesky_inverse: lambda gram, *_, **__: 2 * gram.shape[-1] ** 3 / 3,
        }

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet in self._in_place:
            self.operations += self._in_place[packet](*args, **(kwargs or {}))
        elif packet in flop_registry:
            self.operations += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        return out


METHODS = [
    "wanda",
    "sparsegpt",
    "gblm",
    "wanda++[ro=false]",
    "perp[steps=2,batch=4]",
    "wanda++[ro_samples=3,rounds=2]",
    "perp[steps=2,batch=4,subset=norms]",
    "perp[steps=2,batch=4,mode=reconstruct]",
    "perp[steps=2,batch=4,mode=reconstruct,subset=norms]",
    "lora[steps=2,batch=4]",
]


@pytest.mark.parametrize(
    ("family", "method"),
    [*(("llama", method) for method in METHODS), *((f, method) for f in ("falcon", "mixtral") for method in METHODS[:4])],
)
def test_no_step_computes_less_than_its_floor(
    family: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At one operation a second, with a clock that counts operations; attention, which is left out, counts there."""
    model, pruner, counting = tiny_model(family), load_registry().pruner(parse_step(method)), Counting()
    (tmp_path / "config.json").write_text(model.config.to_json_string(), encoding="utf-8")
    shape = shape_of(ModelSource(tmp_path, family, "local"))
    tokens, training = random_tokens(model, 7, 8, seed=1), random_tokens(model, 7, 8, seed=2)
    job = make_job(pruner, model, parse_target("2:4"), tokens=tokens, training=training)
    monkeypatch.setattr(phases, "time", SimpleNamespace(perf_counter=lambda: counting.operations))
    monkeypatch.setenv("PRUNEBENCH_KERNELS", "off")  # whose operations torch does not see
    clock = PhaseClock(torch.device("cpu"))
    with counting, evaluating(model), clock.running():
        pruner.prune(job)
    found = clock.seconds()
    facts = EffortFacts(samples=7, length=8, windows=7, window=8, batch_size=2, layers=shape.layers)
    floors = step_floors(list(pruner.effort(facts)), shape, "float32", rates(copied=1e30))
    assert floors
    for name, least in floors.items():
        assert found[name] >= 0.999 * least, name
        if family == "llama" and name != "training":  # where factors of few columns cost as much as the blocks
            assert found[name] <= 1.7 * least, f"{name}: a floor far below says nothing"


@pytest.fixture
def planned(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Planner:
    """Two methods on a tiny model."""
    found = Rates(products=1e9, attention=1e8, moved=1e7, factored=1e6, launch=1e-4)
    monkeypatch.setattr(estimate, "rates_of", lambda *_: found)
    (tmp_path / "small.toml").write_text(bench.suite_text("magnitude", "sparsegpt"))
    return Planner(load_suite(str(tmp_path / "small.toml")), load_registry(), "box", "prunebench run", "cpu")


@pytest.mark.usefixtures("own_cache")
def test_a_run_takes_at_least_its_floors_and_keeps_them(
    planned: Planner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine_rates, "SIDES_ON_HOST", (256,))
    monkeypatch.setattr(machine_rates, "COPIED_ON_HOST", 1 << 24)
    monkeypatch.setattr(machine_rates, "SECONDS_ON_HOST", 0.05)
    started = time.monotonic()
    requests = with_predictions(planned.requests(), [], planned, tmp_path / "box")
    assert time.monotonic() - started < 10
    records = [run(request, lambda *_: None, "inline") for request in requests]
    magnitude, sparsegpt = (next(r for r in records if r.spec.method == name) for name in ("magnitude", "sparsegpt"))
    assert magnitude.steps[0].floors == {}, "nothing is multiplied, and the weights fit a cache"
    [step] = sparsegpt.steps
    assert step.floors.keys() == {"statistics", "propagation", "update"}
    assert all(step.phases[name] >= least > 0 for name, least in step.floors.items())
    assert RunRecord.model_validate(json.loads(sparsegpt.model_dump_json(by_alias=True))).steps == [step]


@pytest.mark.usefixtures("planned")
def test_without_a_folder_floors_stay_unknown(planned: Planner) -> None:
    assert all(request.floors == () for request in with_predictions(planned.requests(), [], planned))


@pytest.mark.usefixtures("own_cache", "quick")
def test_the_command_measures_a_machine_and_writes_it_beside_the_records(
    planned: Planner, command: Callable[..., Ran], tmp_path: Path
) -> None:
    asked = ("run", tmp_path / "small.toml", "--executor", "inline", "--results", tmp_path / "results", "--machine", "Other")
    ran = command(*asked, "--only", "magnitude")
    assert ran.code == 0, ran
    assert read_machine(tmp_path / "results" / "other", "other").rates.keys() == {"cpu"}
    status = command("status", "--results", tmp_path / "results")
    assert status.code == 0, status
    assert "skipped" not in ran.err + status.err


# A training step


@pytest.mark.parametrize(("steps", "known"), [(5, False), (6, True), (8, True)])
def test_a_training_step_is_timed_once_warm(steps: int, known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock on which a step of the optimiser takes ten seconds, and the first one a thousand."""
    now = [0.0]
    stepped = torch.optim.AdamW.step

    def slow(self: Any, *args: Any, **kwargs: Any) -> Any:
        now[0] += 10 if now[0] else 1000
        return stepped(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", slow)
    monkeypatch.setattr(phases, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    model, notes = tiny_model(), dict[str, Any]()
    pruner = load_registry().pruner(parse_step(f"perp[steps={steps},batch=2,subset=norms]"))
    with PhaseClock(torch.device("cpu")).running():
        pruner.prune(make_job(pruner, model, notes=notes))
    expected = {"steps": steps, "after": 5, "seconds": pytest.approx(10)} if known else None
    assert notes.get("seconds a training step") == expected


def test_without_a_clock_no_training_step_is_timed() -> None:
    notes = dict[str, Any]()
    pruner = load_registry().pruner(parse_step("perp[steps=8,batch=2,subset=norms]"))
    pruner.prune(make_job(pruner, tiny_model(), notes=notes))
    assert "loss_curve" in notes
    assert "seconds a training step" not in notes

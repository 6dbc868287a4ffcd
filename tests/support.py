"""What several test files share: tiny random models of every family, jobs, and statistics computed the plain way."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from prunebench.bench.plan import Planner, RunRequest
from prunebench.bench.suite import load_suite, suites_folder
from prunebench.plugins import load_registry
from prunebench.results.records import (
    AuditRecord,
    EvalSpec,
    Failure,
    FailureKind,
    MatrixAudit,
    ModelSpec,
    Provenance,
    Recipe,
    RunRecord,
    RunSpec,
    ScoreRecord,
    StepRecord,
    StepSpec,
    TextSpec,
)
from prunebench.spec import Eval, EvalFacts, EvalJob, Job, Needs, Placement
from prunebench.targets import Target, Unstructured
from prunebench.toolkit import Block, keep_mask, magnitude_scores, walk
from prunebench.toolkit.anatomy import find_anatomy
from prunebench.toolkit.dense import DenseWeights
from prunebench.toolkit.placement import Resident
from prunebench.toolkit.quiet import quiet_transformers

VOCABULARY = 48
LENGTH = 7
DEPTH = 3
EXACT = {"rtol": 1e-11, "atol": 1e-12}
"""Tolerances for float64: another order of sums, nothing more."""
_LLAMA_LIKE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_OPT_LIKE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "ffn_dim": 24,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
_WINDOWS = ["sliding_attention", "full_attention", "sliding_attention"]
"""Two kinds of attention in one model, with a window shorter than the sequences: blocks need arguments of their own."""


def _llama(**options: Any) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**_LLAMA_LIKE | options))


def _qwen2(**options: Any) -> PreTrainedModel:
    sliding = {"layer_types": _WINDOWS, "use_sliding_window": True, "sliding_window": 3}
    return Qwen2ForCausalLM(Qwen2Config(**_LLAMA_LIKE | sliding | options))


def _qwen3(**options: Any) -> PreTrainedModel:
    return Qwen3ForCausalLM(Qwen3Config(**_LLAMA_LIKE | {"head_dim": 6} | options))


def _mistral(**options: Any) -> PreTrainedModel:
    return MistralForCausalLM(MistralConfig(**_LLAMA_LIKE | {"sliding_window": 3} | options))


def _gemma2(**options: Any) -> PreTrainedModel:
    """Caps that are reached; both kinds of attention."""
    capped = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 4.0, "query_pre_attn_scalar": 4}
    sliding = {"layer_types": _WINDOWS, "sliding_window": 3, "head_dim": 4}
    return Gemma2ForCausalLM(Gemma2Config(**_LLAMA_LIKE | sliding | capped | options))


def _gemma3(**options: Any) -> PreTrainedModel:
    sliding = {"layer_types": _WINDOWS, "sliding_window": 3, "head_dim": 4}
    return Gemma3ForCausalLM(Gemma3TextConfig(**_LLAMA_LIKE | sliding | options))


def _phi3(**options: Any) -> PreTrainedModel:
    return Phi3ForCausalLM(Phi3Config(**_LLAMA_LIKE | {"sliding_window": 3} | options))


def _olmo2(**options: Any) -> PreTrainedModel:
    return Olmo2ForCausalLM(Olmo2Config(**_LLAMA_LIKE | options))


def _opt(**options: Any) -> PreTrainedModel:
    return OPTForCausalLM(OPTConfig(**_OPT_LIKE | {"word_embed_proj_dim": 16} | options))


def _opt_350m(**options: Any) -> PreTrainedModel:
    """The odd one of its family: linears around the blocks, and the norm after the residual."""
    return _opt(**{"word_embed_proj_dim": 8, "do_layer_norm_before": False} | options)


def _gpt2(**options: Any) -> PreTrainedModel:
    shape = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": DEPTH, "n_head": 4, "n_positions": 32, "n_inner": 24}
    return GPT2LMHeadModel(GPT2Config(**shape | {"bos_token_id": 1, "eos_token_id": 2} | options))


def _gpt_neox(**options: Any) -> PreTrainedModel:
    shape = {key: _LLAMA_LIKE[key] for key in _LLAMA_LIKE if key != "num_key_value_heads"}
    return GPTNeoXForCausalLM(GPTNeoXConfig(**shape | options))


def _falcon(**options: Any) -> PreTrainedModel:
    """As the 7B model: attention and MLP side by side behind one norm, one key and value for all heads."""
    shape = {key: _LLAMA_LIKE[key] for key in _LLAMA_LIKE if key not in ("num_key_value_heads", "intermediate_size")}
    return FalconForCausalLM(FalconConfig(**shape | {"ffn_hidden_size": 24} | options))


def _falcon_rw(**options: Any) -> PreTrainedModel:
    """As the 1B model: positions as a bias of the scores, attention before the MLP, biases."""
    return _falcon(**{"alibi": True, "parallel_attn": False, "multi_query": False, "bias": True} | options)


def _falcon_40b(**options: Any) -> PreTrainedModel:
    """As the 40B model: side by side behind two norms, keys and values shared by groups of heads."""
    return _falcon(**{"new_decoder_architecture": True, "num_kv_heads": 2} | options)


SPEED = Path(__file__).parents[1] / "benchmarks" / "speed"

FAMILIES: dict[str, Callable[..., PreTrainedModel]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "mistral": _mistral,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "phi3": _phi3,
    "olmo2": _olmo2,
    "opt": _opt,
    "opt-350m": _opt_350m,
    "gpt2": _gpt2,
    "gpt-neox": _gpt_neox,
    "falcon": _falcon,
    "falcon-rw": _falcon_rw,
    "falcon-40b": _falcon_40b,
}


def tiny(family: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0, **options: Any) -> PreTrainedModel:
    """A random model in eval mode; norms and biases are random too, so that leaving one out shows."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = FAMILIES[family](**options)
    return scattered(model, seed).to(dtype).eval()


def scattered(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Every parameter moved by noise far above the initialisation's 0.02."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def tokens_of(samples: int = 5, length: int = LENGTH, seed: int = 1) -> torch.Tensor:
    """Random token ids [samples, length]."""
    return torch.randint(0, VOCABULARY, (samples, length), generator=torch.Generator().manual_seed(seed))


def speed_script(name: str) -> Any:
    """A script of `benchmarks/speed`, which is no package, as a module."""
    spec = importlib.util.spec_from_file_location(f"speed_{name}", SPEED / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


def make_job(
    model: PreTrainedModel,
    tokens: torch.Tensor | None = None,
    *,
    target: Target | None = None,
    placement: Placement | None = None,
    batch_size: int = 2,
    needs: Needs = Needs.WEIGHTS | Needs.CALIBRATION | Needs.GRADIENTS | Needs.SEED,
    seed: int = 0,
) -> Job:
    """A step's job on the model, as the runner would make it."""
    anatomy = find_anatomy(model)
    return Job(
        model=model,
        anatomy=anatomy,
        target=target or Unstructured(0.5),
        needs=needs,
        seed=seed,
        placement=placement or Resident("cpu"),
        batch_size=batch_size,
        masks=anatomy.masks.copy(),
        dense=DenseWeights(anatomy),
        progress=lambda what, done, total: None,
        note=lambda key, value: None,
        attach=anatomy.adapters.attach,
        artefact=lambda name, make: make(),
        calibration_tokens=tokens,
    )


def masks_of(job: Job) -> dict[str, torch.Tensor]:
    """The keep masks that the step has laid over the model, by matrix name."""
    return dict(job.anatomy.masks)  # type: ignore[attr-defined]


def visit_all(job: Job, visit: Callable[[Block], object]) -> None:
    """Walk to the end, or until a visit raises."""
    for block in walk(job):
        visit(block)


def fingerprint(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of every parameter and buffer."""
    return {name: tensor.detach().clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


def changed(model: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    """Names of the parameters and buffers whose bits differ from the copy."""
    return {name for name, tensor in fingerprint(model).items() if not same_bits(tensor, before[name])}


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal as bit patterns: tells -0.0 from 0.0."""
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def halve(block: Block) -> None:
    """Prune the block, to change what the later ones read."""
    for matrix in block.matrices:
        matrix.keep(keep_mask(magnitude_scores(matrix.weight), Unstructured(0.5), "matrix"))


def traces(model: nn.Module) -> dict[str, Any]:
    """All that a walk could leave in a model: hooks, replaced forwards, modes, gradients."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        name: (
            [len(getattr(module, kind)) for kind in hooks],
            module.__dict__.get("forward"),
            module.training,
            [(id(p), p.requires_grad, p.grad is None) for p in module.parameters(recurse=False)],
        )
        for name, module in model.named_modules()
    }


@contextlib.contextmanager
def counted_calls(*modules: nn.Module) -> Iterator[dict[str, int]]:
    """How often any of the modules is called."""
    calls = {"count": 0}

    def count(*_: Any) -> None:
        calls["count"] += 1

    handles = [module.register_forward_pre_hook(count) for module in modules]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


class PlainBlock(nn.Module):
    """A residual block of two linears. Subclasses change what it takes or returns."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def mix(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.down(torch.tanh(self.up(hidden)))

    def forward(self, hidden_states: torch.Tensor) -> Any:
        return self.mix(hidden_states)


class PlainModel(PreTrainedModel):
    """The least model that has decoder blocks. Subclasses change what happens around them."""

    config_class = PretrainedConfig

    def __init__(self, block: Callable[[], nn.Module] = PlainBlock, depth: int = DEPTH, width: int = 8) -> None:
        super().__init__(PretrainedConfig(num_hidden_layers=depth))
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList([block() for _ in range(depth)])
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        scattered(self)

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> torch.Tensor:
        hidden = self.embedding(input_ids)
        for block in self.blocks:
            hidden = self.step(block, hidden, input_ids)
        return self.head(hidden)

    def step(self, block: nn.Module, hidden: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        output = block(hidden)
        return output[0] if isinstance(output, tuple) else output


class Rescaling(PlainModel):
    """Changes the hidden state between its blocks."""

    def step(self, block: nn.Module, hidden: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        return block(hidden) * 0.5


# A bench of its own: a tiny model in a folder, texts, suites, strangers' plugins and the command


@dataclass(frozen=True)
class Bench:
    """A folder with the model `tiny` and three texts. Nothing writes into it."""

    folder: Path

    @property
    def model(self) -> Path:
        return self.folder / "tiny"

    @property
    def calibration(self) -> Path:
        return self.folder / "calibration.txt"

    @property
    def evaluation(self) -> Path:
        return self.folder / "evaluation.txt"

    @property
    def training(self) -> Path:
        return self.folder / "training.txt"

    @property
    def perplexity(self) -> str:
        """An evaluation of four windows."""
        return f"perplexity[data={self.evaluation},window=16,windows=4]"

    def suite_text(
        self,
        *methods: str,
        targets: Sequence[str] = ("0.5",),
        seeds: Sequence[int] = (0,),
        evals: Sequence[str] | None = None,
        model: Path | None = None,
        more: str = "",
    ) -> str:
        """A suite as TOML; steps of a method are joined by ` + `, `more` is written at its end."""
        parts = [
            '[suite]\nname = "small"',
            f"[[model]]\npath = {json.dumps(str(model or self.model))}",
            f"[calibration]\nsource = {json.dumps(str(self.calibration))}\nsamples = 4\nlength = 16",
            *(f"[[method]]\nsteps = {json.dumps(method.split(' + '))}" for method in methods),
            *(f"[[eval]]\nuse = {json.dumps(use)}" for use in (evals or [self.perplexity])),
            f"[grid]\ntargets = {json.dumps(list(targets))}\nseeds = {json.dumps(list(seeds))}",
            "[limits]\nthreads = 1\nbatch_size = 4",
        ]
        return "\n\n".join(parts) + f"\n{more}\n"

    def requests(self, folder: Path, *methods: str, **changes: Any) -> list[RunRequest]:
        """The planned runs of a suite."""
        suite = folder / "small.toml"
        suite.write_text(self.suite_text(*methods, **changes))
        return Planner(load_suite(str(suite)), load_registry(), "here", "prunebench run small.toml", "cpu").requests()


def make_bench(folder: Path) -> Bench:
    """Fill a folder: a small random LLaMA, a tokenizer of 300 tokens, the first stories of the quickstart's texts."""
    bench = Bench(folder)
    texts = suites_folder() / "quickstart" / "texts"
    for name in ("calibration", "evaluation", "training"):
        content = (texts / f"{name}.txt").read_text(encoding="utf-8")
        stories = re.split(r"(?m)^(?== [^=\n]+ =$)", content)[1:4]
        (folder / f"{name}.txt").write_text("".join(stories), encoding="utf-8")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    end = "<|endoftext|>"
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=[end], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train([str(texts / "calibration.txt")], trainer)
    shape = {"vocab_size": 300, "max_position_embeddings": 64, "num_hidden_layers": 2, "bos_token_id": 0, "eos_token_id": 0}
    with quiet_transformers():
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end, eos_token=end).save_pretrained(bench.model)
        tiny("llama", **shape).save_pretrained(bench.model)
    return bench


def install_plugin(folder: Path, source: str, name: str = "theirs") -> Path:
    """Put a module with hooks into a folder as an installed distribution, `their-<name>` 1.2.3; the folder goes on the path."""
    module = f"plugin_of_{name}"
    metadata = folder / f"their_{name}-1.2.3.dist-info"
    metadata.mkdir(parents=True)
    (folder / f"{module}.py").write_text(source)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: their-{name}\nVersion: 1.2.3\n")
    (metadata / "entry_points.txt").write_text(f"[prunebench]\n{name} = {module}\n")
    return folder


@dataclass(frozen=True)
class Ran:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def complaint(self) -> str:
        """The one line on stderr, `error: …`, of at most two sentences, of a command that ended with 2."""
        assert self.code == 2, self
        assert re.fullmatch(r"error: [^\n]+\n", self.err), self.err
        assert len(re.findall(r"[.?!](?=\s|$)", self.err)) <= 2, self.err
        assert "Traceback" not in self.out
        return self.err


def python_path(folder: Path) -> str:
    """PYTHONPATH with one more folder, the first."""
    return os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])


def start_command(
    *args: str | Path, path: Path | None = None, cwd: Path | None = None, under: Sequence[str] = (), **environment: str
) -> Any:
    """The real command in a session of its own; `path` goes on PYTHONPATH, and `under` is a command that limits another."""
    more = {"PYTHONPATH": python_path(path)} if path else {}
    return subprocess.Popen(
        [*under, Path(sys.executable).with_name("prunebench"), *map(str, args)],
        cwd=cwd,
        # Waiting threads sleep: spinning ones of several processes starve each other on few cores.
        env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "CUDA_VISIBLE_DEVICES": "", **more, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that starts the tests in the background has interruptions ignored, and its children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        start_new_session=True,
    )


def run_command(*args: str | Path, **options: Any) -> Ran:
    """The real command, to its end."""
    with start_command(*args, **options) as process:
        out, err = process.communicate(timeout=300)
    return Ran(process.returncode, out, err)


Process = subprocess.Popen[str]


@contextlib.contextmanager
def programs() -> Iterator[Callable[..., Process]]:
    """Starts programs in Python, with arguments, that say something by lines and wait for lines; ends those that are left."""
    with contextlib.ExitStack() as stack:

        def begin(program: str, *args: str | Path) -> Process:
            command, pipe = [sys.executable, "-c", program, *map(str, args)], subprocess.PIPE
            process = stack.enter_context(subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, bufsize=1))
            stack.callback(process.kill)
            return process

        yield begin


def heard(process: Process) -> str:
    """The next line that a program says."""
    assert process.stdout is not None
    return process.stdout.readline().strip()


def tree(folder: Path) -> Mapping[str, bytes | None]:
    """Everything in a folder: files with their content, folders with None."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))
    }


def cases(table: Mapping[str, Any]) -> list[Any]:
    """A table of named cases for `parametrize`; a tuple is several arguments."""
    return [pytest.param(*(value if isinstance(value, tuple) else (value,)), id=name) for name, value in table.items()]


# Records by hand


C4_TEXT = TextSpec(name="allenai/c4", config="en", split="train", origin="hub", content="c4c4c4c4c4c4c4c4", complete=True)
CONDITIONS: dict[str, Any] = {
    "eval": "perplexity",
    "data": "Salesforce/wikitext",
    "config": "wikitext-2-raw-v1",
    "split": "test",
    "origin": "hub",
    "content": "0011223344556677",
    "complete": True,
    "window": 512,
    "windows": 740,
    "weights": "aaaa000011112222",
    "dtype": "float32",
    "attention": "sdpa",
}


def make_spec(
    method: str = "wanda",
    target: str = "0.5",
    seed: int | None = 0,
    *,
    model: str = "tiny",
    revision: int = 1,
    recipe: Recipe | None = None,
    conditions: Mapping[str, Any] = CONDITIONS,
    more_evals: Sequence[EvalSpec] = (),
) -> RunSpec:
    """A spec; steps of a method are joined by ` + `. Without a seed the method uses no data."""
    asked = Recipe(calibration=C4_TEXT, sampler="documents-v1", samples=128, length=512) if recipe is None else recipe
    return RunSpec(
        model=ModelSpec(name=model, weights="aaaa000011112222", tokenizer="bbbb000011112222", dtype="float32", source="local"),
        steps=tuple(StepSpec(text=text, revision=revision) for text in method.split(" + ")),
        target=target,
        seed=seed,
        recipe=Recipe() if seed is None else asked,
        calibration_tokens=None if seed is None else f"{seed:016x}",
        evals=(EvalSpec(text="perplexity", revision=1, conditions=dict(conditions)), *more_evals),
    )


def make_record(
    spec: RunSpec | None = None,
    value: float = 100.0,
    *,
    machine: str = "box",
    status: str = "ok",
    reason: str | None = None,
    kind: FailureKind = "error",
    started: str = "2026-01-01T00:00:00+00:00",
    suite: str | None = "quickstart",
    seconds: float = 2.0,
    peak_host_bytes: int = 300 << 20,
    peak_device_bytes: int | None = None,
    sparsity: float = 0.5,
    higher_is_better: bool = False,
    unit: str = "perplexity",
    shared_machine: bool = False,
    **changes: Any,
) -> RunRecord:
    """What came out of a run; `changes` are fields of the record."""
    spec = spec or make_spec()
    found = {
        f"eval{index}": ScoreRecord(
            value=value,
            unit=unit,
            higher_is_better=higher_is_better,
            seconds=1.5,
            conditions=asked.conditions,
            items={"nll": [4.25, 4.5], "document": [0, 1]},
        )
        for index, asked in enumerate(spec.evals)
    }
    step = StepRecord(
        pruner=spec.steps[0].text.partition("[")[0] if spec.steps else "none",
        options={"group": "row", "scale": 0.5},
        revision=1,
        distribution="prunebench",
        version="0.1.0",
        phases={"other": seconds / 2, "scoring": seconds / 2},
        peak_device_bytes=peak_device_bytes,
        peak_host_bytes=peak_host_bytes,
        host_peak_sampled=False,
        notes={"remark": "naïve, 50 %", "shares": [0.5, None, True]},
    )
    audit = AuditRecord(
        removed=32,
        zeros=33,
        extra_zeros=1,
        sparsity_prunable=sparsity,
        sparsity_total=sparsity / 2,
        coverage=0.996,
        matrices=[MatrixAudit(name="model.layers.0.mlp.up_proj", shape=(8, 8), removed=32, zeros=33)],
    )
    provenance = Provenance(
        suite=suite,
        command="prunebench run quickstart",
        commit="0" * 40,
        dirty=False,
        packages={"torch": "2.13.0"},
        python="3.11.7",
        platform="Linux x86_64 glibc2.36",
        device="A CPU",
        driver=None,
        threads=2,
        batch_size=8,
        executor="subprocess",
        shared_machine=shared_machine,
        started=started,
        seconds=12.5,
    )
    ok = status == "ok"
    failure = Failure(kind=kind, type="ValueError", message=reason or "it broke", step=None) if status == "failed" else None
    fields = {
        "id": spec.id,
        "machine": machine,
        "spec": spec,
        "status": status,
        "reason": None if ok else reason or "it does not fit",
        "failure": failure,
        "steps": [step] if ok else [],
        "audit": audit if ok else None,
        "scores": found if ok else {},
        "provenance": provenance,
    }
    return RunRecord(**fields | changes)


# Texts and tokens


class Letters:
    """A tokenizer of one token a character, its ASCII code, that keeps what it was called with; `bos` comes first if given."""

    is_fast = True

    def __init__(self, bos: int | None = None) -> None:
        self.bos = [] if bos is None else [bos]
        self.read: list[str] = []

    def __call__(self, text: str, verbose: bool = True, return_offsets_mapping: bool = False) -> dict[str, Any]:
        self.read.append(text)
        ids = [*self.bos, *text.encode("ascii")]
        offsets = [*((0, 0) for _ in self.bos), *((at, at + 1) for at in range(len(text)))]
        return {"input_ids": ids, "offset_mapping": offsets}


def write_mirror(folder: Path, name: str, rows: Sequence[Any]) -> Path:
    """Put `owner/name/config/split` into a mirror: rows of text, or whole rows."""
    path = folder / "datasets" / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({"text": row} if isinstance(row, str) else row) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8")
    return path


@contextlib.contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """Writing beyond it fails, as on a full disk, with the first bytes written."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def eval_job(
    evaluation: Eval,
    model: Any,
    facts: EvalFacts,
    *,
    dense: Any = None,
    batch_size: int = 4,
    progress: Callable[..., None] = lambda *_: None,
) -> EvalJob:
    """What an evaluation is given on the CPU; without a dense model the model stands for it."""
    return EvalJob(
        model=model,
        facts=facts,
        conditions=evaluation.conditions(facts),
        device=torch.device("cpu"),
        batch_size=batch_size,
        progress=progress,
        dense=lambda: model if dense is None else dense,
    )


class Oracle(nn.Module):
    """Stands for a language model: gives logits by rule, and keeps what it was shown and the sizes of the batches."""

    def __init__(self, rule: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.rule = rule
        self.shown: list[list[int]] = []
        self.batches: list[int] = []

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        assert not use_cache
        assert not torch.is_grad_enabled()
        self.shown += input_ids.tolist()
        self.batches.append(len(input_ids))
        return SimpleNamespace(logits=self.rule(input_ids))

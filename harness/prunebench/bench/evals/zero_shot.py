"""Accuracy on tasks of lm-eval, by the likelihood of the answers.

The model is the one in memory; questions, prompts and metrics are lm-eval's, whose version is a condition. Every question's
choice, right answer and likelihoods are kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from prunebench.bench.evals.task_index import SETS, data_key, lm_eval_version
from prunebench.errors import DataError, NonFiniteError, OptionError
from prunebench.spec import Eval, EvalFacts, EvalJob, JsonDict, Sample, Score, option
from prunebench.toolkit.cache import digest, load_json, save_json

if TYPE_CHECKING:  # lm-eval takes seconds to import, and most commands do without
    from prunebench.bench.evals.lm_tasks import TaskSet

METRICS = ("acc", "acc_norm")


@dataclass
class ZeroShot(Eval):
    """Accuracy on lm-eval tasks: a set of the papers, tasks and groups by name, or a definition in a file."""

    name: ClassVar[str] = "zero_shot"
    revision: ClassVar[int] = 1

    tasks: str = option("wanda7", f"{', '.join(SETS)}, names of lm-eval joined by +, or FILE.yaml")
    shots: int = option(0, "examples before each question")
    limit: int = option(0, "only so many questions of each task, from the start; 0 is all")
    metric: str = option("acc", "acc, or acc_norm: likelihoods by the length of the answer; the papers use acc")

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise OptionError(f"zero_shot: the metric is {' or '.join(METRICS)}, not {self.metric!r}.")
        for name in ("shots", "limit"):
            if getattr(self, name) < 0:
                raise OptionError(f"zero_shot: {name} cannot be {getattr(self, name)}.")

    def conditions(self, facts: EvalFacts) -> JsonDict:
        """Version of lm-eval, tasks with their versions, data and prompts, metric, shots, limit."""
        if facts.tokenizer is None:
            raise DataError("zero_shot: tasks are text, and the model has no tokenizer.")
        folder = Path(facts.folder)
        key = data_key(self.tasks, folder)
        key = key and digest([key, self.tasks, str(self.shots), self.metric, str(self.revision)])
        found = load_json("tasks", key) if key else None
        if not found:
            found = self._described(folder)
            if key:
                save_json("tasks", key, found)
        return {
            "set": self.tasks if self.tasks in SETS else None,
            **found,
            "metric": self.metric,
            "shots": self.shots,
            "limit": self.limit or None,
            "lm_eval": lm_eval_version(),
        }

    def _described(self, folder: Path) -> JsonDict:
        from prunebench.bench.evals.lm_tasks import facts_of, load_tasks, quiet

        asked = load_tasks(self.tasks, self.shots, folder)
        for name, task in asked.tasks.items():
            if self.metric not in task.aggregation():
                raise OptionError(f"zero_shot: {name} has no {self.metric}; it has {', '.join(task.aggregation())}.")
        with quiet():
            return {"tasks": {member.name: facts_of(member) for member in asked.members}, "missing": sorted(asked.missing)}

    def measure(self, job: EvalJob) -> Score:
        """Every question's answer; the value is the mean over members, None where one of a set is missing."""
        from prunebench.bench.evals.lm_tasks import gold_of, load_tasks, quiet

        asked = load_tasks(self.tasks, self.shots, Path(job.facts.folder))
        with quiet():
            samples = self._answers(asked, job)
        items: dict[str, list[float | int | str]] = {name: [] for name in _COLUMNS}
        for member in asked.members:
            for name, task in member.tasks.items():
                for sample in sorted(samples[name], key=lambda sample: int(sample["doc_id"])):
                    self._note(items, member.name, name, gold_of(task, sample["doc"]), sample)
        parts = {member.name: _mean(items, member.name) for member in asked.members}
        value = None if asked.missing else math.fsum(parts.values()) / len(parts)
        shown = parts if len(parts) > 1 else {}
        return Score(value, "accuracy", True, items, shown, Sample("right", strata="stratum", tasks="task"))

    def _answers(self, asked: TaskSet, job: EvalJob) -> dict[str, list[dict[str, Any]]]:
        import lm_eval
        from lm_eval.tasks import TaskManager

        from prunebench.bench.evals.lm_model import ModelInMemory

        found = lm_eval.simple_evaluate(
            model=ModelInMemory(job),
            tasks=list(asked.tasks.values()),
            num_fewshot=self.shots,
            limit=self.limit or None,
            bootstrap_iters=0,
            log_samples=True,
            task_manager=TaskManager(include_defaults=False),  # otherwise it reads all its definitions
        )
        samples: dict[str, list[dict[str, Any]]] = found["samples"]
        return samples

    def _note(
        self, items: dict[str, list[float | int | str]], member: str, name: str, gold: int | None, sample: dict[str, Any]
    ) -> None:
        likelihoods = [float(answer[0]) for answer in sample["filtered_resps"]]
        if not all(map(math.isfinite, likelihoods)):
            raise NonFiniteError(f"a likelihood of question {sample['doc_id']} of {name} is not finite.")
        phenomenon = sample["doc"].get("phenomenon")
        only = len(likelihoods) == 1  # a task whose answer is a text: right when it is what the model would have written
        choice = 0 if not only or sample["filtered_resps"][0][1] else -1
        items["task"].append(member)
        items["stratum"].append(f"{name}: {phenomenon}" if phenomenon else name)
        items["question"].append(int(sample["doc_id"]))
        items["gold"].append(-1 if gold is None else gold)
        items["choice"].append(choice if only else max(range(len(likelihoods)), key=likelihoods.__getitem__))
        items["right"].append(int(sample[self.metric]))
        items["choices"].append(len(likelihoods))
        items["likelihoods"].append(" ".join(f"{likelihood:.3f}" for likelihood in likelihoods))


_COLUMNS = ("task", "stratum", "question", "gold", "choice", "right", "choices", "likelihoods")


def _mean(items: dict[str, list[float | int | str]], member: str) -> float:
    """The share of right answers of a member."""
    right = [int(answer) for answer, task in zip(items["right"], items["task"], strict=True) if task == member]
    return sum(right) / len(right)

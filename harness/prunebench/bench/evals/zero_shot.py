"""Accuracy on tasks of lm-eval, by the likelihood of the answers.

The model is the one in memory; questions, prompts and metrics are lm-eval's, whose version is a condition. Every question's
choice, right answer and likelihoods are kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from prunebench.bench.evals.task_index import SETS, data_key, lm_eval_version
from prunebench.errors import DataError, NonFiniteError, OptionError
from prunebench.spec import Eval, EvalFacts, EvalJob, JsonDict, Sample, Score, option
from prunebench.toolkit.cache import digest, load_json, save_json

if TYPE_CHECKING:  # lm-eval takes seconds to import, and most commands do without
    from lm_eval.api.task import Task

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
        if facts.tokenizer.bos_token_id is None and facts.tokenizer.eos_token_id is None:
            raise DataError("zero_shot: lm-eval begins a text with BOS or EOS, and the tokenizer has neither.")
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
            return {
                "tasks": {member.name: facts_of(member, self.shots) for member in asked.members},
                "missing": sorted(asked.missing),
            }

    def measure(self, job: EvalJob) -> Score:
        """Every question's answer; the value is the mean over members, None where one of a set is missing."""
        from prunebench.bench.evals.lm_tasks import load_tasks

        asked = load_tasks(self.tasks, self.shots, Path(job.facts.folder))
        items = self._asked(asked, job)
        parts = {member.name: _mean(items, member.name) for member in asked.members}
        value = None if asked.missing else math.fsum(parts.values()) / len(parts)
        shown = parts if len(parts) > 1 or asked.missing else {}
        return Score(value, "accuracy", True, items, shown, Sample("right", strata="stratum", tasks="task"))

    def again(self, job: EvalJob, chosen: Sequence[int]) -> dict[str, list[float | int | str]]:
        """Only these questions, in the order of `measure`: columns as it finds them."""
        from prunebench.bench.evals.lm_tasks import load_tasks

        asked = load_tasks(self.tasks, self.shots, Path(job.facts.folder))
        sizes = {name: min(self.limit or len(task.eval_docs), len(task.eval_docs)) for name, task in asked.tasks.items()}
        every = [(name, number) for name, size in sizes.items() for number in range(size)]
        wanted: dict[str, list[int]] = {}
        for name, number in sorted({every[row] for row in chosen}):
            wanted.setdefault(name, []).append(number)
        items = self._asked(asked, job, wanted)
        order = {place: row for row, place in enumerate((name, n) for name in sizes for n in wanted.get(name, ()))}
        return {column: [values[order[every[row]]] for row in chosen] for column, values in items.items()}

    def _asked(self, asked: TaskSet, job: EvalJob, wanted: dict[str, list[int]] | None = None) -> Columns:
        """The columns of all questions, or of those with the wanted numbers by task."""
        from prunebench.bench.evals.lm_tasks import gold_of, quiet

        items: Columns = {name: [] for name in _COLUMNS}
        with quiet():
            samples = self._answers(asked, job, wanted)
            for member in asked.members:
                for name, task in member.tasks.items():
                    for sample in sorted(samples.get(name, ()), key=lambda sample: int(sample["doc_id"])):
                        self._note(items, member.name, task, gold_of(task, sample["doc"]), sample)
        return items

    def _answers(self, asked: TaskSet, job: EvalJob, wanted: dict[str, list[int]] | None) -> dict[str, list[dict[str, Any]]]:
        import lm_eval

        from prunebench.bench.evals.lm_model import ModelInMemory
        from prunebench.bench.evals.lm_tasks import RememberingTask, begin

        for task in asked.tasks.values():
            begin(task, self.shots)
            if isinstance(task, RememberingTask) and not callable(task.config.process_results):
                task.override_metric(self.metric)  # others cost more requests, and lambada's perplexity may overflow
        tasks = {name: task for name, task in asked.tasks.items() if wanted is None or name in wanted}
        limit = None if wanted else self.limit or None
        found = lm_eval.evaluate(
            ModelInMemory(job), {"tasks": tasks}, limit=limit, samples=wanted, bootstrap_iters=0, log_samples=True
        )
        samples: dict[str, list[dict[str, Any]]] = found["samples"]
        return samples

    def _note(
        self,
        items: Columns,
        member: str,
        task: Task,
        gold: int | None,
        sample: Mapping[str, Any],
    ) -> None:
        name, doc = task.task_name, sample["doc"]
        likelihoods = [float(answer[0]) for answer in sample["filtered_resps"]]
        if not all(map(math.isfinite, likelihoods)):
            raise NonFiniteError(f"a likelihood of question {sample['doc_id']} of {name} is not finite.")
        right, phenomenon = float(sample[self.metric]), doc.get("phenomenon")
        if len(likelihoods) == 1:  # the answer is a text: right when it is what the model would have written
            choice = 0 if sample["filtered_resps"][0][1] else -1
        else:
            lengths = map(len, task.doc_to_choice(doc)) if self.metric == "acc_norm" else repeat(1)
            weighed = [likelihood / length for likelihood, length in zip(likelihoods, lengths, strict=False)]
            choice = max(range(len(weighed)), key=weighed.__getitem__)
        items["task"].append(member)
        items["stratum"].append(f"{name}: {phenomenon}" if phenomenon else name)
        items["question"].append(int(sample["doc_id"]))
        items["gold"].append(-1 if gold is None else gold)
        items["choice"].append(choice)
        items["right"].append(int(right) if right.is_integer() else right)  # some tasks' own functions give shares
        items["choices"].append(len(likelihoods))
        items["likelihoods"].append(" ".join(f"{likelihood:.3f}" for likelihood in likelihoods))


Columns = dict[str, list[float | int | str]]

_COLUMNS = ("task", "stratum", "question", "gold", "choice", "right", "choices", "likelihoods")


def _mean(items: Columns, member: str) -> float:
    """The share of right answers of a member."""
    right = [float(answer) for answer, task in zip(items["right"], items["task"], strict=True) if task == member]
    return math.fsum(right) / len(right)

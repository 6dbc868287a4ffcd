"""What the page `leaderboard.md` says of itself."""

INTRODUCTION = """# prunebench leaderboard

Pruning methods for language models, each measured by one protocol: a section for each set of conditions, a table for each
target, the dense model on top. Bold: nobody in the table is significantly better.

Made by `prunebench report` from the records in `results/`; never edited by hand."""

READING = """## How to read the tables

Rows in one table were measured under the same conditions on the same machine, and prunings that used data had the same
recipe. Several calibration seeds are one row: mean ± standard deviation over seeds. `deterministic` methods use neither data
nor randomness.

**Ranks are intervals.** Each pair of rows is compared item by item, window by window or question by question, for the same
seeds: `rank` counts who is significantly better and who significantly worse after Holm's correction over all pairs of a table
(5%), so rows that share ranks cannot be told apart by this text. Bold: nobody is significantly better. The estimand is *these
seeds, new text* (documents, or questions within their subjects, are resampled); it says nothing of other calibration seeds,
whose spread stands behind the ±. `vs dense` gives the paired difference with its 95% interval, of perplexities in per cent, of
accuracies in points. A row's mean is over all its seeds, a comparison over those that both rows have. `flips %`: questions that
went from right to wrong / from wrong to right against dense.

Options that differ from a method's defaults are written out; `(tuned)` says that they were chosen on validation text, by the
records of a suite that are kept too. What was retrained on text has tables of its own: on top the dense model, and the dense
model after the very same training as a control, since training alone helps a model too; `vs control` compares with that.
Budgets of training are in the options (`steps`, `batch`), in the suites that ship for small machines far below the papers'.

`sparsity %` is the share of zeros found in the prunable weights (all linear weights of the decoder blocks), `of all %` the
same zeros as a share of all parameters. `coverage %` is the share of the blocks' parameters that are in matrices the method
pruned, `extra` how many parameters it added. `prune s` is the whole pruning without loading and evaluation, with the original
cost of whatever was reused; `peak MiB` the highest memory of the process (of the GPU where there is one) while pruning; a `*`
marks costs measured while other processes took cores that the run needed. An accuracy with ≈ cannot be told from guessing, one
with ↓ is significantly worse than that.

`trust` stands in sections of which somebody looked at records again (`prunebench verify`): `reported` as handed in, `checked`
against their raw answers, masks and each other, `replayed` when a sample was made again with the model; a row has the lowest
of its records. Without the column all are `reported`."""

PUBLISHED = """Numbers of the papers are kept in `results/published/`. One stands beside ours only where model, method, target,
every stated condition and the content of the full data set agree; `reproduced` is within 1% of a perplexity, or two standard
errors of an accuracy. A copy of another paper's number confirms nothing."""

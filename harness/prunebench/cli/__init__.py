"""The `prunebench` command. Heavy modules are imported inside the commands, so that `--help` is instant."""

from prunebench.cli import running, bank, status, results, comparing, reporting  # isort: skip - the order of the help
from prunebench.cli import bundles, exporting, models, plugins  # isort: skip
from prunebench.cli.program import main

__all__ = [
    "bank",
    "bundles",
    "comparing",
    "exporting",
    "main",
    "models",
    "plugins",
    "reporting",
    "results",
    "running",
    "status",
]

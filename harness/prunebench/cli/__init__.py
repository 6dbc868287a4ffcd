"""The `prunebench` command. Heavy modules are imported inside the commands, so that `--help` is instant."""

from prunebench.cli import running, status, results, comparing, models, plugins  # isort: skip - the order of the help
from prunebench.cli.program import main

__all__ = ["comparing", "main", "models", "plugins", "results", "running", "status"]

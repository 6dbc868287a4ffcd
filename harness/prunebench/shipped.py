"""What ships with the package: suites, and the quickstart's trained model with its texts."""

from __future__ import annotations

from pathlib import Path


def suites_folder() -> Path:
    """Where the shipped suites are: in the wheel beside the package, in a clone at the top."""
    package = Path(__file__).parent
    shipped = package / "benchmarks"
    return shipped if shipped.is_dir() else package.parents[1] / "benchmarks"

"""Settings for all tests."""

from __future__ import annotations

import os

# No test may reach the network; set before anything imports these libraries.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

import pytest
import torch
from transformers.utils import logging


@pytest.fixture(autouse=True, scope="session")
def _quiet() -> None:
    """One thread, so that two workers do not fight for two cores; no advice about tiny vocabularies."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()

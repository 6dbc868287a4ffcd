"""Imported once by the fork server, so that a fresh process for each run starts in milliseconds."""

import warnings

import datasets
import torch
import transformers

import prunebench.bench.runner
from prunebench.plugins import load_registry

# Loading the libraries starts helper threads that the children do not need.
warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork.*", category=DeprecationWarning)
load_registry()

__all__ = ["datasets", "prunebench", "torch", "transformers"]

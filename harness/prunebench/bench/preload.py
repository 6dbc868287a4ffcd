"""Imported once by the fork server, so that a fresh process for each run starts in milliseconds."""

import signal
import warnings


def _load() -> None:
    import datasets
    import torch
    import transformers

    import prunebench.bench.runner
    from prunebench.plugins import load_registry

    load_registry()
    del datasets, torch, transformers, prunebench


# First of all: an interruption is for the command to handle, and the fork server and its runs get it from the terminal too.
signal.signal(signal.SIGINT, signal.SIG_IGN)
# Loading the libraries starts helper threads that the children do not need.
warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork.*", category=DeprecationWarning)
_load()

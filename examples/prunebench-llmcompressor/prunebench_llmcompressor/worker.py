"""Runs in llm-compressor's environment, which need not have prunebench: `python worker.py FOLDER`.

Reads `model/`, `tokens.npy` ([sequences, length]) and `request.json`; writes `pruned.safetensors`, the weights of the matrices
that the request names, and `notes.json`.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import threading
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers import pruning
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast


def main(folder: Path) -> None:
    """Prune as the request says."""
    request = json.loads((folder / "request.json").read_text())
    tokens = np.load(folder / "tokens.npy")
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=getattr(torch, request["dtype"]))
    rows = Dataset.from_dict({"input_ids": tokens.tolist(), "attention_mask": np.ones_like(tokens).tolist()})
    modifier = getattr(pruning, request["modifier"])(targets=["Linear"], ignore=["re:.*lm_head"], **request["arguments"])
    started, computed = time.perf_counter(), time.process_time()
    oneshot(
        model=model,
        dataset=rows,
        processor=PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel())),  # asked for, though tokens are given
        recipe=[modifier],
        num_calibration_samples=len(tokens),
        max_seq_length=tokens.shape[1],
        shuffle_calibration_samples=False,
    )
    seconds, computed = time.perf_counter() - started, time.process_time() - computed
    weights = {name: model.get_submodule(name).weight.detach().cpu().contiguous() for name in request["matrices"]}
    save_file(weights, folder / "pruned.safetensors")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    notes = {
        "seconds of llm-compressor": round(seconds, 3),
        "CPU seconds of llm-compressor": round(computed, 3),
        "peak host GiB of llm-compressor": round(peak / 2**30, 3),
        "versions": {name: version(name) for name in ("llmcompressor", "compressed-tensors", "transformers", "torch")},
    }
    (folder / "notes.json").write_text(json.dumps(notes))


def end_with_parent() -> None:
    """Standard input closes when the process that asked for this ends."""
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=end_with_parent, daemon=True).start()
    main(Path(sys.argv[1]))

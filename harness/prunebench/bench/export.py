"""A pruned model as a folder: a normal Hugging Face model, with its record, its bit-packed keep masks and, in a folder of its
own, the adapters that stay apart from the weights."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from transformers import PreTrainedModel

from prunebench.bench.mask_bank import masks_of
from prunebench.errors import StoreError, WriteError
from prunebench.results.files import write_aside
from prunebench.results.records import RunRecord
from prunebench.results.tensor_files import tensor_parts
from prunebench.toolkit.adapter_files import save_adapters
from prunebench.toolkit.anatomy import ModelAnatomy
from prunebench.toolkit.experts import together
from prunebench.toolkit.loading import TOKENIZER_FILES, ModelSource, identify
from prunebench.toolkit.quiet import quiet_transformers

RECORD_FILE = "prunebench.json"
MASK_FILE = "mask.safetensors"


def check_output(out: Path) -> None:
    """Find out before any work whether a folder can be written.

    Raises:
        StoreError: it is not empty, or cannot be made.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise StoreError(f"the output folder {out} exists and is not empty; name another.")
    there = next(folder for folder in out.absolute().parents if folder.exists())
    try:
        with tempfile.TemporaryDirectory(dir=there, prefix=".prunebench-"):
            pass
    except OSError as error:
        raise StoreError(f"the output folder {out} cannot be made: {error.strerror}.") from None


def write_model(model: PreTrainedModel, source: ModelSource, anatomy: ModelAnatomy, folder: Path) -> None:
    """Write a model, its tokenizer and its adapters as a Hugging Face folder."""
    tokenizer = identify(source).tokenizer
    with quiet_transformers():
        with together(model):
            model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    for name in TOKENIZER_FILES:
        if (source.folder / name).is_file():  # as it was: another version of transformers writes it another way
            shutil.copyfile(source.folder / name, folder / name)
    save_adapters(anatomy, folder)


def save_pruned(
    model: PreTrainedModel,
    source: ModelSource,
    anatomy: ModelAnatomy,
    record: RunRecord,
    out: Path,
) -> None:
    """Write the folder aside and move it into place, so that it is never half there.

    `mask.safetensors` holds for each matrix its keep mask (1 survives) as bytes in C order, the first entry in the highest
    bit; shapes and a manifest are in the file's metadata (`results/mask_files.py`).

    Raises:
        WriteError: it cannot be written.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=".prunebench-") as aside:
            folder = Path(aside) / "model"
            write_model(model, source, anatomy, folder)
            write_aside(folder, tensor_parts(*masks_of(anatomy, record.spec))).replace(folder / MASK_FILE)
            (folder / RECORD_FILE).write_text(record.to_json(), encoding="utf-8")
            for path in folder.rglob("*"):
                path.chmod(0o755 if path.is_dir() else 0o644)
            if out.is_dir():
                out.rmdir()
            shutil.move(folder, out)
    except OSError as error:
        raise WriteError(f"the pruned model cannot be written to {out}: {error.strerror or error}.") from error

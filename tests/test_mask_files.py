"""Files of keep masks: what is written is read, by safetensors too; what is broken or foreign is told in a sentence."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from numpy.typing import NDArray
from support import files_no_larger_than, make_record

from prunebench.errors import StoreError, WriteError
from prunebench.results.mask_files import count_bits, mask_metadata, mask_tensors, read_masks
from prunebench.results.records import KeptMasks
from prunebench.results.store import ResultStore
from prunebench.results.tensor_files import Tensor, write_tensors
from prunebench.toolkit.masks import pack_bits

SHAPES = {"model.layers.0.q_proj": (8, 8), "model.layers.0.naïve": (3, 5), "model.layers.1.q_proj": (1, 1), "last": (70, 131)}


def some_masks(seed: int = 0) -> dict[str, NDArray[np.bool_]]:
    generator = np.random.default_rng(seed)
    return {name: generator.random(shape) < 0.4 for name, shape in SHAPES.items()}


def write(folder: Path, masks: dict[str, NDArray[np.bool_]], manifest: dict[str, str] | None = None) -> tuple[Path, str]:
    packed = {name: np.packbits(mask) for name, mask in masks.items()}
    shapes = {name: (mask.shape[0], mask.shape[1]) for name, mask in masks.items()}
    return write_tensors(folder, mask_tensors(packed), mask_metadata(shapes, manifest or {}))


def test_masks_are_read_as_they_were_written(tmp_path: Path) -> None:
    masks, manifest = some_masks(), {"weights": "0" * 16, "target": "0.5", "method": "wanda", "seed": "0"}
    path, digest = write(tmp_path / "masks", masks, manifest)
    assert path == tmp_path / "masks" / f"{digest}.safetensors"
    found = read_masks(path, digest)
    assert (found.shapes, found.manifest, list(found.shapes)) == (SHAPES, manifest, list(masks))
    for name, mask in masks.items():
        assert found.keep(name).dtype == np.bool_
        assert (found.keep(name) == mask).all()
        assert found.removed(name) == int((~mask).sum())
    assert [entry.name for entry in path.parent.iterdir()] == [path.name], "nothing passing is left"
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_a_file_is_a_bit_for_each_weight_and_a_header(tmp_path: Path) -> None:
    path, _ = write(tmp_path, {"big": np.ones((512, 1024), dtype=bool)})
    assert 0 <= path.stat().st_size - 512 * 1024 * 2 // 16 < 300


def test_safetensors_reads_what_is_written(tmp_path: Path) -> None:
    masks = some_masks()
    path, _ = write(tmp_path, masks, {"target": "2:4"})
    theirs = safetensors.numpy.load_file(path)
    assert theirs.keys() == masks.keys()
    for name, bits in theirs.items():
        assert (bits == np.packbits(masks[name])).all()
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata()["target"] == "2:4"
        assert json.loads(file.metadata()["shapes"]) == {name: list(shape) for name, shape in SHAPES.items()}


def test_what_safetensors_writes_is_read_whatever_its_order(tmp_path: Path) -> None:
    masks = {name: torch.from_numpy(mask) for name, mask in some_masks().items()}
    metadata = {"format": "prunebench-mask-1", "shapes": json.dumps({name: list(mask.shape) for name, mask in masks.items()})}
    path = tmp_path / "mask.safetensors"
    safetensors.torch.save_file({name: pack_bits(mask) for name, mask in masks.items()}, path, metadata)
    found = read_masks(path)
    assert found.manifest == {}
    for name, mask in masks.items():
        assert (found.keep(name) == mask.numpy()).all()


def test_equal_masks_are_one_file_and_others_another(tmp_path: Path) -> None:
    first, again = write(tmp_path, some_masks()), write(tmp_path, some_masks())
    assert first == again
    assert write(tmp_path, some_masks(1)) != first
    assert write(tmp_path, some_masks(), {"seed": "1"}) != first
    assert len(list(tmp_path.iterdir())) == 3


def test_a_file_that_was_cut_short_is_made_whole_by_writing_it_again(tmp_path: Path) -> None:
    path, digest = write(tmp_path, some_masks())
    path.write_bytes(path.read_bytes()[:-7])
    write(tmp_path, some_masks())
    assert read_masks(path, digest).shapes == SHAPES


def header_of(content: bytes) -> tuple[dict[str, dict[str, object]], bytes]:
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_header(change: Callable[[dict[str, dict[str, object]]], object]) -> Callable[[bytes], bytes]:
    def changed(content: bytes) -> bytes:
        header, body = header_of(content)
        change(header)
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + body

    return changed


Q = "model.layers.0.q_proj"


def with_shapes(change: Callable[[dict[str, object]], object]) -> Callable[[bytes], bytes]:
    def changed(header: dict[str, dict[str, object]]) -> None:
        shapes = json.loads(str(header["__metadata__"]["shapes"]))
        change(shapes)
        header["__metadata__"]["shapes"] = json.dumps(shapes)

    return with_header(changed)


def deep(content: bytes) -> bytes:
    text = b'{"__metadata__":' + b"[" * 100_000
    return len(text).to_bytes(8, "little") + text


BROKEN: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "nothing": (lambda content: b"", "empty"),
    "a few bytes": (lambda content: content[:5], "no header"),
    "half a header": (lambda content: content[:60], "no header"),
    "without its last byte": (lambda content: content[:-1], "does not fit its content"),
    "with another byte": (lambda content: content + b"\0", "1 bytes beside"),
    "a text": (lambda content: b"Masks are kept elsewhere." * 100, "no header"),
    "a huge header": (lambda content: (1 << 62).to_bytes(8, "little") + content[8:], "no header"),
    "a list as header": (lambda content: (2).to_bytes(8, "little") + b"[]" + content, "header is none"),
    "no JSON as header": (lambda content: (8).to_bytes(8, "little") + b"\xff\xfe{}{}{}" + content, "cannot be read"),
    "a deep header": (deep, "cannot be read"),
    "another format": (with_header(lambda h: h["__metadata__"].update(format="prunebench-mask-9")), "prunebench-mask-1"),
    "no metadata": (with_header(lambda h: h.pop("__metadata__")), "prunebench-mask-1"),
    "metadata that are numbers": (with_header(lambda h: h["__metadata__"].update(seed=1)), "no texts"),
    "another dtype": (with_header(lambda h: h[Q].update(dtype="I64")), "does not say what"),
    "a dtype of another size": (with_header(lambda h: h[Q].update(dtype="BF16")), "does not fit"),
    "a negative place": (with_header(lambda h: h[Q].update(data_offsets=[-8, 0])), "does not say what"),
    "a place that overlaps": (with_header(lambda h: h["last"].update(data_offsets=[0, 1147])), "does not fit"),
    "a fraction as shape": (with_header(lambda h: h[Q].update(shape=[8.0])), "does not say what"),
    "a huge shape": (with_header(lambda h: h[Q].update(shape=[10**4000])), "does not say what"),
    "very many sides": (with_header(lambda h: h[Q].update(shape=[1 << 40] * 10_000)), "does not say what"),
    "a tensor that is a text": (with_header(lambda h: h.update({Q: "U8"})), "does not say what"),  # type: ignore[dict-item]
    "a matrix too few": (with_shapes(lambda shapes: shapes.pop(Q)), "not those of its matrices"),
    "a larger matrix": (with_shapes(lambda shapes: shapes.update({Q: [8, 9]})), "not of its shape"),
    "a matrix of three sides": (with_shapes(lambda shapes: shapes.update({Q: [2, 4, 8]})), "is none"),
    "a matrix without rows": (with_shapes(lambda shapes: shapes.update({Q: [0, 8]})), "is none"),
    "a matrix of truths": (with_shapes(lambda shapes: shapes.update({Q: [True, 64]})), "is none"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_told_in_one_sentence(name: str, tmp_path: Path) -> None:
    path, digest = write(tmp_path, some_masks())
    change, said = BROKEN[name]
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(StoreError, match=r"the mask file .* cannot be read: ") as caught:
        read_masks(path)
    assert said in str(caught.value)
    assert str(caught.value).endswith(".")
    assert str(caught.value).isprintable()
    with pytest.raises(StoreError, match="cut short or changed after its record was written"):
        read_masks(path, digest)


def test_bits_beyond_the_last_weight_are_no_mask(tmp_path: Path) -> None:
    bits = np.full(2, 255, dtype=np.uint8)  # 15 weights, and one more
    path, _ = write_tensors(tmp_path, mask_tensors({"a": bits}), mask_metadata({"a": (3, 5)}, {}))
    with pytest.raises(StoreError, match="says more than there are weights"):
        read_masks(path)


def test_one_changed_bit_is_found(tmp_path: Path) -> None:
    path, digest = write(tmp_path, some_masks())
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    assert read_masks(path).shapes == SHAPES
    with pytest.raises(StoreError, match="changed after its record was written"):
        read_masks(path, digest)


def test_a_file_that_is_none_is_not_read(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="No such file"):
        read_masks(tmp_path / "missing.safetensors")
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(StoreError, match="it is no file"):
        read_masks(tmp_path / "pipe.safetensors")
    inside = tmp_path / "inside"
    inside.mkdir()
    secret, _ = write(tmp_path, some_masks())
    (inside / "link.safetensors").symlink_to(secret)
    with pytest.raises(StoreError, match="a link that leads out"):
        read_masks(inside / "link.safetensors")


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    with files_no_larger_than(100), pytest.raises(WriteError, match="cannot be written"):
        write(tmp_path, some_masks())
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from prunebench.results.tensor_files import Tensor, write_tensors

first = Tensor("U8", (4,), lambda: b"1234")
second = Tensor("U8", (4,), lambda: os.kill(os.getpid(), signal.SIGKILL))
write_tensors(Path(sys.argv[1]), {"first": first, "second": second}, {}, "mine-")
"""


def test_a_kill_leaves_no_file_that_is_half_there(tmp_path: Path) -> None:
    ended = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False, timeout=60)
    assert ended.returncode == -signal.SIGKILL
    [left] = tmp_path.iterdir()
    assert left.match("mine-*.tmp")
    assert stat.S_IMODE(left.stat().st_mode) == 0o600, "nobody else reads what is not whole"


def test_content_that_does_not_fit_its_shape_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has 3 bytes"):
        write_tensors(tmp_path, {"a": Tensor("F32", (1,), lambda: b"123")}, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 1000, 12345])
def test_bits_are_counted(size: int) -> None:
    generator = np.random.default_rng(size)
    first, second = (generator.integers(0, 256, size + 3, dtype=np.uint8)[3:] for _ in range(2))
    assert count_bits(first) == sum(int(byte).bit_count() for byte in first)
    assert count_bits(first, second) == sum((int(a) & int(b)).bit_count() for a, b in zip(first, second, strict=True))


# The results folder


def test_a_record_leads_to_its_masks(tmp_path: Path) -> None:
    warnings: list[str] = []
    store = ResultStore(tmp_path, warnings.append)
    path, digest = write(tmp_path / "masks", some_masks())
    kept = KeptMasks(file=f"masks/{digest}.safetensors", hash=digest, bytes=path.stat().st_size)
    store.write(make_record(masks=kept))
    [stored] = store.all()
    found = store.masks(stored.record)
    assert found is not None
    assert found.shapes == SHAPES
    assert store.masks(make_record()) is None
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(StoreError, match="cut short or changed"):
        store.masks(stored.record)
    path.unlink()
    with pytest.raises(StoreError, match="No such file"):
        store.masks(stored.record)


@pytest.mark.parametrize("folder", ["masks", "verdicts", "published"])
def test_folders_without_records_are_left_alone(folder: str, tmp_path: Path) -> None:
    store = ResultStore(tmp_path, pytest.fail)
    inside = tmp_path / folder / "inside"
    inside.mkdir(parents=True)
    (inside / "verdict.json").write_text("{}")
    record = make_record(machine=folder)
    store.write(record)
    assert [stored.record for stored in store.all()] == [record]
    assert sorted(path.name for path in inside.iterdir()) == ["verdict.json"]

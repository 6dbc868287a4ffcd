"""What the Hub would send: files with their sizes, asked for before anything large is fetched, and what is already here."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from prunebench.errors import DataError, ModelError, first_line

SECONDS = 10.0
"""How long an answer may take."""

MANY = 4
"""Configurations that nobody wants to read one by one."""

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
_ROWS = (".parquet", ".arrow", ".json", ".jsonl", ".csv", ".tsv", ".txt", ".gz", ".zst", ".zip")


@dataclass(frozen=True)
class Download:
    """Something that a run would fetch."""

    kind: str
    """`model` or `data set`."""
    name: str
    size: int | None
    """Bytes that are not here yet; None where the Hub does not say."""


def model_patterns(allowed: Iterable[str]) -> list[str]:
    """The files of a model that loading may read."""
    patterns = ["*.json", "*.safetensors", "tokenizer.model", "*.txt"]
    patterns += ["*.bin"] if "pickle" in allowed else []
    return patterns + (["*.py"] if "remote-code" in allowed else [])


def pinned(name: str, revision: str | None) -> str:
    """The revision of a model.

    Raises:
        ModelError: none was named.
    """
    if revision is None:
        raise ModelError(f"the Hub model {name} needs a revision (a commit), so that the name stays the same weights.")
    return revision


def model_download(name: str, revision: str, allowed: Iterable[str]) -> Download | None:
    """What loading a model would fetch; None where all of it is in the local cache.

    Raises:
        ModelError: the Hub cannot be reached or refuses, or the model has no weights that may be loaded.
    """
    import huggingface_hub

    if _is_cached(name, revision):
        return None
    try:
        found = huggingface_hub.HfApi().model_info(name, revision=revision, files_metadata=True, timeout=SECONDS)
    except Exception as error:  # noqa: BLE001 - the hub's client raises dozens of kinds, all of which mean: not to be had
        raise ModelError(refusal(name, revision, error)) from None
    files = {file.rfilename: file.size for file in found.siblings or ()}
    wanted = {path for path in files if any(fnmatch(path, pattern) for pattern in model_patterns(allowed))}
    safe = any(path.endswith(".safetensors") and "/" not in path for path in wanted)
    pickled = [path for path in sorted(files) if path.endswith(_WEIGHTS[1:])]
    if not safe and not any(path in wanted for path in pickled):
        reason = f"has only pickled weights ({pickled[0]}); they must be allowed by name" if pickled else "has no weights there"
        raise ModelError(f"the model {name} at {revision} {reason}.")
    sizes = [files[path] for path in wanted if not (safe and path.endswith(_WEIGHTS[1:]))]
    return Download("model", name, _total(sizes))


def fetch_description(name: str, revision: str, allowed: Iterable[str]) -> Path:
    """Fetch what says how a model is built, without its weights: `config.json`, and its code where that is allowed.

    Raises:
        ModelError: it cannot be had.
    """
    import huggingface_hub

    try:
        found = huggingface_hub.hf_hub_download(name, "config.json", revision=revision, etag_timeout=SECONDS)
        if "remote-code" in allowed and "auto_map" in json.loads(Path(found).read_text(encoding="utf-8")):
            huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=["*.py"], etag_timeout=SECONDS)
    except Exception as error:  # noqa: BLE001 - as above
        raise ModelError(refusal(name, revision, error)) from None
    return Path(found).parent


def data_download(repo: str, parts: Iterable[tuple[str, str | None]]) -> Download | None:
    """What reading a data set would fetch; None where all of it is in the local cache.

    Args:
        repo: owner and name.
        parts: configurations, each with the one file that is read of it, or None for all its files.

    Raises:
        DataError: the Hub cannot be reached.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    missing = sorted((part for part in parts if not _is_read(repo, *part)), key=str)
    if not missing:
        return None
    named = [Path(shard).name if shard else config for config, shard in missing]
    name = f"{repo} ({', '.join(named) if len(named) <= MANY else f'{len(named)} configurations'})"
    try:
        found = huggingface_hub.HfApi().dataset_info(repo, files_metadata=True, timeout=SECONDS)
    except HfHubHTTPError:  # the Hub answered: moved, private or gone, which is said when it is read
        return Download("data set", name, None)
    except Exception as error:  # noqa: BLE001 - as above
        raise DataError(
            f"the Hub cannot be asked for the data set {repo}: {first_line(error)}. "
            "Without a network set PRUNEBENCH_MIRROR to a folder that holds it."
        ) from None
    files = {file.rfilename: file.size for file in found.siblings or ()}
    return Download("data set", name, _total(_total(_of_part(files, *part)) for part in missing))


def _of_part(files: Mapping[str, int | None], config: str, shard: str | None) -> list[int | None]:
    """Sizes of the files that are read of a configuration."""
    if shard:
        return [files.get(shard)]
    rows = [path for path in files if path.endswith(_ROWS)]
    own = [path for path in rows if config in Path(path).parts] or (rows if config == "default" else [])
    return [files[path] for path in own]


def refusal(name: str, revision: str, error: Exception) -> str:
    """Why the Hub does not give a model, in a sentence or two."""
    from huggingface_hub.errors import GatedRepoError

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, GatedRepoError) or status in (401, 403):
        return (
            f"the Hub does not give you the model {name} (gated, private or misspelt). "
            f"Accept its licence at https://huggingface.co/{name} and log in with `hf auth login`."
        )
    return f"the model {name} at {revision} cannot be had from the Hub: {first_line(error)}"


def _total(sizes: Iterable[int | None]) -> int | None:
    """The sum, or None where there is nothing or something is not known."""
    known = list(sizes)
    return sum(size for size in known if size is not None) if known and None not in known else None


def _is_cached(name: str, revision: str) -> bool:
    """Whether the cache of the Hub's client holds a model's settings and all of its weights."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json", revision=revision)
    if not isinstance(found, str):
        return False
    folder = Path(found).parent
    for index in folder.glob("*.index.json"):
        try:
            shards: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError, TypeError):
            return False
        return bool(shards) and all((folder / shard).is_file() for shard in shards.values())
    return any(path.suffix in _WEIGHTS for path in folder.iterdir())


def _is_read(repo: str, config: str, shard: str | None) -> bool:
    """Whether `datasets` has read a configuration before, or the Hub's client has fetched the one file of it."""
    import datasets
    from huggingface_hub import constants

    if shard:
        fetched = Path(constants.HF_HUB_CACHE) / f"datasets--{repo.replace('/', '--')}" / "snapshots"
        return any(fetched.glob(f"*/{shard}"))
    owner, _, name = repo.rpartition("/")
    folder = datasets.naming.camelcase_to_snakecase(name)
    kept = Path(datasets.config.HF_DATASETS_CACHE) / (f"{owner}___{folder}" if owner else folder)
    return any(kept.glob(f"{config}/*/*/dataset_info.json"))

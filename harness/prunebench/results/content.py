"""Content as text and hashes: one spelling of equal data, checksums, fingerprints, and names of files."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

from pydantic import BaseModel


def canonical_json(data: Any) -> str:
    """One spelling for equal data: sorted keys, no spaces."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def checksum(data: dict[str, Any]) -> str:
    """SHA-256 of a record's canonical JSON without its checksum."""
    return hashlib.sha256(canonical_json({k: v for k, v in data.items() if k != "checksum"}).encode()).hexdigest()


def fingerprint(data: BaseModel | dict[str, Any]) -> str:
    """Eight hex digits of conditions or of a recipe."""
    plain = data.model_dump(mode="json") if isinstance(data, BaseModel) else data
    return hashlib.sha256(canonical_json(by_content(plain)).encode()).hexdigest()[:8]


def by_content(data: Any) -> Any:
    """Data without what says where a text came from: the mirror's copy and the Hub's are one when their content is."""
    if isinstance(data, dict):
        return {key: by_content(value) for key, value in data.items() if key not in ("origin", "complete")}
    return [by_content(value) for value in data] if isinstance(data, list) else data


def slug(text: str) -> str:
    """A file name of at most 100 of `[a-z0-9.+-]` that cannot leave its folder."""
    return re.sub(r"[^a-z0-9.+-]+", "-", text.lower()).strip("-.")[:100].rstrip("-.") or "x"

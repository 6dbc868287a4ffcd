"""The README as a package index shows it: links and pictures relative to the repository lead nowhere there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

RELATIVE = r"\((?!https?:|#)[^)\s]+\)"


class Readme(MetadataHookInterface):
    """Sets the dynamic field `readme`."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Leave relative pictures out, and of relative links the text."""
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        text = re.sub(rf"!\[[^\]]*\]{RELATIVE}\n*", "", text)
        metadata["readme"] = {"content-type": "text/markdown", "text": re.sub(rf"\[([^\]]*)\]{RELATIVE}", r"\1", text)}

"""Pictures of evaluation images inside a page: small, as data URIs, of bounded size."""

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vitcli.config import Config
from vitcli.data.protocol import Source
from vitcli.data.sources import open_source
from vitcli.errors import DataError, UserError

__all__ = ["Pictures", "open_pictures"]

LARGE, SMALL = 176, 64  # px, the longest side of a picture
PIXELATED = 48  # px; images up to this size are stored without loss and enlarged pixel by pixel


class Pictures:
    """Images of a source as pictures for a page; those that cannot be read are left out."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def large(self, index: int) -> dict[str, Any] | None:
        """Return a picture to look at: `src`, a data URI, and whether its `pixels` should show."""
        return self.picture(index, LARGE)

    def small(self, index: int) -> dict[str, Any] | None:
        """Return a picture for a line of a table, as `large` does."""
        return self.picture(index, SMALL)

    def where(self, index: int) -> str:
        """Say where an image lies."""
        return self.source.where(index) if index < len(self.source) else ""

    def picture(self, index: int, side: int) -> dict[str, Any] | None:
        """Return an image of at most `side` px as a picture; None where it cannot be read."""
        if index >= len(self.source):
            return None
        try:
            pixels, _ = self.source[index]
        except DataError:
            return None
        image = Image.fromarray(np.ascontiguousarray(pixels))
        tiny = max(image.size) <= PIXELATED
        if max(image.size) > side and not tiny:
            image.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=2.0)
        buffer = io.BytesIO()
        if tiny:
            image.save(buffer, "PNG", optimize=True)
        else:
            image.save(buffer, "JPEG", quality=80, optimize=True)
        kind = "png" if tiny else "jpeg"
        return {"src": f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}", "pixels": tiny}


def open_pictures(config: Config, *, fingerprint: str, data_root: Path | None, notes: list[str]) -> Pictures | None:
    """Open a run's evaluation images; where they are missing or others than those of `fingerprint`, say so in `notes`."""
    root = data_root or (config.data.root if config.data.root and config.data.root.is_dir() else None)
    # a few images are looked at: nothing is worth being decoded and kept
    data = config.data.model_copy(update={"memory_cache_gib": 0.0, "root": root})
    try:
        source = open_source(data.val_source or data.source, split="val", data=data)
    except UserError as error:
        notes.append(f"No pictures: {error}")
        return None
    if source.fingerprint != fingerprint:
        notes.append(f"No pictures: the images of {source.name} are no longer those that were evaluated.")
        return None
    return Pictures(source)

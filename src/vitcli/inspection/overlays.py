"""Figures of single images: heat maps over the picture, all heads of all layers, features as colours.

Pictures are made of pixels here, so that a figure is the same in every format: heat over a greyed picture.
"""

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from vitcli.figures import drawing, shorten
from vitcli.inspection.charts import ticks
from vitcli.inspection.sheet import Sheet
from vitcli.inspection.views import View

__all__ = ["draw_features", "draw_heads", "draw_layers", "draw_rollout", "heat_over"]

Floats = NDArray[np.float64]
Pixels = NDArray[np.uint8]
SIDE, SMALL = 192, 112  # px, the longest side of a picture, and of a small one
HEAT = 0.62  # of a heat map's colour; the rest is the picture's grey


def fitted(pixels: Pixels, side: int) -> Pixels:
    """Return a picture (H, W, 3) with its longest side `side` px; a tiny one pixel by pixel."""
    image = Image.fromarray(np.ascontiguousarray(pixels))
    scale = side / max(image.size)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return np.asarray(image.resize(size, Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS))


def heat_over(pixels: Pixels, heat: Floats, *, side: int = SIDE) -> Pixels:
    """Return a picture (H, W, 3) in grey under a heat map (h, w), from its least to its most."""
    low, high = float(heat.min()), float(heat.max())
    plain = (heat - low) / (high - low) if high > low else np.zeros_like(heat)
    picture = fitted(pixels, side)
    height, width = picture.shape[:2]
    smooth = np.asarray(Image.fromarray(plain.astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR))
    colour = matplotlib.colormaps["inferno"](smooth)[..., :3]
    grey = picture.astype(np.float64).mean(axis=2, keepdims=True) / 255
    blended = HEAT * colour + (1 - HEAT) * grey
    return (255 * np.clip(blended, 0, 1)).round().astype(np.uint8)


def tall(views: Sequence[View]) -> float:
    """Return the pictures' height, of their width."""
    return views[0].pixels.shape[0] / views[0].pixels.shape[1]


def span(heat: Floats) -> str:
    return f"{heat.min():.2f} to {heat.max():.2f} ×"


def draw_rollout(views: Sequence[View]) -> Figure:
    """Draw attention rollout over each image: heads fused by mean, largest and smallest weight."""
    fusions = list(views[0].rollouts)
    with drawing():
        sheet = Sheet(len(views), 1 + len(fusions), cell=1.5, tall=tall(views), head=1, below=1)
        for row, view in enumerate(views):
            sheet.put(row, 0, fitted(view.pixels, SIDE), title="" if row else "image")
            for column, fuse in enumerate(fusions, 1):
                heat = view.rollouts[fuse]
                title = "" if row else f"{fuse} of the heads"
                sheet.put(row, column, heat_over(view.pixels, heat), title=title, below=span(heat))
        return sheet.figure


def draw_heads(views: Sequence[View]) -> Figure:
    """Draw what each head of the last layer, or of the learned query, takes of each image."""
    first = heads_of(views[0])
    with drawing():
        cell = 0.9 if len(first) > 6 else 1.2
        sheet = Sheet(len(views), 1 + len(first), cell=cell, tall=tall(views), head=1, below=1)
        for row, view in enumerate(views):
            sheet.put(row, 0, fitted(view.pixels, SMALL), title="" if row else "image")
            for head, heat in enumerate(heads_of(view)):
                title = "" if row else f"head {head + 1}"
                picture = heat_over(view.pixels, np.sqrt(heat), side=SMALL)
                sheet.put(row, head + 1, picture, title=title, below=f"{heat.max():.1f} ×")
        return sheet.figure


def heads_of(view: View) -> Floats:
    assert view.heads is not None
    return view.heads[-1] if view.pool is None else view.pool


def draw_layers(view: View, names: Sequence[str]) -> Figure:
    """Draw what each head of each layer takes of one image: layers below each other, heads side by side."""
    assert view.heads is not None
    layers, heads, height, width = view.heads.shape
    gap = max(1, round(max(height, width) / 8))
    mosaic = np.full((layers * (height + gap) - gap, heads * (width + gap) - gap), np.nan)
    tops, lefts = np.arange(layers) * (height + gap), np.arange(heads) * (width + gap)
    for layer, top in enumerate(tops):
        for head, left in enumerate(lefts):
            mosaic[top : top + height, left : left + width] = view.heads[layer, head]
    most = float(np.quantile(view.heads, 0.998))
    wide = float(np.clip(0.62 * heads, 2.4, 7.5))
    with drawing():
        figure = Figure(figsize=(wide + 2.6, max(1.7, wide * mosaic.shape[0] / mosaic.shape[1]) + 0.5), layout="constrained")
        left_part, right = figure.subplots(1, 2, width_ratios=(1.4, wide))
        left_part.imshow(fitted(view.pixels, SIDE), interpolation="none")
        left_part.set_axis_off()
        norm = PowerNorm(0.5, vmin=0, vmax=max(most, 1e-6))
        image = right.imshow(mosaic, norm=norm, cmap="inferno", interpolation="none")
        ticks(right, [f"{head}" for head in range(1, heads + 1)], at=lefts + (width - 1) / 2, along="x")
        ticks(right, [name.removeprefix("block ") for name in names], at=tops + (height - 1) / 2, along="y")
        right.set_xlabel("head")
        right.set_ylabel("layer")
        right.tick_params(length=0)
        right.spines[:].set_visible(False)
        bar = figure.colorbar(image, ax=right, label="times the mean patch", extend="max")
        bar.outline.set_visible(False)
        return figure


def draw_features(views: Sequence[View], names: Sequence[str]) -> Figure:
    """Draw the first three principal components of some layers' features as colours, and how long the last ones are."""
    columns = 2 + len(names)
    with drawing():
        sheet = Sheet(len(views), columns, cell=1.25, tall=tall(views), head=1, below=1)
        for row, view in enumerate(views):
            sheet.put(row, 0, fitted(view.pixels, SIDE), title="" if row else "image")
            for column, (name, colours) in enumerate(zip(names, view.colours, strict=True), 1):
                sheet.put(row, column, colours, title="" if row else shorten(name, 18))
            assert view.lengths is not None
            heat = view.lengths / max(float(np.median(view.lengths)), 1e-300)
            title = "" if row else f"length, {shorten(names[-1], 12)}"
            sheet.put(row, columns - 1, heat_over(view.pixels, heat), title=title, below=span(heat))
        return sheet.figure

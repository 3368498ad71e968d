"""The embedded corpus: formula-driven images of objects, made on the fly (source `shapes`).

In the line of FractalDB (2101.08515) and RCDB (2206.09132): a class is a parameter set of a formula, an instance varies it.
A class is an object (a body and three parts, each a radial contour with a texture and two colours, at set places) and the
colours it tends to stand before. An instance varies pose, proportions, colours, light, background, clutter and noise.
Image and label are a pure function of (seed, split, index): no storage, no size limit, and a smaller corpus is a prefix.
"""

import hashlib
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from vitcli.data.painting import (
    JITTER_DRAWS,
    NOISE_BANK,
    PART_DRAWS,
    Canvas,
    PaintedSource,
    Scenes,
    muted,
    pack,
    place,
    plane_period,
    things_from,
    vary,
)
from vitcli.randomness import derive_seed, normal, uniform

__all__ = ["ShapesSource"]

# One shape legend: B images.
VERSION = 1  # of the images: raise it whenever a pixel changes, so that no result is taken for one on the new images
MAX_CLASSES = 21_000  # ImageNet-21k's order of magnitude
MIN_SIDE, MAX_SIDE = 16, 512  # px
PARTS = 4  # of an object: its body and what sits on it; one random thing stands behind it
SCENE_DRAWS = 34  # uniform numbers that make a scene's pose, light, background and noise
SCENES_AT_ONCE = 256  # images whose numbers are derived together


class ShapesSource(PaintedSource):
    """The embedded corpus as a map-style source: any example of any split, at any size, made on request.

    Classes are balanced in every run of `classes` consecutive examples; both splits show the same classes in different
    instances; class k of one seed is the same object however many classes there are.

    Args:
        classes: 2 to 21,000.
        examples: length; examples 0 to n-1 are the same for every length of n or more.
        image_size: (height, width), each 16 to 512 px.
        seed: another seed is another corpus.
        split: "train" or "val".
    """

    def __init__(self, *, classes: int, examples: int, image_size: tuple[int, int], seed: int, split: str) -> None:
        if not 2 <= classes <= MAX_CLASSES:
            raise ValueError(f"classes must be 2 to {MAX_CLASSES}, got {classes}")
        if examples < 1:
            raise ValueError(f"examples must be positive, got {examples}")
        if not all(MIN_SIDE <= side <= MAX_SIDE for side in image_size):
            raise ValueError(f"image_size must be {MIN_SIDE} to {MAX_SIDE} px a side, got {image_size}")
        if split not in ("train", "val"):
            raise ValueError(f"split must be train or val, got {split!r}")
        super().__init__(
            name="shapes",
            version=VERSION,
            classes=[f"shape_{k:05d}" for k in range(classes)],
            examples=examples,
            image_size=image_size,
            seed=seed,
            split=split,
            at_once=SCENES_AT_ONCE,
        )
        self.fingerprint = hashlib.sha256(repr((VERSION, seed, split, classes, examples, image_size)).encode()).hexdigest()[:16]
        self.class_seed = derive_seed(*self.identity, "classes")
        self.scene_seed, self.clutter_seed, self.jitter_seed = (
            derive_seed(*self.split_identity, use) for use in ("scene", "clutter", "jitter")
        )
        self.canvas = Canvas(
            image_size,
            period=plane_period(image_size),
            fractal_seed=derive_seed(*self.identity, "fractal"),
            grain_seed=derive_seed(*self.identity, "grain"),
        )
        self.reach = np.array([image_size[1], image_size[0]]) / (2 * self.canvas.pixels)  # (x, y) of the image's far corner

    def paint(self, i: NDArray[np.int64], labels: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Paint examples (B,) with these labels, uint8 (B, H, W, 3)."""
        return self.canvas.paint_all(self.scenes(i, labels))

    def scenes(self, i: NDArray[np.int64], labels: NDArray[np.int64]) -> Scenes:
        """Return the numbers that examples (B,) with these labels are painted from."""
        B = len(i)
        u = uniform(self.scene_seed, i, SCENE_DRAWS)

        design = uniform(self.class_seed, labels, PARTS * PART_DRAWS + 6)
        parts = things_from(design[:, 6:].reshape(B, PARTS, PART_DRAWS))
        parts.centre[:, 0] = 0  # the body is what the other parts sit on
        parts.axes[:, 0] *= 1.6
        kept = np.concatenate([np.ones((B, 1), bool), u[:, : PARTS - 1] > 0.1], 1)
        parts = vary(parts, normal(self.jitter_seed, i, PARTS * JITTER_DRAWS).reshape(B, PARTS, JITTER_DRAWS), kept)
        parts = place(
            parts,
            centre=(2 * u[:, 4:6] - 1) * 0.25 * self.reach,
            scale=np.exp(0.6 * (u[:, 6] - 0.4)),
            angle=0.4 * (u[:, 7:10].sum(1) - 1.5),
            flip=np.where(u[:, 10] < 0.5, -1.0, 1.0),
        )
        clutter = things_from(uniform(self.clutter_seed, i, PART_DRAWS).reshape(B, 1, PART_DRAWS))
        clutter = replace(clutter, centre=(2 * u[:, None, 11:13] - 1) * 1.1 * self.reach)
        light = 0.2 * (u[:, None, 17:20] - 0.5)
        layers = np.concatenate([pack(clutter, light, self.canvas.pixels), pack(parts, light, self.canvas.pixels)], 1)

        colours = 0.6 * design[:, :6] + 0.4 * u[:, 20:26]
        first, second = muted(colours[:, :3]), muted(colours[:, 3:])
        return Scenes(
            middle=((first + second).T / 2).astype(np.float32),
            swing=((first - second).T / 2).astype(np.float32),
            slope=(u[:, 26:28].T - 0.5).astype(np.float32),
            grain=(0.08 * u[:, 28:29].T ** 2).astype(np.float32),
            corners=(u[:, 29:33].T * self.canvas.period).astype(np.int64),
            starts=(u[:, 33:34].T * NOISE_BANK).astype(np.int64),
            layers=np.ascontiguousarray(layers.transpose(1, 2, 0), np.float32),
        )

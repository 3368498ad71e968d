"""How formula-made images come about: things with contours and textures, painted by exact arithmetic.

What the embedded corpora share. A thing is a radial contour with a texture and two colours; numbers derived from (seed, split,
index) make it, vary it and place it, and a canvas paints it. Pixels see only + - * / sqrt and rounding, which are exact
everywhere, so no batch can change an image by even its last bit.
"""

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from vitcli.data.protocol import Labels, SourceDefaults
from vitcli.randomness import derive_seed, normal, permute, uniform

__all__ = [
    *("HARMONICS", "JITTER_DRAWS", "NOISE_BANK", "PART_DRAWS"),
    *("Canvas", "Floats", "PaintedSource", "Scenes", "Things"),
    *("fractal_noise", "muted", "pack", "place", "plane_period", "things_from", "vary"),
]

Floats = NDArray[np.float64]  # numbers that describe
Singles = NDArray[np.float32]  # numbers that paint

# One shape legend: B images, L things in each (back to front), H x W pixels.
HARMONICS = 6  # of a contour
PART_DRAWS = HARMONICS + 15  # uniform numbers that make one thing
JITTER_DRAWS = HARMONICS + 13  # normal numbers that vary one thing
NOISE_BANK = 1 << 18  # samples of pixel noise; an image reads them from a derived offset
CHUNK_PIXELS = 32_000  # painted together: planes stay in a core's cache, and below PyTorch's 32,768 no thread is started
ROUNDER = 12_582_912.0  # 1.5 * 2^23: adding and subtracting it rounds a float32 to the nearest whole number


# ---------------------------------------------------------------- things


@dataclass(frozen=True)
class Things:
    """What is painted: fields are (B, L) or (B, L, n). Lengths are in units of the frame they sit in, angles in radians."""

    contour: Floats  # (B, L, HARMONICS): the radius in direction t is 1 + sum_k contour[k] cos((k + 1) t)
    waves: Floats  # (B, L, 3): the texture's cycles per unit along the thing's own axes, and outwards from its centre
    phase: Floats  # (B, L): of the texture, cycles
    warp: Floats  # (B, L): cycles by which fractal noise bends the texture: stripes at 0, marble at 1
    contrast: Floats  # (B, L): soft waves at 1, bands above
    middle: Floats  # (B, L, 3): the colour between the texture's two, in [0, 1]
    swing: Floats  # (B, L, 3): from there to either
    centre: Floats  # (B, L, 2): (x, y)
    axes: Floats  # (B, L, 2): half lengths
    angle: Floats  # (B, L)


def muted(rgb: Floats) -> Floats:
    """Bring colours (..., 3) closer to grey: most of what is photographed is dull, and differs more in light than in hue."""
    grey = rgb.mean(-1, keepdims=True)
    return 0.5 + 1.4 * (grey - 0.5) + 0.5 * (rgb - grey)


def things_from(u: Floats) -> Things:
    """Make things of uniform numbers (B, L, PART_DRAWS) in [0, 1)."""
    u, contour = u[..., HARMONICS:], u[..., :HARMONICS]
    turn, bearing = 2 * np.pi * u[..., 0], 2 * np.pi * u[..., 1]
    frequency = 0.4 + 2.6 * u[..., 2] ** 2
    rings = u[..., 3] < 0.3  # as against stripes
    stripes = np.where(rings, 0, frequency)
    waves = np.stack([stripes * np.cos(turn), stripes * np.sin(turn), frequency - stripes], -1)
    first, second = muted(u[..., 4:7]), muted(u[..., 7:10])
    distance, size, stretch = 0.35 + 0.65 * u[..., 10], 0.3 + 0.35 * u[..., 11], np.exp(0.9 * (u[..., 12] - 0.5))
    return Things(
        contour=(2 * contour - 1) * (0.55 / np.sqrt(np.arange(1, HARMONICS + 1))),  # smooth more often than jagged
        waves=waves,
        phase=u[..., 0],
        warp=u[..., 13] ** 2,
        contrast=1 + 4 * u[..., 14] ** 2,
        middle=(first + second) / 2,
        swing=(first - second) / 2,
        centre=distance[..., None] * np.stack([np.cos(bearing), np.sin(bearing)], -1),
        axes=size[..., None] * np.stack([stretch, 1 / stretch], -1),
        angle=bearing,
    )


def vary(things: Things, z: Floats, kept: NDArray[np.bool_]) -> Things:
    """Vary the things of each instance by normal numbers (B, L, JITTER_DRAWS); those not `kept` (B, L) go out of sight."""
    tint = z[..., 6:9]
    return replace(
        things,
        contour=things.contour + 0.05 * z[..., 13:],
        waves=things.waves * np.exp(0.1 * z[..., :1]),
        phase=things.phase + z[..., 1],
        middle=things.middle + 0.05 * tint,
        swing=things.swing + 0.05 * z[..., 9:12],
        centre=things.centre + 0.08 * z[..., 2:4] + 100.0 * ~kept[..., None],
        axes=things.axes * np.exp(0.12 * z[..., 4:6]),
        angle=things.angle + 0.15 * z[..., 12],
    )


def place(things: Things, centre: Floats, scale: Floats, angle: Floats, flip: Floats) -> Things:
    """Move things (B, L) from their object's frame to the image's, given its centre (B, 2), scale, angle, and flip +-1 (B,)."""
    x, y = flip[:, None] * things.centre[..., 0], things.centre[..., 1]
    c, s = np.cos(angle)[:, None], np.sin(angle)[:, None]
    moved = np.stack([c * x - s * y, s * x + c * y], -1)
    return replace(
        things,
        centre=centre[:, None] + scale[:, None, None] * moved,
        axes=things.axes * scale[:, None, None] * np.stack([flip, np.ones_like(flip)], -1)[:, None],
        angle=angle[:, None] + flip[:, None] * things.angle,
    )


# ---------------------------------------------------------------- scenes


class Scenes(NamedTuple):
    """The numbers B images are painted from; every field ends in B."""

    middle: Singles  # (3, B): of the background, as of things
    swing: Singles  # (3, B)
    slope: Singles  # (2, B): how the background changes along x and y
    grain: Singles  # (1, B): amplitude of the pixel noise, in [0, 1]
    corners: NDArray[np.int64]  # (4, B): row and column of the crops of fractal noise for the background and for textures
    starts: NDArray[np.int64]  # (1, B): of the pixel noise in its bank
    layers: Singles  # (L, n, B): see `pack`

    def part(self, images: slice) -> "Scenes":
        return Scenes._make(field[..., images] for field in self)


def pack(things: Things, light: Floats, pixels: float) -> Floats:
    """Return what `paint` needs of things (B, L), as (B, L, n): `light` (B, 1, 3) is added, `pixels` is the length of a unit.

    In a thing's own frame, where its ends lie at 1, a pixel (x, y) is at u = u_x x + u_y y + u_0, and v alike; the cycles of
    its texture are affine in (x, y) too, but for rings and marbling. Each affine map is a row's part plus a column's part.
    """
    x, y = things.centre[..., 0], things.centre[..., 1]
    c, s = np.cos(things.angle), np.sin(things.angle)
    a, b = things.axes[..., 0], things.axes[..., 1]
    u_x, u_y, u_0 = c / a, s / a, -(c * x + s * y) / a
    v_x, v_y, v_0 = -s / b, c / b, (s * x - c * y) / b
    along, across, outward = np.moveaxis(things.waves, -1, 0)
    turns_x, turns_y = along * u_x + across * v_x, along * u_y + across * v_y
    turns_0 = along * u_0 + across * v_0 + things.phase
    sharpness = np.sqrt(np.abs(a * b)) * pixels  # an edge is about one pixel wide
    frame = [u_x, v_x, turns_x, u_y, v_y, turns_y, u_0, v_0, turns_0]
    look = [sharpness, sharpness + 0.5, outward, things.warp, 8 * things.contrast, -16 * things.contrast]
    return np.concatenate([np.stack(frame + look, -1), things.contour, things.middle + light, things.swing], -1)


def fractal_noise(side: int, seed: int) -> Singles:
    """Make a periodic plane (side, side) in [-1, 1], side a power of 2: octaves of bilinear lattices, coarse ones most."""
    plane = np.zeros((side, side))
    for octave in range(1, side.bit_length() - 1):
        cells = 2**octave
        lattice = uniform(derive_seed(seed, cells), np.arange(cells), cells) * 2 - 1
        at = np.arange(side) * cells / side
        low = at.astype(int)
        high, part = (low + 1) % cells, at - low
        rows = lattice[low] * (1 - part)[:, None] + lattice[high] * part[:, None]
        plane += (rows[:, low] * (1 - part) + rows[:, high] * part) / np.sqrt(cells)
    return (plane / np.abs(plane).max()).astype(np.float32)


# ---------------------------------------------------------------- pixels


class Canvas:
    """Where scenes become pixels: planes of coordinates and noise for images of one size.

    Args:
        image_size: (height, width), px.
        period: side of the plane of fractal noise, px, a power of 2 well above the image's sides, so that crops differ.
        fractal_seed, grain_seed: of the noise.
    """

    def __init__(self, image_size: tuple[int, int], *, period: int, fractal_seed: int, grain_seed: int) -> None:
        self.height, self.width = image_size
        self.period = period
        self.pixels = min(image_size) / 2  # per unit of length: the short side runs from -1 to 1
        down, across = (((np.arange(n) + 0.5 - n / 2) / self.pixels).astype(np.float32) for n in image_size)
        self.x, self.y = torch.from_numpy(across).view(1, 1, -1), torch.from_numpy(down).view(1, -1, 1)  # pixel centres
        self.fractal = np.pad(2 * fractal_noise(period, fractal_seed), ((0, self.height), (0, self.width)), mode="wrap")
        grain = normal(grain_seed, np.arange(NOISE_BANK // 64), 64).astype(np.float32)
        self.grain = np.pad(grain.ravel(), (0, 3 * self.height * self.width), mode="wrap")

    def paint_all(self, scenes: Scenes) -> NDArray[np.uint8]:
        """Paint images, uint8 (B, H, W, 3), few at a time."""
        count = max(1, CHUNK_PIXELS // (self.height * self.width))
        B = scenes.grain.shape[-1]
        images = np.empty((B, self.height, self.width, 3), dtype=np.uint8)
        for start in range(0, B, count):
            part = slice(start, start + count)
            images[part] = self.paint(scenes.part(part))
        return images

    def paint(self, scenes: Scenes) -> NDArray[np.uint8]:
        """Paint images, uint8 (B, H, W, 3), back to front."""
        B, H, W = scenes.grain.shape[-1], self.height, self.width

        def per_image(numbers: Singles) -> tuple[Tensor, ...]:
            """Turn (n, B) into n tensors (B, 1, 1)."""
            return torch.from_numpy(numbers).view(-1, B, 1, 1).unbind()

        crops, corners = sliding_window_view(self.fractal, (H, W)), scenes.corners
        veil, marble = (torch.from_numpy(crops[corners[k], corners[k + 1]]) for k in (0, 2))  # (B, H, W)
        middle, swing, slope = per_image(scenes.middle), per_image(scenes.swing), per_image(scenes.slope)
        veil.add_(slope[0] * self.x + slope[1] * self.y)
        image = [(veil * swing[k]).add_(middle[k]) for k in range(3)]  # red, green, blue: (B, H, W) each

        layers = torch.from_numpy(scenes.layers).view(len(scenes.layers), -1, B, 1, 1)
        across = (layers[:, 0:3] * self.x + layers[:, 6:9]).unbind()  # u, v, turns by column: for each layer (3, B, 1, W)
        down = (layers[:, 3:6] * self.y).unbind()  # and by row: (3, B, H, 1)
        for n in range(len(layers)):
            sharpness, threshold, outward, warp, eight, sixteen, *rest = per_image(scenes.layers[n, 9:])
            contour, colours = rest[:HARMONICS], rest[HARMONICS:]
            u, v, turns = (c + r for c, r in zip(across[n].unbind(), down[n].unbind()))
            square = v.mul_(v).add_(u * u)
            radius = torch.from_numpy(np.sqrt(square.numpy()))  # PyTorch's would start threads
            # Clenshaw's recurrence for sum_k contour[k] cos((k + 1) t), with u / radius = cos t.
            cosine = u.div_(radius + 1e-6)
            double = cosine + cosine
            newer, older = double * contour[-1] + contour[-2], contour[-1]
            for k in range(HARMONICS - 3, -1, -1):
                newer, older = (double * newer).sub_(older).add_(contour[k]), newer
            mask = cosine.mul_(newer).sub_(older).sub_(radius).mul_(sharpness).add_(threshold).clamp_(0, 1)

            turns.add_(radius.mul_(outward))
            turns.add_(marble * warp)
            turns.sub_((turns + ROUNDER).sub_(ROUNDER))  # to the nearest whole turn
            # t (8 - 16 |t|) is within 0.06 of sin(2 pi t), for exact arithmetic and fewer cycles.
            texture = turns.mul_(turns.abs().mul_(sixteen).add_(eight)).clamp_(-1, 1)
            shade = square.mul_(-0.25).add_(1.1)  # darker outwards, as round things lit from the front
            for k in range(3):
                colour = (texture * colours[3 + k]).add_(colours[k]).mul_(shade)
                image[k].add_(colour.sub_(image[k]).mul_(mask))

        runs = sliding_window_view(self.grain, 3 * H * W)
        grain = torch.from_numpy(runs[scenes.starts[0]]).view(B, 3, H, W)
        amplitude = per_image(255 * scenes.grain)[0]
        pixels = torch.empty(B, H, W, 3, dtype=torch.uint8)
        for k in range(3):
            pixels[..., k] = image[k].mul_(255).add_(grain[:, k].mul_(amplitude)).add_(0.5).clamp_(0, 255)
        return pixels.numpy()


def plane_period(image_size: tuple[int, int]) -> int:
    """Return the side of the plane of fractal noise that images are cut from, px: a power of 2, four images wide or more."""
    return 1 << max(8, (4 * max(image_size) - 1).bit_length())


# ---------------------------------------------------------------- sources


class PaintedSource(SourceDefaults):
    """A corpus that is painted on request: map-style, of any length, with as many examples of each class.

    Labels are balanced in every run of `classes` consecutive examples; examples 0 to n-1 are the same for every length of n or
    more.

    Args:
        name: of the corpus; begins every seed, as does `version`.
        version: of its images.
        at_once: examples whose numbers are derived together.
    """

    uniform = True  # every image has `image_size`, so `batch` exists
    labels: Labels | None = None  # too many to list: see `label_of`

    def __init__(
        self,
        *,
        name: str,
        version: int,
        classes: list[str],
        examples: int,
        image_size: tuple[int, int],
        seed: int,
        split: str,
        at_once: int,
    ) -> None:
        self.name, self.classes, self.num_classes, self.examples = name, classes, len(classes), examples
        self.image_size, self.at_once = image_size, at_once
        self.identity = (name, version, seed)  # what seeds that both splits share begin with
        self.split_identity = (*self.identity, split)
        self.order_seed, self.offset_seed, self.name_seed = (
            derive_seed(*self.split_identity, use) for use in ("order", "offset", "name")
        )

    def __len__(self) -> int:
        return self.examples

    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], int]:
        """Return the image, uint8 (H, W, 3), and the label of one example."""
        images, labels = self.batch([index])
        return images[0], int(labels[0])

    def label_of(self, indices: ArrayLike) -> NDArray[np.int64]:
        """Return the labels, int64 (B,), of examples (B,): each block of `classes` examples shows every class once."""
        K = self.num_classes
        block, position = np.divmod(np.asarray(indices, dtype=np.int64), K)
        offset = (uniform(self.offset_seed, block, 1)[:, 0] * K).astype(np.int64)  # so that no two blocks are in one order
        return permute((permute(position, K, self.order_seed) + offset) % K, K, self.name_seed)

    def batch(self, indices: ArrayLike) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Return images, uint8 (B, H, W, 3), and labels, int64 (B,), of examples (B,) in [0, len).

        Raises:
            IndexError: an index is outside [0, len).
        """
        i = np.asarray(indices, dtype=np.int64)
        if i.size and not 0 <= int(i.min()) <= int(i.max()) < self.examples:
            raise IndexError(f"examples are numbered 0 to {self.examples - 1}, got {int(i.min())} to {int(i.max())}")
        labels = self.label_of(i)
        images = np.empty((len(i), *self.image_size, 3), dtype=np.uint8)
        for first in range(0, len(i), self.at_once):
            chosen = slice(first, first + self.at_once)
            images[chosen] = self.paint(i[chosen], labels[chosen])
        return images, labels

    @abstractmethod
    def paint(self, i: NDArray[np.int64], labels: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Paint examples (B,) with these labels, uint8 (B, H, W, 3)."""

"""The embedded corpus: formula-driven images of objects, made on the fly (source `shapes`).

In the line of FractalDB (2101.08515) and RCDB (2206.09132): a class is a parameter set of a formula, an instance varies it.
A class is an object (a body and three parts, each a radial contour with a texture and two colours, at set places) and the
colours it tends to stand before. An instance varies pose, proportions, colours, light, background, clutter and noise.
Image and label are a pure function of (seed, split, index): no storage, no size limit, and a smaller corpus is a prefix.
Pixels see only + - * / sqrt and rounding, which are exact everywhere, so no batch can change an image by even its last bit.
"""

import hashlib
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import ArrayLike, NDArray

from vitcli.randomness import derive_seed, normal, permute, uniform

__all__ = ["ShapesSource"]

Floats = NDArray[np.float32]

# One shape legend: B images, L things in each (back to front), H x W pixels.
VERSION = 1  # of the images: raise it whenever a pixel changes, so that no result is taken for one on the new images
MAX_CLASSES = 21_000  # ImageNet-21k's order of magnitude
MIN_SIDE, MAX_SIDE = 16, 512  # px
BEHIND, PARTS, BEFORE = 2, 4, 1  # clutter behind, the object's body and what sits on it, clutter before
HARMONICS = 6  # of a contour
LAYERS = BEHIND + PARTS + BEFORE
PART_DRAWS = HARMONICS + 15  # uniform numbers that make one thing
SCENE_DRAWS = 34  # uniform numbers that make a scene's pose, light, background and noise
JITTER_DRAWS = HARMONICS + 13  # normal numbers that vary one thing
NOISE_BANK = 1 << 18  # samples of pixel noise; an image reads them from a derived offset
SCENES_AT_ONCE = 256  # images whose numbers are derived together
CHUNK_PIXELS = 32_000  # painted together: planes stay in a core's cache, and below PyTorch's 32,768 no thread is started
ROUNDER = 12_582_912.0  # 1.5 * 2^23: adding and subtracting it rounds a float32 to the nearest whole number


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


def things_from(u: Floats) -> Things:
    """Make things of uniform numbers (B, L, PART_DRAWS) in [0, 1)."""
    u, contour = u[..., HARMONICS:], u[..., :HARMONICS]
    turn, bearing = 2 * np.pi * u[..., 0], 2 * np.pi * u[..., 1]
    frequency = 0.4 + 2.6 * u[..., 2] ** 2
    rings = u[..., 3] < 0.3  # as against stripes
    waves = np.stack([np.where(rings, 0, frequency * np.cos(turn)), np.where(rings, 0, frequency * np.sin(turn)), rings * frequency], -1)
    first, second = u[..., 4:7], u[..., 7:10]
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
        contour=things.contour + 0.06 * z[..., 13:],
        waves=things.waves * np.exp(0.15 * z[..., :1]),
        phase=things.phase + z[..., 1],
        middle=things.middle + 0.08 * tint,
        swing=things.swing + 0.05 * z[..., 9:12],
        centre=things.centre + 0.12 * z[..., 2:4] + 100.0 * ~kept[..., None],
        axes=things.axes * np.exp(0.15 * z[..., 4:6]),
        angle=things.angle + 0.25 * z[..., 12],
    )


def place(things: Things, centre: Floats, scale: Floats, angle: Floats, flip: Floats) -> Things:
    """Move things (B, L) from their object's frame to the image's: the object's centre (B, 2), scale, angle, flip of +-1 (B,)."""
    x, y = flip[:, None] * things.centre[..., 0], things.centre[..., 1]
    c, s = np.cos(angle)[:, None], np.sin(angle)[:, None]
    moved = np.stack([c * x - s * y, s * x + c * y], -1)
    return replace(
        things,
        centre=centre[:, None] + scale[:, None, None] * moved,
        axes=things.axes * scale[:, None, None] * np.stack([flip, np.ones_like(flip)], -1)[:, None],
        angle=angle[:, None] + flip[:, None] * things.angle,
    )


def pack(things: Things, light: Floats, pixels: float) -> Floats:
    """Return what `paint` needs of things (B, L), as (B, L, n): `light` (B, 1, 3) is added, `pixels` is the length of a unit."""
    x, y = things.centre[..., 0], things.centre[..., 1]
    c, s = np.cos(things.angle), np.sin(things.angle)
    a, b = things.axes[..., 0], things.axes[..., 1]
    rows = np.stack([c / a, -s / b, s / a, c / b, -(c * x + s * y) / a, (s * x - c * y) / b], -1)
    u_x, v_x, u_y, v_y, u_0, v_0 = np.moveaxis(rows, -1, 0)
    along, across, outward = np.moveaxis(things.waves, -1, 0)
    frame = [u_x, v_x, along * u_x + across * v_x, u_y, v_y, along * u_y + across * v_y]
    frame += [u_0, v_0, along * u_0 + across * v_0 + things.phase]
    look = [np.sqrt(np.abs(a * b)) * pixels, outward, things.warp, things.contrast]
    return np.concatenate([np.stack(frame + look, -1), things.contour, things.middle + light, things.swing], -1)


def fractal_noise(side: int, seed: int) -> Floats:
    """Make a periodic (side, side) plane of value noise: octaves of bilinear lattices, each half as strong, within about [-1, 1]."""
    plane = np.zeros((side, side))
    cells = 2
    while cells <= side // 2:
        lattice = uniform(derive_seed(seed, cells), np.arange(cells), cells) * 2 - 1
        at = np.arange(side) * cells / side
        low = at.astype(int)
        high, part = (low + 1) % cells, at - low
        rows = lattice[low] * (1 - part)[:, None] + lattice[high] * part[:, None]
        plane += (rows[:, low] * (1 - part) + rows[:, high] * part) / np.sqrt(cells)
        cells *= 2
    return (plane / np.abs(plane).max()).astype(np.float32)


class ShapesSource:
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

    uniform = True  # every image has `image_size`, so `batch` exists
    labels: NDArray[np.int64] | None = None  # too many to list: see `label_of`

    def __init__(self, *, classes: int, examples: int, image_size: tuple[int, int], seed: int, split: str) -> None:
        if not 2 <= classes <= MAX_CLASSES:
            raise ValueError(f"classes must be 2 to {MAX_CLASSES}, got {classes}")
        if examples < 1:
            raise ValueError(f"examples must be positive, got {examples}")
        if not all(MIN_SIDE <= side <= MAX_SIDE for side in image_size):
            raise ValueError(f"image_size must be {MIN_SIDE} to {MAX_SIDE} px a side, got {image_size}")
        if split not in ("train", "val"):
            raise ValueError(f"split must be train or val, got {split!r}")
        self.height, self.width = image_size
        self.num_classes, self.examples, self.split = classes, examples, split
        self.classes = [f"shape_{k:05d}" for k in range(classes)]
        identity = ("shapes", VERSION, seed)
        self.name = "shapes"
        text = repr((*identity, classes, examples, self.height, self.width, split))
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()[:16]
        self.class_seed = derive_seed(*identity, "classes")
        self.label_seed = derive_seed(*identity, split, "labels")
        self.scene_seed, self.thing_seed, self.jitter_seed = (derive_seed(*identity, split, n) for n in ("scene", "thing", "jitter"))
        short = min(self.height, self.width)
        self.line_x = ((np.arange(self.width) + 0.5 - self.width / 2) * (2 / short)).astype(np.float32)
        self.line_y = ((np.arange(self.height) + 0.5 - self.height / 2) * (2 / short)).astype(np.float32)
        self.x, self.y = torch.from_numpy(self.line_x).view(1, 1, -1), torch.from_numpy(self.line_y).view(1, -1, 1)
        self.pixels = short / 2  # per unit of length
        # A crop as large as the image is a part of the plane's period, at most a quarter of it, so that crops differ.
        self.period = 1 << max(8, (4 * max(image_size) - 1).bit_length())
        plane = fractal_noise(self.period, derive_seed(*identity, "fractal")) * 2
        self.fractal = np.pad(plane, ((0, self.height), (0, self.width)), mode="wrap")
        grain = normal(derive_seed(*identity, "grain"), np.arange(NOISE_BANK // 64), 64).astype(np.float32).ravel()
        self.grain = np.pad(grain, (0, 3 * self.height * self.width), mode="wrap")

    def __len__(self) -> int:
        return self.examples

    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], int]:
        """Return the image, uint8 (H, W, 3), and the label of one example."""
        images, labels = self.batch([index])
        return images[0], int(labels[0])

    def label_of(self, indices: ArrayLike) -> NDArray[np.int64]:
        """Return the labels, int64 (B,), of examples (B,): each block of `classes` examples shows every class once, shuffled."""
        i = np.asarray(indices, dtype=np.int64)
        block, position = np.divmod(i, self.num_classes)
        offset = (uniform(self.label_seed, block, 1)[:, 0] * self.num_classes).astype(np.int64)
        shuffled = permute(position, self.num_classes, self.label_seed)
        return permute((shuffled + offset) % self.num_classes, self.num_classes, self.label_seed + 1)

    def batch(self, indices: ArrayLike) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Return images, uint8 (B, H, W, 3), and labels, int64 (B,), of examples (B,) in [0, len).

        Raises:
            IndexError: an index is outside [0, len).
        """
        i = np.asarray(indices, dtype=np.int64)
        if i.size and not 0 <= int(i.min()) <= int(i.max()) < self.examples:
            raise IndexError(f"examples are numbered 0 to {self.examples - 1}, got {int(i.min())} to {int(i.max())}")
        labels = self.label_of(i)
        images = np.empty((len(i), self.height, self.width, 3), dtype=np.uint8)
        count = max(1, CHUNK_PIXELS // (self.height * self.width))
        for first in range(0, len(i), SCENES_AT_ONCE):
            scenes = slice(first, first + SCENES_AT_ONCE)
            backdrop, layers = self.scenes(i[scenes], labels[scenes])
            painted = images[scenes]
            for start in range(0, len(painted), count):
                part = slice(start, start + count)
                painted[part] = self.paint(backdrop[:, part], layers[:, :, part])
        return images, labels

    def scenes(self, i: NDArray[np.int64], labels: NDArray[np.int64]) -> tuple[Floats, Floats]:
        """Return the numbers that examples (B,) are painted from: backdrops (n, B) and layers, back to front, (LAYERS, n, B)."""
        B = len(i)
        u = uniform(self.scene_seed, i, SCENE_DRAWS)
        reach = np.array([self.line_x[-1], self.line_y[-1]])  # half the image

        design = uniform(self.class_seed, labels, PARTS * PART_DRAWS + 6)
        parts = things_from(design[:, 6:].reshape(B, PARTS, PART_DRAWS))
        parts.centre[:, 0] = 0  # the body is what the other parts sit on
        parts.axes[:, 0] *= 1.6
        kept = np.concatenate([np.ones((B, 1), bool), u[:, : PARTS - 1] > 0.15], 1)
        parts = vary(parts, normal(self.jitter_seed, i, PARTS * JITTER_DRAWS).reshape(B, PARTS, JITTER_DRAWS), kept)
        parts = place(
            parts,
            centre=(2 * u[:, 4:6] - 1) * 0.4 * reach,
            scale=np.exp(0.9 * (u[:, 6] - 0.55)),
            angle=0.7 * (u[:, 7:10].sum(1) - 1.5),
            flip=np.where(u[:, 10] < 0.5, -1.0, 1.0),
        )
        clutter = things_from(uniform(self.thing_seed, i, (BEHIND + BEFORE) * PART_DRAWS).reshape(B, -1, PART_DRAWS))
        clutter = replace(clutter, centre=(2 * u[:, 11:17].reshape(B, -1, 2) - 1) * 1.1 * reach)
        light = 0.25 * (u[:, None, 17:20] - 0.5)
        around, thing = pack(clutter, light, self.pixels), pack(parts, light, self.pixels)
        layers = np.concatenate([around[:, :BEHIND], thing, around[:, BEHIND:]], 1)

        colours = 0.5 * design[:, :6] + 0.5 * u[:, 20:26]
        first, second = colours[:, :3], colours[:, 3:]
        backdrop = np.concatenate([(first + second) / 2, (first - second) / 2, u[:, 26:28] - 0.5, 0.08 * u[:, 28:29] ** 2, u[:, 29:34]], 1)
        return np.ascontiguousarray(backdrop.T, np.float32), np.ascontiguousarray(layers.transpose(1, 2, 0), np.float32)

    def paint(self, backdrop: Floats, layers: Floats) -> NDArray[np.uint8]:
        """Paint images, uint8 (B, H, W, 3), from what `scenes` returned."""
        B, H, W = backdrop.shape[1], self.height, self.width
        corner = (backdrop[9:13] * self.period).astype(np.int64)
        crops = sliding_window_view(self.fractal, (H, W))
        veil, marble = (torch.from_numpy(crops[corner[k], corner[k + 1]]) for k in (0, 2))  # (B, H, W)
        runs = sliding_window_view(self.grain, 3 * H * W)
        grain = torch.from_numpy(runs[(backdrop[13] * NOISE_BANK).astype(np.int64)]).view(B, 3, H, W)

        channels = torch.from_numpy(backdrop[:9]).view(9, B, 1, 1).unbind()
        veil += (channels[6] * self.x + channels[7] * self.y)
        image = [veil * channels[3 + k] + channels[k] for k in range(3)]  # 3 of (B, H, W)

        things = torch.from_numpy(layers).view(LAYERS, -1, B, 1, 1)
        u_row, v_row, turns_row = (things[:, k : k + 1] * self.x + things[:, k + 6 : k + 7] for k in (0, 1, 2))  # (L, 1, B, 1, W)
        u_column, v_column, turns_column = (things[:, k : k + 1] * self.y for k in (3, 4, 5))  # (L, 1, B, H, 1)
        for layer in range(LAYERS):
            sharpness, outward, warp, contrast, *rest = things[layer, 9:].unbind()  # (B, 1, 1) each
            contour, middle, swing = rest[:HARMONICS], rest[HARMONICS : HARMONICS + 3], rest[HARMONICS + 3 :]
            u, v, turns = u_row[layer, 0] + u_column[layer, 0], v_row[layer, 0] + v_column[layer, 0], turns_row[layer, 0] + turns_column[layer, 0]
            square = v.mul_(v).add_(u * u)
            radius = torch.from_numpy(np.sqrt(square.numpy()))  # PyTorch's would start threads
            # Clenshaw's recurrence for sum_k contour[k] cos((k + 1) t) + 1, with u / radius = cos t.
            cosine = u.div_(radius + 1e-6)
            double = cosine + cosine
            newer, older = double * contour[-1] + contour[-2], contour[-1]
            for k in range(HARMONICS - 3, -1, -1):
                newer, older = (double * newer).sub_(older).add_(contour[k]), newer
            edge = cosine.mul_(newer).sub_(older).add_(1)
            mask = edge.sub_(radius).mul_(sharpness).add_(0.5).clamp_(0, 1)

            turns.add_(radius.mul_(outward))
            turns.add_(marble * warp)
            turns.sub_((turns + ROUNDER).sub_(ROUNDER))  # to the nearest whole turn
            # 8 t - 16 t |t| is within 0.06 of sin(2 pi t), and exact arithmetic.
            texture = turns.mul_(turns.abs().mul_(-16).add_(8)).mul_(contrast).clamp_(-1, 1)
            shade = square.mul_(-0.25).add_(1.1)  # darker outwards, as round things lit from the front
            for channel in range(3):
                colour = (texture * swing[channel]).add_(middle[channel]).mul_(shade)
                image[channel].add_(colour.sub_(image[channel]).mul_(mask))

        noise = channels[8] * 255
        pixels = torch.empty(B, H, W, 3, dtype=torch.uint8)
        for channel in range(3):
            image[channel].mul_(255).add_(grain[:, channel].mul(noise)).add_(0.5).clamp_(0, 255)
            pixels[..., channel] = image[channel]
        return pixels.numpy()

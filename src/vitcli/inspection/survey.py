"""What is measured over a data set, in one pass: attention distances, lengths of tokens, and how alike layers are.

Batch by batch and layer by layer, as each passes: nothing but sums, lengths and Gram matrices of a batch is kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from vitcli.inspection.attention import attention_distances, patch_centres
from vitcli.inspection.layers import attentions, layer_names, run, split_tokens, tokens_before
from vitcli.inspection.samples import Samples, Say, batches, prepare, transform_of
from vitcli.inspection.similarity import LEAST, Alignment, as_vectors, gram
from vitcli.inspection.tokens import Lengths, lengths_of
from vitcli.models import Model, VisionTransformer
from vitcli.models.attention import Attention
from vitcli.opened import OpenedModel

__all__ = ["Survey", "images_at_once", "survey"]

MOST_BYTES = 512 << 20  # of a batch's activations, about
MOST_IMAGES = 32  # of a batch

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Survey:
    """What was measured of a model; what it does not have, or too few images tell, is None."""

    images: int
    distances: Floats | None  # (attention modules, heads) px
    elsewhere: Floats | None  # (attention modules, heads) share of the patches' attention that goes to no patch
    lengths: list[Lengths] | None  # of each layer of tokens, the embedding first
    alike: Floats | None  # CKA of layers with layers (L, L)
    alike_against: Floats | None  # with those of the other model (L, M)


class Watch:
    """What is gathered of one model."""

    def __init__(self, opened: OpenedModel) -> None:
        self.opened = opened
        self.model: Model = opened.model
        self.grams: list[NDArray[np.float64]] = []  # of the batch that passes
        self.patches: dict[int, list[NDArray[np.float32]]] = {}
        self.before: dict[int, list[NDArray[np.float32]]] = {}
        self.distances = self.elsewhere = None
        if isinstance(self.model, VisionTransformer):
            shape = (len(attentions(self.model)), attentions(self.model)[0].num_heads)
            self.distances, self.elsewhere = np.zeros(shape), np.zeros(shape)
            self.centres = patch_centres(self.model.grid_size, self.model.image_size, device=opened.device)

    def look(self, pixels: Tensor, *, whole: bool) -> None:
        """Show the model a batch; `whole` also gathers distances and lengths, not Gram matrices alone."""
        self.grams = []
        measure = whole and self.distances is not None
        run(
            self.model,
            prepare(self.opened, pixels),
            layer=self.layer_whole if measure else self.layer,
            attention=self.attention if measure else None,
        )

    def layer(self, number: int, output: Tensor) -> None:
        self.grams.append(gram(as_vectors(*split_tokens(self.model, output))))

    def layer_whole(self, number: int, output: Tensor) -> None:
        self.layer(number, output)
        if output.ndim == 3:  # a hybrid's units have no tokens
            before, places = split_tokens(self.model, output)
            self.patches.setdefault(number, []).append(places.norm(dim=1).flatten(1).cpu().numpy())
            self.before.setdefault(number, []).append(before.norm(dim=2).cpu().numpy())

    def attention(self, number: int, module: Attention, x: Tensor) -> None:
        assert self.distances is not None and self.elsewhere is not None
        found, elsewhere = attention_distances(module, x, centres=self.centres, before=tokens_before(self.model))
        self.distances[number] += found.double().sum(0).cpu().numpy()
        self.elsewhere[number] += elsewhere.double().sum(0).cpu().numpy()


def survey(opened: OpenedModel, against: OpenedModel | None, samples: Samples, *, say: Say) -> Survey:
    """Show a model, and one to compare with, all images, and return what was measured; unreadable images are left out."""
    watched, other = Watch(opened), None if against is None else Watch(against)
    layers = len(layer_names(opened.model))
    alike = Alignment(layers, layers)
    crossed = None if other is None else Alignment(layers, len(layer_names(other.model)))
    both = [opened] if against is None else [opened, against]
    total = compared = 0
    for shown in batches(samples, [transform_of(one) for one in both], size=images_at_once(both), say=say):
        watched.look(shown[0], whole=True)
        total += len(shown[0])
        if len(shown[0]) < LEAST:
            continue
        compared += len(shown[0])
        alike.add(np.stack(watched.grams), np.stack(watched.grams))
        if other is not None and crossed is not None:
            other.look(shown[1], whole=False)
            crossed.add(np.stack(watched.grams), np.stack(other.grams))
    lengths = [
        lengths_of(np.concatenate(watched.patches[number]), np.concatenate(watched.before[number]))
        for number in sorted(watched.patches)
    ]
    return Survey(
        images=total,
        distances=mean_of(watched.distances, total),
        elsewhere=mean_of(watched.elsewhere, total),
        lengths=lengths or None,
        alike=alike.result() if compared else None,
        alike_against=crossed.result() if crossed is not None and compared else None,
    )


def mean_of(sums: Floats | None, count: int) -> Floats | None:
    return None if sums is None or not count else sums / count


def images_at_once(models: Sequence[OpenedModel]) -> int:
    """Return how many images go through the models at a time: about `MOST_BYTES` of activations, and enough for CKA."""
    return int(np.clip(MOST_BYTES // max(activation_bytes(one) for one in models), LEAST, MOST_IMAGES))


def activation_bytes(opened: OpenedModel) -> int:
    """Return about what an image's activations need at a time, in a layer."""
    section: Any = opened.config.model
    height, width = opened.config.data.image_size
    pixels = height * width
    needed = 4 * 3 * pixels
    if section.resnet_units is not None:
        needed += 4 * 6 * 4 * (section.resnet_width or 64) * pixels // (16 if section.resnet_root == "large" else 1)
    if isinstance(opened.model, VisionTransformer):
        rows, columns = opened.model.grid_size
        needed += 4 * rows * columns * (5 * section.width + 2 * (section.mlp_dim or 4 * section.width))
    return needed

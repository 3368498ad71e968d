"""What a model makes of single images: rollout, each head's attention, features as colours, lengths, receptive fields."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitcli.inspection.attention import FUSIONS, attention_of_image, head_maps, pool_maps, reading, rollout
from vitcli.inspection.fields import effective_fields, field_centre
from vitcli.inspection.layers import layer_names, run, split_tokens, tokens_before
from vitcli.inspection.samples import Samples, Say, batches, prepare, transform_of
from vitcli.inspection.tokens import feature_colours
from vitcli.models import PixelMlp, VisionTransformer
from vitcli.models.permutation import as_seen
from vitcli.opened import OpenedModel

__all__ = ["Fields", "View", "depths", "fields_of", "views_of"]

FIELD_IMAGES = 32  # that receptive fields are averaged over
SEED = 0  # of the random weights behind receptive fields

Floats = NDArray[np.float64]


@dataclass
class View:
    """An image and what a model makes of it."""

    name: str
    pixels: NDArray[np.uint8]  # (H, W, 3) as the model sees it
    rollouts: dict[str, Floats] = field(default_factory=dict)  # by fusion, (h, w), 1 is the mean patch
    heads: Floats | None = None  # (attention modules, A, h, w), 1 is the mean patch
    pool: Floats | None = None  # of a learned query, (A, h, w), 1 is the mean patch
    colours: list[Floats] = field(default_factory=list)  # of some layers, (h, w, 3)
    lengths: Floats | None = None  # of the last layer's features, (h, w)


@dataclass(frozen=True)
class Fields:
    """A model's effective receptive fields."""

    name: str
    layers: list[str]
    depths: list[float]  # where the layers stand, 0 to 1
    centres: list[tuple[float, float]]  # of each field, px from the top and from the left
    fields: list[Floats]  # (H, W), 1 in sum
    images: int


def depths(count: int, *, most: int) -> list[int]:
    """Return numbers of layers, evenly spread from the first to the last."""
    return np.unique(np.linspace(0, count - 1, min(most, count)).round().astype(np.int64)).tolist()


def views_of(opened: OpenedModel, samples: Samples, *, layers: Sequence[int], say: Say) -> list[View]:
    """Return what a model makes of the pictured images, one at a time; colours of `layers`, of all images together."""
    model = opened.model
    views: list[View] = []
    kept: list[dict[int, Tensor]] = []
    for number in samples.pictured:
        for (pixels,) in batches(samples, [transform_of(opened)], size=1, numbers=[number], say=say):
            seen = as_seen(pixels.to(opened.device), image_size=model.image_size, permutation=model.permutation).cpu()
            view = View(samples.names[number], seen[0].permute(1, 2, 0).numpy())
            images = prepare(opened, pixels)
            if isinstance(model, VisionTransformer):
                look_at_attention(model, images, view)
            features: dict[int, Tensor] = {}

            def keep(layer: int, output: Tensor, features: dict[int, Tensor] = features) -> None:
                if layer in layers:
                    features[layer] = split_tokens(model, output)[1].float()

            run(model, images, layer=keep)
            last = features[layers[-1]]
            view.lengths = last.norm(dim=1)[0].double().cpu().numpy()
            kept.append(features)
            views.append(view)
    if views and not isinstance(model, PixelMlp):
        for layer in layers:
            colours = feature_colours(torch.cat([features[layer] for features in kept]))
            for view, colour in zip(views, colours, strict=True):
                view.colours.append(colour)
    return views


def look_at_attention(model: VisionTransformer, images: Tensor, view: View) -> None:
    """Put rollouts and heads of one image into its view."""
    given, last = attention_of_image(model, images)
    start = reading(model, last)
    before = tokens_before(model)
    for fuse in FUSIONS:
        flow = rollout(given, start, fuse=fuse)[:, before:]
        view.rollouts[fuse] = per_mean(flow.unflatten(1, model.grid_size)[0])
    view.heads = np.stack([per_mean(head_maps(model, attention, x)[0]) for attention, x in given])
    pool = pool_maps(model, last)
    view.pool = None if pool is None else per_mean(pool[0])


def per_mean(maps: Tensor) -> Floats:
    """Return maps (..., h, w) as multiples of their mean."""
    found: Floats = maps.double().cpu().numpy()
    return found / np.maximum(found.mean(axis=(-2, -1), keepdims=True), np.finfo(np.float64).tiny)


def fields_of(
    opened: OpenedModel, samples: Samples, *, most: int, images: int = FIELD_IMAGES, name: str, say: Say
) -> Fields | None:
    """Return a model's effective receptive fields in up to `most` layers; None for an MLP, whose one place is the image.

    Args:
        images: over how many of the images they are averaged, at most.
    """
    model = opened.model
    if isinstance(model, PixelMlp):
        return None
    names = layer_names(model)
    layers = depths(len(names), most=most)
    chosen = depths(len(samples.names), most=images)
    sums: list[Floats] = []
    seen = 0
    for (pixels,) in batches(samples, [transform_of(opened)], size=4, numbers=chosen, say=say):
        found = effective_fields(model, prepare(opened, pixels), layers=layers, first=seen, seed=SEED)
        sums = [a + len(pixels) * b for a, b in zip(sums or [np.zeros_like(one) for one in found], found, strict=True)]
        seen += len(pixels)
    if not seen:
        return None
    return Fields(
        name=name,
        layers=[names[layer] for layer in layers],
        depths=[layer / max(1, len(names) - 1) for layer in layers],
        centres=centres_of(opened, layers),
        fields=[one / seen for one in sums],
        images=seen,
    )


def centres_of(opened: OpenedModel, layers: Sequence[int]) -> list[tuple[float, float]]:
    """Return where the middle places of the layers lie, from one look at nothing."""
    centres: dict[int, tuple[float, float]] = {}

    def see(layer: int, output: Tensor) -> None:
        places = split_tokens(opened.model, output)[1]
        centres[layer] = field_centre(opened.model, (places.shape[2], places.shape[3]), convolved=output.ndim == 4)

    run(opened.model, torch.zeros(1, 3, *opened.model.image_size, device=opened.device), layer=see)
    return [centres[layer] for layer in layers]

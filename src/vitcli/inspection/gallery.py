"""The figures of an inspection in the order they are read, each with words on what it shows."""

import numpy as np

from vitcli.inspection.attention import patch_centres
from vitcli.inspection.charts import (
    draw_alike,
    draw_distances,
    draw_fields,
    draw_filters,
    draw_lengths,
    draw_positions,
    draw_reach,
)
from vitcli.inspection.embeddings import filter_components
from vitcli.inspection.layers import attention_names, layer_names
from vitcli.inspection.overlays import draw_features, draw_heads, draw_layers, draw_rollout
from vitcli.inspection.page import Picture
from vitcli.inspection.tokens import OUTLIER
from vitcli.inspection.views import FIELD_IMAGES
from vitcli.inspection.words import Inspection, before_names, reader_words
from vitcli.models import PixelMlp, VisionTransformer

__all__ = ["COMPONENTS", "FIGURES", "gallery", "uniform_distance"]

COMPONENTS = 28  # as in figure 7 of the paper
FIGURES = (
    *("filters", "positions", "distances", "rollout", "heads", "layers", "features", "lengths"),
    *("alike", "alike-against", "fields", "reach"),
)


def gallery(found: Inspection) -> list[Picture]:
    """Return the figures that the model and the images give."""
    return [*of_weights(found), *of_attention(found), *of_features(found), *of_layers(found), *of_fields(found)]


def of_weights(found: Inspection) -> list[Picture]:
    components, shares = filter_components(found.filters, most=COMPONENTS)
    pictures = [
        Picture(
            "filters",
            "Filters",
            draw_filters(components, shares),
            [
                f"The first {len(components)} principal components of {found.filters_words}; above each its share of variance.",
                "Grey is 0, and each is as bright as it can be. A trained model's look like a basis of smooth waves and colour "
                "contrasts; what looks like noise was hardly trained (ViT, figure 7, left).",
            ],
        )
    ]
    model = found.opened.model
    if found.positions is not None and isinstance(model, VisionTransformer):
        pictures.append(
            Picture(
                "positions",
                "Positions",
                draw_positions(found.positions, model.grid_size),
                [
                    f"How similar each patch's position embedding ({found.positions_words}) is to those of all patches.",
                    "Each small square is one patch's view of the grid. Bright around its own place: the model knows which "
                    "patches are near; a bright cross: it knows rows and columns (ViT, figures 7 and 10).",
                ],
            )
        )
    return pictures


def uniform_distance(model: VisionTransformer) -> float:
    """Return the mean attention distance, px, of attention to all patches alike."""
    centres = patch_centres(model.grid_size, model.image_size).numpy().astype(np.float64)
    total = sum(float(np.hypot(*(centres - one).T).sum()) for one in centres)
    return total / len(centres) ** 2


def of_attention(found: Inspection) -> list[Picture]:
    model = found.opened.model
    if not isinstance(model, VisionTransformer) or found.survey is None or found.survey.distances is None:
        return []
    names = attention_names(model)
    pictures = [
        Picture(
            "distances",
            "Attention distance",
            draw_distances(found.survey.distances, names, uniform=uniform_distance(model), width=model.image_size[1]),
            [
                "How far heads look: the mean distance from a patch to those it attends to, "
                f"over {found.survey.images:,} images.",
                "Weighted by attention among patches. Low layers of a model trained on much data have heads that look near and "
                "heads that look far; without enough data few look near (ViT, figures 7 and 11).",
            ],
        )
    ]
    if not found.views:
        return pictures
    start, maps = reader_words(model)
    pooled = found.views[0].pool is not None
    last = "what each head of the learned query takes of each patch" if pooled else maps
    return [
        *pictures,
        Picture(
            "rollout",
            "Rollout",
            draw_rollout(found.views),
            [
                f"What of the image reaches the head through the attention of all layers, from {start}.",
                "Heads are fused by their mean, largest or smallest weight, then the identity is added for the residual "
                "connection and layers are multiplied (2005.00928). Each map runs from its least to its most, which stand "
                "below it as multiples of the mean patch: where both are near 1, the colours show next to nothing.",
            ],
        ),
        Picture(
            "heads",
            "Heads",
            draw_heads(found.views),
            [
                f"{'The learned query' if pooled else 'The last layer'}, head by head: {last}.",
                "Each map runs from its least to its most by the root, so that little shows beside much; below it stands its "
                "most, as a multiple of the mean patch.",
            ],
        ),
        Picture(
            "layers",
            "Heads",
            draw_layers(found.views[0], names),
            [
                f"Every head of every layer for the first picture: {maps}.",
                "One scale for all: multiples of the mean patch.",
            ],
        ),
    ]


def of_features(found: Inspection) -> list[Picture]:
    model = found.opened.model
    pictures = []
    if found.views and found.views[0].colours:
        pictures.append(
            Picture(
                "features",
                "Features",
                draw_features(found.views, found.coloured),
                [
                    "Features as colours: the first three principal components of a layer's patches as red, green and blue.",
                    "Of all pictures together, so the same colour means the same features in each. On the right how long the "
                    f"last layer's features are, as multiples of the median: patches of more than {OUTLIER:g} are outliers.",
                ],
            )
        )
    if isinstance(model, VisionTransformer) and found.survey is not None and found.survey.lengths is not None:
        lengths = found.survey.lengths
        names = layer_names(model)[-len(lengths) :]
        most = max(each.outliers for each in lengths)
        pictures.append(
            Picture(
                "lengths",
                "Features",
                draw_lengths(lengths, names, before_names(model)),
                [
                    f"How long tokens are in each layer. At most {100 * most:.2g} % of a layer's patches are outliers, longer "
                    f"than {OUTLIER:g} medians.",
                    "Large models keep notes on the whole image in a few patches of little content, which become many times "
                    "longer than the others and spoil attention maps; registers take them in (2309.16588).",
                ],
            )
        )
    return pictures


def of_layers(found: Inspection) -> list[Picture]:
    survey, pictures = found.survey, []
    if survey is None or survey.alike is None:
        return []
    names, own = layer_names(found.opened.model), found.opened.ckpt.name
    how = "Linear CKA, unbiased, over mini-batches: 1 is the same but for a rotation and a scale, 0 has nothing in common."
    pictures.append(
        Picture(
            "alike",
            "Layers compared",
            draw_alike(survey.alike, names, names, of=own, against=None),
            [f"How alike the layers see {survey.images:,} images.", how],
        )
    )
    if survey.alike_against is not None and found.against is not None:
        others, other = layer_names(found.against.model), found.against.ckpt.name
        pictures.append(
            Picture(
                "alike-against",
                "Layers compared",
                draw_alike(survey.alike_against, names, others, of=own, against=other),
                [
                    f"How alike the layers of {own} and of {other} see the same images.",
                    "A bright row or column: one model does in few layers what the other takes many for (2108.08810).",
                ],
            )
        )
    return pictures


def of_fields(found: Inspection) -> list[Picture]:
    if not found.fields or isinstance(found.opened.model, PixelMlp):
        return []
    images = found.fields[0].images
    return [
        Picture(
            "fields",
            "Receptive fields",
            draw_fields(found.fields),
            [
                f"What the middle place of a layer sees: the length of its gradient by pixel, over {images:,} images.",
                "Brightness goes by the root of that length. Inside the circle, whose radius stands above, lies half of its "
                "square. A Transformer sees the whole image from its first block on, a ResNet grows from layer to layer "
                f"(2108.08810). At most {FIELD_IMAGES} images are taken.",
            ],
        ),
        Picture(
            "reach",
            "Receptive fields",
            draw_reach(found.fields),
            ["Within which radius half, and nine tenths, of a receptive field lie, from the first layer to the last."],
        ),
    ]

"""A model looked at from the inside: all that is found of it, by a command or while it trains."""

from collections.abc import Callable

from vitcli.errors import UserError
from vitcli.inspection.embeddings import filters_of, positions_of
from vitcli.inspection.layers import layer_names
from vitcli.inspection.samples import Samples
from vitcli.inspection.survey import survey
from vitcli.inspection.views import FIELD_IMAGES, depths, fields_of, views_of
from vitcli.inspection.words import Inspection
from vitcli.opened import OpenedModel

__all__ = ["look"]

Say = Callable[[str], None]

COLOURED = 4  # layers whose features are shown as colours
FIELDS = 5  # layers whose receptive fields are shown


def look(
    opened: OpenedModel,
    samples: Samples | None,
    *,
    against: OpenedModel | None = None,
    field_images: int = FIELD_IMAGES,
    say: Say,
) -> Inspection:
    """Look at a model with images, or without any at its weights alone.

    Args:
        against: another model, to compare with on the same images.
        field_images: over how many images receptive fields are averaged, at most.

    Raises:
        UserError: no image can be read.
    """
    model = opened.model
    layers = depths(len(layer_names(model)), most=COLOURED)
    measured, views, fields = None, [], []
    if samples is not None:
        measured = survey(opened, against, samples, say=say)
        if not measured.images:
            raise UserError(f"{samples.description}: none of them can be read")
        views = views_of(opened, samples, layers=layers, say=say)
        both = [opened] if against is None else [opened, against]
        found = [
            fields_of(one, samples, most=FIELDS, images=field_images, name=one.ckpt.name or str(one.ckpt), say=say)
            for one in both
        ]
        fields = [one for one in found if one is not None]
    filters, filters_words = filters_of(model)
    positions, positions_words = positions_of(model)
    return Inspection(
        opened=opened,
        against=against,
        filters=filters,
        filters_words=filters_words,
        positions=positions,
        positions_words=positions_words,
        samples=samples,
        survey=measured,
        views=views,
        coloured=[layer_names(model)[layer] for layer in layers],
        fields=fields,
    )

"""The numbers of an inspection as JSON: what the figures show, under names, with units in them."""

from typing import Any

import numpy as np

from vitcli.inspection.embeddings import filter_components, neighbour_similarity
from vitcli.inspection.fields import field_radius
from vitcli.inspection.gallery import COMPONENTS, uniform_distance
from vitcli.inspection.layers import attention_names, layer_names
from vitcli.inspection.views import Fields
from vitcli.inspection.words import Inspection, before_names
from vitcli.models import VisionTransformer

__all__ = ["numbers"]

FORMAT_VERSION = 1


def numbers(found: Inspection) -> dict[str, Any]:
    """Return the numbers; what the model does not have, or was not measured, is left out."""
    opened, survey = found.opened, found.survey
    model = opened.model
    _, shares = filter_components(found.filters, most=COMPONENTS)
    about: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "checkpoint": str(opened.ckpt),
        "weights": str(opened.pretrained.source_path),
        "step": opened.pretrained.step,
        "model": opened.config.model.model_dump(mode="json"),
        "image_size": list(opened.config.data.image_size),
        "images": 0 if survey is None else survey.images,
        "layers": layer_names(model),
        "notes": found.notes(),
        "filters": {"what": found.filters_words, "shares_of_variance": listed(shares)},
    }
    if found.positions is not None and isinstance(model, VisionTransformer):
        about["positions"] = {
            "what": found.positions_words,
            "mean_cosine_similarity": neighbour_similarity(found.positions, model.grid_size),
        }
    if survey is not None and isinstance(model, VisionTransformer) and survey.distances is not None:
        about["attention"] = {
            "layers": attention_names(model),
            "mean_distance_px": listed(survey.distances),
            "mean_distance_of_uniform_attention_px": uniform_distance(model),
            "share_to_other_tokens": listed(survey.elsewhere),
        }
        about["rollout"] = [
            {"image": view.name, "per_mean_patch": {fuse: listed(heat) for fuse, heat in view.rollouts.items()}}
            for view in found.views
        ]
    if survey is not None and survey.lengths is not None and isinstance(model, VisionTransformer):
        about["tokens"] = {
            "before_the_patches": before_names(model),
            "layers": [
                {"length_quantiles": each.quantiles, "share_of_outliers": each.outliers, "mean_length_before": each.before}
                for each in survey.lengths
            ],
        }
    if survey is not None and survey.alike is not None:
        about["cka"] = listed(survey.alike)
    if survey is not None and found.against is not None and survey.alike_against is not None:
        about["against"] = {
            "checkpoint": str(found.against.ckpt),
            "layers": layer_names(found.against.model),
            "cka": listed(survey.alike_against),
        }
    about["receptive_fields"] = [radii(fields) for fields in found.fields]
    return about


def radii(fields: Fields) -> dict[str, Any]:
    """Return within which radii half and nine tenths of each of a model's fields lie."""
    rows = []
    for name, centre, field in zip(fields.layers, fields.centres, fields.fields, strict=True):
        rows.append({"layer": name, **{f"radius_{p}_px": field_radius(field, centre, share=p / 100) for p in (50, 90)}})
    return {"model": fields.name, "images": fields.images, "layers": rows}


def listed(array: Any) -> Any:
    """Return an array as nested lists of six digits; what is not finite as null."""
    if isinstance(array, np.ndarray):
        return [listed(one) for one in array]
    return float(f"{array:.6g}") if np.isfinite(array) else None

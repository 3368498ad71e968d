"""A run looked at while it trains: the figures of `vit inspect` as pixels, from a copy of its weights and a few images.

The copy keeps the run as it is: no hook, no mode and no random number of the model that trains is touched. What it costs is
bounded by `IMAGES`, and by figures of which there are as many at any size.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitcli.config import Config
from vitcli.data.protocol import Source
from vitcli.figures import pixels_of
from vitcli.inspection.gallery import gallery
from vitcli.inspection.looking import look
from vitcli.inspection.samples import source_samples
from vitcli.models import build_model
from vitcli.opened import OpenedModel
from vitcli.pretrained import Pretrained

__all__ = ["IMAGES", "live_figures"]

IMAGES = 64  # of the evaluation split, that means are taken over
PICTURES = 2  # shown by themselves
FIELD_IMAGES = 8  # of receptive fields, which need a backward pass each layer


def live_figures(
    weights: Mapping[str, Tensor],
    source: Source,
    config: Config,
    *,
    num_classes: int,
    step: int,
    device: torch.device,
    say: Callable[[str], None],
) -> dict[str, NDArray[np.uint8]]:
    """Return the figures of a run's weights after `step` updates, (H, W, 3) by name.

    Args:
        weights: whole tensors by their names in the model; those with other names are not looked at.
        source: the evaluation images.
        config: of the run, resolved.

    Raises:
        UserError: no image can be read.
    """
    with torch.random.fork_rng(devices=[]):  # initial weights that are not kept would take the run's random numbers
        model = build_model(
            config.model,
            image_size=config.data.image_size,
            num_classes=num_classes,
            patch_permutation=config.data.patch_permutation,
        )
    model.load_state_dict({name: weights[name].detach().cpu() for name in model.state_dict()})
    model = model.to(device).eval().requires_grad_(False)
    ckpt = config.out or Path("run")
    about = Pretrained(
        state={},
        model=config.model.model_dump(mode="json"),
        classes=[],
        preprocessing={},
        source_path=ckpt,
        step=step,
        is_ema=False,
        manifest={},
    )
    opened = OpenedModel(ckpt, model, about, config, device, flops_per_image=0)
    samples = source_samples(source, most=IMAGES, pictures=PICTURES)
    samples = replace(samples, description=f"{samples.description}, after {step:,} steps")
    found = look(opened, samples, field_images=FIELD_IMAGES, say=say)
    return {picture.name: pixels_of(picture.figure) for picture in gallery(found)}

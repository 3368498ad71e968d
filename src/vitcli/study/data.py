"""What a study is pretrained on and tried on: opened when it is planned, so that what is missing is found at once."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, cast

from vitcli.config import Config, DataConfig
from vitcli.config_file import Layers
from vitcli.data.folders import Split
from vitcli.data.named import NAMED_SETS, data_root, present_sets
from vitcli.data.sources import open_source
from vitcli.errors import ConfigError, DataError, RunExistsError
from vitcli.rundir import read_json
from vitcli.study.config import StudyConfig, points_of
from vitcli.study.settings import Group, Upstream, run_settings
from vitcli.train import MANIFEST, begun

__all__ = ["open_all", "open_transfer", "refuse_other_images"]

Say = Callable[[str], None]

FEW = 1000  # evaluation images of data that does not lie here
# settings of the data that make the images to learn from; the same for all families
SAME_IMAGES = ("source", "val_source", "shapes", "mosaic", "mix", "mix_classes", "subset_seed", "sampling", "val_fraction")


def open_all(
    config: StudyConfig, layers: Layers, *, path: Path, needs_data: bool, say: Say
) -> dict[str, tuple[Upstream, Config]]:
    """Open what every variant is pretrained on; return that, and the settings of its first family at its largest size.

    Raises:
        ConfigError: two families of a variant would learn from different images.
        DataError: the data is missing or too small.
    """
    opened: dict[str, tuple[Upstream, Config]] = {}
    known: dict[str, Upstream] = {}
    for variant in config.all_variants:
        size = config.sizes_of(variant)[-1]
        for family in config.families_of(variant):
            group = Group(variant, family, size)
            point = points_of(config, family)[0]
            run, places = run_settings(config, layers, group, point=point, trial=False, path=path)
            if variant in opened:
                check_same_images(opened[variant][1], run, places, family=family)
                continue
            labels = run.objective.needs_labels
            images = f"{labels} {run.data.model_dump_json(include={*SAME_IMAGES, 'image_size', 'root', 'on_error'})}"
            if images not in known:
                known[images] = open_upstream(run.data, labels=labels, needs_data=needs_data, say=say)
            opened[variant] = (known[images], run)
            if known[images].problem is None and known[images].train_examples < size:
                corpus = run.data.source.partition(":")[0]
                more = f", or more of the corpus (base.data.{corpus}.train_examples)" if corpus in ("shapes", "mosaic") else ""
                raise DataError(
                    f"{layers.where('sizes')}: sizes goes up to {size:,} images, but {run.data.source} has "
                    f"{known[images].train_examples:,} to train on; take fewer{more}"
                )
    return opened


def check_same_images(first: Config, run: Config, places: Layers, *, family: str) -> None:
    """Raise ConfigError if a family of a variant learns from other images than the first one."""
    for key in SAME_IMAGES:
        a, b = getattr(first.data, key), getattr(run.data, key)
        if a != b:
            raise ConfigError(
                f"{places.where(f'data.{key}')}: data.{key} is {b} for {family} and {a} for another family; all learn from the "
                "same images: say it in base"
            )


def open_upstream(data: DataConfig, *, labels: bool, needs_data: bool, say: Say) -> Upstream:
    """Open both splits of the pretraining set, without decoding it; `labels`: whether its images need them."""
    whole = data.model_copy(update={"examples": None, "dev_fraction": None, "memory_cache_gib": 0.0})
    try:
        if not needs_data:
            refuse_download([data.source, data.val_source or data.source], data.root)
        train = open_source(data.source, split="train", data=whole, labels=labels)
        val = open_source(data.val_source or data.source, split="val", data=whole, labels=labels)
    except DataError as error:
        if needs_data:
            raise
        say(f"note: {error}; operations are without those of the head")
        return Upstream(0, FEW, 1, problem=str(error))
    return Upstream(len(train), len(val), len(train.classes) if labels else 0)


def refuse_other_images(runs: Iterable[tuple[Path, Config]]) -> None:
    """Raise RunExistsError where what now lies in the place of a study's data is not what its runs learned from.

    Args:
        runs: directories and the settings that they would get now. Of those that began with data of one other place, one
            is compared.

    Raises:
        DataError: the data is missing.
    """
    known: set[tuple[Any, ...]] = set()
    for run, config in runs:
        manifest = read_json(run / MANIFEST) if begun(run) else None
        if manifest is None:
            continue
        before = tuple(manifest["requested"]["data"].get(key) for key in ("source", "val_source"))
        now = config.data.source, config.data.val_source
        if before == now or (before, now) in known:
            continue
        known.add((before, now))
        whole = config.data.model_copy(update={"memory_cache_gib": 0.0})
        for split, spec in (("train", now[0]), ("val", now[1] or now[0])):
            source = open_source(spec, split=cast(Split, split), data=whole, labels=config.objective.needs_labels)
            if source.fingerprint != manifest["data"][split]:
                raise RunExistsError(
                    f"{run}: the {split} images of {spec} are not those of {before[0]}, which this study began with; bring "
                    "them back, or choose another --out"
                )


def open_transfer(config: StudyConfig, data: DataConfig, *, needs_data: bool, say: Say) -> None:
    """Raise DataError if a data set to transfer to is missing, before days are spent on pretraining; or say so."""
    update: dict[str, Any] = {"examples": None, "dev_fraction": None, "val_source": None, "memory_cache_gib": 0.0}
    whole = data.model_copy(update=update)
    for each in config.transfer:
        try:
            if not needs_data:
                refuse_download([each.dataset], data.root)
            open_source(each.dataset, split="train", data=whole)
            open_source(each.dataset, split="val", data=whole)
        except DataError as error:
            if needs_data:
                raise
            say(f"note: {error}")


def refuse_download(specs: Sequence[str], root: Path | None) -> None:
    """Raise DataError for a named set that does not lie here, rather than fetch it for a dry run."""
    place = data_root(root)
    for spec in specs:
        if spec in NAMED_SETS and spec not in present_sets(place):
            raise DataError(f"{spec}: not in {place} yet")

"""The schema of a study's YAML: what is compared, over which amounts of data, and what is measured.

`base`, `families` and `variants` hold settings of a run; `file` makes them, with their places, those of every run.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from vitcli.config_file import flatten
from vitcli.section import Count, Length, PositiveInt, Section
from vitcli.study.cells import PLAIN

__all__ = [
    *("LengthConfig", "SearchConfig", "StudyConfig", "TransferConfig", "VariantConfig"),
    *("nearest_size", "points_of"),
]


def all_as_none(value: Any) -> Any:
    """Read `all` as no restriction."""
    return None if value == "all" else value


def in_order(value: list[int] | None) -> list[int] | None:
    """Refuse numbers that are not in order, or there twice."""
    if value is not None and sorted(set(value)) != value:
        raise ValueError("different numbers in ascending order")
    return value


def apart(value: list[Any] | None) -> list[Any] | None:
    """Refuse what is there twice."""
    if value is not None and any(value.count(each) > 1 for each in value):
        raise ValueError("each of them once")
    return value


Sizes = Annotated[list[Length], Field(min_length=1, max_length=1000), AfterValidator(in_order)]
Seeds = Annotated[list[Count], Field(min_length=1, max_length=1000), AfterValidator(apart)]
Names = Annotated[list[str], Field(min_length=1, max_length=1000), AfterValidator(apart)]
Share = Annotated[float, Field(gt=0, lt=1)]
Settings = dict[str, Any]  # of a run, nested as in its config


class VariantConfig(Section):
    """Other settings, under which families are compared again: a control."""

    settings: Settings = Field(description="of every run, on top of the family's")
    families: Annotated[Names | None, BeforeValidator(all_as_none)] = Field(None, description="some of the families, or all")
    sizes: Annotated[Sizes | None, BeforeValidator(all_as_none)] = Field(None, description="some of the sizes, or all")
    seeds: Annotated[Seeds | None, BeforeValidator(all_as_none)] = Field(None, description="some of the seeds, or all")
    search: bool = Field(False, description="search anew, instead of taking what was chosen without these settings")


class LengthConfig(Section):
    """How long a run of the grid is: one of epochs, examples and steps."""

    epochs: Annotated[float, Field(gt=0, le=1e9)] | None = Field(None, description="the same number of passes at every size")
    examples: Length | None = Field(None, description="the same number of images seen, and so of operations, at every size")
    steps: Length | None = Field(None, description="the same number of steps")
    early_stop_evals: PositiveInt | None = Field(
        None, description="to convergence: a run may end earlier, by its accuracy on a development split"
    )
    dev_fraction: Share = Field(0.1, description="of the pretraining images, where early_stop_evals is given")


class SearchConfig(Section):
    """Which settings are chosen for every family and size, judged by top-1 on a development split with the first seed."""

    settings: Settings = Field(description="values to try, by their names in a config: every combination is run")
    families: dict[str, Settings] = Field({}, description="other values for a family; as many combinations as for the others")
    dev_fraction: Share = Field(0.1, description="share of the pretraining images that a trial is judged by")
    share: Annotated[float, Field(gt=0, le=1)] = Field(1.0, description="of a run's length that a trial takes")
    sizes: Annotated[Sizes | None, BeforeValidator(all_as_none)] = Field(
        None, description="sizes to search at, or all; others take the choice of the nearest"
    )


class TransferConfig(Section):
    """A data set that the pretrained weights are tried on."""

    dataset: str = Field(description="as in vit finetune --dataset")
    shots: Annotated[list[PositiveInt], AfterValidator(in_order)] = Field(
        [], description="images per class that a few-shot probe learns from; the same for every data set"
    )
    seeds: PositiveInt = Field(3, description="draws of the shots; the same for every data set")
    finetune: Settings | None = Field(
        None, description="settings of a fine-tuning on top of the data set's recipe, {} for the recipe alone; null for none"
    )
    families: dict[str, Settings] = Field(
        {}, description="settings of one family's fine-tuning on top of these, by its name, such as its learning rate"
    )

    def finetune_of(self, family: str) -> dict[str, Any]:
        """Return the settings of a family's fine-tuning, by dotted key."""
        return {**flatten(self.finetune or {}), **flatten(self.families.get(family, {}))}


class StudyConfig(Section):
    """A comparison of model families over amounts of pretraining data."""

    title: Annotated[str, Field(min_length=1, max_length=200)] = Field(description="of the page and the figures")
    form: Literal["grid", "one_pass"] = Field(
        description="a run for every size, or one run over fresh images that is read at every size"
    )
    base: Settings = Field(description="settings of every run, as in the config of vit pretrain")
    families: Annotated[dict[str, Settings], Field(min_length=1, max_length=100)] = Field(
        description="what is compared: settings on top of base, by name"
    )
    compare: Annotated[Names, Field(min_length=2, max_length=2)] | None = Field(
        None,
        description="the gap is the first one's accuracy less the second one's; null takes the first two families, or with one "
        "size compares every family with the first",
    )
    variants: Annotated[dict[str, VariantConfig], Field(max_length=100)] = Field(
        {}, description=f"controls, by name; what has none of these settings is called {PLAIN}"
    )
    sizes: Sizes = Field(description="pretraining images; a smaller set is part of every larger one")
    seeds: Seeds = Field([0, 1, 2], description="of the runs; the first is the one of a search")
    length: LengthConfig | None = Field(None, description="of a run of the grid")
    search: SearchConfig | None = Field(None, description="null compares the families with the settings as they are")
    transfer: Annotated[list[TransferConfig], Field(max_length=100)] = Field([], description="where else accuracy is measured")
    translate_px: Annotated[list[PositiveInt], AfterValidator(in_order)] = Field(
        [], description="also the accuracy on evaluation images moved by so many px"
    )

    @property
    def pair(self) -> tuple[str, str] | None:
        """Return the families whose gap is measured over the sizes; None where there is one family or one size to look at."""
        names = list(self.compare or self.families)
        return (names[0], names[1]) if len(names) > 1 and (self.compare or not self.first_arm) else None

    @property
    def first_arm(self) -> str | None:
        """Return the family that each other one is compared with, in a study of one size; None in one of several."""
        return next(iter(self.families)) if len(self.sizes) == 1 else None

    @property
    def all_variants(self) -> list[str]:
        """Return the names of all variants, `plain` first."""
        return [PLAIN, *self.variants]

    def families_of(self, variant: str) -> list[str]:
        """Return the families of a variant, in the file's order."""
        some = self.variants[variant].families if variant != PLAIN else None
        return [name for name in self.families if some is None or name in some]

    def sizes_of(self, variant: str) -> list[int]:
        """Return the sizes of a variant, or the readings of its runs, ascending."""
        some = self.variants[variant].sizes if variant != PLAIN else None
        return self.sizes if some is None else some

    def seeds_of(self, variant: str) -> list[int]:
        """Return the seeds of a variant's reported cells; the first is that of its trials."""
        some = self.variants[variant].seeds if variant != PLAIN else None
        return self.seeds if some is None else some


def points_of(config: StudyConfig, family: str) -> list[dict[str, Any]]:
    """Return the settings that a search tries for a family, by dotted key, in the file's order; one empty one without a search.

    A family's own values replace those for all, key by key.
    """
    if config.search is None:
        return [{}]
    values = flatten(config.search.settings) | flatten(config.search.families.get(family, {}))
    return [dict(zip(values, combination)) for combination in itertools.product(*values.values())]


def nearest_size(size: int, sizes: Sequence[int]) -> int:
    """Return the size whose ratio to `size` is nearest to 1; the smaller one of two."""
    return min(sizes, key=lambda each: (abs(math.log(each / size)), each))

"""ImageNet's classes: which output of a model trained on ImageNet-1k or -21k stands for what.

Two tables, `wnid<TAB>name` in the order of the outputs: the 1,000 classes of ILSVRC2012 (names as torchvision has them), which
is the order of their wnids, and the 21,843 of the authors' ImageNet-21k models (names: the first lemma of WordNet 3.0).
A wnid is WordNet's number of a noun, n01440764 for the tench, and what ImageNet's class folders are called.
"""

import gzip
import re
from collections.abc import Sequence
from functools import cache
from importlib.resources import files

__all__ = ["NOT_IN_21K", "imagenet_classes", "readable", "wnids_of"]

TABLES = {1000: "imagenet_1k.tsv", 21843: "imagenet_21k.tsv.gz"}
NOT_IN_21K = "n04399382"  # the teddy, the only one of the 1,000 that the 21,843 lack
WNID = re.compile(r"n\d{8}")
ALIKE = 0.8  # of 1,000 names in order: spellings differ from list to list, and no other list comes near


@cache
def imagenet_classes(outputs: int) -> dict[str, str]:
    """Return wnid to name in the order of 1,000 or 21,843 outputs; of any other number of outputs nothing."""
    if outputs not in TABLES:
        return {}
    data = files("vitcli.data").joinpath(TABLES[outputs]).read_bytes()
    text = (gzip.decompress(data) if TABLES[outputs].endswith(".gz") else data).decode()
    return dict(line.split("\t") for line in text.splitlines())


def wnids_of(classes: Sequence[str]) -> list[str] | None:
    """Return the wnids of classes that are wnids, or that are ImageNet's by name and in its order; None for any others."""
    if classes and all(WNID.fullmatch(name) for name in classes):
        return list(classes)
    table = imagenet_classes(len(classes))
    if not table:
        return None
    same = sum(plain(name) == plain(known) for name, known in zip(classes, table.values(), strict=True))
    return list(table) if same >= ALIKE * len(classes) else None


def readable(classes: Sequence[str]) -> list[str]:
    """Add names to wnids, as in "n01440764 tench"; leave anything else as it is."""
    if not any(WNID.fullmatch(name) for name in classes):
        return list(classes)
    names = {**imagenet_classes(21843), **imagenet_classes(1000)}
    return [f"{name} {names[name]}" if name in names else name for name in classes]


def plain(name: str) -> str:
    """Reduce a class name to what lists agree on: the first synonym, in lower case."""
    without_wnid = re.sub(r"\s*\(n\d{8}\)$", "", name)
    return without_wnid.partition(",")[0].replace("_", " ").strip().lower()

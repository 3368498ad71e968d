"""ImageNet's classes against the lists of timm and torchvision."""

from pathlib import Path

import pytest
import timm.data
from torchvision.models._meta import _IMAGENET_CATEGORIES

from vitcli.data.imagenet import NOT_IN_21K, imagenet_classes, readable, wnids_of

INFO = Path(timm.data.__file__).parent / "_info"


def listed(name: str) -> list[str]:
    return (INFO / name).read_text().split()


def test_the_order_is_timms_and_the_names_are_torchvisions() -> None:
    known = imagenet_classes(1000)
    assert list(known) == listed("imagenet_synsets.txt")
    assert list(known.values()) == list(_IMAGENET_CATEGORIES)
    assert (known["n01440764"], list(known)[999]) == ("tench", "n15075141")


def test_the_order_of_21k_is_the_authors() -> None:
    known = imagenet_classes(21843)
    assert list(known) == listed("imagenet21k_goog_synsets.txt")
    lemmas = dict(line.split("\t") for line in (INFO / "imagenet_synset_to_lemma.txt").read_text().splitlines())
    assert all(name == lemmas[wnid].split(",")[0] for wnid, name in known.items() if wnid in lemmas)
    assert sum(wnid in lemmas for wnid in known) > 21800
    assert set(imagenet_classes(1000)) - set(known) == {NOT_IN_21K}


def test_any_other_number_of_outputs_has_no_known_classes() -> None:
    assert imagenet_classes(10) == {}
    assert wnids_of([f"class {number}" for number in range(1000)]) is None
    assert wnids_of([]) is None
    assert wnids_of(["n01440764", "tench"]) is None


@pytest.mark.parametrize("case", ["wnids", "names", "synonyms", "wnid in brackets", "upper case", "a few others"])
def test_imagenets_classes_are_known_by_any_spelling(case: str) -> None:
    wnids, names = list(imagenet_classes(1000)), list(imagenet_classes(1000).values())
    spelled = {
        "wnids": wnids,
        "names": names,
        "synonyms": [f"{name}, another name" for name in names],
        "wnid in brackets": [f"{name} ({wnid})" for name, wnid in zip(names, wnids, strict=True)],
        "upper case": [name.title().replace(" ", "_") for name in names],
        "a few others": ["?"] * 50 + names[50:],
    }[case]
    assert wnids_of(spelled) == wnids
    if case != "wnids":
        assert wnids_of(spelled[::-1]) is None  # by name in another order they are not these outputs


def test_names_are_put_beside_wnids_and_nothing_else() -> None:
    assert readable(["n01440764", "n00005787", "n99999999"]) == ["n01440764 tench", "n00005787 benthos", "n99999999"]
    assert readable(["cat", "dog"]) == ["cat", "dog"]

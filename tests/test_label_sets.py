"""ImageNet's companion sets against timm and against what their authors say, and label files with everything wrong in them."""

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import timm.data
import torch
from PIL import Image
from sklearn.metrics import accuracy_score, top_k_accuracy_score
from timm.data.real_labels import RealLabelsImagenet
from torch import Tensor, nn

from tests.harness import vit
from vitcli.config import Config
from vitcli.data.imagenet import NOT_IN_21K, imagenet_classes
from vitcli.data.label_file import match_images, read_label_file
from vitcli.errors import DataError
from vitcli.evaluate import EvalResult, evaluate
from vitcli.forward import source_answers
from vitcli.label_sets import Accepted, LabelSet, class_names, open_label_set
from vitcli.opened import OpenedModel
from vitcli.pretrained import Pretrained

CPU = torch.device("cpu")
WNIDS = list(imagenet_classes(1000))
INFO = Path(timm.data.__file__).parent / "_info"


class Lookup(nn.Module):
    """Logits that are a function of an image's colour, which is its number."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = table

    def forward(self, images: Tensor) -> Tensor:
        colour = (255 * (images[:, :, 0, 0] / 2 + 0.5)).round().long()
        return self.table[colour[:, 0] + 256 * colour[:, 1]]


def save(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), (number % 256, number // 256, 0)).save(path)


def opened_model(
    spec: str, table: Tensor, *, classes: list[str] | None = None, trained_on: str | None = None, loss: str = "softmax"
) -> OpenedModel:
    names = [str(number) for number in range(table.shape[1])] if classes is None else classes
    pretrained = Pretrained({}, {}, names, {}, Path("m.npz"), 0, False, {"source": trained_on}, named=classes is not None)
    config = Config.model_validate(
        {"data": {"source": spec, "image_size": 4, "workers": 0}, "train": {"precision": "float32", "loss": loss}}
    )
    return OpenedModel(Path("m.npz"), Lookup(table), pretrained, config, CPU, 1)  # type: ignore[arg-type]


def judge(opened: OpenedModel, **how: Any) -> tuple[EvalResult, LabelSet, list[str]]:
    said: list[str] = []
    opened, found = open_label_set(opened, say=said.append, **how)
    options = {"device": CPU, "batch_size": 7, "warn": said.append, "flops_per_image": 1}
    with closing(source_answers(opened.model, found.source, opened.config, **options)) as answered:
        return evaluate(found.judged(answered), num_classes=len(found.classes), device=CPU), found, said


def random_table(images: int, outputs: int, seed: int = 0) -> Tensor:
    return torch.randn(images, outputs, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- class folders


def wnid_folder(path: Path, chosen: list[int], each: int = 3) -> tuple[str, list[int]]:
    """Write a folder for each of some ILSVRC classes; image i has colour i. Return its name, and each image's class."""
    labels: list[int] = []
    for label in chosen:
        for _ in range(each):
            save(path / WNIDS[label] / f"{len(labels)}.png", len(labels))
            labels.append(label)
    return f"folder:{path}", labels


@pytest.mark.parametrize("named", ["no", "wnids", "names"])
def test_of_a_part_of_imagenets_classes_only_their_outputs_count(tmp_path: Path, named: str) -> None:
    part = [int(number) for number in (INFO / "imagenet_a_indices.txt").read_text().split()][::40]
    assert [WNIDS[number] for number in part] == (INFO / "imagenet_a_synsets.txt").read_text().split()[::40]
    spec, labels = wnid_folder(tmp_path / "set", part)
    table = random_table(len(labels), 1000)
    table[torch.arange(len(labels)), labels] += 1.5
    classes = {"no": None, "wnids": WNIDS, "names": list(imagenet_classes(1000).values())}[named]
    result, found, said = judge(opened_model(spec, table, classes=classes))
    guesses = np.array(part)[table[:, part].argmax(1)]
    assert result.top1 == accuracy_score(labels, guesses)
    assert 0 < result.top1 < 1
    assert result.examples == len(labels)  # not a tenth of them, as of a folder to train on
    assert found.classes == [(classes or WNIDS)[number] for number in part]
    assert found.about["restricted_to"] == len(part)
    assert any("only the outputs of its" in line for line in said)
    assert any("does not name" in line for line in said) == (named == "no")
    unrestricted, _, _ = judge(opened_model(spec, table, classes=classes), restrict=False)
    assert unrestricted.top1 == accuracy_score(labels, table.argmax(1))
    assert unrestricted.top1 < result.top1


def test_an_imagenet_21k_model_is_asked_about_the_classes_of_a_folder(tmp_path: Path) -> None:
    teddy = WNIDS.index(NOT_IN_21K)
    spec, labels = wnid_folder(tmp_path / "set", [0, 500, 999, teddy])
    order = list(imagenet_classes(21843))
    table = random_table(len(labels), 21843)
    labels = labels[:-3]
    columns = [order.index(WNIDS[label]) for label in (0, 500, 999)]
    result, found, said = judge(opened_model(spec, table))
    assert "without the 3 images of n04399382" in said[2]
    table = table[:-3]
    by_wnid = dict(zip(found.classes, table[:, sorted(columns)].T))
    stacked = torch.stack([by_wnid[WNIDS[label]] for label in (0, 500, 999)], dim=1)
    assert result.top1 == accuracy_score(labels, np.array([0, 500, 999])[stacked.argmax(1)])


@pytest.mark.parametrize("classes", [None, list(imagenet_classes(1000).values()), WNIDS[::-1]])
def test_folders_named_by_number_are_classes_by_number(tmp_path: Path, classes: list[str] | None) -> None:
    for number in range(1000):
        save(tmp_path / str(number) / "image.png", number)
    table = random_table(1000, 1000)
    table[torch.arange(1000), torch.arange(1000)] += 2
    result, found, _ = judge(
        opened_model(f"folder:{tmp_path}", table if classes != WNIDS[::-1] else table.flip(1), classes=classes)
    )
    assert result.top1 == accuracy_score(range(1000), table.argmax(1))
    assert result.top5 == top_k_accuracy_score(range(1000), table.numpy(), k=5)
    assert found.outputs is None
    assert result.examples == 1000


def test_numbers_without_names_are_numbers_however_the_folders_are_sorted(tmp_path: Path) -> None:
    for number in range(12):
        save(tmp_path / "val" / str(number) / "image.png", number)
    table = torch.eye(12)
    result, found, _ = judge(opened_model(f"folder:{tmp_path}", table))
    assert found.source.classes[:3] == ["0", "1", "10"]
    assert result.top1 == 1.0


def test_an_ordinary_set_is_what_it_was() -> None:
    table = random_table(512, 10)
    opened, found = open_label_set(opened_model("digits", table, classes=[str(d) for d in range(10)]), say=pytest.fail)
    assert (found.outputs, found.class_map, found.accepted, found.about) == (None, None, None, {})
    assert opened.config.data.workers == 0
    said: list[str] = []
    assert open_label_set(opened_model("digits", table[:, :10]), say=said.append)[1].classes == [str(d) for d in range(10)]
    with pytest.raises(DataError, match="other ones"):
        open_label_set(opened_model("digits", table, classes=[f"{d}!" for d in range(10)]), say=said.append)


def test_a_run_keeps_to_the_share_that_it_did_not_learn_from(tmp_path: Path) -> None:
    spec, labels = wnid_folder(tmp_path / "set", [1, 2, 3], each=10)
    table = random_table(len(labels), 3)
    names = [WNIDS[label] for label in (1, 2, 3)]
    result, _, _ = judge(opened_model(spec, table, classes=names, trained_on=spec))
    assert result.examples == 3
    elsewhere, _, _ = judge(opened_model(spec, table, classes=names, trained_on="folder:/gone"))
    assert elsewhere.examples == 3
    foreign, _, said = judge(opened_model(spec, table, classes=names, trained_on=None))
    assert foreign.examples == 30
    assert "all of its 30 images" in said[0]


def test_unknown_wnids_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "set" / "val" / "n00000001" / "a.png", 0)
    save(tmp_path / "set" / "val" / WNIDS[0] / "a.png", 0)
    with pytest.raises(DataError, match="this data set has 2"):
        judge(opened_model(f"folder:{tmp_path / 'set'}", random_table(2, 1000)))
    with pytest.raises(DataError, match="n00000001"):
        judge(opened_model(f"folder:{tmp_path / 'set'}", random_table(2, 1000), classes=WNIDS))


# ---------------------------------------------------------------- label files


def real_labels(images: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [sorted(rng.choice(1000, size=rng.integers(0, 4), replace=False).tolist()) for _ in range(images)]


def boosted(labels: list[list[int]], outputs: int, seed: int = 0) -> Tensor:
    """Return logits that favour one of the right answers of most images."""
    table = random_table(len(labels), outputs, seed)
    for row, right in enumerate(labels):
        if right and row % 4:
            table[row, right[row % len(right)]] += 4 if row % 2 else 2.5
    return table


@pytest.mark.parametrize("layout", ["flat", "class folders"])
def test_real_labels_count_as_timm_counts_them(tmp_path: Path, layout: str) -> None:
    labels = real_labels(60)
    file = tmp_path / "real.json"
    file.write_text(json.dumps(labels))
    names = [f"ILSVRC2012_val_{number:08d}.JPEG" for number in range(1, 61)]
    for number, name in enumerate(names):
        folder = tmp_path / "val" / (WNIDS[number % 7] if layout == "class folders" else "")
        save(folder / Path(name).with_suffix(".png"), number)
        (folder / Path(name).with_suffix(".png")).rename(folder / name)
    table = boosted(labels, 1000)
    theirs = RealLabelsImagenet(names, real_json=file)
    theirs.add_result(table)
    result, found, said = judge(opened_model(f"folder:{tmp_path / 'val'}", table), labels=file)
    assert 100 * result.top1 == pytest.approx(theirs.get_accuracy(1))
    assert 100 * result.top5 == pytest.approx(theirs.get_accuracy(5))
    assert 0.2 < result.top1 < result.top5
    assert result.examples == sum(map(bool, labels)) < 60
    assert found.about["several_labels"] == sum(len(right) > 1 for right in labels)
    assert "labels for" in said[-1]


def test_real_labels_of_an_imagenet_21k_model_are_among_the_thousand(tmp_path: Path) -> None:
    labels = real_labels(20, seed=3)
    (tmp_path / "real.json").write_text(json.dumps(labels))
    for number in range(20):
        save(tmp_path / f"ILSVRC2012_val_{number + 1:08d}.png", number)
    order = {wnid: output for output, wnid in enumerate(imagenet_classes(21843))}
    teddy = WNIDS.index(NOT_IN_21K)
    labels[0], labels[1] = [teddy], [0, teddy]
    (tmp_path / "real.json").write_text(json.dumps(labels))
    of_thousand = boosted(labels, 1000)
    of_thousand[:, teddy] = -100
    table = torch.full((20, 21843), 50.0)  # what is not among the thousand would win
    for number, wnid in enumerate(WNIDS):
        if number != teddy:
            table[:, order[wnid]] = of_thousand[:, number]
    result, found, _ = judge(opened_model(f"folder:{tmp_path}", table), labels=tmp_path / "real.json")
    right = [int(guess) in some for guess, some in zip(of_thousand.argmax(1), labels) if some and some != [teddy]]
    assert result.top1 == np.mean(right)
    assert result.examples == len(right)
    assert len(found.classes) == found.about["restricted_to"] == 999


@pytest.mark.parametrize("seed", range(5))
def test_of_several_right_answers_the_best_counts(seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.integers(0, 4, (40, 6)).astype(np.float32))  # with ties
    logits[3, 2], logits[4], logits[5, 1] = torch.nan, -torch.inf, -torch.inf
    right = [np.sort(rng.choice(6, size=rng.integers(1, 4), replace=False)) for _ in range(40)]
    accepted = Accepted(np.cumsum([0, *map(len, right)]), np.concatenate(right))
    found = LabelSet(None, list("abcdef"), None, None, accepted)  # type: ignore[arg-type]
    batch = {"labels": torch.zeros(40, dtype=torch.int64), "indices": torch.arange(40), "images": torch.zeros(40, 1)}
    ((judged, same),) = found.judged([(batch, logits)])
    assert same is logits
    assert judged["images"] is batch["images"]
    for row, label in enumerate(judged["labels"].tolist()):
        assert label in right[row]
        if row not in (3, 4, 5):
            assert logits[row, label] == logits[row, right[row]].max()
            assert label == right[row][logits[row, right[row]].argmax()]
    result = evaluate(found.judged([(batch, logits)]), num_classes=6, device=CPU)
    sure = [row for row in range(40) if row != 3]
    assert result.correct == sum(int(logits[row].argmax()) in right[row] for row in sure)


TSV = "# what is in them\r\nsub/a.png\ttench, Tinca tinca\r\n\r\nb.png\tn01443537, 2\nc\t 999 \nnothing.png\t\ngone.png\t5\n"


def test_a_label_file_may_name_number_and_leave_out(tmp_path: Path) -> None:
    (tmp_path / "labels.tsv").write_text(TSV)
    names = ["tench, Tinca tinca", *list(imagenet_classes(1000).values())[1:]]
    for number, name in enumerate(("sub/a.png", "b.png", "deep/er/c.png", "nothing.png", "d.png")):
        save(tmp_path / "images" / name, number)
    table = torch.zeros(5, 1000)
    table[0, 0] = table[1, 2] = table[2, 998] = 1
    table[1, 1] = 0.5
    opened = opened_model(f"folder:{tmp_path / 'images'}", table, classes=names)
    result, found, said = judge(opened, labels=tmp_path / "labels.tsv")
    assert (result.correct, result.examples) == (2, 3)
    assert found.about | {"labels": ""} == {"labels": "", "left_out": 2, "several_labels": 1, "not_there": 1}
    assert [found.source.where(i).removeprefix(f"{tmp_path}/images/") for i in range(3)] == [
        "b.png",
        "deep/er/c.png",
        "sub/a.png",
    ]
    assert "labels for 3 of 5 images, 1 with several" in said[-1]
    assert "1 images it names are not there" in said[-1]


def test_a_label_file_may_be_about_any_data_set(tmp_path: Path) -> None:
    (tmp_path / "labels.tsv").write_text("digits[3]\tseven\ndigits[0]\tone,seven\n")
    table = torch.zeros(512 * 512, 2)
    _, found = open_label_set(opened_model("digits", table, classes=["one", "seven"]), labels=tmp_path / "labels.tsv", say=str)
    assert [found.source.where(i) for i in range(len(found.source))] == ["digits[0]", "digits[3]"]
    assert found.accepted is not None
    assert found.accepted.mask(torch.tensor([1, 0]), num_classes=2).tolist() == [[False, True], [True, True]]
    plain, _ = open_label_set(opened_model("digits", random_table(9, 10), classes=list("0123456789")), say=str)
    assert found.source.fingerprint != open_label_set(plain, say=str)[1].source.fingerprint


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a.png\n", "labels.tsv:1: found 'a.png'; expected lines"),
        ("a.png\tcat\n\na.png\tdog\n", "labels.tsv:3: a.png stands in line 1 too"),
        ("a.png\tcatt\n", "labels.tsv:1: 'catt' is no class of m.npz; did you mean 'cat'?"),
        ("a.png\tcat,zebra\n", "'zebra' is no class of m.npz; expected one such as 'cat'"),
        ("a.png\t,\n", "',' is no class"),
        ("z.png\tcat\n", "none of its 1 images is there: it names z.png, found a.png"),
        ("x/a.png\tcat\ny/a.png\tdog\n", "x/a.png and y/a.png both mean a.png"),
        ("1.png\tcat\n", "labels.tsv:1: 1.png means c/1.png and d/1.png"),
        ("# nothing\n", "no image has a label"),
        ("", "no image has a label"),
        ("[[0, 1], [1000]]", "entry 2 is [1000], expected a list of class numbers"),
        ("[[0, true]]", "entry 1"),
        ("[1, 2]", "entry 1 is 1"),
        ("[[0, 1]", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[[]]", "no image has a label"),
        ("[[3]]", "labels of ImageNet's 1,000 classes, of which m.npz has 0"),
    ],
)
def test_what_is_wrong_with_a_label_file_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    for number, name in enumerate(("a.png", "c/1.png", "d/1.png")):
        save(tmp_path / "images" / name, number)
    file = tmp_path / "labels.tsv"
    file.write_text(text)
    with pytest.raises(DataError) as raised:
        judge(opened_model(f"folder:{tmp_path / 'images'}", torch.zeros(3, 2), classes=["cat", "dog"]), labels=file)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_files_and_folders_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read these labels: No such file"):
        read_label_file(tmp_path / "gone.json")
    with pytest.raises(DataError, match="this is no label file"):
        read_label_file(tmp_path)
    (tmp_path / "labels.tsv").write_text("a\tcat\n")
    for place, said in ((tmp_path / "gone", "there is no such folder"), (tmp_path, "no images in this folder")):
        with pytest.raises(DataError, match=said):
            judge(opened_model(f"folder:{place}", torch.zeros(1, 1), classes=["cat"]), labels=tmp_path / "labels.tsv")


def test_the_longest_path_that_fits_is_meant(tmp_path: Path) -> None:
    (tmp_path / "labels.tsv").write_text("1.png\tx\nb/1.png\ty\n/data/a/b/2\tz\n")
    file = read_label_file(tmp_path / "labels.tsv")
    assert match_images(["1.png", "a/b/1.png", "b/2.jpg", "3.png", "aa.png"], file) == [
        "1.png",
        "b/1.png",
        "/data/a/b/2",
        None,
        None,
    ]


# ---------------------------------------------------------------- names, and the command


def weights(named: bool, outputs: int) -> Pretrained:
    names = [f"c{n}" for n in range(outputs)] if named else [str(n) for n in range(outputs)]
    return Pretrained({}, {}, names, {}, Path("m.npz"), 0, False, {"source": None}, named=named)


def test_outputs_without_names_are_imagenets_where_their_number_is() -> None:
    said: list[str] = []
    assert class_names(weights(False, 1000), say=said.append) == WNIDS
    assert class_names(weights(False, 21843), say=said.append) == list(imagenet_classes(21843))
    assert class_names(weights(False, 10), say=said.append)[9] == "9"
    assert len(said) == 3
    assert class_names(weights(True, 1000), say=pytest.fail)[9] == "c9"


def test_the_command_evaluates_timms_weights_on_labels_from_a_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=64, depth=1, num_heads=1, num_classes=1000
    ).eval()
    nn.init.normal_(model.head.weight)
    torch.save(model.state_dict(), tmp_path / "timm.pth")
    labels: list[list[int]] = []
    for number in range(6):
        pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"ILSVRC2012_val_{number + 1:08d}.png")
        with torch.no_grad():
            guess = int(model(torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1).argmax())
        labels.append([guess, 7] if number % 2 else [(guess + 1) % 1000])
    (tmp_path / "real.json").write_text(json.dumps(labels))
    words = ["--dataset", f"folder:{tmp_path}", "--labels", str(tmp_path / "real.json"), "--json"]
    result = vit("eval", "--ckpt", str(tmp_path / "timm.pth"), *words, "data.image_size=16", "data.eval_crop_fraction=null")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert (found["correct"], found["examples"]) == (3, 6)

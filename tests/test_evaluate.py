"""Evaluation against scikit-learn, and what must not count as a hit."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from functools import partial
from typing import Any, Literal

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, log_loss, recall_score, top_k_accuracy_score
from torch import Tensor, nn

from vitcli.errors import DataError, Interrupted
from vitcli.evaluate import EvalResult, evaluate, map_classes
from vitcli.forward import answers

CPU = torch.device("cpu")


class Lookup(nn.Module):
    """Logits that are a function of the image's first pixels alone, row by row, so that batching cannot change them."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = table
        self.dropout = nn.Dropout(0.9)

    def forward(self, images: Tensor) -> Tensor:
        numbers = images[:, 0, 0, 0].long() + 256 * images[:, 1, 0, 0].long()
        logits: Tensor = self.dropout(self.table[numbers])
        return logits


def batches_of(labels: Tensor, batch_size: int) -> Iterator[dict[str, Tensor]]:
    numbers = torch.arange(len(labels))
    images = torch.zeros(len(labels), 3, 2, 2, dtype=torch.uint8)
    images[:, 0] = (numbers % 256)[:, None, None].to(torch.uint8)
    images[:, 1] = (numbers // 256)[:, None, None].to(torch.uint8)
    for start in range(0, len(labels), batch_size):
        yield {"images": images[start : start + batch_size], "labels": labels[start : start + batch_size]}


def problem(examples: int, classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    table = 3 * torch.randn(examples, classes, generator=generator)
    labels = torch.randint(classes, (examples,), generator=generator)
    table[torch.arange(examples), labels] += 2.0
    return table, labels


def judge(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    num_classes: int,
    class_map: Tensor | None = None,
    loss: Literal["softmax", "sigmoid"] = "softmax",
    **how: Any,
) -> EvalResult:
    with closing(answers(model, batches, **{"preprocess": Tensor.float, "device": CPU, **how})) as answered:
        return evaluate(answered, num_classes=num_classes, device=CPU, loss=loss, class_map=class_map)


def run(table: Tensor, labels: Tensor, *, batch_size: int = 64, **options: Any) -> EvalResult:
    return judge(Lookup(table), batches_of(labels, batch_size), **{"num_classes": table.shape[1], **options})


@pytest.mark.parametrize("classes", [2, 3, 5, 7, 40])
def test_agrees_with_scikit_learn(classes: int) -> None:
    table, labels = problem(523, classes)
    result = run(table, labels, batch_size=50)
    scores, truth, every = table.double().numpy(), labels.numpy(), np.arange(classes)
    guesses = scores.argmax(1)
    probabilities = torch.softmax(table.double(), 1).numpy()
    assert result.top1 == accuracy_score(truth, guesses)
    if classes > 5:
        assert result.top5 == top_k_accuracy_score(truth, scores, k=5, labels=every)
    else:
        assert result.top5 == 1.0
    assert result.loss == pytest.approx(log_loss(truth, probabilities, labels=every), rel=1e-12)
    assert result.per_class == pytest.approx(list(recall_score(truth, guesses, labels=every, average=None)), rel=1e-15)
    assert result.per_class_examples == np.bincount(truth, minlength=classes).tolist()
    assert (result.examples, result.correct) == (523, sum(result.per_class_correct))


def test_sigmoid_loss_sums_over_classes() -> None:
    table, labels = problem(100, 6)
    targets = np.eye(6)[labels.numpy()]
    p = 1 / (1 + np.exp(-table.double().numpy()))
    expected = -(targets * np.log(p) + (1 - targets) * np.log1p(-p)).sum(1).mean()
    assert run(table, labels, loss="sigmoid").loss == pytest.approx(expected, rel=1e-12)


def test_batch_size_does_not_matter() -> None:
    table, labels = problem(600, 9)
    one, *others = [run(table, labels, batch_size=size) for size in (1, 7, 64, 599, 600, 10_000)]
    for other in others:
        assert other.per_class_correct == one.per_class_correct
        assert other.per_class_examples == one.per_class_examples
        assert (other.correct, other.correct_top5, other.examples) == (one.correct, one.correct_top5, 600)
        assert (other.top1, other.top5) == (one.top1, one.top5)
        assert other.loss == pytest.approx(one.loss, rel=1e-14)


def test_a_lost_example_would_show() -> None:
    table, labels = problem(65, 9)
    whole = run(table, labels)
    short = judge(Lookup(table), list(batches_of(labels, 64))[:1], num_classes=9)
    assert (whole.examples, short.examples) == (65, 64)
    assert short.loss != whole.loss


def test_ties_and_nan_are_not_hits() -> None:
    labels = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 8, 9] * 3)
    zeros = torch.zeros(30, 10)  # a fresh head
    assert run(zeros, labels).top1 == 0.1
    assert run(zeros, labels).top5 == 0.5
    nan = run(torch.full((30, 10), math.nan), labels)
    assert (nan.top1, nan.top5) == (0.0, 0.0)
    one_nan = torch.zeros(30, 10)
    one_nan[:, 3] = math.nan
    assert run(one_nan, labels).top1 == 0.0
    assert math.isnan(nan.loss)
    assert json.loads(json.dumps(nan.as_dict(), allow_nan=False))["loss"] is None


def test_classes_without_examples_have_no_accuracy() -> None:
    table, _ = problem(4, 6)
    result = run(table, torch.tensor([0, 0, 5, 5]))
    assert [accuracy is None for accuracy in result.per_class] == [False, True, True, True, True, False]
    as_dict = json.loads(json.dumps(result.as_dict(list("abcdef")), allow_nan=False))
    assert as_dict["examples"] == 4
    assert as_dict["per_class"][1] == {"class": "b", "accuracy": None, "correct": 0, "examples": 0}
    assert as_dict["per_class"][5]["examples"] == 2
    with pytest.raises(ValueError, match="class names"):
        result.as_dict(["a"])


def test_modes_are_as_before() -> None:
    table, labels = problem(10, 3)
    lookup, frozen = Lookup(table), nn.Identity()
    model = nn.Sequential(lookup, frozen)
    model.train()
    frozen.eval()
    judge(model, batches_of(labels, 4), num_classes=3)
    assert [model.training, lookup.training, lookup.dropout.training, frozen.training] == [True, True, True, False]


def test_interruption_reaches_the_caller() -> None:
    table, labels = problem(100, 3)
    model = Lookup(table).train()
    seen = []

    def should_stop() -> None:
        seen.append(1)
        if len(seen) == 3:
            raise Interrupted(2)

    with pytest.raises(Interrupted):
        judge(model, batches_of(labels, 10), num_classes=3, should_stop=should_stop)
    assert len(seen) == 3
    assert model.training


def test_preprocess_sees_uint8_and_bf16_runs_under_autocast() -> None:
    def normalise(images: Tensor, *, mean: float, std: float) -> Tensor:
        assert images.dtype == torch.uint8
        return (images.float() / 255 - mean) / std

    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(12, 3)

        def forward(self, images: Tensor) -> Tensor:
            logits: Tensor = self.layer(images.flatten(1))
            seen.append(logits.dtype)
            return logits

    seen: list[torch.dtype] = []
    _, labels = problem(20, 3)
    for dtype in (torch.float32, torch.bfloat16):
        judge(Linear(), batches_of(labels, 20), num_classes=3, preprocess=partial(normalise, mean=0.5, std=0.5), dtype=dtype)
    assert seen == [torch.float32, torch.bfloat16]


def test_no_examples_and_strange_labels() -> None:
    table, labels = problem(10, 3)
    with pytest.raises(DataError, match="no examples"):
        run(table, labels[:0])
    for wrong in (3, -1):
        with pytest.raises(DataError, match=f"found labels .*{wrong}.*expected 0 to 2"):
            run(table, torch.tensor([0, wrong]))
    with pytest.raises(DataError, match="expected 0 to 1"):
        run(table, torch.tensor([0, 2]), class_map=torch.tensor([2, 0]))


# ---------------------------------------------------------------- classes


def test_equal_lists_need_no_map() -> None:
    assert map_classes(["a", "b"], ("a", "b"), "digits") is None
    assert map_classes(["crane", "crane"], ["crane", "crane"], "imagenet") is None  # ImageNet has such pairs


def test_order_and_subsets() -> None:
    mapping = map_classes(["a", "b", "c", "d"], ["d", "b"], "folder")
    assert mapping is not None
    assert mapping.tolist() == [3, 1]
    table, _ = problem(50, 4)
    dataset_labels = torch.arange(50) % 2
    mapped = run(table, dataset_labels, class_map=mapping)
    direct = run(table, mapping[dataset_labels])
    assert mapped.per_class_correct == direct.per_class_correct
    assert mapped.loss == direct.loss
    assert mapped.per_class_examples == [0, 25, 0, 25]
    prefix = map_classes(["a", "b", "c"], ["a", "b"], "folder")
    assert prefix is not None
    assert prefix.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("checkpoint", "dataset", "says"),
    [
        (["a", "b", "c"], ["a", "x"], "folder:P: the checkpoint has no class 'x'"),
        (["a", "b"], ["0", "1"], "also has 2 classes, but other ones: no '0', '1'"),
        (["a", "b", "c"], ["0", "1"], "3 other classes, none of this data set's 2"),
        (["a"], list("abcdefghi"), "and 3 more"),
        (["a", "a", "b"], ["b", "a"], "'a' stands twice among the checkpoint's classes"),
        (["a", "b"], ["b", "b"], "'b' stands twice among folder:P's classes"),
    ],
)
def test_classes_that_do_not_fit(checkpoint: list[str], dataset: list[str], says: str) -> None:
    with pytest.raises(DataError) as caught:
        map_classes(checkpoint, dataset, "folder:P")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [1, 7, 64])
def test_parts_side_by_side_give_the_same_numbers(size: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 7))
    images = torch.randint(0, 256, (40, 3, 4, 4), dtype=torch.uint8)
    batches = [{"images": x, "labels": torch.arange(len(x)) % 7} for x in images.split(size)]

    def run(lanes: int) -> EvalResult:
        return judge(model, batches, num_classes=7, preprocess=lambda x: x / 255.0, lanes=lanes)

    alone, together = run(1), run(3)
    assert together.per_class_correct == alone.per_class_correct
    assert together.loss == pytest.approx(alone.loss, rel=1e-6)
    assert all(parameter.grad is None for parameter in model.parameters())

"""Learning from a teacher: the losses as published, what the teacher is shown, and runs that are stopped, moved and refused."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.harness import vit
from tests.oracles import our_model, our_weights
from vitcli.checkpoint import load_checkpoint, save_weights_file
from vitcli.config import Config, DistillationConfig
from vitcli.config_file import read_config
from vitcli.data.transforms import normalise
from vitcli.distillation_config import resolve_distillation
from vitcli.errors import CheckpointError, ConfigError, Interrupted, RunExistsError
from vitcli.losses import classification_loss, distillation_loss
from vitcli.models import VisionTransformer
from vitcli.opened import open_model
from vitcli.pretrained import Pretrained
from vitcli.teacher import Answers, Teacher, open_teacher
from vitcli.train import finetune, pretrain

DIGITS = [str(number) for number in range(10)]
TEACHER = "model: {kind: resnet, resnet_units: [1], resnet_width: 8, resnet_root: small, group_norm_groups: 4}"
STUDENT = "model: {patch_size: 4, width: 32, depth: 2, num_heads: 2, distill_token: true}"
REST = """
data: {source: digits, image_size: 16}
augment: {crop: pad, flip: false, mixup: 0.4}
optim: {lr: 1e-3}
train: {steps: 6, batch_size: 12, micro_batch_size: 6, precision: float32}
log: {log_every_steps: 1, eval_every_steps: 3, checkpoint_every_steps: 2, keep_checkpoints: 3, sample_images: 0}
"""


def quiet(text: str) -> None:
    """Say nothing."""


def train(folder: Path, model: str, *words: str, say: Any = quiet) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "a.yaml"
    path.write_text(model + REST)
    pretrain(path, [f"out={folder / 'run'}", *words], dry_run=False, say=say)
    return folder / "run"


def weights(run: Path) -> dict[str, bytes]:
    state = load_checkpoint(run / "checkpoints" / "step_00000006").model_state
    return {name: tensor.numpy().tobytes() for name, tensor in state.items()}


def losses(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("teacher"), TEACHER)


@pytest.fixture(scope="module")
def whole(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("student"), STUDENT, f"distillation.teacher={teacher}")


# ---------------------------------------------------------------- losses


def random_logits(*shape: int, seed: int) -> Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def deit(heads: tuple[Tensor, Tensor], targets: Tensor, theirs: Tensor, *, kind: str, alpha: float, tau: float) -> Tensor:
    """Compute the loss as facebookresearch/deit's losses.py does, but for its division of the soft term by K."""
    outputs, outputs_kd = heads
    base = torch.sum(-targets * F.log_softmax(outputs, dim=-1), dim=-1).mean()
    if kind == "hard":
        return base * (1 - alpha) + F.cross_entropy(outputs_kd, theirs.argmax(dim=1)) * alpha
    divergence = F.kl_div(
        F.log_softmax(outputs_kd / tau, dim=1), F.log_softmax(theirs / tau, dim=1), reduction="sum", log_target=True
    )
    return base * (1 - alpha) + divergence * (tau * tau) / len(outputs) * alpha


@pytest.mark.parametrize(("kind", "alpha", "tau"), [("hard", 0.5, 1.0), ("soft", 0.1, 3.0)])
@pytest.mark.parametrize("token", [True, False])
def test_the_loss_is_deits(kind: Any, alpha: float, tau: float, token: bool) -> None:
    section = resolve_distillation(DistillationConfig(teacher=Path("x"), kind=kind))
    logits, answers = random_logits(5, 2, 7, seed=0), random_logits(5, 7, seed=1)
    logits = logits if token else logits[:, 0]
    targets = random_logits(5, 7, seed=2).softmax(1)
    heads = (logits[:, 0], logits[:, 1]) if token else (logits, logits)
    expected = deit(heads, targets, answers, kind=kind, alpha=alpha, tau=tau)
    torch.testing.assert_close(distillation_loss(logits, targets, answers, section=section, kind="softmax"), expected)
    if token:  # each head has its own to learn
        swapped = distillation_loss(logits.flip(1), targets, answers, section=section, kind="softmax")
        assert abs(float(swapped - expected)) > 0.01


def test_class_weights_and_sigmoid_losses_go_through_both_terms() -> None:
    section = resolve_distillation(DistillationConfig(teacher=Path("x"), alpha=0.3))
    logits, answers = random_logits(4, 2, 3, seed=3), random_logits(4, 3, seed=4)
    targets, counts = F.one_hot(torch.tensor([0, 1, 2, 0]), 3).float(), torch.tensor([0.5, 1.0, 2.0])
    chosen = F.one_hot(answers.argmax(1), 3).float()
    expected = 0.0
    for row, weight in enumerate((0.5, 1.0, 2.0, 0.5)):
        own, taught = (
            F.binary_cross_entropy_with_logits(logits[row, head], goal[row], reduction="sum")
            for head, goal in ((0, targets), (1, chosen))
        )
        expected += weight * float(0.7 * own + 0.3 * taught) / 4
    found = distillation_loss(logits, targets, answers, section=section, kind="sigmoid", class_weights=counts)
    assert float(found) == pytest.approx(expected, rel=1e-5)
    # all of it from labels is the loss without a teacher
    alone = section.model_copy(update={"alpha": 0.0})
    found = distillation_loss(logits, targets, answers, section=alone, kind="softmax", class_weights=counts)
    torch.testing.assert_close(found, classification_loss(logits[:, 0], targets, kind="softmax", class_weights=counts))


# ---------------------------------------------------------------- what the teacher is shown


def config_of(**data: Any) -> Config:
    settings = {"source": "digits", "image_size": 32, **data}
    return Config.model_validate({"data": settings, "train": {"steps": 1, "precision": "float32"}})


def test_a_teacher_sees_the_same_pictures_as_it_is_used_to() -> None:
    """Its own mean, deviation and size, its own order of classes; and nobody's random numbers are touched."""
    weights = our_weights((16, 16), patch_size=8, width=32, depth=1, num_heads=2)
    pictures = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    order = torch.tensor([3, 0, 6, 1, 2, 5, 4])
    torch.manual_seed(7)
    before = torch.get_rng_state()
    config = config_of(mean=(0.3, 0.5, 0.4), std=(0.5, 0.2, 0.3))
    answers = Answers(Teacher(weights, order, "", 0), config, device=torch.device("cpu"))
    found = answers(normalise(pictures, mean=config.data.mean, std=config.data.std))
    assert torch.equal(torch.get_rng_state(), before)
    own = normalise(pictures, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
    small = F.interpolate(own, size=(16, 16), mode="bilinear", antialias=True)
    model = our_model(weights)
    with torch.no_grad():
        torch.testing.assert_close(found, model(small)[:, order], atol=1e-5, rtol=1e-5)
        assert (found - model(small)).abs().max() > 0.1
    assert not found.requires_grad and not answers.model.training
    assert not any(parameter.requires_grad for parameter in answers.model.parameters())


def test_the_teacher_is_given_what_the_student_is_given(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After augmentation and mixup, portion by portion."""
    taught: list[Tensor] = []
    learned: list[Tensor] = []
    ask, learn = Answers.__call__, VisionTransformer.forward

    def asked(self: Answers, images: Tensor) -> Tensor:
        taught.append(images.clone())
        return ask(self, images)

    def learning(self: VisionTransformer, images: Tensor, *given: Any, **how: Any) -> Tensor:
        if how.get("apart"):
            learned.append(images.clone())
        return learn(self, images, *given, **how)

    monkeypatch.setattr(Answers, "__call__", asked)
    monkeypatch.setattr(VisionTransformer, "forward", learning)
    train(tmp_path, STUDENT, f"distillation.teacher={teacher}", "train.steps=2")
    assert len(taught) == len(learned) == 4
    assert all(torch.equal(one, other) for one, other in zip(taught, learned))


# ---------------------------------------------------------------- runs


def test_a_run_keeps_who_taught_it_and_no_weights_of_the_teacher(whole: Path, teacher: Path) -> None:
    kept = json.loads((whole / "manifest.json").read_text())["teacher"]
    assert kept["path"].startswith(str(teacher)) and len(kept["sha256"]) == 64 and kept["step"] == 6
    with torch.device("meta"):
        sizes: dict[str, Any] = {"patch_size": 4, "width": 32, "depth": 2, "mlp_dim": 128, "num_heads": 2}
        alone = VisionTransformer(image_size=(16, 16), num_classes=10, distill_token=True, **sizes)
    saved = load_checkpoint(whole / "checkpoints" / "step_00000006").model_state
    assert saved.keys() == alone.state_dict().keys()
    assert saved["head_dist.weight"].abs().max() > 0 and not torch.equal(saved["head_dist.weight"], saved["head.weight"])


def test_a_stopped_run_goes_on_bit_for_bit_with_its_teacher_elsewhere(
    whole: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vitcli import fit, step

    original, steps = step.train_step, 0

    def interrupted(*given: Any, **how: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 4:
            raise Interrupted(2)
        return original(*given, **how)

    monkeypatch.setattr(fit, "train_step", interrupted)
    with pytest.raises(Interrupted):
        train(tmp_path, STUDENT, f"distillation.teacher={teacher}")
    monkeypatch.setattr(fit, "train_step", original)
    other = train(tmp_path / "other", TEACHER, "train.steps=1", "seed=1")
    with pytest.raises(RunExistsError, match=r"its weights are not those that this run began with \(.*step 6\)"):
        train(tmp_path, STUDENT, f"distillation.teacher={other}")
    with pytest.raises(RunExistsError, match=r"another config: distillation\.teacher"):
        train(tmp_path, STUDENT)
    moved = shutil.copytree(teacher, tmp_path / "moved")
    said: list[str] = []
    run = train(tmp_path, STUDENT, f"distillation.teacher={moved}", say=said.append)
    assert any("resuming" in line for line in said)
    assert weights(run) == weights(whole) and losses(run) == losses(whole)
    # the path is the same, the weights are not
    shutil.rmtree(run / "checkpoints" / "step_00000006")
    (run / "summary.json").unlink()
    shutil.rmtree(moved)
    shutil.copytree(other, moved)
    with pytest.raises(RunExistsError, match="not those that this run began with"):
        train(tmp_path, STUDENT, f"distillation.teacher={moved}")


def test_lanes_learn_the_same(whole: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitcli.fit.count_lanes", lambda *given, **how: 2)
    together = losses(train(tmp_path, STUDENT, f"distillation.teacher={teacher}"))
    assert together == pytest.approx(losses(whole), rel=1e-5)


def test_any_student_learns_from_any_teacher_with_its_only_head(whole: Path, tmp_path: Path) -> None:
    """Here a ResNet from a distilled ViT, softly; without it, it learns something else."""
    soft = ("distillation.kind=soft", "distillation.tau=2", "distillation.alpha=0.9")
    taught = train(tmp_path / "taught", TEACHER, f"distillation.teacher={whole}", *soft)
    alone = train(tmp_path / "alone", TEACHER)
    assert weights(taught).keys() == weights(alone).keys() and weights(taught) != weights(alone)


def test_a_distilled_model_is_used_like_any_other(whole: Path, teacher: Path, tmp_path: Path) -> None:
    opened = open_model(whole, say=quiet)
    images = torch.randn(2, 3, 16, 16, device=opened.device)
    with torch.no_grad():
        assert opened.model.features(images).shape == (2, 64)  # both tokens
        assert isinstance(opened.model, VisionTransformer)
        torch.testing.assert_close(opened.model(images), opened.model(images, apart=True).mean(1))
    result = vit("eval", "--ckpt", str(whole), "--fewshot", "5", cwd=tmp_path)
    assert result.returncode == 0 and "5-shot" in result.stdout, result.stdout + result.stderr
    words = [f"out={tmp_path / 'tuned'}", "train.steps=2", "train.batch_size=8", "log.sample_images=0"]
    words.append(f"distillation.teacher={teacher}")
    finetune(whole, "digits", None, words, from_scratch=False, dry_run=False, say=quiet)
    report = json.loads((tmp_path / "tuned" / "weights_report.json").read_text())
    assert report["new"] == ["head.weight", "head.bias", "head_dist.weight", "head_dist.bias"]


def test_a_dry_run_counts_the_teacher(teacher: Path, tmp_path: Path) -> None:
    config = tmp_path / "a.yaml"
    config.write_text(STUDENT + REST)
    said = [
        vit("pretrain", "--config", str(config), "--out", str(tmp_path / "run"), "--dry-run", *words).stdout
        for words in ([], [f"distillation.teacher={teacher}"])
    ]
    assert "teacher" not in said[0] and "a distillation token, 10 classes" in said[1]
    assert "a token of its own learns the class it chooses, 0.5 of the loss" in said[1]
    totals = [float(text.split(" in all")[0].rsplit(", ", 1)[1]) for text in said]
    assert totals[1] > 1.05 * totals[0]


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["distillation.kind=soft"], r"distillation\.kind says how to learn from a teacher"),
        (["distillation.teacher=x", "distillation.tau=2"], r"distillation\.tau is for distillation\.kind: soft"),
        (["distillation.teacher=x", "distillation.kind=soft", "train.loss=sigmoid"], "compares softmaxes"),
        (["distillation.teacher=x", "objective.name=mae", "model.distill_token=false"], "objective.name mae learns none"),
        (["objective.name=mae"], r"model\.distill_token learns from a teacher's classes"),
        (["model.pool=gap"], r"model\.distill_token stands beside a class token, and there is none with model\.pool gap"),
        (["model.representation_size=8"], r"drop model\.representation_size"),
        (["distillation.teacher=x", "distillation.alpha=0"], r"distillation\.alpha is 0"),
    ],
)
def test_settings_that_contradict_one_another(words: list[str], said: str, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(STUDENT + REST.replace("mixup: 0.4", "min_area: 0.5"))
    with pytest.raises(ConfigError, match=said):
        read_config(path, words)


def save(weights: Pretrained, path: Path) -> Path:
    save_weights_file(path, weights)
    return path


def test_a_teacher_of_other_classes_is_refused_in_a_line(tmp_path: Path) -> None:
    made = our_weights((16, 16), num_classes=10, patch_size=8, width=32, depth=1, num_heads=2)

    def opened(weights: Pretrained, **how: Any) -> Teacher | None:
        path = save(weights, tmp_path / "teacher.safetensors")
        config = config_of().model_copy(update={"distillation": DistillationConfig(teacher=path, **how)})
        return open_teacher(config, DIGITS)

    with pytest.raises(CheckpointError, match=r"they differ: it lacks 0, 1, .* and has class 0, class 1, .* besides"):
        opened(made)
    nine = our_weights((16, 16), num_classes=9, patch_size=8, width=32, depth=1, num_heads=2)
    with pytest.raises(CheckpointError, match="has 9 classes, digits 10, and they differ: it lacks 9;"):
        opened(replace(nine, classes=DIGITS[:9]))
    headless = {name: tensor for name, tensor in made.state.items() if not name.startswith("head.")}
    with pytest.raises(CheckpointError, match="has no classifier"):
        opened(replace(made, state=headless, classes=[]))
    with pytest.raises(CheckpointError, match="trained with train.loss sigmoid"):
        opened(replace(made, classes=DIGITS, manifest={**made.manifest, "train": {"loss": "sigmoid"}}), kind="soft")
    turned = opened(replace(made, classes=DIGITS[::-1]))
    assert turned is not None and turned.order is not None and turned.order.tolist() == list(range(9, -1, -1))
    unnamed = opened(replace(made, named=False))
    assert unnamed is not None and unnamed.order is None
    assert unnamed.weight_bytes() == 4 * sum(tensor.numel() for tensor in made.state.values())


# ---------------------------------------------------------------- several processes, and a look before


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_learn_what_one_does(whole: Path, teacher: Path, tmp_path: Path, parallel: str) -> None:
    """Mixup is drawn for a micro-batch, so both have micro-batches of 6 images."""
    config, out = tmp_path / "a.yaml", tmp_path / "run"
    config.write_text(STUDENT + REST)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "vitcli"]
    words = [f"distillation.teacher={teacher}", "augment.mixup=0", f"train.parallel={parallel}", "train.micro_batch_size=3"]
    command = [*torchrun, "pretrain", "--config", str(config), "--out", str(out), *words]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    alone = train(tmp_path / "alone", STUDENT, f"distillation.teacher={teacher}", "augment.mixup=0")
    assert losses(out) == pytest.approx(losses(alone), rel=1e-4)
    assert losses(out) != pytest.approx(losses(whole), rel=1e-4)  # with mixup


@pytest.mark.slow
def test_the_doctor_tries_the_run_with_its_teacher(teacher: Path, tmp_path: Path) -> None:
    config = tmp_path / "a.yaml"
    config.write_text(STUDENT + REST)
    words = ["doctor", "--config", str(config), "--out", str(tmp_path / "run"), f"distillation.teacher={teacher}"]
    result = vit(*words, cwd=tmp_path)
    assert "a ResNet of units 1, root width 8" in result.stdout, result.stdout + result.stderr

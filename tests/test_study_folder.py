"""What may change between two calls of one study: what comes in addition, and what changes no result."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.test_study_file import STUDY
from vitcli.errors import DataError, RunExistsError
from vitcli.study.config import StudyConfig
from vitcli.study.file import dump_study, read_study
from vitcli.study.folder import problem_of_growth, refuse_other_study
from vitcli.study.plan import Study, begin_cell, begin_study, plan_study
from vitcli.train import pretrain


def read(folder: Path, *words: str, text: str = STUDY) -> StudyConfig:
    path = folder / "stated.yaml"
    path.write_text(text, encoding="utf-8")
    return read_study(path, words)[0]


GROWTH = [
    (["seeds=[0,1,2]"], None),
    (["seeds=[1,0]"], r"seeds \(the first is 0 there and 1 now"),
    (["seeds=[0]"], r"seeds \(\[0, 1\] there, \[0\] now, which may only grow\)"),
    (["sizes=[10,20,40,80]"], None),
    (["sizes=[20,80]", "variants.rough.sizes=all"], r"sizes \(\[20, 40\] there"),
    (["translate_px=[1,2,4]"], None),
    (["translate_px=[]"], "translate_px"),
    (["title=Another", "compare=[narrow,wide]"], None),
    (["base.data.workers=0", "families.wide.log.keep_checkpoints=3"], None),
    (["base.optim.lr=2e-3"], r"base\.optim\.lr \(0\.001 there, 0\.002 now\)"),
    (["base.data.source=folder:a/photos"], r"base\.data\.source"),
    (["base.augment.pad=2"], r"base\.augment\.pad \(null there, 2 now\)"),
    (["families.wide.model.width=48"], r"families\.wide\.model\.width"),
    (["families.tall={model: {depth: 2}}"], None),
    (["length.epochs=3"], r"length\.epochs"),
    (["search.share=0.5"], r"search\.share"),
    (["search.families.narrow.optim.weight_decay=[0.0,0.1,0.2,0.3]"], r"search\.families\.narrow"),
    (["variants.rough.sizes=all"], None),
    (["variants.rough.seeds=[0]"], r"variants\.rough\.seeds \(without 1 now"),
    (["variants.rough.settings.augment.flip=true"], r"variants\.rough\.settings\.augment\.flip"),
    (["variants.soft={settings: {model: {dropout: 0.1}}, sizes: [20]}"], None),
    (["transfer=[{dataset: digits, shots: [1, 5], finetune: {train.steps: 5}}, {dataset: pets, finetune: {}}]"], None),
    (["transfer=[{dataset: digits, shots: [1, 5], finetune: {train.steps: 5}, families: {wide: {optim.lr: 1}}}]"], "transfer"),
    (
        [
            "transfer=[{dataset: digits, shots: [1, 5], finetune: {train.steps: 5}, families: {tall: {optim.lr: 1}}}]",
            "families.tall={model: {depth: 2}}",
        ],
        None,
    ),
    (["transfer=[{dataset: digits, shots: [1, 5]}]"], r"transfer \(other settings for digits"),
    (["transfer=[]"], r"transfer \(other settings for digits"),
    (
        ["transfer=[{dataset: digits, shots: [1, 5], finetune: {train.steps: 5}}, {dataset: pets, shots: [1, 5]}]"],
        r"transfer \(few-shot probes on pets",
    ),
]


@pytest.mark.parametrize(("words", "problem"), GROWTH, ids=lambda value: value[0] if isinstance(value, list) else None)
def test_a_study_may_only_grow(tmp_path: Path, words: list[str], problem: str | None) -> None:
    said = problem_of_growth(read(tmp_path), read(tmp_path, *words))
    if problem is None:
        assert said is None
    else:
        with pytest.raises(AssertionError, match=problem):
            raise AssertionError(said)


def test_names_that_are_gone_are_missed(tmp_path: Path) -> None:
    before = read(tmp_path)
    without = STUDY.replace("  rough:\n    settings: {augment: {flip: false}}\n    sizes: [40]\n", "").replace(
        "variants:\n", ""
    )
    assert "rough is there" in (problem_of_growth(before, read(tmp_path, text=without)) or "")
    narrow = STUDY.replace("  wide:\n    model: {width: 32}\n", "")
    assert "wide is there" in (problem_of_growth(before, read(tmp_path, "search=null", text=narrow)) or "")


def test_sizes_of_a_one_pass_run_stay(tmp_path: Path) -> None:
    text = STUDY.replace("grid", "one_pass").replace("length:\n  epochs: 2\n", "")
    before = read(tmp_path, text=text)
    assert problem_of_growth(before, read(tmp_path, "seeds=[0,1,2]", text=text)) is None
    assert "sizes" in (problem_of_growth(before, read(tmp_path, "sizes=[20,30,40]", text=text)) or "")


def test_a_study_that_has_begun_is_kept(tmp_path: Path) -> None:
    config, other = read(tmp_path), read(tmp_path, "base.optim.lr=2e-3")
    out = tmp_path / "out"
    refuse_other_study(out, config)
    out.mkdir()
    (out / "study.yaml").write_text(dump_study(config), encoding="utf-8")
    refuse_other_study(out, other)  # nothing to lose yet
    run = out / "cells" / "plain" / "wide" / "n000000020" / "s0" / "run"
    (run / "checkpoints" / "step_00000004").mkdir(parents=True)
    refuse_other_study(out, config)
    refuse_other_study(out, read(tmp_path, "seeds=[0,1,2]"))
    with pytest.raises(RunExistsError, match=r"this study has other settings: base\.optim\.lr \(0\.001 there, 0\.002 now\)"):
        refuse_other_study(out, other)
    (out / "study.yaml").write_text("title: [", encoding="utf-8")
    with pytest.raises(RunExistsError, match=r"whose settings cannot be read .*study\.yaml"):
        refuse_other_study(out, config)


def test_what_is_no_study_is_left_alone(tmp_path: Path) -> None:
    config = read(tmp_path)
    file, run, strange = tmp_path / "file", tmp_path / "run", tmp_path / "strange"
    file.touch()
    (run / "checkpoints").mkdir(parents=True)
    strange.mkdir()
    refuse_other_study(strange, config)
    (strange / "logs").mkdir()
    (strange / ".lock").touch()
    refuse_other_study(strange, config)
    (strange / "thesis.tex").touch()
    for place, said in ((file, "this is a file"), (run, "this is a run"), (strange, r"no study \(thesis\.tex")):
        with pytest.raises(RunExistsError, match=said):
            refuse_other_study(place, config)


MOVED = """
title: data that moves
form: grid
base:
  data: {source: "folder:a/photos", image_size: 8, workers: 0}
  model: {patch_size: 4, depth: 1, num_heads: 2}
  train: {batch_size: 4, precision: float32, tune: false, device: cpu}
  log: {sample_images: 0, checkpoint_every_steps: 1}
families: {narrow: {model: {width: 8}}, wide: {model: {width: 16}}}
sizes: [8]
seeds: [0]
length: {steps: 2}
"""


def test_moved_data_is_known_by_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name in ("ant", "bee"):
        for number in range(6):
            path = tmp_path / "a" / "photos" / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(path)
    Path("moved.yaml").write_text(MOVED)
    there = ["base.data.source=folder:b/photos"]

    def plan(*words: str) -> Study:
        return plan_study(Path("moved.yaml"), words, out=Path("out"), say=lambda text: None)

    def run(study: Study) -> list[str]:
        cell, said = study.finals({})[0], list[str]()
        begin_cell(study, cell)
        pretrain(cell.folder / "settings.yaml", [f"out={cell.folder / 'run'}"], dry_run=False, say=said.append)
        return said

    began = plan()
    begin_study(began)
    run(began)
    unfinished = began.finals({})[0].folder / "run"
    (unfinished / "summary.json").unlink()
    Path("a").rename("b")
    with pytest.raises(DataError, match="no such folder"):
        plan()
    moved = plan(*there)
    begin_study(moved)
    assert any("resuming" in line for line in run(moved))
    with pytest.raises(RunExistsError, match=r"base\.data\.source \(\"folder:photos\" there, \"folder:others\" now\)"):
        plan("base.data.source=folder:b/others")
    # other pictures of that name, for the study and for a run that it has begun
    (unfinished / "summary.json").unlink()
    Path("b/photos/ant/0.png").write_bytes(Path("b/photos/bee/0.png").read_bytes() + b"more")
    with pytest.raises(RunExistsError, match=r"images of folder:b/photos are not those of folder:a/photos"):
        plan(*there)
    with pytest.raises(RunExistsError, match=r"images of folder:b/photos are not those the run began with"):
        run(moved)

"""The whole pipeline in one go: pretrain on the embedded corpus, transfer to real digits, compare with scratch.

    python scripts/demo.py            (what `make demo` runs; about 10 minutes on 2 CPU cores)

Every step is a `vit` command, printed before it runs. A second call resumes what is unfinished and repeats nothing.
"""

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

LABELS = {"pretrained": "pretrained on the corpus", "scratch": "from scratch"}


def vit(*words: str, capture: bool = False) -> str:
    """Run one `vit` command with this interpreter and return what it prints on standard output, if captured."""
    print(f"\n$ vit {shlex.join(words)}", flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "vitcli", *words], check=False, text=True, stdout=subprocess.PIPE if capture else None
    )
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout or ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where run directories go")
    parser.add_argument("pretrain_settings", nargs="*", help="key=value for the pretraining run, such as train.examples=2000")
    arguments = parser.parse_args()
    pretrained = arguments.runs / "jft-like"
    runs = {"pretrained": arguments.runs / "jft-like-digits", "scratch": arguments.runs / "jft-like-digits-scratch"}

    vit("pretrain", "--config", "configs/jft-like.yaml", "--out", str(pretrained), *arguments.pretrain_settings)
    common = ("finetune", "--ckpt", str(pretrained), "--dataset", "digits", "--config", "configs/digits-finetune.yaml")
    vit(*common, "--out", str(runs["pretrained"]))
    vit(*common, "--from-scratch", "--out", str(runs["scratch"]))

    rows = []
    for kind, path in runs.items():
        result = json.loads(vit("eval", "--ckpt", str(path), "--json", capture=True))
        seconds = json.loads((path / "summary.json").read_text())["train_seconds"]
        rows.append((LABELS[kind], result["top1"], result["loss"], result["examples"], seconds))
    before = json.loads((pretrained / "summary.json").read_text())
    print(f"\nHandwritten digits, the same model and recipe, {rows[0][3]} test images:\n")
    print(f"  {'start':<26}{'top-1':>9}{'loss':>9}{'fine-tuning':>14}{'pretraining':>14}")
    for label, top1, loss, _, seconds in rows:
        pretraining = f"{before['train_seconds']:.0f} s" if label == LABELS["pretrained"] else "-"
        print(f"  {label:<26}{100 * top1:>7.1f} %{loss:>9.3f}{seconds:>12.0f} s{pretraining:>14}")
    print(f"\ncheckpoints  {arguments.runs}/*/checkpoints\ncurves       tensorboard --logdir {arguments.runs}")


if __name__ == "__main__":
    main()

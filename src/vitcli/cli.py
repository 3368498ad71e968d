"""The command line: each command turns its words into one call; heavy imports wait inside the commands."""

import json
import os
import sys
import traceback
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from vitcli.cli_data import data_app
from vitcli.cli_doctor import doctor
from vitcli.cli_eval import evaluate
from vitcli.cli_inspect import inspect
from vitcli.cli_models import models
from vitcli.cli_options import Ckpt, DataRoot, Debug, Overrides, as_overrides, say
from vitcli.cli_predict import predict
from vitcli.cli_report import compare, report
from vitcli.cli_study import study
from vitcli.cli_sweep import sweep
from vitcli.errors import Interrupted, UserError
from vitcli.interrupts import StopSignals

__all__ = ["app", "main"]

app = typer.Typer(
    name="vit",
    help="Pretrain, fine-tune and evaluate Vision Transformers.",
    epilog="Begin with: vit pretrain --config configs/jft-like.yaml",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(data_app, name="data")

Out = Annotated[
    Path | None, typer.Option("--out", help="run directory; default runs/ and a name made of the inputs", show_default=False)
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="print the resolved plan and stop")]


def show_version(wanted: bool) -> None:
    if wanted:
        from vitcli import __version__

        typer.echo(f"vit {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="print the version and stop")
    ] = False,
) -> None:
    """Pretrain, fine-tune and evaluate Vision Transformers."""


@app.command(epilog="Example: vit pretrain --config configs/jft-like.yaml optim.lr=5e-4 --dry-run")
def pretrain(
    config: Annotated[Path, typer.Option("--config", help="YAML config; `vit schema` lists the settings", show_default=False)],
    overrides: Overrides = None,
    out: Out = None,
    data_root: DataRoot = None,
    dry_run: DryRun = False,
    debug: Debug = False,
) -> None:
    """Train a model from scratch, or go on with a run that was interrupted.

    The same command on an unfinished run resumes it; on a finished one it changes nothing.
    """
    from vitcli.train import pretrain as run

    run(config, as_overrides(overrides, out=out, data__root=data_root), dry_run=dry_run, say=say)


@app.command(epilog="Example: vit finetune --ckpt runs/jft-like --dataset cifar10 train.steps=2000")
def finetune(
    ckpt: Ckpt,
    dataset: Annotated[
        str, typer.Option("--dataset", help="data set by name, or kind:PLACE such as folder:PATH", show_default=False)
    ],
    overrides: Overrides = None,
    config: Annotated[
        Path | None, typer.Option("--config", help="YAML config; default a recipe for the data set", show_default=False)
    ] = None,
    from_scratch: Annotated[
        bool, typer.Option("--from-scratch", help="same model and recipe, but random weights, to compare")
    ] = False,
    out: Out = None,
    data_root: DataRoot = None,
    dry_run: DryRun = False,
    debug: Debug = False,
) -> None:
    """Fine-tune a checkpoint on a data set, with a new head.

    With no config: the paper's Table 4 recipe for its data sets, for others one made for the data's size and this machine.
    """
    from vitcli.train import finetune as run

    words = as_overrides(overrides, out=out, data__root=data_root)
    run(ckpt, dataset, config, words, from_scratch=from_scratch, dry_run=dry_run, say=say)


class WhichLayout(StrEnum):
    """The words for --to."""

    vit = "vit"
    npz = "npz"
    timm = "timm"
    hf = "hf"
    torchvision = "torchvision"
    onnx = "onnx"
    torch_export = "torch-export"


@app.command(epilog="Example: vit convert runs/jft-like exports/vit.onnx")
def convert(
    path_in: Annotated[
        Path, typer.Argument(help="whatever --ckpt takes: a run, or weights of any layout", show_default=False, metavar="IN")
    ],
    path_out: Annotated[
        Path,
        typer.Argument(
            help="NAME.npz, .onnx, .pt2, .safetensors, .pth or a folder; not there yet", show_default=False, metavar="OUT"
        ),
    ],
    to: Annotated[WhichLayout | None, typer.Option("--to", help="layout; default what OUT ends in", show_default=False)] = None,
    image_size: Annotated[
        str | None,
        typer.Option("--image-size", help="resize position embeddings for 384 or HEIGHTxWIDTH px", show_default=False),
    ] = None,
    tolerance: Annotated[float, typer.Option("--tolerance", help="largest difference of logits")] = 1e-4,
    debug: Debug = False,
) -> None:
    """Convert weights from any layout into another, or into ONNX or torch.export.

    What was written is read back and compared on random images; beyond the tolerance nothing is kept.
    """
    from vitcli.weights.convert import convert as run
    from vitcli.weights.convert import parse_size

    size = None if image_size is None else parse_size(image_size)
    run(path_in, path_out, to=None if to is None else to.value, image_size=size, tolerance=tolerance, say=say)


app.command(epilog="Example: vit sweep --ckpt runs/jft-like --dataset cifar10 --from-scratch train.steps=400")(sweep)
app.command(epilog="Example: vit study --config configs/study-quick.yaml --dry-run")(study)


app.command("eval", epilog="Example: vit eval --ckpt runs/jft-like-digits --dataset digits --json")(evaluate)
app.command(epilog="Example: vit predict --ckpt runs/photos inbox/ --top 3 --json")(predict)
app.command(epilog="Example: vit inspect --ckpt runs/jft-like --images holiday.jpg --out inside")(inspect)
app.command(epilog="Example: vit report runs/jft-like-digits")(report)
app.command(epilog="Example: vit compare runs/jft-like-digits runs/jft-like-digits-scratch --out comparison")(compare)

app.command(epilog="Example: vit doctor --config configs/jft-like.yaml")(doctor)


app.command(epilog="Example: vit models B/16 R50+B/16 R50x1 --image-size 384")(models)


@app.command(epilog="Example: vit schema --json > vit-config.schema.json")
def schema(as_json: Annotated[bool, typer.Option("--json", help="print a JSON schema, for editors")] = False) -> None:
    """List every setting with type, default and meaning."""
    from vitcli.config import Config

    if as_json:
        typer.echo(json.dumps(without_required(Config.model_json_schema()), indent=2))
        return
    typer.echo("\n".join(setting_lines(Config)))


def without_required(schema: dict[str, Any]) -> dict[str, Any]:
    """Let an editor accept a file that leaves the rest to a recipe, a checkpoint or overrides."""
    sections = {name: without_required(section) for name, section in schema.get("$defs", {}).items()}
    return {k: v for k, v in schema.items() if k != "required"} | ({"$defs": sections} if sections else {})


def setting_lines(section: Any, prefix: str = "") -> list[str]:
    lines = []
    for name, field in section.model_fields.items():
        if hasattr(field.annotation, "model_fields"):
            lines += setting_lines(field.annotation, f"{prefix}{name}.")
        else:
            default = "required" if field.is_required() else json.dumps(field.get_default(), default=str)
            lines.append(f"{prefix + name:<34} {default:<12} {field.description or ''}")
    return lines


def main() -> None:
    """Run the command line; errors for users are one line on stderr and exit code 2, signals 128 + their number."""
    try:
        with StopSignals().installed():
            app()
    except BrokenPipeError:  # `vit schema | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the last flush has somewhere to go
        sys.exit(141)
    except (UserError, Interrupted, OSError) as error:
        if "--debug" in sys.argv:
            traceback.print_exc()
        where = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
        typer.echo(f"vit: {where}{error.strerror or error if isinstance(error, OSError) else error}", err=True)
        sys.exit(getattr(error, "exit_code", 2))


if __name__ == "__main__":
    main()

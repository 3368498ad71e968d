"""`vit eval`."""

import json
from typing import Annotated

import typer

from vitcli.cli_options import Ckpt, DataRoot, Debug, warn

__all__ = ["evaluate"]


def evaluate(
    ckpt: Ckpt,
    dataset: Annotated[
        str | None, typer.Option("--dataset", help="default: the data set it was trained on", show_default=False)
    ] = None,
    data_root: DataRoot = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="images at a time; changes no result")] = 256,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object instead of a table")] = False,
    debug: Debug = False,
) -> None:
    """Evaluate a checkpoint: top-1, top-5, loss and per-class accuracy, every image counted exactly once."""
    from vitcli.assess import evaluate_checkpoint

    result = evaluate_checkpoint(ckpt, dataset=dataset, data_root=data_root, batch_size=batch_size, say=warn)
    if as_json:
        typer.echo(json.dumps(result))
        return
    typer.echo(f"{result['checkpoint']} on {result['dataset']}: {result['examples']:,} images")
    loss = "not finite" if result["loss"] is None else f"{result['loss']:.4f}"
    typer.echo(f"top-1  {percent(result['top1'])}\ntop-5  {percent(result['top5'])}\nloss   {loss}")
    width = max(len(row["class"]) for row in result["per_class"])
    for row in result["per_class"]:
        typer.echo(f"  {row['class']:<{width}}  {percent(row['accuracy'])}  of {row['examples']:,}")


def percent(share: float | None) -> str:
    return "      -" if share is None else f"{100 * share:6.2f} %"

"""`vit study`."""

from pathlib import Path
from typing import Annotated

import typer

from vitcli.cli_options import Debug, Overrides, say

__all__ = ["study"]


def study(
    config: Annotated[
        Path, typer.Option("--config", help="the study's YAML, such as configs/study-quick.yaml", show_default=False)
    ],
    overrides: Overrides = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="folder of the study; default runs/ and the file's name", show_default=False),
    ] = None,
    jobs: Annotated[
        int | None, typer.Option("--jobs", min=1, help="cells at a time; default one for each GPU, or one", show_default=False)
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print cells, operations and hours, and stop")] = False,
    debug: Debug = False,
) -> None:
    """Compare model families over amounts of pretraining data, with seeds, intervals, and the crossover if there is one.

    The same command goes on where it was stopped; given again elsewhere, it takes part in the same folder. Exit code 1 if a
    cell failed; the others are run all the same.
    """
    from vitcli.study.command import study as run

    if not run(config, overrides or [], out=out, jobs=jobs, dry_run=dry_run, say=say):
        raise typer.Exit(1)

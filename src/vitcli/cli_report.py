"""`vit report` and `vit compare`: runs to look at, alone and side by side."""

import json
from pathlib import Path
from typing import Annotated

import typer

from vitcli.cli_options import DataRoot, Debug, say, warn

__all__ = ["compare", "report"]


def report(
    run: Annotated[Path, typer.Argument(help="run directory, finished or not", show_default=False, metavar="RUN")],
    out: Annotated[
        Path | None, typer.Option("--out", help="file to write; default report.html in the run directory", show_default=False)
    ] = None,
    mistakes: Annotated[int, typer.Option("--mistakes", min=0, max=200, help="most confident mistakes to show")] = 24,
    stored_only: Annotated[
        bool, typer.Option("--stored-only", help="read what the run directory holds, no images, and run no model")
    ] = False,
    data_root: DataRoot = None,
    debug: Debug = False,
) -> None:
    """Write a run as one HTML page: curves, numbers with intervals, confusion, calibration, mistakes, settings.

    The page holds everything it shows and opens without a network. What the run does not have yet is left out and said.
    """
    from vitcli.report import write_report

    path = write_report(run, out=out, data_root=data_root, mistakes=mistakes, stored_only=stored_only, say=warn)
    say(f"{path}: {path.stat().st_size / 1000:,.0f} kB, one file; open it in any browser")


def compare(
    runs: Annotated[list[Path], typer.Argument(help="two run directories or more", show_default=False, metavar="RUN RUN...")],
    out: Annotated[
        Path | None, typer.Option("--out", help="folder for curves.png and compare.json", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object instead of tables")] = False,
    data_root: DataRoot = None,
    debug: Debug = False,
) -> None:
    """Compare runs: settings that differ, final numbers with intervals, and whether a difference could be chance.

    Differences are tested image by image on the same evaluation images, pair by pair; runs evaluated on other images are said
    not to be comparable.
    """
    from vitcli.compare import compare_runs, comparison_lines

    result = compare_runs(runs, out=out, data_root=data_root, say=warn)
    if as_json:
        say(json.dumps(result))
        return
    for line in comparison_lines(result):
        say(line)
    if out is not None:
        say(f"{out}: curves.png and compare.json")

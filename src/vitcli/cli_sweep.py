"""`vit sweep`."""

from pathlib import Path
from typing import Annotated

import typer

from vitcli.cli_options import DataRoot, Debug, Overrides, as_overrides, say
from vitcli.errors import ConfigError

__all__ = ["sweep"]


def sweep(
    ckpt: Annotated[
        list[Path],
        typer.Option(
            "--ckpt", help="run, checkpoint directory or weights file; may be given several times", show_default=False
        ),
    ],
    dataset: Annotated[
        list[str] | None,
        typer.Option("--dataset", help="as in vit finetune; may be given several times", show_default=False),
    ] = None,
    overrides: Overrides = None,
    config: Annotated[
        Path | None, typer.Option("--config", help="YAML config; default a recipe for each data set", show_default=False)
    ] = None,
    from_scratch: Annotated[
        bool, typer.Option("--from-scratch", help="sweep the same models from random weights as well, to compare")
    ] = False,
    lrs: Annotated[
        str | None,
        typer.Option(
            "--lrs", help="rates to try, such as 0.003,0.01; default those of the paper's Table 4", show_default=False
        ),
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="final runs with the best rate")] = 3,
    trial_steps: Annotated[
        int | None,
        typer.Option("--trial-steps", min=1, help="length of a trial; default that of a final run", show_default=False),
    ] = None,
    jobs: Annotated[
        int | None, typer.Option("--jobs", min=1, help="trials at a time; default one for each GPU, or one", show_default=False)
    ] = None,
    early_stop: Annotated[
        bool, typer.Option("--early-stop/--no-early-stop", help="end a trial that is far behind the others")
    ] = True,
    vtab: Annotated[
        bool,
        typer.Option(
            "--vtab", help="1,000 training examples and 2,500 steps for each task; default tasks: what the data root has"
        ),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="folder of all runs; default runs/ and the checkpoint's name", show_default=False),
    ] = None,
    data_root: DataRoot = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print what would be run and what it costs, and stop")] = False,
    debug: Debug = False,
) -> None:
    """Fine-tune as the paper does: choose the learning rate on a development split, train with several seeds, and test.

    The same command goes on where it was stopped. Exit code 1 if a trial failed; the others are run all the same.
    """
    from vitcli.sweep import sweep as run

    succeeded = run(
        ckpt,
        dataset or [],
        config,
        as_overrides(overrides, data__root=data_root),
        out=out,
        root=data_root,
        from_scratch=from_scratch,
        lrs=None if lrs is None else parse_rates(lrs),
        seeds=seeds,
        trial_steps=trial_steps,
        jobs=jobs,
        early_stop=early_stop,
        vtab=vtab,
        dry_run=dry_run,
        say=say,
    )
    if not succeeded:
        raise typer.Exit(1)


def parse_rates(text: str) -> list[float]:
    """Read comma-separated learning rates.

    Raises:
        ConfigError: something that is no number above 0.
    """
    rates = []
    for word in text.split(","):
        try:
            rates.append(float(word))
        except ValueError:
            raise ConfigError(f"--lrs {text}: {word!r} is no number; expected rates such as 0.003,0.01") from None
        if not 0 < rates[-1] < float("inf"):
            raise ConfigError(f"--lrs {text}: {word} is no learning rate; expected numbers above 0, such as 0.003,0.01")
    return rates

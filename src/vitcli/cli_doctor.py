"""`vit doctor`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from vitcli.cli_options import DataRoot, Debug, Overrides, as_overrides, say, warn
from vitcli.errors import ConfigError

__all__ = ["doctor"]


def doctor(
    overrides: Overrides = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", help="the config of a run to examine; without one the installation", show_default=False),
    ] = None,
    ckpt: Annotated[
        Path | None, typer.Option("--ckpt", help="with --dataset: examine a fine-tuning run", show_default=False)
    ] = None,
    dataset: Annotated[
        str | None, typer.Option("--dataset", help="the data set that it would be fine-tuned on", show_default=False)
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="run directory; default that of the run's command", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object instead of a screen")] = False,
    data_root: DataRoot = None,
    debug: Debug = False,
) -> None:
    """Examine an installation, or a run before it starts: data, speed, memory, time, disk, and what to change.

    Takes the words of vit pretrain, or with --ckpt and --dataset those of vit finetune, and about half a minute. Pictures that
    the run would decode, index or download at its start are so now, and kept for it. Exit code 0: nothing would end the run;
    1: something would; 2: the command cannot be carried out.
    """
    words = as_overrides(overrides, out=out, data__root=data_root)
    if (ckpt is None) != (dataset is None):
        raise ConfigError("--ckpt and --dataset go together; for a config's own ckpt: leave both out")
    if config is None and ckpt is None and words:
        raise ConfigError(f"{words[0]}: a setting of which run? Add --config FILE, or --ckpt and --dataset")

    from vitcli.doctor.examination import Wish, examine
    from vitcli.doctor.words import lines_of

    options = [("--out", out), ("--data-root", data_root)]
    typed = [*(overrides or []), *(str(word) for option in options if option[1] is not None for word in option)]
    wish = None if config is None and ckpt is None else Wish(config, words, ckpt, dataset, typed)
    examination = examine(wish, say=warn)
    if as_json:
        say(json.dumps(examination.as_dict()))
    else:
        for line in lines_of(examination):
            say(line)
    if examination.status == "problem":
        raise typer.Exit(1)

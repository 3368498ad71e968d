"""`vit eval`: its options, and its answers as text."""

import json
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from vitcli.cli_options import Ckpt, DataRoot, Debug, Overrides, as_overrides, warn

__all__ = ["evaluate"]

FEW_CLASSES = 30  # a table of this many lines is read, a longer one scrolls away


class WhichViews(StrEnum):
    """The words for --tta."""

    flip = "flip"
    crops5 = "crops5"
    both = "flip+crops5"


def evaluate(
    ckpt: Ckpt,
    overrides: Overrides = None,
    dataset: Annotated[
        str | None, typer.Option("--dataset", help="default: the data set it was trained on", show_default=False)
    ] = None,
    data_root: DataRoot = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="images at a time; changes no result")] = 256,
    image_size: Annotated[
        str | None, typer.Option("--image-size", help="show them at 384 or HEIGHTxWIDTH px", show_default=False)
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option("--labels", help="other labels: ReaL's real.json, or lines of PATH<tab>LABEL", show_default=False),
    ] = None,
    all_outputs: Annotated[
        bool, typer.Option("--all-outputs", help="of a set of some of ImageNet's classes, let all 1,000 compete")
    ] = False,
    tta: Annotated[
        WhichViews | None, typer.Option("--tta", help="mean over several views of each image", show_default=False)
    ] = None,
    per_class: Annotated[bool, typer.Option("--per-class", help="the table of classes, however long it is")] = False,
    mistakes: Annotated[int, typer.Option("--mistakes", min=0, help="how many of the surest mistakes to list")] = 5,
    confusion: Annotated[
        Path | None, typer.Option("--confusion", help="write the confusion matrix to this CSV file", show_default=False)
    ] = None,
    save_predictions: Annotated[
        Path | None, typer.Option("--save-predictions", help="write every answer to this file", show_default=False)
    ] = None,
    robustness: Annotated[
        bool, typer.Option("--robustness", help="also under blur, noise, JPEG and low contrast, at 5 strengths each")
    ] = False,
    translate: Annotated[
        str | None,
        typer.Option("--translate", help="also with the images moved by so many px, 4 ways: 1,2,4", show_default=False),
    ] = None,
    speed: Annotated[
        bool, typer.Option("--speed", help="also the model's images per second, and latency of one image")
    ] = False,
    fewshot: Annotated[
        str | None,
        typer.Option("--fewshot", help="probe the features with so many images per class: 1,5,10,25", show_default=False),
    ] = None,
    linear: Annotated[bool, typer.Option("--linear", help="probe the features with logistic regression")] = False,
    knn: Annotated[
        str | None, typer.Option("--knn", help="probe the features with so many nearest neighbours: 20", show_default=False)
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="draws of --fewshot")] = 3,
    l2: Annotated[str, typer.Option("--l2", help="regularisation of --fewshot: a number, or auto")] = "1024",
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object, with everything, instead of tables")] = False,
    debug: Debug = False,
) -> None:
    """Evaluate a checkpoint: accuracy with intervals, calibration, what it confuses; every image counted exactly once.

    --fewshot, --linear and --knn ask what its features are worth on any data set, whatever the checkpoint's own classes.
    """
    from vitcli.assess import Questions, assess

    words = as_overrides(overrides, data__root=data_root)
    if image_size is not None:
        from vitcli.weights.convert import parse_size

        words.append(f"data.image_size={json.dumps(parse_size(image_size))}")
    ask = Questions(
        labels=labels,
        all_outputs=all_outputs,
        tta=None if tta is None else tta.value,
        mistakes=mistakes,
        confusion=confusion,
        predictions=save_predictions,
        robustness=robustness,
        translate=numbers("--translate", translate),
        speed=speed,
        shots=numbers("--fewshot", fewshot),
        linear=linear,
        knn=numbers("--knn", knn),
        seeds=seeds,
        l2=None if l2 == "auto" else positive("--l2", l2),
    )
    result = assess(ckpt, dataset=dataset, overrides=words, batch_size=batch_size, ask=ask, say=warn)
    if result is None:  # not the first of several processes
        return
    if as_json:
        typer.echo(json.dumps(result, allow_nan=False))
        return
    typer.echo("\n".join(as_text(result, per_class=per_class)))


def numbers(option: str, text: str | None) -> list[int]:
    """Read whole numbers from 1 on, separated by commas."""
    from vitcli.errors import ConfigError

    if text is None:
        return []
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdigit() and 1 <= int(word[:18]) <= 10**9 for word in words):
        raise ConfigError(f"{option} is {text!r}, expected whole numbers such as 5 or 1,5,10,25")
    return sorted({int(word) for word in words})


def positive(option: str, text: str) -> float:
    """Read a number above zero."""
    from vitcli.errors import ConfigError

    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 < number < float("inf"):
        raise ConfigError(f"{option} is {text!r}, expected a number above 0 such as 1024, or auto")
    return number


# ---------------------------------------------------------------- as text


def as_text(result: dict[str, Any], *, per_class: bool) -> list[str]:
    """Return the lines of a report."""
    lines = []
    if "top1" in result:
        result = with_readable_names(result)
        lines += accuracy_lines(result)
        if "robustness" in result:
            lines += ["", *robustness_lines(result["robustness"], clean=result["top1"])]
        if "translation" in result:
            lines += ["", *translation_lines(result["translation"], clean=result["top1"])]
        lines += confusion_lines(result)
        seen = [row for row in result["per_class"] if row["examples"] or row["predicted"]]
        if per_class or len(seen) <= FEW_CLASSES:
            lines += ["", *class_lines(seen)]
        else:
            lines += ["", f"{len(seen)} classes: --per-class lists them, --json too"]
    elif "speed" in result:
        lines.append(result["checkpoint"])
    if "speed" in result:
        lines += ["", *speed_lines(result["speed"])]
    if "probes" in result:
        lines += [*([""] if lines else []), *probe_lines(result["probes"])]
    return lines


def accuracy_lines(result: dict[str, Any]) -> list[str]:
    intervals, calibration = result["intervals"], result["calibration"]
    how = [
        f"labels of {result['labels']}" if "labels" in result else "",
        f"{result['restricted_to']:,} outputs count" if "restricted_to" in result else "",
        f"mean over views ({result['tta']})" if result["tta"] else "",
    ]
    loss = "not finite" if result["loss"] is None else f"{result['loss']:8.4f}  {between(intervals['loss'], '.4f')}"
    ece = f"ECE       {percent(calibration['ece'])}  {len(calibration['bins'])} bins"
    if "temperature" in calibration:
        ece += (
            f"; temperature {calibration['temperature']:.3g} brings {percent(calibration['ece_before']).strip()} to "
            f"{percent(calibration['ece_after']).strip()} (fitted on {calibration['fitted_on']:,} images, "
            f"judged on {calibration['judged_on']:,} others)"
        )
    return [
        ", ".join([f"{result['checkpoint']} on {result['dataset']}: {result['examples']:,} images", *filter(None, how)]),
        f"top-1     {percent(result['top1'])}  {between(intervals['top1'])}",
        f"top-5     {percent(result['top5'])}  {between(intervals['top5'])}",
        f"loss      {loss}",
        f"macro F1  {percent(result['macro_f1'])}",
        ece,
        f"intervals: {100 * intervals['level']:.0f} %, {intervals['method']}",
    ]


def confusion_lines(result: dict[str, Any]) -> list[str]:
    lines: list[str] = []
    if result["confused"]:
        rows = [(f"{row['images']:,} of {row['of']:,}", pair_of(row)) for row in result["confused"]]
        lines += ["", "most confused", *(f"  {images:>14}  {pair}" for images, pair in rows)]
    if result["mistakes"]:
        lines += ["", "surest mistakes"]
        lines += [f"  {percent(row['confidence'])}  {pair_of(row)}  {plain(row['where'])}" for row in result["mistakes"]]
    return lines


def class_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    width = max(len("class"), *(len(row["class"]) for row in rows))
    lines = [f"{'class':<{width}}   images    top-1      interval        precision      F1"]
    for row in rows:
        lines.append(
            f"{row['class']:<{width}}  {row['examples']:>7,}  {percent(row['accuracy'])}  {between(row['interval']):<18}  "
            f"{percent(row['precision'])}  {percent(row['f1'])}"
        )
    return lines


def robustness_lines(robustness: dict[str, Any], *, clean: float) -> list[str]:
    table, means = robustness["corruptions"], robustness["means"]
    strengths = [cell["strength"] for cell in next(iter(table.values()))]
    lines = [f"{'strength':<10}" + "".join(f"{strength:>8}" for strength in strengths) + f"{'mean':>9}   top-1, %"]
    for kind, cells in table.items():
        lines.append(f"{kind:<10}" + "".join(f"{100 * cell['top1']:8.2f}" for cell in cells) + f"{100 * means[kind]:9.2f}")
    lines.append(f"{'all':<10}{'':{8 * len(strengths)}}{100 * robustness['mean']:9.2f}   {100 * clean:.2f} without")
    return lines


def translation_lines(rows: list[dict[str, Any]], *, clean: float) -> list[str]:
    lines = ["moved by     top-1      interval        unchanged   " + "  ".join(f"{name:>8}" for name in rows[0]["directions"])]
    lines.append(f"{'0 px':<8}  {percent(clean)}")
    for row in rows:
        each = "  ".join(percent(direction["top1"]) for direction in row["directions"].values())
        px = f"{row['px']} px"
        lines.append(f"{px:<8}  {percent(row['top1'])}  {between(row['interval']):<18} {percent(row['unchanged'])}  {each}")
    return lines


def speed_lines(speed: dict[str, Any]) -> list[str]:
    latency, (height, width) = speed["latency_ms"], speed["image_size"]
    return [
        f"throughput  {speed['images_per_second']:,.1f} images/s, in batches of {speed['batch_size']:,}",
        f"latency     {latency['median']:.2f} ms for one image, 90 % within {latency['p90']:.2f} ms",
        f"            {height}x{width} px, {speed['gflops_per_image']:.3g} GFLOPs, {speed['precision']}, on {speed['device']}; "
        "the model alone",
    ]


def probe_lines(probes: dict[str, Any]) -> list[str]:
    lines = [
        f"{probes['checkpoint']}, its {probes['features']:,} features on {probes['dataset']}: {probes['classes']:,} classes, "
        f"{probes['train_examples']:,} training and {probes['test_examples']:,} test images"
    ]
    for row in probes["fewshot"]:
        spread = "" if row["accuracy_std"] is None else f" ± {100 * row['accuracy_std']:.2f}"
        chosen = "chosen " + ", ".join(f"{l2:g}" for l2 in row["l2_per_seed"]) if row["l2"] is None else f"{row['l2']:g}"
        lines.append(
            f"{row['shots']:>3}-shot    {percent(row['accuracy_mean'])}{spread}  {between(row['interval'])}  "
            f"{len(row['per_seed'])} draws, l2 {chosen}"
        )
    if probes["linear"] is not None:
        linear = probes["linear"]
        note = "" if linear["converged"] else ", not converged"
        lines.append(f"linear      {percent(linear['accuracy'])}  {between(linear['interval'])}  l2 {linear['l2']:.3g}{note}")
    for neighbours, row in (probes["knn"] or {}).items():
        plainly = percent(row["accuracy_plain"]).strip()
        lines.append(f"{neighbours:>3}-NN      {percent(row['accuracy'])}  {between(row['interval'])}  plain vote {plainly}")
    return lines


def percent(share: float | None) -> str:
    return "       -" if share is None else f"{100 * share:6.2f} %"


def between(interval: Sequence[float | None], form: str = "") -> str:
    low, high = interval
    if low is None or high is None:
        return "-"
    return f"{low:{form}} to {high:{form}}" if form else f"{100 * low:.2f} to {100 * high:.2f} %"


def pair_of(row: dict[str, Any]) -> str:
    return f"{row['label']} taken for {row['predicted']}"


def plain(name: str) -> str:
    """Return a class or a path as one printable line: folders may have any name."""
    return name if name.isprintable() else repr(name)[1:-1]


def with_readable_names(result: dict[str, Any]) -> dict[str, Any]:
    """Put ImageNet's names beside wnids, and control characters of any name into words."""
    from vitcli.data.imagenet import readable

    classes = [row["class"] for row in result["per_class"]]
    names = {name: plain(shown) for name, shown in zip(classes, readable(classes), strict=True)}

    def renamed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        named = ("class", "label", "predicted")
        return [{key: names.get(value, value) if key in named else value for key, value in row.items()} for row in rows]

    return {**result, **{key: renamed(result[key]) for key in ("per_class", "confused", "mistakes")}}

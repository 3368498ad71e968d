"""The page: its head, its curves, and what the other parts give it, put into the template."""

from datetime import UTC, datetime
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from vitcli import __version__
from vitcli.config_file import dump_config
from vitcli.figures import Panel, draw_panels, inline_svg, shorten
from vitcli.logs import duration
from vitcli.models.flops import count_parameters, forward_flops
from vitcli.plan import describe_model
from vitcli.report import answers as said
from vitcli.report.answers import Answers
from vitcli.report.facts import environment, megabytes, settings, weights
from vitcli.report.pictures import Pictures
from vitcli.report.words import percent, short_count
from vitcli.run_record import RunRecord

__all__ = ["GENERATOR", "render"]

GENERATOR = '<meta name="generator" content="vit report">'  # stands in the template too, and says that a file is a report


def render(record: RunRecord, answers: Answers | None, pictures: Pictures | None, notes: list[str]) -> str:
    """Return the page."""
    config = record.config
    num_classes = None if answers is None else len(answers.about["classes"])
    if num_classes is None and record.summary is not None:
        num_classes = len(record.summary.get("per_class", ())) or None
    notes = [*notes, *said.few_images(answers)]
    sections: dict[str, Any] = {
        "curves": curves(record),
        "metrics": said.metrics(record, answers),
        **said.classes(record, answers),
        "confusion": None if answers is None else said.confusion(answers),
        **said.pairs(answers, pictures),
        "calibration": None if answers is None else said.calibration(answers),
        **said.mistakes_of(answers, pictures),
        "settings": settings(record),
        "weights": weights(record),
        "environment": environment(record, answers),
        "checkpoints": [{"name": path.name, "size": megabytes(path)} for path in record.checkpoints],
    }
    anchors = ("curves", "metrics", "classes", "confusion", "calibration", "mistakes", "settings", "weights", "environment")
    titles = {"metrics": "Evaluation", "weights": "Weights"}
    shown = [name for name in anchors if sections[name] or name == "settings" or (name == "confusion" and sections["pairs"])]
    page = Environment(
        loader=PackageLoader("vitcli.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).get_template("report.html.jinja")
    return page.render(
        name=shorten(record.name, 80),
        headline=f"{describe_model(config.model, config.data.image_size)}, on {shorten(config.data.source, 120)}",
        status=status(record),
        finished=record.summary is not None,
        contents=[(name, titles.get(name, name.capitalize())) for name in shown],
        tiles=tiles(record, answers, num_classes=num_classes),
        notes=[shorten(note, 600) for note in notes],
        evaluated=said.evaluated(record, answers),
        config=dump_config(config),
        version=__version__,
        made=datetime.now(UTC).isoformat(sep=" ", timespec="minutes").replace("+00:00", " UTC"),
        **sections,
    )


def status(record: RunRecord) -> str:
    total = record.config.train.steps or 0
    summary = record.summary
    if summary is not None and summary.get("stopped_early"):
        trained = summary.get("trained_steps", record.step)
        return f"finished: stopped early after {trained:,} of {total:,} steps, with the weights of step {summary['step']:,}"
    if summary is not None:
        return f"finished: {summary.get('step', total):,} steps"
    return f"not finished: step {record.step:,} of {total:,}"


def tiles(record: RunRecord, answers: Answers | None, *, num_classes: int | None) -> list[dict[str, str]]:
    """Return the numbers at the head of the page: label, value, note."""
    rows = {row["name"]: row for row in said.metrics(record, answers)}
    shown = [
        {"label": name, "value": rows[name]["value"], "note": rows[name]["interval"]}
        for name in ("top-1", "top-5", "loss")
        if name in rows
    ]
    if answers is not None and answers.found["calibration"]["ece"] is not None:
        shown.append({"label": "calibration error", "value": percent(answers.found["calibration"]["ece"]), "note": "ECE"})
    seconds, config = record.train_seconds(), record.config
    if seconds:
        images = record.step * config.train.batch_size
        note = f"{images / seconds:,.0f} images/s" if record.summary is not None else ""
        shown.append({"label": "training", "value": duration(seconds), "note": note})
    seen = f"{record.step * config.train.batch_size:,} images"
    shown.append({"label": "steps", "value": f"{record.step:,}", "note": seen})
    if num_classes is not None:
        sizes: dict[str, Any] = {"image_size": config.data.image_size, "num_classes": num_classes}
        operations = forward_flops(config.model, **sizes) / 1e9
        parameters = count_parameters(config.model, **sizes)
        shown.append({"label": "parameters", "value": short_count(parameters), "note": f"{operations:,.3g} GFLOPs an image"})
    return shown


def curves(record: RunRecord) -> list[dict[str, Any]]:
    """Return the figures of what was logged: title and SVG."""
    train, evals = "training", "evaluation"
    right = "top-1" if record.config.objective.needs_labels else "colours"
    panels = [
        ("Loss", Panel({train: record.curve("train", "loss"), evals: record.curve("eval", "loss")}, "step", "loss")),
        (
            "Accuracy",
            Panel(
                {
                    f"{train} {right}": record.curve("train", "accuracy"),
                    f"{evals} {right}": record.curve("eval", "top1") or record.curve("eval", "accuracy"),
                    f"{evals} top-5": record.curve("eval", "top5"),
                },
                "step",
                "accuracy",
                percent=True,
            ),
        ),
        ("Few-shot accuracy", Panel(fewshot(record), "step", "accuracy", percent=True, points=True)),
        ("Learning rate", Panel({"lr": record.curve("train", "lr")}, "step", "learning rate")),
        ("Gradient norm", Panel({"norm": record.curve("train", "gradient_norm")}, "step", "gradient norm", log_y=True)),
        ("Speed", Panel({"speed": record.curve("train", "images_per_second")}, "step", "images/s")),
    ]
    drawn = []
    for number, (title, panel) in enumerate(panels):
        series = {name: points for name, points in panel.series.items() if points}
        if series:
            figure = draw_panels([Panel(**{**vars(panel), "series": series})])
            drawn.append({"title": title, "svg": inline_svg(figure, name=f"curve{number}", description=f"{title} by step")})
    return drawn


def fewshot(record: RunRecord) -> dict[str, list[tuple[float, float]]]:
    """Return the accuracies of probes during training, by data set and shots."""
    keys = {key: None for row in record.rows if row["kind"] == "fewshot" for key in row if key.endswith("shot")}
    return {key: record.curve("fewshot", key) for key in keys}

"""study.md: what a study found, with tables, figures and what made the numbers, as a page to read and to keep.

Accuracies are in per cent and differences in points, each with its 95 % interval.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from vitcli.study.axes import compact, signed
from vitcli.study.cells import PLAIN, UPSTREAM
from vitcli.study.figures import crossover_words
from vitcli.study.stats import Estimate
from vitcli.study.summary import Curve, Summary, metric_words

__all__ = ["accuracy_table", "arms_table", "as_markdown", "as_text", "page"]

Table = list[list[str]]  # the first row is the head
Drawn = Sequence[tuple[str, str, str]]  # of each figure the metric, the file's stem and the caption


def page(summary: Summary, record: Mapping[str, Any], figures: Drawn) -> str:
    """Return the page.

    Args:
        record: what study.json says: see `record.record_of`.
        figures: those that are in figures/, as PNG and SVG.
    """
    parts = [f"# {summary.title}", status(record)]
    parts += found(summary)
    for metric in summary.headline:
        parts += of_metric(summary, metric, [(stem, caption) for name, stem, caption in figures if name == metric])
    if moved := moved_table(summary):
        parts += ["## Evaluation images moved", *pictures([(s, c) for name, s, c in figures if not name]), as_markdown(moved)]
    parts += compared(record)
    parts += searched(record)
    parts += made(record)
    return "\n\n".join(parts) + "\n"


def status(record: Mapping[str, Any]) -> str:
    """Say how far the study is, and what became of the rest."""
    cells = record["cells"]
    if cells["done"] == cells["all"]:
        return f"All {cells['all']} cells are there. `results.csv` has every number, `study.json` every interval."
    failed = "".join(f"\n- {each['cell']}: {each['reason']}" for each in record["failed"])
    return f"**{cells['done']} of {cells['all']} cells are there**, so this is not the last word." + (
        f" Failed:\n{failed}" if failed else ""
    )


# ---------------------------------------------------------------- results


def found(summary: Summary) -> list[str]:
    """Return the answer: words for every metric, and the crossovers under every variant."""
    if not summary.gaps and not summary.leads:
        return []
    parts = ["## What was found", *filter(None, (arm_words(summary, metric) for metric in summary.headline))]
    parts += [summary.gaps[metric, PLAIN].words for metric in summary.headline if (metric, PLAIN) in summary.gaps]
    rows = [["", *summary.variants]]
    for metric in summary.headline:
        gaps = [summary.gaps.get((metric, variant)) for variant in summary.variants]
        rows.append([metric_words(metric), *("" if gap is None else crossover_words(gap.crossover) for gap in gaps)])
    return [*parts, as_markdown(rows)] if summary.gaps and len(summary.variants) > 1 else parts


def arm_words(summary: Summary, metric: str) -> str:
    """Say which families of a study of one size are surely above or below the first; nothing where there is no other."""
    sides: dict[int, list[str]] = {1: [], -1: [], 0: []}
    for family in summary.families:
        if lead := summary.leads.get(Curve(metric, PLAIN, family)):
            sides[lead.sign].append(f"{family} {difference(lead).replace('**', '')}")
    named = {1: "above it, in points: ", -1: "below it: ", 0: "not to be told from it: "}
    said = "; ".join(named[side] + ", ".join(families) for side, families in sides.items() if families)
    words = metric_words(metric)
    return f"{words[0].upper()}{words[1:]} against {summary.first_arm}: {said}." if said else ""


def of_metric(summary: Summary, metric: str, figures: Sequence[tuple[str, str]]) -> list[str]:
    """Return a metric's tables and figures."""
    words = metric_words(metric)
    parts = [f"## {words[0].upper()}{words[1:]}"]
    for variant in summary.variants if summary.first_arm is not None else ():
        table = arms_table(summary, metric, variant)
        if len(table) > 1:
            parts += [f"Under the variant {variant}:" if variant != PLAIN else "", as_markdown(table)]
    for variant in summary.variants if summary.first_arm is None else ():
        table = accuracy_table(summary, metric, variant)
        if len(table) > 1:
            parts += [f"Under the variant {variant}:" if variant != PLAIN else "", as_markdown(table)]
            changes = change_table(summary, metric, variant)
            if len(changes) > 1:
                parts += [f"What {variant} changes, in points:", as_markdown(changes)]
    return [part for part in [*parts, law_words(summary, metric), *pictures(figures)] if part]


def accuracy_table(summary: Summary, metric: str, variant: str) -> Table:
    """Return accuracies by size and family, in per cent, and the gap in points."""
    families = [family for family in summary.families if summary.curve(metric, family, variant)]
    gap = summary.gaps.get((metric, variant))
    by_size = {family: {mean.examples: mean.estimate for mean in summary.curve(metric, family, variant)} for family in families}
    gaps = {each.examples: each for each in gap.estimates} if gap else {}
    head = ["images", *families, *([" − ".join(summary.compare)] if gap and summary.compare else [])]
    rows = [head]
    for size in sorted({size for known in by_size.values() for size in known}):
        cells = [share(by_size[family].get(size)) for family in families]
        rows.append([f"{size:,}", *cells, *([difference(gaps.get(size))] if gap else [])])
    return rows


def arms_table(summary: Summary, metric: str, variant: str) -> Table:
    """Return, for a study of one size, every family's accuracy in per cent, its lead over the first in points, and its cost."""
    assert summary.first_arm is not None
    first = summary.curve(metric, summary.first_arm, variant)
    changed = variant != PLAIN
    head = ["", "top-1, %", f"less {summary.first_arm}, points", *([f"{variant} less {PLAIN}"] * changed), "operations"]
    rows = [head]
    for family in summary.families:
        for mean in summary.curve(metric, family, variant)[:1]:
            key = Curve(metric, variant, family)
            change = [difference(next(iter(summary.changes.get(key, ())), None))] * changed
            cost = f"{mean.flops / first[0].flops:.2f} x" if first else ""
            rows.append([family, share(mean.estimate), difference(summary.leads.get(key)), *change, cost])
    return rows


def change_table(summary: Summary, metric: str, variant: str) -> Table:
    """Return what a variant adds to each family's accuracy, and to the gap."""
    of_family = {key.family: found for key, found in summary.changes.items() if (key.metric, key.variant) == (metric, variant)}
    columns = {family: of_family[family] for family in summary.families if of_family.get(family)}
    if found := summary.gap_changes.get((metric, variant)):
        columns["the gap"] = found
    sizes = sorted({each.examples for column in columns.values() for each in column})
    by_size = [{each.examples: each for each in column} for column in columns.values()]
    return [["images", *columns], *([f"{size:,}", *(difference(known.get(size)) for known in by_size)] for size in sizes)]


def law_words(summary: Summary, metric: str) -> str:
    """Say the power law of each family's error."""
    said = []
    for key, law in summary.laws.items():
        if (key.metric, key.variant) == (metric, PLAIN):
            low, high = law.intervals["b"]
            form = f"{law.a:.3g} n⁻ᵇ" + ("" if law.c < 5e-4 else f" + {100 * law.c:.1f} %")
            fitted = f"b = {law.b:.2f} ({low:.2f} to {high:.2f}), {100 * law.misfit:.1f} points off the measured ones"
            said.append(f"{key.family} {form} with {fitted}")
    return f"Power laws of the error after n images: {'; '.join(said)}." if said else ""


def moved_table(summary: Summary) -> Table:
    """Return accuracy and unchanged answers by distance, at the smallest and the largest size."""
    metrics = [metric for metric in summary.metrics if metric.partition(":")[0] in ("translate", "unchanged")]
    shown = [UPSTREAM, *metrics] if metrics else []
    sizes = sorted({mean.examples for key, curve in summary.curves.items() if key.metric in metrics for mean in curve})
    rows = [["images", "family", *(moved_words(metric) for metric in shown)]]
    for size in dict.fromkeys([*sizes[:1], *sizes[-1:]]):
        for family in summary.families:
            known = [{mean.examples: mean.estimate for mean in summary.curve(metric, family)}.get(size) for metric in shown]
            if any(known[1:]):
                rows.append([f"{size:,}", family, *map(share, known)])
    return rows if metrics else []


def moved_words(metric: str) -> str:
    kind, _, distance = metric.partition(":")
    return f"{distance} px" if kind == "translate" else f"unchanged, {distance} px" if kind == "unchanged" else "0 px"


def pictures(figures: Sequence[tuple[str, str]]) -> list[str]:
    return [f"![{caption}](figures/{stem}.png)\n\n*{caption}.* [SVG](figures/{stem}.svg)" for stem, caption in figures]


# ---------------------------------------------------------------- what made it


def compared(record: Mapping[str, Any]) -> list[str]:
    """Return what the families are, and the variants."""
    rows = [["family", "parameters", "FLOPs, one image forward", "FLOPs, one image in training", "settings"]]
    for name, each in record["families"].items():
        cost = [compact(each[key]) if key in each else "" for key in ("parameters", "forward_flops", "training_flops")]
        rows.append([name, *cost, settings_words(each["settings"])])
    parts = ["## What was compared", as_markdown(rows)]
    if record["variants"]:
        parts.append("\n".join(f"- {name}: {settings_words(settings)}" for name, settings in record["variants"].items()))
    return [*parts, *("\n".join(f"- {note}" for note in record["notes"]) for _ in [0] if record["notes"])]


def searched(record: Mapping[str, Any]) -> list[str]:
    """Return what the search tried and chose."""
    if not record["search"]:
        return []
    rows = [["variant", "family", "images", "settings", "top-1 on the development split, %"]]
    notes = []
    for each in record["search"]:
        group = [each["variant"], each["family"], f"{each['examples']:,}"]
        for trial in each["trials"]:
            top1 = "-" if trial["top1"] is None else f"{100 * trial['top1']:.1f}"
            chosen = each["chosen"] == trial["settings"]
            rows.append([*group, settings_words(trial["settings"]), f"**{top1}**, chosen" if chosen else top1])
        notes += [f"{each['family']}, {group[2]} images: {edge}." for edge in edges(each)]
    about = "Every family had as many trials as the others; they were judged by images that they had not learned from."
    return ["## The search", about, as_markdown(rows), *(["\n".join(f"- {note}" for note in notes)] if notes else [])]


def edges(search: Mapping[str, Any]) -> list[str]:
    """Say which chosen numbers are the last ones tried on their side: beyond them may be better ones."""
    found = []
    for key, chosen in (search["chosen"] or {}).items():
        values = {trial["settings"][key] for trial in search["trials"]}
        if len(values) < 3 or not all(isinstance(value, int | float) for value in values):
            continue
        if chosen in (min(values), max(values)):
            side = "smallest" if chosen == min(values) else "largest"
            found.append(f"`{key}={chosen:g}` is the {side} tried, so one beyond it may be better still")
    return found


def made(record: Mapping[str, Any]) -> list[str]:
    """Return how it was made: commands, hardware, hours, seeds, revision, dates."""
    hours, runs = record["hours"], record["runs"]
    lines = [
        f"command: `{record['command']}`",
        f"form: {record['form']}; sizes {', '.join(f'{size:,}' for size in record['sizes'])}",
        f"seeds: {', '.join(map(str, record['seeds']))}",
        f"hours of training: {hours['reported']:.2f} of the reported runs, {hours['search']:.2f} of the search, "
        f"{hours['finetune']:.2f} of fine-tuning",
        f"hardware: {'; '.join(runs['hardware']) or 'not on record'}",
        f"git revision: {', '.join(runs['git_revisions']) or 'not on record'}",
        f"versions: {'; '.join(runs['versions']) or 'not on record'}",
        f"begun {runs['started'] or '-'}, written {record['written']}",
        "settings: `study.yaml`; of every run: `settings.yaml` in its folder",
    ]
    return ["## How it was made", "\n".join(f"- {line}" for line in lines)]


# ---------------------------------------------------------------- text


def settings_words(settings: Mapping[str, Any]) -> str:
    """Return settings in one line, by dotted key."""
    return ", ".join(f"`{key}={value}`" for key, value in settings.items())


def share(estimate: Estimate | None) -> str:
    """Return an accuracy in per cent, with its interval."""
    if estimate is None:
        return ""
    return f"{100 * estimate.value:.1f} ({100 * estimate.low:.1f} to {100 * estimate.high:.1f})"


def difference(estimate: Estimate | None) -> str:
    """Return a difference in points, with its interval; bold if that excludes zero."""
    if estimate is None:
        return ""
    value, low, high = (signed(round(each, 3)) for each in (estimate.value, estimate.low, estimate.high))
    return f"**{value}** ({low} to {high})" if estimate.sign else f"{value} ({low} to {high})"


def as_markdown(table: Table) -> str:
    """Return a table in Markdown."""
    head, *rows = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in table]
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def as_text(table: Table) -> list[str]:
    """Return a table as lines of text, columns below each other."""
    plain = [[cell.replace("**", "") for cell in row] for row in table]
    widths = [max(map(len, column)) for column in zip(*plain)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in plain]

"""The tables of docs/results/ablations.md, beside the paper's numbers, from the studies that scripts/ablations.sh has run.

python scripts/ablation_results.py runs/ablations

What stands between the page's marks `<!-- made: NAME -->` and `<!-- made: end -->` is replaced, for the studies that are there,
and a figure written beside the page; the words around it are written by people.
"""

import argparse
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vitcli.rundir import read_json, write_text
from vitcli.study.cells import PLAIN, UPSTREAM
from vitcli.study.page import arms_table, as_markdown, difference, share
from vitcli.study.plan import Study, plan_study
from vitcli.study.record import summary_of
from vitcli.study.results import measure
from vitcli.study.summary import Curve, Summary, metric_words, summarise

PAGE = Path(__file__).parents[1] / "docs" / "results" / "ablations.md"
STUDIES = ("adam-sgd", "positions", "scaling", "class-token", "head-type")
SECTION = re.compile(r"(<!-- made: ([a-z-]+) -->\n).*?(<!-- made: end -->)", re.DOTALL)
Table = list[list[str]]

# ViT (2010.11929) Table 7: accuracy after fine-tuning, %; the mean is over its data sets
TABLE_7 = {
    "ResNet50, ImageNet": (77.54, 78.24),
    "ResNet50, mean": (89.33, 88.79),
    "ResNet152x2, ImageNet": (84.97, 84.37),
    "ResNet152x2, mean": (94.01, 93.72),
}
# Table 8: ImageNet 5-shot accuracy of ViT-B/16
TABLE_8 = {
    "1d": 64.206,
    "none": 61.382,
    "1d-every-layer": 63.964,
    "1d-shared": 64.292,
    "2d": 64.001,
    "2d-every-layer": 64.046,
    "2d-shared": 64.022,
    "relative": 64.032,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="holds a folder for each study of configs/ablations/")
    parser.add_argument("--page", type=Path, default=PAGE)
    words = parser.parse_args()
    there = [name for name in STUDIES if (words.runs / name / "study.yaml").is_file()]
    if not there:
        raise SystemExit(f"{words.runs}: none of {', '.join(STUDIES)} there; scripts/ablations.sh runs them")
    sections = {name: section(name, words.runs / name, beside=words.page.parent) for name in there}
    write_text(words.page, filled(words.page.read_text(encoding="utf-8"), sections))
    print(f"{words.page}: {', '.join(sections)}; left as they were: {', '.join(set(STUDIES) - set(there)) or 'none'}")


def filled(page: str, sections: Mapping[str, str]) -> str:
    """Return the page with what lies between its marks replaced where there is something new; every study needs a place."""
    places = [found[2] for found in SECTION.finditer(page)]
    if sorted(places) != sorted(STUDIES):
        raise SystemExit(f"the page has marks for {', '.join(places)}; expected one each for {', '.join(STUDIES)}")
    return SECTION.sub(lambda found: f"{found[1]}{sections[found[2]]}\n{found[3]}" if found[2] in sections else found[0], page)


def section(name: str, folder: Path, *, beside: Path) -> str:
    """Return one study's table and what made it, and put its figure beside the page."""
    study = plan_study(folder / "study.yaml", [], out=folder, say=lambda _: None)
    summary = summary_of(study, measure(study))
    record = read_json(folder / "study.json") or {}
    if len(summary.families) == 2:
        parts = [as_markdown(two_arms(summary, record, TABLE_7 if name == "adam-sgd" else {}))]
    else:
        parts = [as_markdown(many_arms(summary, TABLE_8 if name == "positions" else {}))]
        parts += [lesson(study, summary)] if name == "class-token" else []
        parts += list(picture(name, folder, beside=beside, caption=f"{study.config.title}: every arm less the first"))
    return "\n\n".join(["", *parts, facts(study, summary, record), ""])


# ---------------------------------------------------------------- tables


def two_arms(summary: Summary, record: Mapping[str, Any], paper: Mapping[str, tuple[float, float]]) -> Table:
    """Return a measure in a line: both arms and their difference; below ours the paper's."""
    first, second = summary.families
    rows = [["", f"{first}, %", f"{second}, %", f"{second} less {first}, points"]]
    for metric in summary.headline:
        shares = [share(mean.estimate) for family in (first, second) for mean in summary.curve(metric, family)]
        lead = summary.leads.get(Curve(metric, PLAIN, second))
        rows.append([metric_words(metric), *(shares if len(shares) == 2 else ["", ""]), difference(lead)])
    rates = {each["family"]: (each["chosen"] or {}).get("optim.lr") for each in record.get("search", [])}
    if rates:
        rows.append(["rate chosen", *("" if rates.get(arm) is None else f"{rates[arm]:g}" for arm in (first, second)), ""])
    rows += [[f"paper: {what}", f"{a:.2f}", f"{b:.2f}", points(b - a)] for what, (a, b) in paper.items()]
    return rows


def many_arms(summary: Summary, paper: Mapping[str, float]) -> Table:
    """Return an arm in a line, against the first; beside it the paper's difference, or else what it costs."""
    table = arms_table(summary, UPSTREAM, PLAIN)
    if not paper:
        return table
    first = paper[str(summary.first_arm)]
    head, *rows = (row[:-1] for row in table)
    return [
        [*head, f"paper, less {summary.first_arm}"],
        *([*row, "" if row[0] == summary.first_arm else points(paper[row[0]] - first)] for row in rows),
    ]


def points(number: float) -> str:
    return f"{number:+.2f}".replace("-", "\N{MINUS SIGN}")


def lesson(study: Study, summary: Summary) -> str:
    """Say what the mean of the patches is worth at the class token's best rate, and at its own."""
    best = {}
    for pool in ("token", "gap"):
        curves = {arm: summary.curve(UPSTREAM, arm) for arm in summary.families if arm.startswith(f"{pool}-")}
        known = {arm: curve[0].estimate.value for arm, curve in curves.items() if curve}
        if not known:
            return ""
        best[pool] = max(known, key=lambda arm: known[arm])
    rates = {pool: arm.partition("-")[2] for pool, arm in best.items()}
    against = summarise(
        measure(study),
        title=summary.title,
        families=summary.families,
        compare=None,
        variants=[PLAIN],
        metrics=[UPSTREAM],
        one_pass=False,
        first_arm=best["token"],
    )
    same, own = (against.leads.get(Curve(UPSTREAM, PLAIN, arm)) for arm in (f"gap-{rates['token']}", best["gap"]))
    if rates["gap"] == rates["token"]:
        at = f"Both are best at {rates['token']}."
        return f"{at} There the mean of the patches has {difference(same)} points against the class token."
    return (
        f"The class token is best at {rates['token']}. Against it the mean of the patches has {difference(same)} points at "
        f"that rate, and {difference(own)} at its own best one, {rates['gap']}."
    )


# ---------------------------------------------------------------- the rest


def picture(name: str, folder: Path, *, beside: Path, caption: str) -> Iterator[str]:
    """Put the figure of a study's arms beside the page, and yield what shows it."""
    drawn = folder / "figures" / f"arms-{UPSTREAM}.png"
    if drawn.is_file():
        shutil.copyfile(drawn, beside / f"ablations-{name}.png")
        yield f"![{caption}](ablations-{name}.png)"


def facts(study: Study, summary: Summary, record: Mapping[str, Any]) -> str:
    """Say what made the numbers."""
    config = study.config
    data = study.upstreams[PLAIN]
    runs = record.get("runs", {})
    hours = sum(record.get("hours", {}).values())
    known = [mean for family in summary.families for mean in summary.curve(UPSTREAM, family)]
    seeds = {len(mean.values) for mean in known} or {0}
    source = study.settings(study.largest(PLAIN, summary.families[0])).data.source
    return (
        f"{config.sizes[0]:,} images of `{source}` ({data.num_classes} classes), {data.val_examples:,} to evaluate; "
        f"{' or '.join(map(str, sorted(seeds)))} seeds, 95 % intervals over seeds and images. "
        f"{hours:.2f} hours of training, {'; '.join(runs.get('hardware', [])) or 'hardware not on record'}; "
        f"{'; '.join(runs.get('versions', [])) or 'versions not on record'}; {str(record.get('written', ''))[:10]}."
    )


if __name__ == "__main__":
    main()

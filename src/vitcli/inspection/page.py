"""The page of `vit inspect`: its figures with words on how to read them, in one file; dressed as a run's report."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

from vitcli import __version__
from vitcli.figures import inline_svg, shorten

__all__ = ["GENERATOR", "Picture", "render"]

GENERATOR = '<meta name="generator" content="vit inspect">'  # stands in the template too, and says whose a file is
PX_PER_INCH = 96
WIDEST = 980  # px on the page


@dataclass(frozen=True)
class Picture:
    """A figure of an inspection."""

    name: str  # of its file, without the suffix
    section: str
    figure: Figure
    words: list[str]  # what it shows, and how to read it


def render(pictures: Sequence[Picture], *, name: str, headline: str, images: str, notes: Sequence[str]) -> str:
    """Return the page."""
    sections: dict[str, list[Picture]] = {}
    for picture in pictures:
        sections.setdefault(picture.section, []).append(picture)
    page = Environment(
        loader=ChoiceLoader([PackageLoader("vitcli.inspection"), PackageLoader("vitcli.report")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    ).get_template("inspection.html.jinja")
    return page.render(
        name=shorten(name, 80),
        headline=headline,
        images=images,
        notes=[shorten(note, 600) for note in notes],
        sections=[
            {"anchor": f"part{number}", "title": title, "figures": [shown(picture) for picture in parts]}
            for number, (title, parts) in enumerate(sections.items())
        ],
        version=__version__,
        made=datetime.now(UTC).isoformat(sep=" ", timespec="minutes").replace("+00:00", " UTC"),
    )


def shown(picture: Picture) -> dict[str, object]:
    """Return what the template shows of a picture; one that is wide scrolls on a phone."""
    svg = inline_svg(picture.figure, name=picture.name.replace("-", ""), description=picture.words[0])
    picture.figure.set_layout_engine("none")  # it is settled: once more, for the file, would take as long again
    wide = min(WIDEST, round(1.15 * PX_PER_INCH * picture.figure.get_size_inches()[0]))
    return {
        "svg": svg,
        "words": picture.words,
        "wide": wide,
        "least": min(wide, 620) if wide > 460 else 0,
    }

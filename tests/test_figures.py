"""Figures: whole files, any names, SVG that may stand in a page."""

import math
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from PIL import Image

from vitcli.errors import UserError
from vitcli.figures import (
    Panel,
    draw_confusion,
    draw_panels,
    draw_reliability,
    inline_svg,
    save_curves,
    save_figure,
    shorten,
    thinned,
)

LINES = {"a": [(0.0, 1.0), (10.0, 0.5)], "b": [(0.0, 0.9), (10.0, 0.4)]}
HOSTILE = [
    "</svg><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    r"$\frac{",
    "_hidden",
    "犬",
    "a\x00b\u202ec",
    "--> x",
]


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_curves_are_written_whole_and_the_same_every_time(tmp_path: Path, suffix: str) -> None:
    paths = [tmp_path / "new" / f"{name}.{suffix}" for name in ("one", "two")]
    for path in paths:
        save_curves(path, LINES, x_label="step", y_label="loss", title="Loss")
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert sorted(path.name for path in paths[0].parent.iterdir()) == [f"one.{suffix}", f"two.{suffix}"]
    if suffix == "png":
        with Image.open(paths[0]) as picture:
            assert min(picture.size) > 400
    else:
        text = paths[0].read_text()
        assert "Loss" in text
        ET.fromstring(text)


def test_another_suffix_and_a_place_that_cannot_be_written_are_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"PNG or SVG; name it x.png"):
        save_curves(tmp_path / "x.pdf", LINES, x_label="x", y_label="y")
    (tmp_path / "file").write_text("precious")
    with pytest.raises(UserError, match="cannot be written"):
        save_curves(tmp_path / "file" / "x.png", LINES, x_label="x", y_label="y")
    assert (tmp_path / "file").read_text() == "precious"


def test_a_line_of_many_points_shows_the_means_of_neighbours() -> None:
    points = [(float(x), float(x % 7)) for x in range(10_000)]
    x, y = thinned(points[::-1])
    assert 300 < len(x) <= 600
    assert (np.diff(x) > 0).all()
    assert abs(y.mean() - 3) < 0.05
    assert x[0] == np.mean(range(17))


def test_numbers_that_are_none_are_left_out() -> None:
    x, y = thinned([(0.0, 1.0), (1.0, math.nan), (2.0, math.inf), (3.0, 4.0)])
    assert x.tolist() == [0.0, 3.0]
    assert y.tolist() == [1.0, 4.0]
    assert [len(part) for part in thinned([])] == [0, 0]
    nothing = Panel({"a": []}, "x", "y", log_y=True)
    assert inline_svg(draw_panels([nothing]), name="n", description="").startswith("<svg")


@pytest.mark.parametrize("name", HOSTILE)
def test_any_name_is_text(name: str) -> None:
    curves = draw_panels([Panel({name: LINES["a"], "b": LINES["b"]}, name, name, name)])
    matrix = draw_confusion(np.eye(3, dtype=np.int64), [name, "b", "c"])
    for figure in (curves, matrix):
        text = inline_svg(figure, name="x", description=name)
        tree = ET.fromstring(text)  # well-formed, so nothing broke out
        kinds = {element.tag.rpartition("}")[2] for element in tree.iter()}
        assert not kinds & {"script", "img", "foreignObject", "style", "metadata"}
        shown = "".join(tree.itertext())
        assert shorten(name)[:9].strip() in shown


def test_svg_for_a_page_has_ids_of_its_own_and_the_pages_colour() -> None:
    one, two = (
        inline_svg(draw_panels([Panel(LINES, "x", "y")]), name=name, description='a "b" <c>') for name in ("one", "two")
    )
    ids = [{element.get("id") for element in ET.fromstring(text).iter()} - {None} for text in (one, two)]
    assert ids[0]
    assert not ids[0] & ids[1]
    for text in (one, two):
        assert "currentColor" in text
        assert "#2b2f36" not in text
        assert "http" not in text.replace("http://www.w3.org/", "")
        assert 'aria-label="a &quot;b&quot; &lt;c&gt;"' in text
    clips = [part.split(")")[0] for part in one.split("url(#")[1:]]
    assert clips
    assert set(clips) <= ids[0]
    root = ET.fromstring(one)
    assert root.get("viewBox")
    assert root.get("width") is None  # as wide as its place
    assert root.get("height") is None


@pytest.mark.parametrize("count", [2, 12, 30, 120])
def test_confusion_of_any_number_of_classes(tmp_path: Path, count: int) -> None:
    matrix = np.random.default_rng(0).integers(0, 9, (count, count))
    matrix[1] = 0  # a class without images
    save_figure(tmp_path / "matrix.png", draw_confusion(matrix, [f"class {number}" for number in range(count)]))
    with Image.open(tmp_path / "matrix.png") as picture:
        assert max(picture.size) < 3000


def test_confusion_shows_right_ones_blue_and_mistakes_orange() -> None:
    figure = draw_confusion(np.array([[3, 1], [0, 4]]), ["a", "b"])
    pixels = figure.axes[0].images[0].get_array()
    assert pixels is not None
    assert pixels[0, 0, 2] > pixels[0, 0, 0]
    assert pixels[0, 1, 0] > pixels[0, 1, 2]
    assert pixels[0, 1, 3] == pytest.approx(0.85 * 0.5)  # the root of a quarter
    assert pixels[1, 0, 3] == 0
    assert [text.get_text() for text in figure.axes[0].texts] == ["3", "1", "4"]


def heights(axes: Axes) -> list[float]:
    return [bar.get_height() for bar in axes.patches if isinstance(bar, Rectangle)]


def test_reliability_with_empty_bins() -> None:
    nan = math.nan
    figure = draw_reliability(np.array([nan, 0.4, 0.9]), np.array([nan, 0.5, 0.8]), np.array([0, 10, 30]))
    assert heights(figure.axes[0]) == [0.5, 0.8]
    assert heights(figure.axes[1]) == [0, 0.25, 0.75]


def test_a_sweep_has_a_tick_at_each_rate() -> None:
    panel = Panel(
        {"dev": [(0.001, 0.5), (0.003, 0.6), (0.01, 0.7)]}, "learning rate", "top-1", percent=True, log_x=True, points=True
    )
    text = "".join(ET.fromstring(inline_svg(draw_panels([panel]), name="s", description="")).itertext())
    for rate in ("0.001", "0.003", "0.01"):
        assert rate in text
    assert " %" in text


def test_no_window_system_and_no_global_state() -> None:
    code = "import sys, vitcli.figures; print('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"

"""The picture of a placement shows the arrows that the placement has."""

import pytest
from matplotlib.text import Annotation

from alexnet.reports.placement_picture import ACROSS, draw_placement, save_placement
from grouped_conv_jax.models import AlexNetConfig
from grouped_conv_jax.towers import make_mesh


def arrows(figure, colour):
    """Columns that arrows of a colour lead to, and how many."""
    found = [text for text in figure.axes[0].texts if isinstance(text, Annotation)]
    columns = [
        round(arrow.xy[0])
        for arrow in found
        if arrow.arrowprops["color"] == colour  # type: ignore
    ]
    return {column: columns.count(column) for column in columns}


@pytest.mark.parametrize(
    ("data", "group", "towers", "across", "to_logits"),
    [(1, 1, 2, 0, 0), (1, 2, 2, 2, 2), (2, 2, 2, 4, 4), (1, 2, 4, 8, 4), (2, 4, 4, 24, 8)],
)
def test_arrows_between_devices(data, group, towers, across, to_logits):
    figure = draw_placement(make_mesh(data, group), AlexNetConfig.paper(towers=towers))
    expected = {3: across, 6: across, 7: across, 8: to_logits}
    assert arrows(figure, ACROSS) == {k: n for k, n in expected.items() if n}


def texts(figure):
    return [text.get_text() for text in figure.axes[0].texts]


def test_what_is_written():
    figure = draw_placement(make_mesh(4, 2), AlexNetConfig.paper())
    written = texts(figure)
    for text in ("device 0", "device 3", "batch\n1 of 4", "21,632", "4,608", "sum\n1,000"):
        assert text in written
    assert any("30,483,112 numbers" in text and "2 more copies" in text for text in written)


def test_the_same_placement_gives_the_same_file(tmp_path):
    for name in ("a.svg", "b.svg"):
        save_placement(tmp_path / name, make_mesh(1, 2), AlexNetConfig.small())
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    save_placement(tmp_path / "c.png", make_mesh(1, 2), AlexNetConfig.small())
    assert (tmp_path / "c.png").stat().st_size > 10_000

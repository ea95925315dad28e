"""The drawings say what the operation and the net say of their shapes, and are those in docs."""

import html
import re
from collections import Counter
from pathlib import Path

import draw_convolutions
import jax
import pytest

from drawings.convolution import draw_convolution
from drawings.shapes import convolution, layers
from drawings.two_towers import draw_towers
from grouped_conv_jax import grouped_conv
from grouped_conv_jax.models import AlexNetConfig

DOCS = Path(__file__).parents[2] / "docs"
TIMES = " \N{MULTIPLICATION SIGN} "


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("drawn")
    draw_convolutions.save_drawings(draw_convolutions.Options(folder))
    return folder


def texts(figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts if text.get_text()]


def texts_of(path: Path) -> list[str]:
    """Returns the lines of text in an SVG."""
    found = re.findall(r"<text[^>]*>(.+?)</text>", path.read_text().replace("\n", ""))
    return [html.unescape(re.sub(r"<[^>]+>", "", text)).strip() for text in found]


def out_shape(lhs: tuple[int, ...], rhs: tuple[int, ...], groups: int) -> tuple[int, ...]:
    """Of a convolution without padding, one example."""

    def conv(x, w):
        layout = ("NHWC", "HWIO", "NHWC")
        return grouped_conv(
            x, w, (1, 1), "VALID", dimension_numbers=layout, feature_group_count=groups
        )

    operands = (jax.ShapeDtypeStruct(shape, "float32") for shape in ((1, *lhs), rhs))
    return jax.eval_shape(conv, *operands).shape[1:]


@pytest.mark.parametrize(
    ("name", "lhs", "rhs", "groups"),
    [
        ("standard", (7, 7, 3), (3, 3, 3, 128), 1),
        ("grouped", (7, 7, 4), (3, 3, 2, 128), 2),
        ("depthwise", (7, 7, 3), (3, 3, 1, 3), 3),
    ],
)
def test_the_texts_are_the_shapes_of_the_operation(drawn, name, lhs, rhs, groups):
    written = texts_of(drawn / f"{name}.svg")
    out = out_shape(lhs, rhs, groups)
    of_group = (*out[:2], out[2] // groups)
    assert lhs[2] == groups * rhs[2]
    for sizes in (lhs, out):
        assert TIMES.join(map(str, sizes)) in written
    for sizes in ((*lhs[:2], rhs[2]), rhs[:3], of_group):
        assert any(text.endswith(TIMES.join(map(str, sizes))) for text in written)
    # Along the edges: of each input, the first filter and the output of each group, and the joined.
    edges = Counter()
    for sizes in ((*lhs[:2], rhs[2]), rhs[:3], of_group):
        edges.update({str(size): sizes.count(size) * groups for size in set(sizes)})
    if groups > 1:
        edges.update(map(str, (*lhs, *out)))
    assert Counter(text for text in written if text.isdigit()) == edges
    filters = [text for text in written if re.fullmatch(r"filter \d+", text)]
    assert f"filter {out[2]}" in filters
    assert {f"filter {1 + group * of_group[2]}" for group in range(groups)} <= set(filters)


def test_other_shapes_give_other_texts():
    written = texts(draw_convolution(convolution(9, 8, 5, 16, 2), "title"))
    for text in ("9 x 9 x 8", "each 9 x 9 x 4", "each 8 filters of 5 x 5 x 4", "5 x 5 x 16"):
        assert text.replace(" x ", TIMES) in written
    (caption,) = (text for text in written if text.startswith("kernel"))
    weights = 5 * 5 * 4 * 16
    assert f"{weights:,} weights, {weights * 25:,} multiply-adds" in caption
    assert f"with one group {2 * weights:,} and {2 * weights * 25:,}" in caption


def test_the_layers_are_those_of_the_net():
    config = AlexNetConfig.paper()
    found = {layer.name: layer for layer in layers(config)}
    assert tuple(found) == config.convolution_names + config.dense_names
    assert [found[name].lhs[0] for name in config.convolution_names] == list(config.edges[:-1])
    kernels = {name: layer.rhs for name, layer in found.items()}
    assert kernels["conv2"] == (5, 5, 48, 256)
    assert kernels["fc6"] == (9216, 4096)
    assert [name for name, layer in found.items() if layer.groups == 2] == [
        "conv2",
        "conv4",
        "conv5",
    ]
    assert [name for name, layer in found.items() if layer.is_pooled] == ["conv1", "conv2", "conv5"]
    assert [layer.strides for layer in found.values()] == [4] + [1] * 7


def arrows(figure, colour: str) -> int:
    patches = (text.arrow_patch for text in figure.axes[0].texts if hasattr(text, "arrow_patch"))
    return sum(p.get_edgecolor()[:3] == pytest.approx(rgb(colour)) for p in patches)


def rgb(colour: str) -> tuple[float, ...]:
    return tuple(int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))


@pytest.mark.parametrize(("towers", "across"), [(1, 0), (2, 8), (4, 40)])
def test_where_the_towers_talk(towers, across):
    """At conv3, fc6 and fc7 each to each other, at fc8 all to the logits."""
    config = AlexNetConfig.small(towers=towers)
    figure = draw_towers(layers(config), config.towers)
    assert texts(figure).count("all towers") == (4 if towers > 1 else 0)
    assert texts(figure).count(f"{towers} groups") == (3 if towers > 1 else 0)
    assert arrows(figure, "#bb2233") == across
    sizes = [conv.features // towers for conv in config.convolutions]
    assert all(texts(figure).count(str(size)) >= towers for size in sizes)


def test_the_towers_of_the_paper(drawn):
    written = Counter(texts_of(drawn / "two-towers.svg"))
    # Two edges of each of two towers; conv3 to conv5 have 13 x 13.
    assert {text: written[text] for text in ("224", "55", "27", "13")} == {
        "224": 2,
        "55": 4,
        "27": 4,
        "13": 12,
    }
    assert {text: written[text] for text in ("48", "128", "192", "2,048", "1,000")} == {
        "48": 2,
        "128": 4,
        "192": 4,
        "2,048": 4,
        "1,000": 1,
    }
    assert written["stride 4"] == 1
    assert written[TIMES.join(["11", "11", "3"])] == 1


def test_the_pictures_in_docs_are_these(drawn):
    """But for outlines, which depend on the version of matplotlib."""
    for name in draw_convolutions.DRAWINGS:
        assert texts_of(DOCS / f"{name}.svg") == texts_of(drawn / f"{name}.svg")


def test_the_same_drawing_gives_the_same_file(drawn, tmp_path):
    draw_convolutions.save_drawings(draw_convolutions.Options(tmp_path))
    for name in draw_convolutions.DRAWINGS:
        assert (tmp_path / f"{name}.svg").read_bytes() == (drawn / f"{name}.svg").read_bytes()


def test_no_text_covers_another():
    """In the places that matplotlib gives them."""
    for draw, _ in draw_convolutions.DRAWINGS.values():
        figure = draw()
        figure.canvas.draw()
        boxes = [
            (text.get_text(), text.get_window_extent())
            for text in figure.axes[0].texts
            if text.get_text()
        ]
        for i, (one, box) in enumerate(boxes):
            assert figure.bbox.containsx(box.x0), one
            assert figure.bbox.containsx(box.x1), one
            for other, another in boxes[:i]:
                assert not box.overlaps(another), (one, other)

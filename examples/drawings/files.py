"""Writes figures of matplotlib into small files that are the same each time."""

import io
import re
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

LINE = 500
"""Characters in a line of an SVG, at least: version control compares lines."""


def save(
    figure: Figure,
    path: Path,
    settings: dict[Any, Any],
    title: str = "",
    description: str = "",
) -> None:
    """Writes a figure; the suffix of `path` names the format, such as .svg or .png.

    The letters of an SVG are text, in a font of the reader.

    Args:
      figure: what is drawn.
      path: the file.
      settings: settings of matplotlib.
      title: the title of an SVG.
      description: what an SVG shows, for those who cannot see it.
    """
    if path.suffix != ".svg":
        with matplotlib.rc_context(settings):
            figure.savefig(path)
        return
    # Without a date and random names, the same figure gives the same file.
    settings = settings | {"svg.hashsalt": "drawing", "svg.fonttype": "none"}
    written = io.StringIO()
    with matplotlib.rc_context(settings):
        metadata = {"Date": None, "Title": title, "Description": description}
        figure.savefig(written, format="svg", metadata=metadata)
    path.write_text(compact(written.getvalue()))


def compact(svg: str) -> str:
    """Returns an SVG without what matplotlib writes for editors only, in few lines."""
    title, description = (
        re.findall(rf"<dc:{name}>([^<]+)</dc:{name}>", svg)[:1] for name in ("title", "description")
    )
    svg = re.sub(r"<metadata>.*?</metadata>|<title>.*?</title>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->|<\?xml.*?\?>|<!DOCTYPE.*?>", "", svg, flags=re.DOTALL)
    # Names of groups that nothing refers to.
    svg = re.sub(r'<g id="[a-z]+_[\d_a-z]+">', "<g>", svg)
    svg = re.sub(r'="[^"]*"', _short, re.sub(r"\s+", " ", svg)).replace("> <", "><")
    heading = "".join(
        f"<{tag}>{' '.join(found[0].split())}</{tag}>"
        for tag, found in (("title", title), ("desc", description))
        if found
    )
    svg = re.sub(r"(<svg[^>]*>)", lambda start: start[1] + heading, svg.strip(), count=1)
    # A line ends at a tag.
    return re.sub(rf"(.{{{LINE}}}[^>]*>)(?=<)", r"\1\n", svg) + "\n"


def _short(attribute: re.Match) -> str:
    """Returns an attribute with two decimals, and without space that has no meaning."""
    value = re.sub(r"(\d\.\d{2})\d+", r"\1", attribute[0])
    return value.replace(' "', '"').replace("; ", ";").replace(": ", ":")

"""Links code to the reference: names of this library, wherever they are written as code.

So pages are plain Markdown, that reads as well where there is no site, and so are docstrings.
"""

import re
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform

PACKAGE = "grouped_conv_jax"


class LinkCode(SphinxPostTransform):
    """Makes each literal that is a documented name, with or without its module, a link to it."""

    default_priority = 50

    def run(self, **kwargs: Any) -> None:
        objects = self.env.domains.python_domain.objects
        for literal in list(self.document.findall(nodes.literal)):
            if isinstance(literal.parent, nodes.reference):
                continue
            name = full_name(literal.astext(), objects)
            if name is None:
                continue
            entry = objects[name]
            uri = self.app.builder.get_relative_uri(self.env.docname, entry.docname)
            link = nodes.reference("", "", internal=True, refuri=f"{uri}#{entry.node_id}")
            literal.replace_self(link)
            link += literal


def full_name(code: str, objects: Any) -> str | None:
    """The documented name that a piece of code is; None if it is none."""
    if (found := re.fullmatch(r"([A-Za-z_][\w.]*)(?:\(\))?", code)) is None:
        return None
    name = found[1]
    candidates = [name, f"{PACKAGE}.{name}"]
    candidates += [f"{PACKAGE}.{module}.{name}" for module in ("weights", "models", "nnx")]
    return next((n for n in candidates if n in objects), None)


def setup(app: Sphinx) -> dict[str, Any]:
    """Registers it with Sphinx."""
    app.add_post_transform(LinkCode)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

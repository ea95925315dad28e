"""The documentation site: Sphinx with MyST.

sphinx-build -W --keep-going -n -b html docs build/site
"""

import inspect
import re
import sys
from pathlib import Path
from typing import Any

from sphinx.util import logging
from sphinx.util.inspect import stringify_signature

sys.path.insert(0, str(Path(__file__).parent))

from grouped_conv_jax import __version__

logger = logging.getLogger(__name__)

project = "grouped_conv_jax"
release = version = __version__
copyright = "the authors of grouped_conv_jax"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "code_links"]
exclude_patterns = ["build", "_build"]
html_theme = "furo"
html_title = "grouped_conv_jax"

# Headings can be linked to as on a code host.
myst_heading_anchors = 3

# A word in single backquotes is code; `code_links` links those that are names of this library.
default_role = "code"

napoleon_numpy_docstring = False
# Sentences: what stands before a colon there is no type.
napoleon_custom_sections = ["Returns"]

# Docstrings say shapes and dtypes, which annotations do not.
autodoc_typehints = "none"
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
python_maximum_signature_line_length = 80

# What belongs to others is not in this site, and the site is built without a network to look them
# up. Names of this library must all resolve.
_others = "jax|jaxlib|flax|numpy|collections|types|typing|dataclasses|os|pathlib"
nitpick_ignore_regex = [
    (r"py:.*", rf"({_others})\..*"),
    (r"py:.*", r"(Any|Callable|Literal|Mapping|Sequence|optional)"),
]


# How Python prints what stands in signatures, and what one writes for it.
_readable = (
    (r"<function variance_scaling\.<locals>\.init>", "lecun_normal()"),
    (r", parent=<flax\.linen\.module\._Sentinel object>", ""),  # Flax passes it on by itself.
    (r"<function (\w+)>", r"\1"),
    (r"<class '([\w.]+)'>", r"\1"),
    (r"\bjax\._src\.mesh\.", "jax.sharding."),
    (r"\bflax\.nnx\.(?:rnglib|module)\.", "flax.nnx."),
)


def readable(text: str) -> str:
    for printed, written in _readable:
        text = re.sub(printed, written, text)
    return text


def as_sphinx_reads_it(
    app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """What is plain text in a docstring, but not to Sphinx, outside of code.

    A star before a word, as in (*batch, features), is no emphasis, and a letter that is a sentence
    ("G. Divides the features.") is not the number of a list.
    """
    for number, line in enumerate(lines):
        if not line.lstrip().startswith((">>>", "...")):
            parts = line.split("`")
            parts[::2] = [re.sub(r"(?<![\w*\\])\*(?=\w)", r"\\*", part) for part in parts[::2]]
            lines[number] = re.sub(r"(^ *|: )([A-Z])\. ", r"\1\2\\. ", "`".join(parts))
        if line.lstrip().startswith(":type:"):
            lines[number] = readable(line)


def signature_as_written(
    app: Any, what: str, name: str, obj: Any, options: Any, args: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """With defaults that can be read; of a class of Flax nnx that of what makes it."""
    if args is None:
        return args, returns
    # Its metaclass takes everything.
    if what == "class" and args.startswith("(*args"):
        signature = inspect.signature(obj.__init__)
        own = [p for p in signature.parameters.values() if p.name != "self"]
        signature = signature.replace(parameters=own)
        args, returns = stringify_signature(signature, show_annotation=False), None
    args = readable(args)
    if "<" in args:
        logger.warning("%s has a default that nobody can read: %s", name, args)
    return args, returns


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", as_sphinx_reads_it)
    app.connect("autodoc-process-signature", signature_as_written)

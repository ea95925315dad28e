"""The pages' code runs as printed, and the reference has every public name, told in full."""

import functools
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import jax.numpy as jnp
import pytest

import grouped_conv_jax
from grouped_conv_jax import native
from grouped_conv_jax.algorithms.table import TABLE

DOCS = Path(__file__).parents[2] / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
TEXTS = {page: (DOCS / page).read_text() for page in PAGES}

MODULES = ("collectives", "linen", "models", "native", "nnx", "placement", "towers", "weights")
"""Public ones, beside the package itself."""

INNER = {"native": ("FAILURE", "FOLDER", "LIBRARY", "target")}
"""Names of public modules that are for the package's own use."""


WITHOUT_EXAMPLE = re.compile(
    r"Explanation|Collective|Exchange|Row|Memory|PlacementReport"  # What functions return.
    r"|AlexNetConfig|ConvLayer|make_mesh"  # In the examples of AlexNet and TowerNet.
    r"|instruction_sets?|use_instruction_set|missing"  # They depend on the machine.
)


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXTS[page], re.DOTALL)


WITH_CODE = [page for page in PAGES if blocks(page, "python") and page != "migration.md"]
"""Those whose code needs no other library; test_migration runs that page's."""


@pytest.mark.parametrize("page", WITH_CODE)
def test_the_code_of_a_page_runs_in_order(page, tmp_path, monkeypatch):
    # The page names an instruction set, and setting one that is missing is an error.
    if page == "native.md" and "avx2" not in native.instruction_sets():
        pytest.skip("it uses instructions that this processor, or this build, has not")
    if page == "tpu.md":
        pytest.importorskip("libtpu", reason="it compiles for a TPU, which needs libtpu")
    monkeypatch.chdir(tmp_path)
    known = set(TABLE)
    names: dict[str, Any] = {}
    try:
        for block in blocks(page, "python"):
            exec(compile(block, page, "exec"), names)
    finally:
        for name in set(TABLE) - known:  # A page registers one, which other tests need not know.
            del TABLE[name]
        if page == "native.md":
            native.use_instruction_set(native.instruction_sets()[0])


def test_most_pages_have_code():
    assert len(WITH_CODE) >= 16


def test_the_error_message_is_as_printed(capsys):
    page = "operation.md"
    (block,) = (block for block in blocks(page, "python") if "except ValueError" in block)
    exec(block, {"grouped_conv": grouped_conv_jax.grouped_conv, "jnp": jnp})
    assert capsys.readouterr().out in blocks(page, "text")


# The reference.


def public_names() -> Iterator[tuple[str, Any]]:
    """Every public class and function by its full name, of the package and of its modules."""
    for name in grouped_conv_jax.__all__:
        value = getattr(grouped_conv_jax, name)
        if not isinstance(value, str | ModuleType):
            yield f"grouped_conv_jax.{name}", value
    for name in MODULES:
        module = importlib.import_module(f"grouped_conv_jax.{name}")
        for member in getattr(module, "__all__", None) or own_names(module):
            if member not in INNER.get(name, ()):
                yield f"{module.__name__}.{member}", getattr(module, member)


def own_names(module: ModuleType) -> list[str]:
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and callable(value)
        and getattr(value, "__module__", None) == module.__name__
    ]


def documented_names() -> set[str]:
    """What the directives of the reference name, by their current module."""
    names = set()
    for page in PAGES:
        module = ""
        for directive, argument in re.findall(r"^\.\. ([\w:]+):: ([\w.]+)", TEXTS[page], re.M):
            if directive in ("currentmodule", "automodule"):
                module = argument
            elif argument.startswith("grouped_conv_jax"):
                names.add(argument)
            else:
                names.add(f"{module}.{argument}")
    return names


def test_the_reference_has_every_public_name():
    documented = documented_names()
    values = {id(value_of(name)) for name in documented}
    for name, value in public_names():
        assert name in documented or id(value) in values, name


def value_of(name: str) -> Any:
    """What a documented name means; an error if it means nothing."""
    module, member = name.rsplit(".", 1)
    return getattr(importlib.import_module(module), member)


def documented_classes() -> dict[str, re.Match[str]]:
    """What the reference says of each class: its options and what is written under it."""
    found = {}
    for page in PAGES:
        # A directive's own lines are indented; the last one may be the first of the next module.
        for module in re.split(r"^\.\. (?:currentmodule|automodule):: ", TEXTS[page], flags=re.M):
            for match in re.finditer(r"^\.\. autoclass:: (\S+)\n((?:   .*\n|\n)*)", module, re.M):
                prefix = "" if match[1].startswith("grouped") else f"{module.split()[0]}."
                found[prefix + match[1]] = match
    return found


def own_members(cls: type) -> list[str]:
    """Public methods and properties; what it has from elsewhere is not its own."""
    kinds = (FunctionType, classmethod, property, functools.cached_property)
    fields = inspect.get_annotations(cls)  # Functions that are the default of one are no methods.
    return [
        name
        for name, value in vars(cls).items()
        if isinstance(value, kinds) and not name.startswith("_") and name not in fields
    ]


PUBLIC_CLASSES = {
    name: match
    for name, match in documented_classes().items()
    if any(value_of(name) is value for _, value in public_names())
}
"""The others are told as far as results of functions are of them."""


@pytest.mark.parametrize("name", PUBLIC_CLASSES)
def test_the_reference_has_every_member_of_a_class(name):
    match = PUBLIC_CLASSES[name]
    told = set(re.findall(r"^   \.\. [\w:]+:: (\w+)", match[2], re.M))
    options = dict(re.findall(r"^   :([\w-]+):(.*)", match[2], re.M))
    listed = set(re.findall(r"\w+", options.get("members", "")))
    excluded = set(re.findall(r"\w+", options.get("exclude-members", "")))
    cls = value_of(name)
    for member in own_members(cls):
        # Sphinx leaves out what has no docstring, without a word.
        is_told = bool(inspect.getdoc(inspect.getattr_static(cls, member)))
        takes_all = "members" in options and not listed
        by_option = member in listed or (takes_all and member not in excluded)
        assert member in told or (by_option and is_told), f"{name}.{member}"


OPERATIONS = [
    name
    for name in grouped_conv_jax.__all__
    if name.startswith(("grouped_conv", "streaming_conv", "channel", "count_"))
]
"""Functions, each of which is told in full."""


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_is_told_in_full(name):
    function = getattr(grouped_conv_jax, name)
    text = inspect.getdoc(function) or ""
    for heading in ("Args:", "Returns:", "Raises:", "Example:", ">>> "):
        assert heading in text
    for parameter in inspect.signature(function).parameters.values():
        stars = "*" * (parameter.kind == inspect.Parameter.VAR_POSITIONAL)
        assert f"\n  {stars}{parameter.name}: " in text, parameter.name


@pytest.mark.parametrize(("name", "value"), list(public_names()))
def test_a_public_name_is_told(name, value):
    if not (inspect.isclass(value) or inspect.isfunction(value)):
        return
    text = inspect.getdoc(value) or ""
    summary = text.split("\n\n")[0]
    assert summary.endswith(".")
    assert len(summary.splitlines()) <= 2
    if not WITHOUT_EXAMPLE.fullmatch(name.rpartition(".")[2]):
        assert "\n>>> " in text or "\n  >>> " in text
    is_layer = name.startswith(("grouped_conv_jax.nnx", "grouped_conv_jax.linen"))
    if is_layer:
        for heading in (" Args:" if "nnx" in name else "Attributes", "Raises:", "Example:", ">>> "):
            assert heading.strip() in text, heading


# Links.


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", TEXTS[page]):
        if not target.startswith("http"):
            assert ((DOCS / page).parent / target).exists(), target


def test_every_page_is_in_the_contents():
    listed = {"index.md"}
    for page in PAGES:
        folder = (DOCS / page).parent
        for block in blocks(page, r"\{toctree\}"):
            entries = [line for line in block.splitlines() if line and not line.startswith(":")]
            listed |= {f"{(folder / entry).relative_to(DOCS).as_posix()}.md" for entry in entries}
    assert listed == set(PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_names_in_the_text_are_there(page):
    """What is called by its full name."""
    for name in re.findall(r"`(grouped_conv_jax(?:\.\w+)+)`", TEXTS[page]):
        module, _, member = name.rpartition(".")
        try:
            importlib.import_module(name)
        except ImportError:
            assert hasattr(importlib.import_module(module), member), name


def test_modules_that_the_architecture_names_are_there():
    package = Path(grouped_conv_jax.__file__).parent
    for name in re.findall(r"`([\w/]+(?:\.py|/))`", TEXTS["architecture.md"]):
        assert (package / name).exists() or (package.parent / name).exists(), name

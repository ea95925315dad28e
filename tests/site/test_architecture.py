"""The layers of the package, from the top down; each may import what stands below it only."""

import ast
from collections.abc import Iterator
from pathlib import Path

import grouped_conv_jax

PACKAGE = Path(grouped_conv_jax.__file__).parent

LAYERS = (
    {"__init__"},
    {"models"},
    {"towers", "placement", "collectives", "nnx", "linen"},
    {"parallel", "weights", "tuning", "layers"},
    {"counting", "rules", "operations"},
    {"primitive"},
    {"partitioning"},
    {"algorithms"},
    {"native", "jax_compat"},
    {"spec"},
    {"incidence", "text", "version"},
)
LAYER_OF = {name: i for i, names in enumerate(LAYERS) for name in names}


def room(module: str) -> str:
    """Returns the folder, or the module of the root, that a module is in."""
    return module.split(".")[1] if "." in module else "__init__"


def imports(source: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(source.read_text())):
        if not isinstance(node, ast.ImportFrom) or node.module is None:
            continue
        if node.module == "grouped_conv_jax":
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif node.module.startswith("grouped_conv_jax"):
            yield node.module


def test_every_folder_and_module_has_its_layer():
    found = {
        path.stem
        for path in PACKAGE.iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert found == set(LAYER_OF)


def test_imports_go_down():
    for source in PACKAGE.rglob("*.py"):
        here = source.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for module in imports(source):
            there = room(module)
            if there != here:
                assert LAYER_OF[here] < LAYER_OF[there], (str(source), module)


def test_the_drawing_has_every_folder():
    drawing = (PACKAGE.parent / "docs" / "architecture.svg").read_text()
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert all(folder in drawing for folder in folders)

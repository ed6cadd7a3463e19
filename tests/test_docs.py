"""What the documentation says works: its commands, its Python, and the files that it names."""

import ast
import importlib.util
import re
import shlex
from pathlib import Path

import pytest
from conftest import job
from typer.main import get_command
from typer.testing import CliRunner

import mlxquant
from mlxquant.cli import app

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", DOCS / "api.md", DOCS / "methods.md",
         DOCS / "small-model.md"]
SLOW = {"serve", "tune"}  # one never ends, the other takes a thousand steps: only read
LARGE = {"small-model.md"}  # its model is not the tiny one
SMALL_TEXT = ["--samples", "4", "--sequence-length", "64", "--data", "train.txt"]
FEW_WINDOWS = ["--context", "64", "--windows", "2"]
SMALL = {"quantize": SMALL_TEXT, "evaluate": FEW_WINDOWS,  # the last of two options counts
         "compare": [*SMALL_TEXT, *FEW_WINDOWS, "--methods", "rtn,gptq", "--bits", "4"]}
STANDS_FOR = {"MODEL": "smollm2-135m", "DIR": "small", "OUT": "new", "FILE": "test.txt",
              "TEXT": "hello"}


def blocks(page: Path, *kinds: str) -> list[str]:
    """The fenced blocks of a page that say they are one of ``kinds``."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"),
                       re.MULTILINE | re.DOTALL)
    return [text for kind, text in found if kind in kinds]


def commands() -> list[tuple[str, list[str]]]:
    """Every call of ours in the pages, as the words after its name.

    What follows two blanks or a # is a remark; a line that ends in a backslash goes on.
    """
    found = []
    for page in PAGES:
        for text in blocks(page, "", "sh", "bash", "console"):
            for line in text.replace("\\\n", " ").splitlines():
                line = re.sub(r"^(\$ )?(\.venv/bin/)?", "", line)
                if line.startswith("mlxquant "):
                    words = shlex.split(re.split(r"(?<=\S)  +|\s#", line)[0])[1:]
                    found.append((page.name, [_filled(word) for word in words]))
    return found


def _filled(word: str) -> str:
    word = word.strip("[]")
    return STANDS_FOR.get(word, word)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, tiny_folder):
    """A folder where the names that the pages use are there, and small."""
    folder = tmp_path_factory.mktemp("workplace")
    (folder / "smollm2-135m").symlink_to(tiny_folder)
    words = "the cat sat on the mat while rain fell and nobody minded it at all, said the other "
    for name in ("test.txt", "train.txt", "text.txt", "wikitext2-raw-test.txt"):
        (folder / name).write_text((words * 1200)[len(name):])
    mlxquant.quantize(str(tiny_folder), folder / "small", job(method="rtn", bits=4))
    return folder


@pytest.mark.parametrize("page,words", commands(),
                         ids=lambda value: " ".join(value) if isinstance(value, list) else value)
def test_every_command_works(workplace, monkeypatch, tmp_path, page, words):
    verb = get_command(app).commands[words[0]]
    verb.make_context(words[0], words[1:])  # every option is there and takes what it is given
    if words[0] in SLOW or page in LARGE:
        return
    for path in workplace.iterdir():
        (tmp_path / path.name).symlink_to(path)
    if {"-o", "--output"} & set(words):
        output = words[words.index("-o" if "-o" in words else "--output") + 1]
        (tmp_path / output).unlink(missing_ok=True)
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, [*words, *SMALL.get(words[0], [])], input="/exit\n")
    assert result.exit_code == 0, (result.output, result.exception)
    assert result.stdout or words[0] == "chat"


def test_makes_targets_exist():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    asked = [name for page in PAGES for text in blocks(page, "", "sh", "bash", "console")
             for name in re.findall(r"^(?:\$ )?make ([\w-]+)", text, re.MULTILINE)]
    assert asked and set(asked) <= set(targets)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")],
                         ids=lambda page: page.name)
def test_python_examples_run(workplace, monkeypatch, tmp_path, page, capsys):
    for path in workplace.iterdir():
        if path.name != "small":
            (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for text in blocks(page, "python"):
        exec(compile(text, str(page), "exec"), names)
    assert capsys.readouterr().out


def test_the_examples_cover_the_public_functions():
    examples = "\n".join(text for page in PAGES for text in blocks(page, "python"))
    functions = {name for name in mlxquant.__all__ if name[0].islower()}
    assert functions - set(re.findall(r"mlxquant\.(\w+)\(", examples)) == set()


def test_the_command_line_reference_is_up_to_date():
    spec = importlib.util.spec_from_file_location("make_cli", ROOT / "docs" / "make_cli.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    written = module.TARGET.read_text(encoding="utf-8")
    assert written == module.reference(), "run python docs/make_cli.py"


@pytest.mark.parametrize("page", [*PAGES, *sorted(DOCS.glob("*.md"))], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for path, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([\w-]+))?\)",
                                   page.read_text(encoding="utf-8")):
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name} links to {path}"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}
            assert anchor in anchors, f"{page.name} links to {path}#{anchor}"


@pytest.mark.parametrize("page", [ROOT / "CONTRIBUTING.md", DOCS / "architecture.md"],
                         ids=lambda page: page.name)
def test_files_and_functions_that_pages_name_exist(page):
    text = page.read_text(encoding="utf-8").partition("<!-- files -->")[0]
    for path, name in re.findall(r"`([a-z]\w*/[a-z_/]+\.py)`(?:\s+`(\w+)`)?", text):
        file = next((f for f in (ROOT / "mlxquant" / path, ROOT / path) if f.exists()), None)
        assert file is not None, f"{page.name} names {path}"
        defined = {node.name for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
                   if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        assert not name or name in defined, f"{page.name} names {name} in {path}"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150

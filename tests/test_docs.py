"""What the documentation shows works as it stands there, and the site builds.

A page's blocks are run in order, in one empty folder: a block with a ``title`` is written to that file; other
``python`` blocks run in one namespace; ``sh`` blocks are commands that succeed; ``console`` blocks are commands with
what they print, where ``...`` stands for anything. A comment before a block says that it is not run, or only
composed, and why. The time in the name of a run directory stands for the newest run in its folder.
"""

from __future__ import annotations

import doctest
import importlib.util
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from fedsim.cli import COMMANDS, HELP
from fedsim.compose import requested
from fedsim.config import CONF, GROUPS, SCHEMA, check, options
from fedsim.run import Driver
from tests.cli import QUICK, ROOT, Fedsim, only_run

DOCS = ROOT / "docs"
PAGES = sorted(
    p.relative_to(DOCS).as_posix() for p in DOCS.rglob("*.md") if p.parent.name not in ("api", "decisions", "images")
)
#: Of pages about one method or an account elsewhere the commands are composed, not run: their runs are long.
COMPOSED = ("methods/", "wandb")
BLOCK = re.compile(
    r"^(?:<!-- (?P<how>[\w ]+): (?P<why>[^>]+) -->\n)?^```(?P<language>\w+)(?P<info>[^\n]*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
TIME = re.compile(r"([\w./-]+)/\d{8}-\d{6}-[0-9a-f]{8}")


@dataclass(frozen=True)
class Block:
    """A block of code of a page.

    Attributes:
        language: As in ``` ```python ```.
        title: The file that it is, or empty.
        text: The code.
        how: ``run``, ``composed`` or ``not run``.
        line: Its first line in the page.
    """

    language: str
    title: str
    text: str
    how: str
    line: int


def blocks(page: str) -> Iterator[Block]:
    """The blocks of a page."""
    text = (DOCS / page).read_text(encoding="utf-8")
    for m in BLOCK.finditer(text):
        title = re.search(r'title="([^"]+)"', m["info"])
        how = m["how"] or ("composed" if page.startswith(COMPOSED) and m["language"] == "sh" else "run")
        line = text[: m.start("text")].count("\n")
        yield Block(m["language"], title[1] if title else "", m["text"], how, line)


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Modules that a page writes are forgotten with it."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.setattr(Driver, "_draw", lambda *_: None)  # a run takes less time than its pictures
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # a file written twice in a second would be read once
    yield
    for name in [n for n, m in sys.modules.items() if str(getattr(m, "__file__", "")).startswith(str(tmp_path))]:
        del sys.modules[name]


@pytest.mark.parametrize("page", [p for p in PAGES if any(True for _ in blocks(p))])
@pytest.mark.usefixtures("elsewhere")
def test_what_a_page_shows_works(page: str, fedsim: Fedsim, tmp_path: Path) -> None:
    namespace: dict[str, Any] = {"__name__": "page"}
    for block in blocks(page):
        where = f"{page}:{block.line}"
        assert block.how in ("run", "composed", "not run"), f"{where}: unknown marker '{block.how}'"
        if block.how == "not run":
            continue
        if block.title:
            (tmp_path / block.title).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / block.title).write_text(block.text)
            sys.modules.pop(Path(block.title).stem, None)
        elif block.language == "python":
            exec(compile("\n" * block.line + block.text, str(DOCS / page), "exec"), namespace)
        elif block.language == "yaml":
            yaml.safe_load(block.text)
        elif block.language == "sh":
            for command in commands(block.text):
                run(command, block.how, fedsim, where)
        elif block.language == "console":
            session(block.text, fedsim, where)
        else:
            assert block.language == "text", f"{where}: nothing says how to test a block in {block.language}"


def commands(text: str) -> Iterator[list[str]]:
    """The commands of a shell block; ``&&`` separates, ``\\`` continues, ``#`` comments."""
    for line in text.replace("\\\n", " ").splitlines():
        words: list[str] = []
        for word in [*shlex.split(line, comments=True), "&&"]:
            if word != "&&":
                words.append(word)
            elif words:
                yield words
                words = []


def run(words: list[str], how: str, fedsim: Fedsim, where: str) -> None:
    """Runs a command that must succeed, or composes its config."""
    assert words[0] == "fedsim", f"{where}: only fedsim is run; mark a block with {words[0]} as not run"
    args = [newest(word) for word in words[1:]]
    if how == "run":
        done = fedsim(*args)
        assert done.status == 0, f"{where}: {shlex.join(words)}: {done.err}"
    elif args[0] not in COMMANDS and not any(a.startswith("resume=") for a in args):
        for overrides in jobs(args):
            check(requested(overrides)[0])


def jobs(args: list[str]) -> Iterator[list[str]]:
    """The overrides of every job of a command line; one, unless it is a sweep."""
    given = [a for a in args if not a.startswith("-")]
    if "-m" not in args:
        yield given
        return
    choices = [
        [f"{key}={value}" for value in re.split(r",(?![^\[]*\])", values)]
        for key, _, values in (a.partition("=") for a in given)
    ]
    for job in itertools.product(*choices):
        yield [*job]


def session(text: str, fedsim: Fedsim, where: str) -> None:
    """Runs the commands of a console block and compares what they print: standard output, then standard error."""
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        command, _, expected = part.partition("\n")
        done = fedsim(*(newest(word) for word in shlex.split(command)[1:]))
        flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
        assert doctest.OutputChecker().check_output(expected, done.out + done.err, flags), (
            f"{where}: $ {command}\nexpected:\n{expected}\ngot:\n{done.out}{done.err}"
        )


def newest(word: str) -> str:
    """A word of a command, with the newest run directory of a folder in place of one that is only an example."""

    def found(m: re.Match[str]) -> str:
        runs = [c.parent for c in Path(m[1]).glob("*/config.yaml")]
        return str(max(runs, key=lambda r: r.stat().st_ctime_ns)) if runs else m[0]

    prefix, equals, path = word.rpartition("=")
    return prefix + equals + TIME.sub(found, path)


# --- completeness -----------------------------------------------------------------------------------------


def test_every_strategy_has_a_page() -> None:
    pages = {p.stem for p in (DOCS / "methods").glob("*.md")}
    missing = sorted({p.stem for p in (CONF / "strategy").glob("*.yaml")} - pages)
    assert not missing, f"write docs/methods/<name>.md for: {', '.join(missing)}"


def test_the_quickstart_names_every_file_of_a_run(fedsim: Fedsim, tmp_path: Path) -> None:
    assert fedsim(*QUICK).status == 0
    left = {p.name + "/" * p.is_dir() for p in only_run(tmp_path).iterdir() if not p.name.startswith(".")}
    section = (DOCS / "quickstart.md").read_text(encoding="utf-8").partition("## Look at the results")[2]
    named = re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE)
    assert sorted(named) == sorted(left)


def need_the_extra() -> None:
    for module in ("mkdocs", "material", "mkdocstrings", "latex2mathml"):
        pytest.importorskip(module, reason="the site needs the extra `docs`")


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    need_the_extra()
    spec = importlib.util.spec_from_file_location("docs_hooks", DOCS / "hooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_commands_are_those_of_the_command_line(hooks: ModuleType) -> None:
    page = hooks.on_page_markdown((DOCS / "commands.md").read_text(encoding="utf-8"))
    assert HELP in page
    for name, (_, text) in COMMANDS.items():
        assert f"## fedsim {name}\n" in page
        assert text in page
        assert f"fedsim {name}" in HELP, f"fedsim --help does not name {name}"


def test_config_shows_every_file_and_key(hooks: ModuleType) -> None:
    page = hooks.on_page_markdown((DOCS / "config.md").read_text(encoding="utf-8"))
    for group in GROUPS:
        assert f"## {group} " in page
        for option, path in options(group).items():
            assert f'"{group}={option}"' in page
            for line in path.read_text(encoding="utf-8").splitlines():
                assert line in page, f"{path}: {line}"
    for key in SCHEMA:
        assert re.search(rf"^ *{key.rpartition('.')[2]}:|^  - .*{key}:", page, re.MULTILINE), key


def test_patterns_of_the_navigation_take_new_pages_in(hooks: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "methods").mkdir()
    for name in ("b", "a", "index"):
        (tmp_path / "methods" / f"{name}.md").touch()
    nav = ["home.md", {"Methods": ["methods/index.md", "methods/*.md"]}, {"None": ["none/*.md"]}]
    assert hooks.expand(nav, tmp_path) == [
        "home.md",
        {"Methods": ["methods/index.md", "methods/a.md", "methods/b.md"]},
    ]


# --- the site ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    need_the_extra()
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr  # strict: a warning is a failure
    return folder


def test_the_site_builds_without_warnings_and_has_every_page(site: Path) -> None:
    pages = {p.relative_to(DOCS).with_suffix(".html") for p in DOCS.rglob("*.md") if not p.name.startswith("000")}
    assert pages <= {p.relative_to(site) for p in site.rglob("*.html")}


def test_no_page_loads_anything_from_elsewhere(site: Path) -> None:
    # A link (<a href>) is followed by the reader; these are followed by the browser.
    loads = re.compile(
        r'<(?:script|img|iframe|source|video|embed|object|link(?! rel="?canonical))\b[^>]*?'
        r'\b(?:src|href|data|srcset)="?(?:https?:)?//[^">\s]+'
    )
    styles = re.compile(r"(?:url\(|@import\s*)[\"']?(?:https?:)?//")
    hits = [f"{p.name}: {m.group()}" for p in site.rglob("*.html") for m in loads.finditer(p.read_text("utf-8"))]
    hits += [f"{p.name}: {m.group()}" for p in site.rglob("*.css") for m in styles.finditer(p.read_text("utf-8"))]
    assert hits == []


def test_every_formula_became_mathml(site: Path) -> None:
    # The converter passes on what it does not know: a command in the result is a formula that nobody can read.
    for page in site.rglob("*.html"):
        text = page.read_text("utf-8")
        assert "arithmatex" not in text, page.name
        for formula in re.findall(r"<math.*?</math>", text, re.DOTALL):
            assert "\\" not in formula, f"{page.name}: {formula}"


def test_the_api_reference_reaches_the_plug_ins(site: Path) -> None:
    for page, name in (
        ("strategy", "fedsim.strategy.Strategy"),
        ("local", "fedsim.clients.local.Local.train"),
        ("data", "fedsim.datasets.dirichlet.Dirichlet"),
        ("data", "fedsim.data.Partitioner.__call__"),
        ("index", "fedsim.experiment.simulate"),
    ):
        assert f'id="{name}"' in (site / "api" / f"{page}.html").read_text("utf-8")


# --- a method of the user's own ---------------------------------------------------------------------------


@pytest.mark.slow
def test_the_worked_strategy_obeys_the_laws(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    skip = shutil.ignore_patterns("__pycache__", "runs")
    for name in ("fedsim", "strategies", "clients", "datasets", "conf", "tests"):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=skip)
    shutil.copy(ROOT / "pyproject.toml", tree)
    for block in blocks("write-a-strategy.md"):
        if block.title == "anchored.py":
            (tree / "strategies" / "anchored.py").write_text(block.text)
        elif block.title == "conf/strategy/anchored.yaml":
            target = block.text.replace("anchored.Anchored", "fedsim.strategies.anchored.Anchored")
            (tree / "conf" / "strategy" / "anchored.yaml").write_text(target)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "0", "tests/test_conformance.py", "-k", "anchored"],
        cwd=tree,
        env={k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "PYTHONPATH"))},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\d+ passed", done.stdout)

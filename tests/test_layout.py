"""The house stands: real folders, relative links, a complete wheel, light imports."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PLUGINS = ("strategies", "clients", "datasets")
FOLDERS = (*PLUGINS, "conf")
PACKAGED = (".py", ".yaml", ".npz")
IGNORED = {"__pycache__", "build", "dist", "runs", "outputs", "multirun"}


def project_files() -> list[Path]:
    """Files of the project, each once: links are not followed."""
    found = []
    for folder, names, files in os.walk(ROOT):
        names[:] = [
            n
            for n in names
            if n not in IGNORED
            and not n.endswith(".egg-info")
            and (not n.startswith(".") or n in (".ci", ".github"))
            and not (Path(folder, n) / "pyvenv.cfg").exists()
            and not Path(folder, n).is_symlink()
        ]
        found += [Path(folder, f) for f in files]
    return found


@pytest.mark.parametrize("name", PLUGINS)
def test_a_plugin_folder_is_no_package(name: str) -> None:
    # `import datasets` from the root must find Hugging Face's: a package ./datasets would hide it.
    assert [str(p) for p in (ROOT / name).rglob("__init__.py")] == []


def test_conf_is_a_package() -> None:
    assert (ROOT / "conf" / "__init__.py").is_file()


@pytest.mark.parametrize("name", FOLDERS)
def test_links_resolve_and_are_relative(name: str) -> None:
    link = ROOT / "fedsim" / name
    assert link.is_symlink()
    assert os.readlink(link) == f"../{name}"
    assert link.resolve() == ROOT / name


@pytest.mark.parametrize("archive", ["checkout", "archive without links"])
def test_a_wheel_holds_every_file(tmp_path: Path, archive: str) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    skip = shutil.ignore_patterns("__pycache__", *(FOLDERS if archive != "checkout" else ()))
    shutil.copytree(ROOT / "fedsim", tree / "fedsim", symlinks=True, ignore=skip)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    assert (tree / "fedsim" / "conf").is_symlink() == (archive == "checkout")
    build = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        names = packed.namelist()
    assert len(names) == len(set(names))
    expected = {
        f"fedsim/{path.relative_to(ROOT / 'fedsim' if path.is_relative_to(ROOT / 'fedsim') else ROOT)}"
        for path in project_files()
        if path.relative_to(ROOT).parts[0] in ("fedsim", *FOLDERS) and path.suffix in PACKAGED
    }
    assert {n for n in names if n.endswith(PACKAGED)} == expected
    assert "fedsim/py.typed" in names
    assert not any(n.split("/")[0] in (*FOLDERS, "tests", "benchmarks") for n in names)


def in_a_fresh_process(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_datasets_is_hugging_face_s_even_from_the_root() -> None:
    # Found, not imported: importing it takes seconds.
    code = "import importlib.util; print(importlib.util.find_spec('datasets').origin)"
    origin = Path(in_a_fresh_process(code))
    assert origin.name == "__init__.py"
    assert not origin.is_relative_to(ROOT / "datasets")
    assert (origin.parent / "arrow_dataset.py").is_file()


def test_the_command_line_starts_without_heavy_imports() -> None:
    heavy = ("torch", "numpy", "matplotlib", "sklearn", "datasets", "ray", "rich", "hydra")
    code = f"import sys, fedsim.cli; print([m for m in {heavy!r} if m in sys.modules])"
    loaded = in_a_fresh_process(code)
    assert "'torch'" not in loaded and "'matplotlib'" not in loaded and "'ray'" not in loaded, loaded


def test_no_file_knows_where_it_was_written() -> None:
    # Homes, and the folder of this checkout; a slash after a letter belongs to a URL or a relative path.
    places = [r"/(home|Users|root)/[\w.]", re.escape(str(Path.home())) + r"/[\w.]"]
    places += [re.escape(str(ROOT)) + r"\b"] if len(ROOT.parts) > 2 else []
    pattern = re.compile(r"(?<![\w.~*])(" + "|".join(places) + ")")
    text = (".py", ".yaml", ".yml", ".toml", ".md", ".txt", ".json", ".cfg", ".sh", "")
    hits = [
        f"{path.relative_to(ROOT)}: {match.group()}"
        for path in project_files()
        if path.suffix in text and (match := pattern.search(path.read_text(encoding="utf-8", errors="replace")))
    ]
    assert hits == []

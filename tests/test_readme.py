"""What the README shows works as it stands there."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def block(language: str, containing: str) -> str:
    """The README's code block in this language that contains a text."""
    found: list[str] = [b for b in re.findall(rf"```{language}\n(.*?)```", README, re.S) if containing in b]
    assert len(found) == 1, f"{len(found)} {language} blocks contain {containing!r}"
    return found[0]


def test_the_strategy_of_the_readme_runs_as_the_readme_says(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(block("python", "class Mine"))
    (tmp_path / "conf" / "strategy").mkdir(parents=True)
    (tmp_path / "conf" / "strategy" / "mine.yaml").write_text(block("yaml", "mine.Mine"))
    command = shlex.split(block("sh", "strategy=mine"))
    assert command[0] == "fedsim"
    done = subprocess.run(
        [sys.executable, "-m", "fedsim.cli", *command[1:]],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "Mine (mu=0.5, beta=0.9)" in done.stdout
    assert len(list((tmp_path / "runs").glob("*/*/summary.json"))) == 1


def test_files_that_the_readme_links_to_exist() -> None:
    links = [m for m in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in m]
    assert links
    assert not [link for link in links if not (ROOT / link).exists()]

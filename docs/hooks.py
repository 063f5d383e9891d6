"""What MkDocs does not do by itself: pages made from the code, formulas without JavaScript, patterns in ``nav``."""

from __future__ import annotations

import atexit
import html
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority

ROOT = Path(__file__).resolve().parent.parent
PLUGINS = ("strategies", "clients", "datasets")


# --- configuration ----------------------------------------------------------------------------------------


@event_priority(100)  # before mkdocstrings reads its options
def on_config(config: Any) -> Any:
    """Expands the patterns of ``nav``, and says where the API reference finds the code."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))  # the code whose pages these are, whatever is installed
    config["nav"] = expand(config["nav"], Path(config["docs_dir"]))
    options = config["plugins"]["mkdocstrings"].config
    options["handlers"]["python"]["paths"] = [str(importable())]
    return config


def expand(nav: list[Any], docs: Path) -> list[Any]:
    """The navigation with every pattern replaced by the pages that fit it and are not named beside it.

    Args:
        nav: As in mkdocs.yml.
        docs: The folder of the pages.
    """
    out: list[Any] = []
    for item in nav:
        if isinstance(item, dict):
            out.append({k: expand(v, docs) if isinstance(v, list) else v for k, v in item.items()})
        elif "*" in item:
            found = sorted(p.relative_to(docs).as_posix() for p in docs.glob(item))
            out += [p for p in found if p not in nav and not p.endswith("000-template.md")]
        else:
            out.append(item)
    return [item for item in out if not (isinstance(item, dict) and [] in item.values())]


def importable() -> Path:
    """A copy of the package in which the plug-in folders are packages.

    In the repository they have no ``__init__.py`` (see CONTRIBUTING.md), and the reader of docstrings, which imports
    nothing, looks no further where there is none.
    """
    folder = Path(tempfile.mkdtemp(prefix="fedsim-docs-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    skip = shutil.ignore_patterns("__pycache__", *PLUGINS, "conf")
    shutil.copytree(ROOT / "fedsim", folder / "fedsim", ignore=skip)
    for name in PLUGINS:
        shutil.copytree(ROOT / name, folder / "fedsim" / name, ignore=shutil.ignore_patterns("__pycache__"))
        (folder / "fedsim" / name / "__init__.py").touch()
    return folder


# --- pages from the code ----------------------------------------------------------------------------------


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replaces ``<!-- generated: name -->`` by what `GENERATED` makes."""
    return re.sub(r"<!-- generated: (\w+) -->", lambda m: GENERATED[m[1]](), markdown)


def commands() -> str:
    """Every command with its help text."""
    from fedsim.cli import COMMANDS, HELP

    parts = [f"```text\n{HELP}```"]
    parts += [f"## fedsim {name}\n\n```text\n{text}```" for name, (_, text) in COMMANDS.items()]
    return "\n\n".join(parts)


def config() -> str:
    """Every config group with its options, each with its file."""
    from fedsim.config import CONF, GROUPS, options

    main = (CONF / "config.yaml").read_text(encoding="utf-8")
    chosen = {g: re.findall(r"[\w-]+", o) for g, o in re.findall(r"^  - (\w+): (.*?)(?: *#.*)?$", main, re.MULTILINE)}
    parts = [f'```yaml title="conf/config.yaml"\n{main}```']
    for group in GROUPS:
        files = options(group)
        default = [o for o in chosen.get(group, []) if o in files]
        parts.append(f"## {group} {{ #{group} }}\n\n{_default(group, default)}")
        if not files:
            parts.append("No option comes with fedsim yet.")
            continue
        parts.append(_table(group, files))
        for option, path in files.items():
            text = path.read_text(encoding="utf-8")
            fence = _indented(f'```yaml title="conf/{group}/{option}.yaml"\n{text}```')
            parts.append(f'???{"+" if option in default else ""} note "{group}={option}"\n{fence}')
    return "\n\n".join(parts)


def groups() -> str:
    """The config groups, each a link to its section."""
    from fedsim.config import GROUPS

    return " · ".join(["[the top](#at-the-top)", *(f"[{group}](#{group})" for group in GROUPS)])


def _default(group: str, default: list[str]) -> str:
    from fedsim.config import LISTS

    if group in LISTS:
        return f"Any number of options. Default: `{group}=[{','.join(default)}]`."
    return f"Default: `{group}={default[0]}`." if default else "Default: none."


def _table(group: str, files: Mapping[str, Path]) -> str:
    rows = ["| option | what it is |", "|---|---|"]
    for option, path in files.items():
        page = ROOT / "docs" / "methods" / f"{option}.md"
        name = f"[`{option}`](methods/{option}.md)" if group == "strategy" and page.exists() else f"`{option}`"
        lines = path.read_text(encoding="utf-8").splitlines()
        about = next((x[1:].strip() for x in lines if x.startswith("#") and "@package" not in x), "")
        rows.append(f"| {name} | {re.split(r'   +fedsim ', about)[0].replace('|', '&#124;')} |")
    return "\n".join(rows)


def _indented(text: str) -> str:
    return "\n".join(f"    {line}".rstrip() for line in text.splitlines())


GENERATED: dict[str, Callable[[], str]] = {"commands": commands, "config": config, "groups": groups}


# --- formulas ---------------------------------------------------------------------------------------------


def on_page_content(content: str, **_: Any) -> str:
    """Formulas (``$...$``, ``$$...$$``) as MathML, which browsers draw without JavaScript."""
    return re.sub(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', _mathml, content, flags=re.DOTALL)


def _mathml(match: re.Match[str]) -> str:
    from latex2mathml.converter import convert

    display = "block" if match[2] == "[" else "inline"
    formula = str(convert(html.unescape(match[3]).strip(), display=display))
    return formula.replace("<mo>&#x02016;", '<mo stretchy="false">&#x02016;')  # a norm's bars are not as tall as a sum

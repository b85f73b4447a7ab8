"""The documentation and the code agree: commands, options and defaults of docs/cli.md; links; the pages in the navigation."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer

from dejavu.cli.main import app

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
SHARED = "Shared options"
OPTION = re.compile(r"(?<![\w-])(--[a-z][a-z0-9-]*|-[a-zA-Z])(?![\w-])")
QUOTED = re.compile(r'"[^"]*"')  # options of another command, as of bench-serve's server
ROW = re.compile(r"^\| (`-.*?`) \| (.*?) \|", re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
EXTERNAL = ("http://", "https://", "mailto:")
MAX_LINES = 180
MAX_WIDTH = 139
MARKDOWN = sorted([*ROOT.glob("*.md"), *(page for folder in ("docs", "recipes", "src") for page in (ROOT / folder).rglob("*.md"))])


@cache
def commands() -> dict[str, Any]:
    return dict(typer.main.get_command(app).commands)  # pyrefly: ignore[missing-attribute]  # the app is a group


def sections(text: str) -> dict[str, str]:
    """The text under each `## ` heading of a page."""
    parts = re.split(r"^## (.+)$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


CLI = sections((DOCS / "cli.md").read_text(encoding="utf-8"))


def documented(section: str) -> dict[str, str]:
    """Long option -> default, of every row of the section's table."""
    found = {}
    for names, default in ROW.findall(section):
        found[next(name for name in OPTION.findall(names) if name.startswith("--"))] = default
    return found


def options_of(command: Any) -> dict[str, Any]:
    """Long option -> parameter, of a registered command."""
    options = [param for param in command.params if param.param_type_name == "option"]
    return {next(name for name in param.opts if name.startswith("--")): param for param in options}


def default_of(param: Any) -> str:
    """The default as the tables spell it."""
    if param.required:
        return "required"
    if param.is_flag:
        return "off"
    if param.default is None:
        return "none"
    return f"{param.default:g}" if isinstance(param.default, float) else str(param.default)


def shared_by(section: str) -> set[str]:
    """The shared options that a command's section names in its sentence "Shared options: ..."."""
    named = re.search(r"Shared\s+options:\s+(.+?)\.$", section, re.MULTILINE | re.DOTALL)
    assert named is not None, "the section does not say which shared options the command has"
    every = set(documented(CLI[SHARED]))
    return every if named[1] == "all" else set(OPTION.findall(named[1]))


def slug(heading: str) -> str:
    """The anchor of a heading (Python-Markdown's rule)."""
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower())


def anchors(path: Path) -> set[str]:
    return {slug(heading) for heading in re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)}


def broken_links(page: Path) -> list[str]:
    """Relative links of a page that lead to no file or no heading."""
    broken = []
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if link.startswith(EXTERNAL):
            continue
        name, _, anchor = link.partition("#")
        target = page if name == "" else page.parent / name
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


def test_every_command_is_documented_and_every_documented_command_exists() -> None:
    assert {name.removeprefix("dejavu ") for name in CLI if name != SHARED} == set(commands())


@pytest.mark.parametrize("name", sorted(commands()))
def test_options_and_defaults_of_a_command(name: str) -> None:
    section, registered = CLI[f"dejavu {name}"], options_of(commands()[name])
    stated = {option: default for option, default in documented(CLI[SHARED]).items() if option in shared_by(section)}
    assert stated | documented(section) == {option: default_of(param) for option, param in registered.items()}


@pytest.mark.parametrize("name", sorted(commands()))
def test_every_name_in_a_section_is_an_option_of_its_command(name: str) -> None:
    command, section = commands()[name], CLI[f"dejavu {name}"]
    known = {opt for param in command.params for opt in param.opts}
    assert set(OPTION.findall(section)) <= known
    short = {opt for opt in known if re.fullmatch(r"-\w", opt)}
    assert short <= set(OPTION.findall(section))
    for argument in (param for param in command.params if param.param_type_name == "argument"):
        assert f" {argument.metavar}" in section, f"{argument.metavar} is not documented"


def test_options_named_on_other_pages_exist() -> None:
    """Outside cli.md an option of a `dejavu` command line is one of that command."""
    wrong = []
    for page in [*PAGES, ROOT / "README.md"]:
        for line in re.findall(r"dejavu ([a-z-]+ [^`\n]*)", page.read_text(encoding="utf-8")):
            name, _, rest = line.partition(" ")
            if name in commands():
                known = {opt for param in commands()[name].params for opt in param.opts} | {"--help", "-h"}
                given = OPTION.findall(QUOTED.sub("", rest.partition("#")[0]))
                wrong += [f"{page.name}: dejavu {name} {option}" for option in given if option not in known]
    assert wrong == []


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.name)
def test_relative_links_resolve(page: Path) -> None:
    assert broken_links(page) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A `b`\n[x](none.md) [y](#a-b) [z](#c) [w](https://example.org/none.md) [v](page.md#a-b)\n")
    assert broken_links(page) == ["none.md", "#c"]


def test_the_navigation_lists_every_page_once() -> None:
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    assert sorted(re.findall(r": (\S+\.md)$", nav, re.MULTILINE)) == [str(page.relative_to(DOCS)) for page in PAGES]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_link_within_docs_and_stay_short(page: Path) -> None:
    """What leaves docs/ is no part of the site; the log may grow, and so may tables and what models wrote."""
    text = page.read_text(encoding="utf-8")
    assert [link for link in LINK.findall(text) if link.startswith("../")] == []
    written = [line for line in text.splitlines() if line.strip() and not line.startswith("|")]
    assert page.name in ("log.md", "side-by-side.md") or len(written) <= MAX_LINES


def long_lines(text: str) -> list[int]:
    """Numbers of the lines, from 1, that are too wide, outside tables and code; what a link leads to cannot break and does not count."""
    found, fenced = [], False
    for number, line in enumerate(text.splitlines(), 1):
        fence = line.lstrip().startswith(("```", "~~~"))
        fenced ^= fence
        code = fence or fenced or (line.startswith("    ") and re.match(r"\s+([*+-]|\d+\.) ", line) is None)
        if not code and not line.lstrip().startswith("|") and len(re.sub(r"\]\([^)\s]*\)", "]", line)) > MAX_WIDTH:
            found.append(number)
    return found


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda page: str(page.relative_to(ROOT)))
def test_lines_of_markdown_fit(page: Path) -> None:
    assert long_lines(page.read_text(encoding="utf-8")) == []


def test_a_long_line_is_found() -> None:
    long = "word " * 40
    text = [long, f"| {long} |", f"    {long}", f"    * {long}", "```", long, "```", f"[a](https://{'x' * 200})", f"> {long}"]
    assert long_lines("\n".join(text)) == [1, 4, 9]

"""The files of the server's page keep their promises: nothing from elsewhere, no inline script or style, every id there, every control
labelled, the report's colours, and all of it in the package.
"""

from __future__ import annotations

import re
import tomllib
from html.parser import HTMLParser
from pathlib import Path

import pytest

from dejavu.report import plots
from helpers.page_server import PAGE

FILES = {path.name: path.read_text(encoding="utf-8") for path in sorted(PAGE.iterdir())}
HTML, STYLE, SCRIPT = FILES["index.html"], FILES["style.css"], FILES["script.js"]


class Elements(HTMLParser):
    """Every element of a page, with its attributes; and the text within scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.inline = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.cdata_elem:
            self.inline += data

    def values(self, attribute: str) -> list[str]:
        return [value for _, attributes in self.found if (value := attributes.get(attribute)) is not None]


ELEMENTS = Elements(HTML)


def test_page_is_of_four_files() -> None:
    assert sorted(FILES) == ["icon.svg", "index.html", "script.js", "style.css"]


@pytest.mark.parametrize("name", FILES)
def test_page_loads_nothing_from_elsewhere(name: str) -> None:
    text = FILES[name].replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert not re.findall(r"https?:|[\"'(=]//|@import|@font-face|url\(|data:[a-z]+/|import\(|sendBeacon|WebSocket", text)


def test_page_addresses_are_relative_and_there() -> None:
    # Relative: the server may stand behind a prefix of another's.
    assert {address for name in ("href", "src") for address in ELEMENTS.values(name)} == set(FILES) - {"index.html"}
    assert set(re.findall(r'"(/?v1/[a-z/]*)"', SCRIPT)) == {"v1/models", "v1/completions", "v1/chat/completions"}


def test_page_keeps_a_strict_policy() -> None:
    assert ELEMENTS.inline.strip() == ""
    assert not [attributes for tag, attributes in ELEMENTS.found if tag == "style" or "style" in attributes]
    assert not [name for _, attributes in ELEMENTS.found for name in attributes if name.startswith("on")]
    unsafe = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|setAttribute\(\s*[\"'](?:style|on)"
    assert not re.findall(unsafe, SCRIPT)


def test_page_has_every_id_that_is_used() -> None:
    ids = ELEMENTS.values("id")
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'\$\("([\w-]+)"\)', SCRIPT))
    parts = set(re.findall(r'this\.(?:part|figure)\("([\w-]+)"', SCRIPT)) | {"speed-bar", "tokens-bar", "mlp-bar", "heads-bar"}
    used |= {f"{side}-{part}" for side in ("dense", "sparse") for part in parts}
    for attribute in ("for", "aria-labelledby", "aria-describedby"):
        used |= set(ELEMENTS.values(attribute))
    assert len(parts) >= 10 and len(used) > 40
    assert used <= set(ids)


def test_page_every_control_has_a_label() -> None:
    named = set(ELEMENTS.values("for"))
    controls = [attributes for tag, attributes in ELEMENTS.found if tag in {"input", "textarea", "select"}]
    assert len(controls) == 12
    assert all(attributes.get("id") in named for attributes in controls if attributes.get("type") != "radio")  # those are inside theirs


def test_page_has_the_colours_of_the_report() -> None:
    light, dark = STYLE.split("@media (prefers-color-scheme: dark)")[:2]
    for sheet, theme in ((light, plots.LIGHT), (dark, plots.DARK)):
        colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", sheet))
        assert {name: colours.get(name) for name in theme if not name.startswith("ramp")} == {
            name: colour for name, colour in theme.items() if not name.startswith("ramp")
        }
    ramps = {f"{name}-{stop}" for name in ("neurons", "heads") for stop in range(4)}
    for sheet in (light, dark):
        assert ramps <= set(re.findall(r"--([\w-]+): #[0-9a-f]{6};", sheet))  # the script reads six digits


def test_page_defines_every_colour_that_it_uses() -> None:
    assert set(re.findall(r"var\(--([\w-]+)", STYLE)) - {"share"} <= set(re.findall(r"--([\w-]+):", STYLE))


def test_page_is_packaged() -> None:
    settings = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["tool"]["scikit-build"]
    assert settings["wheel"]["packages"] == ["src/dejavu"]
    assert "src/dejavu/serve/page/*" in settings["sdist"]["include"]

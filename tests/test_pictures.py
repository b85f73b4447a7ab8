"""The pictures of docs/ are those that recipes/pictures.py draws of results/, and can be read anywhere."""

from __future__ import annotations

import importlib
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "images"
LARGEST = 60_000  # bytes
SVG = "{http://www.w3.org/2000/svg}"
NAMES = sorted(path.stem for path in IMAGES.glob("*.svg"))


@pytest.fixture(scope="module")
def pictures() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "recipes"))
        return importlib.import_module("pictures")


def contrast(one: str, other: str) -> float:
    """WCAG's contrast of two colours #rrggbb, 1 to 21."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_every_picture_is_drawn_and_shown(pictures: ModuleType) -> None:
    assert sorted(picture.__name__ for picture in pictures.PICTURES) == NAMES
    shown = re.findall(r"\]\(images/([a-z]+)\.svg\)", "".join(page.read_text("utf-8") for page in (ROOT / "docs").glob("*.md")))
    assert sorted(shown) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_picture_shows_what_results_hold_and_stands_alone(pictures: ModuleType, name: str) -> None:
    text = (IMAGES / f"{name}.svg").read_text("utf-8")
    assert getattr(pictures, name)().svg() == text, f"{name}.svg is stale; run `make tables`"
    root = ET.fromstring(text)
    assert root.find(f"{SVG}title") is not None and len(text.encode()) < LARGEST
    assert not re.search(r"(href|src|url\(|@import|@font-face)", text)
    width, height = pictures.WIDTH, float(root.attrib["height"])
    for element in root.iter(f"{SVG}text"):
        assert 0 <= float(element.attrib["x"]) <= width and 0 <= float(element.attrib["y"]) <= height


def test_what_nothing_beats_in_both_is_joined(pictures: ModuleType) -> None:
    ways = [("best", 20.0, 10.0), ("slower", 20.0, 9.0), ("worse", 21.0, 8.0), ("faster", 22.0, 30.0), ("fastest", 25.0, 31.0)]
    points = [pictures.Point(words=name, kind="edge", ppl=ppl, median=speed, least=speed, most=speed) for name, ppl, speed in ways]
    assert [point.words for point in pictures._front(points)] == ["best", "faster", "fastest"]


@pytest.mark.parametrize("scheme", ["LIGHT", "DARK"])
def test_words_stand_out_from_their_ground(pictures: ModuleType, scheme: str) -> None:
    palette = getattr(pictures, scheme)
    assert all(contrast(palette[word], palette["paper"]) >= 4.5 for word in ("ink", "soft", "read", "back"))
    assert all(contrast(palette[word], palette["off"]) >= 4.5 for word in ("ink", "soft"))

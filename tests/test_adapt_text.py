"""The recipe for the text that smollm2-sparse was adapted on: what it takes of pages, and what it keeps out."""

from __future__ import annotations

import lzma
import subprocess
import sys
from pathlib import Path

import pytest

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
PAGE = """---
title: Kept out
---
# How we work

We write [the plan](https://example.org/plan) down *before* anything is built, and **everybody** reads it.

```python
print("this is code and is left out of what is kept")
```

| a table | of two and three |

{% include banner.html %}
* A point of a list that is long enough to be a paragraph of its own.

The same old paragraph stands on every page of the site and says nothing.
"""
SECRET = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"


def mixture(tmp_path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(RECIPES / "adapt_text.py"), "--packages", "0", *options, "-o", str(tmp_path / "out")]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def written(path: Path) -> str:
    return lzma.decompress(path.read_bytes()).decode()


def test_of_pages_the_running_text_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "site" / "deep"
    folder.mkdir(parents=True)
    long = "A paragraph that is there so that the page is long enough to be taken. "
    (folder / "a.md").write_text(PAGE + "\n" + long * 8)
    (folder / "b.rst").write_text(f"{PAGE.splitlines()[-1]}\n\n{'Another one, which is of this page and of no other. ' * 12}")
    assert mixture(tmp_path, "--pages", f"site={tmp_path / 'site'}").returncode == 0
    first, second = written(tmp_path / "out" / "site.txt.xz").split("\n<|endoftext|>\n")
    paragraphs = first.split("\n\n")
    assert paragraphs[0] == "How we work"
    assert paragraphs[1] == "We write the plan down *before* anything is built, and everybody reads it."
    assert paragraphs[2] == "A point of a list that is long enough to be a paragraph of its own."
    assert paragraphs[3].startswith("The same old paragraph") and len(paragraphs) == 5
    assert "same old paragraph" not in second and second.startswith("Another one")


def test_what_an_item_says_is_kept_out_however_it_is_written(tmp_path: Path) -> None:
    """A line feed in a JSON string is no part of a word."""
    (tmp_path / "text.txt").write_text(
        f"As WikiText has it.\n<|endoftext|>\nA paragraph to keep.\n\nIt says {SECRET} and more.\n\nAnother to keep."
    )
    (tmp_path / "items.jsonl").write_text('{"id": 3, "context": "Say:\\n' + SECRET.replace(" eight", "\\neight") + '", "choices": ["a"]}\n')
    found = mixture(tmp_path, str(tmp_path / "text.txt"), "--avoid", str(tmp_path / "items.jsonl"))
    assert found.returncode == 0, found.stderr
    kept = written(tmp_path / "out" / "text.txt.xz")
    assert "paragraph to keep" in kept and "Another to keep" in kept and "thirteen" not in kept


@pytest.mark.parametrize("pair", ["site=nowhere", "nowhere"])
def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path, pair: str) -> None:
    found = mixture(tmp_path, "--pages", pair)
    assert found.returncode != 0 and "is no folder; give NAME=FOLDER" in found.stderr

"""The text that smollm2-sparse was adapted on: plain text, of which a part is tokenised as WikiText is, Python packages' own words, pages.

    python recipes/adapt_text.py 'text/corpus/*.xz' --avoid 'text/valid/*.txt' --avoid 'tasks/*.jsonl' --pages gov=checkouts -o mixture

In: texts whose documents are told apart, texts to keep out, folders of pages in Markdown or reStructuredText. Out: one xz file for each
text and folder, and `packages.txt.xz`: docstrings of installed packages and sources of the standard library. Every fifth document of a
text is written as WikiText writes it: words and punctuation apart, `@-@` for a hyphen, `<unk>` for a rare word. Of pages the running text
is kept, without markup and most of the code. A paragraph that shares 13 words in a row with a text to keep out is left out. How much of
what is taken is for who calls `dejavu adapt` (a file that is given twice counts twice): docs/log.md has what was.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.metadata
import json
import lzma
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from dejavu.config import require
from dejavu.model.texts import SEPARATOR, documents, named_texts

PACKAGES = ("numpy", "scipy", "pandas", "matplotlib", "scikit-learn", "sympy", "networkx", "nltk", "pillow", "transformers", "torch")
LEAST_DOCSTRING = 300  # characters
SOURCE_SHARE = 0.4  # of the packages' text that is source
MOST_FILE = 40_000  # characters taken of a file
LEAST_COUNT = 25  # a word seen less often is <unk>
TOKENISED = 5  # every so many documents
SHARED_WORDS = 13

WORD = re.compile(r"\w+")
SPLIT = ((re.compile(r"(?<=\d)([,.])(?=\d)"), r" @\1@ "), (re.compile(r"(?<=\w)-(?=\w)"), " @-@ "))
APART = re.compile(r"(\.\.\.|[.,;:!?()\[\]\"\u201c\u201d\u201e/%$\u00a3\u20ac\u2013\u2014]|['\u2019]s\b)")

LEAST_PAGE = 500  # characters
LEAST_PARAGRAPH = 40  # characters of a paragraph that is no heading
FRONT_MATTER = re.compile(r"\A(---|\+\+\+)\n.*?\n\1\n", re.S)
NO_PROSE = re.compile(r"^(```|~~~).*?^\1|<!--.*?-->|<(script|style|svg)\b.*?</\2>|\{[{%].*?[%}]\}", re.S | re.M)
LINKS = ((re.compile(r"!\[[^\]]*\](\([^)]*\)|\[[^\]]*\])"), ""), (re.compile(r"\[([^\]]+)\](\([^)]*\)|\[[^\]]*\])"), r"\1"))
MARKS = re.compile(r"^\s{0,3}(#+\s+|>\s?|[-*+]\s+|\d+[.)]\s+)|</?\w[^>]*>|\*\*|__|:\w+:(?=`)|`+", re.M)
TABLES = re.compile(r"^\s*[|+].*$|^\s*[-=~^*\"]{3,}\s*$|^\.\. .*$|^\[[^\]]+\]:.*$", re.M)
ENGLISH = re.compile(r"\b(the|of|to|and|is|that)\b")


def word_tuples(text: str) -> Iterator[int]:
    """A hash of every run of SHARED_WORDS words."""
    words = [word.lower() for word in WORD.findall(text)]
    for first in range(len(words) - SHARED_WORDS + 1):
        yield hash(" ".join(words[first : first + SHARED_WORDS]))


def texts_in(name: str, text: str) -> list[str]:
    """The texts in a file: all strings of each line of a .jsonl, else the file's own."""

    def strings(value: object) -> Iterator[str]:
        if isinstance(value, str):
            yield value
        for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            yield from strings(inner)

    return [" ".join(strings(json.loads(line))) for line in text.splitlines()] if name.endswith(".jsonl") else [text]


def without(texts: Sequence[str], avoided: set[int]) -> list[str]:
    """The documents less their paragraphs that share a run of words with what is avoided, and less those of which nothing is left."""
    kept = ("\n\n".join(part for part in text.split("\n\n") if avoided.isdisjoint(word_tuples(part))) for text in texts)
    return [text for text in kept if text.strip()]


def as_wikitext(document: str, known: Counter[str]) -> str:
    """A document as WikiText writes one: its first line is the title, a short line without a full stop a heading."""
    lines = [line.strip() for line in document.splitlines() if line.strip()]
    written = []
    for number, line in enumerate(lines):
        for pattern, by in SPLIT:
            line = pattern.sub(by, line)
        words = APART.sub(r" \1 ", line).split()
        words = [word if known[word] >= LEAST_COUNT or not word[0].isalpha() else "<unk>" for word in words]
        if number == 0:
            written.append(f" \n = {' '.join(words)} = \n ")
        elif len(words) <= 6 and not line.endswith((".", ":", '"', "!", "?")):
            written.append(f" \n = = {' '.join(words)} = = \n ")
        else:
            written.append(f" {' '.join(words)} ")
    return "\n".join(written)


def docstrings(source: str) -> str:
    """The longer docstrings of a module, one after another."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return ""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    found = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, kinds)]
    return "\n\n".join(text for text in found if len(text) >= LEAST_DOCSTRING)


def package_documents() -> Iterator[tuple[str, str]]:
    """(kind, text): 'docstrings' of the installed PACKAGES, 'source' of the standard library."""
    for package in PACKAGES:
        for file in sorted(importlib.metadata.files(package) or [], key=str):
            if file.suffix == ".py" and "test" not in str(file):
                yield "docstrings", docstrings(Path(str(file.locate())).read_text(encoding="utf-8", errors="replace"))
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        if not {"test", "tests", "site-packages", "idlelib"}.intersection(path.parts):
            yield "source", path.read_text(encoding="utf-8", errors="replace")


def packages(limit: int) -> list[str]:
    """Documents of at most `limit` characters in all, each no longer than MOST_FILE, no two with one beginning."""
    left = {"docstrings": int(limit * (1 - SOURCE_SHARE)), "source": int(limit * SOURCE_SHARE)}
    seen, found = set(), []
    pieces = [(kind, text[:MOST_FILE]) for kind, text in package_documents() if len(text) >= LEAST_DOCSTRING]
    # In the order of a hash, so that a limit takes some of every package.
    for kind, text in sorted(pieces, key=lambda piece: hashlib.sha256(piece[1].encode()).digest()):
        start = text[:LEAST_DOCSTRING]
        if start not in seen and left[kind] > len(text):
            seen.add(start)
            left[kind] -= len(text)
            found.append(text)
    return found


def prose(page: str) -> str:
    """The running text of a page in Markdown or reStructuredText: less front matter, fences, tables, marks and links' targets."""
    text = NO_PROSE.sub("", FRONT_MATTER.sub("", page.replace("\r\n", "\n")))
    for pattern, by in LINKS:
        text = pattern.sub(by, text)
    paragraphs = []
    for part in re.split(r"\n\s*\n", TABLES.sub("", text)):
        indented = part.startswith(("    ", "\t"))
        words = " ".join(MARKS.sub("", part).split())
        heading = part.lstrip().startswith("#")
        if not indented and (heading or (len(words) >= LEAST_PARAGRAPH and ENGLISH.search(words))):
            paragraphs.append(words)
    return "\n\n".join(paragraphs)


def pages(folder: Path) -> list[str]:
    """The running text of a folder's pages, without paragraphs of earlier ones. Raises ValueError where there is no folder."""
    require(folder.is_dir(), f"--pages: {str(folder)!r} is no folder; give NAME=FOLDER")
    seen: set[str] = set()
    found = []
    for path in sorted([*folder.rglob("*.md"), *folder.rglob("*.rst")]):
        kept = [part for part in prose(path.read_text(encoding="utf-8", errors="replace")).split("\n\n") if part not in seen]
        seen.update(part for part in kept if len(part) >= LEAST_PARAGRAPH)
        found.append("\n\n".join(kept))
    return [text for text in found if len(text) >= LEAST_PAGE]


def write(path: Path, parts: Sequence[str]) -> None:
    path.write_bytes(lzma.compress(f"\n{SEPARATOR}\n".join(parts).encode(), preset=6))
    print(f"{path}: {len(parts)} documents, {sum(map(len, parts)):,} characters")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="*")
    parser.add_argument("--avoid", action="append", default=[])
    parser.add_argument("--packages", type=int, default=24_000_000, help="characters of packages' text at most")
    parser.add_argument("--pages", action="append", default=[], metavar="NAME=FOLDER", help="pages in Markdown or reStructuredText")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    avoided = {run for name, text in named_texts(options.avoid).items() for part in texts_in(name, text) for run in word_tuples(part)}
    options.output.mkdir(parents=True, exist_ok=True)
    for name, text in named_texts(options.text).items():
        parts = without(documents(text), avoided)
        known = Counter(word for part in parts for word in APART.sub(r" \1 ", part).split())
        write(
            options.output / f"{Path(name).name.removesuffix('.xz')}.xz",
            [as_wikitext(p, known) if i % TOKENISED == 0 else p for i, p in enumerate(parts)],
        )
    for name, _, folder in (pair.partition("=") for pair in options.pages):
        require(folder != "", f"--pages: {name!r} is no folder; give NAME=FOLDER")
        write(options.output / f"{name}.txt.xz", without(pages(Path(folder)), avoided))
    if options.packages:
        write(options.output / "packages.txt.xz", without(packages(options.packages), avoided))


if __name__ == "__main__":
    main()

"""Damaged files of every kind end in a refusal that names the file, or in a text: no traceback, panic, signal, hang or gigabytes.

`pytest -m slow tests/test_fuzz.py --fuzz-cases 10000` runs so many cases, in a child process with limits; the usual run a few of each kind.
"""

from __future__ import annotations

import collections
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend

from conftest import Tiny
from dejavu.model.tokenizer import Tokenizer
from helpers.fuzz import KINDS, Child, run_case, write_samples

FEW = 6


@pytest.fixture(scope="session")
def samples(tmp_path_factory: pytest.TempPathFactory, tiny: Tiny, tokenizer: Tokenizer, tok96: Backend) -> Path:
    folder = tmp_path_factory.mktemp("samples")
    write_samples(folder, tiny("opt"), tiny("llama"), tokenizer, tok96)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_few_damaged_files_are_refused_or_read(kind: str, samples: Path, tmp_path: Path) -> None:
    for seed in range(FEW):
        (tmp_path / str(seed)).mkdir()
        assert run_case(samples, kind, seed, tmp_path / str(seed)) in ("refused", "loaded"), seed


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("kind", KINDS)
def test_many_damaged_files_are_refused_or_read(kind: str, samples: Path, request: pytest.FixtureRequest) -> None:
    child, outcomes = Child(samples), collections.Counter()
    failures: dict[int, str] = {}
    for seed in range(FEW, FEW + -(-request.config.getoption("--fuzz-cases") // len(KINDS))):
        found = child.run(kind, seed)
        outcomes[found if found in ("refused", "loaded") else "failed"] += 1
        if found not in ("refused", "loaded"):
            failures[seed] = found
            print(f"\n{kind} {seed}: {found}", flush=True)  # at once: many cases take a while
    child.close()
    print(f"{kind}: {dict(outcomes)}")
    assert not failures, f"{len(failures)} of {outcomes.total()} {kind}: seeds {list(failures)}, told above"

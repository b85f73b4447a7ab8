"""Rows of results: every key of the contract, append-only files, provenance."""

import dataclasses
import json
import subprocess
from typing import Any

import pytest

from dejavu.bench.rows import QualityRow, SpeedRow, append_rows, commit, commit_facts, device_facts, device_name, read_rows, versions
from helpers.disks import room_for
from helpers.rows import KEYS


def row(**changes) -> SpeedRow:
    values: dict[str, Any] = {
        "op": "decode",
        "mode": "dense",
        "backend": "torch",
        "model": "tiny",
        "layers": 2,
        "dtype": "fp32",
        "batch": 1,
    }
    return SpeedRow(**(values | {"context": 64, "threads": 2, "synthetic": False, "tok_s": 12.5} | changes))


def test_row_has_exactly_the_contract_keys():
    assert set(row().to_dict()) == KEYS


def test_append_keeps_earlier_rows_byte_for_byte_and_fills_provenance(tmp_path):
    path = tmp_path / "new" / "speed.jsonl"
    first = append_rows(path, [row()])
    before = path.read_bytes()
    second = append_rows(path, [row(mode="sparse", mlp_density=0.1), row(op="mlp")])
    assert path.read_bytes().startswith(before)
    assert read_rows(path) == first + second
    written = json.loads(before)
    assert set(written) == KEYS
    assert (
        written["device"] == device_name()
        and written["device_kind"] == "cpu"
        and written["cores"] >= 1
        and written["time"].endswith("+00:00")
    )
    assert {"python", "torch", "dejavu"} <= set(written["versions"])
    assert second[0].mlp_density == 0.1 and second[1].op == "mlp"


def test_values_that_are_set_are_kept(tmp_path):
    given = row(device="A card", versions={"peer": "1.2"}, commit="abc", time="2020-01-01T00:00:00+00:00")
    assert append_rows(tmp_path / "r.jsonl", [given]) == [given]


def test_a_full_disk_leaves_no_half_row(tmp_path):
    path = tmp_path / "r.jsonl"
    append_rows(path, [row()])
    before = path.read_bytes()
    refused = pytest.raises(ValueError, match=r"r\.jsonl cannot be written \(File too large\): it takes [\d,]+ bytes")
    with room_for(len(before) + 100), refused:
        append_rows(path, [row(op="mlp"), row(op="attention")])
    assert path.read_bytes() == before


def test_line_cut_short_does_not_swallow_the_next_row(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text('{"op": "dec')
    append_rows(path, [row()])
    lines = path.read_text().splitlines()
    assert len(lines) == 2 and json.loads(lines[1])["op"] == "decode"
    with pytest.raises(ValueError, match="line 1"):
        read_rows(path)


@pytest.mark.parametrize("text", ['{"op": "decode"}', '{"unknown": 1}', "[1]", "not json"])
def test_bad_line_is_named(tmp_path, text):
    path = tmp_path / "r.jsonl"
    append_rows(path, [row()])
    with path.open("a") as file:
        file.write(text + "\n")
    with pytest.raises(ValueError, match="line 2"):
        read_rows(path)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"none\.jsonl"):
        read_rows(tmp_path / "none.jsonl")


@pytest.mark.parametrize("model", ["/".join(["", "home", "someone", "model"]), "C:\\models\\opt"])
def test_machine_paths_are_refused(model):
    with pytest.raises(ValueError, match="path"):
        row(model=model)
    assert row(model="facebook/opt-125m").model == "facebook/opt-125m"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_measurements_that_are_no_number_are_refused(value):
    with pytest.raises(ValueError, match="tok_s"):
        row(tok_s=value)


def test_row_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        row().op = "prefill"  # pyrefly: ignore[read-only]


def test_device_and_versions_are_of_this_machine():
    facts = device_facts()
    assert facts["device_kind"] == "cpu" and facts["device"].endswith(f", {facts['cores']} cores")
    assert versions()["torch"].startswith("2.")


def test_commit_is_null_outside_git_and_marks_changes(tmp_path):
    package = tmp_path / "repository" / "package"
    file = package / "bench" / "rows.py"
    file.parent.mkdir(parents=True)
    file.write_text("x = 1\n")
    assert commit(file) is None

    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", str(package), *identity, *arguments], check=True, capture_output=True)

    git("init", "-q", "..")
    assert commit(file) is None  # not tracked: as an installed package inside somebody's repository
    git("add", ".")
    git("commit", "-q", "-m", "first")
    head = commit(file)
    assert head is not None and len(head) == 40
    file.write_text("x = 2\n")
    assert commit(file) == f"{head}-dirty" and commit_facts(file)["dirty"]
    git("checkout", "-q", ".")
    assert commit_facts(file) == {"commit": head, "dirty": False}
    (package.parent / "native").mkdir()
    (package.parent / "native" / "engine.h").write_text("int x;\n")  # what the engine is built of counts too
    assert commit(file) == f"{head}-dirty"


def old_line(kind: type[SpeedRow] | type[QualityRow] = SpeedRow, /, **changes: Any) -> dict[str, Any]:
    """What a line held when facts stood in its strings alone."""
    later = ("peer", "sparse", "sparse_heads", "ahead", "shape", "shape_layers", "device_kind", "cores", "dirty")
    values = {"device": "AMD EPYC, 2 cores", "commit": "0123456789", "versions": {"torch": "9"}, "time": "2020-01-01T00:00:00+00:00"}
    if kind is QualityRow:
        values |= {"backend": "native", "mode": "sparse", "model": "m", "dtype": "fp32", "cache_dtype": "fp32", "adapter": None}
        values |= {"rule": "r", "texts": ["t"], "texts_hash": "h", "tokens": 9, "ppl": 3.0}
    else:
        values = row().to_dict() | values
    return {key: value for key, value in (values | changes).items() if key not in later}


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({}, {"device_kind": "cpu", "cores": 2, "dirty": False, "peer": False, "sparse": False, "ahead": None, "shape": None}),
        ({"device": "NVIDIA H200"}, {"device_kind": "gpu", "cores": None}),
        ({"device": "unknown", "op": "serve"}, {"device_kind": None, "cores": None}),
        ({"commit": "0123-dirty"}, {"dirty": True, "commit": "0123-dirty"}),
        ({"mode": "llama.cpp", "backend": "llama.cpp"}, {"peer": True, "sparse": False}),
        ({"mode": "sparse", "backend": "native"}, {"peer": False, "sparse": True, "sparse_heads": False, "ahead": None}),
        ({"mode": "sparse", "backend": "cuda"}, {"sparse": True, "ahead": "beside", "mode": "sparse"}),
        ({"mode": "sparse", "backend": "cuda", "op": "mlp"}, {"sparse": True, "ahead": None}),
        ({"mode": "sparse+heads in-line", "backend": "cuda"}, {"sparse_heads": True, "ahead": "in-line", "mode": "sparse+heads in-line"}),
        ({"synthetic": True, "model": "opt-6.7b", "layers": 32}, {"shape": "opt-6.7b", "shape_layers": 32}),
        ({"synthetic": True, "model": "opt-30b[12 of 48 layers]", "layers": 12}, {"shape": "opt-30b", "shape_layers": 48, "layers": 12}),
    ],
)
def test_facts_of_older_lines_are_read_out_of_their_strings(tmp_path, changes, facts):
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps(old_line(**changes)) + "\n")
    [found] = read_rows(path)
    assert {key: getattr(found, key) for key in facts} == facts


@pytest.mark.parametrize(("density", "heads"), [(1.0, False), (0.5, True)])
def test_an_older_quality_row_selected_heads_where_their_density_says_so(tmp_path, density, heads):
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(old_line(QualityRow, head_density=density)) + "\n")
    [found] = read_rows(path, QualityRow)
    assert (found.sparse, found.sparse_heads, found.peer, found.texts) == (True, heads, False, ("t",))


def test_a_line_with_fields_is_read_as_it_is(tmp_path):
    """A field says what is so, whatever a string looks like."""
    given = row(mode="sparse", device="Odd GPU, 2 cores", device_kind="gpu", versions={"torch": "9"}, commit="0123-dirty", time="t")
    assert append_rows(tmp_path / "r.jsonl", [given]) == read_rows(tmp_path / "r.jsonl") == [given]
    assert not given.sparse and given.repeatable

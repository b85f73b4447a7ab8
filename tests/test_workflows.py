"""The workflows: actions are pinned by commit, permissions are least, what a push leaves out runs by night, a release has its version."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / ".github" / "workflows"
if not FOLDER.exists():
    pytest.skip("not a checkout of the repository", allow_module_level=True)
FILES = sorted(FOLDER.glob("*.yml"))
TEXTS = {path.name: path.read_text(encoding="utf-8") for path in FILES}
WORKFLOWS: dict[str, Any] = {name: yaml.safe_load(text) for name, text in TEXTS.items()}
JOBS = [(name, job, WORKFLOWS[name]["jobs"][job]) for name in WORKFLOWS for job in WORKFLOWS[name]["jobs"]]
PINNED = re.compile(r"([\w.-]+/[\w.-]+)@([0-9a-f]{40}) # v\d+\.\d+\.\d+")
PUBLISH = ("publish.yml", "publish")


def unpinned(text: str) -> list[str]:
    """What a workflow uses of others' without a commit and the version that it is."""
    used = [line.strip() for line in re.findall(r"\buses:(.*)", text)]
    return [line for line in used if not line.startswith("./") and PINNED.fullmatch(line) is None]


def test_every_action_is_pinned_by_commit_with_its_version() -> None:
    assert {name: found for name, text in TEXTS.items() if (found := unpinned(text))} == {}
    commits = {found for text in TEXTS.values() for found in PINNED.findall(text)}
    assert len(commits) == len({action for action, _ in commits}) >= 5, "an action is used at two commits"


@pytest.mark.parametrize("used", ["actions/checkout@v7", f"actions/checkout@{'a' * 40}", f"actions/checkout@{'a' * 39} # v7.0.1"])
def test_an_unpinned_action_is_found(used: str) -> None:
    assert unpinned(f"      - uses: {used}\n") == [used]


@pytest.mark.parametrize(("name", "job", "settings"), JOBS, ids=[f"{name}:{job}" for name, job, _ in JOBS])
def test_permissions_are_least(name: str, job: str, settings: dict[str, Any]) -> None:
    """Nothing but reading the repository; the job that publishes has its identity and no more, and runs no code of ours."""
    granted = settings.get("permissions", WORKFLOWS[name]["permissions"])
    if (name, job) == PUBLISH:
        assert granted == {"id-token": "write"}
        assert [step["uses"].partition("@")[0] for step in settings["steps"]] == [
            "actions/download-artifact",
            "pypa/gh-action-pypi-publish",
        ]
    else:
        assert granted in ({}, {"contents": "read"})
    assert WORKFLOWS[name]["permissions"] in ({}, {"contents": "read"})


def test_a_checkout_leaves_no_token_behind() -> None:
    steps = [step for _, _, settings in JOBS for step in settings.get("steps", [])]
    checkouts = [step for step in steps if step.get("uses", "").startswith("actions/checkout@")]
    assert checkouts and all(step["with"]["persist-credentials"] is False for step in checkouts)


def test_no_value_from_outside_is_pasted_into_a_command() -> None:
    assert [step["run"] for _, _, settings in JOBS for step in settings.get("steps", []) if "${{" in step.get("run", "")] == []


def commands(name: str) -> list[str]:
    """What a workflow runs, with each value of `matrix.session` in the place of $SESSION."""
    found = []
    for settings in WORKFLOWS[name]["jobs"].values():
        sessions = settings.get("strategy", {}).get("matrix", {}).get("session", [""])
        runs = [step["run"] for step in settings["steps"] if "run" in step]
        found += [run.replace('"$SESSION"', session) for run in runs for session in (sessions if "$SESSION" in run else [""])]
    return found


def session_names(source: str) -> dict[str, tuple[str, ...]]:
    """The sessions of a noxfile, as `nox -s` names them, and the Pythons of those that have several."""
    found = {}
    for node in (node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)):
        for made in node.decorator_list:
            if ast.unparse(made).startswith("nox.session"):
                options = {key.arg: ast.literal_eval(key.value) for key in made.keywords} if isinstance(made, ast.Call) else {}
                pythons = options.get("python", ())
                found[options.get("name", node.name)] = () if isinstance(pythons, str) else tuple(pythons)
    return found


def test_by_night_every_session_and_every_native_driver_runs() -> None:
    """Nothing that the repository can check is left to memory: each session of nox, with each Python, and each `make native-...`."""
    assert set(WORKFLOWS["nightly.yml"][True]) == {"schedule", "workflow_dispatch"}  # `on` is a boolean in YAML
    sessions = session_names((ROOT / "noxfile.py").read_text(encoding="utf-8"))
    expected = {
        f"nox -s {name}-{python}" if python else f"nox -s {name}" for name, pythons in sessions.items() for python in pythons or ("",)
    }
    expected |= {f"make {target}" for target in re.findall(r"^(native-[\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)}
    assert expected == {run for run in commands("nightly.yml") if run.startswith(("nox -s", "make"))}
    assert {"nox -s slow", "nox -s page", "nox -s tests-3.12", "make native-sanitize"} < expected


def test_what_a_plain_run_of_pytest_leaves_out_is_known() -> None:
    """A marker that keeps a test out of `make test` has a session that runs it, or needs a GPU, which no runner has."""
    options = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["pytest"]["ini_options"]
    left_out = set(re.findall(r"not (\w+)", options["addopts"][options["addopts"].index("-m") + 1]))
    assert left_out == {marker.partition(":")[0] for marker in options["markers"]} == {"gpu", "slow"}
    assert '"-m", "slow and not gpu"' in (ROOT / "noxfile.py").read_text(encoding="utf-8")


GOOD = (
    "1.2.0.tar.gz",
    "1.2.0-py3-none-manylinux_2_28_x86_64.whl",
    "1.2.0-py3-none-manylinux_2_28_aarch64.whl",
    "1.2.0-py3-none-macosx.whl",
)


@pytest.mark.parametrize(
    ("event", "ref", "names", "message"),
    [
        ("push", "v1.2.0", GOOD, ""),
        ("workflow_dispatch", "main", GOOD, ""),
        ("push", "v1.2.1", GOOD, "is not of version 1.2.1"),
        ("push", "v1.2.0", (*GOOD[:3], "1.1.0-py3-none-macosx.whl"), "1.1.0-py3-none-macosx.whl is not of version 1.2.0"),
        ("workflow_dispatch", "main", (*GOOD[:3], "1.1.0-py3-none-macosx.whl"), "is not of version 1.2.0"),
        ("push", "v1.2.0", GOOD[:3], "3 files in dist, not 4"),
    ],
)
def test_what_is_published_has_the_version_of_its_tag(event: str, ref: str, names: tuple[str, ...], message: str, tmp_path: Path) -> None:
    (tmp_path / "dist").mkdir()
    for name in names:
        (tmp_path / "dist" / (f"dejavu_llm-{name}")).touch()
    script = next(step["run"] for step in WORKFLOWS["publish.yml"]["jobs"]["check"]["steps"] if "version" in step.get("name", ""))
    environment = {**os.environ, "GITHUB_EVENT_NAME": event, "GITHUB_REF_NAME": ref}
    done = subprocess.run(["bash", "-e", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode == 0) == (message == "") and message in done.stdout, done.stdout + done.stderr

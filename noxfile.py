"""The tests on several Python and transformers versions, and the documentation: `nox`, or `nox -s docs`."""

from __future__ import annotations

import shutil

import nox

nox.options.sessions = ["tests"]


@nox.session(python=["3.11", "3.12", "3.13"])
@nox.parametrize("transformers", ["==5.10.*", ">=5.10,<6"])
def tests(session: nox.Session, transformers: str) -> None:
    """pytest with one Python and the oldest or the newest transformers that the extras allow."""
    session.install("-c", "constraints.txt", "-e", ".[serve,eval,bench,dev]", f"transformers{transformers}")
    session.run("pytest", "-q", "-n", "2", *session.posargs)


@nox.session(python="3.11")
@nox.parametrize("transformers", ["==5.17.*", ">=5.10,<6"])
def families(session: nox.Session, transformers: str) -> None:
    """Every family against two transformers: `python -m pytest tests/ -k families` with each."""
    session.install("-c", "constraints.txt", "-e", ".[serve,dev]", f"transformers{transformers}")
    session.run("pytest", "-q", "-n", "2", "tests/", "-k", "families", *session.posargs)


@nox.session(python="3.11")
def slow(session: nox.Session) -> None:
    """What takes minutes under Triton's interpreter and `make test` leaves out: before the cuda engine or its kernels change hands."""
    session.install("-c", "constraints.txt", "-e", ".[serve,dev]")
    session.run("pytest", "-q", "-n", "2", "-m", "slow and not gpu", "tests/", *session.posargs)


@nox.session(python="3.11")
def kernels(session: nox.Session) -> None:
    """Every kernel of the cuda engine compiled for every architecture, which takes no GPU; prints registers and shared memory."""
    session.install("-c", "constraints.txt", "-e", ".[dev]")
    session.run("python", "recipes/cuda_compiles.py", *session.posargs)


@nox.session(python="3.11")
def page(session: nox.Session) -> None:
    """The server's page in a browser: a Chromium of the machine, or else the one that playwright fetches."""
    session.install("-c", "constraints.txt", "-e", ".[serve,dev]", "playwright>=1.50")
    if not any(shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome")):
        session.run("playwright", "install", "chromium")
    session.run("pytest", "-q", "tests/test_page.py", *session.posargs)


@nox.session(name="serve-client", python="3.11")
@nox.parametrize("openai", ["==1.60.*", ">=1.60"])
def serve_client(session: nox.Session, openai: str) -> None:
    """What the official client reads of a server, with the oldest and the newest that the extras allow."""
    session.install("-c", "constraints.txt", "-e", ".[serve,dev]", f"openai{openai}")
    session.run("pytest", "-q", "tests/", "-k", "openai_client", *session.posargs)


@nox.session(name="command-line", python="3.11")
@nox.parametrize("typer", ["==0.26.*", ">=0.26,<0.30"])
def command_line(session: nox.Session, typer: str) -> None:
    """The commands, with the oldest and the newest typer that pyproject.toml allows."""
    session.install("-c", "constraints.txt", "-e", ".[serve,dev]", f"typer{typer}")
    session.run("pytest", "-q", "tests/test_cli.py", "tests/test_cli_errors.py", "tests/test_docs.py", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation site, into site/; a broken link is an error. The package itself is read, not imported."""
    session.install(*nox.project.load_toml("pyproject.toml")["project"]["optional-dependencies"]["docs"])
    session.run("mkdocs", "build")

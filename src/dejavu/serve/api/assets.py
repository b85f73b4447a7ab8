"""The page of a server: the files of serve/page/, each at its own name, and index.html at /.

Out: routes of HTTP. The browser is told to load nothing from elsewhere, to run no script that is written into a page, and to keep nothing,
so that a page is always that of the server that runs.
"""

from __future__ import annotations

from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

FOLDER = Path(__file__).parent.parent / "page"
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".ico": "image/x-icon",
}
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def page_routes(folder: Path) -> list[Route]:
    """A route for each file that a page may have, read anew for every request; none where there is no folder."""
    files = sorted(path for path in folder.glob("*") if path.suffix in TYPES) if folder.is_dir() else []
    return [route for path in files for route in _routes(path)]


def _routes(path: Path) -> list[Route]:
    def send(request: Request) -> Response:
        return Response(path.read_bytes(), headers=HEADERS, media_type=TYPES[path.suffix])

    names = [f"/{path.name}", *(["/"] if path.name == "index.html" else [])]
    return [Route(name, send, methods=["GET"], include_in_schema=False) for name in names]

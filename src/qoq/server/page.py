"""The page for people: its files, and the headers that keep it to this server."""

from pathlib import Path

from fastapi import APIRouter, Response

INDEX = "index.html"
_KINDS = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}
# Scripts and styles only from here, requests only to here, in nobody's frame.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def page_files() -> dict[str, tuple[bytes, dict[str, str]]]:
    """Path -> (bytes, headers) of everything the page needs: "/", and "/static/NAME".

    The page asks the server by relative paths, so it works behind any prefix.
    """
    found = {}
    for file in sorted((Path(__file__).parent / "static").iterdir()):
        if file.suffix in _KINDS:
            path = "/" if file.name == INDEX else f"/static/{file.name}"
            found[path] = (file.read_bytes(), _headers(_KINDS[file.suffix]))
    return found


def routes() -> APIRouter:
    """GET of every file, read once; open without a key, for they say nothing of the model."""
    router = APIRouter(include_in_schema=False)

    def serve(path: str, body: bytes, headers: dict[str, str]) -> None:
        @router.get(path)
        async def file() -> Response:
            return Response(body, headers=headers)

    for path, (body, headers) in page_files().items():
        serve(path, body, headers)
    return router


def _headers(kind: str) -> dict[str, str]:
    return {
        "Content-Type": kind,
        "Content-Security-Policy": _POLICY,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }

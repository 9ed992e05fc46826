"""The page at `/`, on which people draw in a browser: static files beside this module, in page/.

They carry no data and load nothing from another host: the page's scripts ask this API, as any client does. Knows
nothing of models, keys or Ray.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

from app.api.errors import ApiError

FOLDER = Path(__file__).with_name("page")
PREFIX = "/page/"  # of the files that index.html refers to
MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
HEADERS = {
    "Cache-Control": "no-cache",  # kept, but asked for again: a deployment may have changed it
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


@dataclass(frozen=True)
class PageFile:
    content: bytes
    media_type: str
    etag: str


@cache
def page_files() -> Mapping[str, PageFile]:
    """The files by name. No other path is ever opened."""
    files = {}
    for path in sorted(FOLDER.iterdir()):
        if path.suffix in MEDIA_TYPES:
            content = path.read_bytes()
            etag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
            files[path.name] = PageFile(content, f"{MEDIA_TYPES[path.suffix]}; charset=utf-8", etag)
    return files


def page_file(name: str, request: Request) -> Response:
    file = page_files().get(name)
    if file is None:
        raise ApiError(404, "There is no such route; GET / lists them.", None, "not_found")
    headers = HEADERS | {"ETag": file.etag} | ({"Vary": "Accept"} if name == "index.html" else {})
    if request.headers.get("if-none-match") == file.etag:
        return Response(status_code=304, headers=headers)
    return Response(file.content, headers=headers, media_type=file.media_type)


def prefers_html(accept: str) -> bool:
    """Whether a client names HTML and wants it no less than JSON. Browsers do; curl and libraries take anything."""
    weights = {"text/html": 0.0, "application/json": 0.0}
    for part in accept.lower().split(","):
        media_type, *parameters = (text.strip() for text in part.split(";"))
        if media_type in weights:
            weights[media_type] = max([quality(text) for text in parameters if text.startswith("q=")], default=1.0)
    return 0 < weights["text/html"] >= weights["application/json"]


def quality(parameter: str) -> float:
    try:
        return float(parameter.removeprefix("q="))
    except ValueError:
        return 0.0

"""The page at `/`: plain files, and what a browser may do with them."""

from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import FileResponse
from starlette.responses import Response
from starlette.staticfiles import StaticFiles

_FOLDER = Path(__file__).parent / "page"
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    # Files of two versions must not meet in one page.
    "Cache-Control": "no-cache",
}


class _Files(StaticFiles):
    """The files of the page, with its headers."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        answer = super().file_response(*args, **kwargs)
        answer.headers.update(_HEADERS)
        return answer


def install(app: FastAPI) -> None:
    """Let `app` answer `/` with the page, and `/page/...` with what it is made of."""
    app.mount("/page", _Files(directory=_FOLDER))
    app.add_api_route("/", _index, include_in_schema=False)


async def _index() -> FileResponse:
    return FileResponse(_FOLDER / "index.html", headers=_HEADERS)

"""The page at `/`, the routes' description at `/docs`, and what a browser may do with them."""

import base64
import hashlib
import re
from pathlib import Path
from typing import Any

import fastapi_offline
from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import FileResponse, HTMLResponse
from starlette.responses import Response
from starlette.staticfiles import StaticFiles

_FOLDER = Path(__file__).parent / "page"
# Swagger UI as files: FastAPI's own page lets another host's scripts run on the service's origin.
_SWAGGER_FOLDER = Path(fastapi_offline.__file__).parent / "static"


def _headers(policy: str) -> dict[str, str]:
    return {
        "Content-Security-Policy": (
            f"default-src 'none'; {policy}; connect-src 'self'; base-uri 'none'; "
            "form-action 'none'; frame-ancestors 'none'"
        ),
        "Referrer-Policy": "no-referrer",
        # Files of two versions must not meet in one page.
        "Cache-Control": "no-cache",
    }


_PAGE_HEADERS = _headers("script-src 'self'; style-src 'self'; img-src 'self'")


class _Files(StaticFiles):
    """The files of a page, with its headers."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        answer = super().file_response(*args, **kwargs)
        answer.headers.update(_PAGE_HEADERS)
        return answer


def install(app: FastAPI) -> None:
    """Let `app` answer `/` and `/docs` with pages, and `/page/...` with what they are made of."""
    app.mount("/page/docs", _Files(directory=_SWAGGER_FOLDER))
    app.mount("/page", _Files(directory=_FOLDER))
    app.add_api_route("/", _index, include_in_schema=False)
    described = _swagger_page(app)

    async def docs() -> HTMLResponse:
        return described

    app.add_api_route("/docs", docs, include_in_schema=False)


async def _index() -> FileResponse:
    return FileResponse(_FOLDER / "index.html", headers=_PAGE_HEADERS)


def _swagger_page(app: FastAPI) -> HTMLResponse:
    assert app.openapi_url is not None
    page = get_swagger_ui_html(
        openapi_url=app.openapi_url,
        title=f"{app.title}: routes",
        swagger_js_url="/page/docs/swagger-ui-bundle.js",
        swagger_css_url="/page/docs/swagger-ui.css",
        swagger_favicon_url="/page/icon.svg",
    )
    (script,) = re.findall(rb"<script>(.*?)</script>", bytes(page.body), re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script).digest()).decode()
    # It styles its elements one by one, and brings its pictures along.
    policy = (
        f"script-src 'self' 'sha256-{digest}'; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data:"
    )
    page.headers.update(_headers(policy))
    return page

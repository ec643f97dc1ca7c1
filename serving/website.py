"""The web page and /docs -> HTML that loads nothing of another host."""

import re
from base64 import b64encode
from hashlib import sha256
from pathlib import Path

import bentoml
from fastapi import APIRouter, Request
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import FileResponse, HTMLResponse
from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles

PAGE = Path(__file__).with_name("page") / "index.html"

# Swagger UI as BentoML bundles it: FastAPI's own /docs would load it from another host.
SWAGGER_DIR = Path(bentoml.__file__).parent / "_internal" / "server" / "static_content"
ASSETS = "/docs/assets"
SWAGGER_FILES = ("swagger-ui-bundle.js", "swagger-ui.css", "favicon-light-32x32.png")

# Pictures to try; where they come from stands beside them.
SAMPLES = PAGE.parent / "samples"
SAMPLE_NAMES = tuple(sorted(path.name for path in SAMPLES.glob("*.*g")))

website = APIRouter(include_in_schema=False)
swagger_files = StaticFiles(directory=SWAGGER_DIR)


def content_policy(html: str, *more: str) -> str:
    """Allow a page what it holds itself, and nothing of another host."""
    hashes = {
        tag: " ".join(
            f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"
            for text in re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.S)
        )
        for tag in ("script", "style")
    }
    return "; ".join(
        (
            "default-src 'none'",
            "connect-src 'self'",
            "img-src 'self' blob: data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            f"script-src 'self' {hashes['script']}",
            *(more or (f"style-src 'self' {hashes['style']}",)),
        )
    )


PAGE_POLICY = content_policy(PAGE.read_text())


@website.api_route("/", methods=["GET", "HEAD"])
async def page() -> FileResponse:
    """Return the web page."""
    headers = {"Cache-Control": "no-cache", "Content-Security-Policy": PAGE_POLICY}
    return FileResponse(PAGE, headers=headers)


@website.get("/samples/{name}")
async def sample(name: str) -> FileResponse:
    """Return a picture to try."""
    if name not in SAMPLE_NAMES:
        raise HTTPException(404)
    return FileResponse(SAMPLES / name, headers={"Cache-Control": "max-age=86400"})


@website.get("/docs")
async def docs(request: Request) -> HTMLResponse:
    """Return Swagger UI, with assets of this service only."""
    script, style, icon = (f"{ASSETS}/{name}" for name in SWAGGER_FILES)
    html = get_swagger_ui_html(
        openapi_url=str(request.app.openapi_url),
        title=request.app.title,
        swagger_js_url=script,
        swagger_css_url=style,
        swagger_favicon_url=icon,
    )
    # Swagger UI writes styles into its elements.
    styles = "style-src 'self' 'unsafe-inline'"
    html.headers["Content-Security-Policy"] = content_policy(bytes(html.body).decode(), styles)
    return html

"""Web server of the page. It loads nothing from other hosts, and sends nothing to them."""

import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from fastapi import FastAPI, Request, Response
from fastapi.responses import PlainTextResponse
from starlette.middleware.base import RequestResponseEndpoint

os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}  # before the import of gradio

import gradio as gr
import uvicorn

from sagl.errors import UserError
from sagl.playground.html import CSS
from sagl.playground.page import Page
from sagl.playground.rows import NOT_KEPT
from sagl.playground.session import Playground

SOURCES = "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'"
"""Content security policy: browsers refuse requests to other hosts."""
FONT = ("system-ui", "sans-serif")


def make_app(playground: Playground) -> FastAPI:
    """Build the web application: the page, and the run folders at /runs/KEY.zip."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/runs/{key}.zip")
    def run_folder(key: str) -> Response:
        return download(playground, key)

    @app.middleware("http")
    async def add_policy(request: Request, call_next: RequestResponseEndpoint) -> Response:
        response = await call_next(request)
        response.headers["Content-Security-Policy"] = SOURCES
        return response

    theme = gr.themes.Default(font=FONT, font_mono=("ui-monospace", "monospace"), primary_hue="blue").set(
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_400",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_400",
    )
    blocks = Page(playground).blocks.queue(api_open=False)
    gr.mount_gradio_app(
        app, blocks, path="/", css=CSS, theme=theme, ssr_mode=False, enable_monitoring=False, footer_links=[]
    )
    return app


def download(playground: Playground, key: str) -> Response:
    """Return a run folder as a zip file, or one line that says why it cannot be had."""
    download = playground.downloads.get(key)
    if download is None:
        return PlainTextResponse(NOT_KEPT, status_code=404)
    try:
        return Response(download.zip(), media_type="application/zip")
    except UserError as error:
        return PlainTextResponse(playground.message(error), status_code=409)


class PageServer(uvicorn.Server):
    """Web server of a page.

    At a stop signal, the connections of open pages are closed, and the errors that this causes are not logged.
    """

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """End at SIGHUP as at SIGINT and SIGTERM, unless it is ignored."""
        with super().capture_signals():
            previous = signal.getsignal(signal.SIGHUP)
            if previous is not signal.SIG_IGN:
                signal.signal(signal.SIGHUP, self.handle_exit)
            try:
                yield
            finally:
                signal.signal(signal.SIGHUP, previous)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL + 1)
        super().handle_exit(sig, frame)


def make_server(playground: Playground) -> PageServer:
    """Return the web server; `run(sockets=[listener])` serves the page until the process is interrupted."""
    return PageServer(uvicorn.Config(make_app(playground), log_level="warning", timeout_graceful_shutdown=1))

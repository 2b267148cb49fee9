"""The text endpoint as an ASGI application.

Source: OpenAI API reference, "Completions", "Chat completions" and "Models".
"""

from __future__ import annotations

import time
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from ibnorm_export.errors import PromptError, shortened
from ibnorm_export.serving.text.admission import TextQueue
from ibnorm_export.serving.text.metrics import CONTENT_TYPE
from ibnorm_export.serving.text.middleware import BodySizeMiddleware
from ibnorm_export.serving.text.protocol import CHAT, COMPLETION, DEFAULT_MAX_TOKENS, Chat, Completion, Refused
from ibnorm_export.serving.text.responses import TextRequest, check_model, error_response, respond
from ibnorm_export.serving.text.template_process import Renderer

__all__ = ["create_app", "served_paths"]

_CHAT_PATH = "/v1/chat/completions"


def create_app(queue: TextQueue, name: str, *, max_positions: int, template: Renderer | None = None) -> FastAPI:
    """Make the application.

    Args:
        queue: generates texts.
        name: name of the model for clients.
        max_positions: maximum number of tokens of a prompt and its text together.
        template: chat template of the tokenizer; None disables chat.
    """
    app = FastAPI(title=name, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(BodySizeMiddleware, limit=queue.limits.request_bytes)
    _add_errors(app)
    _add_models(app, queue, name=name)
    _add_metrics(app, queue)
    _add_completions(app, queue, name=name)
    if template is not None:
        _add_chat(app, queue, name=name, max_positions=max_positions, template=template)
    return app


def served_paths(app: FastAPI) -> list[str]:
    """Return the paths that an application serves, without those that have parameters."""
    return [route.path for route in app.routes if hasattr(route, "path") and "{" not in route.path]


def _add_errors(app: FastAPI) -> None:
    """Answer every error in OpenAI's form."""

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> JSONResponse:
        return error_response(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            reason = f"the body is not valid JSON: {first['ctx']['error']}, at character {first['loc'][1]}"
        else:
            reason = f"{'.'.join(str(part) for part in first['loc'][1:]) or 'the body'}: {first['msg']}"
        return error_response(Refused(400, reason, code="invalid"))

    @app.exception_handler(PromptError)
    async def bad_prompt(request: Request, error: PromptError) -> JSONResponse:
        return error_response(Refused(400, str(error), code="invalid"))

    @app.exception_handler(HTTPException)
    async def failed(request: Request, error: HTTPException) -> JSONResponse:
        reason = str(error.detail)
        if error.status_code == 404:
            reason = (
                f"{shortened(request.url.path)} does not exist; this endpoint serves {', '.join(served_paths(app))}"
            )
            if request.url.path == _CHAT_PATH:
                reason += " (the tokenizer has no chat template)"
        return error_response(Refused(error.status_code, reason, code="invalid"))


def _add_models(app: FastAPI, queue: TextQueue, *, name: str) -> None:
    model = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "ibnorm-export"}

    @app.get("/health")
    async def health() -> dict[str, Any]:
        limit = queue.limits.concurrency
        return {"status": "ok", "running": queue.running, "waiting": queue.waiting, "limit": limit}

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{wanted:path}")
    async def get_model(wanted: str) -> dict[str, Any]:
        check_model(wanted, name)
        return model


def _add_metrics(app: FastAPI, queue: TextQueue) -> None:
    @app.get("/metrics")
    async def metrics() -> Response:
        gauges = {
            "ibnorm_texts_running": ("Texts that are being generated.", queue.running),
            "ibnorm_texts_waiting": ("Texts without a first token.", queue.waiting),
            "ibnorm_texts_limit": ("Texts that may be generated at once.", queue.limits.concurrency),
        }
        return Response(queue.metrics.text(gauges), headers={"content-type": CONTENT_TYPE})


def _add_completions(app: FastAPI, queue: TextQueue, *, name: str) -> None:
    @app.post("/v1/completions")
    async def complete(request: Request, body: Completion) -> Any:
        prompts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
        if len(prompts) != 1:
            raise Refused(400, "this endpoint takes one prompt in each request", code="invalid")
        text = TextRequest(body, prompts[0], max_tokens=body.max_tokens or DEFAULT_MAX_TOKENS, shape=COMPLETION)
        return await respond(request, queue, text=text, model=name)


def _add_chat(app: FastAPI, queue: TextQueue, *, name: str, max_positions: int, template: Renderer) -> None:
    @app.post(_CHAT_PATH)
    async def chat(request: Request, body: Chat) -> Any:
        prompt = await template.render([message.model_dump() for message in body.messages])
        most = body.max_completion_tokens or body.max_tokens or max_positions
        text = TextRequest(body, prompt, max_tokens=most, shape=CHAT)
        return await respond(request, queue, text=text, model=name)

"""Errors of the management API: `application/problem+json`, made in one place (serverless-api.md §7.1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import Match

from pilotlight.errors import (
    ClusterError,
    ConflictError,
    EngineEnvironmentError,
    InvalidInputError,
    NotFoundError,
    PilotlightError,
    StoreError,
)

_log = structlog.get_logger(__name__)

_METHODS = ("DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT")

RETRY_AFTER_S = 5
"""Told to callers of what is broken at the moment; an operator or a network has to mend it."""


class UnavailableError(PilotlightError):
    """Something that is needed for the request does not answer at the moment; the caller may try again."""


class RejectedInputError(InvalidInputError):
    """Input with several faults at once.

    Args:
        message: One sentence about all of them.
        errors: One sentence for each.
    """

    def __init__(self, message: str, *, errors: Sequence[str]) -> None:
        super().__init__(message)
        self.errors = tuple(errors)


class ProblemResponse(JSONResponse):
    """A problem as the answer to a request."""

    media_type = "application/problem+json"


def described(description: dict[str, Any]) -> dict[str, Any]:
    """An OpenAPI description in which problems have their media type; FastAPI knows one type per route."""
    for item in description.get("paths", {}).values():
        for operation in item.values():
            for status, answer in operation.get("responses", {}).items():
                if status >= "400" and "application/json" in answer.get("content", {}):
                    answer["content"] = {ProblemResponse.media_type: answer["content"]["application/json"]}
    return description


def problem(status: int, detail: str, errors: Sequence[str] = ()) -> dict[str, Any]:
    """The body of an error answer."""
    body: dict[str, Any] = {"title": HTTPStatus(status).phrase, "status": status, "detail": detail}
    if errors:
        body["errors"] = list(errors)
    return body


def problem_of(error: Exception) -> dict[str, Any]:
    """The body for an error raised on purpose; any other is an internal error and says nothing."""
    match error:
        case InvalidInputError():
            errors = list(getattr(error, "errors", ()))
            if not errors and error.field:
                errors = [f"$.{error.field}: {error}"]
            return problem(422, str(error), errors)
        case NotFoundError():
            return problem(404, str(error))
        case ConflictError():
            return problem(409, str(error))
        case UnavailableError() | StoreError() | ClusterError() | EngineEnvironmentError():
            return problem(503, str(error))
        case _:
            return problem(500, "the gateway failed to handle this request; its log says why")


def response_of(error: Exception) -> ProblemResponse:
    """The answer to a request that failed with this error."""
    body = problem_of(error)
    headers = {"Retry-After": str(RETRY_AFTER_S)} if body["status"] == 503 else None
    return ProblemResponse(body, status_code=body["status"], headers=headers)


def sentences(errors: Sequence[Mapping[str, Any]]) -> list[str]:
    """One sentence for each fault that pydantic found, in the contract's form `$.field: what is wrong`."""
    return [_sentence(error) for error in errors]


def install(app: FastAPI) -> None:
    """Let every error of an application, our own and the framework's, end as a problem."""

    async def on_validation(_request: Request, error: Exception) -> ProblemResponse:
        assert isinstance(error, RequestValidationError)
        faults = error.errors()
        broken = next((fault for fault in faults if fault["type"] == "json_invalid"), None)
        if broken is not None:
            reason = str(broken.get("ctx", {}).get("error", "malformed"))
            return ProblemResponse(problem(400, f"the body is not valid JSON: {reason}"), status_code=400)
        return ProblemResponse(problem(422, "Request validation failed.", sentences(faults)), status_code=422)

    async def on_http(request: Request, error: Exception) -> ProblemResponse:
        assert isinstance(error, HTTPException)
        detail = "resource not found" if error.status_code == 404 else str(error.detail)
        headers = {"Allow": _allowed(app, request)} if error.status_code == 405 else error.headers
        return ProblemResponse(
            problem(error.status_code, detail), status_code=error.status_code, headers=headers
        )

    async def on_ours(_request: Request, error: Exception) -> ProblemResponse:
        return response_of(error)

    async def on_any(request: Request, error: Exception) -> ProblemResponse:
        _log.error("management.request_failed", path=request.url.path, exc_info=error)
        return response_of(error)

    app.add_exception_handler(RequestValidationError, on_validation)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(PilotlightError, on_ours)
    app.add_exception_handler(Exception, on_any)


def _allowed(app: FastAPI, request: Request) -> str:
    """The methods of all routes of a path; Starlette names those of the first one."""

    def answers(method: str) -> bool:
        scope = {**request.scope, "method": method}
        return any(route.matches(scope)[0] is Match.FULL for route in app.routes)

    return ", ".join(filter(answers, _METHODS))


def _sentence(error: Mapping[str, Any]) -> str:
    path = [part for part in error["loc"] if part not in {"body", "query", "path"}]
    if error["type"] == "extra_forbidden":
        parent = ".".join(["$", *(str(part) for part in path[:-1])])
        return f"{parent}: additional properties {str(path[-1])!r} not allowed"
    where = ".".join(["$", *(str(part) for part in path)])
    message = str(error["msg"]).removeprefix("Value error, ")
    value = error.get("input")
    # A long or structured value would drown the message, and an environment may hold secrets.
    shown = f" (got {value!r})" if isinstance(value, int | float) or _is_short_text(value, path) else ""
    return f"{where}: {message}{shown}"


def _is_short_text(value: object, path: Sequence[object]) -> bool:
    return isinstance(value, str) and len(value) <= 80 and "env" not in path and "//" not in value

"""The OpenAPI document, complete: what FastAPI derives from the routes, and what it can't know of them.

Routes read their bodies through dependencies, which FastAPI takes for headers at best; ``describes_body`` says on such
a dependency, or on a handler, which model it reads, and that is also what reads it. Errors have one shape, and each has
one meaning for the whole service: a route names those of its own with ``refuses``, those that any route may answer are
added here. Nothing is written twice: schemas are the models', limits the parameters', texts the docstrings'.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from types import ModuleType
from typing import Any

from fastapi import FastAPI
from fastapi.dependencies.models import Dependant
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from pydantic import BaseModel

from tx.tinker.wire.codec import JSON, PROTOBUF
from tx.tinker.wire.responses import Problem

_PROBLEM = {"schema": {"$ref": f"#/components/schemas/{Problem.__name__}"}}

_MEANINGS = {
    400: "The request is wrong: `detail` names the field, what it was and what is accepted.",
    401: "No API key was sent, or none that counts here.",
    403: "The signature of the address is wrong or too old.",
    404: "The request names something that does not exist here.",
    408: "The body did not arrive in time: send it again, faster.",
    410: "It was here and is over.",
    413: "The body is too large, as it came or decompressed.",
    422: "A parameter of the address or a header is wrong.",
    429: "There is as much queued, or asked with this key, as is accepted: nothing was stored, come again after "
    "`Retry-After` seconds.",
    500: "An error of the server; its log has more under the id in `detail`.",
    503: "The database is not available at the moment.",
}

_EVERYWHERE = (400, 408, 413, 500)
"""Whatever a route does: an address or a body can be unreadable, late or too large, and a server can have bugs."""

_CHECKED = {"enum", "const", "pattern", "minLength", "maxLength"}

_API_KEY = "ApiKey"

_DESCRIPTION = """\
A self-hosted service that speaks the Tinker API: train and sample many LoRA adapters on one base model.

A request that needs the device becomes a job and is answered with a `request_id` at once; `retrieve_future` hands out
its result, or 408 while there is none. A request that is repeated with the same numbers (`seq_id` and its siblings)
gets the first one's answer. In the bodies a null means the default, unless a field says otherwise. Errors are
`{"detail": "field: got …, accepted: …"}`.
"""


@dataclass(frozen=True)
class _Body:
    model: type[BaseModel]
    protobuf: str | None


def describes_body[**P, R](
    model: type[BaseModel], protobuf: str | None = None
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator of a dependency or a handler that reads the request's body.

    Args:
        model: of the body as JSON.
        protobuf: name of the message in ``tinker.proto`` that the body may be instead.
    """

    def mark(reader: Callable[P, R]) -> Callable[P, R]:
        setattr(reader, _MARK, _Body(model, protobuf))
        return reader

    return mark


_MARK = "_tx_body"


def refuses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The ``responses`` of a route that answers these errors of its own."""
    return {status: _problem(status) | {"model": Problem} for status in statuses}


def binary(media_type: str, description: str) -> dict[str, Any]:
    """An entry of ``responses``: bytes."""
    return {"description": description, "content": {media_type: _bytes()}}


def publish(
    app: FastAPI,
    modules: Sequence[ModuleType],
    prefix: str,
    database: Callable[..., Any],
    at_the_gate: Callable[[str], Collection[int]],
) -> None:
    """Have ``app`` serve the document of the routers in ``modules``, each of which is a tag.

    Args:
        database: the dependency of the routes that need the database, and so may answer that it is away.
        at_the_gate: by path, how a request may be refused before its route sees it; a path that is never refused with
            401 needs no API key.
    """
    routes = {
        (prefix + route.path_format, method.lower()): route
        for module in modules
        for route in module.router.routes
        if isinstance(route, APIRoute)
        for method in route.methods or ()
    }
    bodies = {route.name: body for route in routes.values() if (body := _body_of(route)) is not None}

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            made = get_openapi(
                title=app.title,
                version=app.version,
                description=_DESCRIPTION,
                routes=app.routes,
                webhooks=[_takes(name, body.model) for name, body in bodies.items()],
                tags=[{"name": tag_of(module), "description": _first_line(module)} for module in modules],
            )
            _complete(made, routes, bodies, database, at_the_gate)
            app.openapi_schema = made
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]  # the way that FastAPI documents


def tag_of(module: ModuleType) -> str:
    """The name under which a router's operations are grouped."""
    return module.__name__.rpartition(".")[2]


def _takes(name: str, model: type[BaseModel]) -> APIRoute:
    """A route that FastAPI sees the body of: it exists in the document alone, and only until its part is taken."""

    def read(body: BaseModel) -> None: ...

    read.__annotations__["body"] = model
    return APIRoute(name, read, methods=["POST"])


def _complete(
    document: dict[str, Any],
    routes: Mapping[tuple[str, str], APIRoute],
    bodies: Mapping[str, _Body],
    database: Callable[..., Any],
    at_the_gate: Callable[[str], Collection[int]],
) -> None:
    described = document.pop("webhooks")
    for (path, method), route in routes.items():
        operation = document["paths"][path][method]
        if route.name in bodies:
            json_body = described[route.name]["post"]["requestBody"]
            operation["requestBody"] = _request_body(bodies[route.name], json_body["content"][JSON])
        refusals = at_the_gate(path)
        if 401 not in refusals:
            operation["security"] = []
        needs_database = database in _calls(route.dependant)
        _complete_errors(operation, {*_EVERYWHERE, *refusals} | ({503} if needs_database else set()))
    for name in ("HTTPValidationError", "ValidationError"):  # FastAPI's own, which we don't answer
        document["components"]["schemas"].pop(name, None)
    key = {
        "type": "apiKey",
        "in": "header",
        "name": "X-API-Key",
        "description": "Of an owner, to whom what belongs to others does not exist; or a token that stands for it. A "
        "server without a key file asks for none, and everything belongs to everybody.",
    }
    document["components"]["securitySchemes"] = {_API_KEY: key}
    document["security"] = [{}, {_API_KEY: []}]


def _request_body(body: _Body, json_content: dict[str, Any]) -> dict[str, Any]:
    is_binary = body.protobuf is not None
    return {
        "description": f"A `{body.protobuf}` of tinker.proto, or as older clients send it, JSON."
        if is_binary
        else "Read as JSON, whatever the content type says.",
        "content": {JSON: json_content} | ({PROTOBUF: _bytes()} if is_binary else {}),
        # Without a body the server reads {}.
        "required": is_binary or any(field.is_required() for field in body.model.model_fields.values()),
    }


def _complete_errors(operation: dict[str, Any], common: Collection[int]) -> None:
    answers = operation["responses"]
    if not any(_may_be_refused(parameter) for parameter in operation.get("parameters", ())):
        answers.pop("422", None)
    own = {"422"} & answers.keys()
    for status in {*common, *map(int, own)}:
        if str(status) not in answers or status == 422:
            answers[str(status)] = _problem(status) | {"content": {JSON: _PROBLEM}}
    operation["responses"] = dict(sorted(answers.items()))


def _may_be_refused(parameter: dict[str, Any]) -> bool:
    """Whether FastAPI checks more of a parameter than that it is text."""
    schema = parameter["schema"]
    kinds = [kind for kind in schema.get("anyOf", [schema]) if kind.get("type") != "null"]
    is_text = all(kind.get("type") == "string" and not _CHECKED & kind.keys() for kind in kinds)
    return not is_text or (parameter["required"] and parameter["in"] != "path")


def _body_of(route: APIRoute) -> _Body | None:
    return next((body for call in _calls(route.dependant) if (body := getattr(call, _MARK, None)) is not None), None)


def _calls(dependant: Dependant) -> Iterator[Callable[..., Any]]:
    if dependant.call is not None:
        yield dependant.call
    for inner in dependant.dependencies:
        yield from _calls(inner)


def _problem(status: int) -> dict[str, Any]:
    answer: dict[str, Any] = {"description": f"{HTTPStatus(status).phrase}. {_MEANINGS[status]}"}
    if status == 429:
        answer["headers"] = {"Retry-After": {"schema": {"type": "integer"}, "description": "Seconds."}}
    if status == 401:
        renewable = '`Bearer error="invalid_token"` for a token that has expired.'
        answer["headers"] = {"WWW-Authenticate": {"schema": {"type": "string"}, "description": renewable}}
    return answer


def _bytes() -> dict[str, Any]:
    return {"schema": {"type": "string", "format": "binary"}}


def _first_line(module: ModuleType) -> str:
    return (module.__doc__ or "").partition("\n")[0]

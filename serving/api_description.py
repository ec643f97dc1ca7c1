"""Routes -> openapi.json: every status that an address can answer with, in its form."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from serving.answers import PROBLEMS, Code, Problem
from serving.refusals import PROBLEM_TYPE
from serving.tensors import InferRequest

Responses = dict[int | str, dict[str, Any]]

# What every address may answer.
EVERYWHERE: tuple[Code, ...] = (
    "host_not_allowed",
    "unauthorized",
    "address_too_long",
    "internal_error",
)

REFERENCE = "#/components/schemas/{model}"

RESPONSE_HEADERS = {
    "X-Request-ID": "That of the request, or a new one; it stands in the line of the log.",
}
# Of answers that a network gave.
MODEL_HEADERS = {
    "X-Model": "Variant of the network.",
    "X-Artifact-SHA256": "Of the artifact's manifest.",
    "X-Preprocess-SHA256": "Of what was done to the picture before.",
    "Server-Timing": "Milliseconds of decode, preprocess, queue and infer.",
}

PROBES = {
    "/livez": "Whether the service answers.",
    "/readyz": "Whether the service takes requests.",
    "/metrics": "Metrics for Prometheus.",
}


def problems(*codes: Code, also: Responses | None = None) -> Responses:
    """Describe the answers of some codes, of those that every address has, and of others."""
    texts: dict[int, list[str]] = {}
    for code in (*codes, *EVERYWHERE):
        status, meaning = PROBLEMS[code]
        texts.setdefault(status, []).append(f"{code}: {meaning}.")
    described: Responses = dict(also or {})
    for status, lines in texts.items():
        earlier = described.get(status, {}).get("description", "")
        new = [line for line in lines if line not in earlier]
        described[status] = {
            "description": "\n\n".join([earlier, *new] if earlier else new),
            "content": {PROBLEM_TYPE: {"schema": {"$ref": REFERENCE.format(model="Problem")}}},
        }
    return dict(sorted(described.items(), key=lambda item: int(item[0])))


def describe(app: FastAPI) -> None:
    """Give an application its openapi.json."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _describe(app)
        return app.openapi_schema

    app.openapi = openapi


def _describe(app: FastAPI) -> dict[str, Any]:
    schema = get_openapi(
        title=app.title, version=app.version, description=app.description, routes=app.routes
    )
    schemas = schema["components"]["schemas"]
    for model in (Problem, InferRequest):
        own = model.model_json_schema(ref_template=REFERENCE)
        schemas |= own.pop("$defs", {})
        schemas[model.__name__] = own
    # FastAPI's own, which no address answers with: a path takes any name, and other names are 404.
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    for path, operations in schema["paths"].items():
        for operation in operations.values():
            _complete(operation, is_classification=operation.get("requestBody") is not None)
            own = operation["responses"].get("422", {}).get("content", {})
            if PROBLEM_TYPE not in own:
                operation["responses"].pop("422", None)
            assert path.startswith("/")
    for path, text in PROBES.items():
        schema["paths"][path] = {"get": _probe(text)}
    return schema


def _complete(operation: dict[str, Any], is_classification: bool) -> None:
    for status, response in operation["responses"].items():
        headers = dict(RESPONSE_HEADERS)
        if is_classification and status == "200":
            headers |= MODEL_HEADERS
        if status in ("429", "503") and PROBLEM_TYPE in response.get("content", {}):
            headers["Retry-After"] = "Seconds after which to ask again."
        response["headers"] = {
            name: {"description": text, "schema": {"type": "string"}}
            for name, text in headers.items()
        }


def _probe(text: str) -> dict[str, Any]:
    responses = {"200": {"description": "Yes.", "content": {"text/plain": {}}}}
    responses["503"] = {"description": "Not now.", "content": {"text/plain": {}}}
    responses |= {str(status): value for status, value in problems().items()}
    operation = {"summary": text, "tags": ["probes"], "responses": responses}
    _complete(operation, is_classification=False)
    return operation

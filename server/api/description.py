"""What `/openapi.json` says beyond what FastAPI reads off the routes: who may ask, and which errors there are not."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from server.api.rules import PUBLIC_PATHS
from server.settings import Settings

_BEARER = "bearer"


def describe_api(app: FastAPI, settings: Settings) -> None:
    """Let an application's description be true: every route but the public ones takes a key, none answers 422, and what
    the settings bound is said to be bounded."""
    plain = app.openapi

    def described() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _amended(plain(), settings)
        return app.openapi_schema

    app.openapi = described  # type: ignore[method-assign]


def _amended(document: dict[str, Any], settings: Settings) -> dict[str, Any]:
    components = document.setdefault("components", {})
    # FastAPI's own answer to invalid requests, which `errors.py` replaces by 400.
    for name in ("HTTPValidationError", "ValidationError"):
        components.get("schemas", {}).pop(name, None)
    components["securitySchemes"] = {
        _BEARER: {"type": "http", "scheme": "bearer", "description": "An API key; a server without keys needs none."}
    }
    for name in ("ChatBody", "CompletionBody"):
        components["schemas"][name]["properties"]["n"]["anyOf"][0]["maximum"] = settings.max_n
    for path, operations in document["paths"].items():
        for operation in operations.values():
            operation["responses"].pop("422", None)
            operation["security"] = [] if path in PUBLIC_PATHS else [{_BEARER: []}]
    return document

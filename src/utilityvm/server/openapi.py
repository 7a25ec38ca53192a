"""The OpenAPI 3.1 document, made from the table of calls and its types."""

from __future__ import annotations

import re
from typing import Any

import msgspec

from utilityvm.server.problems import CONTENT_TYPE
from utilityvm.server.routes import OCTETS, PARTS, ROUTES, Route
from utilityvm.server.types import Problem

_REF = "#/components/schemas/{name}"


def document(version: str) -> dict[str, Any]:
    """The document of this version."""
    types = [Problem, *(kind for route in ROUTES for kind in (route.answer, route.body) if kind not in (None, bytes))]
    _, components = msgspec.json.schema_components(types, ref_template=_REF)
    paths: dict[str, dict[str, Any]] = {}
    for route in ROUTES:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "utilityvm",
            "version": version,
            "description": "Utility VMs, their disks and the programs in them. Every error is a problem document.",
        },
        "servers": [{"url": "http://utilityvm", "description": "the Unix socket of this user's server"}],
        "paths": paths,
        "components": {"schemas": components},
    }


def _operation(route: Route) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": route.name,
        "summary": route.summary,
        "parameters": [*_path_parameters(route), *_query_parameters(route)],
        "responses": {
            str(route.status): _answer(route),
            "default": {
                "description": "It failed: nothing was changed, unless the problem says otherwise.",
                "content": {CONTENT_TYPE: {"schema": _schema(Problem)}},
            },
        },
    }
    if route.body is bytes:
        operation["requestBody"] = {
            "required": True,
            "content": {OCTETS: {"schema": {"type": "string", "format": "binary"}}},
        }
    elif route.body is not None:
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": _schema(route.body)}}}
    return operation


def _answer(route: Route) -> dict[str, Any]:
    if route.answer is None:
        return {"description": "It is done."}
    schema = {"type": "string", "format": "binary"} if route.answer is bytes else _schema(route.answer)
    return {"description": "It is done.", "content": {route.media_type: {"schema": schema}}}


def _path_parameters(route: Route) -> list[dict[str, Any]]:
    return [
        {"name": name, "in": "path", "required": True, "schema": _schema(PARTS[name])}
        for name in re.findall(r"\{(\w+)\}", route.path)
    ]


def _query_parameters(route: Route) -> list[dict[str, Any]]:
    return [
        {
            "name": field.encode_name,
            "in": "query",
            "required": field.required,
            "schema": _schema(field.type) | ({} if field.required else {"default": field.default}),
        }
        for field in msgspec.structs.fields(route.query)
    ]


def _schema(kind: Any) -> dict[str, Any]:
    (schema,), _ = msgspec.json.schema_components([kind], ref_template=_REF)
    return schema

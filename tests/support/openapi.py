"""Whether a reply is one that the OpenAPI document has: its status, its media type, its schema."""

from __future__ import annotations

import json
import re
from functools import cache
from typing import Any

import httpx
import jsonschema_rs

METHODS = ("get", "put", "post", "delete")

_NOT_SERVED = ' is not served here."}'
"""The end of a reply to an address that no route has, however it looks before it is decoded."""


class Document:
    """An OpenAPI document with JSON schemas of draft 2020-12, as OpenAPI 3.1 has them."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.content = document
        paths = sorted(document["paths"], key=lambda path: ("{checkpoint_id}" in path, path.count("{")))
        self._patterns = [(_pattern(path), path) for path in paths]
        self._validator = cache(self._make_validator)

    def operation(self, method: str, path: str) -> tuple[str, dict[str, Any]] | None:
        """The path as the document has it, and the operation; None for what is not served."""
        for pattern, name in self._patterns:
            if pattern.fullmatch(path) and method.lower() in self.content["paths"][name]:
                return name, self.content["paths"][name][method.lower()]
        return None

    def check(self, reply: httpx.Response, root_path: str = "") -> None:
        """AssertionError for a reply that its operation, under ``root_path``, does not declare."""
        method = reply.request.method
        found = self.operation(method, reply.request.url.path.removeprefix(root_path))
        if found is None or reply.text.endswith(_NOT_SERVED):
            assert reply.status_code in (400, 401, 404, 405, 413, 429), reply.text
            return
        path, operation = found
        shown = f"{method} {path} answered {reply.status_code}"
        declared = operation["responses"].get(str(reply.status_code))
        assert declared is not None, f"{shown}, declared: {list(operation['responses'])}; {reply.text[:300]}"
        if reply.status_code == 302:
            assert declared["headers"].keys() <= {name.title() for name in reply.headers}
            return
        media_type = reply.headers.get("content-type", "").partition(";")[0]
        assert media_type in declared["content"], f"{shown} as {media_type}, declared: {list(declared['content'])}"
        if media_type == "application/json":
            validator = self._validator(json.dumps(declared["content"][media_type]["schema"]))
            problem = next(iter(validator.iter_errors(json.loads(reply.content))), None)
            assert problem is None, f"{shown}: {problem}; {reply.text[:300]}"

    def _make_validator(self, schema: str) -> Any:
        return jsonschema_rs.validator_for(json.loads(schema) | {"components": self.content["components"]})


def _pattern(path: str) -> re.Pattern[str]:
    names = re.split(r"\{(\w+)\}", path)
    names[1::2] = ["(.+)" if name == "checkpoint_id" else "([^/]*)" for name in names[1::2]]
    names[::2] = [re.escape(name) for name in names[::2]]
    return re.compile("".join(names))

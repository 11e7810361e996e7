"""An app with a stand-in engine and live ids for every route, and what is sent at it.

Three kinds of cases: schemathesis' boundary values, its random data (both valid and invalid), and what no schema can
say, each put into every field in turn: text that a database refuses, numbers past 64 bits, NaN, deep nesting, bytes
that are no text. In two cases of three, ids are of things that exist: random ones only ever meet a 404.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import math
import random
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

import httpx
import hypothesis
import requests
import schemathesis
from fastapi.testclient import TestClient
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import FailureGroup
from schemathesis.generation.case import Case
from schemathesis.generation.modes import GenerationMode
from schemathesis.specs.openapi import checks

from tests.support.openapi import Document
from tests.tinker.conftest import BASE, Client, StandInEngine
from tx.tinker.checkpoints import CheckpointCard
from tx.tinker.config import TxConfig
from tx.tinker.db import Checkpoint, now, open_database, writing
from tx.tinker.service import HOLD_S, Service
from tx.tinker.wire.paths import PathKind, TinkerPath
from tx.types import LoraConfig

CHECKS = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
]
"""No server error, no status, media type or schema that the document does not have."""

MODES = [GenerationMode.POSITIVE, GenerationMode.NEGATIVE]

DEEP = "[" * 20_000 + "]" * 20_000
HOSTILE_JSON = (
    '"\\u0000"', '"a\\u0000b"', '"\\ud800"', '"\\udc00x"', '"\\uffff"', "NaN", "-Infinity", "1e400", "-0.0", "1.5",
    str(2**31), str(2**63 - 1), str(2**63), str(2**64 - 1), str(2**64), str(-(2**63) - 1), "9" * 5000,
    '"' + "9" * 5000 + '"', DEEP, '{"a":' * 300 + "1" + "}" * 300, "[]", "{}", "null", "true", '""',
    '"' + "x" * 70_000 + '"',
    '{"\\u0000":"\\u0000"}', '{"type":"adamw","x":NaN}', '{"type":"adamw","x":"\\u0000"}',
    '{"chunks":[{"tokens":[NaN]}]}',
)  # fmt: skip
"""Values for one field of a body, as JSON text: some of them Python could not write."""

HOSTILE_BODIES = (
    (b"", "application/json"),
    (b"\xff\xfe\x00", "application/json"),
    (b'{"a": "\xed\xa0\x80"}', "application/json"),
    (b"\x00", "application/x-protobuf"),
    (b"\x0a\x03a\x00b", "application/x-protobuf"),
    (b"\x0a\x02\xff\xfe", "application/x-protobuf"),
    (b"{}", "text/xml; charset=\xff"),
    (b"{}", ";;;"),
    (DEEP.encode(), "application/json"),
)
HOSTILE_TEXT = (
    "\0", "a\0b", "%00", "\ud800", "\uffff", "..", "../..", "/", "//", "'", "%", "?", "#", "\n", "9" * 5000, str(2**63),
    str(2**64), "-1", "NaN", "1e400", "true", "", " ", "x" * 3000,
    "0001-01-01T00:00:00+23:59", "9999-12-31T23:00:00-23:00",
    "0001-01-01", "9999-12-31",
)  # fmt: skip
"""Values for one parameter, percent-encoded; the lone surrogate as the bytes that are no UTF-8."""


class Lab:
    """One app on a database of its own. Counts what it sent; ``failures`` has a report per operation and complaint."""

    def __init__(self, folder: Path, database_url: str, seed: int) -> None:
        config = TxConfig(base_model=BASE, data_dir=folder, database_url=database_url)
        self.seed = seed
        self.random = random.Random(seed)
        self.service = Service(config, open_database(database_url), hold_s=0.01)
        self.engine = StandInEngine(database_url)
        self.client = Client(self.service)
        self.plain = TestClient(self.client.app)  # one that looks at no reply
        self.document = Document(self.client.app.openapi())
        self.schema = schemathesis.openapi.from_dict(self.client.app.openapi())
        self.sent = 0
        self.statuses: Counter[tuple[str, int]] = Counter()
        self.failures: dict[tuple[str, str], str] = {}
        self._numbers = itertools.count(1)

    def __enter__(self) -> Lab:
        self.engine.start()
        self.client.__enter__()
        self.plain.portal = self.client.portal
        return self

    def __exit__(self, *_: object) -> None:
        self.client.__exit__(None, None, None)
        self.engine.close()
        self.service.close()

    def operations(self) -> list[Any]:
        """Those of the document, in its order."""
        return [found.ok() for found in self.schema.get_all_operations()]

    def fuzz(self, operation: Any, cases: float) -> None:
        """Send about ``cases``: half of them schemathesis' boundary values, if it has so many, the others random."""
        known = self.known()
        before = self.sent
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            boundaries = self.schema.iter_coverage_cases(
                operation, generation_modes=MODES, generation_config=self.schema.config.generation
            )
            for case in itertools.islice(boundaries, math.ceil(cases / 2)):
                self._fill_in(case, known)
                self.send(case)
            for mode in MODES:
                self._draw(operation, mode, max(1, math.ceil((cases - (self.sent - before)) / 2)), known)

    def _draw(self, operation: Any, mode: GenerationMode, examples: int, known: dict[str, Any]) -> None:
        @hypothesis.seed(self.seed)
        @hypothesis.settings(
            max_examples=examples,
            database=None,
            deadline=None,
            phases=[hypothesis.Phase.generate],
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
        def run(case: Case) -> None:
            self._fill_in(case, known)
            self.send(case)

        # An operation without parameters and body has no invalid data.
        with contextlib.suppress(hypothesis.errors.Unsatisfiable, schemathesis.errors.InvalidSchema):
            run()

    def send(self, case: Case) -> None:
        """Send one case and note what the checks say of the answer."""
        self.sent += 1
        prepared = requests.Request(**case.as_transport_kwargs(base_url="http://test")).prepare()
        response = self._request(prepared.method, prepared.url, prepared.body, prepared.headers)
        self.statuses[case.operation.label, response.status_code] += 1
        try:
            case.validate_response(response, checks=CHECKS)
        except FailureGroup as group:
            for failure in group.exceptions:
                self._note(case.operation.label, failure.title, str(group)[:2000])

    def _fill_in(self, case: Case, known: dict[str, Any]) -> None:
        """In two of three cases, ids of what exists in place of those that the schema's types gave."""
        if self.random.random() < 1 / 3:
            return
        for place in (case.path_parameters, case.query, case.body):
            if isinstance(place, dict):
                for name in place:
                    if name in known and isinstance(place[name], str | int) and self.random.random() < 0.9:
                        place[name] = known[name]() if callable(known[name]) else known[name]

    def known(self) -> dict[str, Any]:
        """Fresh things by the names that parameters and fields have for them."""
        client = self.client
        self.engine.beat()
        self.service.hold_s = HOLD_S
        session = client.new_session()
        model = client.new_model(session)
        sampler = client.new_sampler(session)
        sample = client.sample(sampler)
        client.result(sample)
        self.service.hold_s = 0.01
        for kind in ("weights", "external_weights"):
            self._store(model, kind, "ck")
        url = client.get(
            f"training_runs/{model}/checkpoints/weights/ck/archive", headers={"accept": "application/json"}
        )
        signed = {key: value[0] for key, value in parse_qs(urlsplit(url.json()["url"]).query).items()}
        path = f"tinker://{model}/weights/ck"
        return signed | {
            "session_id": session, "model_id": model, "sampling_session_id": sampler, "sampler_id": sampler,
            "request_id": sample["request_id"], "base_model": BASE, "path": self._path, "source_path": path,
            "model_path": path, "tinker_path": path, "checkpoint_id": "weights/ck", "kind": "weights", "name": "ck",
            "file": "f.txt",
            "seq_id": lambda: next(self._numbers), "model_seq_id": lambda: next(self._numbers),
            "sampling_session_seq_id": lambda: next(self._numbers), "day": "2026-07-13",
            "starting_on": "2026-07-13T00:00:00Z", "ending_before": "2026-07-14T00:00:00Z",
        }  # fmt: skip

    def _path(self) -> str:
        return f"ck-{next(self._numbers)}"

    def _store(self, model: str, kind: PathKind, name: str) -> None:
        path = TinkerPath(model, kind, name)
        size = self.service.folders.write(
            path, CheckpointCard(BASE, LoraConfig(8, seed=0), 1, 0.0), {"f.txt": b"content"}
        )
        row = Checkpoint(model_id=model, kind=kind, name=name, folder=path.folder, size_bytes=size, created_at=now())
        with writing(self.service.db) as db:
            db.add(row)

    def send_hostile(self, operation: Any, every: int = 1) -> None:
        """Each hostile value in each parameter and each field of the body, or one of ``every`` so many."""
        known = self.known()
        for method, path, query, content, headers in itertools.islice(self._hostile(operation, known), 0, None, every):
            self.sent += 1
            address = f"http://test{path}" + (f"?{query}" if query else "")
            reply = self._request(method, address, content, headers)
            self.statuses[operation.label, reply.status_code] += 1
            wrong = "a server error" if reply.status_code >= 500 else self._undeclared(reply)
            if wrong:
                shown = f"{method} {path[:200]}?{query[:200]} {(content or b'')[:300]!r} {headers}: {reply.text[:500]}"
                self._note(operation.label, wrong, shown)

    def _note(self, label: str, complaint: str, shown: str) -> None:
        if (label, complaint) not in self.failures:
            self.failures[label, complaint] = shown
            print(f"{label}: {complaint}", file=sys.stderr, flush=True)  # a run takes minutes

    def _undeclared(self, reply: httpx.Response) -> str | None:
        if reply.status_code in (404, 405) and "is not served here" in reply.text:
            return None  # a parameter that made another address of it
        try:
            self.document.check(reply)
        except AssertionError as error:
            return str(error)
        return None

    def _request(self, method: str, address: str, content: bytes | None, headers: Any) -> httpx.Response:
        return self.plain.request(method, address, content=content, headers=headers, follow_redirects=False)

    def _hostile(self, operation: Any, known: dict[str, Any]) -> Iterator[tuple[str, str, str, bytes | None, dict]]:
        method = operation.method.upper()
        parameters = operation.definition.raw.get("parameters", [])

        def address(changed: str = "", value: str = "") -> tuple[str, str]:
            path, query = operation.path, []
            for parameter in parameters:
                name = parameter["name"]
                given = value if name == changed else str(known.get(name, ""))
                encoded = quote(given.encode("utf-8", "surrogatepass"), safe="")
                if parameter["in"] == "path":
                    path = path.replace(f"{{{name}}}", encoded)
                elif parameter["in"] == "query" and (name == changed or parameter["required"]):
                    query.append(f"{name}={encoded}")
            return path, "&".join(query)

        fields = self._fields(operation)
        body = {name: known[name]() if callable(known[name]) else known[name] for name in fields if name in known}
        path, query = address()
        for parameter, value in itertools.product(parameters, HOSTILE_TEXT):
            if parameter["in"] != "header":
                content = json.dumps(body).encode() if fields else None
                yield method, *address(parameter["name"], value), content, {}
        if "requestBody" not in operation.definition.raw:
            return
        for content, kind in HOSTILE_BODIES:
            yield method, path, query, content, {"content-type": kind.encode("latin-1")}
            yield method, path, query, content, {"content-type": "application/json", "content-encoding": "zstd"}
        for field, value in itertools.product(fields, HOSTILE_JSON):
            pairs = [f"{json.dumps(name)}: {json.dumps(given)}" for name, given in body.items() if name != field]
            text = "{" + ", ".join([*pairs, f"{json.dumps(field)}: {value}"]) + "}"
            yield method, path, query, text.encode(), {"content-type": "application/json"}

    def _fields(self, operation: Any) -> list[str]:
        body = operation.definition.raw.get("requestBody")
        if body is None:
            return []
        schemas = self.schema.raw_schema["components"]["schemas"]
        schema = schemas[body["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]]
        options = [schemas[one["$ref"].rpartition("/")[2]] for one in schema.get("anyOf", [])] or [schema]
        return list(dict.fromkeys(name for option in options for name in option.get("properties", ())))

    def share_of_successes(self) -> float:
        """Of all answers, those of 200 and 302."""
        return sum(count for (_, status), count in self.statuses.items() if status in (200, 302)) / self.sent

    def report(self) -> str:
        """What was sent and answered, and each failure."""
        text = io.StringIO()
        by_status = Counter()
        for (_, status), count in self.statuses.items():
            by_status[status] += count
        answers = ", ".join(f"{status}: {count}" for status, count in sorted(by_status.items()))
        print(f"{self.sent} cases to {len(self.operations())} operations, seed {self.seed}; {answers}", file=text)
        for (label, title), shown in self.failures.items():
            print(f"\n{label}: {title}\n{shown}", file=text)
        return text.getvalue()

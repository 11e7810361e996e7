"""Make every call against a server, and say how each went: works, refused with its message, or fails."""

from __future__ import annotations

import json
import os
import re
import threading
import traceback
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import tinker

from tests.compatibility.introspect import targets
from tests.compatibility.lab import CommandRefused, Lab
from tests.compatibility.registry import Call, bind, calls_for, gaps, load
from tests.support.hub import Hub
from tests.support.tiny_models import TOKENIZER

CALL_LIMIT_S = 120.0

WORKS, REFUSED, FAILS = "works", "refused", "fails"


@dataclass(frozen=True)
class Row:
    """One line of the table. ``note`` is the refusal's message, or what failed; ``trace`` is for whoever repairs it."""

    target: str
    option: str
    result: str
    note: str = ""
    trace: str = ""


def run(url: str, base_model: str, folder: Path) -> list[Row]:
    """Every row, in the order of the tables; what no call covers is a row that fails."""
    load()
    found = targets()
    (folder / base_model).parent.mkdir(parents=True)
    (folder / base_model).symlink_to(TOKENIZER)
    with _client_environment(url, folder), Hub() as hub:
        lab = Lab(url, base_model, folder, hub)
        rows = {}
        for entry in calls_for(found):
            result, note, trace = _outcome(entry, lab)
            for option in entry.options or ("",):
                rows[entry.target, option] = Row(entry.target, option, result, _normal(note, lab), trace)
        lab.service.close("success").result()
    places = {target: place for place, target in enumerate(found)}
    in_order = sorted(rows.values(), key=lambda row: (places.get(row.target, len(places)), row.option))
    return in_order + [Row(gap, "", FAILS, "not covered") for gap in gaps(found)]


@contextmanager
def _client_environment(url: str, folder: Path) -> Iterator[None]:
    """A user who has set the SDK's variables, whose home is empty, and who reads wide tables."""
    variables = {
        "TINKER_BASE_URL": url,
        "TINKER_API_KEY": "tml-test",
        "TINKER_TELEMETRY": "1",
        "HOME": str(folder),
        "COLUMNS": "250",
    }
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, variables))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore", FutureWarning)  # deprecated methods are rows as well
        yield


def _outcome(entry: Call, lab: Lab) -> tuple[str, str, str]:
    """Result, note, trace of one call; one that hangs is given up."""
    ended: list[BaseException | None] = []

    def make_the_call() -> None:
        try:
            entry.run(lab, bind(lab, entry.target))
        except BaseException as error:
            ended.append(error)
        else:
            ended.append(None)

    thread = threading.Thread(target=make_the_call, daemon=True)
    thread.start()
    thread.join(CALL_LIMIT_S)
    if not ended:
        return FAILS, f"no answer within {CALL_LIMIT_S:g} s", ""
    error = ended[0]
    if error is None:
        return WORKS, "", ""
    message = _message(error)
    if entry.refused is not None and re.search(entry.refused, message, re.IGNORECASE):
        return REFUSED, message, ""
    return FAILS, message, "".join(traceback.format_exception(error))


def _message(error: BaseException) -> str:
    """What the user reads; of an HTTP error only what the server said."""
    if isinstance(error, tinker.APIStatusError) and isinstance(error.body, dict) and "detail" in error.body:
        detail = error.body["detail"]
        return detail if isinstance(detail, str) else json.dumps(detail)
    if isinstance(error, tinker.RequestFailedError):
        return str(error).removeprefix("Request failed: ").partition(" for self.request_id=")[0]
    if isinstance(error, CommandRefused | tinker.TinkerError | ValueError | RuntimeError):
        return str(error)
    return f"{type(error).__name__}: {error}"


def _normal(note: str, lab: Lab) -> str:
    """One line, without what differs from run to run: ids, addresses, folders."""
    for text, name in ((lab.url, "<server>"), (lab.hub.url, "<hub>"), (str(lab.folder), "<folder>")):
        note = note.replace(text, name)
    note = re.sub(r"sess-[0-9a-f]+", "<session>", note)
    note = re.sub(r"\bname-\d+", "<name>", note)
    return re.sub(r"\s+", " ", note).strip()

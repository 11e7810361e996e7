"""What depends on the version of the client's SDK: how it says who it is, and what it can read."""

from __future__ import annotations

import re
from collections.abc import Mapping

PROTOBUF_MEDIA_TYPE = "application/x-protobuf"

_VERSION = re.compile(r"(\d+)\.(\d+)(?:\.(\d+))?")


def client_version(headers: Mapping[str, str]) -> tuple[int, int, int] | None:
    """The SDK's version, from the headers that every version sends; None for other clients."""
    text = headers.get("x-stainless-package-version") or ""
    if not text and "Tinker/Python" in headers.get("user-agent", ""):
        text = headers["user-agent"].rpartition(" ")[2]
    match = _VERSION.match(text)
    return (int(match[1]), int(match[2]), int(match[3] or 0)) if match else None


def sends_first_chunk_last(version: tuple[int, int, int] | None) -> bool:
    """Whether a client that sends the chunks of a batch in parallel sends nothing after them before all have come."""
    return version is None or version >= (0, 20, 0)


def accepts_protobuf(headers: Mapping[str, str]) -> bool:
    """Whether a poll wants its result as protobuf: always since SDK 0.25, never before 0.18.2 (protocol §6)."""
    return PROTOBUF_MEDIA_TYPE in headers.get("accept", "").lower()


def reads_external(headers: Mapping[str, str]) -> bool:
    """Whether a listing may have checkpoints of type ``external``: one breaks every SDK before 0.28 (protocol §6).

    Clients that are no SDK get everything.
    """
    version = client_version(headers)
    return version is None or version >= (0, 28, 0)


def media_type(content_type: str | None) -> str:
    """``application/json`` out of ``Application/JSON; charset=utf-8``; JSON if the client didn't say."""
    return (content_type or "application/json").split(";")[0].strip().lower()

"""What depends on the version of the client's SDK: who it is, what it leaves unsaid, what it can read."""

from __future__ import annotations

import re
from collections.abc import Mapping

from tx.tinker.wire import requests

PROTOBUF_MEDIA_TYPE = "application/x-protobuf"

_VERSION = re.compile(r"(\d+)\.(\d+)(?:\.(\d+))?")


def client_version(headers: Mapping[str, str]) -> tuple[int, int, int] | None:
    """The SDK's version, from the headers that every version sends; None for other clients."""
    text = headers.get("x-stainless-package-version") or ""
    if not text and "Tinker/Python" in headers.get("user-agent", ""):
        text = headers["user-agent"].rpartition(" ")[2]
    return parse_version(text)


def parse_version(text: str) -> tuple[int, int, int] | None:
    """``0.18.2`` as numbers; None for anything else."""
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


def exchanges_keys(version: tuple[int, int, int] | None) -> bool:
    """Whether a client may be told to exchange its API key for a token: older SDKs send the key itself, as well."""
    return version is not None and version >= (0, 38, 0)


def client_flags(version: tuple[int, int, int] | None) -> dict[str, bool]:
    """Flags of client/config that only some versions know: each has the client do what later ones always do.

    Since 0.19 it can send training data as protobuf, some releases later a plain forward too; since 0.24 it can create
    a model from a checkpoint in one request, which has the checkpoint's own LoRA configuration.
    """
    if version is None or version >= (0, 38, 0):
        return {}
    return {"proto_write_fwdbwd": True, "fwd_via_fwdbwd": True, "create_model_via_load_weights": True}


def complete_load_weights(request: requests.LoadWeights, headers: Mapping[str, str]) -> requests.LoadWeights:
    """The request with what its SDK cannot say: before 0.6, ``load_state`` restores weights and optimizer.

    There is no optimizer to restore from ``sampler_weights``, which such a client may also load.
    """
    version = client_version(headers)
    if version is None or version >= (0, 6, 0) or "/weights/" not in request.path:
        return request
    return request.model_copy(update={"optimizer": True})


def media_type(content_type: str | None) -> str:
    """``application/json`` out of ``Application/JSON; charset=utf-8``; JSON if the client didn't say."""
    return (content_type or "application/json").split(";")[0].strip().lower()

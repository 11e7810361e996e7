"""The files of checkpoints over HTTP: signed URLs for them, and what is behind those.

A signed URL needs no API key: whoever has it may fetch that one file until it expires. It names a checkpoint by its
path and a file by its name, and only a name that the checkpoint's card lists is ever opened.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from email.utils import formatdate
from typing import Annotated
from urllib.parse import urlencode

from fastapi import APIRouter, Path, Request
from fastapi.responses import RedirectResponse, Response, StreamingResponse

from tx.errors import NotFound
from tx.tinker import archives
from tx.tinker.db import Checkpoint, now
from tx.tinker.openapi import binary, refuses
from tx.tinker.service import Api, CheckpointKind, CheckpointName, Expires, ModelId, Service, Signature
from tx.tinker.wire import paths, responses
from tx.tinker.wire.paths import TinkerPath

router = APIRouter()

URL_LIFE_S = 3600
"""Clients sign again when less than five minutes are left."""

_MEDIA_TYPE = "application/octet-stream"
_REDIRECT = {
    "description": "To the signed URL, for clients that don't ask for JSON.",
    "headers": {
        "Location": {"schema": {"type": "string", "format": "uri"}, "description": "The signed URL."},
        "Expires": {"schema": {"type": "string"}, "description": "Until when it is good, as an HTTP date."},
    },
}


@router.get(
    "/training_runs/{model_id}/checkpoints/external_weights/{name}/external_weights_urls", responses=refuses(404)
)
def external_weights_urls(api: Api, http: Request, model_id: ModelId, name: CheckpointName) -> responses.FileUrls:
    """A signed URL for each file of external weights."""
    path, checkpoint = _find(api, model_id, "external_weights", name)
    expires = int(now()) + URL_LIFE_S
    with api.folders.open(checkpoint.folder) as stored:
        urls = {file: _signed_url(api, http, _resource(path, file), expires) for file in stored.sizes}
    return responses.FileUrls(urls=urls, expires=responses.timestamp(expires))


@router.get(
    "/training_runs/{model_id}/checkpoints/{kind}/{name}/archive",
    response_model=responses.ArchiveUrl,
    responses={302: _REDIRECT, **refuses(404)},
)
def archive_url(
    api: Api, http: Request, model_id: ModelId, kind: CheckpointKind, name: CheckpointName
) -> responses.ArchiveUrl | Response:
    """A signed URL of the whole checkpoint as one tar, for SDKs before 0.36: a redirect, or JSON where it is asked for.

    SDKs that ask for gzip read the redirect's headers and know no JSON, though they accept that in a second header.
    """
    path, _ = _find(api, model_id, kind, name)
    expires = int(now()) + URL_LIFE_S
    url = _signed_url(api, http, _resource(path), expires)
    accepted = ",".join(http.headers.getlist("accept"))
    if "application/json" in accepted and "application/gzip" not in accepted:
        return responses.ArchiveUrl(url=url, expires=responses.timestamp(expires))
    return RedirectResponse(url, status_code=302, headers={"Expires": formatdate(expires, usegmt=True)})


@router.get(
    "/files/{model_id}/{kind}/{name}/{file}",
    response_class=StreamingResponse,
    responses={200: binary(_MEDIA_TYPE, "The file."), **refuses(403, 404)},
)
def get_file(
    api: Api,
    model_id: ModelId,
    kind: CheckpointKind,
    name: CheckpointName,
    file: Annotated[str, Path(description="One of the names that were signed.")],
    expires: Expires = "",
    signature: Signature = "",
) -> StreamingResponse:
    """One file of a checkpoint, for who has its signed URL."""
    api.signer.check(f"{model_id}/{kind}/{name}/{file}", expires, signature)
    _, checkpoint = _find(api, model_id, kind, name)
    with contextlib.ExitStack() as held:
        stored = held.enter_context(api.folders.open(checkpoint.folder))
        content = archives.pieces(stored.open_file(file))
        return _attachment(content, file, stored.sizes[file], held.pop_all())


@router.get(
    "/files/{model_id}/{kind}/{name}",
    response_class=StreamingResponse,
    responses={200: binary(_MEDIA_TYPE, "A tar."), **refuses(403, 404)},
)
def get_archive(
    api: Api,
    model_id: ModelId,
    kind: CheckpointKind,
    name: CheckpointName,
    expires: Expires = "",
    signature: Signature = "",
) -> StreamingResponse:
    """All files of a checkpoint as a tar, for who has its signed URL."""
    api.signer.check(f"{model_id}/{kind}/{name}", expires, signature)
    _, checkpoint = _find(api, model_id, kind, name)
    with contextlib.ExitStack() as held:
        stored = held.enter_context(api.folders.open(checkpoint.folder))
        content = archives.tar(stored.sizes, checkpoint.created_at, stored.open_file)
        return _attachment(content, f"{name}.tar", archives.num_bytes(stored.sizes), held.pop_all())


def _find(api: Service, model_id: str, kind: str, name: str) -> tuple[TinkerPath, Checkpoint]:
    if kind not in paths.PATH_KINDS:
        raise NotFound("checkpoint_id", f"{kind}/{name}", "<weights|sampler_weights|external_weights>/<name>")
    path = TinkerPath(model_id, kind, name)
    return path, api.sessions.checkpoint(path, "checkpoint_id")[0]


def _resource(path: TinkerPath, file: str | None = None) -> str:
    """What a signature is of, and the end of the URL: a file of a checkpoint, or all of them."""
    return path.folder if file is None else f"{path.folder}/{file}"


def _signed_url(api: Service, http: Request, resource: str, expires: int) -> str:
    """An absolute URL on the address by which the client reached us, which only it and a proxy before us know."""
    model_id, kind, name, *file = resource.split("/")
    named = {"model_id": model_id, "kind": kind, "name": name}
    url = http.url_for("get_file", **named, file=file[0]) if file else http.url_for("get_archive", **named)
    # Not trusted with anything: who sends false ones gets URLs that don't work.
    proto, host, prefix = (_first(http.headers, f"x-forwarded-{part}") for part in ("proto", "host", "prefix"))
    base = f"{proto or url.scheme}://{host or url.netloc}{prefix.rstrip('/')}{url.path}"
    query = urlencode({"expires": expires, "signature": api.signer.sign(resource, expires)})
    return f"{base}?{query}"


def _first(headers: Mapping[str, str], name: str) -> str:
    """Of a header to which every proxy on the way may have appended: what the client spoke to."""
    return headers.get(name, "").split(",")[0].strip()


def _attachment(content: Iterator[bytes], name: str, num_bytes: int, held: contextlib.ExitStack) -> StreamingResponse:
    """``content`` under that name; ``held`` is closed when it is sent, or nobody wants it any more."""

    def sent() -> Iterator[bytes]:
        with held:
            yield from content

    headers = {"Content-Length": str(num_bytes), "Content-Disposition": f'attachment; filename="{name}"'}
    return StreamingResponse(sent(), media_type=_MEDIA_TYPE, headers=headers)

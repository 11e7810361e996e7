"""Signed URLs over HTTP: made where a checkpoint is, good without a key, for one file, for an hour."""

from __future__ import annotations

import io
import tarfile
from email.utils import parsedate_to_datetime
from urllib.parse import parse_qs, urlencode, urlsplit

import pytest

from tests.tinker.conftest import Client
from tx.tinker import checkpoints
from tx.tinker.checkpoints import CheckpointCard
from tx.tinker.db import Checkpoint, now, writing
from tx.tinker.wire.paths import TinkerPath
from tx.types import LoraConfig

FILES = {"adapter_config.json": b"{}", "adapter_model.safetensors": bytes(range(256)) * 9000}
CARD = CheckpointCard("org/base", LoraConfig(4, seed=0), 1, 0.0)


@pytest.fixture
def model(client, running):
    return client.new_model()


def store(client: Client, model: str, kind: str = "external_weights", name: str = "w", **row) -> TinkerPath:
    path = TinkerPath(model, kind, name)
    size = client.service.folders.write(path, CARD, FILES)
    values = {"folder": path.folder, "size_bytes": size, "created_at": now()} | row
    with writing(client.service.db) as db:
        db.add(Checkpoint(model_id=model, kind=kind, name=name, **values))
    return path


def urls_of(client: Client, path: TinkerPath, **headers: str) -> dict[str, str]:
    reply = client.get(f"training_runs/{path.model_id}/checkpoints/{path.checkpoint_id}/external_weights_urls",
                       headers={key.replace("_", "-"): value for key, value in headers.items()})  # fmt: skip
    assert reply.status_code == 200, reply.text
    return reply.json()["urls"]


def test_each_file_has_a_url_that_serves_it(client, model):
    path = store(client, model)
    reply = client.get(f"training_runs/{model}/checkpoints/external_weights/w/external_weights_urls").json()
    assert reply["expires"].endswith("Z")
    assert reply["urls"].keys() == FILES.keys()
    for name, url in reply["urls"].items():
        assert url.startswith("http://test/api/v1/")
        got = client.get(url)
        assert (got.status_code, got.content) == (200, FILES[name])
        assert got.headers["content-length"] == str(len(FILES[name]))
        assert name in got.headers["content-disposition"]
    assert checkpoints.CARD not in reply["urls"]
    assert path.kind == "external_weights"


def test_the_url_leads_back_the_way_the_request_came(client, model):
    path = store(client, model)
    local = urls_of(client, path)["adapter_config.json"]
    behind = urls_of(
        client, path, x_forwarded_proto="https", x_forwarded_host="tinker.example, inner", x_forwarded_prefix="/svc/"
    )["adapter_config.json"]
    assert behind.startswith("https://tinker.example/svc/api/v1/files/")
    assert urls_of(client, path, host="10.0.0.7:99")["adapter_config.json"].startswith("http://10.0.0.7:99/api/v1/")
    client.app.root_path = "/prefix"
    route = f"http://test/prefix/api/v1/training_runs/{model}/checkpoints/{path.checkpoint_id}/external_weights_urls"
    url = client.get(route).json()["urls"]["adapter_config.json"]
    assert url.startswith("http://test/prefix/api/v1/files/")
    assert urlsplit(url).path == "/prefix" + urlsplit(local).path


def changed(url: str, **query: str) -> str:
    parts = urlsplit(url)
    old = {key: values[0] for key, values in parse_qs(parts.query).items()}
    return parts._replace(query=urlencode(old | query)).geturl()


def test_any_other_url_is_403_with_a_reason(client, model):
    path = store(client, model)
    url = urls_of(client, path)["adapter_config.json"]
    wrong = [
        url.replace("adapter_config.json", "adapter_model.safetensors"),
        url.replace("adapter_config.json", checkpoints.CARD),
        url.replace("/w/", "/v/"),
        url.split("?")[0],
        changed(url, expires="9999999999"),
        changed(url, expires="soon"),
        changed(url, signature="0" * 64),
        url.replace("/adapter_config.json?", "?"),
    ]
    for other in wrong:
        reply = client.get(other)
        assert (reply.status_code, reply.json()["detail"].split(":")[0]) == (403, "signature"), other
    old = client.service.signer.sign(f"{path.folder}/adapter_config.json", 1000)
    reply = client.get(changed(url, expires="1000", signature=old))
    assert (reply.status_code, reply.json()["detail"].split(":")[0]) == (403, "expires")


@pytest.mark.parametrize(
    "name", ["tx_checkpoint.json", "..", "%2e%2e", "../../../tx.db", "..%2f..%2f..%2ftx.db", "none"]
)
def test_a_signature_of_ours_opens_nothing_that_the_card_does_not_list(client, model, name):
    """Even if somebody had us sign another name."""
    path = store(client, model)
    expires = int(now()) + 100
    plain = name.replace("%2f", "/").replace("%2e", ".")
    query = urlencode({"expires": expires, "signature": client.service.signer.sign(f"{path.folder}/{plain}", expires)})
    assert client.get(f"files/{path.folder}/{name}?{query}").status_code in (403, 404)


def test_a_checkpoint_that_is_gone_is_404(client, model):
    path = store(client, model, expires_at=now() + 1000)
    url = urls_of(client, path)["adapter_config.json"]
    with writing(client.service.db) as db:
        db.get(Checkpoint, 1).expires_at = now() - 1
    assert client.get(url).status_code == 404
    for kind in ("external_weights/w/external_weights_urls", "external_weights/w/archive", "wings/w/archive"):
        reply = client.get(f"training_runs/{model}/checkpoints/{kind}")
        assert (reply.status_code, reply.json()["detail"].split(":")[0]) == (404, "checkpoint_id")


def test_a_copys_files_are_its_sources(client, model):
    path = store(client, model)
    copy = client.ask("copy_weights", source_path=str(path), destination_project_id="p")["tinker_path"]
    model_id, kind, name = copy.removeprefix("tinker://").split("/")
    url = urls_of(client, TinkerPath(model_id, kind, name))["adapter_model.safetensors"]
    assert client.get(url).content == FILES["adapter_model.safetensors"]


@pytest.mark.parametrize("kind", ["weights", "sampler_weights", "external_weights"])
def test_the_archive_of_older_sdks(client, model, kind):
    store(client, model, kind)
    route = f"training_runs/{model}/checkpoints/{kind}/w/archive"
    both = [("Accept", "application/json"), ("accept", "application/gzip")]  # as SDK 0.14 sends them
    redirect = client.get(route, headers=both, follow_redirects=False)
    assert redirect.status_code == 302
    assert 3500 < parsedate_to_datetime(redirect.headers["expires"]).timestamp() - now() <= 3600
    told = client.get(route, headers={"accept": "application/json"}).json()
    assert told.keys() == {"url", "expires"}
    for url in (redirect.headers["location"], told["url"]):
        reply = client.get(url)
        assert (reply.status_code, len(reply.content)) == (200, int(reply.headers["content-length"]))
        with tarfile.open(fileobj=io.BytesIO(reply.content), mode="r") as tar:
            read = {name: tar.extractfile(name).read() for name in tar.getnames()}
        assert read == FILES | {"checkpoint_complete": b""}

"""Details of reply bodies that clients are strict about."""

from __future__ import annotations

from tx.tinker.wire import responses

ROW = {
    "model_id": "s:train:0",
    "kind": "sampler_weights",
    "name": "a",
    "created_at": 0.0,
    "size_bytes": 5,
    "public": False,
    "user_metadata": {},
    "expires_at": 3600.0,
}


def test_a_checkpoint_as_clients_list_it():
    assert responses.checkpoint(ROW).model_dump(mode="json", exclude_none=True) == {
        "checkpoint_id": "sampler_weights/a",
        "checkpoint_type": "sampler",
        "time": "1970-01-01T00:00:00Z",
        "tinker_path": "tinker://s:train:0/sampler_weights/a",
        "size_bytes": 5,
        "public": False,
        "expires_at": "1970-01-01T01:00:00Z",
    }


def test_times_carry_their_zone():
    assert responses.timestamp(0).utcoffset() is not None


def test_a_failure_has_no_null_and_try_again_has_its_type():
    failure = responses.Failure(error="e", category="user", request_id="1")
    assert failure.model_dump() == {"error": "e", "category": "user", "request_id": "1"}
    assert responses.TryAgain(request_id="1").model_dump(exclude_none=True)["type"] == "try_again"

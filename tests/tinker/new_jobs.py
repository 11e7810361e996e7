"""Requests to append, and what became of them."""

from __future__ import annotations

from tx.errors import InvalidInput
from tx.tinker.jobs import Appended, NewJob

BASE = "org/base"


def new(seq: int | None, kind: str = "forward_backward", model_id: str | None = "s:train:0", **values) -> NewJob:
    return NewJob(kind=kind, base_model=BASE, payload=b"body", session_id="s", model_id=model_id, seq_id=seq, **values)


def sample(seq: int | None, sampler_id: str | None = "s:sample:0", num_sequences: int = 1, **values) -> NewJob:
    values = {"base_model": BASE, "session_id": "s"} | values
    return NewJob(
        kind="sample", payload=b"body", sampler_id=sampler_id, seq_id=seq, num_sequences=num_sequences, **values
    )


def ids(answers: list[Appended | InvalidInput]) -> list[int]:
    assert all(isinstance(answer, Appended) for answer in answers), answers
    return [answer.request_id for answer in answers]

"""Identifiers of the protocol: ``tinker://`` paths, model ids, sampler ids, and which names are allowed in them.

Names become folders, so nothing that could leave its folder may pass. It touches no disk.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from tx.errors import InvalidInput

PathKind = Literal["weights", "sampler_weights", "external_weights"]
LOADABLE_KINDS: tuple[PathKind, ...] = ("weights", "sampler_weights")
"""What the server itself reads: external weights are for others, and may be encrypted to them."""
PATH_KINDS: tuple[PathKind, ...] = (*LOADABLE_KINDS, "external_weights")

KIND_OF_SAVE: dict[str, PathKind] = {
    "save_weights": "weights",
    "save_weights_for_sampler": "sampler_weights",
    "save_weights_external": "external_weights",
}
"""Kinds of jobs that write files, and what their paths say."""

NAME_PATTERN = r"[A-Za-z0-9._-]{1,128}"
_NAME = re.compile(NAME_PATTERN)
_MODEL_ID = re.compile(r"(?P<session>[A-Za-z0-9._-]{1,128}):train:(?P<seq>[0-9]{1,19})")
_SAMPLER_ID = re.compile(r"(?P<session>[A-Za-z0-9._-]{1,128}):sample:(?P<seq>[0-9]{1,19})")


@dataclass(frozen=True)
class TinkerPath:
    """``tinker://<model_id>/<kind>/<name>``."""

    model_id: str
    kind: PathKind
    name: str

    def __str__(self) -> str:
        return f"tinker://{self.model_id}/{self.kind}/{self.name}"

    @property
    def checkpoint_id(self) -> str:
        """What the REST listing calls a checkpoint: ``weights/ck1``."""
        return f"{self.kind}/{self.name}"

    @property
    def folder(self) -> str:
        """Folder of the checkpoint, relative to the base folder of all checkpoints."""
        return f"{self.model_id}/{self.kind}/{self.name}"


def check_name(name: str, field: str = "path") -> str:
    """A checkpoint name, or InvalidInput naming ``field``."""
    if not _NAME.fullmatch(name) or set(name) == {"."}:
        raise InvalidInput(field, name, "1 to 128 of the characters A-Z a-z 0-9 . _ - and not only dots")
    return name


def parse_path(path: str, field: str = "path", kinds: tuple[PathKind, ...] = LOADABLE_KINDS) -> TinkerPath:
    """A ``tinker://`` path of one of ``kinds`` taken apart, or InvalidInput naming ``field``."""
    parts = path.removeprefix("tinker://").split("/")
    if not path.startswith("tinker://") or len(parts) != 3 or parts[1] not in kinds:
        raise InvalidInput(field, path, f"tinker://<model_id>/<{'|'.join(kinds)}>/<name>")
    if not _MODEL_ID.fullmatch(parts[0]):
        raise InvalidInput(field, path, "a path that starts with a model id, <session_id>:train:<n>")
    return TinkerPath(parts[0], parts[1], check_name(parts[2], field))


def model_id(session_id: str, model_seq_id: int) -> str:
    """The id that the client derives by itself, so it must be exactly this."""
    return f"{session_id}:train:{model_seq_id}"


def sampler_id(session_id: str, sampling_session_seq_id: int) -> str:
    """Id of a sampling session."""
    return f"{session_id}:sample:{sampling_session_seq_id}"


def session_of(identifier: str, field: str = "model_id") -> str:
    """The session part of a model or sampler id."""
    match = _MODEL_ID.fullmatch(identifier) or _SAMPLER_ID.fullmatch(identifier)
    if match is None:
        raise InvalidInput(field, identifier, "<session_id>:train:<n> or <session_id>:sample:<n>")
    return match["session"]


def sample_sequence_id(request_id: int, sample: int) -> str:
    """Name of one sampled sequence: a retry gets the same, because it gets the same request id."""
    return f"{request_id}-{sample}"

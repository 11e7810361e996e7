"""Files encrypted with age (https://age-encryption.org) to whoever is to read them: the server can't read them back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyrage

from tx.errors import InvalidInput

SUFFIX = ".age"
MAX_RECIPIENTS = 10

FIELD = "age_encryption_recipients"


def parse_recipients(given: Sequence[str] | None) -> list[Any]:
    """Public keys to encrypt to; none given is no encryption. Raises InvalidInput naming the one that is wrong."""
    if given is None:
        return []
    if not 1 <= len(given) <= MAX_RECIPIENTS:
        raise InvalidInput(FIELD, f"{len(given)} recipients", f"1 to {MAX_RECIPIENTS}, or null for no encryption")
    return [_parse(text, f"{FIELD}.{index}") for index, text in enumerate(given)]


def encrypt(files: Mapping[str, bytes], recipients: Sequence[Any]) -> dict[str, bytes]:
    """Every file, encrypted to all recipients, under its name with ``.age``."""
    return {name + SUFFIX: pyrage.encrypt(content, recipients) for name, content in files.items()}


def _parse(text: str, field: str) -> Any:
    kind = pyrage.ssh if text.startswith("ssh-") else pyrage.x25519
    try:
        return kind.Recipient.from_str(text.strip())
    except pyrage.RecipientError as error:
        # Only its beginning: somebody may have pasted the private half.
        accepted = f'an age public key ("age1…") or an SSH one ("ssh-ed25519 …", "ssh-rsa …"): {error}'
        raise InvalidInput(field, f"{text[:8]}…", accepted) from error

"""Encryption to age recipients, read back with the identities."""

from __future__ import annotations

import pyrage
import pytest

from tx.errors import InvalidInput
from tx.tinker import age_files

SSH = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIHsKLqeplhpW+uObz5dvMgjz1OxfM/XXUB+VHtZ6isGN me@here"


def identity() -> pyrage.x25519.Identity:
    return pyrage.x25519.Identity.generate()


def test_each_recipient_reads_every_file_and_nobody_else():
    one, two, other = identity(), identity(), identity()
    recipients = age_files.parse_recipients([str(one.to_public()), SSH, f" {two.to_public()}\n"])
    files = age_files.encrypt({"a.json": b"{}", "b.bin": bytes(100_000)}, recipients)
    assert sorted(files) == ["a.json.age", "b.bin.age"]
    for reader in (one, two):
        assert pyrage.decrypt(files["a.json.age"], [reader]) == b"{}"
        assert pyrage.decrypt(files["b.bin.age"], [reader]) == bytes(100_000)
    with pytest.raises(pyrage.DecryptError):
        pyrage.decrypt(files["a.json.age"], [other])


def test_none_is_no_encryption():
    assert age_files.parse_recipients(None) == []


@pytest.mark.parametrize("bad", ["", "age1", "age1nonsense", "ssh-ed25519 AAAA", "ssh-dss AAAA", "hello"])
def test_the_wrong_one_is_named(bad):
    with pytest.raises(InvalidInput, match=r"^age_encryption_recipients\.1: got .*SSH"):
        age_files.parse_recipients([str(identity().to_public()), bad])


def test_a_pasted_private_key_is_not_repeated():
    secret = str(identity())
    with pytest.raises(InvalidInput) as refusal:
        age_files.parse_recipients([secret])
    assert secret[12:] not in str(refusal.value)


@pytest.mark.parametrize("count", [0, 11])
def test_one_to_ten(count):
    with pytest.raises(InvalidInput, match="1 to 10"):
        age_files.parse_recipients([str(identity().to_public())] * count)

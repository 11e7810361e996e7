"""Folders, hub ids, the demo: found, or refused in one sentence."""

from __future__ import annotations

import pytest

from tx.errors import StartupError
from tx.tinker import config as flags
from tx.tinker.base_model import BaseModelFiles, locate
from tx.tinker.config import TxConfig


def test_a_folder_is_its_own_tokenizer(tiny_qwen3):
    assert locate(TxConfig(base_model=str(tiny_qwen3))) == BaseModelFiles(tiny_qwen3, str(tiny_qwen3))


@pytest.mark.parametrize(
    ("name", "words"),
    [("./no/such", "does not exist"), ("no-org/no-model", "no-org/no-model"), ("a b c/d", "neither a folder nor")],
)
def test_what_is_not_there_is_one_sentence(name, words):
    with pytest.raises(StartupError, match=words) as error:
        locate(TxConfig(base_model=name))
    assert "\n" not in str(error.value)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(StartupError, match=r"no config\.json"):
        locate(TxConfig(base_model=str(tmp_path)))


def test_the_demo_needs_its_packages(monkeypatch):
    monkeypatch.setattr(flags.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(StartupError, match="extra `demo`"):
        locate(TxConfig())

"""The demo model's conversion against transformers' own GGUF loader, and what happens without its package."""

import hashlib
import importlib.util
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from transformers import AutoTokenizer

from tx.errors import StartupError
from tx.models import demo

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "demo_model.json").read_text(encoding="utf-8"))


def test_weights_are_bit_equal_to_the_reference_loader(demo_model):
    digests = {}
    with safe_open(demo_model / "model.safetensors", "numpy") as tensors:
        for name in sorted(tensors.keys()):
            tensor = tensors.get_tensor(name)
            assert tensor.dtype == ml_dtypes.bfloat16
            digests[name] = hashlib.sha256(tensor.view(np.uint16).tobytes()).hexdigest()
    assert {name: digests[name] for name in GOLDEN["sha256"]} == GOLDEN["sha256"]
    assert len(digests) == GOLDEN["num_tensors"]
    every = "".join(name + digest for name, digest in digests.items())
    assert hashlib.sha256(every.encode()).hexdigest() == GOLDEN["sha256_of_all"]


def test_tokenizer_gives_the_reference_ids_and_round_trips(demo_model):
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    for case in GOLDEN["tokens"]:
        ids = tokenizer(case["text"], add_special_tokens=False)["input_ids"]
        assert ids == case["ids"]
        assert tokenizer.decode(ids) == case["text"]
    assert tokenizer.eos_token_id == 2


def test_chat_template_is_the_reference_one(demo_model):
    template = AutoTokenizer.from_pretrained(demo_model).chat_template
    assert template == GOLDEN["chat_template"]
    assert "<|im_start|>" in template


def test_a_finished_folder_is_used_again(tmp_path):
    folder = tmp_path / "models" / "SmolLM2-135M-Instruct"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert demo.ensure_demo_model(tmp_path) == folder
    assert (folder / "config.json").read_text() == "{}"


def test_an_interrupted_conversion_leaves_no_model(tmp_path, monkeypatch):
    def interrupted(source: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo.ensure_demo_model(tmp_path)
    assert list((tmp_path / "models").iterdir()) == []


def test_without_the_package_one_sentence_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(StartupError, match=r"--extra demo.*--base-model") as caught:
        demo.ensure_demo_model(tmp_path)
    assert "\n" not in str(caught.value)

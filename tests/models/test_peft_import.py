"""Adapters that PEFT wrote, and our own exports, as tx's: the same logits, and nothing is taken silently."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load, save

from tests.models.test_peft import RANKS, state_of
from tests.support.golden_lora import Golden, adapter_logits
from tx.errors import InvalidInput, Unsupported
from tx.models.loading import read_config
from tx.models.lora_sites import lora_sites
from tx.models.peft import CONFIG_FILE, WEIGHTS_FILE, export_files
from tx.models.peft_import import import_files
from tx.types import LoraConfig, ModelState

Q, V = "base_model.model.model.layers.{}.self_attn.q_proj", "base_model.model.model.layers.{}.self_attn.v_proj"


def files_of(golden: Golden, case: str) -> dict[str, bytes]:
    return {name: golden.arrays[f"in/{case}/{name}"].tobytes() for name in (CONFIG_FILE, WEIGHTS_FILE)}


def read(golden: Golden, files: dict[str, bytes]) -> ModelState:
    config = read_config(golden.folder)
    return import_files(files, config.num_experts_per_tok, lora_sites(config))


def same_logits(golden: Golden, state: ModelState, case: str) -> None:
    np.testing.assert_allclose(adapter_logits(golden, state), golden.arrays[f"in/{case}/logits"], atol=1e-4)


def changed(files: dict[str, bytes], **settings: object) -> dict[str, bytes]:
    return files | {CONFIG_FILE: json.dumps(json.loads(files[CONFIG_FILE]) | settings).encode()}


@pytest.mark.parametrize(
    ("family", "case"),
    [
        *(("llama", case) for case in ("plain", "patterns", "rslora")),
        *(("qwen3", case) for case in ("layers", "head")),
        *(("moe", case) for case in ("stacked", "resaved")),
    ],
)
def test_c07_an_adapter_that_peft_wrote_gives_its_logits(goldens: dict[str, Golden], family: str, case: str):
    same_logits(goldens[family], read(goldens[family], files_of(goldens[family], case)), case)


def test_a_subset_of_modules_stays_one(goldens: dict[str, Golden]):
    state = read(goldens["llama"], files_of(goldens["llama"], "plain"))
    sites = tuple(f"layers.{layer}.{module}" for layer in range(2) for module in ("q_proj", "v_proj"))
    assert state.lora == LoraConfig(5, 0, train_mlp=False, train_unembed=False, alpha=10.0, sites=sites)
    assert state.weights.keys() == {f"{site}.lora_{side}" for site in sites for side in "AB"}


def test_an_adapter_on_whole_groups_names_no_sites(goldens: dict[str, Golden]):
    golden = goldens["qwen3"]
    assert read(golden, export_files(state_of(golden, "qwen3", "attn"), "tiny")).lora == LoraConfig(
        3, 0, train_mlp=False, train_unembed=False
    )


def test_ranks_are_filled_up_with_zeros_and_scales_go_into_b(goldens: dict[str, Golden]):
    """r 4 and alpha 8; q_proj has rank 2 (scale 4), one v_proj rank 6 (8/6), one down_proj alpha 5 (5/4)."""
    golden = goldens["llama"]
    files = files_of(golden, "patterns")
    state, given = read(golden, files), load(files[WEIGHTS_FILE])
    assert (state.lora.rank, state.lora.alpha) == (6, 24.0)  # q_proj's scale, the first of the most frequent
    q_a, q_b = state.weights["layers.0.q_proj.lora_A"], state.weights["layers.0.q_proj.lora_B"]
    np.testing.assert_array_equal(q_a[:, :2], given[Q.format(0) + ".lora_A.weight"].T)
    np.testing.assert_array_equal(q_b[:2], given[Q.format(0) + ".lora_B.weight"].T)
    assert not q_a[:, 2:].any()
    assert not q_b[2:].any()
    v_b = state.weights["layers.0.v_proj.lora_B"]  # scale 2 is half of 4: exact
    np.testing.assert_array_equal(v_b[:4] * 2, given[V.format(0) + ".lora_B.weight"].T)
    wide = given[V.format(1) + ".lora_B.weight"].T.astype(np.float64) * (8 / 6 / 4)
    np.testing.assert_array_equal(state.weights["layers.1.v_proj.lora_B"], wide.astype(np.float32))


def test_rslora_is_an_alpha(goldens: dict[str, Golden]):
    lora = read(goldens["llama"], files_of(goldens["llama"], "rslora")).lora
    assert lora.scaling == pytest.approx(6 / np.sqrt(3), rel=1e-15)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_tensors_of_every_float_dtype(goldens: dict[str, Golden], dtype: type):
    golden = goldens["llama"]
    files = files_of(golden, "plain")
    cast = {name: tensor.astype(dtype) for name, tensor in load(files[WEIGHTS_FILE]).items()}
    state = read(golden, files | {WEIGHTS_FILE: save(cast)})
    np.testing.assert_array_equal(
        state.weights["layers.1.v_proj.lora_A"], cast[V.format(1) + ".lora_A.weight"].T.astype(np.float32)
    )
    with pytest.raises(Unsupported, match=r"I32.*F32"):
        read(golden, files | {WEIGHTS_FILE: save({name: np.int32(tensor) for name, tensor in cast.items()})})


@pytest.mark.parametrize("family", RANKS)
def test_an_export_reads_back_bit_for_bit(goldens: dict[str, Golden], family: str):
    golden = goldens[family]
    state = state_of(golden, family)
    again = read(golden, export_files(state, "tiny"))
    assert again.lora == state.lora
    assert again.weights.keys() == state.weights.keys()
    for name, array in state.weights.items():
        assert again.weights[name].tobytes() == array.tobytes(), name


def test_stacked_experts_are_tx_s_experts(goldens: dict[str, Golden]):
    """gate and up share an A in PEFT's stack; of what was trained apart, each has its own back, bit for bit."""
    golden = goldens["moe"]
    stacked = read(golden, files_of(golden, "stacked"))
    assert (stacked.lora.rank, stacked.lora.expert_rank, stacked.lora.train_mlp) == (2, 2, True)
    gate, up = (stacked.weights[f"layers.0.experts.{module}_proj.lora_A"] for module in ("gate", "up"))
    np.testing.assert_array_equal(gate, up)
    resaved, ours = read(golden, files_of(golden, "resaved")), state_of(golden, "moe")
    assert resaved.lora == ours.lora
    for name, array in ours.weights.items():
        assert resaved.weights[name].tobytes() == array.tobytes(), name


def test_experts_of_a_rank_of_their_own_survive_an_export(goldens: dict[str, Golden]):
    golden = goldens["moe"]
    state = read(golden, files_of(golden, "stacked"))
    again = import_files(export_files(state, "tiny"), 2, lora_sites(read_config(golden.folder)), of_experts=2)
    assert again.lora == state.lora
    for name, array in state.weights.items():
        assert again.weights[name].tobytes() == array.tobytes(), name


@pytest.mark.parametrize(
    ("field", "value", "name"),
    [
        ("use_dora", True, "use_dora"),
        ("bias", "all", "bias"),
        ("modules_to_save", ["lm_head"], "modules_to_save"),
        ("trainable_token_indices", [1], "trainable_token_indices"),
        ("rank_pattern", {"q_proj": 4}, r"q_proj.lora_A: got rank 5, accepted: rank 4"),
        ("rank_pattern", {"q_(": 4}, "rank_pattern"),
        ("alpha_pattern", {"q_proj": 0}, "alpha_pattern"),
        ("peft_type", "IA3", "peft_type"),
        ("init_lora_weights", "pissa", "init_lora_weights"),
        ("a_new_idea", {"x": 1}, "a_new_idea"),
        ("r", 0, "r"),
        ("r", 6, "lora_A"),
        ("lora_alpha", None, "lora_alpha"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(goldens: dict[str, Golden], field: str, value: object, name: str):
    with pytest.raises(InvalidInput, match=name):
        read(goldens["llama"], changed(files_of(goldens["llama"], "plain"), **{field: value}))


def test_modules_that_do_not_fit_are_refused_with_their_shapes(goldens: dict[str, Golden]):
    golden = goldens["llama"]
    files = files_of(golden, "plain")
    tensors = load(files[WEIGHTS_FILE])
    name = Q.format(0) + ".lora_A.weight"
    for broken, message in (
        (tensors | {name: np.zeros((5, 40), np.float32)}, r"q_proj: got lora_A \[5, 40\].*lora_A \[rank, 32\]"),
        (tensors | {name: np.zeros((4, 32), np.float32)}, r"q_proj: got lora_A \[4, 32\] and lora_B \[32, 5\]"),
        (tensors | {name: np.full((5, 32), np.nan, np.float32)}, r"q_proj: got a number that is not finite"),
        ({key: value for key, value in tensors.items() if key != name}, r"q_proj: got no lora_A"),
        (tensors | {"base_model.model.model.layers.7.mlp.up_proj.lora_A.weight": np.zeros((5, 32))}, r"layers.7.mlp"),
        (tensors | {"base_model.model.model.embed_tokens.lora_embedding_A": np.ones((5, 96))}, "embed_tokens"),
        (tensors | {"base_model.model.model.embed_tokens.weight": np.ones((97, 32))}, r"embed_tokens.*\[97, 32\]"),
        ({}, "no LoRA tensors"),
    ):
        with pytest.raises(InvalidInput, match=message):
            read(golden, files | {WEIGHTS_FILE: save(broken)})


def test_broken_folders_are_refused(goldens: dict[str, Golden]):
    golden = goldens["llama"]
    files = files_of(golden, "plain")
    with pytest.raises(InvalidInput, match="can't be read"):
        read(golden, files | {WEIGHTS_FILE: files[WEIGHTS_FILE][:100]})
    with pytest.raises(InvalidInput, match=WEIGHTS_FILE):
        read(golden, {CONFIG_FILE: files[CONFIG_FILE]})


def test_experts_must_all_be_there(goldens: dict[str, Golden]):
    golden = goldens["moe"]
    files = export_files(state_of(golden, "moe", "mlp"), "tiny")
    tensors = {name: tensor for name, tensor in load(files[WEIGHTS_FILE]).items() if ".experts.3." not in name}
    with pytest.raises(InvalidInput, match=r"experts \[0, 1, 2\].*0 to 3"):
        read(golden, files | {WEIGHTS_FILE: save(tensors)})

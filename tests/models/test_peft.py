"""PEFT folders: exports give PEFT's logits, adapters that PEFT wrote import, and nothing is taken silently."""

from __future__ import annotations

import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load, save

from tests.support.golden_lora import Golden, read_golden
from tx.errors import InvalidInput, Unsupported
from tx.layers.logprobs import next_logits
from tx.layers.lora import single_view
from tx.models.loading import load_model
from tx.models.peft import CONFIG_FILE, WEIGHTS_FILE, export_files, import_files
from tx.types import LoraConfig, ModelState
from tx.worker.adapters import AdapterStore
from tx.worker.mesh import make_mesh

FAMILIES = {"llama": (3, 0), "moe": (4, 2)}  # (rank, experts per token)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def golden(family: str, tmp_path_factory: pytest.TempPathFactory) -> Golden:
    return read_golden(f"peft_{family}", tmp_path_factory.mktemp("peft") / family)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Golden:
    return read_golden("peft_llama", tmp_path_factory.mktemp("peft") / "llama")


def state_of(golden: Golden, family: str) -> ModelState:
    return ModelState(LoraConfig(FAMILIES[family][0], 0), golden.group("adapter"))


def files_of(golden: Golden, prefix: str) -> dict[str, bytes]:
    return {name: golden.arrays[f"{prefix}/{name}"].tobytes() for name in (CONFIG_FILE, WEIGHTS_FILE)}


def logits(golden: Golden, state: ModelState) -> np.ndarray:
    """Our own logits with this adapter on the golden's base model and tokens."""
    from flax import nnx

    loaded = load_model(golden.folder, make_mesh(), jnp.float32)
    store = AdapterStore(loaded, 1)
    store.restore("m", state, with_optimizer=False)
    ranks, adapter = store.ranks("m"), store.state("m").weights
    view = single_view(adapter, ranks.scaling, ranks.expert_scaling, *ranks.padded)
    model = nnx.merge(loaded.graphdef, loaded.weights)
    tokens = jnp.asarray(golden.arrays["tokens"], jnp.int32)[None]
    hidden, _ = model.hidden_states(tokens, jnp.arange(tokens.size, dtype=jnp.int32)[None], adapter=view)
    return np.asarray(next_logits(hidden, model.unembed_kernel(), adapter.unembed, view.gate))[0]


def test_c07_peft_gets_our_logits_from_our_export(golden: Golden, family: str):
    """The golden's logits are PEFT's, after PeftModel.from_pretrained of a folder that export_files wrote."""
    np.testing.assert_allclose(logits(golden, state_of(golden, family)), golden.arrays["logits"], atol=1e-4)


def test_c07_the_export_is_the_one_that_peft_has_read(golden: Golden, family: str):
    files = export_files(state_of(golden, family), "tiny")
    assert json.loads(files[CONFIG_FILE]) == json.loads(golden.arrays[f"export/{CONFIG_FILE}"].tobytes())
    ours, theirs = load(files[WEIGHTS_FILE]), load(golden.arrays[f"export/{WEIGHTS_FILE}"].tobytes())
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.tobytes() == theirs[name].tobytes(), name


def test_c07_target_modules_are_spelled_out(golden: Golden, family: str):
    config = json.loads(export_files(state_of(golden, family), "tiny")[CONFIG_FILE])
    assert set(config["target_modules"]) == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")
    }
    assert (config["r"], config["lora_alpha"]) == (FAMILIES[family][0], 32)


def test_an_export_reads_back_bit_for_bit(golden: Golden, family: str):
    state = state_of(golden, family)
    again = import_files(export_files(state, "tiny"), FAMILIES[family][1])
    assert again.lora == state.lora
    assert again.weights.keys() == state.weights.keys()
    for name, array in state.weights.items():
        assert again.weights[name].tobytes() == array.tobytes(), name


def test_c07_an_adapter_that_peft_wrote_imports(llama: Golden):
    """Rank 5, alpha 10, on q_proj and v_proj only: the other modules start fresh and change nothing."""
    state = import_files(files_of(llama, "foreign"))
    assert state.lora == LoraConfig(5, 0, train_attn=True, train_mlp=False, train_unembed=False, alpha=10.0)
    assert {name.split(".")[2] for name in state.weights} == {"q_proj", "v_proj"}
    np.testing.assert_allclose(logits(llama, state), llama.arrays["foreign/logits"], atol=1e-4)


@pytest.mark.parametrize(
    ("field", "value", "name"),
    [
        ("use_rslora", True, "use_rslora"),
        ("use_dora", True, "use_dora"),
        ("bias", "all", "bias"),
        ("modules_to_save", ["lm_head"], "modules_to_save"),
        ("rank_pattern", {"q_proj": 4}, "rank_pattern"),
        ("peft_type", "IA3", "peft_type"),
        ("r", 0, "r"),
        ("r", 6, "lora_A"),
        ("lora_alpha", None, "lora_alpha"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(llama: Golden, field: str, value: object, name: str):
    files = files_of(llama, "foreign")
    config = json.loads(files[CONFIG_FILE]) | {field: value}
    with pytest.raises(InvalidInput, match=name):
        import_files(files | {CONFIG_FILE: json.dumps(config).encode()})


def test_unknown_tensors_and_broken_folders_are_refused(llama: Golden):
    files = files_of(llama, "foreign")
    extra = load(files[WEIGHTS_FILE]) | {"base_model.model.model.embed_tokens.lora_embedding_A": np.ones((5, 96))}
    with pytest.raises(Unsupported, match="embed_tokens"):
        import_files(files | {WEIGHTS_FILE: save(extra)})
    with pytest.raises(InvalidInput, match="can't be read"):
        import_files(files | {WEIGHTS_FILE: files[WEIGHTS_FILE][:100]})
    with pytest.raises(InvalidInput, match=WEIGHTS_FILE):
        import_files({})


def test_experts_of_a_larger_rank_than_ours_are_refused(tmp_path_factory: pytest.TempPathFactory):
    golden = read_golden("peft_moe", tmp_path_factory.mktemp("peft") / "moe")
    with pytest.raises(Unsupported, match="experts of rank"):
        import_files(export_files(state_of(golden, "moe"), "tiny"), num_experts_per_tok=4)

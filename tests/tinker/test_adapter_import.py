"""``python -m tx.tinker.import``: rows and a folder for a PEFT adapter or a checkpoint of tx, or one sentence."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sqlmodel import select

from tests.support.golden_lora import Golden, read_golden
from tx.errors import InvalidInput, StartupError
from tx.models.peft import CONFIG_FILE, WEIGHTS_FILE
from tx.tinker.adapter_import import import_adapter, main, read_adapter, read_source
from tx.tinker.checkpoints import CARD, BrokenCheckpoint, CheckpointFolders
from tx.tinker.config import TxConfig
from tx.tinker.db import AuditEntry, Checkpoint, Engine, Model, Session, open_database, reading, writing
from tx.tinker.model_files import from_files
from tx.tinker.sessions import Sessions
from tx.tinker.wire.paths import parse_path
from tx.types import ModelState


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Golden:
    return read_golden("peft_llama", tmp_path_factory.mktemp("peft") / "llama")


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Golden:
    return read_golden("peft_moe", tmp_path_factory.mktemp("peft") / "moe")


def adapter(golden: Golden, folder: Path, case: str = "plain") -> Path:
    folder.mkdir()
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        (folder / name).write_bytes(golden.arrays[f"in/{case}/{name}"].tobytes())
    return folder


def config_of(golden: Golden, data: Path) -> TxConfig:
    return TxConfig(base_model=str(golden.folder), data_dir=data)


def rows(config: TxConfig, table: type) -> list:
    with reading(open_database(config.resolved_database_url)) as session:
        return list(session.exec(select(table)).all())


def test_an_import_is_a_checkpoint_of_a_model_of_a_session(llama: Golden, tmp_path: Path):
    config = config_of(llama, tmp_path / "data")
    done = import_adapter(str(adapter(llama, tmp_path / "a")), config, "start", "project-1", "from PEFT", ["x"])
    (session,), (model,), (checkpoint,) = (rows(config, table) for table in (Session, Model, Checkpoint))
    assert (session.project_id, session.display_name, session.tags) == ("project-1", "from PEFT", ["x"])
    assert session.finished_at is not None
    assert (model.session_id, model.state, model.rank) == (session.session_id, "ready", 5)
    assert (model.train_attn, model.train_mlp, model.train_unembed) == (True, False, False)
    assert str(done.path) == f"tinker://{model.model_id}/weights/start"
    found, _ = Sessions(open_database(config.resolved_database_url)).checkpoint(parse_path(str(done.path)))
    assert (found.id, found.has_optimizer) == (checkpoint.id, False)
    assert [entry.event for entry in rows(config, AuditEntry)] == ["checkpoint.import"]
    card, files = CheckpointFolders(config.checkpoints_folder).read(done.path)
    assert sum(file.stat().st_size for file in (config.checkpoints_folder / done.path.folder).iterdir()) == (
        checkpoint.size_bytes
    )
    state = from_files(card, files, card.num_experts_per_tok)
    same(state, done.state)


def same(state: ModelState, other: ModelState) -> None:
    assert (state.lora, state.step) == (other.lora, other.step)
    for ours, theirs in ((state.weights, other.weights), (state.mu, other.mu), (state.nu, other.nu)):
        assert ours.keys() == theirs.keys()
        for name, array in ours.items():
            assert array.tobytes() == theirs[name].tobytes(), name


@pytest.mark.parametrize("case", ["stacked", "resaved"])
def test_experts_import_and_their_checkpoint_imports_again_to_the_bit(moe: Golden, tmp_path: Path, case: str):
    config = config_of(moe, tmp_path / "data")
    first = import_adapter(str(adapter(moe, tmp_path / "a", case)), config)
    second = import_adapter(str(config.checkpoints_folder / first.path.folder), config)
    assert first.path != second.path
    same(second.state, first.state)


def test_a_checkpoint_of_tx_keeps_its_optimizer(llama: Golden, tmp_path: Path):
    from tx.tinker import model_files
    from tx.tinker.checkpoints import CheckpointCard
    from tx.tinker.wire.paths import TinkerPath

    config = config_of(llama, tmp_path / "data")
    plain = import_adapter(str(adapter(llama, tmp_path / "a")), config).state
    halves = {name: array / 2 for name, array in plain.weights.items()}
    squares = {name: array**2 for name, array in plain.weights.items()}
    state = replace(plain, lora=replace(plain.lora, seed=9), mu=halves, nu=squares, step=7)
    elsewhere, path = CheckpointFolders(tmp_path / "elsewhere"), TinkerPath("s:train:0", "weights", "w")
    elsewhere.write(
        path, CheckpointCard("other/base", state.lora, 7, 1.0), model_files.to_files(state, "b", with_optimizer=True)
    )
    done = import_adapter(str(tmp_path / "elsewhere" / path.folder), config)
    same(done.state, state)
    assert [row.has_optimizer for row in rows(config, Checkpoint)] == [False, True]
    card, files = CheckpointFolders(config.checkpoints_folder).read(done.path)
    assert card.base_model == config.base_model_name
    same(from_files(card, files, 0), state)
    (tmp_path / "elsewhere" / path.folder / WEIGHTS_FILE).write_bytes(b"broken")
    with pytest.raises(BrokenCheckpoint, match=WEIGHTS_FILE):
        import_adapter(str(tmp_path / "elsewhere" / path.folder), config)


def test_a_checkpoint_of_another_base_model_is_refused_with_shapes(llama: Golden, moe: Golden, tmp_path: Path):
    from tx.models.loading import read_config

    first = import_adapter(str(adapter(llama, tmp_path / "a")), config_of(llama, tmp_path / "data"))
    folder = config_of(llama, tmp_path / "data").checkpoints_folder / first.path.folder
    files = read_source(str(folder))
    assert CARD in files
    config = replace(read_config(llama.folder), hidden_size=64)
    with pytest.raises(InvalidInput, match=r"layers.0.q_proj.lora_A: got shape \(32, 5\), accepted: shape \(64, 5\)"):
        read_adapter(files, config)


def test_the_command_prints_the_path(llama: Golden, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    flags = ["--base-model", str(llama.folder), "--data-dir", str(tmp_path / "data"), "--name", "n1"]
    main([str(adapter(llama, tmp_path / "a")), *flags])
    out, err = capsys.readouterr()
    assert parse_path(out.strip()).name == "n1"
    assert err == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / WEIGHTS_FILE).rename(folder / "adapter_model.bin"), "a pickle can run any code"),
        (lambda folder: (folder / WEIGHTS_FILE).unlink(), f"without {WEIGHTS_FILE}"),
        (lambda folder: (folder / CONFIG_FILE).write_text("{"), "can't be read"),
        (lambda folder: _set(folder, use_dora=True), "use_dora"),
        (lambda folder: _set(folder, r=4), "rank 4 as adapter_config.json says"),
    ],
)
def test_a_bad_adapter_ends_in_one_sentence_and_writes_nothing(llama, tmp_path, capsys, change, message):
    folder = adapter(llama, tmp_path / "a")
    change(folder)
    with pytest.raises(SystemExit) as ended:
        main([str(folder), "--base-model", str(llama.folder), "--data-dir", str(tmp_path / "data")])
    error = capsys.readouterr().err
    assert (ended.value.code, error.count("\n")) == (2, 1)
    assert message in error
    assert not (tmp_path / "data" / "checkpoints").exists()
    assert not (tmp_path / "data" / "tx.db").exists() or rows(config_of(llama, tmp_path / "data"), Session) == []


def _set(folder: Path, **settings: object) -> None:
    config = json.loads((folder / CONFIG_FILE).read_text()) | settings
    (folder / CONFIG_FILE).write_text(json.dumps(config))


def test_the_base_model_is_the_databases_own_if_there_is_one(llama: Golden, tmp_path: Path):
    config = TxConfig(data_dir=tmp_path / "data")
    source = str(adapter(llama, tmp_path / "a"))
    with pytest.raises(StartupError, match="--base-model; base models of this database: none so far"):
        import_adapter(source, config)
    db = open_database(config.resolved_database_url)
    with writing(db) as session:
        session.add(Engine(base_model=str(llama.folder), served_names=["org/name"]))
    import_adapter(source, config)
    import_adapter(source, TxConfig(data_dir=tmp_path / "data", base_model="org/name"))
    assert {(row.base_model, row.served_name) for row in rows(config, Model)} == {(str(llama.folder), "org/name")}
    with writing(db) as session:
        session.add(Engine(base_model="/other"))
    with pytest.raises(StartupError, match="base models of this database: /"):
        import_adapter(source, config)


def test_what_the_user_should_know_is_said(llama: Golden, tmp_path: Path):
    folder = adapter(llama, tmp_path / "a")
    wide = {name: np.zeros(shape, np.float32) for name, shape in _wide(64).items()}
    from safetensors.numpy import save

    (folder / WEIGHTS_FILE).write_bytes(save(wide))
    _set(folder, r=64, base_model_name_or_path="org/another")
    done = import_adapter(str(folder), config_of(llama, tmp_path / "data"))
    assert len(done.notes) == 2
    assert "org/another" in done.notes[0]
    assert "--max-lora-rank 64" in done.notes[1]


def _wide(rank: int) -> dict[str, tuple[int, int]]:
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    return {name.format("A"): (rank, 32), name.format("B"): (32, rank)}

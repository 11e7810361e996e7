"""Import a PEFT adapter into a server's database and checkpoints, with the server running or not.

What it makes is a checkpoint like any other: a session that is over, a model of that session, and the model's one
checkpoint with its folder. Clients train on from its ``tinker://`` path and sample from it. Of the base model, only
config.json is read. Run it as::

    python -m tx.tinker.import FOLDER_OR_HUB_ID

with the flags of the server that say where its data is, if they aren't the default (``--data-dir`` and its like).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy.engine import Engine as Database
from sqlmodel import select

from tx.errors import InvalidInput, StartupError, TxError, Unsupported
from tx.models import peft, peft_import
from tx.models.config import ModelConfig
from tx.models.demo import ensure_demo_model
from tx.models.loading import read_config
from tx.models.lora_sites import lora_sites
from tx.tinker import audit, model_files
from tx.tinker.checkpoints import CARD, BrokenCheckpoint, CheckpointCard, CheckpointFolders, check_file, parse_card
from tx.tinker.config import DEMO, TxConfig, environment_name, fail
from tx.tinker.db import LOCAL, Checkpoint, Engine, Model, Session, now, open_database, reading, writing
from tx.tinker.wire import paths
from tx.types import ModelState
from tx.worker.adapters import ranks, site_shapes, trained_sites

_FILES = (peft.CONFIG_FILE, peft.WEIGHTS_FILE, CARD, model_files.OPTIMIZER_FILE)
_PICKLE = "adapter_model.bin"
_FLAGS = ("base_model", "data_dir", "database_url", "checkpoints_base")


@dataclass(frozen=True)
class Imported:
    """What an import has made. notes: what its user should know, in sentences."""

    path: paths.TinkerPath
    state: ModelState
    notes: tuple[str, ...]


def main(argv: Sequence[str] | None = None) -> None:
    """Import, print the tinker:// path; a mistake ends the process with one sentence and exit code 2."""
    arguments = _parser().parse_args(argv)
    given = {name: os.environ.get(environment_name(name)) for name in _FLAGS}
    given |= {name: getattr(arguments, name) for name in _FLAGS if getattr(arguments, name) is not None}
    try:
        config = TxConfig.model_validate({name: value for name, value in given.items() if value})
        done = import_adapter(
            arguments.adapter,
            config,
            arguments.name,
            arguments.project_id,
            arguments.session_name,
            arguments.tag,
            arguments.owner,
        )
    except TxError as error:
        fail(error if isinstance(error, StartupError) else StartupError(str(error)))
    for note in done.notes:
        print(f"tx: {note}", file=sys.stderr)  # noqa: T201 (the terminal's)
    print(done.path)  # noqa: T201 (the answer)


def import_adapter(
    source: str,
    config: TxConfig,
    name: str = "imported",
    project_id: str | None = None,
    session_name: str | None = None,
    tags: Sequence[str] = (),
    owner: str = LOCAL,
) -> Imported:
    """Make a checkpoint of the adapter in a folder or a hub repository.

    Args:
        config: of the server, as far as it says where the database and the checkpoints are; its ``base_model`` may be
            None if the database knows one base model alone.
        name: of the checkpoint.
        owner: name of the API key that it will belong to.

    Raises:
        InvalidInput: the adapter doesn't fit the base model or isn't one that tx can hold; nothing has been written.
        StartupError: the database or the base model can't be found.
    """
    paths.check_name(name, "--name")
    files = read_source(source)
    db = open_database(config.resolved_database_url)
    engine = _served(db, config)
    state = read_adapter(files, read_config(_config_folder(engine.base_model, config)))
    session_id, created_at = f"sess-{uuid.uuid4().hex[:20]}", now()
    path = paths.TinkerPath(paths.model_id(session_id, 0), "weights", name)
    has_optimizer = bool(state.mu)
    card = CheckpointCard(engine.base_model, state.lora, state.step, created_at, model_files.experts_per_tok(state))
    folders = CheckpointFolders(config.checkpoints_folder)
    written = model_files.to_files(state, engine.base_model, with_optimizer=has_optimizer)
    size_bytes = folders.write(path, card, written)
    where = {"imported_from": source}
    session = Session(
        session_id=session_id, created_at=created_at, heartbeat_at=created_at, finished_at=created_at,
        finish_reason="success", finish_detail="an import", tags=list(tags), user_metadata=where,
        display_name=session_name, project_id=project_id, owner=owner,
    )  # fmt: skip
    lora = state.lora
    model = Model(
        model_id=path.model_id, session_id=session_id, model_seq_id=0, base_model=engine.base_model,
        served_name=(engine.served_names or [engine.base_model])[0], rank=lora.rank, seed=lora.seed,
        train_attn=lora.train_attn, train_mlp=lora.train_mlp, train_unembed=lora.train_unembed,
        user_metadata=where, created_at=created_at, last_request_at=created_at, state="ready",
    )  # fmt: skip
    checkpoint = Checkpoint(
        model_id=path.model_id, kind=path.kind, name=name, folder=path.folder, size_bytes=size_bytes,
        created_at=created_at, user_metadata=where, has_optimizer=has_optimizer,
    )  # fmt: skip
    entry = audit.entry(
        "checkpoints", "checkpoint.import", owner, model_id=path.model_id, tinker_path=str(path), imported_from=source
    )
    try:
        with writing(db) as transaction:
            for row in (session, model, checkpoint, entry):
                transaction.add(row)
    except BaseException:
        folders.delete(path)
        raise
    return Imported(path, state, tuple(_notes(files, engine.base_model, state)))


def read_source(source: str) -> dict[str, bytes]:
    """The files of an adapter, from a folder or else from the hub."""
    folder = Path(source).expanduser()
    if not folder.is_dir():
        if source.startswith(("/", "./", "../", "~")):
            raise InvalidInput("adapter", source, "a folder that exists, or a hub id such as org/name")
        folder = _download(source, (*_FILES, _PICKLE))
    files = {name: (folder / name).read_bytes() for name in _FILES if (folder / name).is_file()}
    if peft.WEIGHTS_FILE not in files and (folder / _PICKLE).is_file():
        reason = f"{peft.WEIGHTS_FILE}: a pickle can run any code when it is read; save the adapter as safetensors"
        raise Unsupported("adapter", _PICKLE, reason)
    return files


def read_adapter(files: Mapping[str, bytes], config: ModelConfig) -> ModelState:
    """The adapter in these files as one of this base model: a PEFT adapter, or a checkpoint of tx to the bit."""
    sites, per_tok = lora_sites(config), config.num_experts_per_tok
    if CARD not in files:
        return peft_import.import_files(files, per_tok, sites)
    try:
        described = json.loads(files[CARD])
    except ValueError as error:
        raise BrokenCheckpoint(f"{CARD} can't be read ({error})") from error
    card, sums = parse_card(described)
    for name in sums:
        check_file(name, files.get(name, b""), sums[name])
    state = model_files.from_files(card, {name: files[name] for name in sums}, card.num_experts_per_tok)
    own = ranks(state.lora, per_tok)
    wanted = {
        f"{site.name}.lora_{side}": shape
        for site in trained_sites(sites, state.lora)
        for side, shape in zip("AB", site_shapes(site, own.expert if site.num_experts else own.dense), strict=True)
    }
    for name in sorted(wanted.keys() | state.weights.keys()):
        got = state.weights[name].shape if name in state.weights else None
        if got != wanted.get(name):
            accepted = f"shape {wanted[name]} on this base model" if name in wanted else "modules that it has"
            raise InvalidInput(f"{peft.WEIGHTS_FILE}.{name}", "absent" if got is None else f"shape {got}", accepted)
    return state


def _served(db: Database, config: TxConfig) -> Engine:
    """The base model that the adapter is for, as its engine has registered it, or as the flags say."""
    with reading(db) as session:
        engines = list(session.exec(select(Engine)).all())
    if config.base_model is not None:
        names = {config.base_model, config.base_model_name}
        found = [engine for engine in engines if engine.base_model in names or names & set(engine.served_names)]
        return found[0] if found else Engine(base_model=config.base_model_name, served_names=list(config.served_names))
    if len(engines) != 1:
        known = ", ".join(sorted(engine.base_model for engine in engines)) or "none so far"
        raise StartupError(f"Name the base model with --base-model; base models of this database: {known}.")
    return engines[0]


def _config_folder(name: str, config: TxConfig) -> Path:
    """A folder with the base model's config.json."""
    if Path(name).is_absolute():
        if not (Path(name) / "config.json").is_file():
            raise StartupError(f"--base-model: the folder {name} has no config.json.")
        return Path(name)
    if name == DEMO:
        with contextlib.suppress(StartupError):
            return ensure_demo_model(config.data_folder)
    return _download(name, ("config.json", "generation_config.json"))


def _download(repository: str, names: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, allow_patterns=list(names)))
    except Exception as error:  # whatever the network does, the terminal gets one sentence
        raise StartupError(f"{repository} can't be downloaded: {str(error).splitlines()[0]}") from error


def _notes(files: Mapping[str, bytes], base_model: str, state: ModelState) -> Iterator[str]:
    made_for = json.loads(files[peft.CONFIG_FILE]).get("base_model_name_or_path")
    if made_for and Path(str(made_for)).name != Path(base_model).name:
        yield f"the adapter was made for {made_for}; it has been imported for {base_model}, whose shapes it fits"
    if state.lora.rank > TxConfig.model_fields["max_lora_rank"].default:
        yield f"the server needs --max-lora-rank {state.lora.rank} or more for this adapter"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tx.tinker.import",
        description="Import a PEFT adapter, or a checkpoint folder of tx, and print its tinker:// path.",
        allow_abbrev=False,
    )
    parser.add_argument("adapter", help="folder of the adapter, or its hub id")
    parser.add_argument("--name", default="imported", help="name of the checkpoint [imported]")
    parser.add_argument("--project-id", help="project of the session that the import makes")
    parser.add_argument("--session-name", help="display name of that session")
    parser.add_argument("--tag", action="append", default=[], help="a tag of that session; may be given several times")
    parser.add_argument("--owner", default=LOCAL, help=f"name of the API key that it will belong to [{LOCAL}]")
    of_base_model = "hub id, folder or served name of the base model (default: the only one of the database)"
    for name in _FLAGS:
        description = of_base_model if name == "base_model" else TxConfig.model_fields[name].description
        parser.add_argument("--" + name.replace("_", "-"), help=f"{description}; {environment_name(name)}")
    return parser

"""Every flag once: command line over environment over default; mistakes end in one sentence and exit code 2."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tx.errors import StartupError
from tx.tinker import config as module
from tx.tinker.config import DEMO, TxConfig, build_parser, environment_name, parse_args


def parse(*argv: str, **environ: str) -> TxConfig:
    return parse_args(argv, "tx", environ)


def test_the_peers_command_line_is_understood():
    config = parse(
        *[
            "--base-model",
            "Qwen/Qwen3-4B",
            "--max-lora-adapters",
            "3",
            "--max-lora-rank",
            "1",
            "--tensor-parallel-size",
            "8",
            "--train-micro-batch-size",
            "8",
            "--checkpoints-base",
            "/c",
            "--database-url",
            "sqlite:////d.db",
            "--sample-max-num-sequences",
            "4",
            "--gradient-checkpointing",
            "--no-shard-attention-heads",
            "--enforce-eager",
            "--host",
            "0.0.0.0",
            "--port",
            "9000",
        ]
    )
    assert config.max_lora_adapters == 3
    assert config.tensor_parallel_size == 8
    assert (config.gradient_checkpointing, config.shard_attention_heads, config.enforce_eager) == (True, False, True)
    assert config.checkpoints_folder == Path("/c")
    assert config.resolved_database_url == "sqlite:////d.db"


def test_flag_beats_environment_beats_default():
    environ = {"TX_PORT": "9", "TX_GRADIENT_CHECKPOINTING": "true", "TX_SERVED_MODEL_NAME": "a, b", "TX_HOST": ""}
    config = parse("--port", "10", **environ)
    assert (config.port, config.gradient_checkpointing, config.host) == (10, True, "127.0.0.1")
    assert config.served_model_name == ("a", "b")


def test_every_flag_has_one_line_of_help_and_a_variable(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for name, field in TxConfig.model_fields.items():
        assert "--" + name.replace("_", "-") in text
        assert environment_name(name) in text
        assert field.description
        assert "\n" not in field.description


@pytest.mark.parametrize(
    ("argv", "environ", "named"),
    [
        (["--nonsense"], {}, "--nonsense"),
        (["--port", "x"], {}, "--port"),
        (["--port", "70000"], {}, "--port"),
        (["--max-lora-rank", "0"], {}, "--max-lora-rank"),
        (["--train-micro-batch-size", "-1"], {}, "--train-micro-batch-size"),
        (["--dtype", "int8"], {}, "--dtype"),
        (["--base"], {}, "--base"),
        (["--kv-cache-memory", "8 apples"], {}, "--kv-cache-memory"),
        (["--kv-cache-memory", "-1"], {}, "--kv-cache-memory"),
        ([], {"TX_KV_CACHE_MEMORY": "iB"}, "TX_KV_CACHE_MEMORY"),
        (["--max-queued-samples", "0"], {}, "--max-queued-samples"),
        ([], {"TX_DTYPE": "int8"}, "TX_DTYPE"),
        ([], {"TX_ENFORCE_EAGER": "perhaps"}, "TX_ENFORCE_EAGER"),
        (["stray"], {}, "stray"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(argv, environ, named, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_args(argv, "tx", environ)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert named in error
    assert error.count("\n") == 1
    assert "Traceback" not in error


def test_engine_argv_gives_the_same_configuration():
    config = parse(
        *[
            "--base-model",
            "m",
            "--served-model-name",
            "a",
            "b",
            "--no-shard-attention-heads",
            "--dtype",
            "float32",
            "--data-dir",
            "/x",
            "--train-micro-batch-tokens",
            "512",
            "--kv-cache-memory",
            "1.5GiB",
            "--max-queued-samples",
            "7",
            "--database-url",
            "postgresql://u:secret@h/d",
        ]
    )
    again = parse_args(config.to_argv(), "engine", config.to_environ())
    assert again == config
    assert "secret" not in " ".join(config.to_argv()), "ps shows command lines"


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("0", 0),
        ("123456", 123456),
        ("8GiB", 8 * 2**30),
        ("8gi", 8 * 2**30),
        ("500 MB", 500_000_000),
        ("1.5g", 1_500_000_000),
        ("64KiB", 65536),
        ("2T", 2 * 10**12),
        ("10B", 10),
    ],
)
def test_memory_is_bytes_or_has_a_unit(text, num_bytes):
    assert parse("--kv-cache-memory", text).kv_cache_memory == num_bytes
    assert parse(TX_KV_CACHE_MEMORY=text).kv_cache_memory == num_bytes
    assert parse().kv_cache_memory == 0
    assert parse("--parked-adapters-memory", text).parked_adapters_memory == num_bytes


def test_names_of_the_base_model(tmp_path, monkeypatch):
    assert parse("--base-model", "Qwen/Qwen3-4B", "--served-model-name", "x").served_names == ("Qwen/Qwen3-4B", "x")
    assert parse().served_names == (DEMO,)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()
    relative = parse("--base-model", "m")
    assert relative.base_model_is_folder
    assert relative.base_model_name == str(tmp_path / "m"), "the same database must know it from any working folder"
    assert relative.served_names == (str(tmp_path / "m"), "m")


def test_data_lives_under_one_folder(tmp_path):
    config = parse("--data-dir", str(tmp_path))
    assert config.resolved_database_url == f"sqlite:///{tmp_path}/tx.db"
    assert config.checkpoints_folder == tmp_path / "checkpoints"
    assert config.compile_cache_folder == tmp_path / "xla-cache"
    assert config.parking_folder.parent == tmp_path / "parked"
    assert str(parse().data_folder).startswith(str(Path.home()))


def test_checkpoints_may_live_in_a_bucket():
    config = parse("--checkpoints-base", "s3://bucket/prefix/")
    assert config.checkpoints_folder == "s3://bucket/prefix"
    argv = config.to_argv()
    assert argv[argv.index("--checkpoints-base") + 1] == "s3://bucket/prefix", "the engine uses the same"


@pytest.mark.parametrize("base", ["ftp://host/folder", "s3:/bucket", "s3://key:secret@bucket"])
def test_a_base_that_cannot_be_used_is_refused_with_what_can(base, capsys):
    with pytest.raises(SystemExit):
        parse("--checkpoints-base", base)
    sentence = capsys.readouterr().err
    assert all(word in sentence for word in ("--checkpoints-base", base, "s3://, gs://, az://"))


def test_engines_that_share_a_data_folder_park_apart(tmp_path):
    names = ("org/a", "other/a", "/models/a", "/models/b")
    folders = {parse("--data-dir", str(tmp_path), "--base-model", name).parking_folder for name in names}
    assert len(folders) == 4
    assert {folder.parent for folder in folders} == {tmp_path / "parked"}


def test_without_model_and_without_demo_one_sentence(monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(StartupError, match="--base-model"):
        parse().check_demo()
    parse("--base-model", "x").check_demo()


def test_abbreviations_are_not_flags():
    assert build_parser("tx").allow_abbrev is False


def test_help_of_the_real_command():
    command = [sys.executable, "-m", "tx.tinker.api"]
    bad = subprocess.run([*command, "--nonsense"], capture_output=True, text=True, timeout=60)
    assert bad.returncode == 2
    assert bad.stderr.count("\n") == 1
    assert "--nonsense" in bad.stderr

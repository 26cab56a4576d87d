"""Models and data sets by local folder or by name on the hub: find them without downloading anything.

Runs, `--dry_run` and tools/doctor.py all call `locate`, so they give the same answers.
"""

import json
import os
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants, get_hf_file_metadata, get_token, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from theworld.utils.files import check_folder

GEMMA_FILE, VAE_FILE = "config.json", "vae/config.json"
TIMEOUT = 10.0  # seconds to wait for an answer of the hub


class Fault(ValueError):
    """An obstacle to a run: a `message`, and a `hint` that says what to do."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(f"{message}; {hint}")
        self.message, self.hint = message, hint


@dataclass(frozen=True)
class Place:
    """The place of a model: its config file on this machine, None if only the hub has it, and the place in words."""

    config: Path | None
    words: str
    offline: bool = False  # the hub cannot be asked, and what was downloaded before has to do


def locate(name: str, file: str, revision: str | None = None) -> Place:
    """Return the place of a model, named by a local folder or on the hub; `file` is GEMMA_FILE or VAE_FILE.

    Downloads nothing. Raises Fault if a run could not load the model: there is no such folder or model, the licence is
    not accepted, the hub cannot be reached, or nothing can be downloaded.
    """
    if Path(name).is_dir():
        for own in (Path(name) / file, Path(name) / Path(file).name):
            if own.is_file():
                check_weight_files(own.parent)
                return Place(own, "a local folder")
        raise Fault(
            f"{name}: a local folder without {file}", "give a folder with a model, or a name on the hub"
        )
    try:
        held = try_to_load_from_cache(name, file, revision=revision)
    except HFValidationError:
        raise Fault(
            f"{name}: no such folder, and not a name on the hub", "check the path, or the name"
        ) from None
    config = Path(held) if isinstance(held, str) else None
    if config is not None:
        check_weight_files(config.parent)
    try:
        ask_hub(name, file, revision=revision)
    except (OSError, EntryNotFoundError) as error:  # also huggingface_hub's own errors
        fault = _refusal(error, name, file)
        if config is None:
            raise fault from None
        return Place(config, f"downloaded before; {fault.message.removeprefix(f'{name}: ')}", offline=True)
    if config is None:
        check_download_folder(name)
    return Place(config, "downloaded before" if config else "on the hub, access granted")


def _refusal(error: Exception, name: str, file: str) -> Fault:
    """Return what it means that the hub does not serve a file."""
    if isinstance(error, GatedRepoError):
        return Fault(f"{name}: the licence is not accepted, or no token is set", _licence_hint(name))
    if isinstance(error, RepositoryNotFoundError):
        hint = "check the name (there is no such local folder either), and HF_TOKEN"
        return Fault(f"{name}: no such model, or a private one", hint)
    if isinstance(error, EntryNotFoundError):
        return Fault(f"{name}: a model on the hub without {file}", "give a model that has it")
    if isinstance(error, HfHubHTTPError):
        message = f"{name}: {str(error).splitlines()[0]}"
        return Fault(message, "check the name, and HF_TOKEN; or try again later")
    return Fault(f"{name}: {error}", "check the network, or the name (there is no such local folder)")


def source_of_model(name: str, file: str, revision: str | None = None) -> str:
    """Return what a library is to load a model from: its name or, where the hub cannot be asked, the folder of its
    download. The libraries themselves ask again and again, for half a minute a file. Raises Fault as `locate` does."""
    place = locate(name, file, revision)
    if not place.offline or place.config is None:
        return name
    return str(place.config.parents[len(Path(file).parts) - 1])


def check_download_folder(name: str) -> None:
    """Raise Fault if the folder for downloads cannot be written to."""
    folder = Path(constants.HF_HUB_CACHE)
    try:
        check_folder(folder, "HF_HOME")
    except OSError as error:
        raise Fault(f"{name} cannot be downloaded: {error}", "export HF_HOME=FOLDER") from None


class BadToken(Fault):
    """A token that cannot be one."""


def check_token() -> None:
    """Raise BadToken if the hub's token has a character that no token has: it would be refused by the HTTP library,
    whose message shows the token."""
    token = get_token() or ""
    check_secret("the hub's token", token, "export HF_TOKEN=... again, or `hf auth login`")


def check_secret(what: str, secret: str, hint: str) -> None:
    """Raise BadToken for a token or key with a character that is no printing ASCII one. The secret is not shown."""
    for place, character in enumerate(secret, start=1):
        if not "!" <= character <= "~":
            name = unicodedata.name(character, "a control character")
            message = f"{what}: character {place} of {len(secret)} is U+{ord(character):04X} ({name})"
            raise BadToken(message, f"copy it again, without what is invisible: {hint}")


def _licence_hint(name: str) -> str:
    page = f"https://huggingface.co/{name}"
    if get_token() is None:
        return f"accept the licence on {page}, then export HF_TOKEN=hf_... (none is set)"
    return f"accept the licence on {page} with the account that the token in use belongs to"


def ask_hub(name: str, file: str, kind: str = "model", revision: str | None = None) -> None:
    """Ask the hub once, for at most `TIMEOUT` seconds, whether it would serve a file.

    Raises huggingface_hub's error if the hub refuses, OSError if there is no answer, BadToken before asking.
    """
    url = hf_hub_url(name, file, repo_type=kind, revision=revision)
    check_token()
    try:
        get_hf_file_metadata(url, timeout=TIMEOUT)
    except (HfHubHTTPError, EntryNotFoundError, HFValidationError):
        raise
    except OfflineModeIsEnabled:
        raise OSError("the hub is not asked, as HF_HUB_OFFLINE is set") from None
    except Exception:  # noqa: BLE001 - errors of the HTTP library, which changes between releases of huggingface_hub
        raise OSError("the hub cannot be reached") from None


def file_at_hand(model: str, *names: str, revision: str | None = None) -> Path | None:
    """Return the first of these files of a model, a local folder or a name on the hub, that is on this machine."""
    for name in names:
        if Path(model).is_dir():
            path = Path(model) / name
            if path.is_file():
                return path
            continue
        try:
            cached = try_to_load_from_cache(model, name, revision=revision)
        except HFValidationError:  # a local folder that is not on this machine
            return None
        if isinstance(cached, str):
            return Path(cached)
    return None


def check_weight_files(folder: Path) -> None:
    """Raise Fault for a *.safetensors of a model's folder that cannot be one: its header and size are looked at."""
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb") as file:
            start, size = file.read(8), file.seek(0, os.SEEK_END)
            file.seek(8)
            length = int.from_bytes(start, "little")
            header = file.read(length) if length <= size else b""
        if start == b"version ":
            raise Fault(f"{path}: a Git LFS pointer, not the weights", "get the file with `git lfs pull`")
        try:
            tensors = {key: value for key, value in json.loads(header).items() if key != "__metadata__"}
            wanted = 8 + length + max(value["data_offsets"][1] for value in tensors.values())
        except (ValueError, KeyError, TypeError, AttributeError):
            raise Fault(
                f"{path}: no header of a safetensors file", "download or copy the file again"
            ) from None
        if size != wanted:
            raise Fault(
                f"{path}: {size:,} bytes; its header says {wanted:,}", "download or copy the file again"
            )


def model_id(name_or_path: str) -> str:
    """Return a hub name as it is, and of a local folder the last part, since a fingerprint holds no paths."""
    return Path(name_or_path).resolve().name if Path(name_or_path).is_dir() else name_or_path


def hub_revision(name_or_path: str, filename: str) -> str | None:
    """Return the commit of a hub model that was downloaded; None for a local folder and before a download."""
    if Path(name_or_path).is_dir():
        return None
    cached = try_to_load_from_cache(name_or_path, filename)
    if not isinstance(cached, str):
        return None
    parts = Path(cached).parts  # .../snapshots/<commit>/<filename>
    return parts[parts.index("snapshots") + 1] if "snapshots" in parts else None

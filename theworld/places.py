"""What can be known of a run before anything is loaded, downloaded or written: models, statements, photographs, room.

Real runs, `--dry_run` and tools/doctor.py ask the same questions here, so they give the same answers.
"""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import get_hf_file_metadata, get_token, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from theworld.vsr import RELEASES, Statement, load_all, load_statements

GEMMA_FILE, VAE_FILE = "config.json", "vae/config.json"
PATIENCE = 10.0  # seconds for an answer of the hub


class Fault(ValueError):
    """Something stands in the way of a run: what it `says`, and its `cure`."""

    def __init__(self, says: str, cure: str) -> None:
        super().__init__(f"{says}; {cure}")
        self.says, self.cure = says, cure


# ---- models and data sets by name


@dataclass(frozen=True)
class Place:
    """Where a model is: its config file on this machine, None where only the hub has it; and the same in words."""

    config: Path | None
    words: str


def locate(name: str, file: str) -> Place:
    """Where a model is that is named by a local folder or by its name on the hub; `file` is GEMMA_FILE or VAE_FILE.

    Downloads nothing. Raises Fault where a run could not load it: no such folder or model, a licence that was not
    accepted, a hub that cannot be reached.
    """
    if Path(name).is_dir():
        for own in (Path(name) / file, Path(name) / Path(file).name):
            if own.is_file():
                return Place(own, "a local folder")
        cure = "name a folder with a model, or its name on the hub"
        raise Fault(f"{name}: a local folder without {file}", cure)
    try:
        held = try_to_load_from_cache(name, file)
        config = Path(held) if isinstance(held, str) else None
        ask_hub(name, file)
    except HFValidationError:
        raise Fault(
            f"{name}: no such folder, and no name on the hub", "check the path, or the name"
        ) from None
    except GatedRepoError:
        raise Fault(f"{name}: the licence is not accepted, or no token is set", _licence_cure(name)) from None
    except RepositoryNotFoundError:
        cure = "check the name (there is no such local folder either), and HF_TOKEN"
        raise Fault(f"{name}: no such model, or a private one", cure) from None
    except EntryNotFoundError:
        raise Fault(f"{name}: a model on the hub without {file}", "name one that has it") from None
    except HfHubHTTPError as error:
        says = f"{name}: {str(error).splitlines()[0]}"
        raise Fault(says, "check the name, and HF_TOKEN; or try again later") from None
    except OSError as error:
        if config is None:
            raise Fault(f"{name}: {error}", "check the network; or name a local folder") from None
        return Place(config, f"downloaded before; {error}")
    return Place(config, "downloaded before" if config else "on the hub, and open to you")


def _licence_cure(name: str) -> str:
    page = f"https://huggingface.co/{name}"
    if get_token() is None:
        return f"accept the licence on {page}, then export HF_TOKEN=hf_... (none is set)"
    return f"accept the licence on {page} with the account that the token in use belongs to"


def ask_hub(name: str, file: str, kind: str = "model") -> None:
    """Asks the hub whether it would give out a file, once and for `PATIENCE` seconds at most.

    Raises what huggingface_hub raises for an answer that is a refusal, OSError where there is no answer.
    """
    url = hf_hub_url(name, file, repo_type=kind)
    try:
        get_hf_file_metadata(url, timeout=PATIENCE)
    except (HfHubHTTPError, EntryNotFoundError, HFValidationError):
        raise
    except OfflineModeIsEnabled:
        raise OSError("the hub is not asked, as HF_HUB_OFFLINE is set") from None
    except Exception:  # noqa: BLE001 - of the HTTP library beneath, which is another one in each release
        raise OSError("the hub cannot be reached") from None


def statements_at_hand(annotations: str | None, dataset_name: str) -> dict[str, list[Statement]] | None:
    """The statements of every split, as `load_all` gives them; None where they would have to be downloaded first.

    Raises as `load_all` does, and Fault where they cannot be downloaded.
    """
    if annotations is not None:
        return load_all(annotations, dataset_name)
    repository = f"cambridgeltl/vsr_{RELEASES[dataset_name]}"
    found: dict[str, list[Statement]] = {}
    for split in ("train", "dev", "test"):
        held = try_to_load_from_cache(repository, f"{split}.jsonl", repo_type="dataset")
        if not isinstance(held, str):
            try:
                ask_hub(repository, f"{split}.jsonl", "dataset")
            except OSError as error:  # and all that the hub answers
                says = f"{repository}: {str(error).splitlines()[0]}"
                cure = "check the network; or give --annotations, a folder with its JSONL files"
                raise Fault(says, cure) from None
            return None
        found[split] = load_statements(held, split, dataset_name)
    return found


class Elsewhere(Exception):
    """Statements that only the hub has: the name of their data set."""


def split_at_hand(annotations: str | None, split: str, dataset_name: str) -> list[Statement]:
    """As `load_statements`, but downloads nothing: raises Elsewhere."""
    if annotations is not None:
        return load_statements(annotations, split, dataset_name)
    splits = statements_at_hand(None, dataset_name)
    if splits is None:
        raise Elsewhere(dataset_name)
    return splits["dev" if split == "validation" else split]


# ---- photographs


def missing_photographs(names: Sequence[str], folder: Path) -> list[str]:
    """Those of the names that are no file in the folder. Opens none of them: a damaged one is not found here."""
    return [name for name in names if not (folder / name).is_file()]


# ---- room


def nearest_folder(path: Path) -> Path:
    """The lowest folder on the way to `path` that is there. Raises NotADirectoryError where a file is in the way."""
    path = path.absolute()
    while not os.path.lexists(path):
        path = path.parent
    if not path.is_dir():
        raise NotADirectoryError(
            f"{path} is a file, and a folder is wanted there; move it, or choose another"
        )
    return path


def free_bytes(path: Path) -> int:
    """Free on the disk where `path` is or would be."""
    return shutil.disk_usage(nearest_folder(path)).free


def check_room(path: Path, size: int, flag: str) -> int:
    """The free bytes where `path` is or would be. Raises ValueError where they are fewer than `size`."""
    free = free_bytes(path)
    if size > free:
        raise ValueError(f"{path}: {size:,} bytes are needed and {free:,} are free; make room or move {flag}")
    return free


def check_folder(folder: Path, flag: str) -> None:
    """Raises OSError where nothing can be written into a folder, be it there or to be made."""
    there = nearest_folder(folder)
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"{flag} {folder}: {there} is not yours to write to; choose another {flag}")


def check_output(path: Path, flag: str = "--output") -> str:
    """ " (replaces the one there)" or nothing. Raises OSError where a file could not be written."""
    check_folder(path.parent, flag)
    if path.is_dir():
        raise IsADirectoryError(f"{flag} {path} is a folder, and a file is wanted; name one in it")
    if path.exists() and not os.access(path, os.W_OK):
        raise PermissionError(f"{flag} {path} is not yours to write to; choose another {flag}")
    return " (replaces the one there)" if path.exists() else ""

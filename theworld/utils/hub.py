"""What can be known of a run before anything is loaded, downloaded or written: models, statements, photographs, room.

Real runs, `--dry_run` and tools/doctor.py ask the same questions here, so they give the same answers.
"""

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

GEMMA_FILE, VAE_FILE = "config.json", "vae/config.json"
PATIENCE = 10.0  # seconds for an answer of the hub


class Fault(ValueError):
    """An obstacle to a run: a `message`, and a `hint` that says what to do."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(f"{message}; {hint}")
        self.message, self.hint = message, hint


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


def model_id(name_or_path: str) -> str:
    """The hub name as it is; of a local folder its last part, since a fingerprint holds no paths."""
    return Path(name_or_path).resolve().name if Path(name_or_path).is_dir() else name_or_path


def hub_revision(name_or_path: str, filename: str) -> str | None:
    """The commit that a downloaded hub model has on this machine; None for a local folder."""
    if Path(name_or_path).is_dir():
        return None
    cached = try_to_load_from_cache(name_or_path, filename)
    if not isinstance(cached, str):
        return None
    parts = Path(cached).parts  # .../snapshots/<commit>/<filename>
    return parts[parts.index("snapshots") + 1] if "snapshots" in parts else None

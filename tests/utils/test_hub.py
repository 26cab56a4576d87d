"""Where models and statements are, asked of folders, of what was downloaded before and of a stand-in hub."""

import json
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from constants import EMBEDDED_GEMMA, EMBEDDED_VAE
from fake_hub import serve
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError

from theworld.data.images import missing_photographs
from theworld.data.vsr import load_statements, statements_at_hand
from theworld.models.gemma import Gemma
from theworld.utils import hub as places
from theworld.utils.files import check_folder, check_output, check_room, nearest_folder
from theworld.utils.hub import GEMMA_FILE, VAE_FILE, Fault, locate, source_of_model

NAME = "someone/gemma"
DATA = "datasets/cambridgeltl/vsr_random"


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine that may ask a hub and has downloaded nothing."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    for name in [n for n in os.environ if "proxy" in n.lower()]:
        monkeypatch.delenv(name)
    return tmp_path


@pytest.fixture
def hub(fresh: Path, annotations: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A hub with the embedded Gemma and the tests' statements; gives the requests."""
    with serve({NAME: EMBEDDED_GEMMA, DATA: annotations}) as (address, requests):
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        monkeypatch.setattr(
            "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
            address + "/{repo_id}/resolve/{revision}/{filename}",
        )
        yield requests


def downloaded(cache: Path, repository: str, files: dict[str, bytes]) -> Path:
    """What a download of these files leaves."""
    folder = cache / repository.replace("/", "--")
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("f" * 40)
    for name, data in files.items():
        path = folder / "snapshots" / ("f" * 40) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder / "snapshots" / ("f" * 40)


# ---- models


def test_a_folder_has_its_config_in_one_of_two_places(tmp_path: Path) -> None:
    assert locate(str(EMBEDDED_VAE), VAE_FILE).config == EMBEDDED_VAE / "config.json"
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text("{}")
    assert locate(str(tmp_path), VAE_FILE).config == tmp_path / "vae" / "config.json"
    with pytest.raises(Fault) as caught:
        locate(str(tmp_path), GEMMA_FILE)
    assert caught.value.message == f"{tmp_path}: a local folder without config.json"
    assert caught.value.hint == "give a folder with a model, or a name on the hub"


def test_the_hub_is_asked_once_and_nothing_is_downloaded(hub: list[str], fresh: Path) -> None:
    place = locate(NAME, GEMMA_FILE)
    assert (place.config, place.words) == (None, "on the hub, access granted")
    assert [request for request in hub if NAME in request] == [f"HEAD {NAME}/resolve/main/config.json"]
    assert not (fresh / "hub").exists()


def test_a_downloaded_model_needs_no_hub(hub: list[str], fresh: Path) -> None:
    snapshot = downloaded(fresh / "hub", f"models/{NAME}", {"config.json": b"{}"})
    place = locate(NAME, GEMMA_FILE)
    assert (place.config, place.words) == (snapshot / "config.json", "downloaded before")


def test_a_downloaded_model_can_be_used_offline(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(Fault, match="the hub is not asked, as HF_HUB_OFFLINE is set; check the network"):
        locate(NAME, GEMMA_FILE)
    downloaded(fresh / "hub", f"models/{NAME}", {"config.json": b"{}"})
    assert locate(NAME, GEMMA_FILE).words.startswith("downloaded before; the hub is not asked")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("some/where/else", "some/where/else: no such folder, and not a name on the hub"),
        ("../nowhere", "../nowhere: no such folder, and not a name on the hub"),
        ("nobody/nothing", "nobody/nothing: no such model, or a private one"),
    ],
)
def test_a_name_that_is_neither_a_folder_nor_on_the_hub_is_refused(
    hub: list[str], name: str, says: str
) -> None:
    with pytest.raises(Fault) as caught:
        locate(name, GEMMA_FILE)
    assert caught.value.message == says
    assert caught.value.hint


def test_a_model_on_the_hub_without_the_file(hub: list[str]) -> None:
    with pytest.raises(Fault, match=r"someone/gemma: a model on the hub without vae/config\.json"):
        locate(NAME, VAE_FILE)


@pytest.mark.parametrize(("token", "words"), [(None, "none is set"), ("hf_x", "the token in use belongs to")])
def test_a_licence_has_its_page_as_the_cure(
    monkeypatch: pytest.MonkeyPatch, fresh: Path, token: str | None, words: str
) -> None:
    def refuse(url: str, **options: object) -> None:
        raise GatedRepoError("no", response=SimpleNamespace(headers={}, request=None))  # type: ignore[arg-type]

    monkeypatch.setattr(places, "get_hf_file_metadata", refuse)
    monkeypatch.setattr(places, "get_token", lambda: token)
    with pytest.raises(Fault) as caught:
        locate("google/gemma-3-4b-it", GEMMA_FILE)
    assert caught.value.message == "google/gemma-3-4b-it: the licence is not accepted, or no token is set"
    assert "https://huggingface.co/google/gemma-3-4b-it" in caught.value.hint
    assert words in caught.value.hint


def test_what_was_downloaded_serves_though_the_hub_refuses_it_now(
    monkeypatch: pytest.MonkeyPatch, fresh: Path
) -> None:
    """Such as with a token that has expired."""

    def refuse(url: str, **options: object) -> None:
        raise GatedRepoError("no", response=SimpleNamespace(headers={}, request=None))  # type: ignore[arg-type]

    monkeypatch.setattr(places, "get_hf_file_metadata", refuse)
    snapshot = downloaded(fresh / "hub", f"models/{NAME}", {"config.json": b"{}"})
    place = locate(NAME, GEMMA_FILE)
    assert (place.config, place.offline) == (snapshot / "config.json", True)
    assert place.words == "downloaded before; the licence is not accepted, or no token is set"
    assert source_of_model(NAME, GEMMA_FILE) == str(snapshot)


def test_an_answer_without_a_rule_is_shown(monkeypatch: pytest.MonkeyPatch, fresh: Path) -> None:
    def refuse(url: str, **options: object) -> None:
        response = SimpleNamespace(headers={}, request=None)
        raise HfHubHTTPError("418 I'm a teapot\nmore", response=response)  # type: ignore[arg-type]

    monkeypatch.setattr(places, "get_hf_file_metadata", refuse)
    with pytest.raises(Fault, match=r"someone/gemma: 418 I'm a teapot; check the name"):
        locate(NAME, GEMMA_FILE)


def test_a_hub_that_never_answers_is_left(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It accepts and is silent."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(places, "TIMEOUT", 0.2)
        caught: list[Fault] = []

        def ask() -> None:
            with pytest.raises(Fault) as error:
                locate(NAME, GEMMA_FILE)
            caught.append(error.value)

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(60)
    assert [fault.message for fault in caught] == [f"{NAME}: the hub cannot be reached"]


def test_a_silent_hub_is_not_asked_again_for_what_was_downloaded(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Libraries that load a model ask for each file, for half a minute; from a folder they do not ask."""
    snapshot = downloaded(fresh / "hub", f"models/{NAME}", {"config.json": b"{}", "vae/config.json": b"{}"})
    monkeypatch.setattr(places, "get_hf_file_metadata", _no_answer)
    assert source_of_model(NAME, GEMMA_FILE) == str(snapshot)
    assert source_of_model(NAME, VAE_FILE) == str(snapshot)
    with pytest.raises(
        Fault, match=r"other/gemma: the hub cannot be reached; check the network, or the name"
    ):
        source_of_model("other/gemma", GEMMA_FILE)


def _no_answer(url: str, **options: object) -> None:
    raise RuntimeError("no answer")


def test_a_model_offline_loads_from_its_download_and_its_loaders_ask_nobody(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {p.name: p.read_bytes() for p in EMBEDDED_GEMMA.iterdir() if p.is_file()}
    downloaded(fresh / "hub", f"models/{NAME}", files)
    monkeypatch.setattr(places, "get_hf_file_metadata", _no_answer)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    asked: list[object] = []
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: asked.append(address))
    gemma = Gemma(NAME)
    assert (gemma.name, gemma.revision, gemma.num_image_tokens) == (NAME, "f" * 40, 16)
    assert asked == []


def test_a_folder_for_downloads_that_cannot_be_written_to_is_no_fault_of_the_network(
    hub: list[str], fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("theworld.utils.files.os.access", lambda path, mode: False)
    with pytest.raises(
        Fault, match=r"someone/gemma cannot be downloaded: HF_HOME .* is not yours .*HF_HOME=FOLDER"
    ):
        locate(NAME, GEMMA_FILE)


@pytest.mark.parametrize(
    ("token", "says"),
    [
        ("hf_\u200bcanary", "character 4 of 10 is U+200B (ZERO WIDTH SPACE)"),
        ("hf_can ary", "character 7 of 10 is U+0020 (SPACE)"),
        ("hf_can\x07ary", "character 7 of 10 is U+0007 (a control character)"),
        ("\ufeffhf_canary", "character 1 of 10 is U+FEFF (ZERO WIDTH NO-BREAK SPACE)"),
    ],
)
def test_a_token_with_a_hidden_character_is_refused_before_it_is_sent_and_never_shown(
    token: str, says: str, hub: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(Fault) as caught:
        locate(NAME, GEMMA_FILE)
    assert says in str(caught.value)
    assert "ary" not in str(caught.value)
    assert hub == []


def test_a_token_with_the_end_of_its_line_is_taken(hub: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_canary\r\n")
    assert locate(NAME, GEMMA_FILE).words == "on the hub, access granted"


# ---- statements


def test_statements_at_hand_of_a_folder_equal_those_of_a_run(annotations: Path) -> None:
    splits = statements_at_hand(str(annotations), "vsr")
    assert splits is not None
    assert {split: len(own) for split, own in splits.items()} == {"train": 6, "dev": 1, "test": 4}
    with pytest.raises(FileNotFoundError, match="no file or folder nowhere"):
        statements_at_hand("nowhere", "vsr")


def test_statements_of_the_hub_count_once_they_were_downloaded(
    hub: list[str], fresh: Path, annotations: Path
) -> None:
    assert statements_at_hand(None, "vsr") is None
    asked = [f"HEAD {DATA}/resolve/main/train.jsonl"]
    assert [request for request in hub if DATA in request] == asked
    files = {
        f"{split}.jsonl": (annotations / f"{split}.jsonl").read_bytes() for split in ("train", "dev", "test")
    }
    downloaded(fresh / "hub", DATA, files)
    splits = statements_at_hand(None, "vsr")
    assert splits == {split: load_statements(annotations, split) for split in ("train", "dev", "test")}
    assert [request for request in hub if DATA in request] == asked


def test_statements_that_cannot_be_had_are_a_fault(hub: list[str]) -> None:
    with pytest.raises(
        Fault, match=r"cambridgeltl/vsr_zeroshot: .*; check the network; or give --annotations"
    ):
        statements_at_hand(None, "vsr_zeroshot")


# ---- photographs and room


def test_only_files_count_as_photographs(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"")
    (tmp_path / "b.jpg").mkdir()
    assert list(missing_photographs(["a.jpg", "b.jpg", "c.jpg"], tmp_path)) == ["b.jpg", "c.jpg"]


def test_the_existing_parent_is_found_and_a_file_in_the_way_named(tmp_path: Path) -> None:
    assert nearest_folder(tmp_path / "x" / "y" / "z") == tmp_path
    (tmp_path / "x").write_text("")
    with pytest.raises(NotADirectoryError, match=r"x is a file, and a folder is wanted there"):
        nearest_folder(tmp_path / "x" / "y")
    with pytest.raises(NotADirectoryError):
        check_folder(tmp_path / "x", "--cache")


def test_room_is_counted_on_the_disk_of_a_folder_that_does_not_exist_yet(tmp_path: Path) -> None:
    free = check_room(tmp_path / "new" / "cache", 1, "--cache")
    assert free > 1
    with pytest.raises(
        ValueError, match=r"cache: 1,[0-9,]+ bytes are needed and .* make room or move --cache"
    ):
        check_room(tmp_path / "new" / "cache", 10**18, "--cache")


def test_an_existing_output_is_announced_as_replaced(tmp_path: Path) -> None:
    assert check_output(tmp_path / "new" / "a.jsonl") == ""
    (tmp_path / "a.jsonl").write_text(json.dumps({}))
    assert check_output(tmp_path / "a.jsonl") == " (replaces the one there)"
    with pytest.raises(
        IsADirectoryError, match=r"--output .* is a folder, and a file is wanted; name one in it"
    ):
        check_output(tmp_path)

"""An audit tells a cache of the right numbers from one of wrong ones, whatever their hashes say."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from theworld.config.config import Config
from theworld.data.images import ImageError
from theworld.extraction.audit import TOLERANCE, audit, audit_store
from theworld.extraction.extract import extract, source_of
from theworld.store.format import LATENTS, VISION, StoreMismatch
from theworld.store.writer import Store
from theworld.utils.distributed import Part
from theworld.utils.files import StoreError


def audits(config: Config, cache: Path, num_images: int = 9) -> list:
    source = source_of(config, Part())
    names = [name for name in (LATENTS, VISION) if (cache / name).exists()]
    return [audit_store(cache / name, config, source, num_images) for name in names]


@pytest.mark.parametrize("storage", [None, "float16", "bfloat16"])
@pytest.mark.torture("cache", "--audit: right numbers within the tolerance")
def test_a_right_cache_is_within_the_tolerance(config: Config, tmp_path: Path, storage: str | None) -> None:
    config = replace(config, latent_dtype=storage)
    extract(config, tmp_path, with_vision=True, allow_missing=False)
    latents, vision = audits(config, tmp_path)
    assert (latents.num_images, latents.of, latents.image in ("a.png", "b.png", "c.png")) == (3, 3, True)
    assert latents.tolerance == TOLERANCE[storage or "float32"]
    # Rounding once, at most half a unit in the last of 24, 11 or 8 bits; and batches of another size.
    assert latents.distance < {None: 1e-5, "float16": 2.0**-11, "bfloat16": 2.0**-8}[storage]
    assert vision.distance < 1e-5
    assert latents.holds
    assert vision.holds
    assert (latents.largest > 0) is (storage is not None) or latents.largest < 1e-4


@pytest.mark.torture("cache", "--audit: right numbers within the tolerance")
def test_what_was_computed_in_bfloat16_is_within_its_tolerance(config: Config, tmp_path: Path) -> None:
    extract(replace(config, dtype="bfloat16"), tmp_path, with_vision=True, allow_missing=False)
    for one in audits(config, tmp_path):
        assert one.tolerance == TOLERANCE["bfloat16"]
        assert 1e-3 < one.distance < one.tolerance


@pytest.mark.parametrize("wrong", ["another photograph's row", "a tenth of it", "another scale"])
@pytest.mark.torture("cache", "--audit: wrong numbers under right hashes found")
def test_wrong_numbers_under_right_hashes_are_found(
    config: Config,
    tmp_path: Path,
    wrong: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write = Store.write_shard

    def other(self: Store, shard: int, arrays: dict[str, np.ndarray]) -> None:
        values = arrays[LATENTS].copy()
        if wrong == "another photograph's row":
            values = values[::-1].copy()
        elif wrong == "a tenth of it":
            values[0].reshape(-1)[: values[0].size // 10] = 0
        else:
            values[-1] *= 1.01
        write(self, shard, {LATENTS: values})

    monkeypatch.setattr(Store, "write_shard", other)
    extract(config, tmp_path, with_vision=False, allow_missing=False)
    (found,) = audit(config, tmp_path, 3)
    assert not found.holds
    assert "3 of 3 images encoded again in float32: largest difference " in str(found)
    assert str(found).endswith("tolerance 5e-03 of the norm: BEYOND IT")


def test_an_audit_of_other_models_settings_or_photographs_is_refused(config: Config, tmp_path: Path) -> None:
    cache, folder = tmp_path / "cache", tmp_path / "photographs"
    shutil.copytree(str(config.image_folder), folder)
    config = replace(config, image_folder=str(folder))
    with pytest.raises(StoreError, match="no store in it"):
        audit(config, cache, 1)
    extract(config, cache, with_vision=False, allow_missing=False)
    with pytest.raises(StoreMismatch, match="latent_size: cached 64, wanted 80"):
        audit(replace(config, latent_size=80), cache, 1)
    with pytest.raises(ValueError, match="--audit 0: give 1 or more"):
        audit(config, cache, 0)
    shutil.copy(folder / "a.png", folder / "b.png")
    with pytest.raises(ImageError, match=r"b\.png: changed"):
        audit(config, cache, 3)

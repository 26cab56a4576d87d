"""Mean and deviation of each channel of the training images' rows."""

from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch

from theworld.extraction.features import WorldRows, to_numpy
from theworld.extraction.statistics import channel_statistics, measured_on
from theworld.models.encoder import EncoderSpec, Use
from theworld.store.shard import ArraySpec, ImageEntry
from theworld.store.writer import Store


def store(root: Path, values: torch.Tensor, hashes: list[str] | None = None, **taken: object) -> WorldRows:
    """A finished store of these rows, one for each different hash, of images 0, 1, 2 and so on."""
    hashes = hashes or [f"{number:064x}" for number in range(len(values))]
    images = [ImageEntry(str(number), digest) for number, digest in enumerate(hashes)]
    spec = ArraySpec("rows", tuple(values.shape[1:]), str(values.dtype).removeprefix("torch."))
    fields = {"latent_shape": list(values.shape[1:])}
    one = Store.create(root, fields, images, [spec], 4)
    for shard in one.pending():
        chosen = [int(row.path) for row in one.shard_rows(shard)]
        one.write_shard(shard, {"rows": to_numpy(values[chosen])})
    one.publish()
    use = Use(taken)
    return WorldRows(root, EncoderSpec("rows", spec.shape, spec.dtype, None, fields, use=use), compare=False)


@pytest.mark.parametrize("shape", [(3, 4, 5), (7, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_statistics_are_numpys_in_float64(tmp_path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    values = (100 + torch.randn(40, *shape, generator=torch.Generator().manual_seed(0))).to(dtype)
    rows, names = store(tmp_path / "rows", values), [str(number) for number in range(33)]  # three batches
    exact = values[:33].double().numpy()
    axes = (0, 2, 3) if len(shape) == 3 else (0, 1)
    mean, std = channel_statistics(rows, names)
    assert mean.dtype == std.dtype == np.float64
    assert mean.tolist() == pytest.approx(exact.mean(axes).tolist(), rel=1e-14)
    assert std.tolist() == pytest.approx(exact.std(axes).tolist(), rel=1e-12)


def test_statistics_of_predicted_frames_are_of_all_frames(tmp_path: Path) -> None:
    values = torch.randn(4, 2, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    rows = store(tmp_path / "rows", values, latent_shape=[3, 2, 2])
    mean, std = channel_statistics(rows, ["0", "1", "2", "3"])
    exact = values.double().numpy()
    assert mean.tolist() == pytest.approx(exact.mean((0, 1, 3, 4)).tolist(), rel=1e-13)
    assert std.tolist() == pytest.approx(exact.std((0, 1, 3, 4)).tolist(), rel=1e-13)


def test_images_of_equal_bytes_count_once_and_the_order_makes_no_difference(tmp_path: Path) -> None:
    values = torch.tensor([[[[1.0]]], [[[3.0]]], [[[99.0]]], [[[1.0]]]])  # the last has the row of the first
    a, b, c = ("a" * 64, "b" * 64, "c" * 64)
    rows = store(tmp_path / "rows", values, [a, b, c, a])
    found = measured_on(rows, ["3", "1", "0"])
    assert (found["latents_mean"], found["latents_std"]) == ([2.0], [1.0])
    assert found == measured_on(rows, ["1", "0"]) == measured_on(rows, ["0", "1", "3"])
    assert found["standardized_on"] == sha256(f"{a}\n{b}\n".encode()).hexdigest()
    assert measured_on(rows, ["0", "2"])["standardized_on"] != found["standardized_on"]


def test_threads_make_no_difference(tmp_path: Path) -> None:
    values = torch.randn(8, 2, 64, 64, generator=torch.Generator().manual_seed(0))
    rows, names = store(tmp_path / "rows", values), [str(number) for number in range(8)]
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(measured_on(rows, names))
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1]


def test_a_channel_without_a_deviation_is_named(tmp_path: Path) -> None:
    values = torch.randn(3, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    values[:, 1] = 4.0
    rows = store(tmp_path / "rows", values)
    with pytest.raises(
        ValueError, match=r"rows: channel 1 has a standard deviation of 0.0 over the 3 training"
    ):
        measured_on(rows, ["0", "1", "2"])

"""What is prepared in a worker and what the encoder makes of it."""

from pathlib import Path

import numpy as np
import torch
from conftest import EMBEDDED_VAE

from theworld.cache import latent_pixels
from theworld.encodings import LatentEncoding, VisionEncoding
from theworld.gemma import Gemma
from theworld.images import read_image, sha256, square
from theworld.reading import Batches, Source, in_processes
from theworld.store import ImageEntry
from theworld.vae import CosmosEncoder


def test_latents_of_bytes_are_those_of_pixels_in_the_unit_range(photographs: Path) -> None:
    encoder = CosmosEncoder(str(EMBEDDED_VAE))
    encoding = LatentEncoding(encoder, 64, None)
    pixels = read_image(photographs, "a.png")
    prepared = encoding.prepare(pixels)
    assert prepared.dtype == torch.uint8
    assert np.array_equal(prepared.numpy(), square(pixels, 64))
    assert torch.equal(encoding.encode(prepared[None]), encoder.encode(latent_pixels(pixels, 64)[None]))
    half = LatentEncoding(encoder, 64, "float16").encode(prepared[None])
    assert torch.equal(half, encoding.encode(prepared[None]).half())


def test_a_compiled_encoder_is_part_of_the_fingerprint() -> None:
    encoder = CosmosEncoder(str(EMBEDDED_VAE))
    plain = LatentEncoding(encoder, 64, None).fingerprint()
    encoder.compiled = True
    assert LatentEncoding(encoder, 64, None).fingerprint() == plain | {"compiled": True}


def test_gemmas_image_processor_works_in_another_process(gemma: Gemma, photographs: Path) -> None:
    encoding = VisionEncoding(gemma)
    row = ImageEntry("a.png", sha256((photographs / "a.png").read_bytes()))
    with in_processes(Batches([[row]], Source(photographs, 10**6, 1), encoding.prepare, 1), 1) as items:
        (batch,) = items
    wanted = gemma.pixel_values([read_image(photographs, "a.png")])
    assert torch.equal(batch.pixels, wanted)
    assert torch.equal(encoding.encode(batch.pixels), gemma.vision_features(wanted))

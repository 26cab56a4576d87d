"""A cache of random numbers: for measuring what only reads one."""

from pathlib import Path

import torch

from theworld.cache import to_numpy
from theworld.config import Config
from theworld.encodings import LatentEncoding, VisionEncoding
from theworld.extract import list_images, open_store
from theworld.gemma import Gemma
from theworld.reading import Source
from theworld.vae import CosmosEncoder
from theworld.weights import torch_dtype


def write_random_cache(config: Config, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
    """Finished stores of latents and vision features as extraction would leave them, but for their values."""
    source = Source(Path(str(config.image_folder)), config.max_image_pixels, 1)
    images = list_images(config, folder, source, allow_missing=False)
    encoder = CosmosEncoder(config.cosmos_model_name, dtype, device)
    gemma = Gemma(config.model_name, dtype, device)
    generator = torch.Generator().manual_seed(0)
    for encoding in (
        LatentEncoding(encoder, config.latent_size, config.latent_dtype),
        VisionEncoding(gemma),
    ):
        store = open_store(folder, encoding, images, config.shard_size, config.encode_batch_size)
        (spec,) = encoding.arrays
        for shard in store.pending():
            shape = (len(store.shard_rows(shard)), *spec.shape)
            values = torch.randn(shape, generator=generator).to(torch_dtype(spec.dtype))
            store.write_shard(shard, {spec.name: to_numpy(values)})
        store.publish()

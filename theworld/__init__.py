"""World tokens for a frozen Gemma 3: latents of a frozen Cosmos VAE through a small trained projection."""

__version__ = "0.1.0"

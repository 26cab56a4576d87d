"""Paths and texts that many tests use."""

from pathlib import Path

ROOT = Path(__file__).parent.parent
EMBEDDED_GEMMA = ROOT / "theworld" / "embedded" / "gemma"
EMBEDDED_VAE = ROOT / "theworld" / "embedded" / "vae"
GIB = 2**30
QUESTION = "Statement: {caption}\nAnswer (only '0' or '1'):"

CAPTIONS = [
    ("a.png", "The red ball is left of the blue ball.", 1, "left of"),
    ("a.png", "The cat is beneath the old wooden table.", 0, "beneath"),
    ("b.png", "The dog is at the right side of the bicycle.", 1, "at the right side of"),
    ("c.png", "The cup is on the book.", 1, "on"),
    ("c.png", "The book is on the cup.", 0, "on"),
    ("c.png", "The person is far away from the traffic light.", 1, "far away from"),
]

"""Visual Spatial Reasoning (Liu, Emerson, Collier, TACL 2023): is a statement about a photograph true?

The data set on the hub has no photographs. They are COCO's of 2017, looked for by name in the folder that the
environment variable VSR_IMAGES names (default: images), and in train2017 and val2017 below it.
"""

import ast
import os
import re
from pathlib import Path

from PIL import Image, ImageFile

_PLACES = ("", "train2017", "val2017")
_TRUE, _FALSE = {"1", "true", "yes"}, {"0", "false", "no"}


def vsr_doc_to_visual(doc):
    folder = Path(os.environ.get("VSR_IMAGES", "images"))
    for place in _PLACES:
        path = folder / place / doc["image"]
        if path.is_file():
            return [_whole(path)]
    raise FileNotFoundError(
        f"{folder}: no {doc['image']} in it; export VSR_IMAGES=FOLDER, with COCO's photographs of 2017"
    )


def _whole(path):
    """Return a photograph. Raises OSError for half a file, whatever other tasks have told Pillow to accept."""
    lenient, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = lenient


def vsr_doc_to_text(doc, lmms_eval_specific_kwargs=None):
    words = lmms_eval_specific_kwargs or {}
    return f"{words.get('pre_prompt', '')}{doc['caption'].strip()}{words.get('post_prompt', '')}"


def vsr_answer(text):
    """Return 1 or 0 for the first word that says true or false, None if there is none."""
    for word in re.findall(r"\w+", text.lower()):
        if word in _TRUE | _FALSE:
            return int(word in _TRUE)
    return None


def vsr_process_results(doc, results):
    """Return whether the answer is right, and whether there was one.

    `results`: one text or, by likelihood, (loss, is greedy) of "0" and of "1", of which the smaller loss counts. Some
    releases of the harness hand on pairs as text.
    """
    if len(results) == 1:
        said = vsr_answer(results[0])
    else:
        zero, one = (ast.literal_eval(pair)[0] if isinstance(pair, str) else pair[0] for pair in results)
        said = int(one < zero)
    return {"vsr_acc": float(said == doc["label"]), "vsr_answered": float(said is not None)}

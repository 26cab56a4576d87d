"""TheWorld in VLMEvalKit: `register` adds checkpoints to its models, and `run.py` then takes them as any other.

VLMEvalKit has no entry points for models, so a script of three lines does it (GUIDE.md, "In other harnesses").
"""

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

from vlmeval.vlm.base import BaseModel

from theworld.harnesses.answers import Answers, Asked

# A question of its data set VSR-zeroshot: a statement, then how to answer.
_STATEMENT = re.compile(r"(?P<statement>.+?)(?:\s+Please answer[^.]*\.)+", re.DOTALL)


class TheWorldModel(BaseModel):
    """A checkpoint as VLMEvalKit asks it.

    Of VSR (data sets whose names begin with VSR) the statement is asked as the checkpoint was trained, and the likelier
    of '0' and '1' is said as No or Yes, as in an evaluation by `tools/eval.py`. All else is answered in words.
    """

    INSTALL_REQ = False
    INTERLEAVE = False
    allowed_types = ("text", "image")

    def __init__(self, model_path: str, max_new_tokens: int = 512, **options: Any) -> None:
        """`model_path`: a checkpoint, a run of which the newest one is taken, or user/name. `options` are those of
        `Answers`: device, dtype, enable_world, and settings such as cosmos_model_name."""
        super().__init__()
        self.answers = Answers(model_path, **options)
        self.max_new_tokens = max_new_tokens

    def generate_inner(self, message: list[dict[str, str]], dataset: str | None = None) -> str:
        """Return the answer to a message, whose parts are {"type": "image" or "text", "value": ...}.

        Raises ValueError for a question of VSR without a statement in the form of the data set.
        """
        images = tuple(part["value"] for part in message if part["type"] == "image")
        text = "\n".join(part["value"] for part in message if part["type"] == "text")
        if (dataset or "").upper().startswith("VSR"):
            found = _STATEMENT.fullmatch(text.strip())
            if found is None:
                raise ValueError(
                    f"{dataset}: question {text!r}; wanted a statement and 'Please answer yes or no.' behind it"
                )
            asked = Asked(images, self.answers.statement(found["statement"]))
            return "Yes" if self.answers.is_true([asked])[0] else "No"
        return self.answers.generate([Asked(images, text)], max_new_tokens=self.max_new_tokens)[0]


def register(checkpoints: Mapping[str, str], **options: Any) -> None:
    """Add checkpoints to the models of VLMEvalKit, by the name that its `--model` takes. `options` are those of
    `TheWorldModel`."""
    from vlmeval.config import supported_VLM

    for name, checkpoint in checkpoints.items():
        supported_VLM[name] = partial(TheWorldModel, checkpoint, **options)

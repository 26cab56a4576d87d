"""Declare settings: the type, help text and rules of a field, and the check of a value against them."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import re
import sys
import types
import typing
from collections.abc import Sequence
from typing import Any

from theworld.utils.text import flaw

WANTED = {bool: "true or false", int: "an integer", float: "a finite number", str: "a string"}


def setting(default: Any, help: str, *, defines_run: bool, **rules: Any) -> Any:
    """Return a dataclass field with a help text and rules.

    `defines_run`: whether another value changes what a run learns, so that a run that is resumed keeps its own. It is
    false for the place of something whose content is compared instead, such as the statements.
    Rules: `at_least`, `above` and `below` bound a number; `filled` refuses an empty string; `path` (a local path, or a
    hub name) is `filled` and expands a leading `~`. The choices of a setting are the `Literal` of its annotation.
    """
    return dataclasses.field(default=default, metadata={"help": help, "defines_run": defines_run, **rules})


@dataclasses.dataclass(frozen=True)
class Setting:
    """A field of a settings class: its plain type (bool, int, float or str), choices, default, help text and rules."""

    name: str
    kind: type
    optional: bool  # null is allowed
    choices: tuple[str, ...]  # empty: any value of the type
    default: Any
    help: str
    defines_run: bool  # see `setting`
    rules: dict[str, Any]

    @property
    def allowed(self) -> str:
        """The values that the setting takes, in words."""
        words = ", ".join(self.choices) if self.choices else WANTED[self.kind]
        for rule, phrase in (("at_least", "of at least"), ("above", "above"), ("below", "below")):
            if rule in self.rules:
                words += f" {phrase} {self.rules[rule]}"
        if self.filled:
            words += " that is not empty"
        return words + (", or null" if self.optional else "")

    @property
    def filled(self) -> bool:
        """Whether an empty string is refused."""
        return bool(self.rules.get("filled") or self.rules.get("path"))

    def parse(self, text: str) -> Any:
        """Return the value that a text on a command line stands for: "none" and "null" are None where null is allowed.

        Raises ValueError naming the text and the type, or as `expand_user` does.
        """
        if self.optional and text.lower() in ("none", "null"):
            return None
        if self.rules.get("path"):
            return expand_user(text)
        try:
            return {"true": True, "false": False}[text] if self.kind is bool else self.kind(text)
        except (ValueError, KeyError):
            raise ValueError(f"{text!r} is not {WANTED[self.kind]}") from None

    def check(self, value: Any) -> Any:
        """Return `value` in the setting's type: an integer becomes a float, and `~` a home folder, where one is wanted.

        Raises Refused for a value that is not allowed.
        """
        error = refused(self.name, value, self.allowed)
        if value is None and self.optional:
            return None
        if isinstance(value, bool) and self.kind is not bool:  # bool is a subclass of int
            raise error
        accepted: Any = (int, float) if self.kind is float else self.kind
        if not isinstance(value, accepted):
            raise error
        if self.kind is float:
            largest = sys.float_info.max
            if not -largest <= value <= largest:  # NaN, infinity, an integer beyond floats
                raise error
            value = float(value)
        if self.kind is str and (found := flaw(value)):
            raise refused(self.name, value, f"{self.allowed}; this holds {found}")
        if self.filled and not value.strip():
            raise error
        if self.choices and value not in self.choices:
            nearest = nearest_name(value, self.choices)
            raise refused(self.name, value, f"{self.allowed} (nearest: {nearest})")
        rules = self.rules
        too_low = value < rules.get("at_least", value) or ("above" in rules and value <= rules["above"])
        if too_low or ("below" in rules and value >= rules["below"]):
            raise error
        if rules.get("path"):
            try:
                return expand_user(value)
            except ValueError as reason:
                raise refused(self.name, value, f"{self.allowed}; {reason}") from None
        return value


def settings_of(cls: Any) -> dict[str, Setting]:
    """Return the settings that a dataclass declares, by name, in its order."""
    hints = typing.get_type_hints(cls)
    found = {}
    for field in dataclasses.fields(cls):
        rules = dict(field.metadata)
        kind, optional, choices = _resolve(hints[field.name])
        own = rules.pop("help"), rules.pop("defines_run"), rules
        found[field.name] = Setting(field.name, kind, optional, choices, field.default, *own)
    return found


def _resolve(hint: Any) -> tuple[type, bool, tuple[str, ...]]:
    """Return the plain type of an annotation, whether it allows None, and the values of its Literal."""
    optional = typing.get_origin(hint) in (types.UnionType, typing.Union)
    if optional:
        (hint,) = (part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is typing.Literal:
        return str, optional, typing.get_args(hint)
    return hint, optional, ()


class Refused(ValueError):
    """A refused setting. `key` tells `load_config` whether the file or an override gave it."""

    key: str = ""


def refused(key: str, value: object, allowed: str) -> Refused:
    """Return the error for a setting's value that is not allowed."""
    error = Refused(f"{key} is {shown(value)}; allowed: {allowed}")
    error.key = key
    return error


def expand_user(text: str) -> str:
    """Return a path with a leading `~` or `~user` replaced by the home folder.

    Raises ValueError for a user that does not exist: the path would name a folder `~user` in the working folder.
    """
    path = os.path.expanduser(text)
    if path.startswith("~"):
        raise ValueError(f"{text}: no home folder of that user is known; ./{text} names a folder here")
    return path


def shown(value: object) -> str:
    """Return a value as JSON writes it, without tokens, cut to 200 characters."""
    try:
        text = json.dumps(value, default=repr)
    except (TypeError, ValueError):  # an integer of thousands of digits; keys that JSON does not have
        text = f"a value of type {type(value).__name__} that cannot be shown"
    text = without_tokens(text)
    return text if len(text) <= 200 else text[:197] + "..."


def without_tokens(text: str) -> str:
    """Return a text with access tokens replaced by ***, so that a misplaced token is refused and never repeated.

    Replaced are hub tokens by their form, the tokens that the environment holds, and the value of a flag whose name
    contains token, key, secret or password.
    """
    held = [os.environ.get(name, "") for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY")]
    for secret in filter(None, held):
        text = text.replace(secret, "***")
    text = re.sub(r"\bhf_[A-Za-z0-9]{16,}", "***", text)
    return re.sub(
        r"(--\S*(?:token|key|secret|password)[^\s=]*(?:=|\s+))[^\s;-]\S*", r"\1***", text, flags=re.IGNORECASE
    )


def nearest_name(name: str, names: Sequence[str]) -> str:
    """Return the most similar of `names`, in whatever case."""
    by_lower = {known.lower(): known for known in names}
    return by_lower[difflib.get_close_matches(name.lower(), list(by_lower), n=1, cutoff=0.0)[0]]

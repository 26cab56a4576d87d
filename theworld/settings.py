"""What a setting may hold: a key with its meaning, unit and rules, and the check of a value against them."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

WANTED = {bool: "true or false", int: "an integer", float: "a finite number", str: "a string"}
_TYPES = {kind.__name__: kind for kind in WANTED}


def setting(default: Any, meaning: str, unit: str = "", **rules: Any) -> Any:
    """A field with `help`, `unit` and rules: `choices`, `at_least`, `above`, `below`, `filled`, `built`."""
    return dataclasses.field(default=default, metadata={"help": meaning, "unit": unit, **rules})


class Refused(ValueError):
    """A refused setting; `key` tells load_config whether the file or an override gave it."""

    key: str = ""


def refused(key: str, value: object, allowed: str, note: str = "") -> Refused:
    error = Refused(f"{key} is {shown(value)}{note}; allowed: {allowed}")
    error.key = key
    return error


def shown(value: object) -> str:
    """A value as JSON writes it, cut to 200 characters."""
    try:
        text = json.dumps(value, default=repr)
    except (TypeError, ValueError):  # an integer of thousands of digits, keys that JSON has not
        text = f"a value of type {type(value).__name__} that cannot be shown"
    text = without_tokens(text)
    return text if len(text) <= 200 else text[:197] + "..."


def without_tokens(text: str) -> str:
    """The same without what looks like a token of the hub, is one that the environment holds, or was given to a flag
    whose name says so: a token that stands in a wrong place has to be refused, and not repeated."""
    held = [os.environ.get(name, "") for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY")]
    for secret in filter(None, held):
        text = text.replace(secret, "***")
    text = re.sub(r"\bhf_[A-Za-z0-9]{16,}", "***", text)
    return re.sub(
        r"(--\S*(?:token|key|secret|password)[^\s=]*(?:=|\s+))[^\s;-]\S*", r"\1***", text, flags=re.IGNORECASE
    )


def type_of(field: dataclasses.Field[Any]) -> tuple[type, bool]:
    """The plain type of a key (bool, int, float or str) and whether null is allowed."""
    hint = str(field.type)
    return _TYPES[hint.removesuffix(" | None")], hint.endswith(" | None")


def _allowed(field: dataclasses.Field[Any]) -> str:
    """What a key may hold, in words."""
    kind, optional = type_of(field)
    rules = field.metadata
    words = ", ".join(rules["choices"]) if "choices" in rules else WANTED[kind]
    for rule, phrase in (("at_least", "of at least"), ("above", "above"), ("below", "below")):
        if rule in rules:
            words += f" {phrase} {rules[rule]}"
    if rules.get("filled"):
        words += " that is not empty"
    return words + (", or null" if optional else "")


def checked(field: dataclasses.Field[Any], value: Any) -> Any:
    """`value` in the key's type (an integer becomes a float where one is wanted), or ValueError."""
    rules = field.metadata
    kind, optional = type_of(field)
    error = refused(field.name, value, _allowed(field))
    if value is None and optional:
        return None
    if isinstance(value, bool) and kind is not bool:  # Python takes a bool for an int; a reader does not
        raise error
    accepted: Any = (int, float) if kind is float else kind
    if not isinstance(value, accepted):
        raise error
    if kind is float:
        if not -sys.float_info.max <= value <= sys.float_info.max:  # NaN, infinity, an integer beyond floats
            raise error
        value = float(value)
    if kind is str and (not _is_text(value) or (rules.get("filled") and not value.strip())):
        raise error
    if "choices" in rules and value not in rules["choices"]:
        nearest = nearest_name(value, rules["choices"])
        raise refused(field.name, value, f"{_allowed(field)} (nearest: {nearest})")
    too_low = value < rules.get("at_least", value) or ("above" in rules and value <= rules["above"])
    if too_low or ("below" in rules and value >= rules["below"]):
        raise error
    if "built" in rules and value != rules["built"]:
        raise refused(field.name, value, shown(rules["built"]), ": not built yet")
    return value


def _is_text(value: str) -> bool:
    """Whether a string can be written to a file and used as a path: valid Unicode without NUL."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return "\0" not in value


def nearest_name(name: str, names: Sequence[str]) -> str:
    return difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]

"""Every setting as a command-line flag; what else the tools' command lines share."""

import argparse
import dataclasses
import json
import os
import re
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from theworld.config import FIELDS, RENAMED, Config, load_config
from theworld.settings import WANTED, nearest_name, type_of, without_tokens


class ArgumentParser(argparse.ArgumentParser):
    """argparse's, but no flag may be shortened, an unknown one is answered with the nearest known one, and a shell
    completes flags and choices where argcomplete is installed."""

    def __init__(self, **options: Any) -> None:
        shown: dict[str, Any] = {
            "allow_abbrev": False,
            "formatter_class": argparse.RawDescriptionHelpFormatter,
        }
        super().__init__(**shown | options)

    def parse_args(self, *given: Any, **options: Any) -> Any:
        if "_ARGCOMPLETE" in os.environ:  # a shell asks; nothing may run
            try:
                import argcomplete
            except ImportError:
                sys.exit(1)
            argcomplete.autocomplete(self)
        return super().parse_args(*given, **options)

    def error(self, message: str) -> typing.NoReturn:
        unknown = re.match(r"unrecognized arguments: (--[^\s=]+)", message)
        if unknown:
            flags = [flag for flag in self._option_string_actions if flag.startswith("--")]
            message += f"; the nearest known flag is {nearest_name(unknown[1], flags)}"
        super().error(without_tokens(message))


def add_config_arguments(
    parser: argparse.ArgumentParser, keys: Sequence[str] | None = None, of_checkpoint: bool = False
) -> None:
    """Adds --config and a flag for each key (None: all): --batch_size, and the same as --batch-size.

    What is not given does not stand in the namespace, so the file's value holds. `of_checkpoint`: a checkpoint brings
    its settings along, so there is no --config.
    """
    if not of_checkpoint:
        parser.add_argument("--config", metavar="FILE", help="settings: JSON with comments (default: none)")
    source = "checkpoint's" if of_checkpoint else "file's"
    group = parser.add_argument_group("settings", f"they go before the {source}; none stands for null")
    for key in FIELDS if keys is None else keys:
        kind, optional = type_of(FIELDS[key])
        options: dict[str, Any] = {"dest": key, "default": argparse.SUPPRESS}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            choices = FIELDS[key].metadata.get("choices")
            options["metavar"] = "{" + ",".join(choices) + "}" if choices else kind.__name__.upper()
            options["type"] = _parser_of(kind, optional)
        added = group.add_argument(f"--{key}", **options, help=_help(FIELDS[key]))
        if "choices" in FIELDS[key].metadata:
            allowed = [*FIELDS[key].metadata["choices"], *(["none"] if optional else [])]
            added.completer = _completer(allowed)  # type: ignore[attr-defined]  # argcomplete looks for it
        # Other spellings work, but would make --help twice as long.
        names = [key, *(name for name, ours in RENAMED.items() if ours == key)]
        others = {f"--{name}" for own in names for name in (own, own.replace("_", "-"))} - {f"--{key}"}
        if others:
            group.add_argument(*sorted(others), **options, help=argparse.SUPPRESS)


def add_dry_run(parser: argparse.ArgumentParser) -> None:
    """Adds --dry_run; `theworld.console.rehearse` prints what it says."""
    text = "only check, say what would be done and write nothing; exit status 0: the run could start"
    parser.add_argument("--dry_run", action="store_true", help=text)
    parser.add_argument("--dry-run", action="store_true", dest="dry_run", help=argparse.SUPPRESS)


def _completer(allowed: Sequence[str]) -> typing.Callable[..., list[str]]:
    def complete(prefix: str, **_: Any) -> list[str]:
        return [choice for choice in allowed if choice.startswith(prefix)]

    return complete


def _help(field: dataclasses.Field[Any]) -> str:
    """Meaning, unit and default of a key, as argparse wants it."""
    default = "none" if field.default is None else field.default
    if isinstance(default, bool) or "\n" in str(default):
        default = json.dumps(default)
    unit = field.metadata["unit"]
    text = f"{field.metadata['help']} ({unit + '; ' if unit else ''}default: {default})"
    return text.replace("%", "%%")


def _parser_of(kind: type, optional: bool) -> typing.Callable[[str], Any]:
    def parse(text: str) -> Any:
        if optional and text.lower() in ("none", "null"):
            return None
        try:
            return kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {WANTED[kind]}") from None

    return parse


def config_from_arguments(arguments: argparse.Namespace) -> Config:
    """The settings of `--config` with the flags that were given on top. Raises as `load_config` does."""
    given = {key: value for key, value in vars(arguments).items() if key in FIELDS}
    path = getattr(arguments, "config", None)
    if path is not None and not Path(path).exists():
        raise FileNotFoundError(f"--config {path}: no such file")
    return load_config(path, given)

"""Build the command lines of the tools: a flag for every setting, and the flags that several tools have."""

import argparse
import difflib
import os
import re
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from theworld.config.config import (
    FIELDS,
    GROUPS,
    RENAMED,
    SPLIT_ALIASES,
    SPLITS,
    Config,
    load_config,
    split_name,
)
from theworld.config.fields import Setting, expand_user, nearest_name, without_tokens
from theworld.utils import commands
from theworld.utils.commands import ALIASES


class ArgumentParser(argparse.ArgumentParser):
    """argparse's parser, with the habits that the tools share.

    Wrong usage costs one line, and an unknown flag is answered with the nearest known flag. Flags cannot be shortened;
    `--batch-size` is `--batch_size`. A shell completes flags and choices where argcomplete is installed.
    """

    def __init__(self, **options: Any) -> None:
        defaults: dict[str, Any] = {
            "allow_abbrev": False,
            "formatter_class": argparse.RawDescriptionHelpFormatter,
            "usage": "%(prog)s [FLAG ...]",
        }
        super().__init__(**defaults | options)
        self.color = False  # Python 3.14 colours the help text, from which the known flags are read

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:  # type: ignore[override]  # overloads
        """Return the parsed arguments. Ends the process with status 2 and one line for wrong usage."""
        if "_ARGCOMPLETE" in os.environ:  # a shell asks for completions, and the tool must not run
            try:
                import argcomplete
            except ImportError:
                sys.exit(1)
            argcomplete.autocomplete(self)
        words = list(sys.argv[1:] if args is None else args)
        self._check_flags(words)
        parsed, unknown = self.parse_known_args([_with_underscores(word) for word in words], namespace)
        if unknown:
            self.error(f"unexpected argument {unknown[0]} (--help lists all flags)")
        return parsed

    def _check_flags(self, words: Sequence[str]) -> None:
        """Refuse an unknown flag before argparse does, which would complain about a missing one first."""
        flags = self.flags()
        known = {*flags, *(f"--{old}" for old in RENAMED)}
        for word in words:
            if word == "--":
                return
            flag = _with_underscores(word).partition("=")[0]
            if _FLAG.fullmatch(word) and flag not in known:
                nearest = nearest_flag(flag, flags)
                meant = f"; did you mean {nearest}?" if nearest else ""
                self.error(f"unknown flag {word.partition('=')[0]}{meant} (--help lists all)")

    def flags(self) -> list[str]:
        """Return the flags that `--help` lists."""
        rows = re.findall(r"^ {2}(-.*?)(?: {2}|$)", self.format_help(), re.MULTILINE)
        return [flag for row in rows for flag in re.findall(r"--\w[\w-]*", row)]

    def error(self, message: str) -> typing.NoReturn:
        """Print one line and end the process with status 2."""
        line = " ".join(message.removeprefix("argument ").split())
        self.exit(2, without_tokens(f"{self.prog}: error: {line}\n"))


# Names that other programs have for our flags; the first that a tool has is meant.
OTHER_NAMES = {
    "lr": "learning_rate",
    "epochs num_train_epochs": "num_epochs",
    "steps max_train_steps": "max_steps",
    "per_device_train_batch_size train_batch_size": "batch_size encode_batch_size eval_batch_size",
    "per_device_eval_batch_size": "eval_batch_size",
    "grad_accum gradient_accumulation accumulate_grad_batches": "gradient_accumulation_steps",
    "bf16 fp16 precision mixed_precision": "dtype",
    "gpu cuda device_map": "device",
    "checkpoint ckpt checkpoint_path": "model resume_from",
    "model_name_or_path": "model model_name",
    "wandb use_wandb report_to": "log_to_wandb",
    "limit max_samples": "num_samples",
    "out out_dir save_dir": "output_dir output",
    "output": "output_dir",
    "output_dir": "output",
    "data data_dir dataset_path": "annotations",
    "images images_dir": "image_folder image",
    "prompt question text": "statement question_template",
    "caption": "captions statement",
}
NAMES_MEANT = {other: names.split() for others, names in OTHER_NAMES.items() for other in others.split()}
SIMILAR = 0.6  # difflib's ratio from which a flag is offered


def nearest_flag(flag: str, flags: Sequence[str]) -> str | None:
    """Return the flag of a tool that is meant by an unknown one: what other programs call so; else the shortest that
    begins with it; else the most similar. None if none is similar."""
    given, known = flag.lower().removeprefix("--"), [name.removeprefix("--") for name in flags]
    meant = [name for name in (given, *NAMES_MEANT.get(given, ())) if name in known]
    longer = sorted((name for name in known if name.startswith(given)), key=len)
    nearest = [*meant, *longer, nearest_name(given, known)][0]
    if not (meant or longer) and difflib.SequenceMatcher(None, given, nearest).ratio() < SIMILAR:
        return None
    names = {alias: name for name, alias in ALIASES.items()}
    return f"--{names.get(nearest, nearest)}"


_FLAG = re.compile(r"--\w[\w-]*(=.*)?", re.DOTALL)


def _with_underscores(word: str) -> str:
    """Return a flag as it is registered: with underscores, but for the hyphen after `--no`. Other words stay."""
    if not _FLAG.fullmatch(word):
        return word
    name, equals, value = word.partition("=")
    negation = "--no-" if name.startswith("--no-") else "--"
    return negation + name.removeprefix(negation).replace("-", "_") + equals + value


def path(text: str) -> Path:
    """Return the path that a flag names, with `~` expanded. Raises ArgumentTypeError for the `~` of an unknown user."""
    return Path(expanded(text))


def expanded(text: str) -> str:
    """Return a path or a name on the hub, with `~` expanded. Raises as `path` does."""
    try:
        return expand_user(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_config_arguments(
    parser: argparse.ArgumentParser, keys: Sequence[str] | None = None, source: str = ""
) -> None:
    """Add `--config` and a flag for each of the settings `keys` (None: all), in groups.

    A flag that is not given is not in the namespace, so that the file's value holds. `source`: what has the other
    settings in place of a settings file, such as "the checkpoint"; `--config` is then not added.
    """
    if not source:
        text = "Settings file: JSON, in which comments are allowed. (default: none)"
        parser.add_argument("--config", type=path, metavar="FILE", help=text)
    parser.epilog = (
        f"A setting that is given as a flag overrides the value of {source or 'the settings file'}; the word none "
        "stands for null."
    )
    for title, own in grouped(list(FIELDS) if keys is None else keys).items():
        group = parser.add_argument_group(title)
        for key in own:
            _add_setting(group, FIELDS[key], source)


def grouped(keys: Sequence[str]) -> dict[str, list[str]]:
    """Return settings by the group that `--help` shows them in, both in the order of `Config`."""
    groups: dict[str, list[str]] = {}
    starts = {first: title for title, first in GROUPS.items()}
    title = ""
    for key in FIELDS:
        title = starts.get(key, title)
        if key in keys:
            groups.setdefault(title, []).append(key)
    return groups


def _add_setting(group: Any, declared: Setting, source: str) -> None:
    options: dict[str, Any] = {"default": argparse.SUPPRESS}
    choices = [*declared.choices, *(["none"] if declared.optional else [])] if declared.choices else []
    if declared.kind is bool:
        options["action"] = argparse.BooleanOptionalAction
    else:
        options["type"] = _typed(declared)
        options["metavar"] = "{" + ",".join(choices) + "}" if choices else _metavar(declared)
    names = [declared.name, *([ALIASES[declared.name]] if declared.name in ALIASES else [])]
    added = group.add_argument(
        *(f"--{name}" for name in names), dest=declared.name, help=_help(declared, source), **options
    )
    if choices:
        added.completer = _completer(choices)  # the attribute that argcomplete looks for
    for old, new in RENAMED.items():
        if new == declared.name:  # under its old name, for load_config to rename
            group.add_argument(f"--{old}", **options | {"help": argparse.SUPPRESS})


def _metavar(declared: Setting) -> str:
    if declared.rules.get("path"):
        return "PATH"
    return {int: "INTEGER", float: "NUMBER", str: "TEXT"}[declared.kind]


def _typed(declared: Setting) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            return declared.parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse


def _completer(choices: Sequence[str]) -> Callable[..., list[str]]:
    def complete(prefix: str, **_: Any) -> list[str]:
        return [choice for choice in choices if choice.startswith(prefix)]

    return complete


def _help(declared: Setting, source: str) -> str:
    """Return the help text of a setting with its default, as argparse wants it."""
    default = "none" if declared.default is None else str(declared.default).replace("\n", "\\n")
    if declared.kind is bool and declared.default is not None:
        default = default.lower()
    if source:
        default = f"{source}'s"
    return f"{declared.help} (default: {default})".replace("%", "%%")


def add_cache(parser: argparse.ArgumentParser) -> None:
    """Add `--cache`, the folder cache by default."""
    text = "Cache folder that tools/extract_latents.py makes. (default: cache)"
    parser.add_argument("--cache", type=path, default=Path("cache"), metavar="FOLDER", help=text)


def add_split(parser: argparse.ArgumentParser) -> None:
    """Add `--split`, test by default."""
    text = "Split of the data: train, dev or test; validation is another name of dev. (default: test)"
    added = parser.add_argument(
        "--split", type=_split, default="test", metavar="{" + ",".join(SPLITS) + "}", help=text
    )
    added.completer = _completer(SPLITS)  # type: ignore[attr-defined]  # argcomplete looks for it


def _split(text: str) -> str:
    try:
        return split_name(text)
    except ValueError:
        nearest = nearest_name(text, [*SPLITS, *SPLIT_ALIASES])
        raise argparse.ArgumentTypeError(
            f"{text!r} is none of train, dev (or validation) and test; did you mean {nearest}?"
        ) from None


def add_gemma(parser: argparse.ArgumentParser) -> None:
    """Add `--gemma`, which `checkpoint_overrides` makes the setting `model_name`."""
    text = "Gemma that the model was trained for, where it is now: a name on the hub or a local folder."
    parser.add_argument(
        "--gemma", type=expanded, metavar="NAME", help=f"{text} (default: the one of the checkpoint)"
    )


def checkpoint_overrides(arguments: argparse.Namespace, keys: Sequence[str]) -> dict[str, Any]:
    """Return the settings that were given as flags, to go on top of a checkpoint's: `keys`, and `--gemma`."""
    given = {key: value for key, value in vars(arguments).items() if key in keys}
    return given | ({"model_name": arguments.gemma} if arguments.gemma else {})


def add_dry_run(parser: argparse.ArgumentParser) -> None:
    """Add `--dry_run`; `theworld.utils.console.rehearse` prints the plan."""
    text = (
        "Check everything, say what would be done, and write nothing; exit status 0 if the run could start."
    )
    parser.add_argument("--dry_run", action="store_true", help=text)


def config_from_arguments(arguments: argparse.Namespace, base: Config | None = None) -> Config:
    """Return the settings of `--config` with the given flags on top; the others are those of `base`, by default the
    defaults. Raises as `load_config` does."""
    given = {key: value for key, value in vars(arguments).items() if key in FIELDS or key in RENAMED}
    file = getattr(arguments, "config", None)
    if file is not None and not Path(file).exists():
        raise FileNotFoundError(f"--config {file}: no such file")
    return load_config(file, given, base)


def extraction_command(config: Config, cache: str | Path, *words: object) -> str:
    """Return the command that makes a cache with these settings. FOLDER stands for an image folder that they do not
    name.

    A process that was given --config carries its own flags over; else all settings that are not the defaults are flags.
    """
    unknown = [] if config.image_folder else ["--image_folder", commands.PLACEHOLDER]
    if commands.has_settings_file():
        return commands.following("extract_latents", *unknown, "--cache", cache, *words)
    own = settings_as_flags(config, commands.SETTINGS["extract_latents"])
    return commands.command("extract_latents", *own, *unknown, "--cache", cache, *words)


def settings_as_flags(config: Config, keys: Sequence[str]) -> list[str]:
    """Return the flags that give these settings, without those that have their default value."""
    found = []
    for key in keys:
        value, declared = getattr(config, key), FIELDS[key]
        if value == declared.default:
            continue
        if declared.kind is bool and value is not None:
            found.append(f"--{key}" if value else f"--no-{key}")
        else:
            found += [f"--{key}", "none" if value is None else str(value)]
    return found

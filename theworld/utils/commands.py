"""Command lines to copy. Every command that a message shows is built here, so that it works where it is pasted.

A command names Python and the tool as this process found them, and quotes its paths for a shell. `following` and
`again` start from the command line of this process, if that is a tool's, so that no flag is lost on the way.
"""

import os
import re
import shlex
import shutil
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

# Other names of flags, the same in every tool that has the setting.
ALIASES = {"image_folder": "image_dir", "dataset_name": "dataset"}
# The settings that a tool has flags for; train and sweep have all of them.
SETTINGS = {
    "extract_latents": (
        "world_encoder control_seed cosmos_model_name model_name dataset_name annotations image_folder follow_links "
        "max_image_pixels latent_size latent_dtype encode_batch_size shard_size dtype device compile num_workers "
        "num_world_steps rollout_prompt rollout_frames rollout_steps rollout_guidance rollout_seed"
    ).split(),
    "get_images": ["dataset_name", "annotations", "max_image_pixels", "follow_links"],
    "eval": (
        "cosmos_model_name dataset_name annotations image_folder follow_links num_workers dtype device "
        "max_image_pixels eval_batch_size"
    ).split(),
    "study": (
        "model_name cosmos_model_name dataset_name annotations image_folder follow_links num_samples max_image_pixels "
        "shard_size encode_batch_size num_epochs max_steps batch_size gradient_accumulation_steps learning_rate "
        "save_steps dtype device compile num_workers"
    ).split(),
    "ask": "cosmos_model_name dtype device max_image_pixels".split(),
    "visualize_alignment": (
        "dataset_name annotations image_folder follow_links max_image_pixels dtype device"
    ).split(),
}
TOOLS = (
    *SETTINGS,
    "train",
    "sweep",
    "doctor",
    "get_benchmark",
    "report",
    "demo",
    "bench",
    "make_control_vae",
    "make_demo_models",
    "make_text_model",
    "draw_scenes",
    "study_errors",
)
# Flags beside settings that the next tool has too, and takes over.
SHARED = {
    "extract_latents": ("config", "cache"),
    "get_images": ("config",),
    "eval": ("model", "cache", "gemma"),
    "train": ("config", "cache"),
}
# Flags of extraction that are no settings, so that training does not have them.
OF_EXTRACTION = ("gemma_vision", "allow_missing", "part", "verify", "audit")
PLACEHOLDER = "FOLDER"  # for a folder that only the user knows

_FLAG = re.compile(r"--(?:no-)?(\w[\w-]*)(?:=.*)?", re.DOTALL)
_FOLDER = Path(__file__).parents[2] / "tools"


def command(tool: str, *words: object) -> str:
    """Return the command line of a tool with these words after its name, quoted for a shell."""
    return shlex.join([_python(), str(_place(tool)), *map(str, words)])


def following(tool: str, *words: object) -> str:
    """Return the command line of the tool that is to run after, or before, this process.

    Flags that were given to this process and that the tool has too are carried over, unless `words` has them.
    """
    own = {name for name, _ in _flags(list(map(str, words)))}
    return command(tool, *_carried(tool, own), *words)


def again(*words: object, without: Collection[str] = ()) -> str:
    """Return the command line of this process, with `words` in place of its own values of the same flags, and without
    the flags named in `without`."""
    changed = {name for name, _ in _flags(list(map(str, words)))} | set(without)
    kept = [word for name, group in _flags(sys.argv[1:]) if name not in changed for word in group]
    return command(Path(sys.argv[0]).stem, *kept, *words)


def extraction(cache: Path, *words: object) -> str:
    """Return the command that makes or mends a cache, as far as this process was told how: FOLDER and FILE stand for
    what only the user knows."""
    told = has_settings_file() or was_given("image_folder")
    unknown = [] if told else ["--config", "FILE", "--image_folder", PLACEHOLDER]
    return following("extract_latents", *unknown, "--cache", cache, *words)


def was_given(name: str) -> bool:
    """Return whether this process is a tool that was given the flag of this name."""
    return name in {flag for flag, _ in _flags(_own())}


def has_settings_file() -> bool:
    """Return whether this process was given a settings file; the --config of a study is another one."""
    return was_given("config") and Path(sys.argv[0]).stem != "study"


def value_of(name: str) -> str:
    """Return the words after a flag on the command line of this process; "" if it is no tool, or was not given it."""
    words = [word for flag, group in _flags(_own()) if flag == name for word in group]
    return words[0].partition("=")[2] if words and "=" in words[0] else " ".join(words[1:])


def flag_of(path: Path) -> str:
    """Return the flag of this process that names a path or a folder above it; "" for none."""
    for name, _ in _flags(_own()):
        given = value_of(name) if name else ""
        if given and path.absolute().is_relative_to(Path(given).expanduser().absolute()):
            return f"--{name}"
    return ""


def is_tool() -> bool:
    """Return whether this process is one of the project's tools, so that `again` can repeat it."""
    return Path(sys.argv[0]).suffix == ".py" and Path(sys.argv[0]).stem in TOOLS


def flags(*words: object) -> str:
    """Return flags to add to a command, quoted for a shell."""
    return shlex.join(map(str, words))


def _own() -> list[str]:
    """Return the arguments of this process if it is one of the project's tools."""
    return sys.argv[1:] if is_tool() else []


def _carried(tool: str, own: Collection[str]) -> list[str]:
    before = Path(sys.argv[0]).stem

    def is_shared(name: str) -> bool:
        if name == "config" and not has_settings_file():
            return False
        if tool == "train" and before == "extract_latents":
            return name not in OF_EXTRACTION
        return name in SHARED.get(tool, ()) or name in SETTINGS.get(tool, ())

    return [word for name, group in _flags(_own()) if is_shared(name) and name not in own for word in group]


def _flags(words: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Return the flags of a command line by the names of their settings, each with its own words. Words before the
    first flag have the name ""."""
    names = {alias: name for name, alias in ALIASES.items()}
    found: list[tuple[str, list[str]]] = []
    for word in words:
        flag = _FLAG.fullmatch(word)
        if flag is not None:
            name = flag[1].replace("-", "_")
            found.append((names.get(name, name), [word]))
        elif found:
            found[-1][1].append(word)
        else:
            found.append(("", [word]))
    return found


def _place(tool: str) -> Path:
    """Return the path of a tool from the working folder: beside the tool that runs, or in the project's folder."""
    for folder in (Path(sys.argv[0]).parent, _FOLDER):
        if (folder / f"{tool}.py").is_file():
            return _shown(folder / f"{tool}.py")
    return Path("tools") / f"{tool}.py"


def _python() -> str:
    """Return `python` where a shell finds the interpreter of this process under that name, else its path."""
    found = shutil.which("python")
    if found is not None and Path(found).parent == Path(sys.executable).parent:
        return "python"
    return str(_shown(Path(sys.executable)))


def _shown(path: Path) -> Path:
    """Return a path relative to the working folder if it is in there, else the whole path."""
    path = Path(os.path.abspath(path))
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path

"""What a study compares, fixed in one file before anything runs.

    {
      "settings": "vsr_training.json",          // the recipe of all arms: a settings file beside this one, or an object
      "arms": {
        "world": {},                            // each arm: the settings in which it differs
        "prompt": {"world_encoder": "none", "rules_out": "that training alone did it"}
      },
      "primary": {"arm": "world", "against": ["prompt"], "margin": 1.0},
      "seeds": [0, 1, 2, 3, 4],
      "train_shares": [0.1, 0.3, 1]           // a learning curve: each arm on these shares of the training statements
    }

Without `primary` a study explores: it compares every two arms, or each with the arm that "baseline" names, and gives no
verdict. `"caution"`, a sentence, stands beside every verdict: what a reader must not take the study for.

The content is recorded in the study's folder before the first run starts (`protocol.json`), and a later start that
says something else is refused: what was fixed before the results were known stays fixed.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from theworld.config.config import FIELDS, Config, config_from, load_config, unknown_key
from theworld.config.fields import nearest_name
from theworld.evaluation.conditions import CONDITIONS
from theworld.training.sweep import OWN, QUIET
from theworld.utils.files import check_keys, make_folder, publish_bytes
from theworld.utils.jsonc import is_comment, read_json_with_comments
from theworld.utils.text import is_text

PROTOCOL = "protocol.json"
FORMAT = 1  # of protocol.json
# its fields, beside `primary`
KINDS: dict[str, type] = {
    "format": int,
    "settings": dict,
    "arms": dict,
    "rules_out": dict,
    "seeds": list,
}
# left out where a study has none
OPTIONAL: dict[str, type] = {
    "baseline": str,
    "train_shares": list,
    "caution": str,
}
KEYS = ("settings", "arms", "primary", "baseline", "seeds", "train_shares", "caution")  # of the file
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,60}", re.ASCII)


@dataclass(frozen=True)
class Arm:
    """One of the ways of training that are compared."""

    name: str
    changes: Mapping[str, Any]  # settings in which it differs from the recipe of all arms
    rules_out: str = ""  # what a difference to this arm rules out, in words


@dataclass(frozen=True)
class Primary:
    """The comparison that decides, fixed before the run: `arm` has to beat each of `against` on the test split."""

    arm: str
    against: Sequence[str]
    margin: float = 1.0  # percentage points within which two arms count as equal
    alpha: float = 0.05  # two-sided


@dataclass(frozen=True)
class Study:
    """Arms, seeds and the comparison that decides."""

    base: Config  # the recipe of all arms
    arms: Sequence[Arm]
    primary: Primary | None  # None: a study that explores, without a verdict
    seeds: Sequence[int]
    # Of the training statements, for a learning curve: each arm is trained on each of them, 1 among them.
    train_shares: Sequence[float] = (1.0,)
    # Of a study that explores: the arm that the others are compared with; None: every two.
    baseline: str | None = None
    caution: str = ""  # beside every verdict

    def protocol(self) -> dict[str, Any]:
        """Return what is fixed before the run, as plain JSON types."""
        primary = self.primary and {**vars(self.primary), "against": list(self.primary.against)}
        shares = {"train_shares": list(self.train_shares)} if len(self.train_shares) > 1 else {}
        baseline = {"baseline": self.baseline} if self.baseline else {}
        caution = {"caution": self.caution} if self.caution else {}
        return {
            "format": FORMAT,
            "settings": {
                k: v for k, v in self.base.to_dict().items() if FIELDS[k].defines_run and k not in OWN
            },
            "arms": {arm.name: dict(arm.changes) for arm in self.arms},
            "rules_out": {arm.name: arm.rules_out for arm in self.arms if arm.rules_out},
            "primary": primary,
            "seeds": list(self.seeds),
            **shares,
            **baseline,
            **caution,
        }

    def fix(self, output: Path) -> None:
        """Record the protocol in the study's folder. Raises ValueError, field by field, if another is there."""
        make_folder(output)
        self.check(output)
        if not (output / PROTOCOL).exists():
            text = json.dumps(self.protocol(), indent=2, ensure_ascii=False) + "\n"
            publish_bytes(output / PROTOCOL, text.encode())

    def check(self, output: Path) -> None:
        """Raise ValueError, field by field, if the study's folder has another protocol."""
        path = output / PROTOCOL
        if not path.exists():
            return
        fixed, now = read_protocol(path), json.loads(json.dumps(self.protocol()))
        # A setting that there was not yet had what is its default since.
        fixed["settings"] = {key: FIELDS[key].default for key in now["settings"]} | fixed["settings"]
        found = [*_differences(fixed, now)]
        if found:
            raise ValueError(
                f"{path} was fixed before the first run, and this command says something else: {'; '.join(found)}; "
                "give another --output for another study"
            )


def read_protocol(path: Path) -> dict[str, Any]:
    """Return a recorded protocol. Raises ValueError for a file that is none."""
    found = read_json_with_comments(path)
    if found.get("format") != FORMAT:
        raise ValueError(f"{path}: format is {found.get('format', 'not stated')}; wanted {FORMAT}")
    given = {key: kind for key, kind in OPTIONAL.items() if key in found}
    check_keys({k: v for k, v in found.items() if k != "primary"}, KINDS | given, path)
    return found


def _differences(fixed: Mapping[str, Any], now: Mapping[str, Any], before: str = "") -> list[str]:
    """Return a line for each field that differs, as `name: value then value now`."""
    found = []
    for key in dict.fromkeys([*fixed, *now]):
        then, value, name = fixed.get(key), now.get(key), f"{before}{key}"
        if then == value:
            continue
        if isinstance(then, dict) and isinstance(value, dict):
            found += _differences(then, value, f"{name}.")
        else:
            found.append(f"{name} was {json.dumps(then)}, and is {json.dumps(value)}")
    return found


# ---- the file


def read_study(
    path: Path,
    overrides: Mapping[str, Any] | None = None,
    arms: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
) -> Study:
    """Return the study of a file: `overrides` change settings of all arms, `arms` takes some of them, `seeds` take the
    place of the file's.

    Rows of every arm are standardised by the training images, so that no arm has better statistics. Raises ValueError
    naming the file and the field for anything that makes no study; OSError if there is no file.
    """
    found = {key: value for key, value in read_json_with_comments(path).items() if not is_comment(key)}
    unknown = [key for key in found if key not in KEYS]
    if unknown:
        raise ValueError(f"{path}: {unknown_key(unknown[0], found, KEYS, str(path))}")
    base = replace(_base(found.get("settings", {}), path, overrides), standardization="training_images")
    every = _arms(found.get("arms"), path)
    for name in arms or ():
        if name not in every:
            raise ValueError(f"--arms {name}: {path} has {', '.join(every)}")
    taken = [arm for name, arm in every.items() if not arms or name in arms]
    primary = _primary(found.get("primary"), every, path)
    if primary is not None:
        primary = replace(primary, against=[one for one in primary.against if not arms or one in arms])
        if not primary.against or (arms and primary.arm not in arms):
            primary = None
    chosen = list(seeds) if seeds else _seeds(found.get("seeds", [0, 1, 2, 3, 4]), path)
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"seeds are {chosen}; name each once")
    shares = _train_shares(found.get("train_shares", [1]), path)
    if len(shares) > 1:
        given = {"settings": base.train_share} | {
            f"arms.{arm.name}": arm.changes.get("train_share") for arm in taken
        }
        for where in (where for where, own in given.items() if own is not None):
            raise ValueError(f"{path}: {where}.train_share: train_shares says it; leave one of them out")
    caution = found.get("caution", "")
    if not is_text(caution):
        raise ValueError(f"{path}: caution is {caution!r}; wanted a sentence")
    return Study(base, taken, primary, chosen, shares, _baseline(found, every, arms, path), caution)


def _base(given: Any, path: Path, overrides: Mapping[str, Any] | None) -> Config:
    if isinstance(given, str):
        return load_config(path.parent / given, overrides)
    if isinstance(given, dict):
        return config_from(given, path, overrides)
    raise ValueError(
        f"{path}: settings is {given!r}; wanted the name of a settings file beside it, or an object"
    )


def _arms(given: Any, path: Path) -> dict[str, Arm]:
    if not isinstance(given, dict) or not given:
        raise ValueError(
            f'{path}: arms is {given!r}; wanted {{"world": {{}}, "prompt": {{"world_encoder": "none"}}}}'
        )
    found = {}
    for name, own in given.items():
        if is_comment(name):
            continue
        if not NAME.fullmatch(name):
            raise ValueError(f"{path}: arms.{name}: a name has letters, digits, '.', '_' and '-' alone")
        if not isinstance(own, dict):
            raise ValueError(f"{path}: arms.{name} is {own!r}; wanted an object of settings")
        own = {key: value for key, value in own.items() if not is_comment(key)}
        rules_out = own.pop("rules_out", "")
        for key in own:
            if key in OWN:
                raise ValueError(f"{path}: arms.{name}.{key}: the study decides that itself; leave it out")
            if key not in FIELDS:
                nearest = nearest_name(key, list(FIELDS))
                raise ValueError(f"{path}: arms.{name}.{key}: no setting; the nearest is {nearest}")
        found[name] = Arm(name, own, str(rules_out))
    return found


def _primary(given: Any, arms: Mapping[str, Arm], path: Path) -> Primary | None:
    if given is None:
        return None
    if not isinstance(given, dict):
        raise ValueError(f'{path}: primary is {given!r}; wanted {{"arm": "world", "against": ["prompt"]}}')
    unknown = [
        key for key in given if key not in ("arm", "against", "margin", "alpha") and not is_comment(key)
    ]
    if unknown:
        raise ValueError(f"{path}: primary.{unknown[0]}: wanted arm, against, margin and alpha")
    against = given.get("against")
    if not isinstance(against, list) or not against:
        raise ValueError(f"{path}: primary.against is {against!r}; wanted a list of arms")
    for name in (given.get("arm"), *against):
        if name not in arms:
            raise ValueError(f"{path}: primary names the arm {name!r}; the arms are {', '.join(arms)}")
    if given["arm"] in against:
        raise ValueError(f"{path}: primary.against has {given['arm']!r}, which is primary.arm")
    margin, alpha = given.get("margin", 1.0), given.get("alpha", 0.05)
    for key, value, most in (("margin", margin, 100.0), ("alpha", alpha, 0.5)):
        if type(value) not in (int, float) or not 0 < value < most:
            raise ValueError(f"{path}: primary.{key} is {value!r}; wanted a number between 0 and {most:g}")
    return Primary(given["arm"], against, float(margin), float(alpha))


def _seeds(given: Any, path: Path) -> list[int]:
    if not isinstance(given, list) or not given or not all(type(one) is int and one >= 0 for one in given):
        raise ValueError(
            f"{path}: seeds is {given!r}; wanted a list of integers from 0 on, such as [0, 1, 2]"
        )
    return given


def _train_shares(given: Any, path: Path) -> list[float]:
    numbers = isinstance(given, list) and all(type(one) in (int, float) and 0 < one <= 1 for one in given)
    if not numbers or 1 not in given or len(set(given)) < len(given):
        raise ValueError(
            f"{path}: train_shares is {given!r}; wanted a list of shares above 0, with 1 among them, such as "
            "[0.1, 0.3, 1]"
        )
    return sorted(map(float, given))


def _baseline(
    found: Mapping[str, Any], arms: Mapping[str, Arm], taken: Sequence[str] | None, path: Path
) -> str | None:
    name = found.get("baseline")
    if name is None:
        return None
    if found.get("primary") is not None:
        raise ValueError(
            f"{path}: baseline is {name!r}, but primary says what is compared; leave one of them out"
        )
    if name not in arms:
        raise ValueError(f"{path}: baseline is {name!r}; the arms are {', '.join(arms)}")
    if taken and name not in taken:
        raise ValueError(f"--arms {' '.join(taken)}: {path} compares them with {name}; name it too")
    return str(name)


# ---- its runs


@dataclass(frozen=True)
class Run:
    """One arm, trained with one seed."""

    number: int  # among the runs of the study
    arm: Arm
    config: Config = field(repr=False)  # as it trains
    share: float = 1.0  # of the training statements

    @property
    def name(self) -> str:
        """The arm and the seed, with the share of the training statements if that is not all."""
        return run_name(self.arm, self.config.seed, self.share)

    @property
    def folder(self) -> Path:
        """The folder of this run alone."""
        return Path(self.config.output_dir)

    @property
    def study_folder(self) -> Path:
        """The folder of the study."""
        return self.folder.parents[1]


SPLITS = ("dev", "test")  # that a run is evaluated on
# Conditions of each run; the others have no world tokens, and are asked once.
WITH_WORLD = ("world", "zero", "shuffled")
DECIDED: dict[str, Any] = {"do_eval": False, "save_total_limit": 1, "resume_from": None, **QUIET}


def arm_config(study: Study, arm: Arm) -> Config:
    """Return the settings of an arm. Raises ValueError naming the arm for a value that is not allowed."""
    try:
        return replace(study.base, **dict(arm.changes))
    except (ValueError, TypeError) as error:
        raise ValueError(f"arm {arm.name!r}: {error}") from None


def run_name(arm: Arm, seed: int, share: float = 1.0) -> str:
    """Return the name of a run, which is also that of its folder."""
    return f"{arm.name}-{seed}" if share == 1 else f"{arm.name}@{share:g}-{seed}"


def runs_of(study: Study, output: Path) -> list[Run]:
    """Return the runs of a study, seed by seed, so that a study that is under way has whole seeds; of each seed those
    on all training statements, which decide, come first."""
    runs: list[Run] = []
    for seed in study.seeds:
        for share in sorted(study.train_shares, reverse=True):
            for arm in study.arms:
                folder = str(output / "runs" / run_name(arm, seed, share))
                config = replace(arm_config(study, arm), **DECIDED, output_dir=folder, seed=seed)
                if share < 1:
                    config = replace(config, train_share=share)
                runs.append(Run(len(runs), arm, config, share))
    return runs


def conditions_of(run: Run) -> tuple[str, ...]:
    """Return the conditions that a run is evaluated under."""
    return CONDITIONS if run.number == 0 else WITH_WORLD

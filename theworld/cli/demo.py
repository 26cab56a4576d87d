"""The demo: drawn scenes through all three phases with the embedded models, then a table, two pictures and a page.

python tools/demo.py            in the project's folder
python -m theworld.demo         anywhere, once the package is installed
"""

import json
import logging
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import theworld
from theworld.config.cli import ArgumentParser, add_dry_run, path
from theworld.config.config import Config, load_config
from theworld.data.scenes import write_scenes
from theworld.evaluation.conditions import CONDITIONS, LABELS
from theworld.utils.commands import command
from theworld.utils.console import loading, rehearse, run_tool
from theworld.utils.files import check_folder, check_room, naming
from theworld.utils.hub import GEMMA_FILE, VAE_FILE, locate
from theworld.utils.locks import NAME as LOCK
from theworld.utils.locks import OutputLock, check_unlocked, empty_folder
from theworld.utils.text import byte_size

logger = logging.getLogger(__name__)

EMBEDDED = Path(theworld.__file__).parent / "embedded"  # the models, and the settings of configs/demo.json
MARKER = "demo.json"  # marks a folder as the output of a demo
ROOM = 250 * 2**20  # bytes that a demo writes, about
NUM_SCENES = {"train": 6000, "dev": 100, "test": 500}
ORDER = ("baseline", "world", "zero", "shuffled", "text")  # of the bars, from the top
COLOURS = {
    "baseline": "#8a8f98",
    "world": "#0b7a75",
    "zero": "#c9a227",
    "shuffled": "#b5533c",
    "text": "#6a46a8",
}
ALIGNED = 60  # scenes whose tokens are drawn


def run_demo(
    config_path: Path, output: Path, seed: int, num_scenes: dict[str, int] | None = None
) -> dict[str, Any]:
    """Draw scenes, extract, train, evaluate and draw the results; return the result line.

    Everything is written to `output`. The output of an earlier demo there is removed; any other folder is refused.
    """
    # Imported here: torch takes seconds to load, and --help should not.
    from theworld.evaluation.alignment import align, draw
    from theworld.evaluation.records import publish_json, read_jsonl
    from theworld.evaluation.score import score_to_file
    from theworld.evaluation.tables import table
    from theworld.extraction.extract import extract
    from theworld.report.report import write_report
    from theworld.training.trainer import Trainer

    start = time.perf_counter()
    check_demo(output)
    lock = _make_room(output)
    logger.info("1/4 drawing scenes (seed %d)", seed)
    write_scenes(output / "scenes", num_scenes or NUM_SCENES, seed=seed)
    config = _settings(config_path, output, seed)
    logger.info("2/4 phase 1: latents of every picture, once")
    extract(config, output / "cache", with_vision=True, allow_missing=False)
    logger.info("3/4 phase 2: train the projection from the cache")
    checkpoint = Trainer(config, output / "cache").run()
    logger.info("4/4 phase 3: evaluate on held-out scenes, with controls")
    run, cache, results = output / "run", output / "cache", output / "results.jsonl"
    words = command("eval", "--model", run, "--cache", cache, "--output", results)
    _, summary = score_to_file([run], "test", cache, None, CONDITIONS, {}, shlex.split(words), results)
    logger.info("\n%s\n", table(summary))
    draw_result(summary, run / "metrics.jsonl", output / "result.png")
    draw_scenes(read_jsonl(results), output / "scenes" / "images", output / "scenes.png")
    measured, alignment = align(checkpoint, cache, "test", ALIGNED, {})
    draw(measured, alignment, run / "alignment.png")
    publish_json(alignment, run / "alignment.json")
    page = write_report(run, output / "report.html", results)
    logger.info("pictures: %s, %s; report: %s", output / "result.png", output / "scenes.png", page)
    result = _result(summary) | {"seconds": round(time.perf_counter() - start, 1)}
    (output / MARKER).write_text(json.dumps(result) + "\n")
    lock.release()
    return result


def _settings(config_path: Path, output: Path, seed: int) -> Config:
    return replace(
        load_config(config_path),
        model_name=str(EMBEDDED / "gemma"),
        cosmos_model_name=str(EMBEDDED / "vae"),
        annotations=str(output / "scenes"),
        image_folder=str(output / "scenes" / "images"),
        output_dir=str(output / "run"),
        seed=seed,
    )


def _result(summary: dict[str, Any]) -> dict[str, Any]:
    conditions = ("baseline", "world", "zero", "shuffled")
    return {
        "statements": summary["statements"],
        **{c: round(summary["systems"][c]["accuracy"], 4) for c in conditions},
        "p_value": summary["world_against"]["baseline"]["p_value"],
    }


def plan_demo(config_path: Path, output: Path, seed: int) -> Iterator[str]:
    """Yield lines that say what `run_demo` would do with the same arguments. Raises the same errors."""
    config = load_config(config_path)
    for name, file in (("gemma", GEMMA_FILE), ("vae", VAE_FILE)):
        yield f"uses         {EMBEDDED / name}: {locate(str(EMBEDDED / name), file).words}"
    free = check_demo(output)
    removes = ", after the output of an earlier demo there is removed" if _holds_a_demo(output) else ""
    check_unlocked(output, "--output")
    counts = ", ".join(f"{count:,} {split}" for split, count in NUM_SCENES.items())
    yield f"draws        scenes with seed {seed}: {counts}"
    steps = config.align_steps + config.statement_steps + (config.max_steps or 0)
    yield f"trains       {steps:,} steps of {config.batch_size} statements"
    yield f"writes       {output}: about {ROOM / 2**20:.0f} MiB{removes} ({byte_size(free)} free)"


def check_demo(output: Path) -> int:
    """Return the bytes that are free for a demo's output. Raises ValueError or OSError if it cannot be written."""
    _holds_a_demo(output)
    check_folder(output, "--output")
    return check_room(output, ROOM, "--output")


def _holds_a_demo(output: Path) -> bool:
    """Return whether the output of an earlier demo is there. Raises ValueError for a folder with anything else."""
    if not output.is_dir() or not any(path.name != LOCK for path in output.iterdir()):
        return False
    if not (output / MARKER).is_file():
        raise ValueError(f"{output} holds files that no demo wrote; give another --output or move them away")
    return True


def _make_room(output: Path) -> OutputLock:
    """Return the lock of an empty folder. Raises ValueError or OSError if it is not a demo's to use."""
    earlier = _holds_a_demo(output)
    lock = OutputLock(output, "--output")
    if earlier:
        logger.info("removing the output of an earlier demo in %s", output)
        empty_folder(output)
    (output / MARKER).write_text("{}\n")
    return lock


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("agg")  # draws into files; needs no screen
    from matplotlib import pyplot

    return pyplot


def draw_result(summary: dict[str, Any], metrics: Path, path: Path) -> None:
    """Draw two panels: the loss during training, and the accuracies with their intervals."""
    pyplot = _pyplot()
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(11, 4.2), width_ratios=(1, 1.15), layout="constrained"
    )
    label_lines = [line for line in lines if line["phase"] == "train" and "loss" in line]
    left.plot([x["step"] for x in label_lines], [x["loss"] for x in label_lines], color=COLOURS["world"])
    left.axhline(np.log(2), color="#555555", linewidth=0.8, linestyle=":")
    left.annotate(
        "chance, 0.693", (label_lines[-1]["step"], np.log(2)), (0, 4), ha="right", textcoords="offset points"
    )
    left.set(xlabel="optimizer step", ylabel="loss at the label token, nats", title="Training")
    left.set_ylim(bottom=0)
    for row, condition in enumerate(ORDER):
        value = summary["systems"][condition]
        right.barh(row, value["accuracy"], color=COLOURS[condition], height=0.62)
        right.plot([value["low"], value["high"]], [row, row], color="black", linewidth=1.4)
        right.annotate(
            f"{value['accuracy']:.1%}", (value["high"], row), (6, 0), va="center", textcoords="offset points"
        )
    right.axvline(summary["majority_class"], color="#555555", linewidth=0.8, linestyle=":")
    right.set_yticks(range(len(ORDER)), [LABELS[c] for c in ORDER])
    right.invert_yaxis()
    right.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"])
    right.set(xlim=(0, 1.12), xlabel="accuracy; black: 95 % interval; dotted: majority class")
    right.set_title(f"{summary['statements']:,} statements about held-out scenes")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    with naming(path):
        figure.savefig(path, dpi=150)
    pyplot.close(figure)


def draw_scenes(rows: list[dict[str, Any]], images: Path, path: Path, count: int = 8) -> None:
    """Draw the first scenes with their statements and P(true) with and without world tokens."""
    pyplot = _pyplot()
    first = {row["image"]: row for row in reversed(rows)}
    figure, axes = pyplot.subplots(2, count // 2, figsize=(11, 6.6), layout="constrained")
    for axis, row in zip(axes.flat, [first[image] for image in sorted(first)[:count]], strict=False):
        axis.imshow(Image.open(images / row["image"]))
        world, baseline = row["systems"]["world"], row["systems"]["baseline"]
        axis.set_title(row["statement"].replace(" is ", "\nis "), fontsize=9)
        axis.set_xlabel(
            f"{'true' if row['label'] else 'false'}; P(true): {world['p_true']:.0%} with world tokens, "
            f"{baseline['p_true']:.0%} without",
            fontsize=7.5,
            color=COLOURS["world"] if world["correct"] else COLOURS["shuffled"],
        )
        axis.set_xticks([])
        axis.set_yticks([])
    with naming(path):
        figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main() -> int:
    """Parse the flags, run the demo, and print the result line; return the exit status."""
    parser = ArgumentParser(
        prog="demo",
        description="Run all three phases on embedded models and drawn scenes, in minutes on two CPU cores.\n\n"
        "The last line of the output is one JSON object with the accuracies on held-out scenes.\n"
        "Exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted.",
    )
    text = "Settings file. (default: the settings of configs/demo.json)"
    parser.add_argument("--config", type=path, default=EMBEDDED / "demo.json", metavar="FILE", help=text)
    text = "Folder for everything that the demo makes. (default: checkpoints/demo)"
    parser.add_argument("--output", type=path, default=Path("checkpoints/demo"), metavar="FOLDER", help=text)
    text = "Random seed of the scenes, the weights and the order of statements. (default: 0)"
    parser.add_argument("--seed", type=int, default=0, metavar="INTEGER", help=text)
    add_dry_run(parser)
    arguments = parser.parse_args()
    if arguments.dry_run:
        return rehearse(lambda: plan_demo(arguments.config, arguments.output, arguments.seed))
    with loading("demo"):
        import theworld.training.trainer  # noqa: F401  # torch, seconds; run_demo imports the rest
    print(json.dumps(run_demo(arguments.config, arguments.output, arguments.seed)))
    return 0


if __name__ == "__main__":
    sys.exit(run_tool("demo", main))

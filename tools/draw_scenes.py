# PYTHON_ARGCOMPLETE_OK
"""Draw scenes of two coloured things and statements about them, in the format of VSR: data to try everything with.

    python tools/draw_scenes.py --output scenes/ --train 6000 --dev 100 --test 500

With --hard the scenes are cluttered, in coloured light and noisy: for the positive control (`make study-control`).
Writes train.jsonl, dev.jsonl, test.jsonl and images/, for --annotations and --image_folder of the other tools. A scene
depends on --seed, its split and its number alone, so a longer data set begins with the scenes of a shorter one.
Exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
"""

import sys
from pathlib import Path

from theworld.utils.starting import starting

with starting():
    from theworld.utils.console import rehearse, run_tool

ROOM = 40_000  # bytes of a scene, about


def main() -> int:
    """Parse the flags and draw; return the exit status."""
    from theworld.config.cli import ArgumentParser, add_dry_run, path
    from theworld.utils.files import check_folder, check_room

    with starting():
        from demo_models.hard_scenes import draw_hard_scene

        from theworld.data.scenes import draw_scene, write_scenes
        from theworld.utils.text import byte_size

    parser = ArgumentParser(description=__doc__)
    text = "Folder for the scenes; one with scenes in it is drawn over. (default: scenes)"
    parser.add_argument("--output", type=path, default=Path("scenes"), metavar="FOLDER", help=text)
    sizes = {"train": 6000, "dev": 100, "test": 500}
    for split, number in sizes.items():
        text = f"Number of scenes of {split}; each has two statements. (default: {number})"
        parser.add_argument(f"--{split}", type=int, default=number, metavar="INTEGER", help=text)
    text = "Draw scenes that are hard to see, for the positive control of a study. (default: no)"
    parser.add_argument("--hard", action="store_true", help=text)
    parser.add_argument("--seed", type=int, default=0, metavar="INTEGER", help="Random seed. (default: 0)")
    add_dry_run(parser)
    arguments = parser.parse_args()
    counts = {split: getattr(arguments, split) for split in sizes}
    for split, count in counts.items():
        if count < 1:
            parser.error(f"--{split} is {count}; wanted 1 or more")
    output = arguments.output
    check_folder(output, "--output")
    foreign = [p.name for p in output.glob("*") if p.name not in ("images", *(f"{s}.jsonl" for s in sizes))]
    if foreign:
        raise ValueError(f"{output} holds {foreign[0]}, which is no file of scenes; give another --output")
    free = check_room(output, ROOM * sum(counts.values()), "--output")
    words = ", ".join(f"{count:,} {split}" for split, count in counts.items())
    kind = "hard scenes" if arguments.hard else "scenes"
    if arguments.dry_run:
        return rehearse(lambda: [f"draws        {words} {kind} into {output} ({byte_size(free)} free)"])
    write_scenes(output, counts, seed=arguments.seed, draw=draw_hard_scene if arguments.hard else draw_scene)
    print(f"{output}: {words} {kind}")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool("draw_scenes", main))

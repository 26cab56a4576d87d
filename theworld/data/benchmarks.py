"""Benchmarks of spatial relations from the hub, as folders of statements and photographs.

A folder has test.jsonl, the photographs in images/, README.md with licences and citation, and benchmark.json, which is
written last: a folder without it is unfinished, and the same call goes on from where it ended. Its statements are
scored as any others, with the folder as annotations and images/ as image_folder.

    What'sUp, COCO-spatial, GQA-spatial   caption_options, the first of which is right: a choice
    CV-Bench                              question, choices, answer "(A)": a choice between statements made of them
    BLINK                                 the same with the choices yes and no: a question
"""

import io
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import EntryNotFoundError
from PIL import Image

from theworld.data.images import decode, sha256
from theworld.data.vsr import NO_RELATION, Statement, statements_of
from theworld.utils.console import progress
from theworld.utils.errors import reason_of
from theworld.utils.files import check_folder, check_room, hash_file, holds, publish_bytes
from theworld.utils.hub import Fault, ask_hub, check_download_folder
from theworld.utils.jsonc import json_bytes, read_json_with_comments
from theworld.utils.locks import OutputLock
from theworld.utils.text import byte_size

logger = logging.getLogger(__name__)

IMAGES, STATEMENTS, RECORD = "images", "test.jsonl", "benchmark.json"
Row = dict[str, Any]


@dataclass(frozen=True)
class Item:
    """One row of a benchmark: its photograph, and the statements about it with their labels."""

    photograph: Mapping[str, Any]  # bytes, and path, the name that the source gives it, or None
    options: tuple[tuple[str, int], ...]  # (text, label); several are the options of one choice
    relations: tuple[str, ...]  # of each option
    is_question: bool = False
    source_image: str = ""  # name of the photograph in the data set that it was taken from


@dataclass(frozen=True)
class Benchmark:
    """A benchmark as the hub has it, and as it was published."""

    name: str
    title: str
    repository: str  # on the hub
    files: str  # pattern of its parquet files
    rows: int  # as published, of those that `read` does not leave out
    options: int | None  # of each row, as published; 1: a yes/no question; None: the number is not published
    read: Callable[[Row], Item | None]  # None: a row that is no part of the benchmark
    megabytes: int  # of the parquet files, about
    licence: str
    address: str
    citation: str
    has_sets: bool = False  # rows with the same options form a set, and opposite ones a pair


# ---- rows


def _captions(row: Row) -> Item:
    """Return the row of a data set whose first caption is right."""
    options = list(row["caption_options"])
    if len(set(options)) != len(options) or len(options) < 2:
        raise ValueError(f"caption_options are {options}; wanted two or more that differ")
    relations = _relations(options)
    return Item(row["image_options"], tuple((text, int(i == 0)) for i, text in enumerate(options)), relations)


def _relations(options: Sequence[str]) -> tuple[str, ...]:
    """Return the words of each caption that are not common to all, as VSR writes them: "left of"."""
    words = [option.split() for option in options]
    shortest = min(map(len, words))
    start = next((i for i in range(shortest) if len({w[i] for w in words}) > 1), shortest)
    left = shortest - start
    end = next((i for i in range(left) if len({w[-1 - i] for w in words}) > 1), left)
    found = []
    for own in words:
        relation, rest = own[start : len(own) - end], own[len(own) - end :]
        if rest[:1] == ["of"]:
            relation.append("of")
        found.append(" ".join(relation).removeprefix("to the ") or NO_RELATION)
    return tuple(found)


def _answer(row: Row) -> int:
    """Return the index of the right choice, for an answer such as "(A)"."""
    letter, choices = str(row["answer"]).strip("() "), row["choices"]
    index = "ABCDEFGH".find(letter) if len(letter) == 1 else -1
    if not 0 <= index < len(choices):
        raise ValueError(
            f"answer is {row['answer']!r} and choices are {choices}; wanted a letter of one of them"
        )
    return index


def _yes_no(row: Row) -> Item:
    """Return the row of BLINK: a question with the choices yes and no."""
    answer = [str(choice).strip().lower() for choice in row["choices"]]
    if sorted(answer) != ["no", "yes"]:
        raise ValueError(f"choices are {row['choices']}; wanted yes and no")
    label = int(answer[_answer(row)] == "yes")
    return Item(row["image_1"], ((row["question"], label),), (NO_RELATION,), is_question=True)


WHERE = re.compile(
    r"where (?:is|are) (the .+?) located with respect to (the .+?)\?", re.IGNORECASE | re.DOTALL
)
CHOICES = {"left": "left of", "right": "right of", "in front": "in front of"}  # as words before an object


def _relation_choices(row: Row) -> Item | None:
    """Return the row of CV-Bench if it is of the task Relation.

    Each choice becomes a statement: "The cup is above the plate." A question of another form is kept whole, with the
    choice behind it. COCO photographs may have a red box drawn into them, so their names are kept as well.
    """
    if row["task"] != "Relation":
        return None
    right, choices = _answer(row), [str(choice) for choice in row["choices"]]
    found, relations = WHERE.search(row["question"]), [CHOICES.get(choice, choice) for choice in choices]
    options = [
        f"{found[1][0].upper()}{found[1][1:]} is {relation} {found[2]}."
        if found
        else f"{row['question'].strip()} {choice.capitalize()}."
        for choice, relation in zip(choices, relations, strict=True)
    ]
    labelled = tuple((text, int(i == right)) for i, text in enumerate(options))
    source = PurePosixPath(str(row.get("source_filename") or "")).name
    return Item(row["image"], labelled, tuple(relations), source_image=source)


# ---- the benchmarks

_WHATSUP = r"""@inproceedings{kamath2023whatsup,
  title={What's ``up'' with vision-language models? Investigating their struggle with spatial reasoning},
  author={Kamath, Amita and Hessel, Jack and Chang, Kai-Wei},
  booktitle={EMNLP},
  year={2023}
}"""
_COCO = r"""@inproceedings{lin2014coco,
  title={Microsoft {COCO}: Common Objects in Context},
  author={Lin, Tsung-Yi and Maire, Michael and Belongie, Serge and others},
  booktitle={ECCV},
  year={2014}
}"""
_GQA = r"""@inproceedings{hudson2019gqa,
  title={{GQA}: A New Dataset for Real-World Visual Reasoning and Compositional Question Answering},
  author={Hudson, Drew A. and Manning, Christopher D.},
  booktitle={CVPR},
  year={2019}
}"""
_BLINK = r"""@inproceedings{fu2024blink,
  title={{BLINK}: Multimodal Large Language Models Can See but Not Perceive},
  author={Fu, Xingyu and Hu, Yushi and Li, Bangzheng and others},
  booktitle={ECCV},
  year={2024}
}"""
_CAMBRIAN = r"""@inproceedings{tong2024cambrian,
  title={Cambrian-1: A Fully Open, Vision-Centric Exploration of Multimodal {LLMs}},
  author={Tong, Shengbang and Brown, Ellis and Wu, Penghao and others},
  booktitle={NeurIPS},
  year={2024}
}"""
_OWN = "The authors' code is under the MIT licence; for their photographs the data set states none."
_FLICKR = (
    "The authors' code is under the MIT licence. Photographs: COCO val2017, each under the licence of its owner on "
    "Flickr; COCO's annotations: CC BY 4.0."
)
_VG = "The authors' code is under the MIT licence. Photographs: Visual Genome, CC BY 4.0, through GQA, CC BY 4.0."


def _whatsup(
    name: str, title: str, split: str, *, rows: int, options: int, megabytes: int, **more: Any
) -> Benchmark:
    given: dict[str, Any] = {"licence": _OWN, "citation": _WHATSUP} | more
    return Benchmark(
        name,
        title,
        "ServiceNow/whatsup_all",
        f"data/{split}-*.parquet",
        rows,
        options,
        _captions,
        megabytes,
        address="https://github.com/amitakamath/whatsup_vlms",
        **given,
    )


_COCO_SOURCE = {"licence": _FLICKR, "citation": f"{_WHATSUP}\n{_COCO}"}
_GQA_SOURCE = {"licence": _VG, "citation": f"{_WHATSUP}\n{_GQA}"}
BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        _whatsup(
            "whatsup_a",
            "What'sUp, controlled images A: an object on, under, left or right of a piece of furniture",
            "Controlled_Images_A",
            rows=412,
            options=4,
            megabytes=460,
            has_sets=True,
        ),
        _whatsup(
            "whatsup_b",
            "What'sUp, controlled images B: an object in front of, behind, left or right of another on a table",
            "Controlled_Images_B",
            rows=408,
            options=4,
            megabytes=350,
            has_sets=True,
        ),
        _whatsup(
            "coco_spatial_one",
            "COCO-spatial, one object: on which side of the photograph it is",
            "COCO_QA_one_obj",
            rows=2247,
            options=2,
            megabytes=1040,
            **_COCO_SOURCE,
        ),
        _whatsup(
            "coco_spatial_two",
            "COCO-spatial, two objects: where one is with respect to the other",
            "COCO_QA_two_obj",
            rows=440,
            options=2,
            megabytes=200,
            **_COCO_SOURCE,
        ),
        _whatsup(
            "gqa_spatial_one",
            "GQA-spatial, one object: on which side of the photograph it is",
            "VG_QA_one_obj",
            rows=1160,
            options=2,
            megabytes=420,
            **_GQA_SOURCE,
        ),
        _whatsup(
            "gqa_spatial_two",
            "GQA-spatial, two objects: where one is with respect to the other",
            "VG_QA_two_obj",
            rows=291,
            options=2,
            megabytes=110,
            **_GQA_SOURCE,
        ),
        Benchmark(
            "blink_spatial",
            "BLINK, Spatial_Relation, validation split: yes/no questions (the answers of its test split are hidden)",
            "BLINK-Benchmark/BLINK",
            "Spatial_Relation/val-*.parquet",
            rows=143,
            options=1,
            read=_yes_no,
            megabytes=8,
            licence="Apache 2.0; the photographs are of several data sets.",
            address="https://github.com/zeyofu/BLINK_Benchmark",
            citation=_BLINK,
        ),
        Benchmark(
            "cvbench_relation",
            "CV-Bench 2D, task Relation: where one object is with respect to another",
            "nyu-visionx/CV-Bench",
            "test_2d*.parquet",
            rows=650,
            options=None,
            read=_relation_choices,
            megabytes=190,
            licence="Apache 2.0; the photographs are of ADE20K, and of COCO, each under its owner's licence on Flickr.",
            address="https://github.com/cambrian-mllm/cambrian",
            citation=_CAMBRIAN,
        ),
    )
}


# ---- from the hub


def get_benchmark(benchmark: Benchmark, output: Path, source: Path | None = None) -> Row:
    """Fill `output` with a benchmark, from the hub or from `source`, a folder with the same files; return its record.

    A finished folder is checked and left as it is. Raises ValueError for rows or counts that are not as published and
    for a folder of another benchmark, ImageError for a photograph that does not decode, Fault if the hub does not serve
    the data set, and OSError.
    """
    check_folder(output, "--output")
    if (record := finished(benchmark, output)) is not None:
        logger.info("%s: complete, nothing is downloaded", output)
        return record
    folder = _downloaded(benchmark) if source is None else source
    files = _parquet_files(benchmark, folder)
    with OutputLock(output, "--output"):
        rows, photographs = _save_photographs(benchmark, _items(benchmark, files), output)
        statements = statements_of((f"{benchmark.name} line {i}", row) for i, row in enumerate(rows, 1))
        _check_counts(benchmark, statements)
        lines = b"".join(json_bytes(row) + b"\n" for row in rows)
        publish_bytes(output / STATEMENTS, lines, overwrite=True)
        record = {
            "name": benchmark.name,
            "repository": benchmark.repository,
            "revision": folder.name if source is None else None,
            "files": [path.name for path in files],
            "items": benchmark.rows,
            "statements": len(statements),
            "statements_sha256": sha256(lines),
            "photographs": photographs,
            "licence": benchmark.licence,
            "citation": benchmark.citation,
        }
        publish_bytes(output / "README.md", _readme(benchmark, record).encode(), overwrite=True)
        publish_bytes(output / RECORD, json_bytes(record, indent=2) + b"\n", overwrite=True)
        return record


def plan_benchmark(benchmark: Benchmark, output: Path, source: Path | None = None) -> Iterator[str]:
    """Yield lines on what `get_benchmark` would do with the same arguments. Writes and downloads nothing."""
    check_folder(output, "--output")
    yield f"benchmark    {benchmark.title}: {benchmark.rows:,} items"
    if finished(benchmark, output) is not None:
        yield f"             {output} is complete, so nothing would be done"
        return
    size = benchmark.megabytes * 10**6
    free = check_room(output, size, "--output")
    if source is not None:
        yield f"reads        {', '.join(path.name for path in _parquet_files(benchmark, source))} in {source}"
    else:
        check_download_folder(benchmark.repository)
        yield f"downloads    about {benchmark.megabytes:,} MB of {benchmark.repository}, if they are not here already"
    yield f"writes       about as much to {output} ({byte_size(free)} free)"


def finished(benchmark: Benchmark, output: Path) -> Row | None:
    """Return the record of a finished folder, or None if it is to be filled: it has none, or a file is not as it says.

    Raises ValueError for a folder of another benchmark.
    """
    if not (output / RECORD).is_file():
        return None
    record = read_json_with_comments(output / RECORD)
    if record.get("name") != benchmark.name:
        raise ValueError(
            f"{output / RECORD}: name is {record.get('name')!r}, and {benchmark.name} is wanted; give another --output"
        )
    wanted = {STATEMENTS: record["statements_sha256"]}
    wanted |= {f"{IMAGES}/{name}": digest for name, digest in record["photographs"].items()}
    for name, digest in wanted.items():
        if not (output / name).is_file() or hash_file(output / name)[1] != digest:
            logger.info("%s: not as %s says; it is written again", output / name, RECORD)
            return None
    return dict(record)


def benchmark_of(annotations: str | Path | None, split: str) -> str:
    """Return the name of the benchmark whose statements a folder has, as they were made; "" for any other."""
    if annotations is None or split != "test":
        return ""
    folder = Path(annotations)
    folder = folder if folder.is_dir() else folder.parent
    if not ((folder / RECORD).is_file() and (folder / STATEMENTS).is_file()):
        return ""
    record = read_json_with_comments(folder / RECORD)
    is_whole = record.get("statements_sha256") == hash_file(folder / STATEMENTS)[1]
    return str(record.get("name")) if is_whole and record.get("name") in BENCHMARKS else ""


def _downloaded(benchmark: Benchmark) -> Path:
    """Return the folder of the data set's files, downloaded now or, if the hub cannot be asked, before."""
    name = benchmark.repository
    wanted: dict[str, Any] = {"repo_type": "dataset", "allow_patterns": [benchmark.files]}
    try:
        ask_hub(name, "README.md", "dataset")
    except (OSError, EntryNotFoundError) as error:
        try:
            folder = Path(snapshot_download(name, **wanted, local_files_only=True))
        except OSError:
            hint = "check the network and HF_TOKEN; or give --source, a folder with the data set's files"
            raise Fault(f"{name}: {reason_of(error)}", hint) from None
        logger.info("%s: %s; what was downloaded before is taken", name, reason_of(error))
        return folder
    check_download_folder(name)
    return Path(snapshot_download(name, **wanted))


def _parquet_files(benchmark: Benchmark, folder: Path) -> list[Path]:
    """Return the benchmark's files in order. Raises FileNotFoundError unless all of them are there."""
    files = sorted(folder.glob(benchmark.files))
    counts = {int(found[1]) for path in files if (found := re.search(r"-of-(\d+)\.parquet$", path.name))}
    if not files or (counts and counts != {len(files)}):
        have = f"{len(files)} of {', '.join(map(str, sorted(counts)))} files" if files else "no file"
        raise FileNotFoundError(
            f"{folder}: has {have} {benchmark.files}; wanted those of {benchmark.repository}"
        )
    return files


def _items(benchmark: Benchmark, files: Sequence[Path]) -> Iterator[tuple[str, Item]]:
    """Yield the items of a benchmark, each with its place: its file and row."""
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    for path in files:
        number = 0
        try:
            with ParquetFile(path) as file:
                for batch in file.iter_batches(batch_size=16):  # photographs of a megabyte each
                    for row in batch.to_pylist():
                        number += 1
                        item = benchmark.read(row)
                        if item is not None:
                            yield f"{path.name} row {number}", item
        except KeyError as error:
            raise ValueError(
                f"{path.name} row {number}: has no field {error}; {benchmark.repository} is not as it was published"
            ) from error
        except ArrowException as error:
            raise ValueError(
                f"{path}: is no whole parquet file ({error}); remove it and run again"
            ) from error
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path.name} row {number}: {error}") from error


def _save_photographs(
    benchmark: Benchmark, items: Iterator[tuple[str, Item]], output: Path
) -> tuple[list[Row], dict[str, str]]:
    """Write each different photograph, and return the rows of test.jsonl and the photographs' SHA-256 by name.

    A photograph that is there with the same bytes stays.
    """
    (output / IMAGES).mkdir(parents=True, exist_ok=True)
    names: dict[str, str] = {}
    rows: list[Row] = []
    sets: dict[frozenset[str], int] = {}
    for number, (where, item) in enumerate(progress(items, total=benchmark.rows, desc=benchmark.name), 1):
        data = item.photograph.get("bytes") if isinstance(item.photograph, Mapping) else None
        if not isinstance(data, bytes):
            raise ValueError(
                f"{where}: has no bytes of a photograph; {benchmark.repository} is not as it was published"
            )
        digest = sha256(data)
        if digest not in names:
            name = f"{benchmark.name}-{number:04d}.{_suffix(data, where)}"
            if not ((output / IMAGES / name).is_file() and holds(output / IMAGES / name, data)):
                publish_bytes(output / IMAGES / name, data, overwrite=True)
            names[digest] = name
        source = item.source_image or PurePosixPath(str(item.photograph.get("path") or "")).name
        common: Row = {"image": names[digest]} | ({"source_image": source} if source else {})
        if len(item.options) > 1:
            common["group"] = str(number)
        if benchmark.has_sets:
            key = frozenset(text for text, _ in item.options)
            common["sets"] = _sets_of(item, sets.setdefault(key, len(sets) + 1))
        field = "question" if item.is_question else "statement"
        for (text, label), relation in zip(item.options, item.relations, strict=True):
            own = {} if relation == NO_RELATION else {"relation": relation}
            rows.append({**common, field: text, "label": label, **own})
    return rows, {name: digest for digest, name in names.items()}


def _suffix(data: bytes, where: str) -> str:
    """Return the suffix of a photograph that decodes. Raises ImageError for any other."""
    decode(data, where)
    with Image.open(io.BytesIO(data)) as image:
        kind = (image.format or "image").lower()
    return "jpg" if kind == "jpeg" else kind


def _sets_of(item: Item, number: int) -> dict[str, str]:
    """Return What'sUp's pair and set of an item: a set has the same two objects, a pair also opposite relations."""
    (relation,) = [
        relation for (_, label), relation in zip(item.options, item.relations, strict=True) if label == 1
    ]
    sideways = {"left of", "right of"}
    pair = sideways if relation in sideways else set(item.relations) - sideways
    return {"pair": f"{number} {'/'.join(sorted(pair))}", "set": str(number)}


def _check_counts(benchmark: Benchmark, statements: Sequence[Statement]) -> None:
    """Raise ValueError unless there are as many items, options and sets as were published."""
    found = {"items": len({s.group or s.index for s in statements})}
    wanted = {"items": benchmark.rows}
    if benchmark.options is not None:
        found["statements"], wanted["statements"] = len(statements), benchmark.rows * benchmark.options
    if benchmark.has_sets:
        for kind, size in (("pair", 2), ("set", 4)):
            groups = {(s.group, dict(s.sets)[kind]) for s in statements}
            sizes = [sum(name == own for _, own in groups) for name in {name for _, name in groups}]
            found[f"{kind}s of {size}"], wanted[f"{kind}s of {size}"] = (
                sizes.count(size),
                benchmark.rows // size,
            )
    if found != wanted:
        given, published = (", ".join(f"{n:,} {what}" for what, n in one.items()) for one in (found, wanted))
        raise ValueError(
            f"{benchmark.repository} has {given} of {benchmark.name}, and {published} were published; the data set "
            "has changed, so its results would not be comparable"
        )


def _readme(benchmark: Benchmark, record: Row) -> str:
    counts = (
        f"{record['items']:,} items, {record['statements']:,} lines of {STATEMENTS} about "
        f"{len(record['photographs']):,} photographs in {IMAGES}/"
    )
    revision = f", revision {record['revision']}" if record["revision"] else ""
    return f"""# {benchmark.title}

{counts}.
Made by tools/get_benchmark.py from the data set {benchmark.repository} of the hub{revision}.
Source: {benchmark.address}

Licence: {benchmark.licence}

```bibtex
{benchmark.citation}
```
"""

"""Records of the arms and seeds of a study, made by hand."""

import numpy as np
from records import statement, with_rest

from theworld.evaluation.records import Row, records
from theworld.evaluation.study_summary import summarise_study
from theworld.evaluation.study_verdict import Question

NUM = 600  # statements, two about each image; the images of the first half are in train
STATEMENTS = [statement(i, f"{i // 2}.jpg", i % 2, "near" if i % 3 else "left of") for i in range(NUM)]
SEEN = {f"{i}.jpg" for i in range(NUM // 4)}


def run(accuracy: float, seed: int, condition: str = "world") -> list[Row]:
    """Records with `accuracy`, in which the easy statements are right: those of low number in a fixed order."""
    difficulty = np.random.default_rng(0).permutation(NUM) / NUM
    noise = np.random.default_rng([seed, round(1000 * accuracy)]).normal(0, 0.03, NUM)
    right = accuracy - difficulty + noise
    logits = np.stack([np.zeros(NUM), right * np.where(np.arange(NUM) % 2, 1, -1)], 1)
    return records(STATEMENTS, {condition: with_rest(logits)}, SEEN, dataset="vsr_random", split="test")


def study(world: float, seeds: int = 3, **others: float) -> dict[str, dict[int, list[Row]]]:
    accuracies = {"world": world, "prompt": 0.6, "pixels": 0.6, "untrained": 0.6, "noise": 0.6} | others
    return {arm: {s: run(a, s) for s in range(seeds)} for arm, a in accuracies.items()}


def few_statements() -> dict[str, dict[int, list[Row]]]:
    """Two arms of two seeds that lie far apart, on six statements about six images, one of which is not in train."""
    right = {
        "world": ([1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]),
        "prompt": ([0, 0, 0, 0, 0, 1], [1, 1, 0, 1, 0, 0]),
    }
    asked = [statement(i, f"{i}.jpg", i % 2) for i in range(6)]
    labels = np.array([-1.0, 1.0] * 3)
    arms: dict[str, dict[int, list[Row]]] = {arm: {} for arm in right}
    for arm, runs in right.items():
        for seed, own in enumerate(runs):
            margins = labels * np.where(own, 1, -1)
            answers = {"world": with_rest(np.stack([np.zeros(6), margins], 1))}
            seen = {f"{i}.jpg" for i in range(5)}
            arms[arm][seed] = records(asked, answers, seen, dataset="vsr_random", split="test")
    return arms


ARMS = {"linear": 0.6, "mlp": 0.7, "conv": 0.7}  # of a study that explores


def explored(accuracies: dict[str, float], baseline: str | None = None, seeds: int = 3) -> dict:
    """The scope of all statements of a study of these arms without a comparison that decides."""
    arms = {name: {s: run(accuracy, s) for s in range(seeds)} for name, accuracy in accuracies.items()}
    names = list(arms)
    question = Question(names[0], names[1], tuple(names[1:]), decides=False, baseline=baseline)
    return summarise_study(arms, question)["scopes"]["all"]


def single_image() -> dict[str, dict[int, list[Row]]]:
    """The arms and seeds of `few_statements`, all of whose statements are about one image."""
    return {
        arm: {
            seed: [row | {"image": "0.jpg", "image_seen_in_train": False} for row in rows]
            for seed, rows in own.items()
        }
        for arm, own in few_statements().items()
    }

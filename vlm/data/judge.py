"""The rules that look at a dataset as a whole: rare words, repetitions, evaluation sets."""

import numpy as np
from jaxtyping import Bool, Int64

from vlm.data.duplicates import distinct_rows, near_any, near_groups
from vlm.data.filter_rules import FilterConfig, sample_rules
from vlm.data.survey import Dataset

__all__ = ["Dropped", "contaminated", "duplicate_groups", "failures"]

Dropped = dict[str, Bool[np.ndarray, " row"]]
"""By rule, the rows it drops by itself, in the order of the report."""


def failures(dataset: Dataset, config: FilterConfig) -> Dropped:
    """Every rule but duplicates and evaluation sets."""
    facts, decoded = dataset.facts, dataset.facts["decoded"]
    dropped: Dropped = {"undecodable": ~decoded}
    for number, rule in enumerate(sample_rules(config)):
        dropped[rule.name] = dataset.failed[:, number]
    for name, column, others, most in (
        ("max_captions_per_image", "image", "caption", config.max_captions_per_image),
        ("max_images_per_caption", "caption", "image", config.max_images_per_caption),
    ):
        if most is not None:
            partners = _distinct_partners(facts[column][decoded], facts[others][decoded])
            dropped[name] = np.zeros(len(facts), dtype=bool)
            dropped[name][decoded] = partners > most
    if dataset.rarest is not None and config.min_ngram_count is not None:
        dropped["min_ngram_count"] = decoded & (dataset.rarest < config.min_ngram_count)
    if dataset.rarest is not None and config.max_ngrams is not None:
        dropped["max_ngrams"] = decoded & (dataset.rarest < dataset.most_frequent)
    return dropped


def _distinct_partners(values: np.ndarray, partners: np.ndarray) -> Int64[np.ndarray, " row"]:
    """For each row with how many distinct partners its value occurs."""
    pairs, _ = distinct_rows(values, partners)
    _, which = distinct_rows(values)
    return np.bincount(which[pairs])[which] if len(which) else which


def contaminated(facts: np.ndarray, evaluation: np.ndarray, config: FilterConfig) -> Dropped:
    """The rows whose image, or caption if so configured, is in evaluation sets.

    Args:
        facts: `FACTS_DTYPE` of the dataset.
        evaluation: The same of all evaluation sets.
        config: What is alike.
    """
    dropped = np.isin(facts["image"], evaluation["image"][evaluation["image"] != 0])
    if config.decontaminate_likeness is not None:
        rows = np.flatnonzero(facts["decoded"] & ~dropped)
        others = evaluation["looks"][evaluation["decoded"]]
        dropped[rows] = near_any(facts["looks"][rows], others, config.decontaminate_likeness)
    found = {"decontaminate": dropped & facts["decoded"]}
    if config.decontaminate_captions:
        captions = evaluation["caption"][evaluation["caption"] != 0]
        found["decontaminate_captions"] = facts["decoded"] & np.isin(facts["caption"], captions)
    return found


def duplicate_groups(
    facts: np.ndarray, config: FilterConfig
) -> dict[str, Int64[np.ndarray, " row"]]:
    """By rule, for each row the first row of its group; alone where it was not decoded."""
    rows = np.flatnonzero(facts["decoded"]).astype(np.int64)
    found = {}
    if config.exact_duplicates is not None:
        columns = [facts["image"][rows]]
        if config.exact_duplicates == "image_and_caption":
            columns.append(facts["caption"][rows])
        firsts, which = distinct_rows(*columns)
        found["exact_duplicates"] = _spread(rows, firsts[which], len(facts))
    if config.near_duplicates is not None:
        groups = near_groups(facts["looks"][rows], config.near_duplicates)
        found["near_duplicates"] = _spread(rows, groups, len(facts))
    return found


def _spread(
    rows: Int64[np.ndarray, " some"], groups: Int64[np.ndarray, " some"], count: int
) -> Int64[np.ndarray, " row"]:
    spread = np.arange(count, dtype=np.int64)
    spread[rows] = rows[groups]
    return spread

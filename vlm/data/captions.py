"""Which words of a sample the text tower reads this time.

First the caption: the texts that the configured fields hold, one of them or all. Then tags, then a
template around it, then random changes of its words. Every draw comes from the generator of this
visit, and a step that is not configured draws nothing.
"""

from typing import Any, Final, Literal

import numpy as np
from pydantic import Field, model_validator

from vlm.config import Config
from vlm.data.samples import Sample
from vlm.data.text_augment import TextAugmentConfig, augment_text
from vlm.errors import DataError

__all__ = ["TEXT_MEMBER", "CaptionConfig", "caption_texts", "choose_caption"]

TEXT_MEMBER: Final = ".txt"


class CaptionConfig(Config):
    """Where captions come from, and the form they take in training.

    `text`, `text_and_tags` and `tags` are relative frequencies; samples without tags always use
    their text.
    """

    fields: tuple[str, ...] = Field((TEXT_MEMBER,), min_length=1)
    """`.txt`, or keys of `.json` whose values are texts, lists of texts, or labels."""
    split_lines: bool = False
    """Each line of a text is a caption of its own."""
    many: Literal["choose", "concatenate", "longest"] = "choose"
    """What becomes of several captions of one sample: one drawn evenly, all, or the longest."""
    label_names: tuple[str, ...] = ()
    """Of integer labels: label 0 reads as the first name."""
    templates: tuple[str, ...] = ()
    """One is drawn, and the caption put in the place of its `{}`."""
    text: float = Field(1.0, ge=0)
    """The caption as it is."""
    text_and_tags: float = Field(0.0, ge=0)
    """The caption, a comma, then some of the tags."""
    tags: float = Field(0.0, ge=0)
    """Some of the tags alone."""
    tags_field: str = "tags"
    """Key of the tag list in a sample's `.json`."""
    max_tags: int = Field(4, ge=1)
    """Most tags drawn at a time, in random order."""
    augment: TextAugmentConfig = TextAugmentConfig()

    @model_validator(mode="after")
    def _some_form_is_possible(self) -> "CaptionConfig":
        if self.text + self.text_and_tags + self.tags <= 0:
            message = "at least one of text, text_and_tags and tags must be above 0"
            raise ValueError(message)
        for template in self.templates:
            if template.count("{}") != 1:
                message = f"templates: each needs exactly one {{}}, found {template!r}"
                raise ValueError(message)
        return self


def caption_texts(sample: Sample, config: CaptionConfig) -> list[str]:
    """All captions of a sample, in the order of the configured fields; none of them empty.

    Raises:
        DataError: If there is none, or a label has no name.
    """
    found = [
        text
        for field in config.fields
        for value in _values(sample, field)
        for text in _lines(_as_text(sample, field, value, config), config)
    ]
    if not found:
        fields = ", ".join(config.fields)
        message = (
            f"sample {sample.key!r} has no caption: data.stream.captions.fields={fields} hold "
            f"no text; its .txt has {len(sample.text)} characters, its .json has "
            f"{', '.join(sorted(sample.metadata)) or 'no keys'}"
        )
        raise DataError(message)
    return found


def choose_caption(sample: Sample, config: CaptionConfig, generator: np.random.Generator) -> str:
    """Draw one caption of a sample; the generator decides all that is left to chance.

    Raises:
        DataError: If the sample has no caption.
    """
    text = _with_tags(sample, config, _one_text(sample, config, generator), generator)
    if config.templates:
        template = config.templates[_draw_below(len(config.templates), generator)]
        text = template.replace("{}", text)
    return augment_text(text, config.augment, generator)


def _one_text(sample: Sample, config: CaptionConfig, generator: np.random.Generator) -> str:
    texts = caption_texts(sample, config)
    match config.many:
        case "choose":
            return texts[_draw_below(len(texts), generator)]
        case "longest":
            return max(texts, key=len)
        case "concatenate":
            return " ".join(texts)


def _with_tags(
    sample: Sample, config: CaptionConfig, text: str, generator: np.random.Generator
) -> str:
    tags = sample.metadata.get(config.tags_field) or []
    if not isinstance(tags, list):
        tags = [tags]
    weights = np.array([config.text, config.text_and_tags, config.tags])
    form = generator.choice(3, p=weights / weights.sum())
    if form == 0 or not tags:
        return text
    count = generator.integers(1, min(config.max_tags, len(tags)) + 1)
    chosen = ", ".join(str(tag) for tag in generator.permutation(tags)[:count])
    return f"{text}, {chosen}" if form == 1 else chosen


def _draw_below(count: int, generator: np.random.Generator) -> int:
    """0 without a draw where there is no choice, so that plain captions draw as ever."""
    return int(generator.integers(count)) if count > 1 else 0


def _values(sample: Sample, field: str) -> list[Any]:
    value = sample.text if field == TEXT_MEMBER else sample.metadata.get(field)
    values = value if isinstance(value, list) else [value]
    return [value for value in values if value is not None]


def _as_text(sample: Sample, field: str, value: Any, config: CaptionConfig) -> str:
    """A caption, or the name of a label."""
    if not config.label_names or field == TEXT_MEMBER or isinstance(value, bool):
        return str(value)
    if not isinstance(value, int):
        return str(value)
    if not 0 <= value < len(config.label_names):
        message = (
            f"sample {sample.key!r}: label {value} of {field!r} has no name, "
            f"data.stream.captions.label_names has {len(config.label_names)}"
        )
        raise DataError(message)
    return config.label_names[value]


def _lines(text: str, config: CaptionConfig) -> list[str]:
    lines = text.splitlines() if config.split_lines else [text]
    return [line.strip() for line in lines if line.strip()]

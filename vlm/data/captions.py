"""Which words of a sample the text tower reads this time."""

import numpy as np
from pydantic import Field, model_validator

from vlm.config import Config
from vlm.data.samples import Sample

__all__ = ["CaptionConfig", "choose_caption"]


class CaptionConfig(Config):
    """Relative frequencies of the forms a caption takes in training.

    Samples without tags always use their text.
    """

    text: float = Field(1.0, ge=0)
    """The `.txt` caption as it is."""
    text_and_tags: float = Field(0.0, ge=0)
    """The caption, a comma, then some of the tags."""
    tags: float = Field(0.0, ge=0)
    """Some of the tags alone."""
    tags_field: str = "tags"
    """Key of the tag list in a sample's `.json`."""
    max_tags: int = Field(4, ge=1)
    """Most tags drawn at a time, in random order."""

    @model_validator(mode="after")
    def _some_form_is_possible(self) -> "CaptionConfig":
        if self.text + self.text_and_tags + self.tags <= 0:
            message = "at least one of text, text_and_tags and tags must be above 0"
            raise ValueError(message)
        return self


def choose_caption(sample: Sample, config: CaptionConfig, generator: np.random.Generator) -> str:
    """Draw one caption of a sample; the generator decides form, tags and their order."""
    tags = sample.metadata.get(config.tags_field) or []
    if not isinstance(tags, list):
        tags = [tags]
    weights = np.array([config.text, config.text_and_tags, config.tags])
    form = generator.choice(3, p=weights / weights.sum())
    if form == 0 or not tags:
        return sample.text
    count = generator.integers(1, min(config.max_tags, len(tags)) + 1)
    chosen = ", ".join(str(tag) for tag in generator.permutation(tags)[:count])
    return f"{sample.text}, {chosen}" if form == 1 else chosen

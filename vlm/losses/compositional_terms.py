"""Terms with a memory of every sample: SogCLR, iSogCLR and FastCLIP-v3."""

import math
from typing import Literal

from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from vlm.losses.compositional import (
    Side,
    TemperatureRule,
    global_contrastive_loss,
    individual_contrastive_loss,
)
from vlm.losses.contrastive_term import ContrastiveTerm
from vlm.losses.memory import Remembered, SampleValues, initial_values
from vlm.losses.pairs import Pairs, negative_pairs
from vlm.losses.statistics import Statistics, contrastive_statistics
from vlm.types import Features

__all__ = ["FastclipV3Term", "IsogclrTerm", "SogclrTerm"]


class CompositionalTerm(ContrastiveTerm):
    """Base of the terms that follow each sample's denominator."""

    same_group: Literal["mask", "negative"] = "mask"
    gamma: float = Field(0.8, gt=0, le=1)
    """Weight of this batch in the moving averages, when it has come to rest."""
    gamma_fraction: float = Field(0.0, ge=0, le=1)
    """Fraction of training over which gamma falls to that from 1, along a cosine; 0 is at once."""
    epsilon: float = Field(1e-14, gt=0)
    """Added to the averages where they divide."""

    @property
    def sample_values(self) -> dict[str, float]:
        return {"log_image": -math.inf, "log_text": -math.inf}

    def compute(self, features: Features) -> tuple[Float[Tensor, ""], Statistics]:
        """The loss of a batch whose samples were never seen."""
        samples = initial_values(self.sample_values, features)
        value, statistics, _ = self.compute_remembering(features, samples, progress=0.0)
        return value, statistics

    def compute_remembering(
        self, features: Features, samples: SampleValues, *, progress: float
    ) -> Remembered:
        raise NotImplementedError

    def gamma_at(self, progress: float) -> float:
        if progress >= self.gamma_fraction:
            return self.gamma
        falling = 0.5 * (1 + math.cos(math.pi * progress / self.gamma_fraction))
        return falling * (1 - self.gamma) + self.gamma

    def pairs(self, features: Features) -> Pairs:
        groups = None if self.same_group == "negative" else features.group_ids
        return negative_pairs(groups, self.similar(features))


class SogclrTerm(CompositionalTerm):
    """Global contrastive loss at a fixed temperature; see `global_contrastive_loss`.

    The logit scale gets no gradient: `model.init_logit_scale` is the temperature's inverse.
    """

    type: Literal["sogclr"] = "sogclr"

    def compute_remembering(
        self, features: Features, samples: SampleValues, *, progress: float
    ) -> Remembered:
        return _with_one_temperature(self, features, samples, progress, rho=None)


class FastclipV3Term(CompositionalTerm):
    """Global contrastive loss that learns its temperature; see `global_contrastive_loss`."""

    type: Literal["fastclip_v3"] = "fastclip_v3"
    gamma: float = Field(0.2, gt=0, le=1)
    gamma_fraction: float = Field(0.5, ge=0, le=1)
    rho: float = Field(8.5, ge=0)
    """Pull towards a smaller temperature: 6.5 for 3M pairs, 8.5 for 12M, 16 for 400M."""

    def compute_remembering(
        self, features: Features, samples: SampleValues, *, progress: float
    ) -> Remembered:
        return _with_one_temperature(self, features, samples, progress, rho=self.rho)


class IsogclrTerm(CompositionalTerm):
    """A temperature for each image and each caption; see `individual_contrastive_loss`.

    The logit scale gets no gradient; serving uses `model.init_logit_scale`.
    """

    type: Literal["isogclr"] = "isogclr"
    rho: float = Field(6.0, ge=0)
    init_temperature: float = Field(0.01, gt=0, le=1)
    temperature_rate: float = Field(0.03, ge=0)
    """Step of a temperature along its averaged gradient."""
    lowest_temperature: float = Field(0.005, gt=0, le=1)

    @model_validator(mode="after")
    def _starts_within_its_range(self) -> "IsogclrTerm":
        if self.init_temperature < self.lowest_temperature:
            message = (
                f"init_temperature={self.init_temperature:g} lies under "
                f"lowest_temperature={self.lowest_temperature:g}: raise the one or lower the other"
            )
            raise ValueError(message)
        return self

    @property
    def sample_values(self) -> dict[str, float]:
        sides = [
            {f"log_{side}": -math.inf, f"temperature_{side}": self.init_temperature,
             f"momentum_{side}": 0.0}
            for side in ("image", "text")
        ]  # fmt: skip
        return sides[0] | sides[1]

    def compute_remembering(
        self, features: Features, samples: SampleValues, *, progress: float
    ) -> Remembered:
        before = [
            Side(
                samples[f"log_{side}"], samples[f"temperature_{side}"], samples[f"momentum_{side}"]
            )
            for side in ("image", "text")
        ]
        value, *after = individual_contrastive_loss(
            features.image,
            features.text,
            of_images=before[0],
            of_texts=before[1],
            gamma=self.gamma_at(progress),
            pairs=self.pairs(features),
            rho=self.rho,
            rule=TemperatureRule(rate=self.temperature_rate, lowest=self.lowest_temperature),
            epsilon=self.epsilon,
            share=features.share,
        )
        kept = {}
        for name, side in zip(("image", "text"), after, strict=True):
            kept[f"log_{name}"] = side.log_average
            kept[f"temperature_{name}"] = side.temperature
            kept[f"momentum_{name}"] = side.momentum
        statistics = {
            **contrastive_statistics(features, self.similar(features)),
            "image_temperature": after[0].temperature.mean(),
            "text_temperature": after[1].temperature.mean(),
        }
        value = value + 0.0 * features.logit_scale.sum()  # data parallelism wants every parameter
        return Remembered(value, statistics, kept)


def _with_one_temperature(
    term: CompositionalTerm,
    features: Features,
    samples: SampleValues,
    progress: float,
    *,
    rho: float | None,
) -> Remembered:
    value, log_image, log_text = global_contrastive_loss(
        features.image,
        features.text,
        features.logit_scale,
        log_image=samples["log_image"],
        log_text=samples["log_text"],
        gamma=term.gamma_at(progress),
        pairs=term.pairs(features),
        rho=rho,
        epsilon=term.epsilon,
        share=features.share,
    )
    statistics = contrastive_statistics(features, term.similar(features))
    return Remembered(value, statistics, {"log_image": log_image, "log_text": log_text})

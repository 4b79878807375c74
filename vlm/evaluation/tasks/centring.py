"""Taking the mean of each modality away, as a server may do at query time."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from vlm.evaluation.embed import EmbeddedDataset
from vlm.evaluation.model import Subject

__all__ = ["Means", "centred", "means_for"]

Origin = Literal["bundle", "dataset"]


@dataclass(frozen=True, kw_only=True)
class Means:
    """The mean unit row of each modality, and where it was taken."""

    image: Float[Tensor, " dim"]
    text: Float[Tensor, " dim"]
    origin: Origin


def means_for(subject: Subject, data: EmbeddedDataset) -> Means:
    """Those of the model's reference set; a model without is centred on the dataset itself.

    The second is more than a server can know of its queries, so results say which it was.
    """
    if subject.means is not None:
        image, text = torch.tensor(subject.means.image), torch.tensor(subject.means.text)
        return Means(image=image.double(), text=text.double(), origin="bundle")
    return Means(
        image=data.images.double().mean(dim=0),
        text=data.texts.double().mean(dim=0),
        origin="dataset",
    )


def centred(
    rows: Float[Tensor, "row dim"], mean: Float[Tensor, " dim"]
) -> Float[Tensor, "row dim"]:
    """Unit rows less their modality's mean, of unit length again.

    Source: norm(norm(e) - mu), the post-hoc correction of I0T (github.com/xfactlab/I0T).
    """
    return F.normalize(rows.double() - mean, dim=1)

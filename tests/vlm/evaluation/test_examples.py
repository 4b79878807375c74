import base64
import io

import torch
from PIL import Image

from tests.support import encoded
from tests.vlm.evaluation.fakes import fake_subject
from vlm.distributed import World
from vlm.evaluation.datasets import Item, OpenedDataset
from vlm.evaluation.embed import EmbeddedDataset
from vlm.evaluation.examples import Mistake, Query, Thumbnail
from vlm.evaluation.examples import mistakes as mistakes_of
from vlm.evaluation.examples import queries as queries_of
from vlm.evaluation.tasks import zero_shot_accuracy
from vlm.evaluation.tasks.base import Context
from vlm.evaluation.tasks.retrieval import RetrievalTask


def dataset(images: torch.Tensor, texts: torch.Tensor, concepts: str) -> EmbeddedDataset:
    """Samples named s0, s1, ...; each letter of `concepts` is one sample's concept."""
    pixel = encoded(Image.new("RGBA", (8, 8), (255, 0, 0, 0)))
    keys = [f"s{i}" for i in range(len(concepts))]
    items = [Item(key=key, image=pixel, texts=(key,)) for key in keys]
    return EmbeddedDataset(
        source=OpenedDataset(
            location="drawn", count=len(keys), read=lambda start, stop: iter(items[start:stop])
        ),
        keys=keys,
        captions=[(key,) for key in keys],
        metadata=[{"concept": concept} for concept in concepts],
        images=images,
        texts=texts,
        text_images=torch.arange(len(keys)),
    )


def mistakes(data: EmbeddedDataset, class_rows: torch.Tensor, field: str) -> list[Mistake]:
    return mistakes_of(data, zero_shot_accuracy(data.images, class_rows, data.groups(field)))


def queries(data: EmbeddedDataset, field: str | None) -> dict[str, list[Query]]:
    context = Context(subject=fake_subject(), datasets={"d": data}, world=World(), seed=0)
    task = RetrievalTask(data="d", group_field=field)
    return queries_of(data, task.measure(context), field)


def pixel_of(thumbnail: Thumbnail) -> tuple[int, ...]:
    data = base64.b64decode(thumbnail.source.partition(",")[2])
    with Image.open(io.BytesIO(data)) as image:
        value = image.convert("RGB").getpixel((4, 4))
    assert isinstance(value, tuple)
    return value


def test_mistakes_are_named_by_first_sample_of_each_class_and_the_surest_comes_first() -> None:
    # Class a = row 0, b = row 1. Samples: a right, b slightly wrong, b badly wrong, a right.
    images = torch.tensor([[1.0, 0.0], [0.8, 0.6], [1.0, 0.0], [1.0, 0.0]])
    found = mistakes(dataset(images, images, "abba"), torch.eye(2), "concept")
    assert [m.image.label for m in found] == ["s2", "s1"]
    assert [m.taken_for.label for m in found if m.taken_for] == ["s0", "s0"]
    assert [round(m.margin, 6) for m in found] == [1.0, 0.2]


def test_a_model_that_is_always_right_shows_no_mistakes_and_no_late_finds() -> None:
    rows = torch.eye(3)
    data = dataset(rows, rows, "abc")
    assert mistakes(data, torch.eye(3), "concept") == []
    found = queries(data, None)
    assert list(found) == ["found at once"]
    assert [query.rank for query in found["found at once"]] == [1, 1, 1]


def test_a_query_shows_its_first_images_and_marks_those_of_its_concept() -> None:
    images = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.8, 0.6]])
    texts = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    found = queries(dataset(images, texts, "aba"), "concept")
    (late,) = found["found last"]
    assert (late.text, late.rank) == ("s1", 3)
    assert [(hit.label, hit.right) for hit in late.hits] == [
        ("s0", False),
        ("s2", False),
        ("s1", True),
    ]
    assert [hit.right for hit in found["found at once"][0].hits] == [True, True, False]


def test_thumbnails_lay_transparency_over_white_as_the_model_sees_it() -> None:
    rows = torch.eye(2)
    hit = queries(dataset(rows, rows, "ab"), None)["found at once"][0].hits[0]
    assert min(pixel_of(hit)) >= 250

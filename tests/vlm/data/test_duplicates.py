import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.support import drawing
from vlm.data.duplicates import (
    HASH_DTYPE,
    Likeness,
    connected_groups,
    distinct_rows,
    keep_first,
    near_any,
    near_groups,
    near_pairs,
    perceptual_hash,
)
from vlm.data.manifest import open_manifest
from vlm.data.reader import Reader
from vlm.preprocess import decode_picture

EMOJI = Path(__file__).parents[3] / "data/emoji/shards/train"


def random_hashes(count: int, *, seed: int, copies: int = 3) -> np.ndarray:
    """Random hashes, each with copies in which a few bits and levels differ."""
    generator = np.random.default_rng(seed)
    hashes = np.zeros(count * (copies + 1), dtype=HASH_DTYPE)
    hashes["bits"] = np.tile(generator.integers(0, 2**64, count, dtype=np.uint64), copies + 1)
    levels = np.tile(generator.integers(20, 235, (count, 12)), (copies + 1, 1))
    for row in range(count, len(hashes)):
        for bit in generator.choice(64, generator.integers(0, 10), replace=False):
            hashes["bits"][row] ^= np.uint64(1) << np.uint64(bit)
    levels[count:] += generator.integers(-8, 9, levels[count:].shape)
    hashes["colours"] = levels
    return hashes[generator.permutation(len(hashes))]


def brute_force(one: np.ndarray, other: np.ndarray, likeness: Likeness) -> np.ndarray:
    """[one other], whether each of one is near each of the other."""
    near = np.zeros((len(one), len(other)), dtype=bool)
    for row, a in enumerate(one):
        for column, b in enumerate(other):
            distance = (int(a["bits"]) ^ int(b["bits"])).bit_count()
            levels = max(
                abs(int(p) - int(q)) for p, q in zip(a["colours"], b["colours"], strict=True)
            )
            near[row, column] = (
                distance <= likeness.max_distance and levels <= likeness.max_colour_difference
            )
    return near


distances = st.sampled_from([0, 1, 2, 4, 7, 10])
differences = st.sampled_from([0, 6, 255])


@given(seed=st.integers(0, 1000), distance=distances, difference=differences)
def test_near_pairs_are_those_of_comparing_all_pairs(
    seed: int, distance: int, difference: int
) -> None:
    hashes = random_hashes(6, seed=seed)
    likeness = Likeness(max_distance=distance, max_colour_difference=difference)
    found = set()
    for left, right in near_pairs(hashes, likeness):
        found |= {(min(p), max(p)) for p in zip(left.tolist(), right.tolist(), strict=True)}
    rows, columns = np.nonzero(np.triu(brute_force(hashes, hashes, likeness), k=1))
    expected = set(zip(rows.tolist(), columns.tolist(), strict=True))
    assert found == expected


@given(seed=st.integers(0, 1000), distance=distances, difference=differences)
def test_rows_near_to_another_set_are_those_of_comparing_all(
    seed: int, distance: int, difference: int
) -> None:
    hashes = random_hashes(8, seed=seed)
    one, other = hashes[:20], hashes[20:]
    likeness = Likeness(max_distance=distance, max_colour_difference=difference)
    expected = brute_force(one, other, likeness).any(axis=1)
    assert near_any(one, other, likeness).tolist() == expected.tolist()


def test_planted_neighbours_are_found_among_many() -> None:
    generator = np.random.default_rng(0)
    hashes = np.zeros(50_000, dtype=HASH_DTYPE)
    hashes["bits"] = generator.integers(0, 2**64, len(hashes), dtype=np.uint64)
    for row in range(100):  # 4 bits away each, so far that chance pairs do not occur
        flips = sum(1 << int(bit) for bit in generator.choice(64, 4, replace=False))
        hashes["bits"][-1 - row] = hashes["bits"][row] ^ np.uint64(flips)
    groups = near_groups(hashes, Likeness(max_distance=4))
    expected = np.arange(len(hashes))
    expected[-100:] = np.arange(100)[::-1]
    assert groups.tolist() == expected.tolist()


def test_a_chain_of_near_images_is_one_group_named_by_its_first_row() -> None:
    hashes = np.zeros(5, dtype=HASH_DTYPE)
    hashes["bits"] = [0b1111_0000, 2**60 - 1, 0b1100_0000, 0, 0b1111_0000]
    assert near_groups(hashes, Likeness(max_distance=2)).tolist() == [0, 1, 0, 0, 0]


@given(
    count=st.integers(1, 30),
    pairs=st.lists(st.tuples(st.integers(0, 29), st.integers(0, 29)), max_size=40),
    pieces=st.integers(1, 4),
)
def test_connected_groups_are_those_of_a_plain_flood(
    count: int, pairs: list[tuple[int, int]], pieces: int
) -> None:
    pairs = [(a % count, b % count) for a, b in pairs]
    expected = list(range(count))
    for _ in range(count):
        for a, b in pairs:
            expected[a] = expected[b] = min(expected[a], expected[b])
    arrays = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    parts = [(part[:, 0], part[:, 1]) for part in np.array_split(arrays, pieces)]
    assert connected_groups(count, parts).tolist() == expected


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=0, max_size=30))
def test_distinct_rows_name_the_first_of_each_value(values: list[tuple[int, int]]) -> None:
    columns = np.array(values, dtype=np.int64).reshape(-1, 2)
    firsts, which = distinct_rows(columns[:, 0], columns[:, 1])
    assert firsts[which].tolist() == [values.index(value) for value in values]
    assert len(firsts) == len(set(values))


def test_the_first_that_is_alive_of_each_group_is_kept() -> None:
    groups = np.array([0, 0, 2, 0, 2, 5])
    alive = np.array([False, True, True, True, True, False])
    kept = keep_first(groups, alive)
    assert kept.tolist() == [False, True, True, False, False, False]


def recoded(image: Image.Image) -> list[Image.Image]:
    """The image as JPEG of quality 80, and at half its size."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    half = (image.width // 2, image.height // 2)
    return [
        Image.open(io.BytesIO(buffer.getvalue())).convert("RGB"),
        image.resize(half, Image.Resampling.BICUBIC),
    ]


def are_near(one: Image.Image, other: Image.Image) -> bool:
    pair = np.array([perceptual_hash(one), perceptual_hash(other)])
    return near_groups(pair, Likeness()).tolist() == [0, 0]


def blots(seed: int) -> Image.Image:
    """Smooth random colours, as unlike as photographs."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((160, 120), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("seed", range(20))
def test_compressed_and_halved_images_stay_near_and_others_do_not(seed: int) -> None:
    image = blots(seed)
    assert all(are_near(image, again) for again in recoded(image))
    assert not are_near(image, blots(seed + 1))


def test_symmetric_drawings_stay_near_too() -> None:
    # Half of their coefficients are zero; their signs alone would be noise.
    for shape in ("circle", "square"):
        image = drawing("red", shape, size=128)
        assert all(are_near(image, again) for again in recoded(image))


def test_drawings_of_one_outline_differ_by_colour() -> None:
    red, blue = (drawing(colour, "circle", size=128) for colour in ("red", "blue"))
    assert not are_near(red, blue)
    assert are_near(red, red.resize((77, 91)))


def test_a_flat_image_has_the_bit_of_its_mean_alone() -> None:
    white = perceptual_hash(Image.new("RGB", (50, 40), "white"))
    black = perceptual_hash(Image.new("RGB", (50, 40), "black"))
    assert (int(white["bits"]).bit_count(), int(black["bits"])) == (1, 0)
    assert white["colours"].tolist() == [255] * 12


@pytest.mark.skipif(not EMOJI.is_dir(), reason="needs the fetched emoji: vlm data fetch emoji")
def test_real_drawings_stay_near_when_recoded_and_most_differ() -> None:
    manifest = open_manifest(EMOJI)
    with Reader(manifest) as reader:
        images = [
            decode_picture(reader.read(row).image) for row in range(0, manifest.num_samples, 50)
        ]
    assert sum(are_near(image, again) for image in images for again in recoded(image)) == 2 * len(
        images
    )
    hashes = np.array([perceptual_hash(image) for image in images])
    groups = near_groups(hashes, Likeness())
    assert len(np.unique(groups)) >= 0.97 * len(images)

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import drawn_samples, reasons_of, samples_of
from vlm.data.samples import Sample
from vlm.data.sources.protocol import BadSample
from vlm.data.sources.table import TableSource, open_table
from vlm.errors import DataError

ROWS: list[dict[str, Any]] = [
    {"filepath": "0.png", "caption": "a red circle, big", "license": "CC0"},
    {"filepath": "1.png", "caption": "a green circle", "license": "CC0"},
]


def written_table(folder: Path, suffix: str, rows: list[dict[str, Any]]) -> Path:
    path = folder / f"pairs{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(
                file, list(rows[0]), delimiter="\t" if suffix == ".tsv" else ","
            )
            writer.writeheader()
            writer.writerows(rows)
    return path


def opened_table(folder: Path, suffix: str, rows: list[dict[str, Any]]) -> TableSource:
    return open_table(written_table(folder, suffix, rows), scratch=folder / "scratch")


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_every_kind_of_table_gives_the_same_samples(tmp_path: Path, suffix: str) -> None:
    for number, sample in enumerate(drawn_samples(2)):
        (tmp_path / f"{number}.png").write_bytes(sample.image)
    found = samples_of(opened_table(tmp_path, suffix, ROWS))
    assert [s.text for s in found] == ["a red circle, big", "a green circle"]
    assert [s.image for s in found] == [s.image for s in drawn_samples(2)]
    assert found[0].metadata == {"license": "CC0"}


def test_parquet_may_hold_the_images_themselves(tmp_path: Path) -> None:
    image = drawn_samples(1)[0].image
    rows = [{"image": {"bytes": image, "path": None}, "text": "x"}]
    (found,) = samples_of(opened_table(tmp_path, ".parquet", rows))
    assert found.image == image


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@given(bounds=st.tuples(st.integers(0, 2500), st.integers(0, 2500)))
@settings(deadline=None, max_examples=20)
def test_any_stretch_of_a_table_is_read_as_if_all_of_it_were(
    long_tables: dict[str, TableSource], suffix: str, bounds: tuple[int, int]
) -> None:
    start, stop = min(bounds), max(bounds)
    found = long_tables[suffix].read(start, stop)
    assert [(s.key, s.reason) for s in found if isinstance(s, BadSample)] == [
        (f"{row:04d}", f"column 'image': cannot read image 'n{row}' (No such file or directory)")
        for row in range(start, stop)
    ]


@pytest.fixture(scope="module")
def long_tables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TableSource]:
    """2,500 rows in blocks and row groups that end at other places than batches do."""
    folder = tmp_path_factory.mktemp("tables")
    rows = [{"image": f"n{row}", "caption": "x"} for row in range(2500)]
    written_table(folder, ".csv", rows)
    pq.write_table(pa.Table.from_pylist(rows), folder / "pairs.parquet", row_group_size=333)
    return {
        suffix: open_table(folder / f"pairs{suffix}", scratch=folder / "scratch")
        for suffix in (".csv", ".parquet")
    }


def test_parquet_is_read_by_the_row_groups_that_are_needed(tmp_path: Path) -> None:
    rows = [{"image": b"x" * 100, "caption": f"row {row}"} for row in range(30)]
    path = tmp_path / "x.parquet"
    pq.write_table(
        pa.Table.from_pylist(rows), path, row_group_size=10, use_dictionary=False, compression=None
    )
    data = bytearray(path.read_bytes())
    with pq.ParquetFile(path) as file:
        group = file.metadata.row_group(2)
        begin = group.column(0).data_page_offset
    data[begin : begin + group.total_byte_size] = b"\xff" * group.total_byte_size
    path.write_bytes(data)
    source = open_table(path, scratch=tmp_path)
    texts = [s.text for s in source.read(5, 20) if isinstance(s, Sample)]
    assert texts == [f"row {row}" for row in range(5, 20)]
    with pytest.raises(DataError, match=r"x\.parquet: cannot be read at rows 19 to 21"):
        list(source.read(19, 21))


def test_a_table_without_the_column_lists_those_it_has(tmp_path: Path) -> None:
    path = written_table(tmp_path, ".csv", ROWS)
    with pytest.raises(
        DataError, match="no caption column, looked for alt; the table has filepath, "
    ):
        open_table(path, scratch=tmp_path / "scratch", caption_column="alt")
    assert not (tmp_path / "scratch").exists()


def test_a_row_that_names_no_image_is_told(tmp_path: Path) -> None:
    source = opened_table(tmp_path, ".csv", ROWS)
    assert source.where(1) == f"{tmp_path / 'pairs.csv'}: row 1"
    assert reasons_of(source)["1"] == (
        "column 'filepath': cannot read image '1.png' (No such file or directory)"
    )


def test_a_row_without_caption_is_told(tmp_path: Path) -> None:
    source = opened_table(tmp_path, ".jsonl", [{"image": "x.png", "caption": " "}])
    assert reasons_of(source) == {"0": "column 'caption': no caption, ' '"}


def test_a_file_that_is_no_table_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(b"no")
    with pytest.raises(DataError, match=r"x\.parquet: cannot be read as a table"):
        open_table(tmp_path / "x.parquet", scratch=tmp_path)

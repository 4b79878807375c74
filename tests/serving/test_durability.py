from pathlib import Path

import pytest

from tests.serving.durability import searches_while_written, survives


@pytest.mark.slow
def test_no_acknowledged_step_is_lost_and_none_is_half_done_when_the_writer_is_killed(
    tmp_path: Path,
) -> None:
    assert survives(str(tmp_path), 4) > 4


def test_no_search_fails_while_items_are_written_indexed_and_moved(tmp_path: Path) -> None:
    assert searches_while_written(str(tmp_path), 600) > 3

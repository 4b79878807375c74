from pathlib import Path

import pytest

from tests.serving.durability import survives


@pytest.mark.slow
def test_no_acknowledged_step_is_lost_and_none_is_half_done_when_the_writer_is_killed(
    tmp_path: Path,
) -> None:
    assert survives(tmp_path, 4) > 4

import pytest

from vlm.losses import tiled


@pytest.fixture(params=[1, 5, 23, 64], ids="tile{}".format)
def tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    side: int = request.param
    monkeypatch.setattr(tiled, "_CPU_TILE", side)
    return side

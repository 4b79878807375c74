import asyncio
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from serving.services import label_sets
from serving.services.label_sets import Calibration, LabelClass, LabelSet, LabelSets
from tests.serving.wire import data_url, picture, problem
from vlm.inference.temperature import TEMPERATURE_RANGE

SETS = "/v1/label-sets"
CALIBRATION: dict[str, Any] = {
    "temperature": 1, "none_threshold": None, "mode": "exclusive", "num_samples": 9, "num_none": 0,
    "accuracy": 1, "ece_before": 0, "ece_after": 0,
}  # fmt: skip


@pytest.fixture
def folder(client: TestClient) -> Path:
    app = client.app
    assert isinstance(app, FastAPI)
    found: Path = app.state.services.settings.label_sets_folder
    found.mkdir(exist_ok=True)
    return found


def classified(client: TestClient, name: str) -> Any:
    return client.post("/v1/classify", json={"images": [data_url(picture())], "label_set": name})


def stored(*, calibration: dict[str, Any] | None = None, **change: Any) -> str:
    fingerprint = "0" * 64
    calibrations = {} if calibration is None else {fingerprint: {**CALIBRATION, **calibration}}
    return json.dumps(
        {"classes": [{"label": "a"}, {"label": "b"}], "calibrations": calibrations, **change}
    )


@pytest.mark.parametrize(
    "text",
    [
        b"{",
        b"\xff\xfe{}",
        b'{"classes": [{"label": "\xff"}]}',
        b"[" * 100_000,
        stored(classes=[]),
        stored(classes=[{"label": "a"}, {"label": "a"}]),
        stored(classes=[{"label": ""}]),
        stored(classes=[{"label": "a", "prompts": []}]),
        stored(classes=[{"label": "a", "images": ["no base64"]}]),
        stored(classes=[{"label": "a", "images": ["AAA"]}]),
        stored(classes=[{"label": "a", "image_weight": float("nan")}]),
        stored(templates=[]),
        stored(templates=["no place"]),
        stored(none_threshold=float("nan")),
        *(
            stored(calibration={"temperature": t})
            for t in (0, -1, 1e-320, 21, float("nan"), float("inf"))
        ),
        stored(calibration={"none_threshold": 1.5}),
        stored(calibration={"accuracy": float("nan")}),
        stored(calibration={"ece_after": -1}),
        stored(calibration={"num_samples": -1}),
    ],
)
def test_a_file_that_is_damaged_is_said_to_be_and_can_be_replaced(
    client: TestClient, folder: Path, text: str | bytes
) -> None:
    file = folder / "x.json"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    said = "label set 'x': its file is damaged; store it again"
    assert problem(client.get(f"{SETS}/x"), 422) == said
    assert problem(classified(client, "x"), 422) == said
    assert client.put(f"{SETS}/x", json={"classes": ["a", "b"]}).status_code == 200
    assert classified(client, "x").status_code == 200
    assert client.delete(f"{SETS}/x").status_code == 204


def test_the_limits_of_a_fitted_temperature_are_no_damage(client: TestClient, folder: Path) -> None:
    for temperature in (TEMPERATURE_RANGE[0] * (1 - 1e-9), TEMPERATURE_RANGE[1] * (1 + 1e-9)):
        (folder / "x.json").write_text(stored(calibration={"temperature": temperature}))
        assert client.get(f"{SETS}/x").status_code == 200
    client.delete(f"{SETS}/x")


def looped(path: Path) -> None:
    path.symlink_to(path)


def to_a_folder(path: Path) -> None:
    path.symlink_to(path.parent, target_is_directory=True)


@pytest.mark.parametrize("place", [looped, to_a_folder, os.mkfifo])
def test_what_is_no_file_is_said_to_be_damaged_and_can_be_replaced(
    client: TestClient, folder: Path, place: Callable[[Path], None]
) -> None:
    place(folder / "x.json")
    assert client.get(SETS).json() == {"label_sets": ["x"]}
    assert "damaged; store it again" in problem(client.get(f"{SETS}/x"), 422)
    assert "damaged; store it again" in problem(classified(client, "x"), 422)
    assert client.put(f"{SETS}/x", json={"classes": ["a", "b"]}).status_code == 200
    assert classified(client, "x").status_code == 200
    assert client.delete(f"{SETS}/x").status_code == 204


def test_a_folder_in_the_place_of_a_file_is_left_alone(client: TestClient, folder: Path) -> None:
    (folder / "x.json").mkdir()
    assert "damaged" in problem(client.get(f"{SETS}/x"), 422)
    assert "damaged" in problem(classified(client, "x"), 422)
    for answer in (
        client.put(f"{SETS}/x", json={"classes": ["a"]}),
        client.delete(f"{SETS}/x"),
    ):
        said = problem(answer, 422)
        assert "label set 'x': a folder lies in the place of its file" in said
        assert str(folder) not in said
    assert [path.name for path in folder.iterdir()] == ["x.json"]  # no draft is left
    (folder / "x.json").rmdir()


def test_a_version_is_computed_once_and_off_the_event_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = []
    compute = label_sets._versioned

    def watched(label_set: LabelSet) -> label_sets.VersionedSet:
        threads.append(threading.current_thread())
        return compute(label_set)

    monkeypatch.setattr(label_sets, "_versioned", watched)

    async def use() -> None:
        sets = LabelSets(tmp_path / "sets")
        first = await sets.put("x", LabelSet(classes=[LabelClass(label="a")]))
        assert len(threads) == 1
        found = await sets.get("x")
        assert (found, len(threads)) == (first, 2)
        for _ in range(3):
            assert await sets.get("x") is found
        assert len(threads) == 2
        assert threading.current_thread() not in threads
        await sets.calibrate("x", first.version, "model", Calibration(**CALIBRATION))
        calibrated = await sets.get("x")
        assert calibrated.version == first.version
        assert list(calibrated.label_set.calibrations) == ["model"]
        second = await sets.put("x", LabelSet(classes=[LabelClass(label="b")]))
        assert (await sets.get("x")).version == second.version != first.version

    asyncio.run(use())


def test_versions_are_those_of_earlier_releases(tmp_path: Path) -> None:
    label_set = LabelSet(classes=[LabelClass(label="é", images=["AAAA"])], templates=["a {}"])
    found = asyncio.run(label_sets.with_version(label_set))
    assert found.version == ("3d401fd402e473d0c73d4a70be7d5fdc284de5617b6c736c1431b16f8c126392")

"""Collections that are made, removed and used at once, by one real server process."""

import random
import time
from collections import Counter
from pathlib import Path

import httpx

from tests.serving.conftest import asking, running

_SECONDS = 6
_CLIENTS = 6


def test_what_is_removed_while_it_is_used_is_a_404_or_a_409_and_no_defect(
    bundle: Path, tmp_path: Path
) -> None:
    """It was dozens of 503 and some 500: files that were gone were taken for damaged ones."""
    answers: Counter[tuple[str, int]] = Counter()
    draws = [random.Random(number) for number in range(_CLIENTS)]

    def ask(client: httpx.Client, number: int) -> None:
        draw = draws[number]
        name = draw.choice(["one", "two"])
        place = f"/v1/collections/{name}"
        item = {"id": str(draw.randrange(20)), "text": "red"}
        method, path, body = draw.choice(
            [
                ("PUT", place, None),
                ("PUT", place, None),  # as often as what needs one
                ("DELETE", place, None),
                ("POST", f"/v1/items?collection={name}", {"items": [item]}),
                ("POST", f"/v1/items?collection={name}", {"items": [item]}),
                ("GET", f"/v1/items?collection={name}", None),
                ("DELETE", f"/v1/items/{item['id']}?collection={name}", None),
                ("POST", "/v1/search", {"text": "red", "collection": name}),
                ("POST", "/v1/search", {"text": "a", "words": "red", "collection": name}),
                ("POST", "/v1/search", {"text": "red", "collection": "alias"}),
                ("PUT", "/v1/collections/alias/alias", {"collection": name}),
                ("DELETE", "/v1/collections/alias/alias", None),
                ("GET", f"{place}/map", None),
                ("POST", f"{place}/measure", None),
            ]
        )
        answer = client.request(method, path, json=body)
        if answer.status_code == 422:  # there is nothing to measure
            assert "is empty" in answer.text
            return
        answers[f"{method} {path.partition('?')[0]}", answer.status_code] += 1

    with running(f"bundle={bundle}", f"index={tmp_path / 'index'}") as server:
        with asking(server, _CLIENTS, ask):
            time.sleep(_SECONDS)
        for name in ("one", "two"):
            assert server.client.put(f"/v1/collections/{name}").status_code == 200
            found = server.client.post("/v1/search", json={"text": "red", "collection": name})
            assert found.status_code == 200
    unexpected = {
        key: count for key, count in answers.items() if key[1] not in (200, 201, 204, 404, 409)
    }
    assert not unexpected
    assert {status for _, status in answers} >= {200, 201, 204, 404}
    told = [line for line in server.output if line.startswith(("ERROR", "Traceback"))]
    assert not told

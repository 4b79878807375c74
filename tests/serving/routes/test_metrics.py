import re

from fastapi.testclient import TestClient

from tests.serving.wire import data_url, picture


def value(client: TestClient, sample: str) -> float:
    """The value of one line of the exposition; 0 before it first appears."""
    text = client.get("/metrics").text
    found = re.search(rf"^{re.escape(sample)} (\S+)$", text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def test_requests_batches_and_stages_are_counted(client: TestClient) -> None:
    samples = {
        'vlm_request_seconds_count{method="POST",route="/v1/embeddings",status="200"}': 1,
        'vlm_batch_items_sum{tower="text"}': 2,
        'vlm_batch_items_sum{tower="image"}': 1,
        'vlm_stage_seconds_count{stage="decode"}': 1,
        'vlm_stage_seconds_count{stage="wait"}': 3,
        'vlm_stage_seconds_count{stage="image"}': 1,
        'vlm_cache_lookups_total{kind="text",result="miss"}': 2,
        'vlm_cache_lookups_total{kind="image",result="miss"}': 1,
    }
    before = {sample: value(client, sample) for sample in samples}
    client.post("/v1/embeddings", json={"input": ["red", "blue", data_url(picture())]})
    after = {sample: value(client, sample) for sample in samples}
    assert {sample: after[sample] - before[sample] for sample in samples} == samples
    assert value(client, 'vlm_queue_items{tower="text"}') == 0
    client.post("/v1/embeddings", json={"input": ["red", "blue", data_url(picture())]})
    assert (
        value(client, 'vlm_batch_items_sum{tower="text"}')
        == after['vlm_batch_items_sum{tower="text"}']
    )
    assert value(client, 'vlm_cache_lookups_total{kind="image",result="hit"}') == 1
    assert value(client, "vlm_cache_bytes") > 3 * 16 * 4


def test_refusals_are_counted_by_status_and_mistakes_are_not(client: TestClient) -> None:
    sample = 'vlm_refusals_total{status="415"}'
    before = value(client, sample)
    client.post("/v1/embeddings", content="x", headers={"content-type": "text/plain"})
    client.post("/v1/embeddings", json={})
    assert value(client, sample) == before + 1
    assert value(client, 'vlm_refusals_total{status="422"}') == 0


def test_no_client_can_make_labels_without_end(client: TestClient) -> None:
    for number in range(5):
        client.get(f"/v1/items/absent-{number}")
        client.get(f"/nowhere/{number}")
        client.request(f"METHOD{number}", "/healthz")
    text = client.get("/metrics").text
    assert "absent-" not in text
    assert "nowhere" not in text
    assert "METHOD" not in text
    assert 'route="/v1/items/{item_id:path}",status="404"' in text


def test_the_model_and_its_runtime_are_told(client: TestClient) -> None:
    text = client.get("/metrics").text
    assert re.search(r'^vlm_model_info\{.*name="tiny".*runtime="torch-fp32".*\} 1\.0$', text, re.M)
    assert client.get("/metrics").headers["content-type"].startswith("text/plain; version=0.0.4")

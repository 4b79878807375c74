"""The client and the verbs that ask: a server process and a bundle in this one say the same."""

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from typer.testing import CliRunner

from serving.stores import EmbeddedStore, Item
from tests.serving.conftest import Server, running
from tests.serving.wire import picture
from tests.support import drawing
from vlm.cli.main import app
from vlm.cli.search import _filter
from vlm.client import AsyncClient, Client, ClientError, Shown, _parts
from vlm.errors import ConfigError, DataError, VlmError
from vlm.inference import Encoder

TEXTS = [f"text {n}" for n in range(40)]


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / "red.png", tmp_path / "blue.jpg"]  # the name says nothing
    for path, colour in zip(paths, ("red", "blue"), strict=True):
        path.write_bytes(picture(colour))
    return paths


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    with Client(server.url) as client:
        yield client


def run(*arguments: object, **options: Any) -> str:
    """What a verb prints; its errors are raised."""
    done = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False, **options)
    assert done.exit_code == 0, done.output
    return done.output


def test_both_clients_embed_more_than_one_request_holds(
    server: Server, client: Client, encoder: Encoder, pictures: list[Path]
) -> None:
    inputs: list[str | Path | bytes] = [*TEXTS, pictures[0], picture("blue")]
    images = encoder.encode_images([drawing("red", "circle"), drawing("blue", "circle")])
    expected = np.concatenate([encoder.encode_texts(TEXTS), images])
    np.testing.assert_allclose(client.embed(inputs), expected, atol=1e-5)

    async def ask() -> tuple[np.ndarray, list[str]]:
        async with AsyncClient(server.url, model="tiny") as found:
            shown = await found.classify([pictures[0]], labels=["red", "blue"])
            assert sum(entry.probability for entry in shown[0].labels) == pytest.approx(1)
            assert isinstance(await found.search("red", limit=1), list)
            with pytest.raises(ClientError, match="writes no captions"):
                await found.caption([pictures[0]])
            return await found.embed(inputs), await found.models()

    rows, models = asyncio.run(ask())
    np.testing.assert_allclose(rows, expected, atol=1e-5)
    assert models == client.models() == ["tiny"]


@pytest.mark.parametrize(
    ("lengths", "parts"),
    [
        ([1] * 33, [(0, 16), (16, 32), (32, 33)]),
        ([3 * 2**20] * 4, [(0, 2), (2, 4)]),  # each eight MiB and less
        ([1, 40 * 2**20, 1], [(0, 1), (1, 2), (2, 3)]),  # one alone may be too long
        ([], [(0, 0)]),
    ],
)
def test_a_request_holds_no_more_than_a_careful_server_takes(
    lengths: list[int], parts: list[tuple[int, int]]
) -> None:
    entries = ["x" * length for length in lengths]
    assert [(part.start, part.stop) for part in _parts(entries)] == parts


def test_many_inputs_never_fill_the_queue_of_the_server_by_themselves(
    bundle: Path, tmp_path: Path, pictures: list[Path]
) -> None:
    settings = (f"bundle={bundle}", f"index={tmp_path / 'i'}", "max_images=16", "max_waiting=64")
    with running(*settings) as found:
        texts = [f"text {n}" for n in range(600)]

        async def ask() -> tuple[np.ndarray, list[Shown]]:
            async with AsyncClient(found.url, retries=0) as client:
                shown = await client.classify(pictures * 10, labels=["red", "blue"])
                return await client.embed(texts), shown

        rows, shown = asyncio.run(ask())
        assert (len(rows), len(shown)) == (600, 20)
        with Client(found.url) as client, pytest.raises(ClientError, match="nothing to embed"):
            client.embed([])


def test_refusals_are_told_in_the_servers_words(client: Client, tmp_path: Path) -> None:
    with pytest.raises(ClientError, match=r"answered 422: images.0: not a readable image"):
        client.classify([b"nothing"], labels=["a"])
    spoiled = tmp_path / "spoiled.png"
    spoiled.write_bytes(b"nothing")
    for call in (lambda: client.embed(["a", spoiled]), lambda: client.search(spoiled)):
        with pytest.raises(ClientError, match=r"422: /.*spoiled.png: not a readable image"):
            call()
    other = Client(str(client._http.base_url), model="x")
    with other:
        for call in (lambda: other.embed(["a"]), lambda: other.search("a")):
            with pytest.raises(ClientError, match="no model is called 'x'"):
                call()
    with pytest.raises(ClientError, match=r"absent.png: cannot be read \(No such file"):
        client.caption([tmp_path / "absent.png"])
    nowhere = Client("http://127.0.0.1:1")
    with nowhere, pytest.raises(ClientError, match="is the server there"):
        nowhere.models()
    bare = Client("127.0.0.1:8000")
    with bare, pytest.raises(ClientError, match="an address begins with http"):
        bare.models()


def test_what_no_request_can_hold_is_told_before_it_is_sent(client: Client) -> None:
    with pytest.raises(ClientError, match="inputs is one str; give a list of them"):
        client.embed("red")
    with pytest.raises(ClientError, match=r"/v1/embeddings: what was given cannot be sent as JSON"):
        client.embed(["\ud800"])
    with pytest.raises(ClientError, match=r"/v1/search: what was given cannot be sent as JSON"):
        client.search("red", filter={"year": {"gte": float("nan")}})
    for key in ("schl\u00fcssel", "two\nlines"):
        with pytest.raises(ClientError, match="characters that no header can carry"):
            Client("http://127.0.0.1:1", key=key)


WRONG = {
    "embed(None)": "inputs is one NoneType; give a list of them",
    "embed(text for text in 'ab')": "inputs is one generator; give a list of them",
    "embed(['red', None])": "inputs.1 is a NoneType; a text is str, an image is a Path or bytes",
    "classify(None, labels=['a'])": "images is one NoneType; give a list of them",
    "classify(['red.png'], labels=['a'])": "images.0 is a str; an image is a Path or bytes",
    "caption(['red.png'])": "images.0 is a str; an image is a Path or bytes",
    "search(None)": "the query is a NoneType; a text is str, an image is a Path or bytes",
}


def test_what_is_of_another_type_is_told_with_what_is_allowed() -> None:
    # In a process of its own: here types are checked before the client sees them.
    lines = ["from vlm.client import Client, ClientError", "client = Client('http://127.0.0.1:1')"]
    for call in WRONG:
        lines += ["try:", f"    client.{call}", "except ClientError as error:", "    print(error)"]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines() == list(WRONG.values()), done.stderr


def test_a_busy_server_is_asked_again_as_often_as_allowed_and_not_more() -> None:
    answers: list[int] = []

    def busy(request: httpx.Request) -> httpx.Response:
        answers.append(503)
        if len(answers) < 3:
            return httpx.Response(503, headers={"retry-after": "0"}, json={"detail": "full"})
        return httpx.Response(200, json={"data": [{"id": "m"}]})

    for retries in (2, 1):
        answers.clear()
        client = Client("http://x.example", retries=retries)
        client.close()
        client._http = httpx.Client(
            base_url="http://x.example", transport=httpx.MockTransport(busy)
        )
        if retries == 2:
            assert client.models() == ["m"]
        else:
            with pytest.raises(ClientError, match="answered 503: full"):
                client.models()
        client.close()


def test_classify_says_the_same_with_a_server_and_without(
    server: Server, bundle: Path, pictures: list[Path]
) -> None:
    options = ["classify", *pictures, "--labels", "red, blue ,green", "--top-k", 2]
    for template in ("photo", "a {}"):
        alone = run(*options, "--bundle", bundle, "--template", template)
        assert alone == run(*options, "--server", server.url, "--template", template)
    assert alone.count("%") == 4
    httpx.put(f"{server.url}/v1/label-sets/verbs", json={"classes": ["red", "blue"]})
    stored = run("classify", pictures[0], "--label-set", "verbs", "--server", server.url)
    assert stored.count("%") == 2
    httpx.delete(f"{server.url}/v1/label-sets/verbs")


def test_embed_says_the_same_with_a_server_and_without(
    server: Server, bundle: Path, pictures: list[Path], tmp_path: Path
) -> None:
    options = ["embed", pictures[0], "--text", "red", "--text", "blue"]
    alone = [json.loads(line) for line in run(*options, "--bundle", bundle).splitlines()]
    run(*options, "--server", server.url, "--out", tmp_path / "out/rows.npy")
    rows = np.load(tmp_path / "out/rows.npy")
    assert [entry["input"] for entry in alone] == [str(pictures[0]), "red", "blue"]
    np.testing.assert_allclose([entry["embedding"] for entry in alone], rows, atol=2e-6)


def test_search_says_the_same_with_a_server_and_without(
    server: Server, bundle: Path, encoder: Encoder, pictures: list[Path], tmp_path: Path
) -> None:
    store = EmbeddedStore(tmp_path / "i", fingerprint=encoder.fingerprint, dim=16)
    rows = encoder.encode_images([drawing(c, "circle") for c in ("red", "blue")])
    names = [("verbs-red", rows[0]), ("verbs-blue", rows[1])]
    store.upsert([Item(id=n, vector=r, metadata={"of": "verbs"}) for n, r in names])
    for path, (name, _) in zip(pictures, names, strict=True):
        files, data = {"image": path.read_bytes()}, {"id": name, "metadata": '{"of": "verbs"}'}
        httpx.post(f"{server.url}/v1/items", files=files, data=data)
    for query in (["a red circle"], ["--image", pictures[1]]):
        options = ["search", *query, "--where", "of=verbs"]
        alone = run(*options, "--bundle", bundle, "--index", tmp_path / "i")
        assert alone == run(*options, "--server", server.url)
        assert len(alone.splitlines()) == 2
    assert run("search", pictures[1], "--where", "of=verbs", "--server", server.url) == alone
    # A text among pictures makes the ranking centred; here too, which it was not in process.
    note = Item(
        id="verbs-note", vector=encoder.encode_texts(["milk"])[0], modality="text", text="milk",
        metadata={"of": "verbs"},
    )  # fmt: skip
    store.upsert([note])
    noted = {"id": "verbs-note", "text": "milk", "metadata": {"of": "verbs"}}
    httpx.post(f"{server.url}/v1/items", json={"items": [noted]})
    options = ["search", "a red circle", "--where", "of=verbs"]
    alone = run(*options, "--bundle", bundle, "--index", tmp_path / "i")
    assert alone == run(*options, "--server", server.url)
    for name in ("verbs-red", "verbs-blue", "verbs-note"):
        httpx.delete(f"{server.url}/v1/items/{name}")
    nothing = run("search", "x", "--where", "of=3", "--bundle", bundle, "--index", tmp_path / "i")
    assert nothing == "nothing found\n"


def test_the_load_generator_tells_rates_and_what_was_refused(
    server: Server, tmp_path: Path
) -> None:
    out = tmp_path / "figures.json"
    for kind in ("--texts", "--no-texts"):
        printed = run(
            "bench-serve", server.url, kind, "--seconds", 0.2, "--concurrency", "1,4", "--out", out
        )
        figures = json.loads(out.read_text())
        assert figures["4"]["per_second"] > 0
        assert figures["1"]["p99_ms"] >= figures["1"]["p50_ms"] > 0
        assert "answers/s" in printed
    run("bench-serve", server.url, "--texts", "--rate", 40, "--seconds", 0.5, "--out", out)
    figures = json.loads(out.read_text())
    assert set(figures) == {"server", "inputs", "40 a second"}
    assert figures["40 a second"]["p50_ms"] > 0


@pytest.mark.parametrize(
    ("arguments", "kind", "said"),
    [
        (["classify", "x.png"], ConfigError, "say what to choose from"),
        (["classify", "x.png", "--labels", " ,"], ConfigError, "holds no label"),
        (["classify", "x.png", "--label-set", "a"], ConfigError, "kept by a server"),
        (["classify", "x.png", "--labels", "a"], DataError, "x.png: cannot be read"),
        (["classify", "x.png", "--labels", "a", "--template", "b"], ConfigError, "no {}"),
        (["classify", "x.png", "--labels", "a, a"], ConfigError, "'a' is given twice"),
        (["classify", "x.png", "--labels", "a", "--label-set", "b"], ConfigError, "one of them"),
        (["embed"], ConfigError, "nothing to embed"),
        (["embed", "--text", "a", "--out", "rows.pt"], ConfigError, "written as .npy"),
        (["embed", "."], ConfigError, "vlm embed . --out FOLDER"),
        (["embed", "absent"], DataError, "absent: cannot be read as an image"),
        (["search"], ConfigError, "say what to look for"),
        (["search", "a", "--where", "b"], ConfigError, "expected key=value"),
        (["search", "a", "--where", "b={"], ConfigError, "--where 'b={': '{' is not valid YAML"),
        (["search", "a", "--where", "b=@"], ConfigError, "put quotes around"),
        (["search", "a", "--where", "b=0x_"], ConfigError, "put quotes around"),
        (["search", "a", "--where", "b=!!int ''"], ConfigError, "put quotes around"),
        (["search", "a", "--where", "b=!!bool 3"], ConfigError, "put quotes around"),
        (["search", "a", "--index", "absent"], DataError, "no collection"),
        (["search", "a", "--server", "x", "--key-file", "absent"], ConfigError, "key cannot be"),
        (
            ["bench-serve", "http://127.0.0.1:1", "--concurrency", "0"],
            ConfigError,
            "from 1 to 1024",
        ),
        (["bench-serve", "http://127.0.0.1:1", "--seconds", "1"], DataError, "refused"),
        (["bench-serve", "nowhere", "--seconds", "1"], DataError, "such as http"),
    ],
)
def test_mistakes_are_told_before_anything_is_done(
    arguments: list[str], kind: type[VlmError], said: str
) -> None:
    with pytest.raises(kind, match=said):
        run(*arguments)


def test_dates_and_times_in_a_filter_stay_texts() -> None:
    pairs = ["d=2020-01-01", "t=2020-13-45 99:00:00", "n=3", "y={gte: 2.5}", "w=two words"]
    assert _filter([*pairs, "h=10:30", "s=10:30:00.5"]) == {
        "d": "2020-01-01", "t": "2020-13-45 99:00:00", "n": 3, "y": {"gte": 2.5}, "w": "two words",
        "h": "10:30", "s": "10:30:00.5",
    }  # fmt: skip


def test_a_key_file_that_is_no_text_is_told(tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(b"\xff\xfe\x00")
    ask = ["embed", "--text", "a", "--server", "http://127.0.0.1:1", "--key-file", tmp_path / "key"]
    with pytest.raises(ConfigError, match="the key cannot be read"):
        run(*ask)


def test_a_key_comes_from_the_environment_or_a_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[str] = []

    def remember(self: Client, *_: object) -> np.ndarray:
        seen.append(self._http.headers["authorization"])
        return np.zeros((1, 2), np.float32)

    monkeypatch.setattr(Client, "embed", remember)
    (tmp_path / "key").write_text("from a file\n")
    ask = ["embed", "--text", "a", "--server", "http://127.0.0.1:1"]
    run(*ask, env={"VLM_API_KEY": "from outside"})
    run(*ask, "--key-file", tmp_path / "key", env={"VLM_API_KEY": "from outside"})
    assert seen == ["Bearer from outside", "Bearer from a file"]
    assert "from outside" not in run("embed", "--help", env={"VLM_API_KEY": "from outside"})

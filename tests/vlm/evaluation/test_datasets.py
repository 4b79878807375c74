import io
import json
import socket
import tarfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image

from tests.support import drawing, encoded, tiny_bundle, write_dataset
from vlm.config import validate_config
from vlm.errors import BundleError, ConfigError, DataError, VlmError
from vlm.evaluation import (
    EvaluationConfig,
    Subject,
    evaluate,
    evaluate_with_evidence,
    subject_of_bundle,
    subject_of_open_clip,
)
from vlm.evaluation.datasets import (
    ClipBenchmarkDataset,
    FolderDataset,
    ShardsDataset,
    TableDataset,
)
from vlm.evaluation.names import class_names, templates
from vlm.evaluation.tasks import RetrievalResult, ZeroShotResult
from vlm.inference import load_bundle

COLOURS = ("blue", "green", "red")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "bundle"
    tiny_bundle(folder)
    return folder


@pytest.fixture(scope="module")
def subject(bundle: Path) -> Subject:
    return subject_of_bundle(load_bundle(bundle))


def tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))


def picture(number: int) -> bytes:
    return encoded(drawing(COLOURS[number % 3], "circle", seed=number))


def zero_shot(subject: Subject, dataset: dict[str, str], **task: object) -> ZeroShotResult:
    tree = {
        "datasets": {"d": dataset},
        "tasks": [{"type": "zero_shot", "data": "d", **task}],
        "bootstrap": {"draws": 100},
    }
    found = evaluate(subject, validate_config(EvaluationConfig, tree, source="test"))
    result = found.results["zero_shot/d"]
    assert isinstance(result, ZeroShotResult)
    return result


def benchmark(folder: Path, labels: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "classnames.txt").write_text("blue ball\ngreen ball\nred ball\n")
    (folder / "zeroshot_classification_templates.txt").write_text("a {c}\nthe {c}\n")
    for shard in range(2):
        tar(
            folder / f"test/{shard}.tar",
            {
                f"s{shard}{n}.{kind}": data
                for n, label in enumerate(labels)
                for kind, data in (("cls", label.encode()), ("png", picture(n)))
            },
        )


def test_one_set_of_images_is_classified_alike_from_a_folder_a_table_and_clip_benchmark(
    tmp_path: Path, subject: Subject
) -> None:
    rows = ["image,caption,label"]
    for number in range(6):
        path = tmp_path / "tree" / f"{COLOURS[number % 3]}_ball" / f"{number // 3}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number % 3))
        rows.append(f"tree/{path.parent.name}/{path.name},some text,{COLOURS[number % 3]} ball")
    (tmp_path / "table.csv").write_text("\n".join(rows) + "\n")
    benchmark(tmp_path / "bench", ["0", "1", "2"])
    prompts = ["a {}", "the {}"]
    names = [f"{colour} ball" for colour in COLOURS]
    folder = zero_shot(
        subject, {"type": "folder", "location": str(tmp_path / "tree")}, prompts=prompts
    )
    table = zero_shot(
        subject,
        {"type": "table", "location": str(tmp_path / "table.csv")},
        class_field="label", classes=names, prompts=prompts,
    )  # fmt: skip
    # Prompts of its own files.
    shards = zero_shot(subject, {"type": "clip_benchmark", "location": str(tmp_path / "bench")})
    assert (folder.samples, folder.classes) == (6, 3)
    assert folder.top1 == table.top1 == shards.top1
    assert folder.calibration_error == pytest.approx(table.calibration_error, abs=1e-6)
    assert folder.calibration_error == pytest.approx(shards.calibration_error, abs=1e-6)


def test_captions_in_clip_benchmarks_layout_are_one_a_line(
    tmp_path: Path, subject: Subject
) -> None:
    (tmp_path / "dataset_type.txt").write_text("retrieval\n")
    members = {}
    for number in range(3):
        members[f"{number}.png"] = picture(number)
        members[f"{number}.txt"] = f"a {COLOURS[number]} ball\nball {number}\n".encode()
    tar(tmp_path / "test/0.tar", members)
    dataset = {"type": "clip_benchmark", "location": str(tmp_path)}
    tree = {"datasets": {"d": dataset}, "tasks": [{"type": "retrieval", "data": "d"}],
            "bootstrap": {"draws": 100}}  # fmt: skip
    found = evaluate(subject, validate_config(EvaluationConfig, tree, source="test"))
    result = found.results["retrieval/d"]
    assert isinstance(result, RetrievalResult)
    assert (result.text_to_image.queries, result.text_to_image.gallery) == (6, 3)
    assert result.image_to_text.chance == pytest.approx(1 / 3)


def test_shards_are_read_in_any_order_in_part_and_with_many_captions(tmp_path: Path) -> None:
    write_dataset(tmp_path / "shards", 25)
    opened = ShardsDataset(location=str(tmp_path / "shards"), captions_field="tags").open()
    assert [item.key for item in opened.read(8, 12)] == [f"s{n:05d}" for n in range(8, 12)]
    assert opened.item(3).texts == ("yellow", "circle")
    part = ShardsDataset(location=str(tmp_path / "shards"), max_pairs=4).open()
    assert part.count == len(list(part.read(0, 4))) == 4
    odd = ShardsDataset(location=str(tmp_path / "shards"), captions_field="style").open()
    with pytest.raises(DataError, match="'s00000' has no list of captions in 'style', found 'dra"):
        odd.item(0)


def test_what_is_wrong_with_a_dataset_is_told(tmp_path: Path, subject: Subject) -> None:
    with pytest.raises(DataError, match=r"no shards; looked for test/\*.tar"):
        ClipBenchmarkDataset(location=tmp_path).open()
    tar(tmp_path / "a/test/0.tar", {"x.png": picture(0)})
    with pytest.raises(DataError, match="no classnames.txt, and dataset_type.txt does not say"):
        ClipBenchmarkDataset(location=tmp_path / "a").open()
    (tmp_path / "a/classnames.txt").write_text("one\n")
    with pytest.raises(DataError, match="sample 'x' has no .cls"):
        ClipBenchmarkDataset(location=tmp_path / "a").open()
    tar(tmp_path / "a/test/0.tar", {"x.png": picture(0), "x.cls": b"7"})
    with pytest.raises(DataError, match="sample 'x' has label '7', allowed are 0 to 0"):
        ClipBenchmarkDataset(location=tmp_path / "a").open().item(0)
    (tmp_path / "a/dataset_type.txt").write_text("retrieval")
    (tmp_path / "a/classnames.txt").unlink()
    for note, reason in ((b" ", "an empty caption: ''"), (b"a\n\nb", "an empty caption: 'a"),
                         (b"a\xff", "a text that is no UTF-8")):  # fmt: skip
        tar(tmp_path / "a/test/0.tar", {"x.png": picture(0), "x.txt": note})
        with pytest.raises(DataError, match=f"sample 'x' has {reason}"):
            ClipBenchmarkDataset(location=tmp_path / "a").open().item(0)
    (tmp_path / "tree").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "tree/x.png")
    with pytest.raises(DataError, match="'x.png' lies in no folder of a class"):
        FolderDataset(location=tmp_path / "tree").open()
    (tmp_path / "t.csv").write_text("image,caption\ngone.png,a\n")
    opened = TableDataset(location=tmp_path / "t.csv").open()
    with pytest.raises(DataError, match="An evaluation leaves nothing out"):
        opened.item(0)
    opened.close()
    (tmp_path / "t.csv").write_text("image,caption,label\ntree/x.png,a,horse\n")
    with pytest.raises(DataError, match="label='horse', which is neither one of the 2 class names"):
        zero_shot(
            subject, {"type": "table", "location": str(tmp_path / "t.csv")},
            class_field="label", classes=["cat", "dog"],
        )  # fmt: skip
    with pytest.raises(DataError, match="set class_field to one of: label"):
        zero_shot(subject, {"type": "table", "location": str(tmp_path / "t.csv")})
    with pytest.raises(ConfigError, match="zip"):
        zero_shot(subject, {"type": "zip", "location": "x"})


def test_classes_called_by_numbers_are_not_taken_for_numbers_of_classes(
    tmp_path: Path, subject: Subject
) -> None:
    # In order of names "1", "10", "2": class number 1 is called "10", and number 2 "2".
    for number, name in enumerate(("1", "10", "2")):
        (tmp_path / "tree" / name).mkdir(parents=True)
        (tmp_path / "tree" / name / f"{number}.png").write_bytes(picture(number))
    tree = {
        "datasets": {"d": {"type": "folder", "location": str(tmp_path / "tree")}},
        "tasks": [{"type": "zero_shot", "data": "d"}],
    }
    settings = validate_config(EvaluationConfig, tree, source="test")
    with evaluate_with_evidence(subject, settings) as (_, evidence):
        assert evidence.outcomes["zero_shot/d"].evidence["labels"].tolist() == [0, 1, 2]


def test_tags_of_a_table_are_a_text_and_not_its_letters(tmp_path: Path, subject: Subject) -> None:
    (tmp_path / "0.png").write_bytes(picture(0))
    (tmp_path / "t.csv").write_text('image,caption,label,tags\n0.png,a,x,"warm, round"\n')
    told: list[str] = []

    def texts(found: Sequence[str]) -> np.ndarray:
        told.extend(found)
        return subject.encode_texts(found)

    dataset = {"type": "table", "location": str(tmp_path / "t.csv")}
    spy = replace(subject, encode_texts=texts)
    zero_shot(spy, dataset, class_field="label", prompts=["{}: {tags}"])
    assert told == ["a", "a: warm, round"]


def test_an_unreachable_hub_is_not_asked_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float | None] = []

    def refuse(address: tuple[str, int], timeout: float | None = None) -> socket.socket:
        asked.append(timeout)
        raise OSError

    monkeypatch.setattr("vlm.evaluation.model.getproxies", dict)
    monkeypatch.setattr(socket, "create_connection", refuse)
    with pytest.raises(VlmError, match="a machine without access needs a copy: local-dir:FOLDER"):
        subject_of_open_clip("hf-hub:nobody/nothing")
    assert asked == [3.0]
    assert constants.HF_HUB_OFFLINE is False


def test_names_and_prompts_are_there_by_name() -> None:
    assert [len(class_names(n)) for n in ("cifar10", "cifar100", "imagenet1k")] == [10, 100, 1000]
    assert class_names("cifar10")[3] == "cat"
    assert class_names("cifar100")[41] == "lawn mower"
    assert class_names("imagenet1k")[0] == "tench"
    assert [len(templates(n)) for n in ("plain", "simple7", "openai_imagenet")] == [1, 7, 80]
    assert templates("plain") == ("a photo of a {}.",)
    assert all("{}" in t for n in ("simple7", "openai_imagenet") for t in templates(n))


def test_a_bundle_is_judged_alike_through_plain_open_clip(
    tmp_path: Path, bundle: Path, subject: Subject
) -> None:
    other = subject_of_open_clip(f"local-dir:{bundle}")
    assert other.dim == subject.dim
    assert other.logit_scale == pytest.approx(subject.logit_scale)
    captions = ["a red circle", "square"]
    assert torch.allclose(
        torch.from_numpy(other.encode_texts(captions)),
        torch.from_numpy(subject.encode_texts(captions)),
        atol=1e-5,
    )
    images = [other.decode(picture(0)), other.decode(picture(1))]
    ours = subject.encode_images([subject.decode(picture(0)), subject.decode(picture(1))])
    assert torch.allclose(
        torch.from_numpy(other.encode_images(images)), torch.from_numpy(ours), atol=1e-2
    )
    with pytest.raises(BundleError, match="not a model of open_clip: there is no such folder"):
        subject_of_open_clip("local-dir:/nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BundleError, match="it has no open_clip_config.json"):
        subject_of_open_clip(f"local-dir:{tmp_path / 'empty'}")
    with pytest.raises(VlmError, match="no-such-model: open_clip cannot make this model"):
        subject_of_open_clip("no-such-model")
    assert json.loads((bundle / "bundle.json").read_text())["name"] == "tiny"

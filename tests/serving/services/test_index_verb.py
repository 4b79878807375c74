from pathlib import Path

import pytest

from serving.stores import EmbeddedStore
from tests.support import tiny_bundle, write_dataset
from vlm.cli.index import index
from vlm.errors import DataError
from vlm.inference import Encoder


def test_datasets_are_indexed_once_however_often_the_verb_is_given(
    bundle: Path, encoder: Encoder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_dataset(tmp_path / "shards", 24)
    index([tmp_path / "shards"], bundle=bundle, index=tmp_path / "index")
    assert "24 images indexed, 0 were there already" in capsys.readouterr().out
    index([tmp_path / "shards"], bundle=bundle, index=tmp_path / "index")
    assert "0 images indexed, 24 were there already" in capsys.readouterr().out
    store = EmbeddedStore(tmp_path / "index", fingerprint=encoder.fingerprint, dim=encoder.dim)
    assert store.count() == 24
    item = store.get("s00003")
    assert item is not None
    assert (item.text, item.metadata["style"]) == ("a yellow circle", "drawn")


def test_an_index_of_another_model_is_refused_in_words_for_a_person(
    bundle: Path, tmp_path: Path
) -> None:
    write_dataset(tmp_path / "shards", 4)
    index([tmp_path / "shards"], bundle=bundle, index=tmp_path / "index")
    tiny_bundle(tmp_path / "other", seed=7)
    with pytest.raises(DataError, match="holds vectors of model"):
        index([tmp_path / "shards"], bundle=tmp_path / "other", index=tmp_path / "index")

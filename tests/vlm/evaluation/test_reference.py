"""Our definitions are those of clip-benchmark, scikit-learn and the COCO caption evaluation."""

import io
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from clip_benchmark.metrics.zeroshot_classification import zero_shot_classifier
from clip_benchmark.metrics.zeroshot_retrieval import recall_at_k
from PIL import Image
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, ndcg_score, v_measure_score

from tests.support import drawn_samples, tiny_bundle, unit_rows, write_dataset
from tests.vlm.evaluation.fakes import context, embedded
from vlm.config import validate_config
from vlm.evaluation import (
    EvaluationConfig,
    evaluate,
    subject_of_open_clip,
    zero_shot_accuracy,
)
from vlm.evaluation.caption_scores import bleu, cider, words_of
from vlm.evaluation.clustering import k_means, v_measure
from vlm.evaluation.probes import fit_linear_probe, sinkhorn
from vlm.evaluation.tasks import RetrievalResult, RetrievalTask, ZeroShotResult
from vlm.evaluation.tasks.ndcg import ndcg
from vlm.inference import class_embeddings


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
def test_zero_shot_figures_are_those_of_clip_benchmark() -> None:
    classes = unit_rows(12, 16, seed=1).float()
    labels = torch.randint(0, 11, (300,), generator=seeded())  # the last class has no image
    images = F.normalize(classes[labels] + 1.2 * unit_rows(300, 16).float(), dim=1)
    found = zero_shot_accuracy(images, classes, labels).result
    logits = 100 * images @ classes.T
    # Its `accuracy` fails with numpy 2.4 and later, for want of a scalar; this is its formula.
    correct = logits.topk(5, 1, True, True)[1].t().eq(labels.view(1, -1))
    top1, top5 = (float(correct[:k].reshape(-1).float().sum()) / 300 for k in (1, 5))
    assert found.top1 == pytest.approx(top1, abs=1e-6)
    assert found.top5 == pytest.approx(top5, abs=1e-6)
    balanced = balanced_accuracy_score(labels, logits.argmax(dim=1))
    assert found.mean_per_class == pytest.approx(balanced, abs=1e-6)


def test_class_rows_are_those_of_clip_benchmark() -> None:
    known: dict[str, torch.Tensor] = {}

    def row(text: str) -> torch.Tensor:
        return known.setdefault(text, unit_rows(1, 8, seed=len(known))[0].float() * 3)

    class Model:
        def encode_text(self, rows: torch.Tensor) -> torch.Tensor:
            return rows

    names, templates = ["cat", "dog"], ["a {c}", "the {c}", "{c}"]
    theirs = zero_shot_classifier(
        Model(), lambda texts: torch.stack([row(t) for t in texts]), names, templates, "cpu",
        amp=False,
    )  # fmt: skip
    prompts = [[template.format(c=name) for template in templates] for name in names]
    ours = class_embeddings(
        lambda texts: F.normalize(torch.stack([row(t) for t in texts]), dim=1).numpy(), prompts
    )
    assert torch.allclose(torch.from_numpy(ours), theirs.T, atol=1e-6)


def test_recall_is_that_of_clip_benchmark_with_several_captions_an_image() -> None:
    images = unit_rows(60, 12).float()
    counts = [1 + i % 3 for i in range(60)]
    owner = torch.arange(60).repeat_interleave(torch.tensor(counts))
    texts = F.normalize(images[owner] + 1.5 * unit_rows(len(owner), 12, seed=2).float(), dim=1)
    data = embedded(images, [tuple(["c"] * n) for n in counts], texts)
    found = RetrievalTask(data="d").measure(context(d=data)).result
    scores = texts @ images.T
    positive = torch.zeros_like(scores, dtype=torch.bool)
    positive[torch.arange(len(owner)), owner] = True
    for k in (1, 5, 10):
        to_image = (recall_at_k(scores, positive, k) > 0).float().mean().item()
        to_text = (recall_at_k(scores.T, positive.T, k) > 0).float().mean().item()
        assert getattr(found.text_to_image, f"recall{k}") == pytest.approx(to_image, abs=1e-6)
        assert getattr(found.image_to_text, f"recall{k}") == pytest.approx(to_text, abs=1e-6)
    assert 0.1 < found.text_to_image.recall1 < 0.9


def test_figures_on_drawings_are_those_of_clip_benchmark_end_to_end(tmp_path: Path) -> None:
    tiny_bundle(tmp_path / "bundle")
    write_dataset(tmp_path / "shards", 48)
    theirs, transform, tokenize = model_of_open_clip(tmp_path / "bundle")
    samples = drawn_samples(48)
    names = list(dict.fromkeys(s.text for s in samples))
    classes = zero_shot_classifier(theirs, tokenize, names, ["{c}", "one {c}"], "cpu", amp=False)
    pixels = torch.stack([transform(Image.open(io.BytesIO(s.image))) for s in samples])
    with torch.inference_mode():
        images = theirs.encode_image(pixels, normalize=True)
        texts = theirs.encode_text(tokenize([s.text for s in samples]), normalize=True)
    labels = torch.tensor([names.index(s.text) for s in samples])
    tasks = [
        {"type": "zero_shot", "data": "d", "class_field": "concept", "prompts": ["{}", "one {}"]},
        {"type": "retrieval", "data": "d"},
    ]
    tree = {
        "datasets": {"d": {"type": "shards", "location": str(tmp_path / "shards")}},
        "tasks": tasks, "bootstrap": {"draws": 100},
    }  # fmt: skip
    found = evaluate(
        subject_of_open_clip(f"local-dir:{tmp_path / 'bundle'}"),
        validate_config(EvaluationConfig, tree, source="test"),
    ).results
    chosen = (images @ classes).argmax(dim=1)
    top1, balanced = (chosen == labels).double().mean(), balanced_accuracy_score(labels, chosen)
    ours = found["zero_shot/d"]
    assert isinstance(ours, ZeroShotResult)
    assert (ours.top1, ours.mean_per_class) == pytest.approx((float(top1), balanced), abs=1e-6)
    pairs = found["retrieval/d"]
    assert isinstance(pairs, RetrievalResult)
    for k in (1, 5, 10):
        # By image; a caption that several images share ties exactly, so theirs is by chance there.
        hits = recall_at_k(texts @ images.T, torch.eye(48, dtype=torch.bool), k) > 0
        expected = hits.double().mean().item()
        assert getattr(pairs.text_to_image, f"recall{k}") == pytest.approx(expected, abs=1e-6)


def model_of_open_clip(folder: Path) -> tuple[Any, Any, Any]:
    name = f"local-dir:{folder}"
    model, _, transform = open_clip.create_model_and_transforms(name)
    return model.eval(), transform, open_clip.get_tokenizer(name)


def test_calibration_error_of_a_table_made_by_hand() -> None:
    # Two classes; cosines 1 and 0 at scale ln 3 make a probability of 3/4 for the nearer.
    images = torch.eye(2)[[0, 0, 0, 0]]
    labels = torch.tensor([0, 0, 1, 1])
    scale = float(torch.log(torch.tensor(3.0, dtype=torch.float64)))
    found = zero_shot_accuracy(images, torch.eye(2), labels, logit_scale=scale).result
    assert found.calibration_error == pytest.approx(0.25, abs=1e-7)
    (only,) = found.reliability
    assert (only.count, only.accuracy) == (4, 0.5)
    assert only.confidence == pytest.approx(0.75, abs=1e-7)
    (confusion,) = found.confusions
    assert (confusion.true, confusion.predicted, confusion.count, confusion.of) == ("1", "0", 2, 2)


CANDIDATES = ["a red circle on a table", "the dog", "a blue square in the rain", "green"]
REFERENCES = [
    ["a red circle on the table", "red circle"],
    ["a dog is running in the park", "the brown dog runs"],
    ["a blue square in the rain", "rain on a square"],
    ["a green tree"],
]


def test_cider_and_bleu_are_those_of_the_coco_evaluation() -> None:
    written = {i: [caption] for i, caption in enumerate(CANDIDATES)}
    told = dict(enumerate(REFERENCES))
    total, each = Cider().compute_score(told, written)
    ours = cider([words_of(c) for c in CANDIDATES], [[words_of(r) for r in k] for k in REFERENCES])
    assert ours == pytest.approx(list(each), abs=1e-9)
    assert sum(ours) / 4 == pytest.approx(total, abs=1e-9)
    theirs, _ = Bleu(4).compute_score(told, written, verbose=0)
    ours = bleu([words_of(c) for c in CANDIDATES], [[words_of(r) for r in k] for k in REFERENCES])
    assert ours == pytest.approx(theirs, abs=1e-6)


def test_words_are_lower_case_without_marks_and_nothing_written_scores_nothing() -> None:
    assert words_of("A cat's toy, 2 (red) - no_thing!") == ["a", "cat's", "toy", "2", "red", "no",
                                                            "thing"]  # fmt: skip
    assert bleu([[]], [[["a"]]]) == [0.0] * 4
    assert cider([[]], [[["a"]]]) == [0.0]


def test_ndcg_is_that_of_scikit_learn() -> None:
    relevant = torch.rand(20, 30, generator=seeded()) < 0.2
    relevant[:, 0] = True
    scores = torch.rand(20, 30, generator=seeded(1))
    order = scores.argsort(dim=1, descending=True)[:, :10]
    ours = ndcg(relevant.gather(1, order), relevant.sum(dim=1))
    for row in range(20):
        theirs = ndcg_score(relevant[row : row + 1].double(), scores[row : row + 1], k=10)
        assert float(ours[row]) == pytest.approx(theirs, abs=1e-9)


def test_the_linear_probe_is_the_logistic_regression_of_scikit_learn() -> None:
    rows, labels = unit_rows(40, 4), torch.arange(40) % 4
    probe = fit_linear_probe(rows, labels, 4, c=2.0)
    theirs = LogisticRegression(C=2.0, tol=1e-8, max_iter=1000).fit(rows, labels)
    ours = probe(rows).softmax(dim=1)
    assert torch.allclose(ours, torch.from_numpy(theirs.predict_proba(rows)), atol=1e-5)


def test_a_transport_plan_has_even_masses_on_both_sides() -> None:
    plan = sinkhorn(torch.rand(5, 9, generator=seeded(), dtype=torch.float64))
    assert torch.allclose(plan.sum(dim=1), torch.full((5,), 1 / 5).double(), atol=1e-4)
    assert torch.allclose(plan.sum(dim=0), torch.full((9,), 1 / 9).double(), atol=1e-6)


def test_v_measure_is_that_of_scikit_learn_and_k_means_finds_what_is_apart() -> None:
    classes = torch.randint(0, 5, (80,), generator=seeded())
    clusters = torch.randint(0, 4, (80,), generator=seeded(1))
    assert v_measure(classes, clusters) == pytest.approx(v_measure_score(classes, clusters))
    one = torch.zeros(80, dtype=torch.int64)
    assert v_measure(one, one) == 1.0
    assert v_measure(classes, one) == pytest.approx(v_measure_score(classes, one))
    rows = torch.eye(4).double()[torch.arange(40) % 4] + 0.01 * unit_rows(40, 4)
    found = k_means(rows, 4, seeded())
    assert v_measure(torch.arange(40) % 4, found) == pytest.approx(1)
    with pytest.raises(ValueError, match="5 clusters need as many rows, got 3"):
        k_means(rows[:3], 5, seeded())

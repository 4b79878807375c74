import pytest
import torch

from vlm.evaluation.bootstrap import BootstrapConfig, Scores, differences, intervals

DRAWS = BootstrapConfig(draws=2000)


def scores(values: torch.Tensor, clusters: torch.Tensor | None = None, **other: bool) -> Scores:
    own = torch.arange(len(values)) if clusters is None else clusters
    return Scores(values=values.double(), clusters=own, **other)


def test_the_interval_of_a_share_is_that_of_the_normal_distribution() -> None:
    values = torch.zeros(400)
    values[:100] = 1
    found = intervals({"x": scores(values)}, DRAWS, seed=0)["x"]
    half = 1.96 * (0.25 * 0.75 / 400) ** 0.5
    assert found.low == pytest.approx(0.25 - half, abs=0.006)
    assert found.high == pytest.approx(0.25 + half, abs=0.006)
    assert intervals({"x": scores(values)}, DRAWS, seed=0)["x"] == found


def test_queries_that_are_right_together_make_a_wider_interval() -> None:
    values = (torch.arange(400) < 100).double()
    alone = intervals({"x": scores(values)}, DRAWS, seed=0)["x"]
    grouped = intervals({"x": scores(values, torch.arange(400) // 10)}, DRAWS, seed=0)["x"]
    assert grouped.high - grouped.low > 2.5 * (alone.high - alone.low)


def test_a_verdict_is_given_only_where_the_queries_show_a_difference() -> None:
    base = (torch.arange(200) % 2).double()
    better = base.clone()
    better[0:80:2] = 1  # wrong before, right now: 40 of 200
    noise = base.clone()
    noise[[0, 1]] = noise[[1, 0]]
    verdicts = {}
    for name, values in (("better", better), ("noise", noise), ("same", base)):
        found = differences({"x": scores(values)}, {"x": scores(base)}, DRAWS, seed=0)["x"]
        verdicts[name] = found.verdict
    assert verdicts == {
        "better": "better", "noise": "no difference shown", "same": "no difference shown"
    }  # fmt: skip
    (back,) = differences({"x": scores(base)}, {"x": scores(better)}, DRAWS, seed=0).values()
    assert back.verdict == "worse"
    assert (back.value, back.against) == (0.5, 0.7)
    ours = {"x": scores(better, higher_is_better=False)}
    (lower,) = differences(ours, {"x": scores(base)}, DRAWS, seed=0).values()
    assert lower.verdict == "worse"


def test_models_that_were_asked_different_queries_are_not_compared() -> None:
    with pytest.raises(ValueError, match="x: the two models were not asked the same queries"):
        differences({"x": scores(torch.ones(3))}, {"x": scores(torch.ones(4))}, DRAWS, seed=0)

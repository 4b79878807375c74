from typing import Any

import pytest

from serving.errors import BadInputError
from serving.stores import parse_filter


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"n": [7]}, "filter 'n': must be a string, number or boolean, or an object"),
        ({"n": {}}, "or an object with some of in, contains, gt"),
        ({"n": None}, "filter 'n': must be"),
        ({"n": {"like": "x"}}, "filter 'n': no operator 'like'; there are in, contains"),
        ({"n": {"in": []}}, "in must be a list of 1 to 1000"),
        ({"n": {"in": "abc"}}, "in must be a list"),
        ({"n": {"in": [[1]]}}, "in must be a list"),
        ({"n": {"contains": ""}}, "contains must be a string that is not empty"),
        ({"n": {"gt": "5"}}, "gt must be a number"),
        ({"n": {"lte": True}}, "lte must be a number"),
    ],
)
def test_what_no_filter_means_is_refused_with_what_would(tree: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInputError, match=said):
        parse_filter(tree)

"""JSON of the package: numbers that JSON lacks become strings."""

from __future__ import annotations

import json

from ibnorm_export.json_text import json_text


def test_numbers_that_json_lacks_become_strings() -> None:
    value = {"a": [float("nan"), (float("inf"), 1.5)], 2: {"b": float("-inf")}, "c": [True, None, "text"]}
    found = json.loads(json_text(value), parse_constant=lambda name: None)
    assert found == {"a": ["nan", ["inf", 1.5]], "2": {"b": "-inf"}, "c": [True, None, "text"]}


def test_indentation() -> None:
    assert json_text({"a": 1}) == '{\n  "a": 1\n}'
    assert json_text({"a": 1}, indent=None) == '{"a": 1}'

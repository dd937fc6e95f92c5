"""One value of a JSON text is changed, and every other character stays."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentpool.cli.json_edit import remove, set_value

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3), max_leaves=8,
)
layouts = st.sampled_from([{}, {"indent": 2}, {"indent": "\t"}, {"separators": (" ,", "  :  ")}, {"indent": 4}])


@given(st.dictionaries(st.text(max_size=3), values, max_size=4), values, layouts)
def test_a_new_member_is_there_and_nothing_else_changed(found: dict[str, Any], value: Any, layout: Any) -> None:
    text = json.dumps(found, ensure_ascii=False, **layout)
    changed = set_value(text, ["new key", "inner"], value)
    assert json.loads(changed) == {**found, "new key": {"inner": value}}
    assert list(json.loads(changed)) == [*found, "new key"]
    if found:
        assert remove(changed, ["new key"]) == text


@given(st.dictionaries(st.text(max_size=3), values, min_size=1, max_size=4), values, layouts, st.data())
def test_a_changed_or_removed_member_leaves_the_others(
    found: dict[str, Any], value: Any, layout: Any, data: st.DataObject
) -> None:
    text = json.dumps(found, ensure_ascii=False, **layout)
    key = data.draw(st.sampled_from(sorted(found)))
    assert json.loads(set_value(text, [key], value)) == {**found, key: value}
    assert json.loads(remove(text, [key])) == {name: kept for name, kept in found.items() if name != key}


@given(st.lists(values, max_size=4), values, layouts)
def test_an_element_is_appended(found: list[Any], value: Any, layout: Any) -> None:
    text = json.dumps({"list": found}, ensure_ascii=False, **layout)
    changed = set_value(text, ["list", len(found)], value)
    assert json.loads(changed) == {"list": [*found, value]}
    if found:
        assert remove(changed, ["list", len(found)]) == text


def test_the_layout_is_followed() -> None:
    text = '{\n    "a": {\n        "b": 1\n    }\n}\n'
    assert set_value(text, ["a", "c"], [2]) == (
        '{\n    "a": {\n        "b": 1,\n        "c": [\n            2\n        ]\n    }\n}\n'
    )


def test_an_empty_text_becomes_an_object() -> None:
    assert json.loads(set_value(" \n", ["a", "b", 0], 1)) == {"a": {"b": [1]}}


@pytest.mark.parametrize(("text", "words"), [("[]", "an object was expected"), ('{"a": 1}', "an object was expected")])
def test_another_form_is_refused(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        set_value(text, ["a", "b"], 1)


def test_what_is_not_there_cannot_be_removed() -> None:
    with pytest.raises(KeyError):
        remove("{}", ["a"])
    with pytest.raises(KeyError):
        remove('{"b": {}}', ["a", "b"])

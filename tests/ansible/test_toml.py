import datetime
import importlib.util
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

ROLE = Path(__file__).resolve().parents[2] / "ansible" / "roles" / "edge"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("edge_toml", ROLE / "filter_plugins" / "edge_toml.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


edge_toml = load().edge_toml
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
scalars = st.one_of(
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False),
    text,
    st.dates(),
    st.datetimes(timezones=st.just(datetime.UTC)),
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=11,
)


@given(st.dictionaries(text, values, max_size=5))
def test_what_tomllib_reads_equals_the_dictionary(value: dict[str, Any]) -> None:
    assert tomllib.loads(edge_toml(value)) == value


def test_a_plain_value_after_a_table_stays_at_its_own_level() -> None:
    assert edge_toml({"a": {"b": 1}, "mode": "observe", "c": [{"d": True}, {"d": False}]}) == (
        'mode = "observe"\n\n[a]\nb = 1\n\n[[c]]\nd = true\n\n[[c]]\nd = false'
    )


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": {"b": None}}, "edge_config: a.b: expected a TOML value, found null"),
        ({"a": {7: 1}}, "edge_config: below a: expected a string as key, found 7"),
        ([1], "edge_config: expected a dictionary, found list"),
        ({"a": {"b": b"x"}}, "edge_config: a.b: expected a TOML value, found bytes"),
    ],
)
def test_a_value_toml_cannot_hold_is_named(value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        edge_toml(value)

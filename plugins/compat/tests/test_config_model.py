"""The base class of sections that packages beside DeepSpeed have of their own."""

from __future__ import annotations

import logging

import pytest
from deepspeed.runtime.config_utils import DeepSpeedConfigModel
from pydantic import Field, ValidationError


class Inner(DeepSpeedConfigModel):
    size: int = 1


class Section(DeepSpeedConfigModel):
    count: int = Field(0, alias="number")
    names: list[str] | None = None
    name: str | None = Field(
        None,
        json_schema_extra={
            "deprecated": True,
            "new_param": "names",
            "new_param_fn": (lambda value: [value]),
        },
    )
    inner: Inner = Field(default_factory=Inner)
    inner_size: int = Field(0, json_schema_extra={"deprecated": True, "new_param": "inner.size"})
    old: int = Field(0, json_schema_extra={"deprecated": True, "deprecated_msg": "not read"})


def test_keys_go_by_both_names_and_auto_is_the_default():
    assert Section(count=2).count == Section(number=2).count == 2
    assert Section(count="auto").count == 0
    with pytest.raises(ValidationError, match="valid integer"):
        Section(strict=True, count="auto")


@pytest.mark.parametrize("wrong", [{"count": "a"}, {"names": "a"}, {"cuont": 1}])
def test_wrong_keys_and_values_are_refused(wrong):
    with pytest.raises(ValidationError):
        Section(**wrong)
    with pytest.raises(ValidationError):
        Section().count = "a"


def test_a_subclass_may_allow_further_keys():
    class Open(Inner, extra="allow"):
        pass

    made = Open(size=2, other=3)
    assert (made.size, made.other) == (2, 3)


def test_deprecated_keys_hand_on_their_values(caplog):
    with caplog.at_level(logging.WARNING, "deepspeed"):
        made = Section(name="a", inner_size=3, old=4)
    assert (made.names, made.inner.size) == (["a"], 3)
    assert "name is deprecated; use names" in caplog.text
    assert "old is deprecated not read" in caplog.text
    with pytest.raises(AssertionError, match="name is a deprecated name of names"):
        Section(name="a", names=["b"])

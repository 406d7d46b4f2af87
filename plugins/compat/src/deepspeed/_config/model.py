"""A base class for sections that packages beside DeepSpeed have of their own."""

from __future__ import annotations

import logging
from typing import Any

from pydantic import BaseModel, ConfigDict
from pydantic.fields import FieldInfo

from deepspeed._parts.errors import AsDeepSpeed
from drivetrain.errors import ConfigError

logger = logging.getLogger("deepspeed")


class DeepSpeedConfigModel(BaseModel):
    """A pydantic model that refuses unknown keys and hands on the values of deprecated ones.

    A field is deprecated if its ``json_schema_extra`` says ``deprecated``. Beside it may stand
    ``new_param``, the field in its place (dotted, if that is in a section inside this one),
    ``new_param_fn``, which makes that field's value of the old one's, ``deprecated_msg``, and
    ``set_new_param``, which is ``False`` where the new field is left alone.

    Args:
        strict: keep values that are ``"auto"``; else such keys have their defaults.
        data: the keys.

    Raises:
        ValidationError: of pydantic: a key is unknown, or a value is not one that it may have.
        ConfigError: a deprecated key is given beside the one in its place.
    """

    model_config = ConfigDict(
        arbitrary_types_allowed=True,
        extra="forbid",
        populate_by_name=True,
        protected_namespaces=(),
        use_enum_values=True,
        validate_assignment=True,
        validate_default=True,
    )

    def __init__(self, strict: bool = False, **data: Any) -> None:
        super().__init__(**{k: v for k, v in data.items() if strict or v != "auto"})
        with AsDeepSpeed():
            fields = type(self).model_fields
            # A subclass may allow further keys, which count as set but are no fields.
            for name in sorted(self.model_fields_set & fields.keys()):
                self._hand_on(name, fields[name])

    def _hand_on(self, name: str, field: FieldInfo) -> None:
        """Give the value of a field to the one in its place, if it is deprecated."""
        says = field.json_schema_extra
        if not isinstance(says, dict) or not says.get("deprecated", False):
            return
        told: dict[str, Any] = dict(says)
        new = str(told.get("new_param", ""))
        told_instead = f"; use {new}" if new else ""
        logger.warning("%s is deprecated%s %s", name, told_instead, told.get("deprecated_msg", ""))
        if not new or not told.get("set_new_param", True):
            return
        *above, last = new.split(".")
        section: Any = self
        for part in above:
            section = getattr(section, part)
        if last in section.model_fields_set:
            raise ConfigError(
                f"{name} is a deprecated name of {new}, which is given, too; give one"
            )
        change = told.get("new_param_fn", lambda value: value)
        setattr(section, last, change(getattr(self, name)))

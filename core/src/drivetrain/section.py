"""Building blocks for the pydantic models that describe config sections.

pydantic's lax mode is wrong for hand-written JSON in three ways: it turns ``true`` into 1 and
``"3"`` into 3, and without it ``5e8`` (a float in JSON) is no integer. :data:`Int` and
:data:`Float` take numbers only, and integers in any notation.
"""

from __future__ import annotations

from typing import Annotated, Any, Generic, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, RootModel

from drivetrain.wording import as_json

T = TypeVar("T")

NO_EFFECT = "Accepted, has no effect: "
"""What the description of a key begins with that is only there for the format's sake; the reason
follows. ``drivetrain explain`` tells those who give it."""


def _number(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"expected a number, got {as_json(value)}")
    return value


def _integer(value: Any) -> Any:
    value = _number(value)
    if isinstance(value, float):
        if not value.is_integer():
            raise ValueError(f"expected a whole number, got {as_json(value)}")
        return int(value)
    return value


def _boolean(value: Any) -> Any:
    if not isinstance(value, bool):
        raise ValueError(f"expected true or false, got {as_json(value)}")
    return value


Int = Annotated[int, BeforeValidator(_integer)]
PositiveInt = Annotated[int, Field(gt=0), BeforeValidator(_integer)]
NonNegativeInt = Annotated[int, Field(ge=0), BeforeValidator(_integer)]
Float = Annotated[float, BeforeValidator(_number)]
PositiveFloat = Annotated[float, Field(gt=0), BeforeValidator(_number)]
NonNegativeFloat = Annotated[float, Field(ge=0), BeforeValidator(_number)]
Bool = Annotated[bool, BeforeValidator(_boolean)]


# Deferred building leaves out the validators of sections that a config does not contain, which
# takes a fifth off the time of ``drivetrain config check``.
class Section(BaseModel):
    """A config section: frozen, and every unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)


class Scalar(RootModel[T], Generic[T]):
    """A config path whose value is one scalar, such as ``gradient_clipping: 1.0``."""

    model_config = ConfigDict(frozen=True, defer_build=True)

"""Objects of other packages that read a config, which has to be translated before."""

from __future__ import annotations

import inspect
from functools import lru_cache
from typing import Any

from deepspeed._config.files import read_config
from deepspeed._config.translate import translate
from deepspeed._parts.errors import AsDeepSpeed

_ARGUMENTS = ("config_dict_or_path", "config")


@lru_cache(maxsize=8)
def translated(kind: type[Any]) -> type[Any]:
    """A subclass whose constructor translates the config that it is given.

    Args:
        kind: a class with an argument of DeepSpeed's names for a config.
    """
    signature = inspect.signature(kind)

    class Translated(kind):  # type: ignore[misc]
        @AsDeepSpeed()
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            given = signature.bind(*args, **kwargs).arguments
            for name in _ARGUMENTS:
                if given.get(name) is not None:
                    given[name] = translate(read_config(given[name])).config
            super().__init__(**given)

    Translated.__name__, Translated.__qualname__ = kind.__name__, kind.__qualname__
    Translated.__doc__ = kind.__doc__
    return Translated

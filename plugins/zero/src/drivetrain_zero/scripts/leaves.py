"""Leaf modules: accepted, because everything in a unit is gathered together anyway.

DeepSpeed needs to be told of modules whose parts run in another order, or not at all, on some ranks
(mixtures of experts). Here such parts are in one unit. The marks are kept, and can be read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from torch import nn

from drivetrain.errors import ConfigError

if TYPE_CHECKING:
    from drivetrain_zero.section import LeafModules

_MARK = "_z3_leaf"


def set_z3_leaf_modules(
    model: nn.Module,
    leaf_module_classes: Iterable[type[nn.Module] | str],
    raise_if_not_found: bool = True,
) -> list[nn.Module]:
    """Mark all modules of some classes.

    Args:
        model: searched, itself included.
        leaf_module_classes: classes, or their names with or without module path.
        raise_if_not_found: whether finding none is an error.

    Returns:
        The modules found.

    Raises:
        ConfigError: there is none.
    """
    return _mark(model, *_by_class(leaf_module_classes), True, raise_if_not_found)


def unset_z3_leaf_modules(
    model: nn.Module,
    leaf_module_classes: Iterable[type[nn.Module] | str],
    raise_if_not_found: bool = True,
) -> list[nn.Module]:
    """Undo :func:`set_z3_leaf_modules`."""
    return _mark(model, *_by_class(leaf_module_classes), False, raise_if_not_found)


def set_z3_leaf_modules_by_name(
    model: nn.Module, module_names: Iterable[str], raise_if_not_found: bool = True
) -> tuple[list[nn.Module], list[str]]:
    """Mark modules by their paths, as ``named_modules`` gives them.

    Returns:
        The marked modules, and the paths that lead to none.

    Raises:
        ConfigError: there is none.
    """
    names = list(module_names)
    marked = _mark(model, f"path {names}", lambda path, _: path in names, True, raise_if_not_found)
    paths = {path for path, _ in model.named_modules()}
    return marked, [name for name in names if name not in paths]


def set_z3_leaf_modules_by_suffix(
    model: nn.Module, module_name_suffixes: Iterable[str], raise_if_not_found: bool = True
) -> tuple[list[nn.Module], list[str]]:
    """Mark modules whose paths end with one of the suffixes.

    Returns:
        The marked modules, and the suffixes that no path ends with.

    Raises:
        ConfigError: there is none.
    """
    suffixes = tuple(module_name_suffixes)
    what = f"path that ends in {list(suffixes)}"
    marked = _mark(model, what, lambda path, _: path.endswith(suffixes), True, raise_if_not_found)
    paths = [path for path, _ in model.named_modules()]
    return marked, [end for end in suffixes if not any(path.endswith(end) for path in paths)]


def mark_configured(model: nn.Module, leaves: LeafModules) -> None:
    """Mark the modules that a config names; names that lead to none are left out."""
    set_z3_leaf_modules(model, leaves.classes, raise_if_not_found=False)
    set_z3_leaf_modules_by_name(model, leaves.names, raise_if_not_found=False)
    if leaves.name_suffixes:
        set_z3_leaf_modules_by_suffix(model, leaves.name_suffixes, raise_if_not_found=False)


def set_z3_leaf_module(model: nn.Module, flag: bool) -> None:
    """Mark one module, or take its mark away."""
    setattr(model, _MARK, flag)


def get_z3_leaf_modules(model: nn.Module) -> list[nn.Module]:
    """The marked modules of ``model``."""
    return [module for module in model.modules() if z3_leaf_module(module)]


def z3_leaf_module(model: nn.Module) -> bool:
    """Whether this module is marked."""
    return bool(vars(model).get(_MARK, False))


def z3_leaf_parameter(model: nn.Module, parameter: nn.Parameter) -> bool:
    """Whether a marked module of ``model`` contains ``parameter``."""
    return any(own is parameter for leaf in get_z3_leaf_modules(model) for own in leaf.parameters())


_Test = Callable[[str, nn.Module], bool]


def _by_class(classes: Iterable[type[nn.Module] | str]) -> tuple[str, _Test]:
    wanted = list(classes)

    def matches(_path: str, module: nn.Module) -> bool:
        names = {type(module).__name__, f"{type(module).__module__}.{type(module).__qualname__}"}
        return any(c in names if isinstance(c, str) else isinstance(module, c) for c in wanted)

    shown = [c if isinstance(c, str) else c.__name__ for c in wanted]
    return f"class {shown}", matches


def _mark(
    model: nn.Module, what: str, matches: _Test, flag: bool, raise_if_not_found: bool
) -> list[nn.Module]:
    found = [module for path, module in model.named_modules() if matches(path, module)]
    if not found and raise_if_not_found:
        raise ConfigError(f"leaf modules: {type(model).__name__} has no module of {what}")
    for module in found:
        set_z3_leaf_module(module, flag)
    return found

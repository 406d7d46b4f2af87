"""Weights in files whose tensors have other names and shapes than the model's.

A library that has changed its models since they were published knows how to read older files:
Transformers keeps, by model, rules that rename tensors, stack those of experts, or join projections
that are computed in one product. The rules of the module's own library are used here, so nothing is
known of single models. What is only renamed is read box by box, as ever. What is made of several
tensors is made whole, in host memory, as its turn comes.
"""

from __future__ import annotations

import copy
import sys
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import nn

from drivetrain.contracts.state.fragment import Fragment
from drivetrain.errors import CheckpointError
from drivetrain.modules.weights import Weights, fill

Rule = Any
"""A ``WeightTransform`` of Transformers, since its version 5."""


def converted(weights: Weights, module: nn.Module, foreign: Collection[str]) -> Weights:
    """``weights`` under the names of ``module``, as far as its library knows how to convert them.

    Args:
        weights: as they are stored.
        module: the model that wants them, or this rank's part of it.
        foreign: names in ``weights`` that the model does not have.

    Raises:
        CheckpointError: tensors that belong together do not fit together.
    """
    rules = _rules(module)
    return ConvertedWeights(weights, module, foreign, rules) if rules else weights


def _rules(module: nn.Module) -> Sequence[Rule]:
    library = sys.modules.get("transformers")
    if library is None or not isinstance(module, library.PreTrainedModel):
        return ()
    try:
        mapping = import_module("transformers.conversion_mapping")
    except ImportError:  # before version 5 files had the names of models
        return ()
    rules: Sequence[Rule] = mapping.get_model_conversion_mapping(module)
    return rules


class ConvertedWeights(Weights):
    """Weights under other names, of which some are made of several stored tensors.

    Args:
        stored: as they are.
        module: the model, which some rules ask for sizes.
        foreign: names in ``stored`` to be converted; all others stay.
        rules: of the model's library.
    """

    def __init__(
        self, stored: Weights, module: nn.Module, foreign: Collection[str], rules: Sequence[Rule]
    ) -> None:
        super().__init__(stored.place)
        self._stored, self._module = stored, module
        self._renamed = {name: name for name in stored.names() if name not in foreign}
        # By the first name that they make: a rule, and stored names, each with the rule's pattern.
        self._groups: dict[str, tuple[Rule, list[tuple[str, str]]]] = {}
        self._made: dict[str, tuple[str, torch.Tensor]] = {}
        loading: Any = import_module("transformers.core_model_loading")
        renamings = [rule for rule in rules if isinstance(rule, loading.WeightRenaming)]
        joining = [rule for rule in rules if isinstance(rule, loading.WeightConverter)]
        by_pattern = {pattern: rule for rule in joining for pattern in rule.source_patterns}
        for name in sorted(foreign, key=loading.dot_natural_key):  # experts in order of numbers
            key, pattern = loading.rename_source_key(name, renamings, joining)
            if pattern is None:
                self._renamed[key] = name
            else:
                group = self._groups.setdefault(key, (by_pattern[pattern], []))
                group[1].append((name, pattern))
        for key in self._groups:
            for name, tensor in self._joined(key, stored.shown).items():
                self._made[name] = key, tensor

    def names(self) -> Collection[str]:
        return self._renamed.keys() | self._made.keys()

    def shown(self, name: str) -> torch.Tensor:
        stored = self._renamed.get(name)
        return self._made[name][1] if stored is None else self._stored.shown(stored)

    def check(self, name: str, fragment: Fragment) -> None:
        if name in self._renamed:
            self._stored.check(self._renamed[name], fragment)
        else:
            super().check(name, fragment)

    def fill(self, work: Sequence[tuple[str, Fragment]]) -> None:
        self._stored.fill([(self._renamed[n], part) for n, part in work if n in self._renamed])
        groups: dict[str, list[tuple[str, Fragment]]] = defaultdict(list)
        for name, fragment in work:
            if name not in self._renamed:
                groups[self._made[name][0]].append((name, fragment))
        for key, wanted in groups.items():
            made = self._joined(key, self._stored.whole)
            for name, fragment in wanted:
                fill(fragment, made[name])

    def _joined(self, key: str, read: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
        """All that is made together with ``key``; of tensors without memory, without memory."""
        rule, sources = self._groups[key]
        work = copy.deepcopy(rule)
        for name, pattern in sources:
            work.add_tensor(key, name, pattern, read(name))
        try:
            found = work.convert(key, model=self._module, config=self._module.config)
        except (RuntimeError, ValueError, LookupError, AttributeError) as error:
            raise CheckpointError(
                f"{key} cannot be made of {sources[0][0]} and {len(sources) - 1} others in "
                f"{self.place}: {error}"
            ) from error
        return {name: v[0] if isinstance(v, list) else v for name, v in found.items()}

"""What a config and a model's own plan say about single layers."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import nn

from drivetrain.errors import ConfigError
from drivetrain_tensor.products import Product
from drivetrain_tensor.section import PATH, LayerSpec, PartitionConfig

_WHERE = f"{PATH}.partition_config"
_COLUMNS = {"colwise", "colwise_rep", "colwise_gather_output"}
_ROWS = {"rowwise", "rowwise_rep"}


class Rules:
    """Patterns of ``partition_config``, and the ``tp_plan`` of a Transformers model.

    Args:
        config: patterns; ``None`` for no wishes.
        model: whose type patterns may be restricted to, and whose plan is looked at.
    """

    def __init__(self, config: PartitionConfig | None, model: nn.Module) -> None:
        self._config = config
        kind = getattr(getattr(model, "config", None), "model_type", None)
        self._specs = [
            spec
            for spec in (config.layer_specs if config is not None else ())
            if spec.model_types is None or kind in spec.model_types
        ]
        self._plan = _plan(model) if config is None else {}

    def check(self, products: Iterable[Product]) -> None:
        """Refuse patterns that match nothing, and layers that two specs match.

        Raises:
            ConfigError: lists all of them.
        """
        products = list(products)
        some = ", ".join(f"{p.path}.weight" for p in products[:3])
        problems = [
            f"{_WHERE}: pattern {pattern!r} matches no layer; their weights are such as {some}"
            for spec in self._specs
            for pattern in spec.patterns
            if not any(re.match(pattern, f"{p.path}.weight") for p in products)
        ]
        for product in products:
            found = self._matching(product)
            if len({spec.partition_type for spec in found}) > 1:
                patterns = ", ".join(repr(p) for spec in found for p in spec.patterns)
                problems.append(
                    f"{_WHERE}: {product.path}.weight is matched by {len(found)} specs that cut it "
                    f"in different ways ({patterns})"
                )
        if problems:
            raise ConfigError(problems)

    def keeps(self, products: Collection[Product]) -> str | None:
        """Why layers are not to be cut, if they are not."""
        for product in products:
            kind = self._kind(product)
            if kind == "skip":
                return "a pattern keeps it whole"
            if kind is None and self._config is not None and not self._config.use_default_specs:
                return "no pattern names it"
        return None

    def check_cut(
        self,
        products: Iterable[Product],
        columns: set[Product],
        rows: set[Product],
        kept: Mapping[str, str],
    ) -> None:
        """Refuse what could not be cut as patterns say, and in strict mode what no pattern names.

        Args:
            products: all layers.
            columns: those whose outputs are cut.
            rows: those whose inputs are.
            kept: path -> why a layer is whole.

        Raises:
            ConfigError: lists the layers.
        """
        problems = []
        strict = self._config is not None and self._config.strict_mode
        for product in products:
            kind, found = self._kind(product), "column" if product in columns else "row"
            is_cut = product in columns or product in rows
            if kind in ("column", "row") and (not is_cut or kind != found):
                why = f"it cuts by {found}" if is_cut else kept.get(product.path, "")
                problems.append(
                    f"{_WHERE}: {product.path}.weight is to be cut by {kind}, which the way the "
                    f"model computes does not allow ({why})"
                )
            if strict and kind is None and not is_cut and product.kind != "embedding":
                problems.append(
                    f"{_WHERE}.strict_mode: no pattern names {product.path}.weight, and it is "
                    f"whole on every rank ({kept.get(product.path, '')})"
                )
        if problems:
            raise ConfigError(problems)

    def differences(
        self, products: Iterable[Product], columns: set[Product], rows: set[Product]
    ) -> list[str]:
        """Layers that the model's own plan cuts and the analysis does not, or otherwise."""
        found = []
        for product in products:
            kind = self._plan_kind(product)
            is_cut = product in columns if kind == "column" else product in rows
            if kind is not None and not is_cut:
                found.append(product.path)
        return found

    def _matching(self, product: Product) -> list[LayerSpec]:
        name = f"{product.path}.weight"
        return [s for s in self._specs if any(re.match(p, name) for p in s.patterns)]

    def _kind(self, product: Product) -> str | None:
        found = self._matching(product)
        return found[0].partition_type if found else None

    def _plan_kind(self, product: Product) -> str | None:
        path = re.sub(r"\.\d+(?=\.|$)", ".*", product.path)
        style = self._plan.get(path)
        return "column" if style in _COLUMNS else "row" if style in _ROWS else None


def _plan(model: nn.Module) -> Mapping[str, str]:
    plan: Any = getattr(model, "tp_plan", None) or getattr(model, "_tp_plan", None)
    return plan if isinstance(plan, Mapping) else {}

"""``deepspeed.ops.op_builder``: names that tell what is built here.

Nothing is built by them: kernels are built when an optimizer or an offload needs them, or by
``drivetrain build``.
"""

from __future__ import annotations

from typing import Any, ClassVar

from drivetrain.errors import PluginError
from drivetrain.plan.registry import Registry


class OpBuilder:
    """One of DeepSpeed's kernels.

    Class attributes:
        NAME: as DeepSpeed names it.
        module: what :meth:`load` returns, a dotted name of ``deepspeed``.
        needs: config paths or optimizer names that have to be served.
    """

    NAME: ClassVar[str] = ""
    module: ClassVar[str] = ""
    needs: ClassVar[tuple[str, ...]] = ()

    def is_compatible(self, verbose: bool = False) -> bool:
        """Whether what takes the kernel's place is installed."""
        registry = Registry.installed()
        served = {*registry.names("optimizers"), *registry.names("plugins")}
        return served.issuperset(self.needs)

    def absolute_name(self) -> str:
        """The dotted name of what takes its place."""
        return f"deepspeed.{self.module}"

    def builder_available(self) -> bool:
        """True: nothing has to be there beforehand."""
        return True

    def load(self, verbose: bool = True) -> Any:
        """The module with the names that use the kernel.

        Raises:
            PluginError: the package that has it is not installed.
        """
        from importlib import import_module

        if not self.is_compatible():
            raise PluginError(f"{self.NAME} needs {', '.join(self.needs)}, which nothing serves")
        return import_module(self.absolute_name())


def compatible_ops() -> dict[str, bool]:
    """Name of each of DeepSpeed's kernels -> whether something takes its place here."""
    return {builder.NAME: builder().is_compatible() for builder in _all(OpBuilder)}


def _all(base: type[OpBuilder]) -> list[type[OpBuilder]]:
    return [kind for direct in base.__subclasses__() for kind in (direct, *_all(direct))]


class AsyncIOBuilder(OpBuilder):
    """Reading and writing files past the page cache."""

    NAME, module, needs = "async_io", "ops.aio", ("aio",)


class CPUAdagradBuilder(OpBuilder):
    """Adagrad on the host."""

    NAME, module, needs = "cpu_adagrad", "ops.adagrad", ("FusedAdagrad",)


class CPUAdamBuilder(OpBuilder):
    """Adam on the host."""

    NAME, module, needs = "cpu_adam", "ops.adam", ("FusedAdam",)


class CPULionBuilder(OpBuilder):
    """Lion on the host."""

    NAME, module, needs = "cpu_lion", "ops.lion", ("FusedLion",)


class FusedAdamBuilder(CPUAdamBuilder):
    """Adam on the device."""

    NAME = "fused_adam"


class FusedLambBuilder(OpBuilder):
    """Lamb on the device."""

    NAME, module, needs = "fused_lamb", "ops.lamb", ("FusedLamb",)


class FusedLionBuilder(CPULionBuilder):
    """Lion on the device."""

    NAME = "fused_lion"


class QuantizerBuilder(OpBuilder):
    """Quantised communication of ZeRO++."""

    NAME, module, needs = "quantizer", "zero", ("zero_optimization",)


class UtilsBuilder(OpBuilder):
    """Several tensors in one, one after another, and back."""

    NAME, module = "utils", "ops.utils"

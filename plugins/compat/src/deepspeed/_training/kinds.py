"""Classes of DeepSpeed's optimizers, for ``isinstance(engine.optimizer, ...)``.

None of them can be made: an engine has one class of optimizer here, and its config says what
DeepSpeed would have made of it.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, NoReturn

from deepspeed._training.engine import DeepSpeedEngine
from deepspeed._training.optimizer import DeepSpeedOptimizer

Dtype = Literal["bf16", "fp16", "fp32"]


class _Kind(type):
    """Tells by the config of an optimizer's engine whether it is an instance."""

    stages: ClassVar[tuple[int, ...]]
    dtypes: ClassVar[tuple[Dtype, ...]]

    def __instancecheck__(cls, instance: Any) -> bool:
        if not isinstance(instance, DeepSpeedOptimizer):
            return False
        engine = instance.engine
        return engine.zero_optimization_stage() in cls.stages and _dtype(engine) in cls.dtypes

    def __call__(cls, *_: Any, **__: Any) -> NoReturn:
        raise TypeError(
            f"{cls.__name__} is not made by scripts: deepspeed.initialize makes an optimizer that "
            "is an instance of it where the config asks for that"
        )


def _dtype(engine: DeepSpeedEngine) -> Dtype:
    return "bf16" if engine.bfloat16_enabled() else "fp16" if engine.fp16_enabled() else "fp32"


class ZeROOptimizer(metaclass=_Kind):
    """Sharded at any stage."""

    stages: ClassVar[tuple[int, ...]] = (1, 2, 3)
    dtypes: ClassVar[tuple[Dtype, ...]] = ("bf16", "fp16", "fp32")


class DeepSpeedZeroOptimizer(ZeROOptimizer):
    """Sharded at stage 1 or 2."""

    stages: ClassVar[tuple[int, ...]] = (1, 2)


class DeepSpeedZeroOptimizer_Stage3(ZeROOptimizer):  # noqa: N801 - DeepSpeed's name
    """Sharded at stage 3."""

    stages: ClassVar[tuple[int, ...]] = (3,)


class BF16_Optimizer(ZeROOptimizer):  # noqa: N801 - DeepSpeed's name
    """Masters of bfloat16 parameters that are not sharded."""

    stages: ClassVar[tuple[int, ...]] = (0,)
    dtypes: ClassVar[tuple[Dtype, ...]] = ("bf16",)


class FP16_Optimizer(ZeROOptimizer):  # noqa: N801 - DeepSpeed's name
    """Masters of float16 parameters that are not sharded."""

    stages: ClassVar[tuple[int, ...]] = (0,)
    dtypes: ClassVar[tuple[Dtype, ...]] = ("fp16",)

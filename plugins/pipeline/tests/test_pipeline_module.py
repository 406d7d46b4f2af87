"""Layers that stages build for themselves train like one process that has them all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from drivetrain_pipeline import LayerSpec, PipelineModule, TiedLayerSpec
from torch import nn

import drivetrain
from drivetrain.engine.engine import Engine
from drivetrain.errors import ConfigError, TrainingError
from drivetrain.testing import RanksFailedError, run_distributed

VOCABULARY, WIDTH, MICRO_BATCHES, STEPS, RATE = 12, 6, 4, 3, 0.2


class Layer(nn.Module):
    """Takes and returns a tuple of values [b, s, width] and of a mask."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(width, width), nn.Tanh())

    def forward(self, inputs: tuple[torch.Tensor, Any]) -> tuple[torch.Tensor, Any]:
        x, extra = inputs
        return x + self.inner(x) * extra["mask"], extra


def with_mask(x: torch.Tensor) -> tuple[torch.Tensor, Any]:
    return x, {"mask": (x.detach() > 0).to(x.dtype)}


def first(inputs: tuple[torch.Tensor, Any]) -> torch.Tensor:
    return inputs[0]


def as_head(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return x @ module.weight.t()


def loss_fn(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def specs() -> list[Any]:
    return [
        TiedLayerSpec("embedding", nn.Embedding, VOCABULARY, WIDTH),
        with_mask,
        *(LayerSpec(Layer, WIDTH) for _ in range(4)),
        first,
        LayerSpec(nn.LayerNorm, WIDTH),
        TiedLayerSpec("embedding", nn.Embedding, VOCABULARY, WIDTH, forward_fn=as_head),
    ]


def module(stages: int | None, **options: Any) -> PipelineModule:
    torch.manual_seed(0)
    return PipelineModule(specs(), num_stages=stages, loss_fn=loss_fn, **options)


def data(steps: int, shards: int, lengths: tuple[int, ...] = (5,)) -> list[list[list[Any]]]:
    generator = torch.Generator().manual_seed(1)

    def batch(number: int) -> tuple[torch.Tensor, torch.Tensor]:
        size = 2, lengths[number % len(lengths)]
        tokens = torch.randint(0, VOCABULARY, size, generator=generator)
        return tokens, tokens.roll(1, 1)

    return [
        [[batch(micro) for _ in range(shards)] for micro in range(MICRO_BATCHES)]
        for _ in range(steps)
    ]


def engine_of(model: PipelineModule, config: dict[str, Any]) -> Engine:
    engine, *_ = drivetrain.initialize(
        model=model,
        model_parameters=[p for p in model.parameters() if p.requires_grad] or None,
        config={
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": MICRO_BATCHES,
            "gradient_clipping": 0.0,
            "optimizer": {"type": "SGD", "params": {"lr": RATE}},
            **config,
        },
    )
    engine.get_global_grad_norm()
    return engine


def train(
    stages: int | None, config: dict[str, Any], options: dict[str, Any], lengths: tuple[int, ...]
) -> tuple[list[tuple[float, float]], dict[str, torch.Tensor]]:
    engine = engine_of(module(stages, **options), config)
    curve, mesh = [], engine.job.mesh
    for step in data(STEPS, mesh.size("dp"), lengths):
        loss = engine.train_batch(iter([micro[mesh.coordinate("dp")] for micro in step]))
        norm = engine.get_global_grad_norm()
        curve.append((loss.item(), float("nan") if norm is None else norm))
    names = {n: p.detach().clone() for n, p in engine.module.named_parameters()}
    engine.destroy()
    return curve, names


def train_alone(shards: int, lengths: tuple[int, ...]) -> tuple[Any, dict[str, torch.Tensor]]:
    """Plain torch, one process, the layers called one after the other."""
    model, curve = module(1), []
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for step in data(STEPS, shards, lengths):
        loss = torch.stack([loss_fn(model(x), y) for micro in step for x, y in micro]).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), float("inf"))
        optimizer.step()
        curve.append((loss.item(), norm.item()))
    return curve, {n: p.detach() for n, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("world", "stages", "config", "options", "lengths"),
    [
        pytest.param(1, 1, {}, {}, (5,), id="one stage"),
        pytest.param(2, 2, {}, {}, (5, 7, 3), id="shapes that change"),
        pytest.param(2, 2, {}, {"dynamic_shape": True}, (5, 7), id="shapes with each message"),
        pytest.param(4, 2, {}, {"activation_checkpoint_interval": 2}, (5,), id="recomputed"),
        pytest.param(4, 4, {}, {"partition_method": "type:layer"}, (5,), id="by class"),
        pytest.param(2, None, {"pipeline": {"stages": 2, "schedule": "zb_v"}}, {}, (5,), id="V"),
        pytest.param(2, 2, {"pipeline": {"partition": "uniform"}}, {}, (5,), id="uniform"),
    ],
)
def test_layers_train_like_one_process(
    world: int,
    stages: int | None,
    config: dict[str, Any],
    options: dict[str, Any],
    lengths: tuple[int, ...],
) -> None:
    expected, trained = train_alone(world // (stages or 2), lengths)
    names: set[str] = set()
    for curve, parameters in run_distributed(train, world, stages, config, options, lengths):
        for point, want in zip(curve, expected, strict=True):
            assert point == pytest.approx(want, rel=1e-5)
        for name, values in parameters.items():
            torch.testing.assert_close(values, trained[name], rtol=1e-5, atol=1e-6)
        assert len(parameters) < len(trained) or world == 1  # its own layers alone
        names |= set(parameters)
    assert names == set(trained)


def save(folder: str) -> list[float]:
    engine = engine_of(module(2), {})
    steps = data(STEPS, 1)
    engine.train_batch(iter([micro[0] for micro in steps[0]]))
    engine.save_checkpoint(folder)
    losses = [engine.train_batch(iter([m[0] for m in step])).item() for step in steps[1:]]
    engine.destroy()
    return losses


def go_on(folder: str, stages: int) -> tuple[list[float], float]:
    engine = engine_of(module(stages), {})
    engine.load_checkpoint(folder)
    steps = data(STEPS, 1)
    losses = [engine.train_batch(iter([m[0] for m in step])).item() for step in steps[1:]]
    evaluated = engine.eval_batch(iter([steps[0][0][0]])).item()
    engine.destroy()
    return losses, evaluated


def test_other_numbers_of_stages_go_on_from_a_checkpoint(tmp_path: Path) -> None:
    straight = run_distributed(save, 2, str(tmp_path))[0]
    answers = [run_distributed(go_on, stages, str(tmp_path), stages) for stages in (4, 1)]
    for ranks in answers:
        for losses, evaluated in ranks:
            assert losses == pytest.approx(straight, rel=1e-5)
            assert evaluated == pytest.approx(answers[0][0][1], rel=1e-5)


# -- what is refused ---------------------------------------------------------------------------


def refused(case: str) -> str:
    batches = [micro[0] for micro in data(1, 1)[0]]
    if case == "forward":
        engine = engine_of(module(2), {})
        with pytest.raises(TrainingError) as found:
            engine(batches[0][0])
        return str(found.value)
    engine = engine_of(module(2), {})
    stage = engine.job.mesh.coordinate("pp")
    if case == "data ends":
        batches = batches[: 4 - stage]
    elif case == "other shapes":
        batches = [(x[:, : 5 - stage], y[:, : 5 - stage]) for x, y in batches]
    with pytest.raises(TrainingError) as raised:
        engine.train_batch(iter(batches))
    return str(raised.value)


@pytest.mark.parametrize(
    ("case", "reasons"),
    [
        ("forward", ("call engine.train_batch", "call engine.train_batch")),
        ("data ends", ("stage 1 could not read its micro-batches", "ended at micro-batch 4 of 4")),
        ("other shapes", ("other shapes on stage 1 than on stage 0",) * 2),
    ],
)
def test_what_one_stage_meets_is_said_on_all(case: str, reasons: tuple[str, str]) -> None:
    for text, reason in zip(run_distributed(refused, 2, case), reasons, strict=True):
        assert reason in text


def too_many_stages() -> None:
    module(3)


def stage_without_parameters() -> None:
    PipelineModule([LayerSpec(nn.Linear, 2, 2), LayerSpec(nn.Tanh)], 2, partition_method="uniform")


def fewer_layers() -> None:
    PipelineModule([LayerSpec(nn.Linear, 2, 2)], 2)


def as_long_as_positive(x: torch.Tensor) -> torch.Tensor:
    return x if x.sum() > 0 else x[:1]


def shapes_that_depend_on_values() -> None:
    layers = [as_long_as_positive, nn.Linear(4, 4), nn.Linear(4, 1)]
    model = PipelineModule(layers, 2, loss_fn=lambda x, y: x.mean(), partition_method="type:Linear")
    batches = [(torch.full((2, 4), sign), torch.zeros(2)) for sign in (1.0, -1.0) * 2]
    engine_of(model, {}).train_batch(iter(batches))


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (
            shapes_that_depend_on_values,
            "what chunk 0 makes of micro-batch 1 has other shapes than before.*dynamic_shape",
        ),
        (too_many_stages, "2 ranks cannot be divided into 3 stages: 2 / 3 leaves 2"),
        (stage_without_parameters, "stage 1 has layers .1. without parameters"),
        (fewer_layers, "1 layers cannot be cut into 2 parts"),
    ],
)
def test_layers_that_make_no_stages_are_refused(function: Any, reason: str) -> None:
    with pytest.raises(RanksFailedError, match=reason):
        run_distributed(function, 2)


def test_descriptions_say_what_is_wrong_with_them() -> None:
    with pytest.raises(ConfigError, match=r"needs a subclass of torch\.nn\.Module"):
        LayerSpec(max)
    with pytest.raises(ConfigError, match="has no parameter 'bias'; it has weight"):
        TiedLayerSpec("e", nn.Embedding, 3, 2, tied_weight_attr="bias").build()
    for other in (TiedLayerSpec("e", nn.Linear, 2, 3), TiedLayerSpec("e", nn.Embedding, 4, 2)):
        with pytest.raises(ConfigError, match=r"'e': layer 0 is .* layer 1 .* forward_fn"):
            PipelineModule([TiedLayerSpec("e", nn.Embedding, 3, 2), other], 1)
    with pytest.raises(ConfigError, match="type:Conv matches no layer"):
        PipelineModule(specs(), 1, partition_method="type:Conv")


class Pretrained(nn.Embedding):
    """Looks at the values that it was made with."""

    def __init__(self, rows: int) -> None:
        super().__init__(rows, 2)
        self.scale = float(self.weight.abs().max().item())


def test_tied_layers_that_read_values_when_built_are_compared_by_class() -> None:
    tied = [TiedLayerSpec("e", Pretrained, 3), TiedLayerSpec("e", Pretrained, 3)]
    for method in ("uniform", "parameters"):
        model = PipelineModule(tied, 1, partition_method=method)
        assert model.tied_modules["e"].scale > 0
    with pytest.raises(ConfigError, match=r"'e': layer 0 is .* layer 1 .* forward_fn"):
        PipelineModule([tied[0], TiedLayerSpec("e", nn.Embedding, 3, 2)], 1)

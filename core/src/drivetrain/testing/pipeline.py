"""A small real pipeline: stages over ``pp``, one forward and one backward in turn, by hand.

It shows what a pipeline may rely on, and holds model states to it: 1F1B of Narayanan et al. 2021,
"Efficient Large-Scale Language Model Training on GPU Clusters", and, with ``split``, gradients of
weights apart from those of inputs, as in Qi et al. 2023, "Zero Bubble Pipeline Parallelism".
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import nn

from drivetrain.contracts.loop.transform import Phase, Transform
from drivetrain.contracts.plugin.plugin import Plugin, Sections, hookimpl
from drivetrain.contracts.plugin.section import PositiveInt, Section
from drivetrain.contracts.world.axis import Atom, AxisRequest
from drivetrain.contracts.world.collective import Purpose, Tag

if TYPE_CHECKING:
    from drivetrain.contracts.loop.runner import Runner
    from drivetrain.engine.engine import Engine
    from drivetrain.job.job import Job

WIDTH, LAYERS, ROWS = 6, 4, 3

Split = Literal["no", "backward", "grad", "stored"]
"""Gradients of weights with those of inputs, or later: by a backward from the layers, by
``autograd.grad``, or by hand from what the layers have stored, with those of biases in backward."""

Stored = list[tuple[nn.Parameter, torch.Tensor, torch.Tensor]]
"""Weights with the inputs of their layers and the gradients of their outputs, [rows, width]."""


class _WithoutWeight(torch.autograd.Function):
    """A linear layer whose backward leaves the gradient of its weight for later."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: nn.Parameter, bias: torch.Tensor, stored: Stored
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.weight, ctx.stored = weight, stored
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        x, weight = ctx.saved_tensors
        ctx.stored.append((ctx.weight, x, gradient))
        return gradient @ weight, None, gradient.sum(0), None


class Linear(nn.Linear):
    """A linear layer that stores what its weight's gradient is made of, where it is told to."""

    stored: Stored | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.stored is None:
            return super().forward(x)
        apply: Any = _WithoutWeight.apply  # torch does not type it
        output: torch.Tensor = apply(x, self.weight, self.bias, self.stored)
        return output


class Layers(nn.Module):
    """Layers of one width; a stage has some of them, and the others are the identity.

    Attributes:
        cut: whether each layer begins a graph of its own.
        made: (input, output) of each layer in the last forward, where graphs are cut.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            nn.Sequential(Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(LAYERS)
        )
        self.cut = False
        self.made: list[tuple[torch.Tensor, torch.Tensor]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.made = []
        for layer in self.layers:
            if self.cut and not isinstance(layer, nn.Identity):
                x = x.detach().requires_grad_()
                self.made.append((x, layer(x)))
                x = self.made[-1][1]
            else:
                x = layer(x)
        return x


def loss_of(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The mean loss of a micro-batch."""
    return (output.to(target.dtype) - target).square().sum(1).mean()


class ToyPipelineSection(Section):
    """``{"toy_pipeline": {"stages": 2}}``."""

    stages: PositiveInt = 2
    split: Split = "no"


class ToyPipeline(Plugin):
    """Cuts :class:`Layers` into stages, and runs their micro-batches."""

    name = "toy_pipeline"
    sections: ClassVar[Sections] = {"toy_pipeline": ToyPipelineSection}

    @hookimpl
    def mesh_axes(self) -> Sequence[AxisRequest]:
        return [Atom("pp", self.section(ToyPipelineSection).stages)]

    @hookimpl
    def transform_module(self, job: Job, module: nn.Module) -> Sequence[Transform]:
        def keep_own(model: nn.Module) -> nn.Module:
            assert isinstance(model, Layers)
            own = LAYERS // job.mesh.size("pp")
            first = own * job.mesh.coordinate("pp")
            for number in range(LAYERS):
                if not first <= number < first + own:
                    model.layers[number] = nn.Identity()
            model.cut = self.section(ToyPipelineSection).split in ("backward", "grad")
            return model

        return [Transform(Phase.PARTITION, keep_own)]

    @hookimpl
    def describe_parameters(self, job: Job, module: nn.Module) -> None:
        for parameter in module.parameters():
            job.parameters.info(parameter).distinct = ("pp",)

    @hookimpl
    def build_runner(self, engine: Engine) -> Runner:
        return Stages(engine, self.section(ToyPipelineSection).split)


class Stages:
    """Runs one stage's part of a global batch.

    Args:
        engine: of this stage.
        split: when gradients of weights are computed.
    """

    def __init__(self, engine: Engine, split: Split) -> None:
        self._engine = engine
        self._split = split
        mesh = engine.job.mesh
        self._stage, self._stages = mesh.coordinate("pp"), mesh.size("pp")
        self._is_last = self._stage == self._stages - 1
        self._dtype = next(engine.module.parameters()).dtype

    def run(self, batches: Iterator[Any], train: bool) -> torch.Tensor:
        self._losses = torch.zeros(2, dtype=torch.float64, device=self._engine.device)
        # Inputs and what backward starts from, by micro-batch; what weights still wait for.
        self._under_way: deque[tuple[torch.Tensor, torch.Tensor, list[Any]]] = deque()
        self._weights_left: deque[tuple[list[Any], list[torch.Tensor]]] = deque()
        self._begin_storing()
        count = self._engine.gradient_accumulation_steps() if train else 1
        self._batches = iter([next(batches) for _ in range(count)])
        if not train:
            output = self._forward(*self._move([], self._inputs))
            self._move([] if self._is_last else [(output, 1)], [])
            return self._losses
        ahead = min(count, self._stages - 1 - self._stage)
        for _ in range(ahead):
            output = self._forward(*self._move([], self._inputs))
            self._move([(output, 1)], [])
        received = self._move([], self._inputs if count > ahead else [])
        for number in range(count - ahead):
            output = self._forward(*received)
            gradients = self._move([] if self._is_last else [(output, 1)], self._gradients)
            back = self._backward(gradients, last=number == count - 1)
            more = number + 1 < count - ahead
            received = self._move(back, self._inputs if more else [])
        for number in range(count - ahead, count):
            gradients = self._move([], self._gradients)
            self._move(self._backward(gradients, last=number == count - 1), [])
        while self._weights_left:
            self._weights(*self._weights_left.popleft(), last=not self._weights_left)
        self._engine.step(micro_batches=count)
        return self._losses

    # -- messages: tensors and how many stages on they go, or from how far they come ----------

    @property
    def _inputs(self) -> list[int]:
        return [-1] if self._stage else []

    @property
    def _gradients(self) -> list[int]:
        return [] if self._is_last else [1]

    def _move(
        self, sends: Sequence[tuple[torch.Tensor, int]], receives: Sequence[int]
    ) -> list[torch.Tensor]:
        engine = self._engine
        like = torch.empty(ROWS, WIDTH, dtype=self._dtype, device=engine.device)
        came = [torch.empty_like(like) for _ in receives]
        engine.job.communicator.send_receive(
            [(tensor.detach().contiguous(), self._stage + step) for tensor, step in sends],
            [(tensor, self._stage + step) for tensor, step in zip(came, receives, strict=True)],
            "pp",
            Tag(Purpose.ACTIVATION, site="toy pipeline"),
        )
        return came

    # -- computing ----------------------------------------------------------------------------

    def _forward(self, *received: torch.Tensor) -> torch.Tensor:
        x, target = next(self._batches)
        x = received[0].requires_grad_() if received else x.to(self._dtype)
        output: torch.Tensor = self._engine(x)
        start = output
        if self._is_last:
            start = loss_of(output, target)
            self._losses += torch.stack([start.detach().double(), start.new_ones(()).double()])
        made: Any = self._engine.module.made
        self._under_way.append((x, start, made))
        return output

    def _backward(
        self, gradients: Sequence[torch.Tensor], last: bool
    ) -> list[tuple[torch.Tensor, int]]:
        """Run one micro-batch's backward; returns what goes to the stage before."""
        x, start, made = self._under_way.popleft()
        before: torch.Tensor | None
        if self._split in ("backward", "grad"):
            before = self._backward_of_inputs(start, made, gradients)
        elif self._is_last:
            self._engine.backward(start, last=last)
            before = x.grad
        else:
            self._engine.backward_from(start, gradients[0], last=last)
            before = x.grad
        if self._split == "stored":
            self._weights_left.append((list(self._stored), []))
            self._stored.clear()
        return [] if not self._stage or before is None else [(before, -1)]

    def _begin_storing(self) -> None:
        self._stored: Stored = []
        if self._split == "stored":
            layers = [part for part in self._engine.module.modules() if isinstance(part, Linear)]
            for layer in layers:
                layer.stored = self._stored
            self._engine.states.defer([next(layer.parameters()) for layer in layers])  # weights

    def _backward_of_inputs(
        self, start: torch.Tensor, made: list[Any], gradients: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        if self._is_last:
            scaled = self._engine.scale(start)
            gradient = torch.autograd.grad(scaled, made[-1][1], retain_graph=True)[0]
        else:
            gradient = gradients[0]
        found: list[torch.Tensor] = []
        for x, output in reversed(made):
            found.append(gradient)
            gradient = torch.autograd.grad(output, x, gradient, retain_graph=True)[0]
        self._weights_left.append((made, found[::-1]))
        result: torch.Tensor = gradient
        return result

    def _weights(self, made: list[Any], gradients: list[torch.Tensor], last: bool) -> None:
        if self._split == "stored":
            # Layer by layer, so that one's reduction goes on while the next is computed.
            for weight, x, gradient in made:
                weight.grad = gradient.t() @ x
                self._engine.gradients_ready([weight], last=last)
                if not last:
                    self._engine.states.defer([weight])
            return
        outputs = [output for _, output in made]
        if self._split == "backward":
            self._engine.backward_from(outputs, gradients, last=last)
            return
        parameters = [p for p in self._engine.module.parameters() if p.requires_grad]
        found = torch.autograd.grad(outputs, parameters, gradients)
        for parameter, gradient in zip(parameters, found, strict=True):
            parameter.grad = gradient
        self._engine.gradients_ready(parameters, last=last)


def data(steps: int, micro_batches: int, shards: int) -> list[list[list[Any]]]:
    """(Inputs, targets) [rows, width] by step, micro-batch and data shard, in float64."""
    generator = torch.Generator().manual_seed(1)

    def rows() -> torch.Tensor:
        return torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64)

    return [
        [[(rows(), rows()) for _ in range(shards)] for _ in range(micro_batches)]
        for _ in range(steps)
    ]


Curve = list[tuple[float, float]]
"""Loss, and norm of the gradient before clipping, by step."""


def train_alone(
    steps: int, micro_batches: int, shards: int, rate: float, clipping: float
) -> tuple[Curve, dict[str, torch.Tensor]]:
    """Train with plain torch, in one process and in float64: the curve, and the parameters."""
    model, curve = Layers().double(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    for step in data(steps, micro_batches, shards):
        terms = [loss_of(model(x), y) for micro in step for x, y in micro]
        loss = torch.stack(terms).mean()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        norm = nn.utils.clip_grad_norm_(model.parameters(), clipping or float("inf"))
        optimizer.step()
        curve.append((loss.item(), norm.item()))
    return curve, {name: p.detach() for name, p in model.named_parameters()}


def train_stages(engine: Engine, begin: int, end: int, micro_batches: int) -> Curve:
    """Train this rank's stage; the losses are those that ``train_batch`` and the report have."""
    mesh, curve = engine.job.mesh, []
    for step in data(end, micro_batches, mesh.size("dp"))[begin:]:
        own = [micro[mesh.coordinate("dp")] for micro in step]
        batches = iter([(x.float(), y) for x, y in own])
        loss = engine.train_batch(batches).item()
        report, norm = engine.last_report, engine.get_global_grad_norm()
        assert report is not None
        assert report.loss is not None
        assert abs(report.loss - loss) <= 1e-6 * abs(loss), (report.loss, loss)
        curve.append((loss, float("nan") if norm is None else norm))
    return curve

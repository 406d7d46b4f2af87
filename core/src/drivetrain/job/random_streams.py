"""Named streams of random numbers, each the same on the ranks that must agree, else different."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from drivetrain.errors import ConfigError, TrainingError

if TYPE_CHECKING:
    from drivetrain.communication.mesh import Mesh

_STREAMS: Mapping[str, tuple[str, ...]] = {
    "data": ("dp",),
    "model": ("pp", "tp"),
    "dropout": ("pp", "dp", "sp"),
}
"""Core's streams and the axes along which their ranks differ.

"dropout" is that of activations which tensor-parallel ranks hold in common. Each forward of an
engine that trains draws from it.
"""


@dataclass(frozen=True)
class StreamPositions:
    """Where streams were at one moment.

    Args:
        states: by name, of those that were in use.
        forked: names of the forks inside of which that was.
    """

    states: Mapping[str, torch.Tensor]
    forked: tuple[str, ...]


class RandomStreams:
    """Generators by name on the job's device.

    A stream's seed is a hash of the job's seed, the stream's name and the rank's coordinates along
    the axes in which its ranks differ. Seeds that are sums (``seed + rank``) would make streams of
    neighbouring seeds and ranks equal.

    Args:
        seed: the job's seed.
        mesh: the job's axes.
        device: where the numbers are drawn; on the meta device the host draws.
    """

    def __init__(self, seed: int, mesh: Mesh, device: torch.device) -> None:
        self.seed = seed
        self._mesh = mesh
        self._device = torch.device("cpu") if device.type == "meta" else device
        self._axes: dict[str, tuple[str, ...]] = dict(_STREAMS)
        self._generators: dict[str, torch.Generator] = {}
        self._forked: list[str] = []
        self._repeating = False

    def declare(self, name: str, axes: tuple[str, ...]) -> None:
        """Make a stream that differs along ``axes`` and agrees along all others.

        Raises:
            ConfigError: ``name`` is declared with other axes.
        """
        if self._axes.setdefault(name, axes) != axes:
            raise ConfigError(
                f"random stream {name!r} differs along {self._axes[name]}, so it cannot also "
                f"differ along {axes}"
            )

    def generator(self, name: str) -> torch.Generator:
        """The generator of a stream; drawing from it advances the stream.

        Raises:
            ConfigError: no such stream is declared.
        """
        generator = self._generators.get(name)
        if generator is None:
            generator = self._generators[name] = torch.Generator(self._device)
            generator.manual_seed(self._seed(name))
        return generator

    @contextmanager
    def fork(self, name: str) -> Iterator[None]:
        """Draw from a stream wherever torch draws from the device's default generator.

        The stream goes on from where it was, and the default generator is as before afterwards.
        Inside a fork of the same stream nothing changes. On a host a fork takes 10 to 25
        microseconds, most of them for copies of the 5 kB of state of a Mersenne Twister; the state
        of a CUDA generator has 16 bytes.

        ``torch.utils.checkpoint`` repeats what was drawn in a fork, as it saves and restores the
        default generator. One around a whole fork would draw on instead, and is refused.

        Raises:
            TrainingError: numbers were drawn in a fork that began in a backward pass.
        """
        if name in self._forked[-1:]:
            yield
            return
        generator = self.generator(name)
        begin, before = generator.get_state(), _default_state(self._device)
        repeats = not self._repeating and torch._C._current_graph_task_id() != -1
        _set_default_state(self._device, begin)
        self._forked.append(name)
        try:
            yield
        finally:
            self._forked.pop()
            end = _default_state(self._device)
            _set_default_state(self._device, before)
            if repeats and not torch.equal(begin, end):
                raise TrainingError(
                    f"the random stream {name!r} was drawn from inside a backward pass, where a "
                    "forward is repeated but its dropout cannot be: call torch.utils.checkpoint "
                    "inside the module, not around the engine"
                )
            generator.set_state(end)

    def positions(self) -> StreamPositions:
        """Where every stream is now, for :meth:`repeat`."""
        states = {name: stream.get_state() for name, stream in self._generators.items()}
        return StreamPositions(states, tuple(self._forked))

    @contextmanager
    def repeat(self, positions: StreamPositions) -> Iterator[None]:
        """Draw again what was drawn after ``positions``, and go on from where streams are now.

        For recomputation in backward. The device's default generator is the caller's to set back;
        ``torch.utils.checkpoint`` does so. What a fork had put in its place then is there again, so
        a fork of that stream inside leaves it alone.
        """
        now, forked, repeating = self.positions(), self._forked, self._repeating
        self._forked, self._repeating = list(positions.forked), True
        for name, generator in self._generators.items():
            if name in positions.states:
                generator.set_state(positions.states[name])
            else:  # first used behind the positions
                generator.manual_seed(self._seed(name))
        try:
            yield
        finally:
            self._forked, self._repeating = forked, repeating
            for name, generator in self._generators.items():
                if name in now.states:
                    generator.set_state(now.states[name])

    def start_afresh(self) -> None:
        """Begin all streams again, each from its seed."""
        self._generators.clear()

    def state_dict(self) -> dict[str, Any]:
        """The seed and every used stream's axes and state, as JSON data."""
        return {
            "seed": self.seed,
            "streams": {
                name: {"axes": list(self._axes[name]), "state": _encode(generator.get_state())}
                for name, generator in self._generators.items()
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue all streams from where :meth:`state_dict` was taken, on the same coordinates."""
        self.seed = int(state["seed"])
        self._generators.clear()
        for name, stream in state["streams"].items():
            self.declare(name, tuple(stream["axes"]))
            self.generator(name).set_state(_decode(stream["state"]))

    def _seed(self, name: str) -> int:
        if name not in self._axes:
            known = ", ".join(self._axes)
            raise ConfigError(f"no random stream is declared as {name!r}; there are {known}")
        place = [(axis, self._mesh.coordinate(axis)) for axis in self._axes[name]]
        digest = hashlib.sha256(repr((self.seed, name, place)).encode()).digest()
        return int.from_bytes(digest[:8], "little") >> 1  # torch takes seeds as signed integers


def _default_state(device: torch.device) -> torch.Tensor:
    if device.type == "cpu":
        return torch.get_rng_state()
    state: torch.Tensor = torch.get_device_module(device.type).get_rng_state(device)
    return state


def _set_default_state(device: torch.device, state: torch.Tensor) -> None:
    if device.type == "cpu":
        torch.set_rng_state(state)
    else:
        torch.get_device_module(device.type).set_rng_state(state, device)


def _encode(state: torch.Tensor) -> str:
    return base64.b64encode(bytes(state.tolist())).decode()


def _decode(text: str) -> torch.Tensor:
    return torch.tensor(list(base64.b64decode(text)), dtype=torch.uint8)

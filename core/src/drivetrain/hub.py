"""The composed plugins of one plan: one typed method per hook.

The hub owns the pluggy manager; nobody else touches it. Implementations are asked in an order that
``Plugin.after`` decides, plugins by name where it does not, and core's own defaults last.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from itertools import chain
from traceback import walk_tb
from typing import TYPE_CHECKING, Any, cast

import pluggy

from drivetrain import hookspecs
from drivetrain.errors import PluginError
from drivetrain.plugin import Plugin
from drivetrain.wording import did_you_mean

if TYPE_CHECKING:
    import torch

    from drivetrain.accelerator import Accelerator
    from drivetrain.batch import Batch
    from drivetrain.checkpoint import StateReader, StateWriter
    from drivetrain.communicator import CommunicatorLayer
    from drivetrain.engine import Engine
    from drivetrain.home import BucketSpec, StateHome
    from drivetrain.job import Job
    from drivetrain.loader import LoaderRequest
    from drivetrain.mesh_layout import AxisRequest
    from drivetrain.model_states import ModelStates
    from drivetrain.plan import Plan
    from drivetrain.plugin import Problem
    from drivetrain.runner import Runner
    from drivetrain.step_report import StepReport
    from drivetrain.transform import Transform
    from drivetrain.update_rule import OptimizerPlan

HOOKS = tuple(name for name, value in vars(hookspecs).items() if hasattr(value, "drivetrain_spec"))
"""Names of all hooks, in the order of ``hookspecs.py``."""

_FOLDED = ("prepare_inputs",)


class Hub:
    """Registers plugins in order, checks them, and calls their hooks.

    Each hook of ``hookspecs.py`` is a method of the same name; answers of collecting hooks come as
    one flat list.

    Args:
        core: core's defaults; asked last, in reverse.
        others: every other plugin, in any order.
        labels: plugin name -> what messages call it (with distribution and version).

    Raises:
        PluginError: two plugins of one name, a cycle in ``after``, an implementation of a hook
            that does not exist or with a wrong signature.
    """

    def __init__(
        self,
        core: Iterable[Plugin] = (),
        others: Iterable[Plugin] = (),
        labels: Mapping[str, str] | None = None,
    ) -> None:
        self._manager = pluggy.PluginManager("drivetrain")
        self._manager.add_hookspecs(hookspecs)
        self._labels = dict(labels or {})
        self._frozen = False
        self._prepare_inputs: list[pluggy.HookImpl] | None = None
        defaults = list(core)
        # pluggy asks the last registered first, so the first in order is registered last.
        for plugin in [*defaults, *reversed(in_order(others, (p.name for p in defaults)))]:
            self.register(plugin, plugin.name)

    # -- registration -------------------------------------------------------------------------

    def register(self, plugin: object, name: str) -> None:
        """Add an object whose hooks are asked before those of all others, such as an accelerator.

        Raises:
            PluginError: the hub is frozen, the name is taken, or an implementation is malformed.
        """
        if self._frozen:
            raise PluginError(f"{self.label(name)} comes too late: the plan's hooks are in use")
        if self._manager.has_plugin(name):
            raise PluginError(f"two plugins are named {name!r}; a plan can hold only one of them")
        self._check(plugin, name)
        try:
            self._manager.register(plugin, name)
        except (ValueError, pluggy.PluginValidationError) as error:
            reason = " ".join(str(error).split())
            raise PluginError(f"{self.label(name)} cannot be registered: {reason}") from error
        self._prepare_inputs = None

    def freeze(self) -> None:
        """Accept no more registrations; :class:`~drivetrain.job.Job` does this when it opens."""
        self._frozen = True

    # -- looking at it --------------------------------------------------------------------------

    @property
    def plugins(self) -> dict[str, object]:
        """Name -> registered object, in order of registration."""
        return {name: plugin for name, plugin in self._manager.list_name_plugin() if plugin}

    def label(self, name: str) -> str:
        """What messages call a plugin, e.g. ``plugin 'moe' (drivetrain-moe 0.1.0)``."""
        return self._labels.get(name, f"plugin {name!r}")

    def has(self, hook: str) -> bool:
        """Whether anybody implements ``hook``."""
        return bool(self.implementations(hook))

    def implementations(self, hook: str) -> list[pluggy.HookImpl]:
        """Implementations of ``hook`` in the order in which they are asked, wrappers first."""
        caller: pluggy.HookCaller = getattr(self._manager.hook, hook)
        return caller.get_hookimpls()[::-1]

    # -- plan -------------------------------------------------------------------------------------

    def configure(self, plan: Plan) -> list[Problem]:
        return self._collect("configure", plan=plan)

    def plan_batch(self, plan: Plan) -> Batch | None:
        return cast("Batch | None", self._call("plan_batch", plan=plan))

    def mesh_axes(self, plan: Plan) -> list[AxisRequest]:
        return self._collect("mesh_axes", plan=plan)

    # -- job --------------------------------------------------------------------------------------

    def select_accelerator(
        self, candidates: Mapping[str, Accelerator], requested: str | None
    ) -> Accelerator | None:
        return cast(
            "Accelerator | None",
            self._call("select_accelerator", candidates=candidates, requested=requested),
        )

    def wrap_communicator(self, job: Job) -> list[CommunicatorLayer]:
        return self._collect("wrap_communicator", job=job)

    def place_state(self, job: Job, specs: Sequence[BucketSpec]) -> Sequence[StateHome] | None:
        return cast("Sequence[StateHome] | None", self._call("place_state", job=job, specs=specs))

    # -- engine -----------------------------------------------------------------------------------

    def transform_module(self, job: Job, module: torch.nn.Module) -> list[Transform]:
        return self._collect("transform_module", job=job, module=module)

    def describe_parameters(self, job: Job, module: torch.nn.Module) -> None:
        self._call("describe_parameters", job=job, module=module)

    def build_model_states(
        self, job: Job, module: torch.nn.Module, optimizer: OptimizerPlan | None
    ) -> ModelStates | None:
        return cast(
            "ModelStates | None",
            self._call("build_model_states", job=job, module=module, optimizer=optimizer),
        )

    def build_runner(self, job: Job, engine: Engine) -> Runner | None:
        return cast("Runner | None", self._call("build_runner", job=job, engine=engine))

    def build_loader(self, job: Job, request: LoaderRequest) -> Any | None:
        return self._call("build_loader", job=job, request=request)

    def prepare_inputs(
        self, engine: Engine, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        # pluggy gives all implementations the same arguments; here each feeds the next.
        if self._prepare_inputs is None:
            self._prepare_inputs = self.implementations("prepare_inputs")
        for impl in self._prepare_inputs:
            values: dict[str, Any] = {"engine": engine, "args": args, "kwargs": kwargs}
            try:
                answer: Any = impl.function(*[values[name] for name in impl.argnames])
            except Exception as error:
                self._blame(error, "prepare_inputs")
                raise
            if answer is not None:
                args, kwargs = answer
        return args, kwargs

    def backward(self, engine: Engine, loss: torch.Tensor, retain_graph: bool) -> bool | None:
        return cast(
            "bool | None",
            self._call("backward", engine=engine, loss=loss, retain_graph=retain_graph),
        )

    def optimizer_step(self, engine: Engine) -> bool | None:
        return cast("bool | None", self._call("optimizer_step", engine=engine))

    def step_end(self, engine: Engine, report: StepReport) -> None:
        self._call("step_end", engine=engine, report=report)

    def save_state(self, engine: Engine, writer: StateWriter) -> None:
        self._call("save_state", engine=engine, writer=writer)

    def load_state(self, engine: Engine, reader: StateReader) -> None:
        self._call("load_state", engine=engine, reader=reader)

    def report_rows(self) -> list[tuple[str, str]]:
        return self._collect("report_rows")

    # -- calling ----------------------------------------------------------------------------------

    def _call(self, hook: str, **arguments: Any) -> Any:
        try:
            return getattr(self._manager.hook, hook)(**arguments)
        except Exception as error:
            self._blame(error, hook)
            raise

    def _collect(self, hook: str, **arguments: Any) -> list[Any]:
        return list(chain.from_iterable(self._call(hook, **arguments)))

    def _blame(self, error: Exception, hook: str) -> None:
        """Note on ``error`` whose implementation raised it, found in the traceback."""
        codes = {
            getattr(function, "__code__", None): impl.plugin_name
            for impl in self.implementations(hook)
            for function in (impl.function, inspect.unwrap(impl.function))
        }
        frames = [frame.f_code for frame, _ in walk_tb(error.__traceback__)]
        culprits = [codes[code] for code in frames if code in codes]
        if culprits:
            note = f"raised by {self.label(culprits[-1])} in hook {hook!r}"
            if note not in getattr(error, "__notes__", ()):
                error.add_note(note)

    # -- checking ---------------------------------------------------------------------------------

    def _check(self, plugin: object, name: str) -> None:
        """Refuse what pluggy accepts silently, or reports without the plugin's distribution."""
        for attribute in dir(plugin):
            options = self._manager.parse_hookimpl_opts(plugin, attribute)
            if options is None:
                continue
            if attribute not in HOOKS and not options["optionalhook"]:
                hint = did_you_mean(attribute, HOOKS)
                flaw = f"implements hook {attribute!r}, which does not exist{hint}"
                raise PluginError(f"{self.label(name)} {flaw}")
            if attribute in _FOLDED and (options["wrapper"] or options["hookwrapper"]):
                raise PluginError(
                    f"{self.label(name)}: hook {attribute!r} is folded and takes no wrappers"
                )
            for parameter in inspect.signature(getattr(plugin, attribute)).parameters.values():
                if parameter.kind is not parameter.POSITIONAL_OR_KEYWORD:
                    flaw = f"{str(parameter)!r} cannot be filled by name"
                elif parameter.default is not parameter.empty:
                    flaw = f"{str(parameter)!r} has a default, which would hide a misspelt name"
                else:
                    continue
                raise PluginError(f"{self.label(name)}: in its hook {attribute!r}, {flaw}")


def in_order(plugins: Iterable[Plugin], core: Iterable[str] = ()) -> list[Plugin]:
    """Plugins such that each stands behind those that it names in ``after``; else by name.

    Args:
        plugins: any plugins.
        core: names of core's defaults, which always come last.

    Raises:
        PluginError: ``after`` forms a cycle, which is named, or names one of core's defaults.
    """
    listed = sorted(plugins, key=lambda plugin: plugin.name)
    by_name = {plugin.name: plugin for plugin in listed}
    defaults = set(core)
    for plugin in listed:
        if by_name[plugin.name] is not plugin:
            raise PluginError(
                f"two plugins are named {plugin.name!r}: {plugin} and {by_name[plugin.name]}"
            )
        for name in defaults.intersection(plugin.after):
            raise PluginError(
                f"plugin {plugin.name!r} wants to run after {name!r}, but core's defaults always "
                "run last"
            )
    graph = {n: [a for a in sorted(p.after) if a in by_name] for n, p in by_name.items()}
    try:
        return [by_name[name] for name in TopologicalSorter(graph).static_order()]
    except CycleError as error:
        cycle = " -> ".join(reversed(error.args[1]))
        raise PluginError(f"plugins run after each other in a circle: {cycle}") from None

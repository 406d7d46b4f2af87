"""The composed plugins of one plan: one typed method per hook.

The hub owns the pluggy manager; no other module uses it. Implementations are asked in an order that
``Plugin.after`` decides, plugins by name where it does not, and core's own defaults last.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import update_wrapper
from graphlib import CycleError, TopologicalSorter
from itertools import chain
from traceback import walk_tb
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

import pluggy

from drivetrain.contracts.plugin import hookspecs
from drivetrain.contracts.plugin.plugin import Plugin
from drivetrain.errors import PluginError
from drivetrain.wording import did_you_mean

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

HOOKS = tuple(name for name, value in vars(hookspecs).items() if hasattr(value, "drivetrain_spec"))
"""Names of all hooks, in the order of ``hookspecs.py``."""

_FOLDED = ("prepare_inputs", "wrap_update_rule")


def _asked(spec: Callable[P, R]) -> Callable[Concatenate[Hub, P], R]:
    """The method that calls a hook, with the signature of its specification."""
    signature = inspect.signature(spec)

    def ask(hub: Hub, /, *arguments: P.args, **named: P.kwargs) -> R:
        # pluggy takes keywords only
        answer: R = hub._call(spec.__name__, **signature.bind(*arguments, **named).arguments)
        return answer

    return _like(ask, spec)


def _like(method: Callable[..., R], spec: Callable[..., Any]) -> Callable[..., R]:
    """Give a method name, docstring and signature of a hook's specification."""
    method.__name__, method.__doc__ = spec.__name__, spec.__doc__
    hub = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    signature = inspect.signature(spec)
    parameters = [hub, *signature.parameters.values()]
    vars(method)["__signature__"] = signature.replace(parameters=parameters)
    return method


def _collected(spec: Callable[P, Sequence[T]]) -> Callable[Concatenate[Hub, P], list[T]]:
    """The same for a hook whose answers come as one flat list."""
    ask: Any = _asked(spec)

    def collect(hub: Hub, /, *arguments: P.args, **named: P.kwargs) -> list[T]:
        return list(chain.from_iterable(ask(hub, *arguments, **named)))

    return update_wrapper(collect, ask)


def _folded(spec: Callable[P, T | None]) -> Callable[Concatenate[Hub, P], T]:
    """The same for a hook whose answers replace its last arguments for those asked after it."""
    signature = inspect.signature(spec)
    names = tuple(signature.parameters)[1:]

    def fold(hub: Hub, /, *arguments: P.args, **named: P.kwargs) -> T:
        values = signature.bind(*arguments, **named).arguments
        answer = hub._fold(spec.__name__, names, **values)
        found = tuple(answer[name] for name in names)
        return cast("T", found if len(names) > 1 else found[0])

    return _like(fold, spec)


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

    def freeze(self) -> None:
        """Accept no more registrations; :class:`~drivetrain.job.job.Job` does this when it
        opens.
        """
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

    # -- the hooks --------------------------------------------------------------------------------

    configure = _collected(hookspecs.configure)
    plan_batch = _asked(hookspecs.plan_batch)
    mesh_axes = _collected(hookspecs.mesh_axes)
    select_accelerator = _asked(hookspecs.select_accelerator)
    wrap_communicator = _collected(hookspecs.wrap_communicator)
    place_state = _asked(hookspecs.place_state)
    transform_module = _collected(hookspecs.transform_module)
    wrap_attention = _collected(hookspecs.wrap_attention)
    watch_gradients = _collected(hookspecs.watch_gradients)
    receive_gradients = _collected(hookspecs.receive_gradients)
    build_gradient_norm = _asked(hookspecs.build_gradient_norm)
    describe_parameters = _asked(hookspecs.describe_parameters)
    keep_parameters = _asked(hookspecs.keep_parameters)
    build_model_states = _asked(hookspecs.build_model_states)
    build_runner = _asked(hookspecs.build_runner)
    build_inference = _asked(hookspecs.build_inference)
    build_loader = _asked(hookspecs.build_loader)
    prepare_inputs = _folded(hookspecs.prepare_inputs)
    wrap_update_rule = _folded(hookspecs.wrap_update_rule)
    backward = _asked(hookspecs.backward)
    optimizer_step = _asked(hookspecs.optimizer_step)
    step_end = _asked(hookspecs.step_end)
    save_state = _asked(hookspecs.save_state)
    state_fragments = _collected(hookspecs.state_fragments)
    carry_out_save = _asked(hookspecs.carry_out_save)
    load_state = _asked(hookspecs.load_state)
    report_rows = _collected(hookspecs.report_rows)
    memory_rows = _collected(hookspecs.memory_rows)

    # -- calling ----------------------------------------------------------------------------------

    def _call(self, hook: str, **arguments: Any) -> Any:
        try:
            return getattr(self._manager.hook, hook)(**arguments)
        except Exception as error:
            self._blame(error, hook)
            raise

    def _fold(self, hook: str, names: tuple[str, ...], **values: Any) -> dict[str, Any]:
        """Arguments after all answers; those in ``names`` are what an answer replaces."""
        # pluggy gives all implementations the same arguments; here each feeds the next.
        for impl in self.implementations(hook):
            try:
                answer: Any = impl.function(*[values[name] for name in impl.argnames])
            except Exception as error:
                self._blame(error, hook)
                raise
            if answer is not None:
                values.update(zip(names, answer if len(names) > 1 else (answer,), strict=True))
        return values

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

"""Order, checks and calls of hooks. Toy plugins record what they are asked in a list."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from types import SimpleNamespace
from typing import Any

import pluggy
import pytest

from drivetrain.contracts import Plugin, Problem, hookimpl
from drivetrain.contracts.plugin import hookspecs
from drivetrain.errors import PluginError
from drivetrain.plan.hub import HOOKS, Hub

ENGINE: Any = SimpleNamespace()
LOSS: Any = SimpleNamespace()
PLAN: Any = SimpleNamespace()


def made(name: str, after: Sequence[str] = (), **hooks: Callable[..., Any]) -> Plugin:
    """A plugin object with the given hook implementations."""
    marked = {
        hook: function if hasattr(function, "drivetrain_impl") else hookimpl(function)
        for hook, function in hooks.items()
    }
    kind = type(name.title(), (Plugin,), {"name": name, "after": tuple(after), **marked})
    plugin: Plugin = kind({})
    return plugin


def recorder(name: str, asked: list[str], after: Sequence[str] = ()) -> Plugin:
    def step_end(self: Plugin) -> None:
        asked.append(name)

    return made(name, after, step_end=step_end)


# -- order -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("turn", [1, -1])
def test_plugins_are_asked_behind_those_they_name_else_by_name_and_core_last(turn: int) -> None:
    asked: list[str] = []
    others = [
        recorder("a", asked, after=["c"]),
        recorder("b", asked),
        recorder("c", asked, after=["d"]),
        recorder("d", asked, after=["not_active"]),
    ]
    core = [recorder("core2", asked), recorder("core1", asked)]
    Hub(core, others[::turn]).step_end(ENGINE, PLAN)
    assert asked == ["b", "d", "c", "a", "core1", "core2"]


def test_objects_registered_later_are_asked_first() -> None:
    asked: list[str] = []
    hub = Hub(others=[recorder("a", asked)])
    hub.register(recorder("accelerator", asked), "accelerator")
    hub.step_end(ENGINE, PLAN)
    assert asked == ["accelerator", "a"]


def test_a_circle_of_plugins_is_named() -> None:
    plugins = [made("a", ["b"]), made("b", ["c"]), made("c", ["a"])]
    with pytest.raises(PluginError, match="run after each other in a circle: ") as caught:
        Hub(others=plugins)
    assert sorted(set(str(caught.value).partition(": ")[2].split(" -> "))) == ["a", "b", "c"]


def test_nobody_can_run_after_cores_defaults() -> None:
    with pytest.raises(PluginError, match=r"'a' wants to run after 'core'"):
        Hub([made("core")], [made("a", ["core"])])


def test_two_plugins_of_one_name_are_refused() -> None:
    with pytest.raises(PluginError, match="two plugins are named 'a'"):
        Hub(others=[made("a"), made("a")])
    with pytest.raises(PluginError, match="two plugins are named 'a'"):
        Hub(core=[made("a")], others=[made("a")])


# -- kinds of hooks --------------------------------------------------------------------------------


def test_the_first_answer_wins_and_core_is_asked_only_when_nobody_else_answers() -> None:
    asked: list[str] = []

    def answers(name: str, value: bool | None) -> Plugin:
        def optimizer_step(self: Plugin, engine: object) -> bool | None:
            asked.append(name)
            return value

        return made(name, optimizer_step=optimizer_step)

    assert Hub([answers("core", True)], [answers("a", None)]).optimizer_step(ENGINE) is True
    assert asked == ["a", "core"]
    asked.clear()
    assert Hub([answers("core", True)], [answers("a", False)]).optimizer_step(ENGINE) is False
    assert asked == ["a"]


def test_a_first_result_that_nobody_gives_is_none() -> None:
    assert Hub().optimizer_step(ENGINE) is None
    assert Hub().plan_batch(PLAN) is None


def test_collected_lists_are_joined_in_order() -> None:
    def configure(self: Plugin) -> list[Problem]:
        return [Problem(self.name, "1"), Problem(self.name, "2")]

    hub = Hub(others=[made("b", configure=configure), made("a", configure=configure)])
    assert [str(p) for p in hub.configure(PLAN)] == ["a: 1", "a: 2", "b: 1", "b: 2"]
    assert Hub().configure(PLAN) == []


def test_inputs_are_folded_each_answer_feeding_the_next() -> None:
    def doubles(self: Plugin, args: Any) -> Any:
        return tuple(2 * value for value in args), {}

    def adds(self: Plugin, kwargs: Any, args: Any, engine: Any) -> Any:
        return (*args, 1), {**kwargs, "engine": engine}

    def looks(self: Plugin, args: Any) -> None:
        seen.append(args)

    seen: list[Any] = []
    hub = Hub(
        others=[
            made("a", prepare_inputs=doubles),
            made("b", prepare_inputs=looks),
            made("c", prepare_inputs=adds),
        ]
    )
    assert hub.prepare_inputs(ENGINE, (3, 4), {"x": 1}) == ((6, 8, 1), {"engine": ENGINE})
    assert seen == [(6, 8)]


def test_inputs_pass_untouched_when_nobody_prepares_them() -> None:
    args, kwargs = (object(),), {"x": object()}
    found_args, found_kwargs = Hub().prepare_inputs(ENGINE, args, kwargs)
    assert found_args is args
    assert found_kwargs is kwargs


def test_an_object_registered_after_a_call_takes_part_in_the_next() -> None:
    hub = Hub()
    assert hub.prepare_inputs(ENGINE, (1,), {}) == ((1,), {})
    hub.register(made("a", prepare_inputs=lambda self, args: ((*args, 2), {})), "a")
    assert hub.prepare_inputs(ENGINE, (1,), {}) == ((1, 2), {})


def test_wrappers_run_around_the_answer() -> None:
    order: list[str] = []

    @hookimpl(wrapper=True)
    def around(self: Plugin, tensors: object) -> Iterator[None]:
        order.append("before")
        answer = yield
        order.append("after")
        return answer

    def inner(self: Plugin) -> bool:
        order.append("backward")
        return True

    hub = Hub([made("core", backward=inner)], [made("a", backward=around)])
    assert hub.backward(ENGINE, [LOSS], [None], False) is True
    assert order == ["before", "backward", "after"]


# -- refusals --------------------------------------------------------------------------------------


def labelled(plugin: Plugin) -> Hub:
    return Hub(others=[plugin], labels={plugin.name: f"plugin '{plugin.name}' (acme 1.2)"})


def test_a_hook_that_does_not_exist_is_refused_with_a_suggestion() -> None:
    with pytest.raises(PluginError) as caught:
        labelled(made("toy", step_ends=lambda self: None))
    assert str(caught.value) == (
        "plugin 'toy' (acme 1.2) implements hook 'step_ends', which does not exist; "
        "did you mean 'step_end'?"
    )


def test_a_hook_of_a_later_core_may_be_marked_optional() -> None:
    later = hookimpl(optionalhook=True)(lambda self: None)
    assert labelled(made("toy", hook_of_the_future=later)).plugins.keys() == {"toy"}


@pytest.mark.parametrize(
    ("function", "flaw"),
    [
        (lambda self, engine, reprot=None: None, "'reprot=None' has a default"),
        (lambda self, *, engine: None, "'engine' cannot be filled by name"),
        (lambda self, *engine: None, r"'\*engine' cannot be filled by name"),
        (lambda self, **engine: None, r"'\*\*engine' cannot be filled by name"),
    ],
)
def test_arguments_that_pluggy_would_not_check_are_refused(
    function: Callable[..., Any], flaw: str
) -> None:
    with pytest.raises(PluginError, match=rf"'toy' \(acme 1.2\): in its hook 'step_end', {flaw}"):
        labelled(made("toy", step_end=function))


def test_an_argument_that_the_hook_does_not_have_is_refused() -> None:
    with pytest.raises(PluginError, match=r"'toy' \(acme 1.2\) cannot be registered: .*reprot"):
        labelled(made("toy", step_end=lambda self, reprot: None))


def test_folded_hooks_take_no_wrappers() -> None:
    @hookimpl(wrapper=True)
    def around(self: Plugin) -> Iterator[None]:
        yield

    with pytest.raises(PluginError, match=r"'toy' \(acme 1.2\): hook 'prepare_inputs' is folded"):
        labelled(made("toy", prepare_inputs=around))


def test_a_frozen_hub_takes_no_more_plugins() -> None:
    hub = Hub()
    hub.freeze()
    with pytest.raises(PluginError, match="plugin 'late' comes too late"):
        hub.register(made("late"), "late")


# -- errors in hooks -------------------------------------------------------------------------------


class OwnError(Exception):
    pass


def fails(self: Plugin, *_: object) -> None:
    raise OwnError("mine")


def notes(error: BaseException) -> list[str]:
    return list(getattr(error, "__notes__", []))


@pytest.mark.parametrize(
    ("hook", "arguments"),
    [
        ("configure", [PLAN]),
        ("optimizer_step", [ENGINE]),
        ("step_end", [ENGINE, PLAN]),
        ("prepare_inputs", [ENGINE, (), {}]),
    ],
)
def test_an_error_keeps_its_type_and_names_plugin_and_hook(hook: str, arguments: list[Any]) -> None:
    def broken(self: Plugin) -> None:
        fails(self)

    def fine(self: Plugin) -> None:
        return [] if hook == "configure" else None  # type: ignore[return-value]

    hub = Hub(
        others=[made("a", **{hook: fine}), made("b", **{hook: broken}), made("c", **{hook: fine})],
        labels={"b": "plugin 'b' (acme 1.2)"},
    )
    with pytest.raises(OwnError) as caught:
        getattr(hub, hook)(*arguments)
    assert str(caught.value) == "mine"
    assert notes(caught.value) == [f"raised by plugin 'b' (acme 1.2) in hook {hook!r}"]
    assert "fails" in "".join(traceback.format_exception(caught.value))


def test_an_error_inside_a_decorated_implementation_is_attributed_too() -> None:
    def decorated(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def wrapper(self: Plugin, engine: object) -> Any:
            return function(self, engine)

        return wrapper

    hub = Hub(others=[made("a", optimizer_step=decorated(lambda self, engine: 1 / 0))])
    with pytest.raises(ZeroDivisionError) as caught:
        hub.optimizer_step(ENGINE)
    assert notes(caught.value) == ["raised by plugin 'a' in hook 'optimizer_step'"]


def test_a_wrapper_is_not_blamed_for_the_error_that_passes_through_it() -> None:
    @hookimpl(wrapper=True)
    def around(self: Plugin) -> Iterator[None]:
        return (yield)

    hub = Hub(
        others=[made("a", optimizer_step=around), made("b", optimizer_step=lambda self: 1 / 0)]
    )
    with pytest.raises(ZeroDivisionError) as caught:
        hub.optimizer_step(ENGINE)
    assert notes(caught.value) == ["raised by plugin 'b' in hook 'optimizer_step'"]


def test_an_error_of_the_caller_is_blamed_on_nobody() -> None:
    hub = Hub(others=[made("a", optimizer_step=lambda self, engine: engine.fail())])
    broken = SimpleNamespace(fail=lambda: [][0])
    with pytest.raises(IndexError) as caught:
        hub.optimizer_step(broken)  # type: ignore[arg-type]
    assert len(notes(caught.value)) == 1
    with pytest.raises(TypeError) as missing:
        hub.optimizer_step()  # type: ignore[call-arg]
    assert notes(missing.value) == []


# -- the hub and the specifications agree ----------------------------------------------------------


def test_every_hook_is_a_method_of_the_hub_with_the_same_arguments() -> None:
    assert HOOKS
    for hook in HOOKS:
        specified = inspect.signature(getattr(hookspecs, hook))
        offered = inspect.signature(getattr(Hub, hook))
        assert list(specified.parameters) == list(offered.parameters)[1:], hook
        for name, parameter in specified.parameters.items():
            assert parameter.annotation == offered.parameters[name].annotation, (hook, name)


def test_every_hook_says_its_kind_and_when_it_runs() -> None:
    kinds = ("Collect", "First result", "Observe", "Folded")
    for hook in HOOKS:
        text = inspect.getdoc(getattr(hookspecs, hook)) or ""
        assert any(f"{kind}." in text or f"{kind};" in text or f"{kind}:" in text for kind in kinds)
        assert "Once per" in text or "outside a job" in text or "once per" in text, hook


def test_no_plugin_manager_is_shared() -> None:
    first, second = Hub(others=[made("a")]), Hub()
    assert list(first.plugins) == ["a"]
    assert second.plugins == {}
    assert not any(isinstance(v, pluggy.PluginManager) for v in vars(hookspecs).values())


def test_implementations_are_listed_in_the_order_in_which_they_are_asked() -> None:
    hub = Hub([recorder("core", [])], [recorder("b", []), recorder("a", ["x"], after=["b"])])
    assert [impl.plugin_name for impl in hub.implementations("step_end")] == ["b", "a", "core"]
    assert hub.has("step_end")
    assert not hub.has("backward")

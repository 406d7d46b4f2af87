"""What Ray is asked for, recorded by a module of its name with the signatures of its manual."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from drivetrain_launch.command import launch
from drivetrain_launch.world import World

from drivetrain.errors import DrivetrainError

RAY = """
import json, os, sys, types
def record(**facts):
    with open(os.environ["RECORD"], "a") as file:
        file.write(json.dumps(facts) + "\\n")
OPTIONS = {
    "accelerator_type", "enable_task_events", "fallback_strategy", "label_selector", "max_calls",
    "max_retries", "memory", "name", "num_cpus", "num_gpus", "num_returns", "resources",
    "retry_exceptions", "runtime_env", "scheduling_strategy",
}
class Task:
    def __init__(self, function, options):
        assert options.keys() <= OPTIONS, options.keys()
        self.function, self._options = function, options
    def options(self, **more):
        return Task(self.function, {**self._options, **more})
    def remote(self, *arguments):
        shown = {k: v for k, v in self._options.items() if k != "scheduling_strategy"}
        bundle = self._options["scheduling_strategy"].placement_group_bundle_index
        name = self.function.__name__
        record(task=name, options=shown, bundle=bundle, arguments=arguments)
        return f"10.0.0.{bundle + 1}" if name == "get_node_ip_address" else 3 * bundle
def remote(**options):
    return lambda function: Task(function, options)
def init(address=None, *, num_cpus=None, num_gpus=None, log_to_driver=None, runtime_env=None):
    record(init=address, log_to_driver=log_to_driver)
def get(object_refs, *, timeout=None):
    return object_refs
def cluster_resources():
    return {"CPU": 16.0, "GPU": float(os.environ["GPUS"])}
def shutdown():
    record(shutdown=True)
class Group:
    def wait(self, timeout_seconds=30):
        return os.environ.get("FULL") is None
def placement_group(bundles, strategy=None, name="", lifetime=None):
    assert strategy in ("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD")
    record(bundles=bundles, strategy=strategy)
    return Group()
def remove_placement_group(placement_group):
    record(removed=True)
class PlacementGroupSchedulingStrategy:
    def __init__(self, placement_group, placement_group_bundle_index=-1,
                 placement_group_capture_child_tasks=None):
        self.placement_group_bundle_index = placement_group_bundle_index
def get_node_ip_address():
    raise AssertionError("only on the nodes")
def module(name, **content):
    sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[name]).update(content)
    return sys.modules[name]
util = module("ray.util", get_node_ip_address=get_node_ip_address)
module("ray.util.placement_group", placement_group=placement_group,
       remove_placement_group=remove_placement_group)
module("ray.util.scheduling_strategies",
       PlacementGroupSchedulingStrategy=PlacementGroupSchedulingStrategy)
"""
"""Ray with the signatures and options of its manual (2.60, API reference of Core): records."""


@pytest.fixture
def ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, in which a script is."""
    (tmp_path / "train.py").touch()
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "ray.py").write_text(RAY, "utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DRIVETRAIN_ACCELERATOR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fake"))
    monkeypatch.syspath_prepend(str(tmp_path / "fake"))
    monkeypatch.setenv("RECORD", str(tmp_path / "record"))
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    monkeypatch.setenv("GPUS", "16")
    return tmp_path


def run(*arguments: str) -> None:
    CliRunner().invoke(launch, ["--launcher", "ray", *arguments], catch_exceptions=False)


def told(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "record").read_text("utf-8").splitlines()]


@pytest.mark.parametrize(
    ("option", "gpus", "needs", "options"),
    [
        ([], "16", {"GPU": 8}, {"num_cpus": 0, "num_gpus": 8, "max_retries": 0}),
        ([], "0", {"CPU": 8}, {"num_cpus": 0, "max_retries": 0}),
        (["--accelerator", "cpu"], "16", {"CPU": 8}, {"num_cpus": 0, "max_retries": 0}),
    ],
)
def test_ray_gets_one_task_for_each_of_distinct_nodes(
    ray: Path,
    monkeypatch: pytest.MonkeyPatch,
    option: list[str],
    gpus: str,
    needs: dict[str, int],
    options: dict[str, int],
) -> None:
    monkeypatch.setenv("GPUS", gpus)
    with pytest.raises(DrivetrainError, match="ray exited with code 3"):  # as the second task did
        run(
            *("--num-nodes", "2", "--num-gpus", "8", *option),
            *("--log-dir", "logs", "train.py", "--lr", "1"),
        )
    began, group, first, second, *hosts, removed, ended = told(ray)
    assert began == {"init": "auto", "log_to_driver": True}
    assert group == {"bundles": [needs, needs], "strategy": "STRICT_SPREAD"}
    for bundle, task in enumerate((first, second)):
        assert task["task"] == "get_node_ip_address"
        assert (task["bundle"], task["options"]) == (bundle, {"num_cpus": 0})
    for rank, task in enumerate(hosts):
        assert (task["bundle"], task["options"]) == (rank, options)
        assert task["arguments"][0] == rank
        world = World.of_text(task["arguments"][1])
        assert [host.name for host in world.hosts] == ["10.0.0.1", "10.0.0.2"]
        assert (world.master_addr, world.arguments) == ("10.0.0.1", ("--lr", "1"))
        assert "WANDB_API_KEY" not in world.variables
    assert (len(hosts), removed, ended) == (2, {"removed": True}, {"shutdown": True})


def test_a_cluster_of_ray_without_room_is_said(ray: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FULL", "1")
    with pytest.raises(DrivetrainError, match=r"Ray has not 2 nodes with \{'GPU': 8\} each"):
        run("--num-nodes", "2", "--num-gpus", "8", "train.py")
    assert told(ray)[-2:] == [{"removed": True}, {"shutdown": True}]

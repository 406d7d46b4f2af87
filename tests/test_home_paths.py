"""``~`` at the beginning of a path is the home folder, wherever a path is given."""

from __future__ import annotations

from pathlib import Path

import pytest
from drivetrain_csv import CsvSection
from drivetrain_offload.section import OffloadOptimizer, OffloadParam
from drivetrain_tensorboard import TensorBoardSection
from pydantic import BaseModel, ValidationError

from drivetrain.checkpoint.format.storage import open_storage
from drivetrain.errors import ConfigError
from drivetrain.plan.config.loading import load_config


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("section", "key"),
    [
        (OffloadOptimizer, "nvme_path"),
        (OffloadParam, "nvme_path"),
        (CsvSection, "output_path"),
        (TensorBoardSection, "output_path"),
    ],
)
def test_paths_of_a_config_begin_at_home(section: type[BaseModel], key: str, home: Path) -> None:
    for given, meant in (("~", ""), ("~/a", "/a"), ("~/~", "/~")):
        assert getattr(section.model_validate({key: given}), key) == f"{home}{meant}"
    assert getattr(section.model_validate({key: "a~"}), key) == "a~"
    with pytest.raises(ValidationError, match="~nobody-here is no home folder here"):
        section.model_validate({key: "~nobody-here/a"})


def test_checkpoints_are_stored_at_home(home: Path) -> None:
    open_storage("~/saved").put("a/b", b"x")
    assert (home / "saved" / "a" / "b").read_bytes() == b"x"
    assert open_storage(Path("~/saved")).get("a/b", 9) == b"x"
    assert [path.name for path in home.iterdir()] == ["saved"]


def test_a_config_is_read_from_home(home: Path) -> None:
    (home / "c.json").write_text('{"train_batch_size": 1}')
    assert load_config("~/c.json") == load_config(Path("~/c.json")) == {"train_batch_size": 1}
    with pytest.raises(ConfigError, match="~nobody-here is no home folder here"):
        load_config("~nobody-here/c.json")

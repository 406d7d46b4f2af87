"""DeepSpeed's monitor without an engine writes through the monitors that are installed."""

from __future__ import annotations

import pytest
from deepspeed._parts.monitor import DeepSpeedMonitorConfig, MonitorMaster
from deepspeed.runtime.config import DeepSpeedConfig

from drivetrain.errors import ConfigError


def test_a_monitor_without_an_engine_writes_at_once(tmp_path):
    section = {"enabled": True, "output_path": str(tmp_path), "job_name": "job"}
    config = DeepSpeedConfig({"train_batch_size": 1, "csv_monitor": section})
    assert config.monitor_config.csv_monitor.job_name == "job"
    monitor = MonitorMaster(config.monitor_config)
    assert monitor.enabled
    monitor.write_events([("Train/loss", 0.5, 10), ("Train/loss", 0.25, 20)])
    assert (tmp_path / "job" / "Train_loss.csv").read_text().split() == [
        "step,loss",
        "10,0.5",
        "20,0.25",
    ]
    monitor.close()


def test_no_monitor_is_switched_on(tmp_path):
    monitor = MonitorMaster(DeepSpeedMonitorConfig(csv_monitor={"output_path": str(tmp_path)}))
    monitor.write_events([("loss", 1.0, 1)])
    assert not monitor.enabled
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match=r"csv_monitor\.job_nam"):
        MonitorMaster(DeepSpeedMonitorConfig(csv_monitor={"enabled": True, "job_nam": "job"}))


def test_a_single_monitor_has_its_section_and_writes(tmp_path):
    from deepspeed.monitor.config import get_monitor_config
    from deepspeed.monitor.csv_monitor import csvMonitor
    from deepspeed.monitor.wandb import WandbMonitor

    section = {"enabled": True, "output_path": str(tmp_path), "job_name": "run"}
    monitor = csvMonitor(get_monitor_config({"csv_monitor": section}).csv_monitor)
    assert (monitor.enabled, monitor.job_name) == (True, "run")
    monitor.write_events([("loss", 1.5, 10)])
    monitor.close()
    [file] = list(tmp_path.rglob("*.csv"))
    assert "1.5" in file.read_text()
    off = WandbMonitor(get_monitor_config({"wandb": {"team": "t"}}).wandb)
    assert (off.enabled, off.team, off.project) == (False, "t", "deepspeed")

"""A loop that is written for Accelerate is the same on ZeRO and on plain DDP."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch

from drivetrain.testing import run_distributed

NEEDS = ("accelerate",)


def loop(folder, plugin):
    """Eight micro-batches of two ranks, saved after the fourth and repeated from there.

    Args:
        folder: for the saved state.
        plugin: arguments of Accelerate's ``DeepSpeedPlugin``; plain DDP without.
    """
    from accelerate import Accelerator
    from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs, set_seed

    tiny.start_anew()
    accelerator = Accelerator(
        cpu=plugin is None,
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")],
        gradient_accumulation_steps=2,
        deepspeed_plugin=None if plugin is None else DeepSpeedPlugin(**plugin),
    )
    set_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 / (1 + n))
    inputs, targets = torch.randn(64, 4), torch.randn(64, 2)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(inputs, targets), batch_size=4
    )
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    batches = list(loader)
    losses, norms = [], []

    def train(part):
        for x, y in part:
            with accelerator.accumulate(model):
                loss = ((model(x) - y) ** 2).mean()
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norms.append(float(accelerator.clip_grad_norm_(model.parameters(), 0.25)))
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            losses.append(accelerator.gather(loss.detach()).mean().item())

    train(batches[:4])
    accelerator.save_state(folder)
    train(batches[4:])
    state = accelerator.get_state_dict(model)
    accelerator.load_state(folder)
    train(batches[4:])
    accelerator.save_model(model, f"{folder}/model")
    accelerator.wait_for_everyone()
    weights = None if state is None else {name: v.numpy() for name, v in state.items()}
    rate = optimizer.param_groups[0]["lr"]
    accelerator.end_training()
    return {"losses": losses, "norms": norms, "weights": weights, "rate": rate}


@pytest.mark.parametrize("stage", [1, 3])
def test_the_same_loop_trains_alike_and_goes_on_from_its_saved_state(stage, tmp_path):
    from safetensors.numpy import load_file

    reference = run_distributed(loop, 2, str(tmp_path / "ddp"), None)[0]
    plugin = {
        "zero_stage": stage,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.25,
        "zero3_save_16bit_model": True,
    }
    folder = tmp_path / "shards"
    found = run_distributed(loop, 2, str(folder), plugin)[0]
    assert max(reference["norms"]) > 0.25
    for name in ("losses", "norms", "rate"):
        assert found[name] == pytest.approx(reference[name], rel=1e-5), name
    assert found["losses"][8:] == pytest.approx(found["losses"][4:8], rel=1e-6)
    saved = load_file(folder / "model" / "model.safetensors")
    for name, weight in reference["weights"].items():
        np.testing.assert_allclose(found["weights"][name], weight, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(saved[name], weight, rtol=1e-5, atol=1e-7)


def two_models(plugins):
    """Losses of a model that learns from another one, each under a plugin of its own.

    Args:
        plugins: arguments of both plugins; plain DDP without.
    """
    from accelerate import Accelerator
    from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs, set_seed

    tiny.start_anew()
    made = {name: DeepSpeedPlugin(**given) for name, given in (plugins or {}).items()} or None
    accelerator = Accelerator(
        cpu=made is None,
        deepspeed_plugins=made,
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")],
    )
    set_seed(0)
    student, teacher = torch.nn.Linear(4, 2), torch.nn.Linear(4, 2)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
    data = torch.utils.data.TensorDataset(torch.randn(32, 4))
    loader = torch.utils.data.DataLoader(data, batch_size=4)
    student, optimizer, loader = accelerator.prepare(student, optimizer, loader)
    if made is not None:
        accelerator.state.select_deepspeed_plugin("teacher")
    teacher = accelerator.prepare(teacher).eval()
    losses = []
    for (inputs,) in loader:
        with torch.no_grad():
            wanted = teacher(inputs)
        loss = ((student(inputs) - wanted) ** 2).mean()
        if made is None:
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        else:
            student.backward(loss)
            student.step()
        losses.append(accelerator.gather(loss.detach()).mean().item())
    return losses


@pytest.mark.long
@pytest.mark.parametrize("stage", [2, 3])
def test_several_models_in_one_script(stage):
    student = {"zero_stage": stage, "gradient_accumulation_steps": 1, "gradient_clipping": 100.0}
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": 3},
    }
    plugins = {"student": student, "teacher": {"hf_ds_config": config}}
    reference = run_distributed(two_models, 2, None)[0]
    assert run_distributed(two_models, 2, plugins)[0] == pytest.approx(reference, rel=1e-5)

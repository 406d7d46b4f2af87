"""Lightning's DeepSpeedStrategy, which asks for CUDA only where it checks its accelerator."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from drivetrain.testing import run_distributed

NEEDS = ("pytorch_lightning",)


def strategy(**options):
    from pytorch_lightning.strategies import DDPStrategy, DeepSpeedStrategy

    class OnTheHost(DeepSpeedStrategy):
        def setup_environment(self):
            DDPStrategy.setup_environment(self)

        def setup_distributed(self):
            self.set_world_ranks()
            self._init_deepspeed_distributed()

    return OnTheHost(**options)


def fit(folder, options, path=None, epochs=2):
    """Losses and weights of a run; ``path`` is a checkpoint to go on from."""
    import pytorch_lightning as lightning

    class Model(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.losses = []

        def configure_model(self):
            if not hasattr(self, "layers"):
                torch.manual_seed(0)
                self.layers = torch.nn.Sequential(
                    torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)
                )

        def training_step(self, batch, _):
            x, y = batch
            loss = ((self.layers(x) - y) ** 2).mean()
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.9)
            schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    draw = torch.Generator().manual_seed(1)
    data = torch.utils.data.TensorDataset(
        torch.randn(32, 4, generator=draw), torch.randn(32, 2, generator=draw)
    )
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp" if options is None else strategy(**options),
        max_epochs=epochs,
        accumulate_grad_batches=2,
        gradient_clip_val=0.25,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    model = Model()
    trainer.fit(model, torch.utils.data.DataLoader(data, batch_size=4), ckpt_path=path)
    trainer.save_checkpoint(f"{folder}/epochs{epochs}")
    state = trainer.strategy.model.module_state_dict() if options else model.state_dict()
    return model.losses, {name: value.numpy() for name, value in state.items()}


def assert_trains_as_ddp(options, folder):
    reference = run_distributed(fit, 2, str(folder / "ddp"), None)
    shards = str(folder / "shards")
    found = run_distributed(fit, 2, shards, options)
    run_distributed(fit, 2, shards, options, None, 1)
    resumed = run_distributed(fit, 2, shards, options, f"{shards}/epochs1")
    for (losses, weights), ours, later in zip(reference, found, resumed, strict=True):
        assert ours[0] == pytest.approx(losses, rel=1e-5)
        assert later[0] == pytest.approx(losses[4:], rel=1e-5)
        for name, weight in weights.items():
            np.testing.assert_allclose(ours[1][name], weight, rtol=1e-5, atol=1e-7)
            np.testing.assert_allclose(later[1][name], weight, rtol=1e-5, atol=1e-7)


def test_stage_2_trains_as_ddp_and_goes_on_from_a_checkpoint(tmp_path):
    assert_trains_as_ddp({"stage": 2}, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize(
    "options",
    [
        {"stage": 1},
        {"stage": 2, "offload_optimizer": True},
        {"stage": 3},
        {"stage": 3, "offload_optimizer": True, "offload_parameters": True},
    ],
    ids=str,
)
def test_other_stages_and_offloading(options, tmp_path):
    assert_trains_as_ddp(options, tmp_path)

"""PEFT's adapters train at stage 3, where base and adapters are in shards, and are saved whole."""

from __future__ import annotations

import numpy as np
import tiny

from drivetrain.testing import run_distributed

NEEDS = ("transformers", "accelerate", "peft")

CONFIG = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
}


def adapters_in(folder):
    """Adapters that PEFT reads from a folder onto a new base, by their names in the model."""
    from peft import PeftModel

    tiny.start_anew()
    model = PeftModel.from_pretrained(tiny.language_model(), folder)
    return {name: p.detach().numpy() for name, p in model.named_parameters() if "lora_" in name}


def test_adapters_train_as_on_ddp_and_are_saved_whole(tmp_path):
    folders = [tmp_path / "ddp", tmp_path / "shards"]
    for folder, config in zip(folders, (None, CONFIG), strict=True):
        changes = {"lora": True, "learning_rate": 1.0, "save_model": folder}
        told = run_distributed(tiny.train, 2, tmp_path, config, changes)[0]
        assert told["losses"][-1] < told["losses"][0]
    reference, found = (run_distributed(adapters_in, 1, folder)[0] for folder in folders)
    assert len(reference) == 4
    assert found.keys() == reference.keys()
    for name, adapter in reference.items():
        assert np.abs(adapter).max() > 1e-3
        np.testing.assert_allclose(found[name], adapter, rtol=1e-4, atol=2e-6)

"""A model that is constructed in shards, looked at, saved and resumed."""

import tempfile

import deepspeed
import torch
from data import Net, batches
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad
from torch.nn.functional import cross_entropy

config = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_clipping": 0,
    "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
}
deepspeed.init_distributed(dist_backend=get_accelerator().communication_backend_name())
torch.manual_seed(0)
with deepspeed.zero.Init(config_dict_or_path=config):
    net = Net()
engine = deepspeed.initialize(model=net, model_parameters=net.parameters(), config=config)[0]
assert engine.zero_optimization_partition_weights()


def whole(parameter):
    """A copy of a parameter's values, whether it is sharded or not, as scripts for LoRA save it."""
    if hasattr(parameter, "ds_id"):
        assert parameter.ds_status == ZeroParamStatus.NOT_AVAILABLE
        assert (parameter.ds_shape, parameter.ds_numel) == ((3, 8), 24)
        parts = torch.tensor([parameter.ds_tensor.numel()])
        deepspeed.comm.all_reduce(parts)
        assert (parts.item(), parameter.ds_persist) == (24, False)
        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.data.detach().cpu().clone()
    return parameter.detach().cpu().clone()


losses = []
with tempfile.TemporaryDirectory() as folder:
    path = [folder]
    deepspeed.comm.broadcast_object_list(path, src=0)
    for number, (inputs, labels) in enumerate(batches(engine.global_rank, 4)):
        if number == 2:
            engine.save_checkpoint(path[0], tag=f"step{number}", client_state={"number": number})
        loss = cross_entropy(engine(inputs.to(engine.device)), labels.to(engine.device))
        engine.backward(loss)
        gradient = safe_get_full_grad(net.last.weight)
        weight = safe_get_full_fp32_param(net.last.weight)
        assert gradient.shape == weight.shape == (3, 8)
        engine.step()
        deepspeed.comm.all_reduce(loss.data)
        losses.append(loss.item() / engine.world_size)
    _, client = engine.load_checkpoint(path[0], tag="step2")
    assert client["number"] == 2
    assert engine.global_steps == 2
    with deepspeed.zero.GatheredParameters(net.last.weight, modifier_rank=0):
        assert net.last.weight.ds_status == ZeroParamStatus.AVAILABLE
    assert torch.equal(whole(net.last.weight), safe_get_full_fp32_param(net.last.weight))
    assert torch.equal(whole(plain := torch.nn.Parameter(torch.ones(2))), plain)
    for inputs, labels in batches(engine.global_rank, 4)[2:]:
        loss = cross_entropy(engine(inputs), labels)
        engine.backward(loss)
        engine.step()
        deepspeed.comm.all_reduce(loss.data)
        again = loss.item() / engine.world_size
    assert abs(again - losses[-1]) < 1e-6
    assert engine.save_16bit_model(path[0])
    deepspeed.comm.barrier()

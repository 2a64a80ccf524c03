"""LayerGrowth in training."""

import copy

from torch import nn

from lightning_peft import LayerGrowth
from lightning_peft.testing import MethodTester, Reference, Task
from lightning_peft.testing.modules import deepened


def stacked(task: Task) -> list[float]:
    """G_stack of Du et al., by SGD: two blocks for two steps, then the stack of them twice, one on the other."""
    module, losses = task.module, []
    module.blocks = module.blocks[:2]
    for step, batch in enumerate(task.batches):
        if step == 2:
            module.blocks = nn.Sequential(*module.blocks, *copy.deepcopy(module.blocks))
            task.optimizer.add_param_group({"params": list(module.blocks[2:].parameters())})
        loss = task.loss(batch)
        task.step(loss)
        losses.append(loss.item())
    return losses


class TestLayerGrowth(MethodTester):
    methods = [
        lambda: LayerGrowth(at="step:2", start=2),
        lambda: LayerGrowth("stackedbert", at="step:2", start=2, lr="restart"),
        lambda: LayerGrowth("zero", at=["step:1", "step:2"], start=1, to=[2, 4], lr="rewarm:3"),
        lambda: LayerGrowth("zero", at="step:2", start=2, sources=[0, 0, 1, 1], train="new"),
    ]
    references = [Reference(stacked, lambda: LayerGrowth("stack", at="step:2", start=2, lr="continue"), optimizer="sgd")]
    adapted = staticmethod(deepened)
    new_parameters = "new blocks are new parameters"

"""LayerGrowth in training."""

from lightning_peft import LayerGrowth
from lightning_peft.testing import MethodTester
from lightning_peft.testing.modules import deepened


class TestLayerGrowth(MethodTester):
    methods = [
        lambda: LayerGrowth(at="step:2", start=2),
        lambda: LayerGrowth("stackedbert", at="step:2", start=2, lr="restart"),
        lambda: LayerGrowth("zero", at=["step:1", "step:2"], start=1, to=[2, 4], lr="rewarm:3"),
    ]
    adapted = staticmethod(deepened)
    new_parameters = "new blocks are new parameters"

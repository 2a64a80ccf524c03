"""TemporaryForgetting: layers and their optimizer state begin anew, and nothing else does."""

from __future__ import annotations

import re
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from torch import Tensor, nn

import lightning_peft
from lightning_peft import LoRA, TemporaryForgetting, WeightCompander
from lightning_peft.testing import MethodTester, Reference, Task
from lightning_peft.testing.callbacks import every_epoch
from lightning_peft.testing.modules import BatchNorm, Plain, loader, trainer
from lightning_peft.testing.runs import assert_same, fit


def drawn(name: str, step: int, shape: torch.Size, std: float) -> Tensor:
    draw = torch.Generator().manual_seed(zlib.crc32(f"0/{step}/{name}".encode()))
    return torch.randn(shape, generator=draw) * std


def anew_by_hand(task: Task) -> None:
    """A new layer, and a new optimizer for it, after the fifth step; at the tenth ``until`` is over."""
    layer, lr = task.module.model[2], task.module.lr
    others = [p for p in task.module.parameters() if p is not layer.weight and p is not layer.bias]
    body, own = torch.optim.Adam(others, lr=lr), torch.optim.Adam(layer.parameters(), lr=lr)
    for step, batch in enumerate(task.batches, start=1):
        loss = task.loss(batch)
        task.module.zero_grad()
        loss.backward()
        body.step()
        own.step()
        if step == 5:
            with torch.no_grad():
                layer.weight.copy_(drawn("model.2", 5, layer.weight.shape, 0.1))
                layer.bias.zero_()
            own = torch.optim.Adam(layer.parameters(), lr=lr)


def inner() -> TemporaryForgetting:
    return TemporaryForgetting(every=5, until=9, std=0.1, targets=["model.2"])


class TestTemporaryForgetting(MethodTester):
    methods = [
        lambda: TemporaryForgetting(every=5, until=9, targets="all-linear", exclude=["first", "head"]),
        lambda: TemporaryForgetting(every=3, until=3, std=0.1, targets=["model.4"]),
    ]
    references = [Reference(anew_by_hand, inner, tolerance=1e-6)]


class Watch(Callback):
    def __init__(self, name: str = "model.2.weight") -> None:
        self.name = name
        self.weights: list[Tensor] = []
        self.draws: list[Tensor] = []
        self.steps: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        weight = dict(pl_module.named_parameters())[self.name]
        self.weights.append(weight.detach().clone())
        self.steps.append(float(trainer.optimizers[0].state.get(weight, {}).get("step", 0)))
        self.draws.append(torch.rand(1))


def test_the_step_after_is_the_first_of_a_new_adam() -> None:
    """Of size ``lr`` for every weight; with moments at zero and the count of steps left alone it would be half of that."""
    watch = Watch()
    fit([TemporaryForgetting(every=4, targets=["model.2"])], after=[watch], max_epochs=3)
    assert watch.steps == [1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 4], "nothing begins anew after the last step"
    moved = (watch.weights[4] - watch.weights[3]).abs()
    torch.testing.assert_close(moved[moved > 1e-3], torch.full_like(moved[moved > 1e-3], 0.02), rtol=1e-3, atol=0)
    assert (moved > 1e-3).float().mean() > 0.5
    plain = Watch()
    fit([], after=[plain], max_epochs=3)
    assert all(torch.equal(a, b) for a, b in zip(watch.draws, plain.draws, strict=True)), "the global generator was used"
    assert not torch.equal(watch.weights[3], watch.weights[7])


def test_a_layer_begins_as_its_class_does() -> None:
    watch = Watch()
    fit([TemporaryForgetting(every=4, targets=["model.2"])], after=[watch], max_epochs=2)
    with torch.random.fork_rng([]):
        torch.manual_seed(zlib.crc32(b"0/4/model.2"))
        assert torch.equal(watch.weights[3], nn.Linear(16, 16).weight)


def test_norms_begin_at_one_and_padding_at_zero() -> None:
    class Words(Plain):
        def build(self) -> None:
            self.model = nn.Sequential(nn.Embedding(5, 4, padding_idx=2), nn.Flatten(), nn.Linear(64, 8), nn.LayerNorm(8))
            self.model.append(nn.Linear(8, 3))

        def forward(self, inputs: Tensor) -> Any:
            return self.model((inputs.abs() * 2).long().clamp(max=4))

    table, norm = Watch("model.0.weight"), Watch("model.3.weight")
    run = fit(
        [TemporaryForgetting(every=4, std=0.5, targets=["type:Embedding", "norm"])],
        style=Words,
        after=[table, norm],
        max_epochs=2,
    )
    assert torch.equal(table.weights[3][[0, 1, 3, 4]], drawn("model.0", 4, torch.Size([5, 4]), 0.5)[[0, 1, 3, 4]])
    assert not table.weights[3][2].any()
    assert torch.equal(norm.weights[3], torch.ones(8))
    assert "model.0 begins anew every 7 steps" in str(lightning_peft.plan(run.module, [TemporaryForgetting(every=7)]))


def test_a_weight_under_a_map_has_the_value_that_was_drawn() -> None:
    seen: list[Tensor] = []

    class Layer(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            seen.append(pl_module.model[2].weight.detach().clone())

    fit([TemporaryForgetting(every=4, std=0.1, targets=["model.2"]), WeightCompander()], after=[Layer()], max_epochs=2)
    torch.testing.assert_close(seen[3], drawn("model.2", 4, torch.Size([16, 16]), 0.1), rtol=0, atol=1e-5)


def test_it_ends_and_resumes(tmp_path: Path) -> None:
    def methods() -> list[Any]:
        return [TemporaryForgetting(every=3, until="50%", targets=["model.2", "model.4"])]

    watch = Watch()
    run = fit(methods(), after=[watch, every_epoch(tmp_path)], max_epochs=4)
    assert watch.steps == [1, 2, 0, 1, 2, 0, *range(1, 11)]
    assert float(run.methods[0].metrics(None)["times"]) == 2  # type: ignore[arg-type]
    for epoch in range(3):
        resumed = fit(methods(), resume=tmp_path / f"epoch={epoch}.ckpt", seed=6, max_epochs=4)
        assert_same(run, resumed, f"uninterrupted against resumed after epoch {epoch}")


def test_what_cannot_begin_anew_is_refused() -> None:
    class Raw(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(16, 16))

        def forward(self, inputs: Tensor) -> Tensor:
            return inputs @ self.scale

    class Own(Plain):
        def build(self) -> None:
            super().build()
            self.model.insert(0, Raw())

    with pytest.raises(MisconfigurationException, match=re.escape("model.0, Raw, has no reset_parameters(). Give std=")):
        fit([TemporaryForgetting(every=2, targets=["model.0"])], style=Own)
    fit([TemporaryForgetting(every=2, std=0.1, targets=["model.0"])], style=Own)

    class Tied(Plain):
        def build(self) -> None:
            super().build()
            self.model[2].weight = self.model[0].weight

    with pytest.raises(MisconfigurationException, match="same parameter"):
        fit([TemporaryForgetting(every=2, targets=["model.0"])], style=Tied)

    class Still(BatchNorm):
        def build(self) -> None:
            super().build()
            self.model[1].requires_grad_(False)

    with pytest.raises(MisconfigurationException, match=re.escape("model.1 are frozen. Name trained layers in targets=")):
        fit([TemporaryForgetting(every=2, targets="norm")], style=Still)
    fit([TemporaryForgetting(every=2, targets=["model.0"])], style=Still)
    with pytest.raises(MisconfigurationException, match=re.escape("exclude=['model.4'], or have them train it")):
        fit([TemporaryForgetting(every=2, targets=["model.4"]), LoRA(rank=2)])
    fit([TemporaryForgetting(every=2, targets=["model.4"]), LoRA(rank=2, tune=("head",))])
    for arguments, message in (({"every": 0}, "every=0 must be at least 1"), ({"std": 0.0}, "std=0.0 must be above 0")):
        with pytest.raises(MisconfigurationException, match=re.escape(message)):
            TemporaryForgetting(**arguments)  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match="before layers began anew, first after step 1000"):
        trainer(callbacks=[TemporaryForgetting(targets=["model.2"])]).fit(Plain(), loader(), loader())

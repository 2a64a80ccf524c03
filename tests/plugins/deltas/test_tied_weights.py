"""A tensor that an embedding and the head share has one delta, which both compute with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, embedding, linear
from torch.utils.data import DataLoader

import lightning_peft
from lightning_peft import EVA, AdaLoRA, LoRA, PiSSA
from lightning_peft.testing.modules import trainer
from lightning_peft.weights.maps import mapped_tensors

IDS = torch.randint(11, (16, 5), generator=torch.Generator().manual_seed(0))
BOTH: dict[str, Any] = {"targets": ["model.embed", "model.head"], "exclude": None}


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mid, self.head = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.mid(self.embed(ids)))


class Tied(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = Network()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return cross_entropy(self.model(batch).flatten(0, 1), batch.flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.05)


def fit(module: Tied, method: Any, epochs: int = 2, callbacks: Any = (), **settings: Any) -> Any:
    runner = trainer(callbacks=[method, *callbacks], max_epochs=epochs)
    runner.fit(module.train(), DataLoader(IDS, batch_size=4), **settings)  # type: ignore[arg-type]
    module.eval()
    return runner


def only_form(module: nn.Module) -> Any:
    forms = {each.maps[0].form for each in mapped_tensors(module)}  # type: ignore[attr-defined]
    assert len(list(mapped_tensors(module))) == 2
    (form,) = forms
    return form


def test_both_layers_train_one_product() -> None:
    module = Tied()
    fit(module, LoRA(2, keep=True, **BOTH), epochs=0)
    form, net = only_form(module), Tied().model.requires_grad_(False)
    down, up = (nn.Parameter(each.detach().clone()) for each in (form.down, form.up))
    adam = torch.optim.Adam([down, up], lr=0.05)
    for batch in IDS.split(4) * 2:
        weight = net.embed.weight + up @ down
        logits = linear(net.mid(embedding(batch, weight)), weight)
        adam.zero_grad()
        cross_entropy(logits.flatten(0, 1), batch.flatten()).backward()  # type: ignore[no-untyped-call]
        adam.step()
    fit(module, LoRA(2, keep=True, **BOTH))
    torch.testing.assert_close((form.down, form.up), (down.data, up.data), atol=1e-5, rtol=1e-5)


METHODS = [LoRA(2, **BOTH), PiSSA(2, **BOTH), AdaLoRA(2, 1, **BOTH), EVA(2, looks=1, **BOTH)]


@pytest.mark.parametrize("method", METHODS, ids=lambda each: each.name)
def test_it_goes_into_the_tensor_once_and_the_tie_stays(method: Any, tmp_path: Path) -> None:
    module, plain = Tied(), Tied()
    method.stays = True
    runner = fit(module, method)
    answers = module.model(IDS)
    assert (answers - plain.eval().model(IDS)).abs().max() > 1e-2
    runner.save_checkpoint(tmp_path / "it.ckpt")
    baked = lightning_peft.bake_checkpoint(tmp_path / "it.ckpt", tmp_path / "baked.ckpt", base=Tied())
    plain.load_state_dict(torch.load(baked, weights_only=True)["state_dict"])
    lightning_peft.bake(module)
    for each in (module, plain):
        assert each.model.head.weight is each.model.embed.weight
        torch.testing.assert_close(each.model(IDS), answers, atol=1e-6, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:.*callbacks used to create")
def test_it_is_resumed_and_loaded_as_one(tmp_path: Path) -> None:
    whole, resumed, saver = Tied(), Tied(), ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    fit(whole, LoRA(2, keep=True, **BOTH), callbacks=[saver])
    first = tmp_path / "epoch=0.ckpt"
    fit(resumed, LoRA(2, keep=True, **BOTH), ckpt_path=first, weights_only=True)
    assert torch.equal(only_form(resumed).up, only_form(whole).up)
    opened = lightning_peft.load_from_checkpoint(Tied, first, base=Tied(), attached=True)
    fit(opened, LoRA(2, keep=True, **BOTH), epochs=1)
    assert only_form(opened).up.abs().max() > 0


def test_peft_reads_it_as_two_equal_adapters(tmp_path: Path) -> None:
    module = Tied()
    fit(module, LoRA(2, 4, keep=True, **BOTH))
    lightning_peft.save_peft(module, tmp_path / "adapter")
    wrapped = peft.PeftModel.from_pretrained(Tied().model, str(tmp_path / "adapter"))
    torch.testing.assert_close(wrapped(IDS), module.model(IDS), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("one", ["model.embed", "model.head"])
def test_one_of_the_layers_alone_is_refused_and_the_advice_works(one: str) -> None:
    module = Tied()
    with pytest.raises(MisconfigurationException, match=r"targets=\['model\.\w+', 'model\.\w+'\] and exclude=None") as refused:
        fit(module, LoRA(2, targets=[one], exclude=None))
    advice = str(refused.value).partition("targets=")[2].partition("]")[0]
    plan = lightning_peft.plan(module, [LoRA(2, targets=[name.strip("[]' ") for name in advice.split(",")], exclude=None)])
    assert f"rank 2 on 2 tensors, {2 * (11 + 8)} parameters" in str(plan)
    assert "are one tensor" in str(plan)

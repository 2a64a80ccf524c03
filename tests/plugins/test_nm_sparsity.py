from __future__ import annotations

import copy

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_peft import NMSparsity, bake, bake_checkpoint, plan
from lightning_peft.functional import is_nm, nm_mask
from lightning_peft_plugins.sparsity._nm_sparsity.nm_map import MaskRule, NMMap
from lightning_peft_plugins.sparsity._nm_sparsity.nm_schedule import RECIPES


class Net(LightningModule):
    """Two sparse candidates between a first layer and a head."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.model = nn.Sequential(
            nn.Linear(6, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, 3),
        )

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self.model(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-5)


def data(batches: int = 6) -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8 * batches, 6, generator=generator)
    return DataLoader(TensorDataset(x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()), batch_size=8)


def fit(module: LightningModule, *callbacks: Callback, epochs: int = 2, **kwargs) -> Trainer:
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **kwargs,
    )
    trainer.fit(module, data())
    return trainer


def seeded(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


class Spy(Callback):
    """Keeps what the sparse layer computed with, step by step."""

    def __init__(self) -> None:
        self.weights: list[torch.Tensor] = []

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        self.weights.append(pl_module.model[2].weight.detach().clone())


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("pattern", ["2:4", "1:8", "3:8", "3:7"])
def test_every_recipe_reaches_its_target_exactly(recipe, pattern):
    module = seeded()
    fit(module, NMSparsity(pattern, recipe, fine_tune="20%"))
    n, m = map(int, pattern.split(":"))
    for index in (2, 4):
        weight = module.model[index].weight
        groups = weight[:, : 16 // m * m].unflatten(1, (-1, m))
        assert (groups.count_nonzero(-1) == n).all()
        assert weight[:, 16 // m * m :].count_nonzero() == weight[:, 16 // m * m :].numel()
    for index in (0, 6):
        assert (module.model[index].weight != 0).all()


def test_mdgf_pruned_weights_fade_by_the_published_factor():
    spy = Spy()
    module = seeded()
    fit(module, NMSparsity("2:4", "mdgf-exponential", decay=0.5), spy, epochs=1)
    for step, weight in enumerate(spy.weights[1:], start=1):
        small = weight.unflatten(1, (-1, 4)).abs().sort(-1).values[..., :2].mean()
        first = spy.weights[0].unflatten(1, (-1, 4)).abs().sort(-1).values[..., :2].mean()
        assert small / first == pytest.approx(torch.e ** (-0.5 * step), rel=0.35)


def test_one_shot_never_changes_its_mask_and_keeps_pruned_weights_at_zero():
    spy = Spy()
    module = seeded()
    start = nm_mask(module.model[2].weight.detach(), 2, 4)
    fit(module, NMSparsity("2:4", "one-shot"), spy)
    assert all(torch.equal(weight != 0, start) for weight in spy.weights)
    assert torch.equal(module.model[2].weight != 0, start)


def test_masks_are_held_between_refreshes():
    spy = Spy()
    fit(seeded(), NMSparsity("2:4", "ste", refresh=4), spy)
    masks = [weight != 0 for weight in spy.weights]
    changed = [step for step in range(1, len(masks)) if not torch.equal(masks[step], masks[step - 1])]
    assert changed
    assert all(step % 4 == 0 for step in changed)


@pytest.mark.parametrize("kwargs", [{}, {"refresh": 3}, {"dense": 4, "fine_tune": "25%"}], ids=str)
@pytest.mark.parametrize("recipe", ["one-shot", "mdgf-exponential", "sdgf-stepwise"])
def test_resume_is_bit_exact_and_files_bake_like_modules(tmp_path, recipe, kwargs):
    class Save(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}.ckpt")

    whole = seeded()
    fit(whole, NMSparsity("2:4", recipe, **kwargs), Save())
    resumed = seeded(1)
    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        callbacks=[NMSparsity("2:4", recipe, **kwargs)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(resumed, data(), ckpt_path=tmp_path / "0.ckpt")
    for ours, theirs in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    baked = Net.load_from_checkpoint(bake_checkpoint(tmp_path / "1.ckpt", tmp_path / "baked.ckpt"))
    for ours, theirs in zip(whole.parameters(), baked.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_bake_of_a_copy_during_training_is_the_target_pattern():
    copies = []

    class Copy(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            copies.append(bake(copy.deepcopy(pl_module)))

    fit(seeded(), NMSparsity("1:4", "mdgf-exponential", dense=3), Copy(), epochs=1)
    assert len(copies) == 6
    assert all(is_nm(module.model[2].weight, 1, 4) for module in copies)


def test_layers_can_have_their_own_pattern():
    method = NMSparsity("2:4", patterns={"model.4": "1:8"})
    module = seeded()
    assert "2:4 on 1 layers, 1:8 on 1 layers" in str(plan(module, [method]))
    fit(module, method)
    assert is_nm(module.model[4].weight, 1, 8)
    assert is_nm(module.model[2].weight, 2, 4)
    assert not is_nm(module.model[2].weight, 1, 8)


def test_convolutions_group_along_input_channels():
    class Conv(Net):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Sequential(
                nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, groups=8), nn.Flatten(), nn.Linear(128, 3)
            )

        def training_step(self, batch, batch_idx):
            return self.model(batch[0].repeat(1, 32).view(-1, 3, 8, 8)).square().mean()

    module = Conv()
    fit(module, NMSparsity("2:4", targets="all-weights"))
    assert (module.model[1].weight.permute(0, 2, 3, 1).unflatten(-1, (-1, 4)).count_nonzero(-1) == 2).all()
    assert module.model[2].weight.count_nonzero() == module.model[2].weight.numel()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"pattern": "5:4"}, "5:4"),
        ({"pattern": "two:four"}, "two:four"),
        ({"recipe": "srste"}, "choose one of one-shot"),
        ({"grad_mode": "none"}, "grad_mode"),
        ({"refresh": 0}, "refresh"),
        ({"decay": -1.0}, "decay"),
        ({"sr_lambda": -1.0}, "sr_lambda"),
    ],
)
def test_impossible_arguments_name_the_fix(kwargs, message):
    with pytest.raises(MisconfigurationException, match=message):
        NMSparsity(**kwargs)


def test_layers_narrower_than_a_group_are_refused_or_left_out():
    with pytest.raises(MisconfigurationException, match=r"model\.6 has 16 inputs, fewer than one group of 2:32"):
        plan(seeded(), [NMSparsity("2:32", targets=["model.6"], exclude=())])
    with pytest.raises(MisconfigurationException, match="fewer than one group"):
        plan(seeded(), [NMSparsity("2:32")])
    assert "1:8 on 3 layers" in str(plan(seeded(), [NMSparsity("1:8", exclude=())]))


def test_the_plan_says_what_sparse_tensor_cores_can_take():
    # PyTorch packs linear layers of multiples of 16 by 16 for cuSPARSELt, and no convolutions.
    layers = [nn.Linear(16, 64), nn.Linear(64, 24), nn.Linear(24, 32), nn.Linear(32, 3)]
    said = str(plan(nn.Sequential(*layers), [NMSparsity("2:4", exclude=())]))
    assert "2:4 on 4 layers (1 fit sparse tensor cores; not 1: 24 outputs, 2: 24 inputs, 3: 3 outputs)" in said
    assert "all fit sparse tensor cores" in str(plan(nn.Sequential(*layers), [NMSparsity("2:4", targets="0", exclude=())]))
    assert "tensor cores" not in str(plan(nn.Sequential(*layers), [NMSparsity("1:8", exclude=())]))
    convolution = nn.Sequential(nn.Conv2d(4, 16, 1), nn.Conv2d(16, 16, 1))
    assert "0 fit sparse tensor cores; not 0: Conv2d, 1: Conv2d" in str(plan(convolution, [NMSparsity("2:4", exclude=())]))


def test_two_masks_on_one_tensor_are_a_conflict():
    methods = [NMSparsity("2:4"), NMSparsity("1:4", name="other")]
    with pytest.raises(MisconfigurationException, match=r"both put a mask on model\.2\.weight"):
        plan(seeded(), methods)


def test_phases_longer_than_the_training_are_refused_before_any_step():
    module = seeded()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(MisconfigurationException, match="do not fit"):
        fit(module, NMSparsity("2:4", dense="80%", fine_tune="40%"))
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())


def test_masked_gradients_fade_with_the_weights():
    full, masked = seeded(), seeded()
    fit(full, NMSparsity("2:4", "mdgf-linear"), epochs=1)
    fit(masked, NMSparsity("2:4", "mdgf-linear", grad_mode="masked"), epochs=1)
    assert not torch.equal(full.model[2].weight, masked.model[2].weight)


class Decays(Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer, *_) -> None:
        method = next(callback for callback in trainer.callbacks if isinstance(callback, NMSparsity))
        self.seen.append(float(method.metrics(method.run)["decay"]))


@pytest.mark.parametrize("options", [{}, {"fine_tune": 2}])
def test_a_finished_run_that_goes_on_stays_sparse(tmp_path, options):
    first, again, early = Decays(), Decays(), Decays()
    settings = {"recipe": "mdgf-exponential", "exclude": (), **options}
    trainer = fit(seeded(), NMSparsity("2:4", **settings), first, epochs=3)
    trainer.save_checkpoint(tmp_path / "ended.ckpt")
    module = seeded()
    resumed = Trainer(
        max_epochs=6,
        accelerator="cpu",
        callbacks=[NMSparsity("2:4", **settings), again],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    resumed.fit(module, data(), ckpt_path=tmp_path / "ended.ckpt", weights_only=False)
    assert first.seen[0] > 0.5
    assert again.seen == [0.0] * 18, "masks are binary from the first further step on"
    fit(seeded(), NMSparsity("2:4", **settings), early, epochs=6)
    assert max(early.seen[18:30]) > 0.0, "a run of that length from the start would be soft there"
    assert all(is_nm(layer.weight, 2, 4) for layer in module.model[2:] if isinstance(layer, nn.Linear))


def test_sr_ste_pulls_by_the_masks_of_the_forward_pass():
    rule = MaskRule(2, 4)
    rule.set(2, 4, 0.0)
    rule.pulls = True
    nm_map = NMMap(2, 4, 1, rule=rule)
    seen = torch.tensor([[4.0, 3.0, 2.0, 1.0]], requires_grad=True)
    later = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    high, low = [[True, True, False, False]], [[False, False, True, True]]
    nm_map(seen)
    nm_map(later.clone().requires_grad_())
    assert nm_map.take_mask(later).tolist() == high, "the first pass of a step counts, not one of weights that are tried"
    assert nm_map.take_mask(later).tolist() == low, "it is taken once"
    rule.set(2, 4, 0.0)
    with torch.no_grad():
        nm_map(seen)
    torch.func.grad(lambda weight: nm_map(weight).sum())(seen.detach())
    assert nm_map.take_mask(later).tolist() == low, "of a pass without gradients, or inside a transform, nothing is kept"
    nm_map(seen)
    assert nm_map.take_mask(torch.cat([later, later])).tolist() == low * 2, "nor for a weight of another shape"
    rule.set(2, 4, 0.0)
    nm_map(seen)
    rule.set(2, 4, 0.0)
    assert nm_map.take_mask(later).tolist() == low, "nor beyond a step"


def test_sr_ste_chooses_its_masks_once_a_step(monkeypatch):
    chosen = []

    def counted(weight, *args):
        chosen.append(weight.shape)
        return nm_mask(weight, *args)

    monkeypatch.setattr("lightning_peft_plugins.sparsity._nm_sparsity.nm_map.nm_mask", counted)
    method = NMSparsity("2:4", recipe="sr-ste", targets=["model.2", "model.4"], exclude=())
    trainer = Trainer(accelerator="cpu", max_steps=4, logger=False, enable_checkpointing=False, callbacks=[method])
    trainer.fit(Net(), data())
    # Alone in the first step, together in those that follow (test_nm_step_masks.py).
    assert len(chosen) == 2 * (1 + 2), "the last metrics and the module that is left want them too"


def test_no_mask_is_kept_for_weights_that_nothing_pulls():
    rule = MaskRule(2, 4)
    rule.set(2, 4, 0.0)
    nm_map = NMMap(2, 4, 1, rule=rule)
    weight = torch.randn(2, 8, requires_grad=True)
    nm_map(weight)
    rule.pulls = True
    nm_map(weight.detach())
    assert nm_map._of_forward[1] is None
    nm_map(weight)
    assert nm_map._of_forward[1] is not None
    assert not any(isinstance(value, torch.Tensor) for value in vars(nm_map).values()), "nothing to cut or move with the map"


def test_a_compiled_step_with_sr_ste_is_compiled_once():
    graphs = []

    def counted(graph, inputs):
        graphs.append(graph)
        return graph.forward

    module = Net()
    module.model.compile(backend=counted, fullgraph=True)
    method = NMSparsity("2:4", recipe="sr-ste", targets=["model.2", "model.4"], exclude=())
    Trainer(accelerator="cpu", max_steps=5, logger=False, enable_checkpointing=False, callbacks=[method]).fit(module, data())
    assert len(graphs) == 1

"""Several methods that compute gradients, and several ranks."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from step_toys import RADIUS, SGD, Backwards, SGDBatchNorm, batches, by_hand, loss_of, seeded

from lightning_peft import Lane, Method, Resource
from lightning_peft.testing import run_ddp
from lightning_peft.testing.modules import loader, trainer
from lightning_peft.testing.runs import fit
from lightning_peft.testing.toys import ToySAM, ToyTwice, with_gradient


class Doubles(Method):
    """Gradients twice as large, a loss twice as large."""

    lane = Lane.GRADIENT
    writes = frozenset({Resource.GRADIENT})

    def compute_gradients(self, run, optimizer, closure):
        closure()
        for parameter in with_gradient(optimizer):
            parameter.grad.mul_(2.0)


@pytest.mark.parametrize("first", ["doubles", "toy_sam"])
def test_a_later_method_has_the_earlier_one_within_its_closure(first):
    calls = []

    class Doubling(Doubles):
        def compute_gradients(self, run, optimizer, closure):
            calls.append("doubles")
            super().compute_gradients(run, optimizer, closure)

    pair = {"doubles": Doubling(name="doubles"), "toy_sam": ToySAM(RADIUS)}
    last = next(name for name in pair if name != first)
    pair[last].after = (first,)
    counts = Backwards()
    run = fit(pair.values(), module=seeded(SGD), max_epochs=1, after=[counts])
    assert counts.seen == 4, "what is computed once more is no second step"
    assert len(calls) == (8 if first == "doubles" else 4)
    hand = by_hand(seeded(SGD), batches(1), loss_of=lambda module, batch: 2.0 * loss_of(module, batch))
    error = max((p - q).abs().max().item() for p, q in zip(hand.parameters(), run.module.parameters(), strict=True))
    assert error < 1e-5


class Sees(Callback):
    def __init__(self):
        self.batches = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.batches.append(batch)


def on_rank(accumulate):
    torch.set_num_threads(1)
    module, method, sees = seeded(SGDBatchNorm), ToySAM(RADIUS), Sees()
    callbacks = [method, ToyTwice(), sees]
    settings = {"devices": 2, "strategy": "ddp", "max_epochs": 2, "accumulate_grad_batches": accumulate}
    trainer(callbacks=callbacks, **settings).fit(module, loader(32, 4))
    return {"weights": dict(module.state_dict()), "steps": method.steps, "batches": sees.batches}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_ranks_take_the_step_of_one(accumulate):
    first, second = run_ddp(f"{__file__}:on_rank", {"accumulate": accumulate})
    trained = {name for name, _ in seeded(SGDBatchNorm).named_parameters()}
    assert all(torch.equal(first["weights"][name], second["weights"][name]) for name in trained)
    pairs = [*zip(first["batches"], second["batches"], strict=True)]

    def mean_of_ranks(module, pair):
        return sum(loss_of(module, batch) for batch in pair) / 2

    hand = by_hand(seeded(SGDBatchNorm), pairs, accumulate=accumulate, loss_of=mean_of_ranks)
    error = max((hand.state_dict()[name] - first["weights"][name]).abs().max().item() for name in trained)
    assert error < 1e-5
    assert first["steps"] == 8 // accumulate

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import weakref

import torch
from torch import nn

from lightning_peft.capture.shim import Shim


class Owner:
    factor = 2

    def times(self, x, *, extra=0):
        """Multiply."""
        return self.factor * x + extra


def doubled(inner, *args, **kwargs):
    return 10 * inner(*args, **kwargs)


def test_routes_calls_and_gives_the_method_back():
    owner = Owner()
    shim = Shim(owner, "times", doubled).install()
    assert owner.times(3, extra=1) == 70
    shim.remove()
    assert "times" not in vars(owner)
    assert owner.times(3) == 6


def test_what_lightning_inspects_is_the_users_method():
    owner = Owner()
    shim = Shim(owner, "times", doubled).install()
    assert list(inspect.signature(owner.times).parameters) == ["x", "extra"]
    assert owner.times.__code__ is Owner.times.__code__
    assert owner.times.__name__ == "times"
    assert shim.__self__ is owner
    assert shim.__wrapped__.__func__ is Owner.times


def test_an_attribute_that_was_there_before_comes_back():
    owner = Owner()
    own = owner.times = lambda x: x + 1
    shim = Shim(owner, "times", doubled).install()
    assert owner.times(1) == 20
    shim.remove()
    assert owner.times is own


def test_two_shims_removed_in_reverse_and_in_order():
    for order in (slice(None, None, -1), slice(None)):
        owner = Owner()
        shims = [Shim(owner, "times", doubled).install() for _ in range(2)]
        assert owner.times(1) == 200
        for shim in shims[order]:
            shim.remove()
        assert owner.times(1) == 2


def test_a_removed_shim_that_somebody_wrapped_passes_through():
    owner = Owner()
    shim = Shim(owner, "times", doubled).install()
    inner = owner.times
    owner.times = lambda x: inner(x) + 1
    shim.remove()
    assert owner.times(1) == 3


def test_copies_get_the_plain_method_of_the_copy():
    module = nn.Linear(2, 1)
    shim = Shim(module, "forward", doubled).install()
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert twin.forward.__self__ is twin
        with torch.no_grad():
            twin.weight.zero_()
            twin.bias.zero_()
        assert twin(torch.ones(1, 2)).item() == 0
    shim.remove()
    assert "forward" not in vars(module)


def test_the_owner_is_not_kept_alive():
    owner = Owner()
    shim = Shim(owner, "times", doubled).install()
    watch = weakref.ref(owner)
    del shim, owner
    gc.collect()
    assert watch() is None


def test_removal_after_the_owner_is_gone():
    owner = Owner()
    shim = Shim(owner, "times", doubled).install()
    del owner
    gc.collect()
    shim.remove()

"""Which sample a prediction belongs to: its index in the batch, and samples that come late, twice or never."""

from __future__ import annotations

from typing import Any

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException
from pskd_toys import EPOCHS, SIZE, Lit, Points, Recorded, fit, loader
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_peft_plugins.regularizers.pskd import PSKD


class Given:
    """A batch sampler with a list of batches for every epoch."""

    def __init__(self, *epochs: list[list[int]]) -> None:
        self.epochs = list(epochs)

    def __iter__(self) -> Any:
        return iter(self.epochs.pop(0))

    def __len__(self) -> int:
        return 2


def test_samples_that_are_new_in_a_later_epoch_keep_the_users_loss() -> None:
    """Two of four samples were dropped in the first epoch: half of alpha goes to the memory, the rest is the user's."""
    criterion, method = Recorded(), PSKD(0.8)
    sampler = Given([[0, 1, 2, 3], [4, 5, 6, 7]], [[1, 20, 3, 21], [8, 9, 10, 11]])
    losses = fit(method, Lit(criterion), DataLoader(Points(), batch_sampler=sampler), max_epochs=2)
    (first, _), _, (mixed, y), (unseen, labels) = criterion.calls
    soft = -(first[[1, 3]].softmax(1) * mixed[[0, 2]].log_softmax(1)).sum(1)
    assert losses[2] == pytest.approx((0.6 * F.cross_entropy(mixed, y) + 0.8 * soft.sum() / 4).item(), abs=1e-6)
    assert losses[3] == F.cross_entropy(unseen, labels).item()
    assert method.memory.seen.nonzero().flatten().tolist() == [*range(12), 20, 21]


def test_a_sample_drawn_twice_in_the_first_epoch_stays_plain() -> None:
    criterion = Recorded()
    data = DataLoader(Points(), batch_sampler=Given([[0, 1], [1, 0]], [[0, 1], [1, 0]]))
    losses = fit(PSKD(0.8), Lit(criterion), data, max_epochs=2)
    plain = [F.cross_entropy(*call).item() for call in criterion.calls]
    assert losses[:2] == plain[:2]
    assert losses[2] != pytest.approx(plain[2], abs=1e-6)


def test_drop_last() -> None:
    method = PSKD(0.8)
    losses = fit(method, Lit(), loader(batch_size=6, drop_last=True))
    assert len(losses) == 3 * EPOCHS
    assert 18 <= int(method.memory.seen.sum()) <= SIZE


@pytest.mark.parametrize(
    ("wrap", "path"),
    [
        (lambda x, y, i: {"x": x, "y": y, "index": i}, "index"),
        (lambda x, y, i: {"x": x, "y": y, "meta": {"where": [0, i]}}, "meta.where.1"),
        (lambda x, y, i: (x, y, {"id": i}), "2.id"),
        (lambda x, y, i: (x, y, i), "-1"),
    ],
)
def test_index_from_the_batch(wrap: Any, path: str) -> None:
    method = PSKD(0.8, path)
    assert fit(method, Lit(), loader(wrap=wrap)) == pytest.approx(fit(PSKD(0.8), Lit(), loader()), abs=1e-7)
    assert method.memory.size == SIZE


@pytest.mark.parametrize(
    ("path", "match"),
    [
        ("index", r"'index' is not in the batch, which has 2 items \(positions 0 to 1\)"),
        ("5", "'5' is not in the batch"),
        ("0.index", "has a single Tensor"),
        ("0", "leads to a tensor of torch.float32"),
    ],
)
def test_missing_index_says_what_the_batch_has(path: str, match: str) -> None:
    with pytest.raises(MisconfigurationException, match=match):
        fit(PSKD(0.8, path), Lit(), loader())


def test_missing_key_names_the_keys() -> None:
    def wrap(x: Any, y: Any, i: Any) -> dict[str, Any]:
        return {"x": x, "y": y}

    with pytest.raises(MisconfigurationException, match=r"'idx' is not in the batch, which has the keys \['x', 'y'\]"):
        fit(PSKD(0.8, "idx"), Lit(), loader(wrap=wrap))


def test_an_index_beyond_the_given_size_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="outside the memory of 5 samples"):
        fit(PSKD(0.8, num_samples=5), Lit(), loader())

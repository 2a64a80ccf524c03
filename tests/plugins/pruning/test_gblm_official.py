"""GBLM and Wanda beside runs of their official codes on a LLaMA of one block; the masks those chose are in tests/fixtures.

They prune block after block and score each on the outputs of the pruned blocks before it; ours scores all on the network in
training. With one block both see the same.
"""

from __future__ import annotations

import pytest
from official_llama import SCALE, SENTENCES, Llama, Reader, sentence_loader
from official_values import filled, values_of

from lightning_peft import GBLM, Wanda
from lightning_peft.testing.modules import trainer

RECORDED = values_of("gblm_official")
METHODS = {"GBLM": GBLM, "Wanda": Wanda}
RUNS = [(name, amount) for name, run in RECORDED.items() for amount in run["kept"]]


@pytest.mark.parametrize(("name", "amount"), RUNS)
def test_prunes_what_the_official_code_prunes(name, amount):
    share = {"pattern": amount} if ":" in amount else {"amount": float(amount)}
    method = METHODS[name](targets="re:.*_proj", exclude=(), every=SENTENCES, **share)
    module = Reader(filled(Llama(), SCALE))
    trainer(callbacks=[method], precision="64-true").fit(module, sentence_loader())
    for tensor, expected in RECORDED[name]["kept"][amount].items():
        kept = module.net.get_parameter(tensor).flatten() != 0
        assert "".join(str(int(place)) for place in kept) == expected, tensor

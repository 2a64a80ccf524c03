"""T3A: which layer is the classifier, which features are kept, and what is left in the module."""

from __future__ import annotations

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from tta_toys import Trained, close, layer_norm_net, run, stream

from lightning_peft import T3A
from lightning_peft.functional import class_templates, select_supports
from lightning_peft.testing.modules import trainer


def test_supports_by_hand():
    entropy, labels = torch.tensor([0.5, 0.1, 0.4, 0.1, 0.9]), torch.tensor([2, 0, 2, 0, 2])
    assert select_supports(entropy, labels, 2).tolist() == [1, 3, 2, 0]
    assert select_supports(entropy, labels, None).tolist() == [1, 3, 2, 0, 4]
    assert select_supports(entropy, labels, 1).tolist() == [1, 2]
    templates = class_templates(torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([1, 1]), 2)
    close([templates[0], templates[1]], [torch.zeros(2), torch.tensor([0.6, 1.8]) / (0.6**2 + 1.8**2) ** 0.5])


def test_all_features_are_kept_if_asked():
    method = T3A(per_class=None)
    run(layer_norm_net(), method)
    assert method.metrics(None)["supports"] == 4 + 6 * 12


def test_a_classifier_behind_something_else_must_be_named():
    net = nn.Sequential(*layer_norm_net(), nn.LogSoftmax(-1)).eval()
    with pytest.raises(MisconfigurationException, match=r"3 linear layers ran.*classifier="):
        run(net, T3A())
    close(run(net, T3A(classifier="net.6")), run(layer_norm_net(), T3A()), 1e-6)
    with pytest.raises(MisconfigurationException, match=r"classifier='net\.0' is Flatten"):
        run(net, T3A(classifier="net.0"))
    with pytest.raises(MisconfigurationException, match=r"classifier='net\.66' is not a submodule .* Did you mean net\.6 "):
        run(net, T3A(classifier="net.66"))
    with pytest.raises(MisconfigurationException, match="returns 4 classes, and the classifier has 16"):
        run(net, T3A(classifier="net.1"))


def test_the_last_templates_can_be_kept():
    net = layer_norm_net()
    predictions = run(net, T3A(per_class=3, keep=True))
    *_, (x, _) = stream()
    close([net(x)], predictions[-1:], 1e-5)


def test_a_mapped_classifier_keeps_no_templates():
    from lightning_peft.testing.toys import ToyThreshold

    module = Trained(layer_norm_net().train())
    mask = ToyThreshold(0.1, exclude=())
    trainer(callbacks=[mask], max_steps=1, limit_val_batches=1).fit(module, stream(), stream())
    trainer(callbacks=[mask, T3A()]).test(module, stream(), verbose=False)
    with pytest.raises(MisconfigurationException, match="Leave keep=True out"):
        trainer(callbacks=[mask, T3A(keep=True)]).test(module, stream(), verbose=False)

"""Types of adapters in PEFT's folders: found by name, and brought by anybody."""

from __future__ import annotations

import json
from importlib.metadata import EntryPoint
from pathlib import Path

import peft
import pytest
import torch
from torch import nn

import lightning_peft
from lightning_peft import registry
from lightning_peft.deltas import peft_formats
from lightning_peft.deltas.peft_lora import LoraFormat


class ToyFormat(LoraFormat):
    """A LoRA under another name."""

    peft_type = "TOY"


def test_every_format_is_of_a_method() -> None:
    for name in peft_formats.known():
        kind = peft_formats.format_named(name)
        assert kind.peft_type == name.partition(".")[0]
        assert kind.owner in registry.installed()
        assert all(each.startswith(kind.beginning) for names in kind.tensors for each in names)


def test_an_author_brings_a_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points = [EntryPoint("TOY", f"{__name__}:ToyFormat", peft_formats.GROUP)]
    monkeypatch.setattr(peft_formats, "entry_points", lambda group: points)
    torch.manual_seed(0)
    module, inputs = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4)), torch.randn(3, 6)
    config = peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4)), config).eval()
    wrapped.save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"peft_type": "TOY"}))
    assert lightning_peft.load_peft(module, tmp_path) == ["0"]
    torch.testing.assert_close(module(inputs), wrapped(inputs), atol=1e-6, rtol=1e-6)

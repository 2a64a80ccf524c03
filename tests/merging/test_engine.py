"""The engine of merging: what goes together, in which type, from which files, and what is said of the rest."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lightning_peft
from lightning_peft import merge, merge_function
from lightning_peft.functional import is_nm, nm_mask
from lightning_peft.merging import stacks
from lightning_peft.merging.depth import depths
from lightning_peft.merging.errors import MergeError
from lightning_peft.merging.kth_largest import kth_largest


def state(**tensors):
    return {name: torch.as_tensor(value) for name, value in tensors.items()}


def network(seed, *, norm=False):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), *([nn.BatchNorm1d(7)] if norm else []), nn.Tanh(), nn.Linear(7, 3))


@given(st.data())
@settings(max_examples=60)
def test_the_kth_largest_is_that_of_a_sort(data):
    rows, size = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 40))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    numbers = st.floats(0, 2.0**100, width=32) | st.sampled_from([0.0, 1.0, 2.0])
    table = torch.tensor(data.draw(st.lists(numbers, min_size=rows * size, max_size=rows * size)), dtype=dtype).view(rows, size)
    cut, k = data.draw(st.integers(0, size)), data.draw(st.integers(1, size))
    found = kth_largest(lambda: iter([part for part in (table[:, :cut], table[:, cut:]) if part.numel()]), lambda total: k)
    assert found.equal(table.sort(1, descending=True).values[:, k - 1])


def test_pieces_change_nothing(monkeypatch):
    one, two, start = (network(seed).state_dict() for seed in (1, 2, 0))
    calls = [("soup", {}), ("ties", {"base": start}), ("dare", {"base": start, "density": 0.5, "combine": "elect"})]
    whole = [merge([one, two], method, **more) for method, more in calls]
    monkeypatch.setattr(stacks, "PIECE", 7)
    for (method, more), before in zip(calls, whole, strict=True):
        after = merge([one, two], method, **more)
        assert all(torch.equal(before[name], after[name]) for name in before), method


def test_counters_are_kept_and_statistics_averaged_with_a_word():
    one, two = (network(seed, norm=True) for seed in (0, 1))
    for place, net in enumerate((one, two)):
        net.train()
        for _ in range(3 + place):
            net(torch.randn(8, 5) + place)
    with pytest.warns(UserWarning, match=r"1\.running_mean.*update_bn\(loader, module\)"):
        merged = merge([one.state_dict(), two.state_dict()], "task_arithmetic", base=one.state_dict(), scale=3.0)
    assert merged["1.num_batches_tracked"] == 3
    assert torch.allclose(merged["1.running_var"], (one[1].running_var + two[1].running_var) / 2)
    fresh = network(2, norm=True)
    with pytest.warns(UserWarning, match="running_mean"):
        soup = merge([one.state_dict(), two.state_dict()])
    fresh.load_state_dict(soup)
    loader = [torch.randn(8, 5) for _ in range(4)]
    torch.optim.swa_utils.update_bn(loader, fresh)  # as the warning says
    assert torch.allclose(fresh[1].running_mean, fresh[0](torch.cat(loader)).mean(0), atol=1e-5)


def test_an_nm_pattern_that_all_models_have_stays(recwarn):
    torch.manual_seed(0)
    dense = torch.randn(6, 8)
    weights = [dense + torch.randn(6, 8) for _ in range(2)]
    one_mask = [state(w=each * nm_mask(dense, 2, 4)) for each in weights]
    merged = merge(one_mask)["w"]
    assert torch.equal(merged, (one_mask[0]["w"] + one_mask[1]["w"]) / 2)
    assert not recwarn
    masks = [state(w=each * nm_mask(each, 2, 4)) for each in weights]
    mean = (masks[0]["w"] + masks[1]["w"]) / 2
    assert not is_nm(mean, 2, 4)
    for make in (lambda: merge(masks), lambda: merge(masks, "task_arithmetic", base=state(w=0 * dense), scale=0.5)):
        with pytest.warns(UserWarning, match=r"1 tensors are 2:4 in all models, under masks that differ.*of w, the most"):
            merged = make()["w"]
        assert torch.allclose(merged, mean * nm_mask(mean, 2, 4))
    along_rows = [state(w=each["w"].T.contiguous()) for each in masks]
    with pytest.warns(UserWarning, match="are 2:4"):
        assert torch.allclose(merge(along_rows)["w"], merged.T)
    dense_one = merge([masks[0], state(w=weights[1])])["w"]
    assert torch.allclose(dense_one, (masks[0]["w"] + weights[1]) / 2)


def test_tied_tensors_stay_tied_where_all_models_have_them_so():
    def tied(value):
        weight = torch.full((2, 2), value)
        return {"embedding": weight, "head": weight}

    both = merge([tied(1.0), tied(3.0)])
    assert both["head"] is both["embedding"]
    assert both["head"].eq(2.0).all()
    one = merge([tied(1.0), state(embedding=torch.full((2, 2), 3.0), head=torch.full((2, 2), 5.0))])
    assert one["embedding"].eq(2.0).all()
    assert one["head"].eq(3.0).all()


def test_a_result_has_the_type_of_its_base_and_is_computed_in_single_precision():
    ones = [{"w": torch.full((1,), value, dtype=torch.bfloat16)} for value in (256.0, 1.0, 1.0, 1.0, 1.0)]
    merged = merge(ones, "soup")["w"]
    assert merged.dtype == torch.bfloat16
    assert merged == 52.0  # a sum in bfloat16 would have stayed at 256
    double = [{"w": torch.tensor([value], dtype=torch.float64)} for value in (1.0, 1.0 + 2**-40)]
    assert merge(double)["w"] == 1.0 + 2**-41
    mixed = [state(w=[1.0]), {"w": torch.ones(1, dtype=torch.float16)}]
    with pytest.raises(MergeError, match=r'w is float32 in model 1 and float16 in model 2.*dtype="float32"'):
        merge(mixed)
    assert merge(mixed, dtype="float32")["w"].dtype == torch.float32
    assert merge(mixed, dtype=torch.float64)["w"].dtype == torch.float64


def test_a_scale_of_two_numbers_grows_with_depth():
    names = ["stem.weight", "layers.0.weight", "layers.1.weight", "layers.2.weight", "head.weight"]
    zeros, ones = ({name: torch.full((2,), value) for name in names} for value in (0.0, 1.0))
    merged = merge([ones], "task_arithmetic", base=zeros, scale=(0.2, 1.0))
    assert [round(float(merged[name][0]), 6) for name in names] == [0.2, 0.2, 0.6, 1.0, 0.2]


def test_depth_counts_the_blocks_of_stages_on_and_none_inside_of_blocks():
    timm = pytest.importorskip("timm")
    found = depths({name: value.shape for name, value in timm.create_model("resnet18").state_dict().items()})
    assert found["layer1.0.conv1.weight"] == 0.0
    assert found["layer2.0.downsample.0.weight"] == found["layer2.0.conv1.weight"] == pytest.approx(2 / 7)
    assert found["layer4.1.bn2.bias"] == 1.0
    assert "conv1.weight" not in found
    assert "fc.weight" not in found
    vit = depths({name: value.shape for name, value in timm.create_model("vit_tiny_patch16_224", depth=3).state_dict().items()})
    assert {vit[f"blocks.{place}.mlp.fc1.weight"] for place in range(3)} == {0.0, 0.5, 1.0}
    assert "head.weight" not in vit


def test_a_function_of_ones_own_merges():
    @merge_function(elementwise=True)
    def largest(models, *, share: float = 1.0):
        return models.max(0).values * share

    assert merge([state(w=[1.0, 4.0]), state(w=[3.0, 2.0])], largest, share=0.5)["w"].tolist() == [1.5, 2.0]
    with pytest.raises(MergeError, match=r"largest\(share=...\) takes float, not 'a'"):
        merge([state(w=[1.0]), state(w=[3.0])], largest, share="a")

    def strange(models, secret):
        return models[0]

    with pytest.raises(MergeError, match="nothing supplies its parameter 'secret'"):
        merge([state(w=[1.0]), state(w=[3.0])], strange)


def test_a_rescaled_function_multiplies_the_whole_difference():
    @merge_function(elementwise=True, rescale=lambda norms, own: norms.mean() / own)
    def normed(deltas):
        return deltas.sum(0)

    start, one, two = state(a=[1.0, 1.0], b=[1.0]), state(a=[4.0, 1.0], b=[5.0]), state(a=[4.0, 1.0], b=[5.0])
    merged = merge([one, two], normed, base=start)  # both differ by (3, 0, 4), of norm 5, and so is their rescaled sum
    assert torch.allclose(merged["a"], one["a"])
    assert torch.allclose(merged["b"], one["b"])


def test_merge_of_a_module_still_puts_parts_into_weights():
    with pytest.raises(Exception, match="no layer parts that could be merged"):
        merge(network(0))


FAULTY = {
    "an empty list": (lambda one: ([],), "the list is empty"),
    "one model": (lambda one: ([one],), "one model only"),
    "no list": (lambda one: (one,), "Put the models into a list"),
    "a name more": (lambda one: ([one, one | state(more=[1.0])],), "model 1 has no more, which model 2 has"),
    "a prefix": (
        lambda one: ([one, {f"net.{name}": value for name, value in one.items()}],),
        "Those of model 2 begin with 'net.'",
    ),
    "a vocabulary": (
        lambda one: ([one, one | state(w=torch.ones(4, 2))],),
        r"w is \(3, 2\) in model 1 and \(4, 2\).*vocabulary",
    ),
    "a shape": (lambda one: ([one, one | state(w=torch.ones(3, 4))],), "grown or pruned"),
    "integers": (lambda one: ([one, one | {"w": torch.ones(3, 2, dtype=torch.int8)}],), "quantised"),
    "NaN": (
        lambda one: ([one, one | state(w=torch.full((3, 2), torch.nan))],),
        "w of model 2 holds numbers that are not finite",
    ),
    "an infinity": (lambda one: ([one | state(w=torch.full((3, 2), torch.inf)), one],), "w of model 1 holds"),
    "no tensors": (lambda one: ([one, {"w": 1}],), "model 2 holds no tensors"),
    "no base": (lambda one: ([one, one], "ties"), "Give it with base="),
    "a method": (lambda one: ([one, one], "tie"), "Did you mean ties"),
    "an option": (lambda one: ([one, one], "ties", {"densty": 0.2}), "no option 'densty'. Did you mean density"),
    "a density": (lambda one: ([one, one], "ties", {"base": one, "density": 1.5}), "density=1.5 must be above 0"),
    "a density of none": (lambda one: ([one, one], "dare", {"base": one, "density": 0.0}), "density=0.0 must be above 0"),
    "weights": (lambda one: ([one, one], "soup", {"weights": [1.0]}), "weights= has 1 numbers for 2 models"),
    "weights of zero": (lambda one: ([one, one], "soup", {"weights": [1.0, -1.0]}), "add up to zero"),
    "weights of infinity": (lambda one: ([one, one], "soup", {"weights": [1.0, float("inf")]}), "must be finite"),
    "weights nobody counts": (lambda one: ([one], "ties", {"base": one, "weights": [2.0]}), "counts all models alike"),
    "a scale": (lambda one: ([one, one], "soup", {"scale": 2.0}), "'soup' merges values. Leave it out"),
    "three scales": (
        lambda one: ([one], "task_arithmetic", {"base": one, "scale": (1.0, 2.0, 3.0)}),
        "must be a number, or two",
    ),
    "a type": (lambda one: ([one, one], "soup", {"dtype": "float23"}), "Did you mean float32"),
    "an ending": (lambda one: ([one, one], "soup", {"out": "merged.onnx"}), "says nothing"),
    "a base of NaN": (lambda one: ([one], "ties", {"base": {"w": torch.full((3, 2), torch.nan)}}), "of the base holds"),
}


@pytest.mark.parametrize("fault", FAULTY)
def test_what_cannot_be_merged_is_said(fault):
    make, message = FAULTY[fault]
    models, method, more = _filled(make)
    with pytest.raises(Exception, match=message):
        merge(models, method, **more)


def _filled(make):
    given = make(state(w=torch.ones(3, 2)))
    return (*given, *("soup", {})[len(given) - 1 :])


def test_more_models_than_memory_are_refused_before_the_work(monkeypatch):
    @merge_function()
    def whole(models):
        return models[0]

    monkeypatch.setattr("os.sysconf", lambda name: 1)
    with pytest.raises(MergeError, match="needs w of all 2 models at once"):
        merge([state(w=torch.ones(3, 2))] * 2, whole)


def test_thousands_of_models_are_merged():
    merged = merge([state(w=[float(place)]) for place in range(10_000)])
    assert merged["w"] == pytest.approx(4999.5)


@pytest.fixture
def models(tmp_path):
    return [network(seed).state_dict() for seed in (1, 2)]


@pytest.mark.parametrize("ending", [".ckpt", ".pt", ".safetensors", ""])
def test_what_is_written_is_read_again(models, tmp_path, ending):
    merged = merge(models, out=tmp_path / f"merged{ending}")
    again = merge([tmp_path / f"merged{ending}"] * 2)
    assert all(torch.equal(merged[name], again[name]) for name in merged)
    assert [path.name for path in tmp_path.iterdir()] == [f"merged{ending}"]


def test_a_folder_in_parts_is_read_and_its_other_files_go_along(models, tmp_path):
    from safetensors.torch import save_file

    for place, tensors in enumerate(models):
        folder = tmp_path / str(place)
        folder.mkdir()
        names = list(tensors)
        files = {name: f"model-{1 + (index > 1)}.safetensors" for index, name in enumerate(names)}
        for file in set(files.values()):
            save_file({name: tensors[name] for name in names if files[name] == file}, folder / file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
        (folder / "config.json").write_text(json.dumps({"place": place}))
    merged = merge([tmp_path / "0", tmp_path / "1"], out=tmp_path / "out")
    expected = merge(models)
    assert all(torch.equal(merged[name], expected[name]) for name in expected)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    assert json.loads((tmp_path / "out/config.json").read_text()) == {"place": 0}
    index = tmp_path / "0/model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": "../1/model-1.safetensors"}}))
    with pytest.raises(MergeError, match="does not say which file of its folder"):
        merge([tmp_path / "0", tmp_path / "1"])


def test_damaged_and_hostile_files_are_refused(models, tmp_path):
    torch.save(models[0], tmp_path / "whole.pt")
    (tmp_path / "half.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:900])
    (tmp_path / "half.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{")
    torch.save({"state_dict": models[0], "harm": Harm()}, tmp_path / "harm.ckpt")
    (tmp_path / "empty").mkdir()
    for name, message in {
        "half.pt": "not a readable checkpoint",
        "half.safetensors": "not a readable safetensors file",
        "harm.ckpt": "could run code",
        "empty": "is no folder of a model",
        "none.pt": "There is no file",
    }.items():
        with pytest.raises(Exception, match=message):
            merge([tmp_path / "whole.pt", tmp_path / name], out=tmp_path / "out.pt")
    assert not Harm.done
    assert not (tmp_path / "out.pt").exists()


class Harm:
    done: list[int] = []

    def __reduce__(self):
        return (Harm.done.append, (1,))


def test_a_checkpoint_keeps_its_hyperparameters_and_no_optimizer(models, tmp_path):
    for place, tensors in enumerate(models):
        rest = {
            "hyper_parameters": {"width": 7},
            "pytorch-lightning_version": "2.6.1",
            "optimizer_states": [{}],
            "epoch": place,
        }
        torch.save({"state_dict": tensors, **rest}, tmp_path / f"{place}.ckpt")
    merge([tmp_path / "0.ckpt", tmp_path / "1.ckpt"], out=tmp_path / "merged.ckpt")
    found = torch.load(tmp_path / "merged.ckpt", weights_only=True)
    assert found["hyper_parameters"] == {"width": 7}
    assert "optimizer_states" not in found
    assert found["lightning_peft_merge"]["method"] == "soup"
    assert [path.rpartition("/")[2] for path in found["lightning_peft_merge"]["models"]] == ["0.ckpt", "1.ckpt"]


def test_a_full_disk_leaves_nothing(models, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        merge(models, out=tmp_path / "merged.pt")
    assert not list(tmp_path.iterdir())


def test_public_names():
    assert lightning_peft.merge is merge
    assert lightning_peft.unmerge

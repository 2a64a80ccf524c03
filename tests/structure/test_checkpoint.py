from __future__ import annotations

import os
import pickle
import re
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lightning.fabric.utilities.exceptions import MisconfigurationException

import lightning_peft
from lightning_peft.structure import checkpoint as files
from lightning_peft.structure.checkpoint import CheckpointError
from lightning_peft.structure.plain_state import edited, joined
from lightning_peft.testing.callbacks import every_epoch
from lightning_peft.testing.modules import Plain, loader, trainer
from lightning_peft.testing.runs import assert_clean, assert_same, fit
from lightning_peft.testing.toys import ToyEntropy, ToyScale, ToyThreshold
from lightning_peft.testing.trace import difference


def methods():
    return [ToyScale(), ToyThreshold(), ToyEntropy()]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    torch.set_num_threads(1)
    fit(methods(), after=[every_epoch(folder)])
    return folder / "epoch=0.ckpt"


def as_format(checkpoint, version):
    """Give a checkpoint the form that earlier versions of the library wrote."""
    section = checkpoint["lightning_peft"]
    checkpoint["state_dict"] = joined(checkpoint["state_dict"], section)
    del section["tensors"], section["seen"]
    section["version"] = version


def damaged(good, folder, change):
    checkpoint = torch.load(good, weights_only=True)
    change(checkpoint)
    path = folder / "damaged.ckpt"
    torch.save(checkpoint, path)
    return path


def resume_is_refused(path, match, error=CheckpointError):
    """Every way of using the file is refused, and the module stays what it was."""
    torch.manual_seed(1)
    module = Plain()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(error, match=match):
        fit(methods(), module=module, resume=path, max_epochs=2)
    assert_clean(module, "a refused checkpoint")
    assert difference(before, dict(module.state_dict())) is None


# Hostile files.


class Payload:
    def __init__(self, sentinel):
        self.sentinel = sentinel

    def __reduce__(self):
        return os.system, (f"touch {self.sentinel}",)


@pytest.mark.parametrize("place", ["top", "section", "callback", "state_dict"])
def test_pickle_payload_is_refused_and_not_executed(place, good, tmp_path):
    sentinel = tmp_path / "executed"

    def poison(checkpoint):
        payload = Payload(sentinel)
        if place == "top":
            checkpoint["extra"] = payload
        elif place == "section":
            checkpoint["lightning_peft"]["weights"]["model.0.weight"][0]["config"]["start"] = payload
        elif place == "callback":
            checkpoint["callbacks"]["lightning_peft/toy_entropy"]["state"] = payload
        else:
            checkpoint["state_dict"]["model.0.bias"] = payload

    path = damaged(good, tmp_path, poison)
    for read in (
        lambda: lightning_peft.load_from_checkpoint(Plain, path),
        lambda: lightning_peft.bake_checkpoint(path, tmp_path / "out.ckpt"),
    ):
        with pytest.raises(CheckpointError, match="Python objects besides plain data and was not opened"):
            read()
    resume_is_refused(path, "Weights only load failed", pickle.UnpicklingError)
    assert not sentinel.exists()
    assert not (tmp_path / "out.ckpt").exists()
    torch.load(path, weights_only=False)  # what would have happened
    assert sentinel.exists()


def test_bare_pickle_is_refused(tmp_path):
    sentinel = tmp_path / "executed"
    path = tmp_path / "bare.ckpt"
    path.write_bytes(pickle.dumps({"state_dict": Payload(sentinel)}, protocol=2))
    with pytest.raises(CheckpointError):
        lightning_peft.load_from_checkpoint(Plain, path)
    assert not sentinel.exists()


@pytest.mark.parametrize(
    "content", [b"", b"not a checkpoint", b"PK\x03\x04broken", bytes(1000)], ids=["empty", "text", "zip", "zeros"]
)
def test_files_that_are_no_checkpoints(content, tmp_path):
    path = tmp_path / "x.ckpt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError):
        lightning_peft.load_from_checkpoint(Plain, path)


@pytest.mark.parametrize("value", [[1, 2], {"weights": 1}, {"state_dict": [1]}, torch.ones(2)], ids=repr)
def test_plain_data_of_another_kind(value, tmp_path):
    torch.save(value, tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match='has no "state_dict"'):
        lightning_peft.load_from_checkpoint(Plain, tmp_path / "x.ckpt")


def test_truncated_file(good, tmp_path):
    whole = good.read_bytes()
    for part in (10, len(whole) // 2, len(whole) - 1):
        path = tmp_path / f"{part}.ckpt"
        path.write_bytes(whole[:part])
        with pytest.raises(CheckpointError):
            lightning_peft.load_from_checkpoint(Plain, path)


def test_missing_file():
    with pytest.raises(FileNotFoundError):
        lightning_peft.load_from_checkpoint(Plain, Path("nowhere.ckpt"))


# Files of other versions, models and methods.


@pytest.mark.parametrize("version", [0, 99])
def test_unknown_format(version, good, tmp_path):
    path = damaged(good, tmp_path, lambda c: c["lightning_peft"].update(version=version))
    message = f"format {version}; this version of the library reads formats 1 to 3"
    resume_is_refused(path, message)
    with pytest.raises(CheckpointError, match=message):
        lightning_peft.load_from_checkpoint(Plain, path)


def test_a_file_with_another_order_of_parameters_is_baked_but_not_resumed(good, tmp_path):
    path = damaged(good, tmp_path, lambda c: as_format(c, 1))
    resume_is_refused(path, r"earlier version of lightning-peft.*load_from_checkpoint\(ModelClass, path\)")
    module, same = (lightning_peft.load_from_checkpoint(Plain, each) for each in (path, good))
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), same.parameters(), strict=True))
    fit([ToyScale()], module=module)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Be aware that when using")
        trainer(callbacks=methods()).validate(Plain(), loader(8), ckpt_path=path, weights_only=True, verbose=False)
    # Without maps the order never was another.
    whole = fit([ToyEntropy()], after=[every_epoch(tmp_path)], max_epochs=2)
    path = damaged(tmp_path / "epoch=0.ckpt", tmp_path, lambda c: as_format(c, 1))
    assert_same(whole, fit([ToyEntropy()], seed=3, resume=path, max_epochs=2), "resumed from format 1")


@pytest.mark.parametrize("count", ["x", -1, True])
def test_a_count_of_maps_that_is_none(count, good, tmp_path):
    path = damaged(good, tmp_path, lambda c: c["lightning_peft"]["methods"][0].update(maps=count))
    resume_is_refused(path, r"record of a method is malformed: .*\['maps'\] is")


@pytest.mark.parametrize("count", [2, 4])
def test_more_or_fewer_maps_than_were_counted(count, good, tmp_path):
    path = damaged(good, tmp_path, lambda c: c["lightning_peft"]["methods"][0].update(maps=count))
    with pytest.raises(CheckpointError, match=f"ToyScale had {count} weight maps .* it lists 3"):
        lightning_peft.load_from_checkpoint(Plain, path)


def test_tensors_of_a_map_that_is_not_listed(good, tmp_path):
    key = "model.0.parametrizations.weight.7.scale"
    path = damaged(good, tmp_path, lambda c: c["lightning_peft"]["tensors"].update({key: torch.ones(())}))
    with pytest.raises(CheckpointError, match=f"holds {key}, but lists no weight map"):
        lightning_peft.load_from_checkpoint(Plain, path)


def test_a_map_that_changes_a_shape():
    section = files.section({"w": [{"map": "toy_scale", "method": "ToyScale", "config": {"start": [1.0, 1.0]}}]}, [])
    state = {"parametrizations.w.original": torch.ones(2, 1), "parametrizations.w.0.scale": torch.ones(2)}
    with pytest.raises(CheckpointError, match=r"on w change its shape from \(2, 1\) to \(2, 2\)"):
        files.bake_state_dict(state, section)


def test_a_modules_own_extra_state_may_have_any_shape():
    class Extra(torch.nn.Module):
        def get_extra_state(self):
            return torch.ones(3)

    files.check_tensors({"_extra_state": torch.ones(5)}, Extra())


RIGHT = {"optimizer_steps": 4, "epochs": 1, "last_index": torch.arange(8)}


@pytest.mark.parametrize(
    "state",
    [
        {"version": 7},
        {},
        [],
        {"version": 1},
        {"version": 1, "steps": "x", "epochs": 0, "state": {}},
        {"version": 0, "steps": 4, "epochs": 1, "state": RIGHT},
        {"version": 1, "steps": -4, "epochs": 1, "state": RIGHT},
        {"version": 1, "steps": 4, "epochs": "x", "state": RIGHT},
        {"version": 1, "steps": 4, "epochs": 1, "state": RIGHT | {"optimizer_steps": -4}},
    ],
)
def test_unknown_or_malformed_method_state(state, good, tmp_path):
    path = damaged(good, tmp_path, lambda c: c["callbacks"].update({"lightning_peft/toy_entropy": state}))
    resume_is_refused(path, "toy_entropy", MisconfigurationException)


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("model.2.parametrizations.weight.0.scale", (3, 7)),
        ("model.4.bias", (3, 7)),
        ("model.4.bias", (3, 1)),  # as many numbers as it has
    ],
)
@pytest.mark.parametrize("version", [2, 3])
def test_wrong_shape(version, key, shape, good, tmp_path):
    def change(checkpoint):
        if version == 2:
            as_format(checkpoint, 2)
        inside = checkpoint["lightning_peft"]["tensors"] if version == 3 and "scale" in key else checkpoint["state_dict"]
        inside[key] = torch.zeros(shape)

    path = damaged(good, tmp_path, change)
    resume_is_refused(path, rf"holds {key} with shape {re.escape(str(shape))}; this model has")


STORED = "model.0.parametrizations.weight.original"


@pytest.mark.parametrize("value", [torch.zeros(3, 7), None, "x", 1])
def test_a_stored_value_that_does_not_fit(value, good, tmp_path):
    path = damaged(good, tmp_path, lambda c: c["lightning_peft"]["tensors"].update({STORED: value}))
    match = r"stored value of model\.0\.weight in the checkpoint does not fit"
    resume_is_refused(path, match)
    with pytest.raises(CheckpointError, match=match):
        lightning_peft.load_from_checkpoint(Plain, path)


def test_a_stored_value_among_the_tensors_of_the_module(good, tmp_path):
    path = damaged(good, tmp_path, lambda c: c["state_dict"].update({STORED: torch.zeros(16, 16)}))
    resume_is_refused(path, f"holds {STORED} among the tensors of an ordinary module")


@pytest.mark.parametrize("value", [..., None, "x", torch.ones((), dtype=torch.bool)])
def test_what_a_map_holds_is_missing_or_of_another_type(value, good, tmp_path):
    key = "model.2.parametrizations.weight.0.scale"

    def change(checkpoint):
        checkpoint["lightning_peft"]["tensors"][key] = value
        if value is ...:
            del checkpoint["lightning_peft"]["tensors"][key]

    path = damaged(good, tmp_path, change)
    resume_is_refused(path, r"'toy_scale' on model\.2\.weight does not fit: scale is missing, unknown or of another type")


def test_wrong_shape_is_refused_when_baking(good, tmp_path):
    key = "model.2.parametrizations.weight.0.scale"
    path = damaged(good, tmp_path, lambda c: c["lightning_peft"]["tensors"].update({key: torch.zeros(3, 7)}))
    with pytest.raises(CheckpointError, match=r"'toy_scale' on model\.2\.weight does not fit"):
        lightning_peft.load_from_checkpoint(Plain, path)


@pytest.mark.parametrize("version", [2, 3])
def test_missing_stored_tensor(version, good, tmp_path):
    def change(checkpoint):
        if version == 2:
            as_format(checkpoint, 2)
        checkpoint["state_dict"].pop(STORED if version == 2 else "model.0.weight")

    path = damaged(good, tmp_path, change)
    with pytest.raises(CheckpointError, match=r"records weight maps on model\.0\.weight, but"):
        lightning_peft.load_from_checkpoint(Plain, path)


@pytest.mark.parametrize(
    ("record", "match"),
    [
        ({"map": "toy_scale", "method": "Nobody", "config": {}}, "no method 'Nobody'"),
        ({"map": "other", "method": "ToyScale", "config": {}}, "has no weight map 'other'"),
        ({"map": "toy_scale", "method": "ToyScale", "config": {"nonsense": 1}}, "arguments .* do not fit"),
        ({"map": "toy_scale", "method": "os:system", "config": {}}, "no method 'os:system'"),
        ({"map": "toy_scale", "method": "ToyScale", "config": {"start": "ls"}}, "do"),
    ],
)
def test_records_that_name_nothing_installed(record, match, good, tmp_path):
    path = damaged(good, tmp_path, lambda c: c["lightning_peft"]["weights"].update({"model.0.weight": [record]}))
    with pytest.raises(MisconfigurationException, match=match):
        lightning_peft.load_from_checkpoint(Plain, path)


def test_a_checkpoint_of_other_methods_loads_for_evaluation_only(good):
    torch.manual_seed(2)
    module, wanted = Plain(), lightning_peft.load_from_checkpoint(Plain, good)
    seen = []
    module.validation_step = lambda batch, batch_idx: seen.append(module(batch[0]))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Be aware that when using")
        trainer(callbacks=[ToyThreshold()]).validate(module, loader(8), ckpt_path=good, weights_only=True, verbose=False)
    assert torch.allclose(seen[0], wanted.eval()(next(iter(loader(8)))[0]), atol=1e-6)
    resumed = Plain()
    with pytest.raises(CheckpointError, match="cannot be resumed with these methods"):
        fit([ToyThreshold()], module=resumed, resume=good, max_epochs=2)
    assert_clean(resumed, "a refused resume")


def test_a_plain_checkpoint_starts_a_training_with_methods(tmp_path):
    plain = fit([], after=[every_epoch(tmp_path)])
    module = lightning_peft.load_from_checkpoint(Plain, tmp_path / "epoch=0.ckpt")
    assert difference(dict(plain.module.state_dict()), dict(module.state_dict())) is None
    weights = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)
    light = tmp_path / "light.ckpt"
    torch.save({k: v for k, v in weights.items() if k not in ("optimizer_states", "lr_schedulers", "loops")}, light)
    inside = []

    class Look(ToyScale):
        def on_validation_batch_start(self, trainer, pl_module, *args):
            super().on_validation_batch_start(trainer, pl_module, *args)
            inside.append({n: pl_module.get_submodule(n).weight.detach().clone() for n in ("model.0", "model.2")})

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Be aware that when using")
        trainer(callbacks=[Look()]).validate(Plain(), loader(8), ckpt_path=light, weights_only=True, verbose=False)
    for name, seen in inside[0].items():
        torch.testing.assert_close(seen, plain.module.get_submodule(name).weight, msg=f"{name} under a map against the file")


# Any plain data in the section: a clear error or a result, never another exception.

scalars = st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text(max_size=4)
keys = st.text(max_size=4)
nests = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3))
arguments = st.dictionaries(st.sampled_from(["start", "threshold", "x", ""]) | st.integers(0, 1), nests, max_size=2)
records = st.fixed_dictionaries(
    {},
    optional={
        "map": st.sampled_from(["toy_scale", "toy_threshold", "x"]) | nests,
        "method": st.sampled_from(["ToyScale", "ToyThreshold", "ToyEntropy", "NMSparsity", "x"]) | nests,
        "config": arguments | nests,
    },
)
known_maps = st.sampled_from([("ToyScale", "toy_scale"), ("ToyThreshold", "toy_threshold")])
plausible = st.builds(lambda pair, config: {"method": pair[0], "map": pair[1], "config": config}, known_maps, arguments)
tensors = st.sampled_from([torch.ones(4, 4), torch.ones(()), torch.zeros(0), torch.ones(2, dtype=torch.bool), "x", 3, None])
CHAIN = "model.0.parametrizations.weight."
names = st.sampled_from(["model.0.weight", "model.0.bias", "weight", "", ".", "model..x"]) | st.text(max_size=5)
sections = st.fixed_dictionaries(
    {"version": st.just(files.FORMAT) | st.just(2) | nests},
    optional={
        "weights": st.dictionaries(names, st.lists(records | plausible, max_size=2) | nests, max_size=2) | nests,
        "methods": st.just([]) | nests,
        "tensors": st.dictionaries(st.sampled_from([f"{CHAIN}original", f"{CHAIN}0.scale", "x"]), tensors | nests) | nests,
        "seen": st.just({"model.0.weight": 4144014378}) | nests,
    },
)


@given(sections | nests, tensors, tensors, st.booleans())
@settings(max_examples=200, deadline=None)
def test_fuzzed_sections_are_read_or_refused(section, original, scale, plain):
    state = {f"{CHAIN}original": original, f"{CHAIN}0.scale": scale, "parametrizations.weight.original": original}
    state = {"model.0.weight": original} if plain else state
    try:
        found = files.read({"lightning_peft": section})
        if found is not None:
            files.difference(found, [])
            edited(state, found)
            files.bake_state_dict(joined(state, found), found)
    except MisconfigurationException:
        pass


@given(st.lists(plausible, min_size=1, max_size=2), tensors, tensors)
@settings(max_examples=200, deadline=None)
def test_fuzzed_arguments_and_tensors_are_baked_or_refused(maps, original, scale):
    section = files.read({"lightning_peft": {"version": 2, "methods": [], "weights": {"model.0.weight": maps}}})
    try:
        state = files.bake_state_dict({f"{CHAIN}original": original, f"{CHAIN}0.scale": scale}, section)
    except MisconfigurationException:
        return
    assert state["model.0.weight"].shape == original.shape


@given(sections)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_fuzzed_files_are_loaded_or_refused(good, tmp_path_factory, section):
    path = damaged(good, tmp_path_factory.mktemp("fuzz"), lambda c: c.update(lightning_peft=section))
    try:
        lightning_peft.bake_checkpoint(path, path.with_suffix(".out"))
    except MisconfigurationException:
        assert not path.with_suffix(".out").exists()

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from warm_python import python

import lightning_peft
from lightning_peft import registry

STUB = Path(lightning_peft.__file__).with_suffix(".pyi")
HEAVY = ("timm", "transformers", "matplotlib", "pandas", "pyarrow", "peft", "pytest", "PIL")


def fresh(script, run=python):
    """Run a script in a process that has not imported this library, and return what it printed."""
    result = run("-c", script)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout.strip()


def test_import_is_light_and_loads_no_plugin():
    script = f"""
import sys, time
import torch, lightning
before = set(sys.modules)
start = time.perf_counter()
import lightning_peft
seconds = time.perf_counter() - start
new = set(sys.modules) - before
print(seconds)
print(sorted(name for name in new if name.startswith(("lightning_peft_", *{HEAVY!r}))))
"""
    times = []
    for _ in range(3):  # a busy machine can take its time once
        seconds, loaded = fresh(script).splitlines()
        assert loaded == "[]"
        times.append(float(seconds))
        if times[-1] < 0.05:
            return
    pytest.fail(f"importing lightning_peft took {times} seconds beyond torch and lightning, more than 0.05")


def test_names_are_resolved_on_first_use():
    script = """
import sys
import lightning.pytorch, torchmetrics  # these import optional packages of their own where they are installed
before = set(sys.modules)
import lightning_peft
assert "lightning_peft.method" not in sys.modules
dir(lightning_peft)
assert not [name for name in sys.modules if name.startswith("lightning_peft_plugins")]
from lightning_peft import NMSparsity
assert "lightning_peft_plugins.sparsity.nm_sparsity" in sys.modules
assert not [name for name in sys.modules if name.startswith("lightning_peft_plugins.regularizers")]
assert vars(lightning_peft)["NMSparsity"] is NMSparsity
print([name for name in ("timm", "transformers", "matplotlib.pyplot", "pytest") if name in set(sys.modules) - before])
"""
    assert fresh(script) == "[]"


@pytest.mark.parametrize("name", sorted(set(dir(lightning_peft)) - {"__version__"}))
def test_every_public_name_resolves(name):
    value = getattr(lightning_peft, name)
    assert value is getattr(lightning_peft, name)
    assert value.__doc__


def test_the_stub_lists_what_dir_offers():
    names = set()
    for node in ast.parse(STUB.read_text()).body:
        if isinstance(node, ast.ImportFrom):
            assert all(alias.asname == alias.name for alias in node.names), "only `x as x` is re-exported to type checkers"
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.AnnAssign):
            names.add(node.target.id)
    foreign = {name for name, entry in registry.installed().items() if entry.distribution != "lightning-peft"}
    assert names == set(dir(lightning_peft)) - foreign


def test_the_stub_names_the_objects_themselves():
    for node in ast.parse(STUB.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module != "lightning_peft":
            module = __import__(node.module, fromlist=["x"])
            for alias in node.names:
                assert getattr(module, alias.name) is getattr(lightning_peft, alias.name)


NEAREST = [("NMSparsty", "NMSparsity"), ("pskd", "PSKD"), ("load_checkpoint", "load_from_checkpoint"), ("bak", "bake")]


@pytest.mark.parametrize(("name", "nearest"), NEAREST)
def test_unknown_names_suggest_the_nearest(name, nearest):
    with pytest.raises(AttributeError, match=rf"module 'lightning_peft' has no attribute '{name}'\. Did you mean .*{nearest}"):
        getattr(lightning_peft, name)
    with pytest.raises(ImportError):
        exec(f"from lightning_peft import {name}")


def test_a_star_brings_every_method_and_function():
    names: dict[str, object] = {}
    exec("from lightning_peft import *", names)
    assert set(registry.installed()) <= set(names)
    assert names["plan"] is lightning_peft.plan
    assert names["Method"] is lightning_peft.Method
    assert "testing" not in names, "modules would hide names of the user's"


def test_a_star_leaves_out_a_broken_plugin_and_says_so(monkeypatch):
    broken = registry.MethodEntry("Broken", "no_such_package.module:Broken", "third-party", "1.0")
    entries = {**registry.installed(), "Broken": broken}
    monkeypatch.setattr(registry, "installed", lambda: entries)
    names: dict[str, object] = {}
    with pytest.warns(UserWarning, match=r"Broken of the package third-party 1\.0 could not be imported"):
        exec("from lightning_peft import *", names)
    assert "PSKD" in names
    assert "Broken" not in names


def test_private_names_are_no_plugins():
    assert not hasattr(lightning_peft, "__wrapped__")
    assert not hasattr(lightning_peft, "_nothing")


def test_the_version_is_that_of_the_distribution():
    from importlib.metadata import version

    assert lightning_peft.__version__ == version("lightning-peft")


def test_testing_works_without_pytest():
    script = """
import sys
sys.modules["pytest"] = None
from lightning_peft.testing import Plain, loader, trainer
trainer(max_steps=1).fit(Plain(), loader(), loader(8))
print("ok")
"""
    assert fresh(script).endswith("ok")

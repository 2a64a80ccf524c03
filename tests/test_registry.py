from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_peft import registry
from lightning_peft.testing.toys import ToyScale


@pytest.fixture
def points(monkeypatch):
    """Installs a list of entry points for one test."""
    registry.installed.cache_clear()

    def install(*pairs):
        made = [EntryPoint(name, value, registry.GROUP) for name, value in pairs]
        monkeypatch.setattr(registry, "entry_points", lambda group: made)
        registry.installed.cache_clear()

    yield install
    monkeypatch.undo()
    registry.installed.cache_clear()


def test_the_methods_of_this_distribution_are_found():
    found = registry.installed()
    assert {"NMSparsity", "WeightCompander", "PSKD"} <= set(found)
    assert found["NMSparsity"].family == "sparsity"
    assert found["NMSparsity"].distribution == "lightning-peft"
    assert registry.find("NMSparsity") is found["NMSparsity"].load()


def test_listing_imports_no_plugin():
    script = (
        "import sys; from lightning_peft import registry; assert 'PSKD' in registry.installed(); "
        "print([name for name in sys.modules if name.startswith('lightning_peft_plugins')])"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert result.stdout.strip() == "[]"


def test_a_method_defined_here_is_found_by_its_class_name():
    assert registry.find("ToyScale") is ToyScale


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(MisconfigurationException, match=r"There is no method 'nmsparsty'\. Did you mean NMSparsity"):
        registry.find("nmsparsty")
    with pytest.raises(MisconfigurationException, match=r"Known names: .*PSKD"):
        registry.find("zzzzzzzzzzzz")


def test_suggestions():
    assert registry.suggest("alpa", ["Alpha", "Beta"]) == " Did you mean Alpha?"
    assert registry.suggest("qqq", ["Beta", "Alpha"]) == " Known names: Alpha, Beta."
    assert registry.suggest("qqq", []) == " Known names: none."


def test_a_name_from_a_file_never_leads_to_an_import(points, tmp_path, monkeypatch):
    (tmp_path / "evil_module.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    points()
    for name in ("evil_module", "evil_module:Evil", "os.system", "__import__('evil_module')"):
        with pytest.raises(MisconfigurationException):
            registry.find(name)
    assert "evil_module" not in sys.modules


def test_a_broken_plugin_is_named_and_breaks_no_other(points):
    points(("Broken", "no_such_package_at_all:Broken"), ("Fine", "lightning_peft.testing.toys:ToyScale"))
    assert registry.installed()["Fine"].load() is ToyScale
    with pytest.raises(MisconfigurationException, match=r"method Broken of .* could not be imported: ModuleNotFound"):
        registry.find("Broken")


def test_two_packages_that_register_one_name(points):
    points(("Same", "package_a.x:Same"), ("Same", "package_b.x:Same"))
    with pytest.raises(MisconfigurationException, match=r"register the method Same: .*package_a\.x:Same.*package_b\.x:Same"):
        registry.installed()
    points(("Same", "package_a.x:Same"), ("Same", "package_a.x:Same"))  # one package seen twice on the path
    assert list(registry.installed()) == ["Same"]

"""Shared by the checks of :class:`~lightning_peft.testing.tester.MethodTester`: configurations, and trainings run once."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from lightning.pytorch import LightningModule

from lightning_peft.method import Method
from lightning_peft.testing.callbacks import every_epoch
from lightning_peft.testing.ddp import run_ddp
from lightning_peft.testing.modules import STYLES, Plain
from lightning_peft.testing.probe import Probe
from lightning_peft.testing.runs import Fit, assert_clean, fit

EPOCHS = 3
Factory = Callable[[], Method]


class SharedRuns:
    """Base of the checks. Its attributes are described at :class:`~lightning_peft.testing.tester.MethodTester`."""

    methods: ClassVar[Sequence[Factory]]
    new_parameters: ClassVar[str] = ""
    removed_parts: ClassVar[str] = ""
    tolerance: ClassVar[float] = 1e-5
    adapted: ClassVar[Callable[[type[Plain]], type[Plain]]] = staticmethod(lambda style: style)

    styles: ClassVar[Sequence[type[Plain]]] = STYLES
    on_rank: ClassVar[str] = "train_on_rank"

    _runs: ClassVar[dict[Any, Any]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._runs = {}

    @classmethod
    def teardown_class(cls) -> None:
        """Let go of the trainings: a process that goes on holds less, and its garbage collector walks over less."""
        cls._runs.clear()

    def pytest_generate_tests(self, metafunc: Any) -> None:
        """Run each test for every configuration, or for the first one alone, and some of them for every module style."""
        if "factory" in metafunc.fixturenames:
            metafunc.parametrize("factory", list(self.methods), ids=[_shown(factory) for factory in self.methods])
        if "lead" in metafunc.fixturenames:
            metafunc.parametrize("lead", self.methods[:1], ids=[_shown(self.methods[0])])
        if "style" in metafunc.fixturenames:
            metafunc.parametrize("style", self.styles, ids=[style.__name__ for style in self.styles])

    @property
    def style(self) -> type[Plain]:
        """The module that most checks train."""
        return self._adapted(Plain)

    def _adapted(self, style: type[Plain]) -> type[Plain]:
        adapted: type[Plain] = self._once(("style", style), lambda: type(self).adapted(style))
        return adapted

    def _fit(self, methods: Sequence[Method], **settings: Any) -> Fit:
        return fit(methods, **{"style": self.style, **settings})

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        # Class-scoped fixtures would do, were they not deprecated on test classes.
        if key not in self._runs:
            try:
                self._runs[key] = make()
            except Exception as error:
                self._runs[key] = error
        if isinstance(self._runs[key], Exception):
            raise self._runs[key]
        return self._runs[key]

    def _plain(self) -> Fit:
        """The reference training without a method."""
        run: Fit = self._once("plain", lambda: self._fit([], max_epochs=EPOCHS))
        return run

    def _descended(self, factory: Factory) -> Fit:
        """One epoch of plain gradient descent, whose result is a sum over steps and so comparable up to rounding."""
        run: Fit = self._once(("descended", factory), lambda: self._fit([factory()], optimizer="sgd"))
        return run

    @pytest.fixture(autouse=True)
    def _one_thread(self) -> Iterator[None]:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)

    @pytest.fixture
    def folder(self, factory: Factory, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """Where the uninterrupted training of a configuration keeps its checkpoints."""
        path: Path = self._once(("folder", factory), lambda: tmp_path_factory.mktemp("method"))
        return path

    @pytest.fixture
    def uninterrupted(self, factory: Factory, folder: Path) -> Fit:
        """One uninterrupted training with a checkpoint of every epoch, which most checks compare with."""
        run: Fit = self._once(factory, lambda: self._fit([factory()], after=[every_epoch(folder), Probe()], max_epochs=EPOCHS))
        return run

    @pytest.fixture
    def two_ranks(self) -> list[Any]:
        """Findings of each of two processes, for all configurations in one launch."""
        home = type(self)
        names = {"source": inspect.getfile(home), "module": home.__module__, "tester": home.__qualname__}
        results: list[Any] = self._once("two ranks", lambda: run_ddp(f"lightning_peft.testing.ranks:{self.on_rank}", names))
        return results

    def _assert_clean(self, module: LightningModule, after: str) -> None:
        assert_clean(module, after, fewer=bool(self.removed_parts))

    def _assert_close(self, a: Fit, b: Fit, what: str) -> None:
        pairs = zip(a.module.named_parameters(), b.module.named_parameters(), strict=True)
        name, error = max(((name, (p - q).abs().max().item()) for (name, p), (_, q) in pairs), key=lambda pair: pair[1])
        assert error <= self.tolerance, f"{what}: {name} differs by {error:.3g}, more than {self.tolerance}"


def probe_of(run: Fit) -> Probe:
    """The probe among the callbacks of a training."""
    return next(callback for callback in run.trainer.callbacks if isinstance(callback, Probe))  # type: ignore[attr-defined]


def _shown(factory: Factory) -> str:
    """A name for a configuration: the same in every process, so without the addresses of objects among the arguments."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(factory()))[:60]

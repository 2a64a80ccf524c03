"""Families of networks that people have, asked of the registries of transformers, timm and torchvision, each small.

Nothing is downloaded: transformers' classes are built from tiny configurations, of timm and torchvision the smallest network of
each module is built with random weights.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from tiny_configs import OVERRIDES, POSITIONS, SIDE, VOCABULARY, tiny
from torch import Tensor, nn

from lightning_peft.network.logits import as_logits

BATCH, TOKENS, CLASSES = 2, 8, 5
_MOST = 30_000_000  # parameters
_BUILT: dict[str, nn.Module] = {}


class TooLargeError(RuntimeError):
    """A network that is not small."""


@dataclass(frozen=True, eq=False)
class Family:
    """One network of a family.

    Attributes:
        name: Library and name.
        make: Builds it, the same every time.
        sample: Makes the keyword arguments of a call, for one sample.
        generates: Whether it generates tokens.
        configured: Whether its class builds it from ``config``.
    """

    name: str
    make: Callable[[], nn.Module]
    sample: Callable[[torch.Generator], dict[str, Tensor]]
    generates: bool = False
    configured: bool = False

    def build(self) -> nn.Module:
        """Build it, with the same weights every time.

        Raises:
            TooLargeError: It has too many parameters to train on the side.
        """
        if self.name not in _BUILT:
            with quiet():
                with torch.device("meta"):
                    size = sum(parameter.numel() for parameter in self.make().parameters())
                if size > _MOST:
                    raise TooLargeError(f"{size / 1e6:.0f} million parameters")
                torch.manual_seed(0)
                _BUILT[self.name] = self.make().train()
        return copy.deepcopy(_BUILT[self.name])

    def batch(self, seed: int = 0, size: int = BATCH) -> dict[str, Tensor]:
        """Arguments of a call."""
        rows = [self.sample(torch.Generator().manual_seed(100 * seed + row)) for row in range(size)]
        return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep to itself what libraries say while they build."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def answer(output: Any) -> Tensor:
    """The main result of a call: logits, or the first real tensor."""
    try:
        found = as_logits(output)
    except Exception:
        values = output.values() if isinstance(output, Mapping) else output
        found = next(value for value in values if isinstance(value, Tensor) and value.is_floating_point())
    return found.float()


def _ids(g: torch.Generator) -> Tensor:
    return torch.randint(3, VOCABULARY, (TOKENS,), generator=g)


def _image(channels: int, side: int) -> Callable[[torch.Generator], Tensor]:
    return lambda g: torch.randn(channels, side, side, generator=g)


@cache
def transformers_types() -> dict[str, str]:
    """The kind of head that each type of model gets: the first of these registries that has it."""
    from transformers.models.auto import modeling_auto as auto

    masked = set(auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES)
    kinds = {
        "seq2seq": auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        "image": auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
        "audio": auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
        "text": {key: name for key, name in auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.items() if key in masked},
        "causal": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "other text": auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    }
    found: dict[str, str] = {}
    for kind, names in kinds.items():
        for key in names:
            found.setdefault(key, kind.removeprefix("other "))
    return found


def _class_of(model_type: str, kind: str) -> Any:
    import transformers
    from transformers.models.auto import modeling_auto as auto

    registry = {
        "seq2seq": auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        "image": auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
        "audio": auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
        "text": auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        "causal": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    }[kind]
    names = registry[model_type]
    return getattr(transformers, names if isinstance(names, str) else names[0])


def transformers_family(model_type: str) -> Family:
    """A family of transformers by its type of model."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = transformers_types()[model_type]
    with quiet():
        config = tiny(CONFIG_MAPPING[model_type], OVERRIDES.get(model_type))
        cls = _class_of(model_type, kind)

    def make() -> nn.Module:
        return cls(type(config).from_dict(config.to_dict()))  # type: ignore[no-any-return]

    def sample(g: torch.Generator) -> dict[str, Tensor]:
        if kind == "image":
            side = getattr(config, "image_size", SIDE)
            return {"pixel_values": _image(getattr(config, "num_channels", 3), side if isinstance(side, int) else SIDE)(g)}
        if kind == "audio":
            name = cls.main_input_name
            bins = getattr(config, "num_mel_bins", 16)
            spectrum = (config.max_length, bins) if hasattr(config, "frequency_stride") else (bins, 2 * POSITIONS)
            shape = (
                (1600,) if name == "input_values" and len(spectrum) and not hasattr(config, "frequency_stride") else spectrum
            )
            return {name: torch.randn(shape, generator=g)}
        ids = {"input_ids": _ids(g)}
        return ids | ({"decoder_input_ids": _ids(g)} if kind == "seq2seq" else {})

    return Family(f"transformers/{model_type}", make, sample, kind in ("causal", "seq2seq"), configured=True)


_SIDES = (32, 64, 96, 128, 224, 256)


def _sized(name: str, make: Callable[..., nn.Module], argument: str) -> Family:
    """A network for images, at the smallest size that it takes in training and in evaluation."""
    for side in _SIDES:
        settings: list[dict[str, Any]] = [{"img_size": side}, {}] if side != 224 else [{}]

        def build(settings: list[dict[str, Any]] = settings) -> nn.Module:
            for each in settings:
                with contextlib.suppress(TypeError):
                    return make(**each)
            raise TypeError(f"{name} cannot be built")

        family = Family(name, build, lambda g, side=side: {argument: _image(3, side)(g)})  # type: ignore[misc]
        try:
            network = family.build()
            answer(network(**family.batch())).sum().backward()
            answer(network.eval()(**family.batch()))
            return family
        except TooLargeError:
            raise
        except Exception:  # a network may say in any way that an image is too small
            _BUILT.pop(name, None)
    raise ValueError(f"{name} takes images of none of the sizes {_SIDES}")


def timm_family(name: str) -> Family:
    """A network of timm by its name."""
    import timm

    return _sized(f"timm/{name}", lambda **size: timm.create_model(name, num_classes=CLASSES, **size), "x")


def torchvision_family(name: str) -> Family:
    """A network of torchvision by its name."""
    from torchvision import models

    model = models.get_model_builder(name)
    own: dict[str, Any] = {"weights": None, "num_classes": CLASSES}
    if "segmentation" in model.__module__:
        own["weights_backbone"] = None
    if name in ("googlenet", "inception_v3"):
        own |= {"init_weights": False, "aux_logits": False}

    def make(**size: int) -> nn.Module:
        if "img_size" in size:
            size = {"image_size": size["img_size"]}
        return model(**own, **size)  # type: ignore[no-any-return]

    with torch.device("meta"):
        argument = next(iter(inspect.signature(make().forward).parameters))
    return _sized(f"torchvision/{name}", make, argument)


def family(name: str) -> Family:
    """A family by library and name."""
    library, _, short = name.partition("/")
    return {"transformers": transformers_family, "timm": timm_family, "torchvision": torchvision_family}[library](short)


_ASKED = 6
_SMALL = (
    "test",
    "femto",
    "atto",
    "pico",
    "nano",
    "xxs",
    "_xs",
    "mini",
    "tiny",
    "_t_",
    "10",
    "18",
    "035",
    "050",
    "small",
    "s0",
    "b0",
)


def _looks_small(name: str) -> tuple[int, int, str]:
    place = next((place for place, word in enumerate(_SMALL) if word in name), len(_SMALL))
    return place, len(name), name


def smallest(library: str) -> list[str]:
    """The smallest network of each module of timm or torchvision: of those whose names say that they are small."""
    if library == "timm":
        import timm

        found = {module: timm.list_models(module=module) for module in timm.list_modules()}
        make = timm.create_model
    else:
        from torchvision import models

        found = {}
        for kind in (models, models.segmentation):
            for name in models.list_models(module=kind):
                found.setdefault(models.get_model_builder(name).__module__, []).append(name)
        make = models.get_model
    least = []
    for names in found.values():
        sizes = {}
        for name in sorted(names, key=_looks_small)[:_ASKED]:
            with quiet(), torch.device("meta"), contextlib.suppress(Exception):  # some read weights of their own to be built
                sizes[name] = sum(parameter.numel() for parameter in make(name).parameters())
        if sizes:
            least.append(f"{library}/{min(sizes, key=lambda name: (sizes[name], name))}")
    return sorted(least)

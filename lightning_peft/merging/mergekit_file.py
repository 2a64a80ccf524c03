"""Configurations of mergekit, read into arguments of :func:`lightning_peft.merge`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_peft.merging import mergekit_functions as functions
from lightning_peft.merging.errors import MergeError

_KEYS = ("merge_method", "models", "base_model", "parameters", "dtype", "out_dtype")
_PER_MODEL = ("weight", "density")


class _Method:
    """What a method of mergekit knows.

    Args:
        function: Does what it does.
        defaults: Its parameters for all models; ``int8_mask`` saves memory in mergekit and changes no number.
        per_model: Its parameters for each model.
        fixed: Further options of the function.
    """

    def __init__(
        self, function: Callable[..., Tensor], defaults: Mapping[str, Any], per_model: tuple[str, ...], **fixed: Any
    ) -> None:
        self.function, self.defaults, self.per_model, self.fixed = function, defaults, per_model, fixed


_OF_DELTAS = {"normalize": False, "lambda": 1.0, "int8_mask": False}
_DARE = {**_OF_DELTAS, "rescale": True}
_METHODS = {
    "linear": _Method(functions.linear, {"normalize": True}, ("weight",)),
    "task_arithmetic": _Method(functions.task_arithmetic, _OF_DELTAS, ("weight",)),
    "ties": _Method(functions.ties, {**_OF_DELTAS, "normalize": True, "rescale": False}, _PER_MODEL),
    "dare_ties": _Method(functions.dare, _DARE, _PER_MODEL, elect=True),
    "dare_linear": _Method(functions.dare, _DARE, _PER_MODEL, elect=False),
}


def read(path: str | Path) -> dict[str, Any]:
    """Read a configuration of mergekit.

    Its methods ``linear``, ``task_arithmetic``, ``ties``, ``dare_ties`` and ``dare_linear`` are known. In single precision the
    first three give mergekit's tensors, bit for bit where no two entries at the edge of a density are equal. ``dtype`` is that
    of the result; mergekit also computes in it, which in half precision rounds at every step.

    Args:
        path: The file. Folders in it are looked up from where the process runs, as mergekit does.

    Returns:
        Arguments of :func:`lightning_peft.merge`: ``merge(**read("config.yml"), out="merged")``.

    Raises:
        MergeError: The file is damaged, or says something that is not honoured here.
    """
    config = _mapping(path)
    refuse = partial(_refuse, path)
    for key in config:
        if key not in _KEYS:
            refuse(f"{key!r} is not read here{_WHY.get(key, '')}. It takes {', '.join(_KEYS)}.")
    name = str(config.get("merge_method"))
    if name not in _METHODS:
        refuse(f"the method {name!r} is not read here, but {', '.join(_METHODS)}.")
    base = _base(config, name, refuse)
    entries = _entries(config.get("models"), base, refuse)
    return {
        "models": [_folder(model, refuse) for model, _ in entries],
        "method": _METHODS[name].function,
        "base": None if base is None else _folder(base, refuse),
        "dtype": config.get("out_dtype", config.get("dtype")),
        **_options(name, config.get("parameters"), entries, refuse),
    }


def _base(config: Mapping[str, Any], name: str, refuse: Callable[[str], None]) -> str | None:
    """The model that differences are taken to; of ``linear``, none."""
    base = config.get("base_model")
    if not isinstance(base, (str, type(None))):
        refuse(f"base_model is {base!r}, no folder.")
    if name != "linear":
        if base is None:
            refuse(f"{name} merges differences to a base. Name it: base_model.")
        return base
    if base is not None and base not in [model for model, _ in _entries(config.get("models"), None, refuse)]:
        refuse("linear merges values, and base_model is none of the models. Leave it out, or list it among them.")
    return None


def _options(name: str, shared: Any, entries: list[tuple[str, Any]], refuse: Callable[[str], None]) -> dict[str, Any]:
    """The options of a method's function."""
    method = _METHODS[name]
    options: dict[str, Any] = dict(method.fixed)
    shared = _parameters(shared, (*method.defaults, *method.per_model), name, refuse)
    given = [_parameters(own, method.per_model, f"{name}, for one model,", refuse) for _, own in entries]
    for key in method.per_model:
        values = [own.get(key, shared.get(key, 1.0 if key == "density" else None)) for own in given]
        if None in values:
            refuse(f"{entries[values.index(None)][0]} has no {key}. Give it one, or one for all under parameters.")
        options[key] = tuple(float(value) for value in values)
    for key, default in method.defaults.items():
        if key != "int8_mask":
            options["lambda_" if key == "lambda" else key] = type(default)(shared.get(key, default))
    return options


_WHY = {
    "slices": ": layers of one model beside those of another are no merge of models that were trained from one start",
    "modules": ": models are merged whole",
    "tokenizer_source": ": models are merged with the vocabulary that they have",
    "tokenizer": ": models are merged with the vocabulary that they have",
    "chat_template": ": what is no tensor is the base's",
}


def _refuse(path: str | Path, why: str) -> None:
    raise MergeError(f"{path}: {why}")


def _mapping(path: str | Path) -> dict[str, Any]:
    import yaml

    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise MergeError(f"{path} is not YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(found, dict):
        raise MergeError(f"{path} is no configuration of mergekit: it has no merge_method and no models.")
    return found


def _entries(given: Any, base: Any, refuse: Callable[[str], None]) -> list[tuple[str, Any]]:
    """Models and their own parameters, without the base, which lists name for the reader."""
    found: list[tuple[str, Any]] = []
    for entry in given if isinstance(given, list) else ():
        if not isinstance(entry, dict) or not isinstance(entry.get("model"), str) or set(entry) - {"model", "parameters"}:
            refuse(f"{entry!r} among the models is none: each takes model, a folder, and parameters.")
        elif entry["model"] in [model for model, _ in found]:
            refuse(f"{entry['model']} is listed twice.")
        elif entry["model"] != base:
            found.append((entry["model"], entry.get("parameters")))
    if not found:
        refuse("there is no list of models to merge.")
    return found


def _parameters(given: Any, known: tuple[str, ...], owner: str, refuse: Callable[[str], None]) -> dict[str, Any]:
    if given is None:
        return {}
    if not isinstance(given, dict):
        refuse(f"parameters is {given!r}, no mapping.")
    for key, value in given.items():
        if key not in known:
            refuse(f"the parameter {key!r} says nothing to {owner} here. It takes {', '.join(known)}.")
        if isinstance(value, (list, dict)):
            refuse(f"the parameter {key!r} is a gradient or a filter, and here it is one number for all tensors.")
        flag = key in ("normalize", "rescale", "int8_mask")
        if not isinstance(value, (bool, int, float)) or (isinstance(value, bool) and not flag) or value != value:
            refuse(f"the parameter {key!r} is {value!r}, and takes {'true or false' if flag else 'a number'}.")
    return dict(given)


def _folder(name: str, refuse: Callable[[str], None]) -> Path:
    path = Path(name)
    if not path.is_dir():
        refuse(f"{name!r} is no folder here. Fetch the model, and name its folder; adapters (model+adapter) are folders too.")
    return path

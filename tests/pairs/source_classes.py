"""Classes out of the scripts and notebooks of other projects, without running what these scripts do."""

from __future__ import annotations

import ast
import contextlib
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

_DEFINES = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.If, ast.Try)
_FETCHES = ("download", "Trainer(", ".fit(", "= train_", "pretrained", "__main__", "argparse")


class Source(ModuleType):
    """What a file imports and defines at its top level, as attributes.

    A statement that fails (a package that is not there, data that are not at hand) is left out, as is all that downloads or
    trains: most such files are scripts that do so when they are run.

    Args:
        path: A Python file, which may use ``pytorch_lightning`` and ``gym``.
        given: Names that the file should find, in place of its own imports and definitions.
    """

    def __init__(self, path: Path, **given: Any) -> None:
        super().__init__(path.stem)
        sys.modules[path.stem] = self  # dataclasses, pickles and hyperparameters look their module up
        vars(self).update(__file__=str(path), __name__=path.stem, **given)
        text = (
            path.read_text()
            .replace("pytorch_lightning", "lightning.pytorch")
            .replace("import gym\n", "import gymnasium as gym\n")
        )
        for statement in ast.parse(text).body:
            words = ast.unparse(statement)
            scripted = not isinstance(statement, (ast.ClassDef, ast.FunctionDef)) and any(word in words for word in _FETCHES)
            if isinstance(statement, _DEFINES) and not scripted:
                with contextlib.suppress(Exception), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    exec(compile(ast.Module([statement], []), str(path), "exec"), vars(self))
                vars(self).update(given)

"""``python -c``, ``-m`` and scripts in processes that have imported torch and Lightning, which takes a new one many seconds.

What a test says about imports, or about ranks that order their sets differently, needs an interpreter of its own instead.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType

from lightning_peft.testing.processes import settle, start_process

OURS = {"lightning_peft", "lightning_peft_plugins", "lightning_peft_recipes"}


def python(
    *arguments: str, cwd: str | Path | None = None, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run ``python *arguments`` to its end, as ``subprocess.run`` does with ``capture_output`` and ``text``."""
    with tempfile.TemporaryDirectory() as folder:
        said = [Path(folder, name) for name in ("out", "err")]
        process = start(*arguments, cwd=cwd, env=env, said=said)
        process.join()
        out, err = (path.read_text(errors="replace") for path in said)
    return subprocess.CompletedProcess(arguments, process.exitcode or 0, out, err)


def start(
    *arguments: str, cwd: str | Path | None = None, env: Mapping[str, str] | None = None, said: list[Path] | None = None
) -> BaseProcess:
    """Start ``python *arguments``; its output goes to the two files, or nowhere."""
    files = [str(path) for path in said or [Path(os.devnull)] * 2]
    return start_process(_run, arguments, str(cwd or Path.cwd()), dict(os.environ if env is None else env), _own_path(), files)


@functools.cache
def _own_path() -> list[str]:
    """Where this interpreter looks for modules if nobody tells it more."""
    bare = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    code = "import json, sys; print(json.dumps(sys.path[1:]))"
    return json.loads(subprocess.check_output([sys.executable, "-c", code], env=bare, text=True))


def _run(arguments: tuple[str, ...], cwd: str, environment: dict[str, str], own_path: list[str], said: list[str]) -> None:
    settle(environment, *said)
    os.chdir(cwd)
    for name in [name for name in sys.modules if name.partition(".")[0] in OURS]:
        del sys.modules[name]  # the process may have a copy of its own
    added = [entry for entry in environment.get("PYTHONPATH", "").split(os.pathsep) if entry]
    first = {"-c": "", "-m": cwd, "-W": ""}.get(arguments[0], str(Path(arguments[0]).absolute().parent))
    sys.path[:] = [first, *added, *own_path]
    sys.path_importer_cache.clear()
    if arguments[0] == "-W":
        warnings.simplefilter(arguments[1])  # type: ignore[arg-type]
        arguments = arguments[2:]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        code = _exit_code(*arguments)
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _exit_code(kind: str, *arguments: str) -> int:
    try:
        if kind == "-c":
            sys.argv = ["-c", *arguments[1:]]
            exec(compile(arguments[0], "<string>", "exec"), sys.modules["__main__"].__dict__)
        elif kind == "-m":
            sys.argv = list(arguments)
            runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv = [kind, *arguments]
            runpy.run_path(kind, run_name="__main__")
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0

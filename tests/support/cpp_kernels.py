"""The C++ kernels of an Inductor graph compiled by one run of g++ and not by one each, and with -O1 for -O3.

Most of a run is the headers' templates, precompiled or not: a kernel takes 0.9 s, six in one file 1.1 s. A third is their
optimisation, which is not what is tested here. A kernel's code, other flags and Python binding stay Inductor's own; what the
installed wheel and the demo compile is as for users.

    python cpp_kernels.py SCRIPT [ARGUMENT ...]     runs a script so, for tests of another process
"""

from __future__ import annotations

import contextlib
import re
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

from torch._inductor import cpp_builder
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codecache import CodeCacheFuture, CppPythonBindingsCodeCache

_ENTRY = re.compile(r'extern "C"\s+void\s+kernel\(')
_INCLUDE = re.compile(r"^[ \t]*#include .*$", re.MULTILINE)


class _Together:
    """The kernels that one graph has asked for; the first whose result is wanted compiles all of them."""

    def __init__(self) -> None:
        self._sources: list[str] = []
        self._caches: list[type[CppPythonBindingsCodeCache]] = []
        self._modules: list[ModuleType] = []

    @property
    def is_compiled(self) -> bool:
        return bool(self._modules)

    def add(self, argtypes: list[str], source: str) -> Callable[[], Any]:
        """A kernel, renamed, in a namespace of its own with its binding; what is returned gives it compiled."""
        at = len(self._sources)
        name = f"kernel_{at}"
        cache = type(name, (CppPythonBindingsCodeCache,), {"entry_function": name})
        arguments = ", ".join(f"parse_arg<{kind.replace('const ', '')}>(args, {i})" for i, kind in enumerate(argtypes))
        binding = cache.suffix_template.format(
            arg_len=len(argtypes),
            call_entry_func=f"{name}({arguments}); Py_RETURN_NONE;",
            entry_func=name,
            extra_parse_arg="",
        )
        self._sources.append(_ENTRY.sub(f'extern "C" void {name}(', source) + binding)
        self._caches.append(cache)
        return lambda: getattr(self._loaded()[at], name)

    def _loaded(self) -> list[ModuleType]:
        if not self._modules:
            includes = dict.fromkeys(line for source in self._sources for line in _INCLUDE.findall(source))
            bodies = [f"namespace unit_{i} {{\n{_INCLUDE.sub('', text)}\n}}" for i, text in enumerate(self._sources)]
            first = self._caches[0].load("\n".join([*includes, *bodies]))
            rest = [cache._load_library_inner(first.__file__, first.key) for cache in self._caches[1:]]
            self._modules = [first, *rest]
        return self._modules


class _Later(CodeCacheFuture):
    def __init__(self, result: Callable[[], Any]) -> None:
        self._result = result

    def result(self, timeout: float | None = None) -> Any:
        return self._result()


@contextlib.contextmanager
def compiled_together() -> Iterator[None]:
    """Inside, a graph's C++ kernels wait for each other, and g++ optimises less."""
    wait, alone, flags = AsyncCompile.wait, AsyncCompile.cpp_pybinding, cpp_builder._get_optimization_cflags

    def fewer_flags(*args: Any, **options: Any) -> tuple[list[str], list[str]]:
        compiling, linking = flags(*args, **options)
        return ["O1" if flag == "O3" else flag for flag in compiling], linking

    def cpp_pybinding(self: AsyncCompile, argtypes: list[str], source: str) -> Any:
        if len(_ENTRY.findall(source)) != 1:
            return alone(self, argtypes, source)
        together = self.__dict__.get("kernels_together")
        if together is None or together.is_compiled:
            together = self.__dict__["kernels_together"] = _Together()
        return _Later(together.add(argtypes, source))

    def wait_for_ours(self: AsyncCompile, scope: dict[str, Any]) -> None:
        scope.update({name: value.result() for name, value in scope.items() if isinstance(value, _Later)})
        wait(self, scope)

    with (
        mock.patch.object(AsyncCompile, "cpp_pybinding", cpp_pybinding),
        mock.patch.object(AsyncCompile, "wait", wait_for_ours),
        mock.patch.object(cpp_builder, "_get_optimization_cflags", fewer_flags),
    ):
        yield


if __name__ == "__main__":
    del sys.argv[0]
    if not sys.flags.safe_path:  # a script finds its neighbours, not ours
        sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    with compiled_together():
        runpy.run_path(sys.argv[0], run_name="__main__")

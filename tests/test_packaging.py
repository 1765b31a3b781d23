"""What a user installs: the wheel, its imports, and which folder may know which."""

from __future__ import annotations

import ast
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import textwrap
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import parallax_compile as plx

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "parallax_compile"
FOLDERS = {
    PACKAGE: "parallax_compile",
    f"{PACKAGE}.lowering": "lowering",
    f"{PACKAGE}.lowering.mlir": "lowering/mlir",
    f"{PACKAGE}.templates": "templates",
}
DATA = {".jinja", ".json", ".typed"}

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="not about the interpreter")


def run(arguments: list[str | Path], cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [str(a) for a in arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, f"{arguments}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def run_python(code: str, cwd: Path, interpreter: str | Path = sys.executable, isolated: bool = False) -> str:
    # FX and AOTAutograd caches are off: what runs must be lowered by the package under test, not taken from a cache.
    flags = ["-I"] if isolated else []
    return run(
        [interpreter, *flags, "-c", textwrap.dedent(code)],
        cwd,
        TORCHINDUCTOR_FX_GRAPH_CACHE="0",
        TORCHINDUCTOR_AUTOGRAD_CACHE="0",
    )


# --- the wheel ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built offline, from a copy, so that no build/ or egg-info is left in the checkout."""
    # By metadata: to look for pip's module disables setuptools' distutils in this process, which Inductor's C++ builds import.
    installed = {distribution.name for distribution in importlib.metadata.distributions()}
    missing = sorted({"pip", "setuptools", "wheel"} - installed)
    if missing:
        pytest.skip(f"building a wheel needs {missing}")
    source = tmp_path_factory.mktemp("source")
    for folder in FOLDERS.values():
        shutil.copytree(
            ROOT / folder, source / folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    built = tmp_path_factory.mktemp("wheel")
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--quiet", "--wheel-dir", built]
    run([sys.executable, "-m", "pip", "wheel", *options, source], cwd=built)
    (found,) = built.glob("*.whl")
    return found


def test_wheel_holds_the_three_folders_and_nothing_else(wheel: Path) -> None:
    assert wheel.name == f"parallax_compile-{plx.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    found = {name for name in names if ".dist-info/" not in name}
    expected = {
        f"{package.replace('.', '/')}/{path.name}"
        for package, folder in FOLDERS.items()
        for path in (ROOT / folder).iterdir()
        if path.suffix == ".py" or path.suffix in DATA
    }
    assert found == expected
    assert {f"{PACKAGE}/py.typed", f"{PACKAGE}/templates/core_forward.py.jinja"} <= found
    assert f"{PACKAGE}/lowering/operator.py" in found
    assert any(name.endswith("LICENSE") for name in names)


def test_wheel_declares_ranges_and_the_backend(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        texts = {Path(n).name: archive.read(n).decode() for n in archive.namelist() if ".dist-info/" in n}
    needs = [
        line for line in re.findall(r"^Requires-Dist: (.*)$", texts["METADATA"], re.MULTILINE) if "extra ==" not in line
    ]
    assert sorted(re.split(r"[<>=; ]", need)[0] for need in needs) == [
        "click",
        "filelock",
        "platformdirs",
        "rich",
        "tabulate",
        "torch",
        "triton",
    ]
    (triton,) = (need for need in needs if need.startswith("triton"))
    assert re.search(r"platform_system == .Linux.", triton)
    assert not any("==" in need.split(";")[0] for need in needs), "the package declares ranges, constraints.txt pins"
    assert re.search(r"^parallax = parallax_compile\.compiler:backend$", texts["entry_points.txt"], re.MULTILINE)


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a fresh environment that holds the wheel and sees torch, but no editable install."""
    root = tmp_path_factory.mktemp("environment")
    venv.create(root, with_pip=False, symlinks=True)
    python = root / "bin" / "python"
    # A folder that a .pth file names is searched last, and .pth files in it are not read: so not the editable ones.
    (site,) = root.glob("lib/python*/site-packages")
    shared = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), str(Path(torch.__file__).parents[1])}
    (site / "shared.pth").write_text("\n".join(sorted(shared)) + "\n", encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "--quiet"]
    run([*pip, "--force-reinstall", "--ignore-installed", wheel], cwd=root)
    return python


COMPILED_CALLS = """
    import sys
    {before}
    import torch
    {import_package}

    torch.manual_seed(0)
    inputs = [torch.randn(1, 2, 40, 16, requires_grad=True) for _ in range(4)]

    def attend(q, k, v, r):
        import parallax_compile as plx
        return plx.attention(q, k, v, r, spec=plx.PARALLAX.replace(mask_mod=plx.masks.causal()))

    class Model(torch.nn.Module):
        def forward(self, q, k, v, r):
            return attend(q, k, v, r)

    def with_gradients(fn):
        out = fn(*inputs)
        return [out, *torch.autograd.grad(out.square().sum(), inputs)]

    want = with_gradients(attend)
    for compiled in ({compiled}):
        for found, expected in zip(with_gradients(compiled), want):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        torch.compiler.reset()
    import parallax_compile
    from parallax_compile import lowering, templates
    assert "parallax_compile.lowering.inductor" in sys.modules, "not lowered by this package"
    print(*(m.__file__ for m in (parallax_compile, lowering, templates)), sep="\\n")
"""


def compiled_calls(compiled: str, before: str = "", import_package: str = "import parallax_compile as plx") -> str:
    return COMPILED_CALLS.format(compiled=compiled, before=before, import_package=import_package)


def test_installed_wheel_compiles_and_runs_outside_of_the_checkout(installed: Path, tmp_path: Path) -> None:
    calls = compiled_calls('torch.compile(attend, fullgraph=True), torch.compile(Model(), backend="parallax")')
    files = run_python(calls, tmp_path, installed, isolated=True).split()[-3:]
    environment = installed.parents[1]
    assert [Path(f).is_relative_to(environment) for f in files] == [True] * 3, files


def test_the_command_is_installed_and_works_outside_of_the_checkout(installed: Path, tmp_path: Path) -> None:
    command = installed.parent / "parallax-compile"
    assert "PARALLAX" in json.loads(run([command, "family", "--json"], tmp_path))
    explained = json.loads(
        run([command, "explain", "LLA", "--shape", "1,2,256,64", "--mask", "causal", "--json"], tmp_path)
    )
    first = explained["stages"][0]
    assert (first["stage"], first["direction"]) == ("core_solve", "forward")
    (tmp_path / "mine.py").write_text("import parallax_compile as plx\nVARIANT = plx.SOFTMAX\n", encoding="utf-8")
    assert "SOFTMAX" in run([command, "explain", "mine:VARIANT", "--shape", "1,2,256,64"], tmp_path)
    assert run([command, "--version"], tmp_path).strip().endswith(plx.__version__)


def test_backend_is_found_by_its_entry_point_before_the_package_is_imported(installed: Path, tmp_path: Path) -> None:
    code = """
        import sys
        import torch
        assert "parallax" in torch.compiler.list_backends()
        assert "parallax_compile" not in sys.modules
        double = torch.compile(lambda x: x * 2, backend="parallax")
        assert double(torch.ones(3)).tolist() == [2.0] * 3
        assert "parallax_compile" in sys.modules
    """
    run_python(code, tmp_path, installed, isolated=True)


# --- imports --------------------------------------------------------------------------------------------------------


def test_without_triton_the_package_imports_and_compiles_on_cpu(tmp_path: Path) -> None:
    calls = compiled_calls("torch.compile(attend, fullgraph=True),", before='sys.modules["triton"] = None')
    run_python(calls, tmp_path)


def test_import_is_light(tmp_path: Path) -> None:
    # What the first compile needs (Dynamo, sympy, Inductor, triton), and what tables and plots need, waits for its first use.
    code = """
        import json, sys
        import torch
        import torch.nn.attention.flex_attention
        before = set(sys.modules)
        import parallax_compile
        import parallax_compile.compiler
        print(json.dumps(sorted(set(sys.modules) - before)))
    """
    loaded = json.loads(run_python(code, tmp_path).splitlines()[-1])
    heavy = (
        "torch._dynamo", "torch._inductor", "sympy", "triton", "jinja2", "torch_mlir", "iree",
        "matplotlib", "transformers", "click", "rich", "tabulate",
    )  # fmt: skip
    assert [m for m in loaded if any(m == h or m.startswith(f"{h}.") for h in heavy)] == []


@pytest.mark.parametrize("first", ["torch._dynamo", "parallax_compile"])
def test_dynamo_knows_our_operators_whichever_is_imported_first(first: str, tmp_path: Path) -> None:
    code = f"""
        import importlib.util, torch
        importlib.import_module({first!r})
        import parallax_compile as plx
        assert importlib.util.find_spec("torch._dynamo").name == "torch._dynamo"  # who only looks does not import

        @torch.compile(fullgraph=True, backend="eager")
        def attend(x, score_mod=None):
            return plx.attention(x, x, x, spec=plx.SOFTMAX, score_mod=score_mod)

        x = torch.randn(1, 1, 4, 8)
        torch.testing.assert_close(attend(x), torch.nn.functional.scaled_dot_product_attention(x, x, x))
        try:
            attend(x, lambda score: score)
        except plx.errors.InputTypeError as error:
            print("refused:", error)
    """
    assert "refused: score_mod must take" in run_python(code, tmp_path)


# --- which folder may know which ------------------------------------------------------------------------------------

LEAVES = {f"{PACKAGE}.{name}" for name in ("spec", "errors", "reference", "version")}
PRIVATE = tuple(f"torch.{name}" for name in ("_inductor", "_dynamo", "_higher_order_ops", "_functorch", "_subclasses"))
FENCE = {
    f"{PACKAGE}.lowering.torch_compat_{part}"
    for part in ("calls", "codegen", "dynamo", "errors", "inductor", "inlining", "launch", "operator")
}


MODULES = [
    (package if path.stem == "__init__" else f"{package}.{path.stem}", path)
    for package, folder in FOLDERS.items()
    for path in sorted((ROOT / folder).glob("*.py"))
]


def is_within(name: str, *parents: str) -> bool:
    return any(name == parent or name.startswith(f"{parent}.") for parent in parents)


def without_type_checking(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node that can run: the bodies of ``if TYPE_CHECKING`` are left out."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for statement in child.orelse:
                yield statement
                yield from without_type_checking(statement)
        else:
            yield child
            yield from without_type_checking(child)


def uses(module: str, path: Path) -> set[str]:
    """Absolute names of what a module imports or reaches as an attribute of torch, functions included."""
    found: set[str] = set()
    package = module if path.stem == "__init__" else module.rpartition(".")[0]
    for node in without_type_checking(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            up = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*up, *([node.module] if node.module else [])])
            found.update(f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch._"):
            found.add(ast.unparse(node))
    return found


def test_the_walk_over_imports_sees_relative_lazy_and_attribute_uses(tmp_path: Path) -> None:
    path = tmp_path / "some.py"
    path.write_text(
        "from typing import TYPE_CHECKING\nimport torch\nfrom .. import templates\nfrom ..errors import InputError\n"
        "from . import plan\nif TYPE_CHECKING:\n    from ..attention import attention\n"
        "def f():\n    from torch._inductor import ir\n    torch._dynamo.reset()\n",
        encoding="utf-8",
    )
    assert uses(f"{PACKAGE}.lowering.some", path) == {
        "typing.TYPE_CHECKING",
        "torch",
        f"{PACKAGE}.templates",
        f"{PACKAGE}.errors.InputError",
        f"{PACKAGE}.lowering.plan",
        "torch._inductor.ir",
        "torch._dynamo",
        "torch._dynamo.reset",
    }


@pytest.mark.parametrize("module, path", MODULES, ids=lambda x: x if isinstance(x, str) else "")
def test_imports_point_one_way(module: str, path: Path) -> None:
    used = uses(module, path)
    ours = {name for name in used if is_within(name, PACKAGE)}
    if is_within(module, f"{PACKAGE}.templates"):
        wrong = {name for name in used if is_within(name, PACKAGE, "torch")}
    elif is_within(module, f"{PACKAGE}.lowering"):
        allowed = (f"{PACKAGE}.lowering", f"{PACKAGE}.templates", *LEAVES)
        wrong = {name for name in ours if not is_within(name, *allowed)}
    elif module in LEAVES:
        wrong = ours
    else:
        wrong = {name for name in ours if is_within(name, f"{PACKAGE}.templates")}
    assert wrong == set()


@pytest.mark.parametrize("module, path", MODULES, ids=lambda x: x if isinstance(x, str) else "")
def test_private_torch_modules_are_touched_inside_the_fence_only(module: str, path: Path) -> None:
    if module not in FENCE:
        assert {name for name in uses(module, path) if is_within(name, *PRIVATE)} == set()


# --- the files around it --------------------------------------------------------------------------------------------


def test_one_version_everywhere() -> None:
    declared = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    cited = re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    assert declared is not None and cited is not None
    assert plx.__version__ == declared[1] == cited[1]
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # run from links (make VENV=)
        assert importlib.metadata.version("parallax-compile") == plx.__version__


def test_citation_names_the_two_papers() -> None:
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert "arXiv:2605.29157" in citation and "arXiv:2510.01450" in citation


def test_ci_runs_what_a_developer_runs() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "make test" in script.read_text(encoding="utf-8").splitlines()


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("target", ["demo", "test"])
def test_make_without_an_environment_installs_nothing(target: str) -> None:
    planned = run(["make", "-n", target, "VENV=", "PYTHON=python3"], cwd=ROOT)
    assert "pip" not in re.findall(r"[\w.-]+", planned)
    assert "venv" not in planned

"""The house rules, held by a test: import arrows, purpose lines, file sizes, no stray environment reads, no pickle.

TigerBeetle's `tidy` in Python: the source is parsed with `ast`, nothing is imported.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {
    "switchgear_runtime": ROOT / "runtime" / "switchgear_runtime",
    "switchgear": ROOT / "cluster" / "switchgear",
    "switchgear_bench": ROOT / "bench" / "switchgear_bench",
}
FILE_LINES_MAX = 400
TORCH_FREE = {
    "sequence",
    "batch",
    "block_manager",
    "scheduler",
    "inbox",
    "header",
    "generation",
    "messages",
    "config",
    "sampling_params",
    "errors",
    "weight_format",
    "packing",
    "system",
    "env",
    "link",
    "link_store",
}
LEAVES = {"errors", "env", "config", "system", "weight_format"}  # import nothing of ours but each other
# Lower may not import higher. Names are the modules (or subpackages) of switchgear_runtime.
LAYERS = [
    "native",
    "ops_reference",
    "ops",
    "comm",
    "moe",
    "model",
    "cuda",
    "backends",
    "launched_step",
    "model_runner",
    "migration",
    "engine",
    "rank_worker",
]
THE_RUNTIMES_PUBLIC_NAMES = {
    "config",
    "env",
    "errors",
    "generation",
    "header",
    "messages",
    "sampling_params",
    "system",
    "link",
    "inbox",
    "ops",
    "rank_worker",
    "parent_death",
    "model.footprint",
    "model.spec",
    "moe.expert_map",
    "placement",
    "moe.forced_routing",
    "moe.load_window",
    "moe.model_versions",
    "moe.routing_trace",
    "moe.token_log",
    "moe.rehome",
    "comm.rendezvous",
    "comm.shm",
    "cuda.facts",
    "cuda.device_footprint",
    "cuda.preflight",
    "cuda.report",
}


def python_files() -> Iterator[tuple[str, str, Path]]:
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            module = ".".join(path.relative_to(folder).with_suffix("").parts).removesuffix(".__init__")
            yield package, "" if module == "__init__" else module, path


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(dotted module, whether it runs at import time) of every import in the file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    lazy: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        ):
            lazy.update(ast.walk(node))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node not in lazy
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            yield node.module, node not in lazy
            for alias in node.names:
                yield f"{node.module}.{alias.name}", node not in lazy


def first_part(module: str) -> str:
    return module.split(".")[0]


def test_arrows_between_packages_point_one_way() -> None:
    order = ["switchgear_runtime", "switchgear", "switchgear_bench"]
    for package, _, path in python_files():
        for module, _ in imports(path):
            if first_part(module) in order:
                assert order.index(first_part(module)) <= order.index(package), f"{path} imports {module}"


def test_runtime_layers() -> None:
    for package, name, path in python_files():
        if package != "switchgear_runtime" or not name or first_part(name) not in LAYERS:
            continue
        for module, _ in imports(path):
            if module.startswith("switchgear_runtime."):
                target = module.split(".")[1]
                if target in LAYERS:
                    assert LAYERS.index(target) <= LAYERS.index(first_part(name)), f"{path} imports {module}: upward"


def test_policy_needs_no_torch() -> None:
    for package, name, path in python_files():
        if package == "switchgear_runtime" and name in TORCH_FREE:
            for module, _ in imports(path):
                assert first_part(module) not in {"torch", "numpy"}, f"{path} imports {module}"
                if name in LEAVES and module.startswith("switchgear_runtime."):
                    assert module.split(".")[1] in LEAVES, f"{path} imports {module}"


def test_runtime_knows_neither_ray_nor_http() -> None:
    for package, _, path in python_files():
        if package == "switchgear_runtime":
            for module, _ in imports(path):
                assert first_part(module) not in {"ray", "starlette", "uvicorn", "httpx", "transformers"}, (
                    f"{path} imports {module}"
                )


def test_cluster_uses_public_runtime_names_only() -> None:
    for package, _, path in python_files():
        if package == "switchgear":
            for module, _ in imports(path):
                if module.startswith("switchgear_runtime."):
                    name = module.removeprefix("switchgear_runtime.")
                    assert any(
                        name == public or name.startswith(public + ".") for public in THE_RUNTIMES_PUBLIC_NAMES
                    ) or any(public.startswith(name + ".") for public in THE_RUNTIMES_PUBLIC_NAMES), (
                        f"{path} imports {module}"
                    )


def test_every_module_says_its_purpose() -> None:
    for _, _, path in python_files():
        doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        assert doc and len(doc.splitlines()[0]) >= 15, f"{path} has no one-line purpose"
        assert doc.splitlines()[0].rstrip().endswith((".", ":", "?")), f"{path}: the purpose is not one line"


@pytest.mark.parametrize("suffixes", [(".py",), (".cpp", ".h", ".cu", ".cuh")])
def test_files_stay_small(suffixes: tuple[str, ...]) -> None:
    folders = [*PACKAGES.values(), ROOT / "csrc"]
    for folder in folders:
        for path in folder.rglob("*"):
            if path.suffix in suffixes:
                num_lines = len(path.read_text(encoding="utf-8").splitlines())
                assert num_lines <= FILE_LINES_MAX, f"{path} has {num_lines} lines"


def test_environment_is_read_in_one_file() -> None:
    for package, name, path in python_files():
        if (package, name) == ("switchgear_runtime", "env"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os":
                assert node.attr not in {"environ", "getenv", "putenv"}, f"{path}:{node.lineno} reads the environment"


def test_no_pickle_and_no_silent_except() -> None:
    for _, _, path in python_files():
        for module, _ in imports(path):
            assert first_part(module) not in {"pickle", "cloudpickle", "dill", "marshal"}, f"{path} imports {module}"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ExceptHandler):
                assert node.type is not None, f"{path}:{node.lineno} bare except"
                broad = isinstance(node.type, ast.Name) and node.type.id in {"Exception", "BaseException"}
                silent = all(isinstance(statement, ast.Pass) for statement in node.body)
                assert not (broad and silent), f"{path}:{node.lineno} swallows every error"


def test_no_unfinished_marks_and_no_private_paths() -> None:
    marks = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b|/work/|\.\./shared")
    suffixes = {".py", ".cpp", ".h", ".cu", ".md", ".toml"}
    for folder in (*PACKAGES.values(), ROOT / "csrc", ROOT / "docs", ROOT / "examples"):
        for path in folder.rglob("*"):
            if path.suffix in suffixes:
                for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                    assert not marks.search(line), f"{path}:{number}: {line.strip()}"


def test_importing_the_client_is_light() -> None:
    """`from switchgear import Client` loads neither torch nor ray: a client machine has no use for them."""
    import subprocess

    code = "import sys; from switchgear import Client; print([m for m in ('torch', 'ray', 'transformers') if m in sys.modules])"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert output.stdout.strip() == "[]"


def test_config_docs_are_current() -> None:
    from switchgear.flags import config_markdown

    assert (ROOT / "docs" / "CONFIG.md").read_text(encoding="utf-8").rstrip() == config_markdown().rstrip(), (
        "run `make docs`"
    )

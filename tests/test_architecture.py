"""The rules of the house, held by a machine: who imports whom, how long things are, what is never used."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import moesaic

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "moesaic"
FILES = sorted(SOURCE.rglob("*.py"))
MOST_LINES, MOST_FUNCTION_LINES = 400, 80

BASE = {"errors", "files", "routing", "machine", "config", "losses", "native"}
# A module, or the package that it is in, to the modules and packages of moesaic that it may import.
MAY_IMPORT: dict[str, set[str]] = {
    **dict.fromkeys(BASE, BASE),
    "model": {*BASE, "model"},
    "data": {"config", "errors", "files", "data"},
    "generate": {*BASE, "model"},
    "offload": {*BASE, "model", "offload"},
    "weights": {*BASE, "model", "offload", "data.tokenizers", "weights"},
    "lm": {*BASE, "model", "data", "generate", "offload", "weights"},
    "merge": {*BASE, "model", "data", "weights", "merge"},
    "terminal": {"errors", "train"},  # the type of a report
    "chat": {*BASE, "data", "lm"},
    "export": {*BASE, "model", "data", "lm", "offload", "weights"},
    "analysis": {*BASE, "model", "data", "generate", "offload", "weights", "lm", "analysis"},
    "train": {
        *BASE,
        "chat",
        "terminal",
        "model",
        "data",
        "generate",
        "offload",
        "weights",
        "lm",
        "export",
        "merge",
        "analysis",
        "train",
    },
    "serve": {*BASE, "model", "data", "generate", "offload", "weights", "lm", "analysis", "serve"},
    "cli": {
        *BASE,
        "chat",
        "terminal",
        "model",
        "data",
        "generate",
        "offload",
        "weights",
        "lm",
        "export",
        "merge",
        "analysis",
        "train",
        "serve",
        "cli",
    },
    "": {"analysis", "export", "lm", "machine", "routing", "train"},  # the package itself hands names on
}


def name_of(path: Path) -> str:
    """src/moesaic/model/moe.py to model.moe, and a package's __init__.py to the package."""
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix("__init__").rstrip(".")


MODULES = {name_of(path): ast.parse(path.read_text(encoding="utf-8"), str(path)) for path in FILES}


def imports(name: str) -> Iterator[str]:
    """Modules of moesaic that ``name`` imports anywhere: in functions and under TYPE_CHECKING too."""
    for node in ast.walk(MODULES[name]):
        if isinstance(node, ast.Import):
            wanted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: line {node.lineno} is a relative import"
            wanted = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for full in wanted:
            package, _, rest = full.partition(".")
            if package != "moesaic":
                continue
            # "from moesaic.model.moe import MoE" names the module model.moe, not model.moe.MoE.
            while rest not in MODULES:
                rest = rest.rpartition(".")[0]
            yield rest


def owner(name: str) -> str:
    """The row of the table for a module."""
    return name.partition(".")[0]


def allowed(importer: str, imported: str) -> bool:
    rights = MAY_IMPORT[owner(importer)]
    return any(imported == right or imported.startswith(f"{right}.") for right in rights)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_module_imports_only_what_its_row_allows(name: str) -> None:
    assert owner(name) in MAY_IMPORT, f"{name} has no row in the table"
    refused = sorted({other for other in imports(name) if not allowed(name, other)})
    assert refused == []


def test_the_table_refuses_what_it_should() -> None:
    assert not allowed("model.moe", "train.loop")
    assert not allowed("weights.merge", "data.corpora")
    assert allowed("weights.merge", "data.tokenizers")
    assert not allowed("data.corpora", "model.config")
    assert not allowed("serve.server", "train.loop")
    assert not any(allowed(name, "cli") for name in MODULES if name and owner(name) != "cli")


def test_no_module_reaches_itself() -> None:
    graph = {name: {other for other in imports(name) if other != name} for name in MODULES}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path, name])
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*path, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())


def test_the_model_knows_no_process_group() -> None:
    for path in (SOURCE / "model").glob("*.py"):
        assert "torch.distributed" not in path.read_text(encoding="utf-8"), path.name


def test_files_and_functions_are_short() -> None:
    too_long = {
        str(path.relative_to(ROOT)): count
        for folder in ("src", "tests", "benchmarks")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if (count := len(path.read_text(encoding="utf-8").splitlines())) > MOST_LINES
    }
    for name, tree in MODULES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > MOST_FUNCTION_LINES:
                    too_long[f"{name}.{node.name}"] = length
    assert too_long == {}


def test_a_file_is_named_after_its_concept() -> None:
    vague = {"utils", "util", "common", "helpers", "helper", "misc"}
    found = [p for folder in (SOURCE, ROOT / "tests") for p in folder.rglob("*") if p.stem in vague]
    assert found == []


def test_help_needs_no_torch() -> None:
    script = (
        "import sys\n"
        "from moesaic.cli import app\n"
        "for words in (['--help'], ['train', '--help'], ['recipes', '--help']):\n"
        "    app(words, standalone_mode=False)\n"
        "heavy = {'torch', 'numpy', 'matplotlib', 'transformers'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout


def test_nothing_unsafe_is_ever_read() -> None:
    for name, tree in MODULES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                assert not {"pickle", "cPickle", "dill", "marshal", "shelve"} & set(names), name
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) != ("torch", "load"), f"{name}: line {node.lineno}"
            if isinstance(node, ast.keyword):
                assert node.arg not in ("trust_remote_code", "allow_pickle"), name
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("eval", "exec"), f"{name}: line {node.lineno}"


def test_no_path_of_one_machine_is_written_down() -> None:
    machine = re.compile(r"""["'\s(=](/(home|Users|work|root|mnt|media|srv|tmp|workspace)/|[A-Z]:\\)""")
    for folder in ("src", "tests", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.*")):
            if path.suffix in (".py", ".toml") and path != Path(__file__):
                found = machine.search(path.read_text(encoding="utf-8"))
                assert found is None, f"{path.relative_to(ROOT)}: {found and found[0]!r}"


def test_public_names_are_sorted_and_there() -> None:
    assert list(moesaic.__all__) == sorted(moesaic.__all__)
    assert dir(moesaic) == list(moesaic.__all__)
    for name in moesaic.__all__:
        value = getattr(moesaic, name)
        assert value.__doc__, name
        assert value.__name__ == name
    with pytest.raises(AttributeError, match="no_such_name"):
        moesaic.no_such_name  # noqa: B018


# Methods whose contract stands at the class that declares them.
INHERITED = {"forward", "backward", "route", "after_step", "parameters", "log", "close", "step"}


def unexplained(tree: ast.AST, prefix: str) -> Iterator[str]:
    """Public functions and classes without a docstring, and such methods of more than a few lines."""
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        if node.name.startswith("_"):
            continue
        name = f"{prefix}.{node.name}"
        if isinstance(node, ast.ClassDef):
            yield from unexplained(node, name)
        statements = sum(isinstance(inner, ast.stmt) for inner in ast.walk(node)) - 1
        small = isinstance(tree, ast.ClassDef) and (statements <= 4 or node.name in INHERITED)
        if ast.get_docstring(node) is None and not small:
            yield name


@pytest.mark.parametrize("name", sorted(name for name, tree in MODULES.items() if tree.body))
def test_what_is_public_is_explained(name: str) -> None:
    assert ast.get_docstring(MODULES[name]), f"{name} has no docstring"
    assert list(unexplained(MODULES[name], name)) == []

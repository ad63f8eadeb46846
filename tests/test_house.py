"""The laws of the house that linters do not know. Each reads the sources, and names every place that breaks it.

What the import contracts, ruff and mypy hold is not repeated here.
"""

import ast
import re
import subprocess
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from pydantic import SecretStr
from pydantic.fields import FieldInfo

from headgate.gateway.settings import BUILT_IN_TIERS, TierSection, setting_fields
from headgate.telemetry.log_line import LogLine

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "headgate"
MODULES = sorted(PACKAGE.rglob("*.py"))
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

FILE_LINES_MAX = 1000
BANNED_WORDS = {"util", "utils", "helper", "helpers", "manager", "managers", "v2"}

WITHOUT_OWN_TEST = {
    "__init__.py": "the version",
    "__main__.py": "two lines; tests/cli starts it",
    "cli/family.py": "three lines that every command's test runs",
    "cli/settings.py": "one line that tests/cli/test_up.py runs",
    "cli/simulator.py": "hands over to the simulator's own program; tests/cli/test_up.py starts it",
    "cli/stores.py": "its refusals are in the tests of the commands that open a store",
    "cli/welcome.py": "tests/cli/test_up.py pastes what it prints",
    "gateway/": "tests/system asks it over sockets, by what it does; the server also by itself",
    "policy/records.py": "records without behaviour",
    "simulator/": "tests/simulator asks it over HTTP, by what it does: it is a program of its own",
    "storage/interfaces.py": "protocols; their adapters are tested",
    "storage/migrations/": "tests/storage/test_migrations.py runs all of them",
    "storage/tables.py": "tests/storage/test_migrations.py compares it with the migrations",
}
"""Modules, or folders ending in `/`, that have no test module of their own, and why that is right."""

# Built from pieces of patterns, so that this file does not break its own law.
MACHINE_TRACES = re.compile(
    r"(?<![\w.~-])/(?:work|root|home)/\w|/opt/(?:pypi|wheels)|pypi\.(?:org|python)|pythonhosted\.|registry\.npmjs|"
    r"^--(?:extra-)?index-url|^--find-links",
    re.MULTILINE,
)


@cache
def tree(module: Path) -> ast.Module:
    """A module, parsed."""
    return ast.parse(module.read_text(), filename=str(module))


def walk(module: Path) -> Iterator[ast.AST]:
    """Every node of a module."""
    return ast.walk(tree(module))


def place(module: Path, node: ast.AST) -> str:
    """`gateway/server.py:12`, to be clicked on."""
    return f"{module.relative_to(PACKAGE)}:{getattr(node, 'lineno', 1)}"


def table_names(document: Path) -> list[str]:
    """What stands in backquotes in the first column of a document's tables."""
    return re.findall(r"^\| `([^`]+)` \|", document.read_text(), re.MULTILINE)


def test_the_environment_is_read_only_in_settings() -> None:
    names = {"environ", "environb", "getenv", "getenvb", "putenv"}
    broken = [
        place(module, node)
        for module in MODULES
        if module.name != "settings.py"
        for node in walk(module)
        if (isinstance(node, ast.Attribute) and node.attr in names and ast.unparse(node.value) == "os")
        or (isinstance(node, ast.ImportFrom) and node.module == "os" and names & {alias.name for alias in node.names})
    ]
    assert broken == []


def test_no_import_stands_inside_a_function() -> None:
    broken = [
        place(module, inner)
        for module in MODULES
        for node in walk(module)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for inner in ast.walk(node)
        if isinstance(inner, ast.Import | ast.ImportFrom)
    ]
    assert broken == []


def test_modules_are_imported_by_name_in_one_place_only() -> None:
    # The command line imports the one command that was asked for; anywhere else it would hide an import from the
    # contracts.
    places = {
        module.relative_to(PACKAGE).as_posix()
        for module in MODULES
        for node in walk(module)
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in {"importlib.import_module", "import_module", "__import__"}
    }
    assert places <= {"cli/__init__.py"}


def test_no_record_has_a_field_for_anything() -> None:
    anything = re.compile(r"\b(?:dict|Dict|Mapping|MutableMapping)\[[^\[\]]*\b(?:Any|object)\]|^dict$")
    broken = [
        place(module, field)
        for module in MODULES
        for node in walk(module)
        if isinstance(node, ast.ClassDef)
        for field in node.body
        if isinstance(field, ast.AnnAssign) and anything.search(ast.unparse(field.annotation))
    ]
    assert broken == []


def test_every_task_has_an_owner() -> None:
    """A task that nobody holds is collected while it runs. Its owner is a group, or an object that keeps it."""

    def starts_a_task(node: ast.AST) -> bool:
        return isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in {
            "create_task",
            "ensure_future",
        }

    def is_kept(node: ast.AST) -> bool:
        return isinstance(node, ast.Assign) and all(isinstance(target, ast.Attribute) for target in node.targets)

    broken = []
    for module in MODULES:
        if module.name == "tasks.py":  # the owner of the others
            continue
        kept = {node.value for node in walk(module) if is_kept(node)}
        broken += [
            place(module, node)
            for node in walk(module)
            if starts_a_task(node) and node not in kept and not ast.unparse(node.func).startswith("group.")
        ]
    assert broken == []


def test_every_folder_is_a_package() -> None:
    """The import contracts do not see a folder without `__init__.py`: a clock in it would pass."""
    folders = {folder for module in MODULES for folder in module.parents if folder.is_relative_to(PACKAGE)}
    assert [str(folder) for folder in sorted(folders) if not (folder / "__init__.py").is_file()] == []


def test_every_module_says_what_it_is() -> None:
    scripts = [ROOT / "up", ROOT / "check", ROOT / "bootstrap.py"]
    modules = [*MODULES, *scripts, *(ROOT / "tests").rglob("*.py"), *(ROOT / "bench").rglob("*.py")]
    silent = [str(module.relative_to(ROOT)) for module in modules if not ast.get_docstring(tree(module))]
    assert silent == []


def test_every_module_has_a_test_module_or_a_reason() -> None:
    def excused(name: str) -> bool:
        return any(name == entry or (entry.endswith("/") and name.startswith(entry)) for entry in WITHOUT_OWN_TEST)

    names = [module.relative_to(PACKAGE) for module in MODULES]
    untested = [
        str(name)
        for name in names
        if not (name.name == "__init__.py" and only_a_docstring(PACKAGE / name))
        and not excused(name.as_posix())
        and not (ROOT / "tests" / name.parent / f"test_{name.stem.strip('_')}.py").is_file()
    ]
    assert untested == []


def only_a_docstring(module: Path) -> bool:
    """Whether a module does nothing."""
    return len(tree(module).body) <= 1


def test_every_excuse_from_a_test_module_is_still_needed() -> None:
    assert [entry for entry in WITHOUT_OWN_TEST if not (PACKAGE / entry).exists()] == []


def test_names_are_nouns_of_the_trade() -> None:
    def words(name: str) -> set[str]:
        return set(re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().split("_"))

    named = [
        (str(module.relative_to(ROOT)), part)
        for module in MODULES
        for part in module.relative_to(PACKAGE).with_suffix("").parts
    ]
    named += [
        (place(module, node), node.name)
        for module in MODULES
        for node in walk(module)
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    assert [(where, name) for where, name in named if words(name) & BANNED_WORDS] == []


def test_no_file_is_longer_than_a_reader_can_hold() -> None:
    lines = {str(module.relative_to(ROOT)): module.read_text().count("\n") for module in MODULES}
    assert {name: count for name, count in lines.items() if count > FILE_LINES_MAX} == {}


def requirements(*, dev: bool) -> list[Requirement]:
    """The direct dependencies as pyproject states them."""
    project = PYPROJECT["project"]
    texts = list(project["dependencies"])
    if dev:
        texts += [text for extra in project["optional-dependencies"].values() for text in extra]
        texts += PYPROJECT["build-system"]["requires"]
    return [Requirement(text) for text in texts]


def locked(name: str) -> dict[str, str]:
    """Package to version, as a lock file states them."""
    pins = re.findall(r"^([a-z0-9-]+)==([^ ]+)", (ROOT / name).read_text(), re.MULTILINE)
    return dict(pins)


def test_every_direct_dependency_has_its_reason() -> None:
    reasons = table_names(ROOT / "docs" / "decisions" / "0001-dependencies.md")
    assert sorted(reasons) == sorted(requirement.name for requirement in requirements(dev=True))


@pytest.mark.parametrize(("lock", "dev"), [("requirements.lock", False), ("requirements-dev.lock", True)])
def test_the_locks_satisfy_what_pyproject_asks(lock: str, dev: bool) -> None:
    pins = locked(lock)
    broken = [
        str(requirement)
        for requirement in requirements(dev=dev)
        if not requirement.specifier.contains(pins.get(canonicalize_name(requirement.name), "0"))
    ]
    assert broken == []


def test_checks_run_on_the_versions_that_ship() -> None:
    assert locked("requirements.lock").items() <= locked("requirements-dev.lock").items()


def test_nothing_of_a_machine_or_an_index_is_in_the_repository() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: what belongs to the repository is not known")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    broken = []
    for name in listed.split("\0"):
        path = ROOT / name
        if not path.is_file():
            continue
        text = path.read_bytes().decode(errors="replace")
        broken += [f"{name}: {match.group()!r}" for match in MACHINE_TRACES.finditer(text)]
    assert broken == []


def test_lock_files_hold_versions_and_hashes_and_no_address() -> None:
    allowed = re.compile(r"^[a-z0-9-]+==\S+(?: ; [^\\]+)? \\$|^    --hash=sha256:[0-9a-f]{64}(?: \\)?$")
    broken = [
        f"{lock.name}: {line}"
        for lock in ROOT.glob("requirements*.lock")
        for line in lock.read_text().splitlines()
        if not allowed.match(line)
    ]
    assert broken == []


def test_every_setting_is_documented_with_its_default() -> None:
    def shown(default: object) -> str:
        if isinstance(default, bool):
            return str(default).lower()
        return f"{default:g}" if isinstance(default, float) else str(default)

    def default_of(field: FieldInfo) -> object:
        if isinstance(field.default, SecretStr):
            return field.default.get_secret_value()
        # What must be given and what is chosen by its owner has no default, nor has what may be left out.
        return "" if field.is_required() or field.default is None or field.default in ({}, ()) else field.default

    document = (ROOT / "docs" / "settings.md").read_text()
    rows = re.findall(r"^\| `([^`]+)` \| (?:`([^`]+)`|–) \|", document, re.MULTILINE)
    assert len({name for name, _ in rows}) == len(rows)
    assert dict(rows) == {name: shown(default_of(field)) for name, field in setting_fields().items()}
    # The tiers that are built in have a table of their own, with every column in which any of them differs.
    header, *tiers = (
        [cell.strip().replace("–", "") for cell in line.strip("| ").split("|")]
        for line in re.findall(r"^\| (?:tier|free|paid|premium|batch) \|.*$", document, re.MULTILINE)
    )
    assert [
        [name, *(shown(getattr(tier, key)) for key in header[1:])] for name, tier in BUILT_IN_TIERS.items()
    ] == tiers
    others = set(TierSection.model_fields) - set(header)
    assert all(getattr(tier, key) == getattr(TierSection(), key) for tier in BUILT_IN_TIERS.values() for key in others)


def test_every_field_of_the_log_line_is_documented_in_its_order() -> None:
    assert table_names(ROOT / "docs" / "log-fields.md") == list(LogLine.__struct_fields__)

"""What is shipped: the wheel, built as a release is, without a network."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from headgate import __version__

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A freshly built wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (found,) = folder.iterdir()
    return found


def test_the_wheel_holds_every_file_of_the_package(wheel: Path) -> None:
    files = {
        path.relative_to(ROOT / "src").as_posix()
        for path in (ROOT / "src" / "headgate").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    shipped = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert shipped == files


def test_the_wheel_runs_by_itself(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    environment = {"PYTHONPATH": str(tmp_path), "HEADGATE_DATA_DIR": str(tmp_path / "data")}
    # Data files are read from inside the package: the catalogue of models, and a database's migrations.
    catalog = "import headgate.wire.catalog as c; c.packaged(); print(c.__file__)"
    for arguments, answer in (
        (["-c", catalog], str(tmp_path / "headgate")),
        (["-m", "headgate", "--version"], __version__),
        (["-m", "headgate", "db", "migrate"], "Made the database"),
    ):
        done = subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert answer in done.stdout

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = {str(path.relative_to(ROOT / "bpf")) for path in (ROOT / "bpf").rglob("*") if path.is_file()}


def run(*command: str | Path, cwd: Path) -> str:
    """Standard output of a command that must succeed."""
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the source archive, and the wheel built from that archive."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    return out


def wheel_of(built: Path) -> Path:
    [wheel] = built.glob("*.whl")
    return wheel


@pytest.mark.slow
def test_the_wheel_carries_the_kernel_sources_and_licences(built: Path) -> None:
    with zipfile.ZipFile(wheel_of(built)) as archive:
        names = archive.namelist()
        for source in SOURCES:
            assert archive.read(f"edge/_bpf/{source}") == (ROOT / "bpf" / source).read_bytes()
    assert {Path(name).parts[0] for name in names} == {"edge", wheel_of(built).name.rsplit("-", 3)[0] + ".dist-info"}
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert any(name.endswith(".dist-info/licenses/bpf/LICENSE") for name in names)


@pytest.mark.slow
def test_the_source_archive_is_a_whole_checkout(built: Path) -> None:
    [archive] = built.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        inside = {Path(*Path(name).parts[1:]) for name in tar.getnames()}
    for part in ("Makefile", "README.md", "bpf/abi.h", "tests/tools/setup.sh", "ansible/site.yml", ".ci/run"):
        assert Path(part) in inside
    assert not any(path.parts[:1] == (".venv",) for path in inside)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_an_installed_edge_needs_no_checkout(built: Path, tmp_path: Path) -> None:
    run("/usr/bin/python3", "-m", "venv", "--system-site-packages", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", wheel_of(built), cwd=tmp_path)
    version = wheel_of(built).name.split("-")[1]
    assert version in run(tmp_path / "venv" / "bin" / "edge", "version", cwd=tmp_path)
    assert run(tmp_path / "venv" / "bin" / "edge", "check-config", "--print-defaults", cwd=tmp_path)
    where = "import edge, pathlib; print(pathlib.Path(edge.__file__).parent / '_bpf')"
    carried = Path(run(python, "-I", "-c", where, cwd=tmp_path).strip())
    assert {str(path.relative_to(carried)) for path in carried.rglob("*") if path.is_file()} == SOURCES


def test_the_editable_edge_is_the_checkout_itself(tmp_path: Path) -> None:
    where = "import edge, pathlib; print(pathlib.Path(edge.__file__).parent)"
    package = Path(run(sys.executable, "-I", "-c", where, cwd=tmp_path).strip())
    assert package == ROOT / "edge"
    assert not (package / "_bpf").exists()

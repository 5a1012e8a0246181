"""The wheel, installed into an environment of its own and run from somewhere else."""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import httpx
import pytest

from embedd_dagster.stack.control import discard, status

ROOT = Path(__file__).parents[2]


def run(*command, **options):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def environment():
    """A virtual environment whose `embedd` comes from the wheel; what it depends on is shared with this one."""
    directory = Path(tempfile.mkdtemp(prefix="embedd-wheel-"))
    try:
        run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", directory / "dist", cwd=ROOT)
        wheel = next((directory / "dist").glob("embedd_vector_tables-*.whl"))
        venv = directory / "venv"
        run(sys.executable, "-m", "venv", "--without-pip", venv)
        python = venv / "bin" / "python"
        if importlib.util.find_spec("pip"):
            install = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index"]
        else:
            install = [shutil.which("uv"), "pip", "install", "--quiet", "--python", python, "--no-deps", "--no-index"]
        run(*install, wheel)
        # the lines of .pth files count only in the environment's own directory: this checkout is not seen through it
        site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
        (site / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
        yield venv
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def elsewhere():
    directory = Path(tempfile.mkdtemp(prefix="embedd-elsewhere-"))
    directory.chmod(0o755)
    yield directory
    discard(directory / ".embedd")
    shutil.rmtree(directory, ignore_errors=True)


def test_the_wheel_installs_typed_packages_with_the_products_name_and_no_others(environment):
    site = next((environment / "lib").glob("python*/site-packages"))
    installed = next(site.glob("embedd_vector_tables-*.dist-info")) / "RECORD"
    files = {line.split(",")[0] for line in installed.read_text().splitlines()}
    packages = {file.split("/")[0] for file in files if not file.startswith(("../", "embedd_vector_tables-"))}
    assert packages == {"embedd_api", "embedd_dagster"}
    assert {f"{package}/py.typed" for package in packages} <= files


def test_the_api_imports_its_own_modules_by_no_absolute_name():
    absolute = re.compile(r"^\s*(from|import) api\b", re.MULTILINE)
    found = [str(path.relative_to(ROOT)) for path in (ROOT / "api").rglob("*.py") if absolute.search(path.read_text())]
    assert not found, "the wheel ships this folder as embedd_api: import relatively, as in `from ..auth import Reader`"


def test_a_stack_from_the_wheel_starts_and_says_when_it_stops(environment, elsewhere):
    for package in ("embedd_dagster", "embedd_api"):
        where = run(environment / "bin/python", "-c", f"import {package}; print({package}.__file__)", cwd=elsewhere)
        assert where.startswith(str(environment)), f"{package} must come from the wheel"
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    up = subprocess.Popen(
        [environment / "bin/embedd", "up"],
        cwd=elsewhere,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    said = []
    for line in up.stdout:
        said.append(line)
        if "embedd is up." in line:
            break
    else:
        pytest.fail("".join(said))
    assert status(elsewhere / ".embedd").state == "ready"
    api = json.loads((elsewhere / ".embedd/endpoints.json").read_text())["api"]
    assert httpx.get(f"{api}/ready", trust_env=False).status_code == 200
    assert httpx.get(f"{api}/v1/tasks", trust_env=False).json()["error"]["code"] == "unauthorized"
    shown = run(environment / "bin/embedd", "status", cwd=elsewhere)
    assert shown.startswith("ready (process ")
    up.send_signal(signal.SIGINT)
    rest, _ = up.communicate(timeout=200)
    assert up.returncode == 0, rest
    assert re.search(r"Stopping …(.|\n)*Stopped\.", rest), rest


def test_no_message_tells_people_to_install_somebody_elses_package():
    package_of_another = re.compile(r"pip install [^\n]*['\" ]embedd(\[|['\"\s]|$)")
    for folder in ("embedd_dagster", "api", "docs", "deploy", "scripts"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in {".py", ".md", ".yaml"} or path.name == "Dockerfile":
                assert not package_of_another.search(path.read_text()), path
    assert not package_of_another.search((ROOT / "README.md").read_text())

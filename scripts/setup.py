"""Makes the virtual environment of this checkout: exactly requirements.lock, and the project itself, editable.

Needs only Python 3.11 or newer. Uses uv if it is installed, otherwise the standard library's venv and pip.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    """Sets up the environment named on the command line."""
    if sys.version_info < (3, 11):  # noqa: UP036 - any `python3` may run this
        sys.exit(f"embedd needs Python 3.11 or newer; this is {sys.version.split()[0]}. Try: make PYTHON=python3.12 …")
    target = Path(sys.argv[1]).resolve()
    python = target / "bin" / "python"
    uv = shutil.which("uv")
    _say(f"Setting up {target} with {'uv' if uv else 'pip'} …")
    if uv:
        if not _works(python):
            _say("  making the virtual environment")
            _run(uv, "venv", "--quiet", "--clear", "--python", sys.executable, target)
        _say(_what_is_installed())
        _run(uv, "pip", "sync", "--quiet", "--compile-bytecode", "--python", python, ROOT / "requirements.lock")
        _run(
            uv, "pip", "install", "--quiet", "--python", python, "--no-deps", "--no-build-isolation", "--editable", ROOT
        )
    else:
        if not _works(python):
            _say("  making the virtual environment")
            _run(sys.executable, "-m", "venv", "--clear", target)
        elif not _works(python, "-m", "pip", "--version"):
            # uv made the environment and is no longer installed
            _run(python, "-m", "ensurepip")
        pip = (python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet")
        _say(_what_is_installed())
        _run(*pip, "--require-hashes", "--no-deps", "--requirement", ROOT / "requirements.lock")
        _run(*pip, "--no-deps", "--no-build-isolation", "--editable", ROOT)
        _say("  compiling them, so that Dagster starts faster")
        # pip skips this if PYTHONDONTWRITEBYTECODE is set; compiled, Dagster starts twice as fast
        _run(python, "-m", "compileall", "-q", "-j", "0", target / "lib")
    _run(python, "-m", "compileall", "-q", ROOT / "embedd_dagster", ROOT / "api")
    write_dagster_home(ROOT)
    _say("  ready")


def write_dagster_home(root: Path) -> None:
    """Makes `.dagster/` and names it in `.env`, so that `dagster dev` does not read the root's dagster.yaml.

    Dagster lets `.env` override the environment, so the line keeps a DAGSTER_HOME that is already set: the services of
    `embedd up` have one. Other lines of an existing `.env` stay.
    """
    home = root / ".dagster"
    home.mkdir(exist_ok=True)
    (home / "dagster.yaml").write_text("telemetry:\n  enabled: false\n", encoding="utf-8")
    path = root / ".env"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else ["# for `dagster dev`"]
    others = [line for line in lines if not line.startswith("DAGSTER_HOME=")]
    path.write_text("\n".join([*others, f'DAGSTER_HOME="${{DAGSTER_HOME:-{home}}}"']) + "\n", encoding="utf-8")


def _what_is_installed() -> str:
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    count = sum("==" in line and not line.startswith((" ", "#")) for line in lines)
    return (
        f"  installing {count} packages that requirements.lock pins: Dagster, FastAPI, PostgreSQL, Qdrant's engine, a small "
        "model … (some minutes the first time)"
    )


def _say(text: str) -> None:
    print(text, flush=True)  # noqa: T201


def _works(python: Path, *arguments: str) -> bool:
    """Whether this interpreter exists and runs: in an environment that was moved or half made it does not."""
    if not python.exists():
        return False
    return subprocess.run([str(python), *(arguments or ("-c", ""))], check=False, capture_output=True).returncode == 0


def _run(*command: str | Path) -> None:
    finished = subprocess.run([str(part) for part in command], check=False)
    if finished.returncode != 0:
        sys.exit(f"This failed: {' '.join(str(part) for part in command)}")


if __name__ == "__main__":
    main()

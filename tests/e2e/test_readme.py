"""The commands of the README and the tutorial work when they are pasted in their order; and the demo does what it says."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from embedd_dagster.stack.stack import Stack

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def _blocks(heading: str) -> list[str]:
    """The shell blocks of a section."""
    section = README.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    return re.findall(r"```sh\n(.*?)```", section, flags=re.DOTALL)


def test_the_tour_with_curl(stack: Stack, tmp_path: Path) -> None:
    start, *rest = _blocks("Five minutes with curl")
    assert start.strip() == "make up", "the stack that runs for these tests stands in for it"
    (tmp_path / ".venv").symlink_to(Path(sys.prefix))
    (tmp_path / ".embedd").symlink_to(stack.state_dir)
    separator = "\necho @@@\n"
    script = "set -eo pipefail\n" + separator.join(rest)
    pasted = subprocess.run(
        ["bash", "-c", script],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
        env={**os.environ},
    )
    assert pasted.returncode == 0, pasted.stdout + pasted.stderr
    answers = pasted.stdout.split("@@@\n")
    assert len(answers) == len(rest)
    found = [json.loads(answer) for answer in answers if '"results"' in answer]
    assert [result["metadata"]["vegan"] for result in found[0]["results"]] == [True, True]
    assert found[0]["results"][0]["embedded_text"].startswith("title: Mango sorbet")
    assert '"task_id"' in answers[-1]


def test_the_tutorial(stack: Stack, tmp_path: Path) -> None:
    start, *rest = re.findall(r"```sh\n(.*?)```", (ROOT / "docs" / "tutorial.md").read_text(), flags=re.DOTALL)
    assert start.strip() == "make up", "the stack that runs for these tests stands in for it"
    (tmp_path / ".venv").symlink_to(Path(sys.prefix))
    (tmp_path / ".embedd").symlink_to(stack.state_dir)
    command = ["bash", "-c", "set -eo pipefail\n" + "\n".join(rest)]
    pasted = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=600)
    assert pasted.returncode == 0, pasted.stdout + pasted.stderr
    found = re.findall(r'"embedded_text": ?"([^"\\]*)', pasted.stdout)
    assert found[0].startswith("Walden")
    assert found[-2].startswith("Moby-Dick")
    assert found[-1].startswith("Dracula")


def test_every_make_target_that_is_named_is_there() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make ([a-z-]+)", README):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_the_demo() -> None:
    """Its own stack, next to the one that runs; it fails by itself if an answer is not as it must be.

    With a few modules: to embed the whole library is the model's work, and takes longer than all else here.
    """
    demo = subprocess.run(
        [sys.executable, "-m", "embedd_dagster.cli", "demo", "--quick"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=840,
    )
    assert demo.returncode == 0, demo.stdout + demo.stderr
    assert demo.stdout.count("shutil.copytree") >= 2

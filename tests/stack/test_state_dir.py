"""What lies in a state directory, and what is done about damage."""

import os
import subprocess
import sys

import pytest

from embedd_dagster.errors import ConfigurationError
from embedd_dagster.stack import files, postgres_location
from embedd_dagster.stack.ports import Ports
from embedd_dagster.stack.state_dir import kept_encryption_keys, kept_secret, open_state_dir

DAMAGED = [b"", b"\n", b"short", b"\xff\xfe" * 20, b"two words of more than sixteen"]


def test_the_state_directory_is_made_for_its_owner_alone(tmp_path):
    open_state_dir(tmp_path / "new")
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700
    old = tmp_path / "old"
    (old / "qdrant").mkdir(parents=True)
    old.chmod(0o755)
    open_state_dir(old)
    assert old.stat().st_mode & 0o777 == 0o700


def test_a_directory_of_other_files_is_no_state_directory(tmp_path):
    tmp_path.chmod(0o755)
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ConfigurationError, match="holds other files"):
        open_state_dir(tmp_path)
    assert tmp_path.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_secret_is_made_again(tmp_path, content):
    path = tmp_path / "qdrant_api_key"
    path.write_bytes(content)
    made = kept_secret(path)
    assert len(made) >= 32
    assert kept_secret(path) == made
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("content", [None, *DAMAGED])
def test_lost_encryption_keys_are_an_error_once_there_is_a_catalog(tmp_path, content):
    path = tmp_path / "encryption_keys"
    first = kept_encryption_keys(tmp_path)
    assert kept_encryption_keys(tmp_path) == first
    (tmp_path / "postgres" / "data").mkdir(parents=True)
    assert kept_encryption_keys(tmp_path) == first
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigurationError, match="encryption_keys"):
        kept_encryption_keys(tmp_path)


@pytest.mark.parametrize("content", ["", "[1]", '{"api": true}', '{"api": "x"}', '{"api": 99999999}', '{"api": 80'])
def test_a_damaged_file_of_ports_is_made_again(tmp_path, content):
    path = tmp_path / "ports.json"
    path.write_text(content)
    port = Ports(path).claim("api")
    assert port > 1024
    assert Ports(path).claim("api") == port


@pytest.mark.parametrize("content", ["", ".", "/", "/usr", "../x-postgres-abcdefgh"])
def test_a_damaged_pointer_never_leads_a_removal_elsewhere(tmp_path, content):
    directory = tmp_path / "postgres"
    directory.mkdir()
    (directory / "location").write_text(content)
    assert postgres_location.known_root(directory) == directory
    postgres_location.remove_location(directory)
    assert not directory.exists()


def test_a_lock_whose_file_was_removed_is_not_in_place(tmp_path):
    lock = files.OwnerLock(tmp_path / "lock")
    assert lock.acquire()
    assert lock.in_place
    (tmp_path / "lock").unlink()
    assert not lock.in_place
    (tmp_path / "lock").touch()
    assert not lock.in_place


@pytest.mark.parametrize("key", ["", " "])
def test_qdrant_does_not_start_with_an_empty_key(tmp_path, key):
    command = [sys.executable, "-m", "embedd_dagster.stack.qdrant.server", "--data", str(tmp_path), "--port", "1"]
    environment = {**os.environ, "EMBEDD_QDRANT_API_KEY": key}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "EMBEDD_QDRANT_API_KEY is empty" in done.stderr

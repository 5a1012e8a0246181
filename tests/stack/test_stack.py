"""The whole stack, with real PostgreSQL and Dagster; the API and Qdrant are stubs here."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import psycopg
import pytest

from embedd_dagster.errors import ConfigurationError
from embedd_dagster.stack import installation
from embedd_dagster.stack.postgres import open_temporary_postgres
from embedd_dagster.stack.postgres_location import known_root, remove_location
from embedd_dagster.stack.process import marked_processes, working_in
from embedd_dagster.stack.stack import Stack, StackAlreadyRunning, down, running_stack, status
from embedd_dagster.stack.supervisor import ChildFailed
from tests.support.stub_stack import stub_settings

CHILDREN = {"postgres", "qdrant", "code-server", "dagster-webserver", "dagster-daemon", "api"}
LAUNCH = """mutation ($job: String!) { launchRun(executionParams: {
    selector: {repositoryLocationName: "embedd", repositoryName: "__repository__", jobName: $job},
    runConfigData: {}}) { __typename ... on LaunchRunSuccess { run { runId } } ... on PythonError { message } } }"""
STATUS = "query ($id: ID!) { runOrError(runId: $id) { ... on Run { status } } }"


@pytest.fixture
def state_dir():
    directory = new_state_dir()
    yield directory
    discard(directory)


@pytest.fixture(scope="module")
def stack():
    directory = new_state_dir()
    with pytest.MonkeyPatch.context() as patch:
        for name in (
            "EMBEDD_DATABASE_URL",
            "EMBEDD_QDRANT_URL",
            "EMBEDD_DAGSTER_DATABASE_URL",
            "EMBEDD_ENCRYPTION_KEYS",
            "EMBEDD_DAGSTER_TOKEN",
        ):
            patch.delenv(name, raising=False)
        stack = Stack(directory, settings=stub_settings())
        stack.start()
    try:
        yield stack
    finally:
        stack.stop()
    assert everything_of(directory) == []
    discard(directory)


def new_state_dir():
    directory = Path(tempfile.mkdtemp(prefix="embedd-test-"))
    directory.chmod(0o755)
    return directory


def discard(directory):
    down(directory)
    remove_location(directory / "postgres")
    shutil.rmtree(directory, ignore_errors=True)


def everything_of(state_dir):
    servers = working_in((known_root(state_dir / "postgres") / "data").resolve(), "postgres")
    return [one.pid for one in (*marked_processes(state_dir), *servers)]


def until(condition, timeout_seconds=120):
    deadline = time.monotonic() + timeout_seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.05)
    return result


def graphql(endpoints, query, **variables):
    headers = {"Authorization": f"Bearer {endpoints.dagster_token}"}
    body = {"query": query, "variables": variables}
    answer = httpx.post(f"{endpoints.dagster}/graphql", json=body, headers=headers, timeout=20)
    return answer.json()["data"]


def launch(endpoints, job):
    launched = graphql(endpoints, LAUNCH, job=job)["launchRun"]
    assert launched["__typename"] == "LaunchRunSuccess", launched
    return launched["run"]["runId"]


def run_status(endpoints, run_id):
    return graphql(endpoints, STATUS, id=run_id)["runOrError"]["status"]


def test_writes_where_it_is_for_its_owner_alone(stack):
    path = stack.state_dir / "endpoints.json"
    assert json.loads(path.read_text()) == {
        "api": stack.endpoints.api,
        "dagster": stack.endpoints.dagster,
        "dagster_login": stack.endpoints.dagster_login,
        "qdrant": stack.endpoints.qdrant,
        "qdrant_api_key": stack.endpoints.qdrant_api_key,
        "database_url": stack.endpoints.database_url,
    }
    for name in ("endpoints.json", "stack.json", "encryption_keys", "dagster_token", "qdrant_api_key"):
        assert (stack.state_dir / name).stat().st_mode & 0o777 == 0o600
    assert (stack.state_dir / "run").stat().st_mode & 0o777 == 0o700
    with psycopg.connect(stack.endpoints.database_url) as connection:
        assert connection.info.dbname == "embedd"
    seen = status(stack.state_dir)
    assert (seen.running, seen.state, seen.pid, seen.endpoints) == (True, "ready", os.getpid(), stack.endpoints)
    assert {name: child["state"] for name, child in seen.children.items()} == dict.fromkeys(CHILDREN, "ready")


def test_dagster_is_closed_to_whoever_has_no_token(stack):
    url = f"{stack.endpoints.dagster}/graphql"
    mutation = LAUNCH.replace("($job: String!)", "").replace("$job", '"quick_job"')
    with httpx.Client() as client:
        assert client.post(url, json={"query": mutation}).status_code == 401
        assert client.get(stack.endpoints.dagster_login).status_code == 200
        assert client.get(stack.endpoints.dagster).status_code == 200  # signed in, as the browser is now
        for accept in ("image/*", "text/html"):
            refused = client.get(url, params={"query": mutation}, headers={"Accept": accept})
            assert refused.status_code == 405
        assert client.post(url, params={"query": mutation}).status_code == 415
        assert client.post(url, json={"query": mutation}, headers={"Origin": "http://localhost:1"}).status_code == 403
        headers = {"Origin": stack.endpoints.dagster}
        launched = client.post(url, json={"query": mutation}, headers=headers).json()  # what the UI's button sends
        assert launched["data"]["launchRun"]["__typename"] == "LaunchRunSuccess"


def test_runs_are_executed(stack):
    run_id = launch(stack.endpoints, "quick_job")
    until(lambda: run_status(stack.endpoints, run_id) == "SUCCESS")


def test_a_killed_code_server_takes_its_run_workers_along_and_comes_back(stack):
    run_id = launch(stack.endpoints, "endless_job")
    until(lambda: run_status(stack.endpoints, run_id) == "STARTED")
    workers = marked_processes(stack.state_dir, "code-server")
    assert len(workers) > 1
    os.kill(stack.child_pid("code-server"), signal.SIGKILL)
    until(lambda: not any(worker.is_running() for worker in workers))
    stack.wait_ready()
    assert stack.describe()["code-server"]["restart_count"] == 1

    def launches_again():
        return graphql(stack.endpoints, LAUNCH, job="quick_job")["launchRun"].get("run")

    run_id = until(launches_again)["runId"]
    until(lambda: run_status(stack.endpoints, run_id) == "SUCCESS")


@pytest.mark.parametrize("name", sorted(CHILDREN - {"code-server"}))
def test_any_killed_child_comes_back_and_the_others_bear_it(stack, name):
    others = {other: stack.child_pid(other) for other in CHILDREN - {name}}
    killed = stack.child_pid(name)
    os.kill(killed, signal.SIGKILL)
    until(lambda: stack.child_pid(name) not in (None, killed))
    stack.wait_ready()
    assert {other: stack.child_pid(other) for other in others} == others
    if name in ("postgres", "dagster-daemon"):
        run_id = until(lambda: graphql(stack.endpoints, LAUNCH, job="quick_job")["launchRun"].get("run"))["runId"]
        until(lambda: run_status(stack.endpoints, run_id) == "SUCCESS")


def test_a_child_can_be_kept_down(stack):
    stack.stop_child("api")
    time.sleep(0.5)
    assert stack.child_pid("api") is None
    assert status(stack.state_dir).children["api"]["state"] == "stopped"
    stack.start_child("api")
    assert httpx.get(f"{stack.endpoints.api}/health").status_code == 200


def test_a_second_one_says_where_the_first_is(stack):
    with pytest.raises(StackAlreadyRunning, match=stack.endpoints.api):
        Stack(stack.state_dir, settings=stub_settings()).start()


def up(state_dir):
    command = [sys.executable, "-m", "tests.support.stub_stack", str(state_dir)]
    # the tests may run under nohup, which ignores SIGHUP; so would the stack, and rightly
    previous = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        return subprocess.Popen(command, stdout=subprocess.PIPE)
    finally:
        signal.signal(signal.SIGHUP, previous)


def first_url(supervisor):
    return next(line.decode().strip() for line in supervisor.stdout if line.startswith(b"http"))


def test_up_survives_kill_9_of_the_supervisor_and_down_ends_it(state_dir):
    supervisor = up(state_dir)
    url = first_url(supervisor)
    supervisor.kill()
    supervisor.communicate()
    again = up(state_dir)  # at once: what is left has to be ended first
    assert first_url(again) == url  # the port is kept
    assert len(everything_of(state_dir)) >= len(CHILDREN)
    assert status(state_dir).pid == again.pid
    assert down(state_dir)
    assert again.wait(60) == 0
    again.communicate()
    assert everything_of(state_dir) == []
    assert not (state_dir / "endpoints.json").exists()
    assert not status(state_dir).running
    assert not down(state_dir)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the next up or down ends them")
def test_a_killed_supervisor_leaves_nobody_behind(state_dir):
    supervisor = up(state_dir)
    first_url(supervisor)
    supervisor.kill()
    supervisor.communicate()
    until(lambda: everything_of(state_dir) == [])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_in_the_middle_of_the_start_ends_everything(state_dir, number):
    supervisor = up(state_dir)
    until(lambda: "dagster-webserver" in status(state_dir).children)
    supervisor.send_signal(number)
    assert supervisor.wait(60) == 0
    supervisor.communicate()
    assert everything_of(state_dir) == []


def test_removing_the_state_directory_ends_everything_and_the_next_up_works(state_dir):
    supervisor = up(state_dir)
    first_url(supervisor)
    data = known_root(state_dir / "postgres")
    shutil.rmtree(state_dir)
    try:
        assert supervisor.wait(120) == 1, "it ends by itself, and not as if it had been asked"
        supervisor.communicate()
        assert marked_processes(state_dir) == []
        assert not state_dir.exists(), "it does not come back half"
        again = up(state_dir)
        first_url(again)
        assert down(state_dir)
        assert again.wait(60) == 0
        again.communicate()
    finally:
        shutil.rmtree(data, ignore_errors=True)


def test_down_and_up_find_a_stack_whose_state_directory_was_removed(state_dir):
    supervisor = up(state_dir)
    first_url(supervisor)
    data = known_root(state_dir / "postgres")
    supervisor.send_signal(signal.SIGSTOP)  # so that it does not see it and end by itself
    shutil.rmtree(state_dir)
    try:
        assert status(state_dir).pid == supervisor.pid
        supervisor.send_signal(signal.SIGCONT)
        assert down(state_dir)
        assert marked_processes(state_dir) == []
        assert supervisor.wait(1) in (0, 1)
        supervisor.communicate()
        assert not down(state_dir)
    finally:
        shutil.rmtree(data, ignore_errors=True)


@pytest.mark.parametrize("content", ["", "{", '{"pid": "x"}', "[]", "\udcff", '{"children": 3}'])
def test_a_damaged_state_file_is_read_as_unknown(tmp_path, content):
    for name in ("stack.json", "endpoints.json"):
        (tmp_path / name).write_bytes(content.encode(errors="surrogateescape"))
    assert not status(tmp_path).running
    assert not down(tmp_path)


def test_damaged_state_files_of_a_running_stack_are_written_again(stack):
    for name in ("stack.json", "endpoints.json"):
        (stack.state_dir / name).write_bytes(b"\xff{")
    until(lambda: status(stack.state_dir).endpoints == stack.endpoints)
    assert status(stack.state_dir).state == "ready"


def test_the_state_directory_is_for_its_owner_alone_and_postgresql_lives_next_to_it(stack):
    assert stack.state_dir.stat().st_mode & 0o777 == 0o700
    if os.geteuid() == 0:
        root = known_root(stack.state_dir / "postgres")
        assert root.parent == stack.state_dir.parent
        assert root.name.startswith(f"{stack.state_dir.name}-postgres-")


def test_code_that_does_not_load_is_shown_and_nothing_is_left(state_dir):
    settings = stub_settings(code_location_module="tests.support.no_such_module")
    with (
        pytest.raises(ChildFailed, match=r"(?s)code-server .*no_such_module"),
        running_stack(state_dir, settings=settings),
    ):
        pass
    assert everything_of(state_dir) == []
    assert not (state_dir / "endpoints.json").exists()


def test_ones_own_database_needs_ones_own_key(state_dir, monkeypatch):
    monkeypatch.setenv("EMBEDD_DATABASE_URL", "postgresql://somebody@db.example/embedd")
    with pytest.raises(ConfigurationError, match="EMBEDD_ENCRYPTION_KEYS"):
        Stack(state_dir, settings=stub_settings()).start()
    assert not status(state_dir).running


def test_a_database_that_does_not_answer_is_told(state_dir, monkeypatch):
    monkeypatch.setenv("EMBEDD_DATABASE_URL", "postgresql://somebody:secret@127.0.0.1:1/embedd")
    monkeypatch.setenv("EMBEDD_ENCRYPTION_KEYS", "a2V5")
    with pytest.raises(ConfigurationError, match="does not let us in") as caught:
        Stack(state_dir, settings=stub_settings()).start()
    assert "secret" not in str(caught.value)
    assert everything_of(state_dir) == []


def test_ones_own_parts_take_the_place_of_the_embedded_ones(state_dir, monkeypatch):
    with open_temporary_postgres() as own:
        monkeypatch.setenv("EMBEDD_DATABASE_URL", own.ensure_database("catalog"))
        monkeypatch.setenv("EMBEDD_QDRANT_URL", "http://qdrant.example:6333")
        monkeypatch.setenv("EMBEDD_ENCRYPTION_KEYS", "a2V5")
        migrated = []
        stack = Stack(state_dir, settings=stub_settings(migrate=migrated.append))
        with stack:
            assert set(stack.describe()) == CHILDREN - {"postgres", "qdrant"}
            assert stack.endpoints.database_url == own.url("catalog")
            assert stack.endpoints.qdrant == "http://qdrant.example:6333"
        assert migrated == [own.url("catalog")]
        with psycopg.connect(own.url("dagster")) as connection:
            assert connection.execute("SELECT to_regclass('runs')").fetchone() != (None,)
    assert not (state_dir / "encryption_keys").exists()


def test_a_deep_state_directory_gets_a_socket_elsewhere(tmp_path):
    socket_path = installation.find_code_socket(tmp_path / ("deep" * 30))
    try:
        assert len(str(socket_path)) <= 100
        assert socket_path.parent.stat().st_mode & 0o777 == 0o700
        assert installation.find_code_socket(tmp_path / ("deep" * 30)) == socket_path
    finally:
        socket_path.parent.rmdir()

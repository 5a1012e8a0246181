"""What the command line prints, to the letter."""

import errno

import typer
from typer.testing import CliRunner

from embedd_dagster import cli
from embedd_dagster.errors import ConfigurationError


def run_failing(monkeypatch, error):
    def fail(*_args, **_kwargs):
        raise error

    monkeypatch.setattr("embedd_dagster.stack.control.status", fail)
    return CliRunner().invoke(cli.app, ["status"])


def test_brackets_and_colons_in_messages_are_printed_as_they_are(monkeypatch):
    message = "Table [/nonsense] of [bold]shop[/bold] :warning: needs the extra [local]"
    result = run_failing(monkeypatch, ConfigurationError(message, resolution="pip install '<wheel>[local]'"))
    assert result.exit_code == 1
    assert message in result.stderr
    assert "pip install '<wheel>[local]'" in result.stderr


def test_an_error_of_the_system_is_a_message_and_not_a_stack_trace(monkeypatch):
    result = run_failing(monkeypatch, OSError(errno.ENOSPC, "No space left on device", "/disk/[x]/stack.json"))
    assert result.exit_code == 1
    assert "/disk/[x]/stack.json: No space left on device" in result.stderr
    assert "Traceback" not in result.stderr


def test_help_and_usage_errors_print_brackets_as_they_are():
    app = typer.Typer(rich_markup_mode=cli.app.rich_markup_mode)

    @app.command()
    def show() -> None:
        """Needs the extra [local]."""

    assert "[local]" in CliRunner().invoke(app, ["--help"]).output
    assert "[/x]" in CliRunner().invoke(cli.app, ["[/x]"]).output

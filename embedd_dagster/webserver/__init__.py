"""Dagster's UI behind a guard: `python -m embedd_dagster.webserver` replaces `dagster-webserver`.

The open-source webserver has no login, and executes a mutation that comes as a cross-site GET: any page in
the user's browser could launch runs. Here the same application is mounted behind a login, in one process, and listens
nowhere else. Only `app.py` imports Dagster.
"""

"""The first instructions of every supervised child: whom it obeys, whose death it shares, as whom it runs.

Run as `python -I -S launch.py PARENT_PID DEATH_SIGNAL USER:GROUP|- COMMAND…`, it replaces itself with COMMAND. It is
a program and not a `preexec_fn` because that one runs between fork and exec of a process with threads, where it may
hang for ever. It imports nothing of the project, for it is started once a child.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> None:
    """Never returns: the process becomes the command, or exits."""
    parent_pid, death_signal, account, *command = arguments
    if account != "-":
        uid, gid = (int(part) for part in account.split(":"))
        os.setgroups([])
        os.setgid(gid)
        os.setuid(uid)
    # After the change of user: the kernel forgets the death signal when the credentials change.
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(death_signal), 0, 0, 0)
        if os.getppid() != int(parent_pid):  # it died before the line above: no signal will come
            os.kill(os.getpid(), signal.SIGKILL)
    # Ignored signals are inherited, and a shell's script ignores SIGINT for what it starts with `&`; Dagster then does what
    # it does with SIGINT with SIGTERM, too: it would have to be killed.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    os.execv(command[0], command)  # noqa: S606 - replacing itself is its purpose


if __name__ == "__main__":
    main(sys.argv[1:])

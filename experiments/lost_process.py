"""Says in one sentence which process of a run was lost.

When a process stops answering, JAX's coordination service ends every other one by abort() from a thread of its own: no Python
of theirs runs again, and the name of the lost one drowns in C++ stack frames. So a child process reads what the native code of
a process writes to standard error, passes it on, and adds the sentence. Python's own messages do not take this way.

This file is run as a script and imports nothing but the standard library.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import IO

FATAL = "JAX distributed service detected fatal errors"
STACK = "    @ "
LOST = re.compile(r"stopped sending heartbeats\):\s*([\d,\s]+)")
WITHOUT_COORDINATOR = "Failed to send RPC to coordination service"
NOT_ALL_CAME = "RegisterTask"
_KEPT_CHARACTERS = 20_000
_AGAIN = "Start the same command again on all hosts: the run goes on from its last checkpoint."


class Watch:
    """The child process that listens to this process's native standard error, from now until the end."""

    def __init__(self) -> None:
        python_errors = os.dup(2)
        hosts_end, self._hosts = os.pipe()
        words = [sys.executable, "-I", os.path.abspath(__file__), str(hosts_end)]
        child = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, pass_fds=(hosts_end,))
        assert child.stdin is not None
        sys.stderr.flush()
        os.dup2(child.stdin.fileno(), 2)
        child.stdin.close()
        os.close(hosts_end)
        sys.stderr = os.fdopen(python_errors, "w", buffering=1, errors="backslashreplace")
        self._child = child

    def tell_hosts(self, hosts: Sequence[str]) -> None:
        """Tells the child, once, which host each process runs on."""
        with os.fdopen(self._hosts, "w") as pipe:
            json.dump(list(hosts), pipe)


def named(process: int, hosts: Sequence[str]) -> str:
    """A process as a reader finds it: its number and its host."""
    return f"process {process} (host {hosts[process]})" if process < len(hosts) else f"process {process}"


def sentence(text: str, hosts: Sequence[str]) -> str:
    """What the coordination service's last words `text` mean; `hosts` are in the order of the processes, empty while unknown."""
    found = LOST.search(text)
    if found:
        lost = [named(int(number), hosts) for number in re.findall(r"\d+", found[1])]
        return (
            f"{', '.join(lost)} stopped answering, so this process ends too: killed, crashed or cut off; the log there says "
            f"why. {_AGAIN}"
        )
    if WITHOUT_COORDINATOR in text:
        return (
            f"{named(0, hosts)}, which coordinates the run, is gone, so this process ends too. It also leaves when another "
            f"process was lost: its log says which. {_AGAIN}"
        )
    if NOT_ALL_CAME in text:
        return (
            "not all processes of the run came in time. Start the same command on every host, with as many processes as it "
            "says; process 0 must be reachable from all (name, port, firewall)"
        )
    return f"JAX's coordination service ended this process; the lines above say why. {_AGAIN}"


def read_hosts(pipe: int, hosts: list[str]) -> None:
    """Adds what the watched process tells of the hosts to `hosts`; nothing when it ends before it knows them."""
    with os.fdopen(pipe) as told:
        hosts.extend(json.loads(told.read() or "[]"))


def listen(lines: IO[bytes], output: IO[bytes], hosts: Sequence[str]) -> None:
    """Passes `lines` on to `output`; after fatal words of the coordination service it leaves out the stack and explains."""
    recent, explained = "", False
    for line in lines:
        text = line.decode(errors="replace")
        recent = (recent + text)[-_KEPT_CHARACTERS:]
        fatal = FATAL in recent
        if fatal and not explained and text.startswith(("***", STACK)):
            explained = True
            output.write(f"error: {sentence(recent[recent.rindex(FATAL) :], hosts)}\n".encode())
        if not (fatal and text.startswith(("***", STACK))):
            output.write(line)
        output.flush()


def main() -> None:
    """Listens until every process that holds the other end has gone."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    hosts: list[str] = []
    threading.Thread(target=read_hosts, args=(int(sys.argv[1]), hosts), daemon=True).start()
    with open(0, "rb") as lines, open(2, "wb", closefd=False) as output:
        listen(lines, output, hosts)


if __name__ == "__main__":
    main()

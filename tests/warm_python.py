"""Python processes that have torch and transformers from the start: forked from one that imported them.

Importing both takes 5 CPU seconds; a process of its own is what some tests are about (it is killed, its modules are
taken away, it knows nothing else).  So one process a session imports them, does nothing else, and forks a child for
whoever asks over a socket, however many processes run the tests.  The child is what ``python -c CODE ARGUMENTS`` would
be, in a session of its own: nothing of roundexport is imported in it.  Not for tests of imports or of peak memory.

    request   one message: code, arguments, environment, folder; with it stdin, stdout and stderr as descriptors
    answers   the child's pid, then its exit code as Popen.returncode has it and the CPU seconds that it used

It ends with the process whose pid it was given.  Only its one thread may exist where it forks, which it checks.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import IO, Any, NoReturn

_WARM = (
    "torch.onnx", "onnxscript", "numba", "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama", "transformers.models.qwen3.modeling_qwen3",
)  # fmt: skip
_LONGEST = 1 << 17  # bytes of a request


class WarmProcess:
    """A child that runs; the part of ``subprocess.Popen`` that tests need.

    ``WarmProcess.cpu_seconds`` is what those that were waited for have used, in this process's tests.
    """

    cpu_seconds = 0.0

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.pid = int(connection.recv(64))
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        if self.returncode is None and select.select([self._connection], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def wait(self) -> int:
        """The exit code; minus the signal where one ended it."""
        if self.returncode is None:
            code, seconds = self._connection.recv(64).split()
            self.returncode = int(code)
            WarmProcess.cpu_seconds += float(seconds)
            self._connection.close()
        return self.returncode

    def kill(self) -> None:
        """SIGKILL for it and for what it started."""
        os.killpg(self.pid, signal.SIGKILL)


class WarmPython:
    """Starts such processes.

    Args:
        address: of the socket at which the process that forks listens.
    """

    def __init__(self, address: Path) -> None:
        self._address = str(address)

    @classmethod
    def beside(cls, folder: Path) -> Path:
        """Start the process that forks; its address is left in ``folder``, and it ends with this session."""
        folder.mkdir()
        address = Path(tempfile.mkdtemp(prefix="warm-")) / "socket"  # pytest's folders are too long for a socket
        session = os.getppid() if "PYTEST_XDIST_WORKER" in os.environ else os.getpid()
        server = subprocess.Popen(
            [sys.executable, __file__, str(address), str(session)],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        assert server.stdout is not None and server.stdout.readline() == b"ready\n", "nothing can be forked"
        server.stdout.close()
        server.returncode = 0  # nobody here waits for it
        (folder / "address").write_text(str(address))
        return folder

    def start(
        self, code: str, *arguments: str | Path, env: dict[str, str] | None = None, cwd: str | Path = ".",
        stdin: IO[Any] | int | None = None, stdout: IO[Any] | int | None = None, stderr: IO[Any] | int | None = None,
    ) -> WarmProcess:  # fmt: skip
        """A child running ``code``; what is not given of the three streams is /dev/null."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.connect(self._address)
        asked = {
            "code": code, "arguments": [str(word) for word in arguments], "cwd": os.path.abspath(cwd),
            "env": dict(os.environ) if env is None else env,
        }  # fmt: skip
        message = json.dumps(asked).encode()
        assert len(message) < _LONGEST
        with open(os.devnull, "r+b") as nothing:
            streams = [nothing if stream is None else stream for stream in (stdin, stdout, stderr)]
            numbers = [stream if isinstance(stream, int) else stream.fileno() for stream in streams]
            socket.send_fds(connection, [message], numbers)
            return WarmProcess(connection)

    def run(
        self, code: str, *arguments: str | Path, env: dict[str, str] | None = None, cwd: str | Path = "."
    ) -> subprocess.CompletedProcess[str]:
        """A child run to its end, with what it printed."""
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            status = self.start(code, *arguments, env=env, cwd=cwd, stdout=out, stderr=err).wait()
            out.seek(0)
            err.seek(0)
            return subprocess.CompletedProcess([sys.executable, "-c", code], status, out.read(), err.read())


def _serve(address: str, session: int) -> None:
    for name in _WARM:
        importlib.import_module(name)
    assert threading.active_count() == len(os.listdir("/proc/self/task")) == 1, "forking would not be safe"
    assert not any(name.partition(".")[0] == "roundexport" for name in sys.modules)
    gc.collect()
    gc.freeze()  # no child's collections look at, and so copy, what stays
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(address)
    listener.listen()
    listener.settimeout(1)
    os.write(1, b"ready\n")
    os.dup2(0, 1)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while _lives(session):
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            continue
        if os.fork() == 0:
            listener.close()
            _guard(connection)
        connection.close()
    os.unlink(address)
    os.rmdir(os.path.dirname(address))


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def _guard(connection: socket.socket) -> NoReturn:
    """Fork the child, say its pid, wait for it, say how it ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    message, streams, *_ = socket.recv_fds(connection, _LONGEST, 3)
    child = os.fork()
    if child == 0:
        os.setsid()
        connection.send(str(os.getpid()).encode())
        connection.close()
        _become(json.loads(message), streams)
    for stream in streams:
        os.close(stream)
    _, status, used = os.wait4(child, 0)
    connection.send(f"{os.waitstatus_to_exitcode(status)} {used.ru_utime + used.ru_stime:.3f}".encode())
    os._exit(0)


def _become(asked: dict[str, Any], streams: list[int]) -> NoReturn:
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(asked["env"])
    os.chdir(asked["cwd"])
    sys.argv, sys.path[0] = ["-c", *asked["arguments"]], ""
    main = type(sys)("__main__")
    sys.modules["__main__"] = main
    exec(compile(asked["code"], "<string>", "exec"), main.__dict__)
    sys.exit(0)


if __name__ == "__main__":
    _serve(sys.argv[1], int(sys.argv[2]))

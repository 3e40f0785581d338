"""The worker's socket: who may come in, one at a time, and what the worker says while it is at work.

The folder is 0750 and the socket 0660, of a group that only the worker's and the SuperNode's users share; the kernel
says who is at the other end (SO_PEERCRED), and one user id is served.
"""

import os
import queue
import socket
import stat
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flex.deploy.frames import KINDS, receive_frame, send_frame
from flex.errors import FlexError, require
from flex.federation.flower import RecordDict

PEER = struct.Struct("3i")  # pid, uid, gid, as SO_PEERCRED gives them
LONGEST_PATH = 107  # of a Unix socket on Linux
ALIVE_S = 5.0
READ_S = 60.0  # a question arrives within this, from its first byte to its last pause
MOST_WAITING = 8
LOOK_S = 0.5


@dataclass
class Question:
    """One question of a peer, and its answer: records, or a sentence."""

    kind: str
    content: RecordDict
    peer: int
    answered: threading.Event = field(default_factory=threading.Event)
    gone: bool = False
    records: RecordDict | None = None
    error: str = ""


class Door:
    """A listening socket that takes questions of one user id in, for one thread to answer.

    Args:
        path: of the socket; its folder is made if it is not there.
        peer: the user id that is served.
        group: the group id that folder and socket get; None: the process's own.
        refused: told (user id, sentence) of whoever is turned away.

    Raises:
        FlexError: the path is too long, another worker listens there, or it cannot be made.
    """

    def __init__(self, path: Path, peer: int, group: int | None, refused: Callable[[int, str], None]):
        self.path, self.peer, self.refused = path, peer, refused
        self.questions: queue.Queue[Question] = queue.Queue()
        self._closing = threading.Event()
        self._socket = _listen(path, group)
        self._room = threading.Semaphore(MOST_WAITING)
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        self._thread.join()
        self._socket.close()
        self.path.unlink(missing_ok=True)

    def _accept(self) -> None:
        self._socket.settimeout(LOOK_S)
        while not self._closing.is_set():
            try:
                connection, _ = self._socket.accept()
            except TimeoutError:
                continue
            except OSError:
                return
            if self._room.acquire(blocking=False):
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()
            else:
                connection.close()

    def _serve(self, connection: socket.socket) -> None:
        try:
            with connection:
                self._converse(connection)
        finally:
            self._room.release()

    def _converse(self, connection: socket.socket) -> None:
        _, uid, _ = PEER.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, PEER.size))
        connection.settimeout(READ_S)
        try:
            require(uid == self.peer, f"user id {uid} may not ask this worker; expected user id {self.peer}")
            if not _says_something(connection):
                return
            head, content = receive_frame(connection, f"user id {uid}")
            kind = head.get("kind") if isinstance(head, dict) else None
            require(kind in KINDS, f"the question is {kind!r}; expected one of {', '.join(KINDS)}")
        except FlexError as error:
            self.refused(uid, str(error))
            _try_to_send(connection, {"error": str(error)})
            return
        question = Question(str(kind), content, uid)
        self.questions.put(question)
        while not question.answered.wait(ALIVE_S):
            if self._closing.is_set() or not _try_to_send(connection, {"alive": True}):
                question.gone = True
                return
        if question.records is None:
            _try_to_send(connection, {"error": question.error})
        else:
            _try_to_send(connection, {}, question.records)


def _says_something(connection: socket.socket) -> bool:
    """False for one who only looks whether somebody is here, as `flex node` does."""
    try:
        return bool(connection.recv(1, socket.MSG_PEEK))
    except OSError:
        return False


def _try_to_send(connection: socket.socket, head: dict[str, Any], content: RecordDict | None = None) -> bool:
    """False where the other side has gone."""
    try:
        send_frame(connection, head, content)
    except OSError:
        return False
    return True


def _listen(path: Path, group: int | None) -> socket.socket:
    length = len(os.fsencode(path))
    require(
        length <= LONGEST_PATH,
        f"the socket's path {path} has {length} bytes; expected at most {LONGEST_PATH} (--socket PATH)",
    )
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if not path.parent.exists():
            path.parent.mkdir(parents=True)
            path.parent.chmod(0o750)
            if group is not None:
                os.chown(path.parent, -1, group)
        _clear(path)
        before = os.umask(0o117)  # never wider than 0660, not for a moment
        try:
            listener.bind(str(path))
        finally:
            os.umask(before)
        if group is not None:
            os.chown(path, -1, group)
        listener.listen(MOST_WAITING)
    except OSError as error:
        listener.close()
        raise FlexError(f"cannot listen at {path}: {error.strerror or error}") from None
    except FlexError:
        listener.close()
        raise
    return listener


def _clear(path: Path) -> None:
    """Takes away the socket of a worker that was killed; refuses where one is listening, or what is no socket."""
    if not path.exists():
        return
    require(
        stat.S_ISSOCK(path.stat().st_mode), f"{path} is there and is no socket; expected a free path (--socket PATH)"
    )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
        else:
            raise FlexError(f"another worker listens at {path}; expected it to end first, or another --socket")

"""The Flower app of a site: hands every message to the worker at the site's socket, and its answer back.

It is all that travels to a site, and all that the SuperNode's user runs: no model, no data, no torch.
"""

import contextlib
import socket

from flex.deploy.frames import receive_frame, send_frame
from flex.errors import FlexError
from flex.federation.flower import CLIENT_RAISED, ClientApp, Context, Error, Message, RecordDict

SOCKET = "worker-socket"  # of Flower's node-config: where the worker listens
SILENCE_S = 120  # a worker says every few seconds that it is at work; longer than this, and it hangs


def ask(path: str, kind: str, content: RecordDict) -> RecordDict:
    """The worker's answer.

    Raises:
        FlexError: no worker, it refuses, or it dies over it.
    """
    with connected(path) as connection:
        with contextlib.suppress(OSError):  # it may have said why before it closed
            send_frame(connection, {"kind": kind}, content)
        while True:
            head, answer = receive_frame(connection, f"the worker at {path}")
            if "error" in head:
                raise FlexError(str(head["error"]))
            if not head.get("alive"):
                return answer


def connected(path: str) -> socket.socket:
    """A connection to the worker that listens at `path`; FlexError where there is none, or it is not ours to use."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(SILENCE_S)
    try:
        connection.connect(path)
    except PermissionError:
        connection.close()
        raise FlexError(
            f"the socket {path} belongs to another user and group; expected a SuperNode in the worker's group"
        ) from None
    except OSError as error:
        connection.close()
        raise FlexError(f"no worker at {path} ({error.strerror or error}); expected `flex worker` to run") from None
    return connection


app = ClientApp()


@app.query()
@app.train()
@app.evaluate()
def forward(message: Message, context: Context) -> Message:
    """Any message to the worker, and back."""
    try:
        path = str(context.node_config[SOCKET])
        return Message(ask(path, message.metadata.message_type, message.content), reply_to=message)
    except KeyError:
        error = f"this SuperNode was started without {SOCKET}; expected `flex node`"
    except FlexError as raised:
        error = str(raised)
    return Message(Error(code=CLIENT_RAISED, reason=error), reply_to=message)

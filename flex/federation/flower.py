"""The one door to Flower: what must stand before its import, the names this project uses, and its private parts.

Flower (flwr) reads its settings when it is imported, and its import raises deprecation warnings that are not ours
(typer and click), so every file takes Flower's names from here. Three things have no public form. They are below, each
in a function that says so when a release moves them; the tests run all of them.
"""

import importlib
import os
import warnings
from importlib.metadata import version
from types import SimpleNamespace

# Read by flwr at import. `setdefault`: somebody who wants the telemetry or the update check can still ask for it.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    from flwr.app import (
        Array,
        ArrayRecord,
        ConfigRecord,
        Context,
        Error,
        Message,
        MessageType,
        MetricRecord,
        RecordDict,
    )
    from flwr.clientapp import ClientApp
    from flwr.clientapp.typing import Mod
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import FedAvg as FlowerFedAvg
    from flwr.serverapp.strategy import FedProx as FlowerFedProx
    from flwr.serverapp.strategy import Strategy

__all__ = [
    "CLIENT_RAISED",
    "Array",
    "ArrayRecord",
    "ClientApp",
    "ConfigRecord",
    "Context",
    "Error",
    "FlowerFedAvg",
    "FlowerFedProx",
    "Grid",
    "Message",
    "MessageType",
    "MetricRecord",
    "Mod",
    "RecordDict",
    "ServerApp",
    "Strategy",
    "become_server",
    "empty_run",
    "secagg",
]

SERVER_NODE_ID = 1  # what Flower's own server calls itself
CLIENT_RAISED = 2  # the error code of Flower's nodes for "the ClientApp raised an exception"
TESTED = "1.41 and 1.42"


def become_server(run_id: int) -> None:
    """Lets this process write a `Message`, which asks Flower's TaskIdentity who writes; keeps one that is set."""
    try:
        from flwr.supercore.task_identity import TaskIdentity

        try:
            _ = TaskIdentity.run_id
        except RuntimeError:  # not set: no Flower process started us
            TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run_id, SERVER_NODE_ID, 0
        Message(RecordDict(), SERVER_NODE_ID, MessageType.QUERY)
    except (ImportError, AttributeError, RuntimeError, TypeError) as error:
        raise _moved("TaskIdentity (flwr.supercore.task_identity)") from error


def empty_run(run_id: int):
    """The `Run` that a Grid must be able to show: no bundle, no federation."""
    try:
        from flwr.supercore.run import Run

        return Run.create_empty(run_id)
    except (ImportError, AttributeError, TypeError) as error:
        raise _moved("Run.create_empty (flwr.supercore.run)") from error


def secagg() -> SimpleNamespace:
    """Flower's SecAgg+ (keys, shares of them, what unmasks): its client functions, which have no public form, the
    names of their records, and `combine_shares` of the server's side."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            client = importlib.import_module("flwr.client.mod.secure_aggregation.secaggplus_mod")
            shamir = importlib.import_module("flwr.common.secure_aggregation.crypto.shamir")
        return SimpleNamespace(
            State=client.SecAggPlusState,
            Key=client.Key,
            setup=client._setup,
            share_keys=client._share_keys,
            collect=client._collect_masked_vectors,
            unmask=client._unmask,
            no_tensors=client.Parameters([], "numpy.ndarray"),
            pair_key=lambda private, public: client.generate_shared_key(
                client.bytes_to_private_key(private), client.bytes_to_public_key(public)
            ),
            combine_shares=shamir.combine_shares,
        )
    except (ImportError, AttributeError, TypeError) as error:
        raise _moved("SecAgg+ (flwr.client.mod.secure_aggregation.secaggplus_mod)") from error


def _moved(part: str) -> RuntimeError:
    return RuntimeError(
        f"flwr {version('flwr')} has moved {part}, which the in-process engine needs; "
        f"expected a release like {TESTED}, which this project is tested with"
    )

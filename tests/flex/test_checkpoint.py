"""The server's file: a run that goes on from it gives the bits of one that was never stopped; a bad one is named."""

import errno
import os

import pytest
import torch
from safetensors.torch import save_file
from toy import CLIENTS, START, assert_same_bits, make_toy_app, strategy_of

from flex.errors import FlexError
from flex.federation.checkpoint import load_server, save_server
from flex.federation.local import InProcessGrid
from flex.federation.rounds import ClientFailed, run_rounds
from flex.federation.strategy import STRATEGIES, load_strategy_state, strategy_state


@pytest.mark.parametrize("clients_per_round", [0, 3])
@pytest.mark.parametrize("name", STRATEGIES)
def test_resume_gives_the_same_bits(name, clients_per_round, tmp_path):
    def fresh():
        return strategy_of(name, clients_per_round=clients_per_round)

    for folder in ("unbroken", "broken"):
        (tmp_path / folder).mkdir()
    unbroken = fresh()
    wanted = run_rounds(unbroken, InProcessGrid(make_toy_app(tmp_path / "unbroken"), CLIENTS), START, 10)

    # Stopped in the middle of round 6: some clients have trained and written their files already.
    first, file = fresh(), tmp_path / "server.safetensors"
    app = make_toy_app(tmp_path / "broken", fail="cleo", error=InterruptedError("power"), fail_from=6)
    with pytest.raises(ClientFailed, match="'cleo' failed in round 6"):
        run_rounds(
            first,
            InProcessGrid(app, CLIENTS),
            START,
            10,
            on_round=lambda r, shared, report: save_server(file, r, shared, first, {"seed": 7}),
        )
    done, shared, moments, header = load_server(file)
    assert (done, header) == (5, {"seed": 7})
    second = fresh()
    load_strategy_state(second, moments)
    grid = InProcessGrid(make_toy_app(tmp_path / "broken"), CLIENTS)
    came = run_rounds(second, grid, shared, 10, start_round=done + 1)
    assert_same_bits(came, wanted)
    assert_same_bits(strategy_state(second), strategy_state(unbroken))


@pytest.fixture
def saved(tmp_path):
    strategy = strategy_of("fedadam")
    grid = InProcessGrid(make_toy_app(tmp_path), CLIENTS)
    shared = run_rounds(strategy, grid, START, 2)
    path = tmp_path / "server" / "round-0002.safetensors"
    save_server(path, 2, shared, strategy, {"base": "abc"})
    return path, shared, strategy


def test_checkpoint_goes_round(saved):
    path, shared, strategy = saved
    done, came, moments, header = load_server(path)
    assert (done, header) == (2, {"base": "abc"})
    assert_same_bits(came, shared)
    assert_same_bits(moments, strategy_state(strategy))
    assert os.listdir(path.parent) == [path.name]


def test_a_bad_checkpoint_is_named(saved, tmp_path):
    path = saved[0]
    whole = path.read_bytes()
    with pytest.raises(FlexError, match="no state file at"):
        load_server(tmp_path / "nothing.safetensors")
    for cut in (0, 5, 100, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(FlexError, match="is damaged"):
            load_server(path)
    path.write_bytes(whole[:-2] + bytes([whole[-2] ^ 1]) + whole[-1:])  # one bit of one value
    with pytest.raises(FlexError, match="is damaged: its tensors are not those that were written"):
        load_server(path)
    path.write_bytes(b"PK\x03\x04 not ours at all")
    with pytest.raises(FlexError, match="is damaged or no safetensors file"):
        load_server(path)
    save_file({"w": torch.zeros(2)}, path)
    with pytest.raises(FlexError, match="has no FLEx header"):
        load_server(path)
    save_file({"w": torch.zeros(2)}, path, metadata={"flex": '{"client": "anna"}'})
    with pytest.raises(FlexError, match="is no server state"):
        load_server(path)


def test_a_full_disk_leaves_the_old_checkpoint(saved, monkeypatch):
    path, shared, strategy = saved
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FlexError, match=r"cannot write .*No space left on device"):
        save_server(path, 3, shared, strategy)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]

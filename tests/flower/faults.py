"""`make test-flower-all`: what can go wrong between sites, on real processes: the run goes on, or says in one sentence
why not; nobody's personal state is lost or swapped."""

import contextlib
import dataclasses
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import RUN_S, START_S, Federation, assert_same_run, federation, until
from tiny import save_model

from flex.config import config_text, read_config
from flex.deploy.certificates import make_ca, make_server
from flex.deploy.folder import KEYS
from flex.deploy.processes import environment as flower_environment
from flex.deploy.processes import free_port, program
from flex.deploy.shim import SOCKET

PAIR = ("farm", "clinic")
JOB = "flex-seed3"
MASKS = {"secure": True, "max_update_norm": 10.0}


def small(sites: Federation, strategy: dict | None = None, **train: object) -> None:
    """One method, two rounds: what is tested is not the training."""
    path = sites.example / "flex.toml"
    values = {"methods": ("flex",), "rounds": 2, "steps": 2, **train}
    config = read_config(path).with_values(
        train=values, strategy=strategy or {}, evaluate={"rouge": False}, data={"clients": sites.sites}
    )
    path.write_text(config_text(config))


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Federation]:
    with federation(tmp_path, PAIR) as sites:
        small(sites)
        yield sites


def at_work(sites: Federation) -> None:
    sites.server()
    sites.workers()
    for name in sites.sites:
        sites.node(name)


def embedded(sites: Federation) -> Path:
    sites.flex("train", sites.example / "flex.toml", "--output", sites.folder / "alone")
    return sites.folder / "alone"


def test_a_supernode_is_killed_and_started_again(pair):
    small(pair, rounds=4)
    pair.init()
    at_work(pair)
    run = pair.start("run", "deploy", "run", pair.fed)
    until("round 1", (pair.fed / "run" / JOB / "server" / "round-0001.safetensors").exists, RUN_S)
    dead = pair.running["node-clinic"]
    dead.kill()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(dead.pid, signal.SIGKILL)  # and what Flower started for it
    started = time.monotonic()
    until("the run notices", run.ended, RUN_S)
    print(f"a dead SuperNode shows after {time.monotonic() - started:.0f} s")
    assert run.popen.returncode == 2, run.log.read_text()
    assert run.said("client 'clinic' failed in round"), run.log.read_text()
    pair.node("clinic")
    pair.run()
    assert_same_run(embedded(pair), pair.fed / "run", pair.state, [JOB])


def test_a_site_that_is_late_is_waited_for(pair):
    pair.init()
    pair.server()
    pair.workers()
    pair.node("farm")
    run = pair.start("run", "deploy", "run", pair.fed)
    until("it says for whom it waits", lambda: run.said("waiting for clinic to connect"), RUN_S)
    pair.node("clinic")
    until("the run ends", run.ended, RUN_S)
    assert run.popen.returncode == 0, run.log.read_text()


def test_a_site_that_does_not_come_is_named(pair):
    pair.init()
    pair.server()
    pair.workers()
    pair.node("farm")
    said = pair.run(2, "--wait", "5")
    assert "clinic did not connect within 5 s; expected `flex node` to run there" in said


def test_a_slow_site_is_gone_on_without(pair):
    small(pair, rounds=3, skip_failed=True, timeout=25.0)
    pair.init()
    at_work(pair)
    run = pair.start("run", "deploy", "run", pair.fed)
    until("round 1", (pair.fed / "run" / JOB / "server" / "round-0001.safetensors").exists, RUN_S)
    clinic = pair.running["worker-clinic"]
    os.kill(clinic.pid, signal.SIGSTOP)  # alive, and not working
    until("round 2 without it", (pair.fed / "run" / JOB / "server" / "round-0002.safetensors").exists, RUN_S)
    os.kill(clinic.pid, signal.SIGCONT)
    until("the run ends", run.ended, RUN_S)
    assert run.popen.returncode == 0, run.log.read_text()
    log = (pair.fed / "run" / JOB / "metrics.jsonl").read_text()
    trained = [line for line in log.splitlines() if '"event": "train"' in line]
    assert not any('"round": 2' in line and '"clinic"' in line for line in trained)
    assert "no reply within 25" in log


@pytest.fixture
def masked(tmp_path: Path) -> Iterator[Federation]:
    """Three sites, the fewest that secure aggregation takes."""
    with federation(tmp_path) as sites:
        small(sites, MASKS)
        yield sites


def test_masks_cancel(masked):
    """Between real sites, to the bits of one machine."""
    masked.init()
    at_work(masked)
    masked.run()
    assert_same_run(embedded(masked), masked.fed / "run", masked.state, [JOB], masked=True)
    log = (masked.fed / "run" / JOB / "metrics.jsonl").read_text()
    assert log.count('"event": "secured"') == 2


def test_a_drop_out_under_masks(masked):
    small(masked, MASKS, rounds=3, skip_failed=True, timeout=40.0)
    masked.init()
    at_work(masked)
    run = masked.start("run", "deploy", "run", masked.fed)
    until("round 1", (masked.fed / "run" / JOB / "server" / "round-0001.safetensors").exists, RUN_S)
    workshop = masked.running["worker-workshop"]
    os.kill(workshop.pid, signal.SIGSTOP)
    until("round 2 without it", (masked.fed / "run" / JOB / "server" / "round-0002.safetensors").exists, RUN_S)
    os.kill(workshop.pid, signal.SIGCONT)
    until("the run ends", run.ended, RUN_S)
    assert run.popen.returncode == 0, run.log.read_text()
    log = (masked.fed / "run" / JOB / "metrics.jsonl").read_text()
    left_out = [line for line in log.splitlines() if '"event": "left_out"' in line]
    assert any('"round": 2' in line and '"workshop"' in line for line in left_out), log


def test_two_supernodes_with_one_key(pair):
    """Flower lets one of them in; the other says so or waits, and the run is that of two sites."""
    pair.init()
    at_work(pair)
    twin = pair.start("twin", "node", pair.package("farm"), "--home", pair.folder / "twin-home")
    said = pair.run()
    assert "FLEx" in said
    log = (pair.fed / "run" / JOB / "metrics.jsonl").read_text()
    assert sum('"event": "train"' in line for line in log.splitlines()) == 4  # two sites, two rounds
    twin.end()


def test_a_site_with_another_base_is_named(pair):
    pair.init()
    save_model(pair.folder / "other")
    pair.server()
    pair.worker("farm")
    own = pair.example / "clinic"
    words = ("worker", pair.package("clinic"), "--model", pair.folder / "other", "--data", own / "train.jsonl")
    pair.start("worker-clinic", *words, "--test", own / "test.jsonl")
    pair.until_at_work(*PAIR)
    for name in PAIR:
        pair.node(name)
    said = pair.run(2)
    assert "the clients differ in base ('farm' has " in said


def test_an_old_package_is_refused_by_name(pair):
    pair.init()
    shutil.copytree(pair.package("clinic"), pair.folder / "old")
    path = pair.example / "flex.toml"
    path.write_text(config_text(read_config(path).with_values(train={"learning_rate": 1e-3})))
    pair.flex("deploy", "update", pair.fed, path)
    pair.server()
    pair.worker("farm")
    own = pair.example / "clinic"
    words = ("worker", pair.folder / "old", "--model", pair.example / "model", "--data", own / "train.jsonl")
    pair.start("worker-clinic", *words)
    pair.until_at_work(*PAIR)
    pair.node("farm")
    pair.start("node-clinic", "node", pair.folder / "old")
    said = pair.run(2)
    assert "site 'clinic' has the package of run" in said
    assert "expected the package that `flex deploy` made last" in said


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to mount a small disk")
def test_a_full_disk_at_a_site(pair):
    pair.init()
    disk = pair.folder / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], check=True)
    try:
        pair.server()
        pair.worker("farm")
        pair.worker("clinic", "--state", disk / "state")
        pair.until_at_work(*PAIR)
        for name in PAIR:
            pair.node(name)
        said = pair.run(2)
        assert "client 'clinic' failed in round 1 (train): cannot write" in said
        assert "No space left on device" in said
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        pair.run()
    finally:
        pair.end()
        subprocess.run(["umount", str(disk)], check=True)


class Relay:
    """A relay between a site and the server that changes one byte of every answer once it has been told to."""

    def __init__(self, port: int):
        self.port, self.changing, self.closing = port, threading.Event(), threading.Event()
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.socket.settimeout(0.2)
        self.own_port = self.socket.getsockname()[1]
        self.changed = 0
        self.thread = threading.Thread(target=self._accept, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.closing.set()
        self.thread.join()
        self.socket.close()

    def _accept(self) -> None:
        while not self.closing.is_set():
            try:
                site, _ = self.socket.accept()
            except TimeoutError:
                continue
            server = socket.create_connection(("127.0.0.1", self.port))
            for one, other, change in ((site, server, False), (server, site, True)):
                threading.Thread(target=self._pass_on, args=(one, other, change), daemon=True).start()

    def _pass_on(self, one: socket.socket, other: socket.socket, change: bool) -> None:
        try:
            while data := one.recv(65536):
                if change and self.changing.is_set() and len(data) > 40:
                    data = data[:-20] + bytes([data[-20] ^ 1]) + data[-19:]
                    self.changed += 1
                other.sendall(data)
        except OSError:
            pass
        finally:
            for end in (one, other):
                end.close()


def test_bytes_changed_on_the_way_are_noticed(pair):
    """TLS refuses the record; the site connects again when the relay is honest, and the run has the right bits."""
    small(pair, rounds=3)
    pair.init()
    pair.server()
    pair.workers()
    relay = Relay(pair.port)
    try:
        site = pair.package("clinic") / "site.toml"
        site.write_text(site.read_text().replace(f":{pair.port}", f":{relay.own_port}"))
        pair.node("farm")
        pair.node("clinic")
        run = pair.start("run", "deploy", "run", pair.fed)
        until("round 1", (pair.fed / "run" / JOB / "server" / "round-0001.safetensors").exists, RUN_S)
        relay.changing.set()
        until("something was changed", lambda: relay.changed > 2, START_S)
        relay.changing.clear()
        until("the run ends", run.ended, RUN_S)
        if run.popen.returncode:  # the message was lost for good: the next call does that round again
            assert run.said("client 'clinic' failed in round"), run.log.read_text()
            pair.run()
        assert_same_run(embedded(pair), pair.fed / "run", pair.state, [JOB])
    finally:
        pair.end()
        relay.close()


def stranger(pair: Federation, *options: str) -> None:
    """A SuperNode of somebody else gets nowhere: it ends, or tries in vain for as long as it is let."""
    log = pair.folder / f"stranger-{len(options)}-{options[0].strip('-')}.log"
    command = [program("flower-supernode"), "--superlink", f"127.0.0.1:{pair.port}", "--host", "127.0.0.1"]
    with log.open("wb") as out:
        tried = subprocess.Popen(
            [*command, "--port", str(free_port()), *options],
            env=flower_environment(pair.folder / "stranger"),
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
        try:
            failing = ("Connection attempt failed", "Failed to")
            until("it fails", lambda: tried.poll() is not None or any(w in log.read_text() for w in failing))
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(tried.pid, signal.SIGKILL)
            tried.wait()
    told = pair.flex("worker", pair.package("farm"), "--log", code=2)
    assert "no record at" in told  # nobody has asked the worker anything


def test_a_wrong_ca_an_expired_certificate_plain_text_and_a_taken_port(pair):
    pair.init()
    pair.server()
    own = pair.package("farm")

    make_ca(pair.folder / "k", own / "ca.crt")
    assert "does not vouch for it" in pair.flex("node", own, code=2)
    shutil.copyfile(pair.fed / KEYS / "ca.crt", own / "ca.crt")
    assert "no worker at" in pair.flex("node", own, code=2)

    # Somebody who speaks no TLS, straight with Flower's own program.
    values = f'{SOCKET}="{own / "x.sock"}" partition-id=0'
    stranger(pair, "--insecure", "--node-config", values)
    # ... and who speaks TLS but has no key.
    stranger(pair, "--root-certificates", str(own / "ca.crt"), "--node-config", values)

    assert "Address already in use" in pair.flex("deploy", "server", pair.fed, "--listen", "127.0.0.1", code=2)
    pair.running.pop("server").end()
    assert "no server at" in pair.flex("node", own, "--wait", "0", code=2)
    assert "no server at" in pair.flex("deploy", "run", pair.fed, "--wait", "0", code=2)
    keys = pair.fed / KEYS
    make_server(keys / "ca.key", keys / "ca.crt", "127.0.0.1", keys / "server.key", keys / "server.crt", days=-1)
    assert "not now; expected a new one" in pair.flex("deploy", "server", pair.fed, "--listen", "127.0.0.1", code=2)


def test_a_model_folder_that_is_missing_and_a_changed_configuration(pair):
    pair.init()
    own = pair.example / "farm"
    words = ["worker", pair.package("farm"), "--data", own / "train.jsonl"]
    assert "no folder at model.path" in pair.flex(*words, "--model", pair.folder / "nowhere", code=2)
    assert "no data file at" in pair.flex(
        "worker", pair.package("farm"), "--model", pair.example / "model", "--data", pair.folder / "no.jsonl", code=2
    )
    path = pair.example / "flex.toml"
    changed = dataclasses.replace(read_config(path), threads=1).with_values(train={"steps": 3})
    path.write_text(config_text(changed))
    pair.flex("deploy", "update", pair.fed, path)
    said = pair.flex(*words, "--model", pair.example / "model", code=2)
    assert "train.steps: 2 before, 3 now" in said
    assert "--accept" in said

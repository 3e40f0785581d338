"""The coordinator's folder and a site's package: what is in them, who can read it, and what is refused."""

import os
import socket
import ssl
import stat
import subprocess
import tarfile
import threading
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from flex.cli import main
from flex.config import RunConfig, read_config, write_config
from flex.deploy.certificates import (
    check_dates,
    check_server,
    make_ca,
    make_node_key,
    make_server,
    read_public_key,
)
from flex.deploy.folder import init, read_deployment, update
from flex.deploy.package import read_package, split_address
from flex.deploy.processes import check_port, free_port
from flex.deploy.worker import with_own
from flex.errors import FlexError
from flex.federation.agreement import settings_digest

CONFIG = RunConfig(threads=2).with_values(
    model={"path": "/secret/model", "device": "cuda:3"},
    data={"train": "/secret/train.jsonl", "general": "/secret/general.jsonl", "clients": ("x",)},
    train={"learning_rate": 0.25},
    evaluate={"batch_size": 5},
)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def made(folder: Path, sites=("north", "south"), keys=None, wheels=None):
    return init(folder / "fed", CONFIG, "flex.example:8000", sites, keys or {}, wheels)


def test_a_package_has_what_a_site_needs_and_no_paths(tmp_path):
    deployment = made(tmp_path)
    folder = deployment.folder / "packages" / "south"
    package = read_package(folder)
    assert (package.name, package.address, package.run) == ("south", "flex.example:8000", deployment.run_name)
    assert package.config.data.clients == ("north", "south")
    assert package.config.train.learning_rate == 0.25
    assert (package.config.evaluate.batch_size, package.config.threads) == (5, 2)
    everything = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert b"/secret" not in everything
    assert b"cuda:3" not in everything
    assert (folder / "ca.crt").read_bytes() == deployment.ca.read_bytes()
    assert sorted(path.name for path in (folder / "units").iterdir()) == ["flex-node.service", "flex-worker.service"]
    with tarfile.open(deployment.folder / "packages" / "south.tar.gz") as tar:
        assert {"south/site.toml", "south/flex.toml", "south/ca.crt", "south/node.key"} <= set(tar.getnames())
        assert not any("ca.key" in name or "server.key" in name for name in tar.getnames())
    assert (deployment.folder / "units" / "flex-server.service").exists()


def test_who_unpacks_a_package_owns_it(tmp_path):
    """A user id of the coordinator's machine is somebody else on the site's."""
    deployment = made(tmp_path)
    if os.getuid() == 0:
        os.chown(deployment.folder / "packages" / "south" / "README", 12345, 12345)
    update(deployment.folder, CONFIG, (), {}, None)
    with tarfile.open(deployment.folder / "packages" / "south.tar.gz") as tar:
        assert {(e.uid, e.gid, e.uname, e.gname) for e in tar.getmembers()} == {(0, 0, "root", "root")}


def test_what_a_run_is_anchored_to_is_named_by_each_site(tmp_path):
    config = CONFIG.with_values(anchor={"text": "/secret/anchors.txt", "weight": 0.5})
    deployment = init(tmp_path / "fed", config, "flex.example:8000", ("north", "south"), {}, None)
    folder = deployment.folder / "packages" / "south"
    everything = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert b"/secret" not in everything
    package = read_package(folder)
    assert package.config.anchors.weight == 0.5
    moved = deployment.config.with_values(anchor={"text": "elsewhere.txt"})
    assert package.digest == settings_digest(moved)  # a site is held against the run, and not against a path
    assert "--anchors ${ANCHORS}" in (folder / "units" / "flex-worker.service").read_text()
    assert "--anchors FILE" in (folder / "README").read_text()
    own = ["model.path='m'", "data.train='d'"]
    with pytest.raises(FlexError, match=r"no anchors are named, but this run holds .*; expected --anchors FILE"):
        with_own(package, own)
    held = with_own(package, [*own, "anchor.text='mine.txt'"])
    assert (held.anchor.text, settings_digest(held)) == ("mine.txt", package.digest)
    again = update(deployment.folder, read_config(deployment.folder / "flex.toml"), (), {}, None)
    assert again.run_name == deployment.run_name

    plain = read_package(made(tmp_path / "plain").folder / "packages" / "south")
    assert "anchors" not in (plain.folder / "units" / "flex-worker.service").read_text()
    with pytest.raises(FlexError, match=r"--anchors names a text, but this run has no anchor; expected none"):
        with_own(plain, [*own, "anchor.text='mine.txt'"])
    off = CONFIG.with_values(anchor={"text": "/secret/anchors.txt", "what": "none"})
    bare = init(tmp_path / "off", off, "flex.example:8000", ("north",), {}, None)
    assert b"/secret" not in (bare.folder / "packages" / "north" / "flex.toml").read_bytes()
    assert with_own(read_package(bare.folder / "packages" / "north"), own).anchors is None


def test_the_files_of_tasks_are_named_by_each_site(tmp_path):
    tasks = {"tasks": ("test", "mmlu", "cloze"), "mmlu": "/secret/mmlu", "text": "/secret/text.txt"}
    deployment = init(tmp_path / "fed", CONFIG.with_values(evaluate=tasks), "flex.example:8000", ["north"], {}, None)
    folder = deployment.folder / "packages" / "north"
    assert "secret" not in (folder / "flex.toml").read_text()
    package = read_package(folder)
    own = ["model.path='m'", "data.train='d'", "evaluate.mmlu='here'"]
    with pytest.raises(FlexError, match=r"scores cloze, but no file .*; expected --set evaluate\.text=PATH"):
        with_own(package, own)
    config = with_own(package, [*own, "evaluate.text='t.txt'"])
    assert (config.evaluate.mmlu, config.evaluate.text, config.evaluate.gsm8k) == ("here", "t.txt", "")
    assert settings_digest(config) == package.digest


def test_a_worker_without_anchors_says_so_and_with_them_goes_on(tmp_path, capsys):
    config = CONFIG.with_values(anchor={"text": "site"}, model={"path": ""})
    deployment = init(tmp_path / "fed", config, "flex.example:8000", ("north",), {}, None)
    (tmp_path / "data.jsonl").write_text('{"instruction": "a", "response": "b"}\n' * 20)
    command = ["worker", str(deployment.folder / "packages" / "north"), "--model", str(tmp_path / "model")]
    command += ["--data", str(tmp_path / "data.jsonl")]
    assert main(command) == 2
    assert "no anchors are named, but this run holds its sites to the base on general text" in capsys.readouterr().err
    assert main([*command, "--anchors", str(tmp_path / "mine.txt")]) == 2
    said = capsys.readouterr().err
    assert "anchors are named" not in said
    assert str(tmp_path / "model") in said  # which is what it looks for next


def test_secrets_are_their_owners_alone(tmp_path):
    deployment = made(tmp_path)
    assert mode(deployment.folder / "keys") == 0o700
    for path in (deployment.folder / "keys").glob("*.key"):
        assert mode(path) == 0o600
    for name in deployment.sites:
        assert mode(deployment.folder / "packages" / name / "node.key") == 0o600
        assert mode(deployment.folder / "packages" / f"{name}.tar.gz") == 0o600


def test_a_site_that_sent_its_public_key_keeps_the_other_half(tmp_path):
    make_node_key(tmp_path / "own", tmp_path / "own.pub")
    deployment = made(tmp_path, keys={"north": tmp_path / "own.pub"})
    package = deployment.folder / "packages" / "north"
    assert not (package / "node.key").exists()
    assert (package / "node.pub").read_bytes() == (tmp_path / "own.pub").read_bytes()
    assert "--key FILE" in (package / "README").read_text()
    assert (deployment.folder / "packages" / "south" / "node.key").exists()


def test_a_key_that_ssh_keygen_made_is_taken(tmp_path):
    command = ["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-C", "ward 7", "-f", str(tmp_path / "k")]
    try:
        subprocess.run(command, check=True)
    except FileNotFoundError:
        pytest.skip("needs ssh-keygen")
    assert read_public_key(tmp_path / "k.pub").startswith(b"ecdsa-sha2-nistp384 ")
    with pytest.raises(FlexError, match="is a private key, which must not leave its site"):
        read_public_key(tmp_path / "k")


def test_other_keys_are_refused(tmp_path):
    with pytest.raises(FlexError, match=r"cannot read the public key .*No such file"):
        read_public_key(tmp_path / "nowhere.pub")
    (tmp_path / "odd.pub").write_text("hello\n")
    with pytest.raises(FlexError, match=r"is no public key; expected the public half of `ssh-keygen -t ecdsa"):
        read_public_key(tmp_path / "odd.pub")
    key = ed25519.Ed25519PrivateKey.generate().public_key()
    (tmp_path / "ed.pub").write_bytes(key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH))
    with pytest.raises(FlexError, match="is not an ECDSA key"):
        read_public_key(tmp_path / "ed.pub")
    pem = ec.generate_private_key(ec.SECP384R1()).public_key()
    (tmp_path / "p.pub").write_bytes(pem.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    assert read_public_key(tmp_path / "p.pub").startswith(b"ecdsa-sha2-nistp384 ")


def test_an_update_makes_another_run_and_keeps_the_keys(tmp_path):
    old = made(tmp_path, sites=("north", "south"))
    key = (old.folder / "packages" / "north" / "node.key").read_bytes()
    certificate = (old.folder / "keys" / "server.crt").read_bytes()
    old.run.mkdir()
    (old.run / "something").write_text("kept")
    new = update(old.folder, CONFIG.with_values(train={"steps": 7}), ["north", "west"], {}, None)
    assert new.run_name != old.run_name
    assert new.sites == ("north", "west")
    assert (old.folder / f"run-{old.run_name}" / "something").read_text() == "kept"
    assert (old.folder / "packages" / "north" / "node.key").read_bytes() == key
    assert (old.folder / "keys" / "server.crt").read_bytes() != certificate
    names = sorted(path.name for path in (old.folder / "packages").iterdir())
    assert names == ["north", "north.tar.gz", "west", "west.tar.gz"]
    assert sorted(path.name for path in (old.folder / "sites").iterdir()) == ["north.pub", "west.pub"]
    assert read_package(old.folder / "packages" / "north").config.train.steps == 7


def test_an_update_that_only_grows_goes_on_with_the_run(tmp_path):
    old = made(tmp_path, sites=("north", "south"))
    old.run.mkdir()
    more = CONFIG.with_values(train={"rounds": 200, "methods": ("flex", "fedavg"), "seeds": (0, 1)})
    new = update(old.folder, more, ["north", "west"], {}, None)
    assert new.run_name == old.run_name
    assert old.run.exists()
    joins = {name: read_package(old.folder / "packages" / name).joins for name in new.sites}
    assert joins == {"north": False, "west": True}
    assert update(old.folder, more.with_values(train={"rounds": 100}), [], {}, None).run_name != old.run_name


def test_wheels_go_into_every_package(tmp_path):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with pytest.raises(FlexError, match="holds no wheels"):
        made(tmp_path / "a", wheels=wheels)
    (wheels / "flex_moe-1-py3-none-any.whl").write_bytes(b"PK")
    deployment = made(tmp_path / "b", wheels=wheels)
    for name in deployment.sites:
        assert (deployment.folder / "packages" / name / "wheels" / "flex_moe-1-py3-none-any.whl").exists()
    assert "--no-index" in (deployment.folder / "packages" / "north" / "README").read_text()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--address", "here", "--sites", "a"], "the address is 'here'; expected HOST:PORT"),
        (["--address", "here:99999", "--sites", "a"], "expected HOST:PORT"),
        (["--address", "h:1", "--sites", "a", "a"], "--sites names 'a' twice"),
        (["--address", "h:1", "--sites", "../a"], "the site '../a' cannot name a folder"),
        (["--address", "h:1", "--sites", "a", "--key", "a"], "--key got 'a'; expected NAME=FILE.pub"),
        (["--address", "h:1", "--sites", "a", "--key", "b=c.pub"], r"--key names \['b'\], which --sites does not"),
        (["--address", "h:1", "--sites", "a", "--set", "train.rouns=3"], "did you mean train.rounds"),
        (
            ["--address", "h:1", "--sites", "a", "b", "--set", "strategy.secure=true"],
            "hides one client among 2 a round",
        ),
        (["--address", "h:1", "--sites", "a", "b", "--set", 'strategy.aggregate="median"'], "with 2 clients a round"),
        (["--address", "h:1", "--sites", "a", "--set", "train.clients_per_round=2"], "clients_per_round is 2"),
        (["--address", "h:1", "--sites", "a", "--wheels", "/nowhere"], "/nowhere holds no wheels"),
    ],
)
def test_bad_input_leaves_nothing_behind(tmp_path, capsys, arguments, sentence):
    write_config(CONFIG, tmp_path / "flex.toml")
    assert main(["deploy", "init", str(tmp_path / "fed"), str(tmp_path / "flex.toml"), *arguments]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    with pytest.raises(FlexError, match=sentence):
        raise FlexError(said)
    assert not (tmp_path / "fed").exists()


def test_a_folder_that_cannot_be_written_is_a_sentence(tmp_path, capsys):
    write_config(CONFIG, tmp_path / "flex.toml")
    command = ["deploy", "init", "/proc/fed", str(tmp_path / "flex.toml"), "--address", "h:1", "--sites", "a"]
    assert main(command) == 2
    assert capsys.readouterr().err.startswith("flex: cannot read or write /proc/fed (No such file or directory)")


def test_an_update_with_too_few_sites_changes_nothing(tmp_path):
    deployment = init(tmp_path / "fed", CONFIG, "h:1", ("a", "b", "c"), {}, None)
    secure = CONFIG.with_values(strategy={"secure": True})
    with pytest.raises(FlexError, match="hides one client among 2 a round"):
        update(deployment.folder, secure, ("a", "b"), {}, None)
    assert read_deployment(deployment.folder) == deployment


def test_a_drawn_split_is_refused(tmp_path):
    drawn = RunConfig().with_values(data={"split": "iid", "num_clients": 2})
    with pytest.raises(FlexError, match=r"data.split is 'iid', which draws clients from one file"):
        init(tmp_path / "fed", drawn, "h:1", ["a"], {}, None)
    assert not (tmp_path / "fed").exists()


def test_init_prints_where_the_packages_are_and_takes_no_used_folder(tmp_path, capsys):
    write_config(CONFIG, tmp_path / "flex.toml")
    command = ["deploy", "init", str(tmp_path / "fed"), str(tmp_path / "flex.toml")]
    command += ["--address", "10.0.0.5:8000", "--sites", "a", "b", "--set", "train.rounds=5"]
    assert main(command) == 0
    assert "a.tar.gz" in capsys.readouterr().out
    assert read_config(tmp_path / "fed" / "flex.toml").train.rounds == 5
    assert main(command) == 2
    assert "is not empty" in capsys.readouterr().err
    assert read_deployment(tmp_path / "fed").sites == ("a", "b")


def test_what_is_no_federation_and_no_package(tmp_path, capsys):
    for action in ("server", "run"):
        assert main(["deploy", action, str(tmp_path)]) == 2
        assert "no federation at" in capsys.readouterr().err
    for command in (["worker", "--model", "m", "--data", "d"], ["node"]):
        assert main([command[0], str(tmp_path), *command[1:]]) == 2
        assert "no package at" in capsys.readouterr().err
    package = made(tmp_path).folder / "packages" / "north"
    with pytest.raises(FlexError, match=r"is a file; expected the folder that `tar xf"):
        read_package(package.with_name("north.tar.gz"))
    (package / "ca.crt").unlink()
    with pytest.raises(FlexError, match=r"has no ca.crt"):
        read_package(package)
    (package / "site.toml").write_text('format = 9\nname = "north"\n')
    with pytest.raises(FlexError, match="has format 9; this version reads format 1"):
        read_package(package)


@pytest.mark.parametrize(("text", "pair"), [("a.b:80", ("a.b", 80)), ("[::1]:8000", ("::1", 8000))])
def test_addresses(text, pair):
    assert split_address(text) == pair


class Listening:
    """A server at a free port of this machine: with TLS, or without."""

    def __init__(self, key: Path | None = None, certificate: Path | None = None):
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.socket.settimeout(5)
        self.port = self.socket.getsockname()[1]
        self.context = None
        if key is not None:
            self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self.context.load_cert_chain(certificate, key)
        self.thread = threading.Thread(target=self._answer)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.thread.join()
        self.socket.close()

    def _answer(self):
        connection, _ = self.socket.accept()
        with connection:
            try:
                if self.context:
                    self.context.wrap_socket(connection, server_side=True).close()
                else:
                    connection.recv(1000)
                    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            except (OSError, ssl.SSLError):
                pass  # the other side hangs up: that is what is tested


def test_a_server_that_is_what_it_should_be(tmp_path):
    make_ca(tmp_path / "ca.key", tmp_path / "ca.crt")
    make_server(tmp_path / "ca.key", tmp_path / "ca.crt", "127.0.0.1", tmp_path / "s.key", tmp_path / "s.crt")
    with Listening(tmp_path / "s.key", tmp_path / "s.crt") as server:
        check_server("127.0.0.1", server.port, tmp_path / "ca.crt")
    with Listening(tmp_path / "s.key", tmp_path / "s.crt") as server:
        check_server("localhost", server.port, tmp_path / "ca.crt")
    check_dates(tmp_path / "s.crt")


def test_servers_that_are_not(tmp_path):
    make_ca(tmp_path / "ca.key", tmp_path / "ca.crt")
    make_ca(tmp_path / "other.key", tmp_path / "other.crt")
    make_server(tmp_path / "ca.key", tmp_path / "ca.crt", "127.0.0.1", tmp_path / "s.key", tmp_path / "s.crt")
    make_server(tmp_path / "ca.key", tmp_path / "ca.crt", "h", tmp_path / "old.key", tmp_path / "old.crt", days=-1)
    stranger = pytest.raises(FlexError, match=r"is not trusted: .*other.crt does not vouch for it")
    with Listening(tmp_path / "s.key", tmp_path / "s.crt") as server, stranger:
        check_server("127.0.0.1", server.port, tmp_path / "other.crt")
    expired = pytest.raises(FlexError, match="its certificate has expired; expected the coordinator to renew it")
    with Listening(tmp_path / "old.key", tmp_path / "old.crt") as server, expired:
        check_server("127.0.0.1", server.port, tmp_path / "ca.crt")
    with Listening() as server, pytest.raises(FlexError, match="speaks no TLS; expected the one that"):
        check_server("127.0.0.1", server.port, tmp_path / "ca.crt")
    port = free_port()
    with pytest.raises(FlexError, match=rf"no server at 127.0.0.1:{port} \(Connection refused\)"):
        check_server("127.0.0.1", port, tmp_path / "ca.crt")
    (tmp_path / "odd.crt").write_text("hello")
    with pytest.raises(FlexError, match="is no certificate"):
        check_server("127.0.0.1", port, tmp_path / "odd.crt")
    with pytest.raises(FlexError, match=r"old.crt is valid from .*, not now; expected a new one"):
        check_dates(tmp_path / "old.crt")


def test_a_port_that_is_taken(tmp_path):
    with Listening() as server:
        with pytest.raises(FlexError, match=r"cannot listen at 127.0.0.1:\d+ \(Address already in use\)"):
            check_port("127.0.0.1", server.port)
        make_ca(tmp_path / "k", tmp_path / "c")
        with pytest.raises(FlexError, match="speaks no TLS"):
            check_server("127.0.0.1", server.port, tmp_path / "c")
    check_port("127.0.0.1", free_port())

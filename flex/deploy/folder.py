"""The coordinator's folder: certificates, the configuration, a package a site, the run.

deploy.toml            address, the run's name, sites with their public keys
flex.toml              the configuration, without anybody's paths
keys/                  CA, server (secret)
sites/NAME.pub         the sites' public keys
packages/NAME(.tar.gz) what each site gets
units/                 the server's systemd unit
server/                Flower's database and homes, node ids by site
run/                   what `flex report` reads
"""

import dataclasses
import secrets
import shutil
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from flex.config import AT_SITES, SPLITS, RunConfig, config_text, parse_config, read_config, to_toml
from flex.deploy.certificates import make_ca, make_node_key, make_server, read_public_key
from flex.deploy.package import (
    CA,
    CONFIG,
    KEY,
    PUBLIC_KEY,
    UNITS,
    WHEELS,
    Package,
    read_toml,
    split_address,
    write_package,
)
from flex.deploy.units import server_unit, site_units
from flex.errors import require
from flex.federation.agreement import PATHS, TASK_FILES
from flex.store.files import SIMPLE_NAME

DEPLOY, KEYS, SITES, PACKAGES, SERVER, RUN = "deploy.toml", "keys", "sites", "packages", "server", "run"
FORMAT = 1  # of deploy.toml
LISTEN = "0.0.0.0"
README = """The package of site {name}.

Unpack it on the site's machine, where flex is installed{wheels}. For a trial, as one user:

    flex worker {name} --model MODEL --data FILE{anchors} --with-node

For real, with two users: docs/deploy.md of flex, section "A site", and units/ here. {key}
"""


@dataclass(frozen=True)
class Deployment:
    """A federation as its coordinator has it. `sites`: those of the configuration, in its order."""

    folder: Path
    address: str
    run_name: str
    config: RunConfig

    @property
    def sites(self) -> tuple[str, ...]:
        return self.config.data.clients

    @property
    def port(self) -> int:
        return split_address(self.address)[1]

    @property
    def run(self) -> Path:
        return self.folder / RUN

    @property
    def ca(self) -> Path:
        return self.folder / KEYS / CA

    def public_key(self, name: str) -> Path:
        return self.folder / SITES / f"{name}.pub"


def read_deployment(folder: Path) -> Deployment:
    """Raises FlexError where `folder` is none."""
    path = folder / DEPLOY
    values = read_toml(path, f"no federation at {folder}; expected a folder that `flex deploy init` made")
    require(values.get("format") == FORMAT, f"{path} has format {values.get('format')!r}; this version reads {FORMAT}")
    folder = folder.absolute()
    config = dataclasses.replace(read_config(folder / CONFIG), output=str(folder / RUN))
    return Deployment(folder, str(values["address"]), str(values["run"]), config)


def without_paths(config: RunConfig, sites: Sequence[str]) -> RunConfig:
    """The configuration as it travels: no path, no device, the sites in their order."""
    bare = RunConfig()
    own: dict[str, dict[str, object]] = {}
    for section, _, key in (name.rpartition(".") for name in PATHS):
        own.setdefault(section, {})[key] = getattr(getattr(bare, section), key)
    require(
        not SPLITS[config.data.split],
        f"data.split is {config.data.split!r}, which draws clients from one file; expected none: sites bring their own",
    )
    own["data"] |= {"clients": tuple(sites), "split": bare.data.split}
    # Whether there is an anchor, and what is scored, is everybody's; where the files of it lie is each site's.
    for section, _, key in (name.rpartition(".") for name in ("anchor.text", *sorted(TASK_FILES))):
        own.setdefault(section, {})[key] = AT_SITES if getattr(getattr(config, section), key) else ""
    return dataclasses.replace(config.with_values(**own), output=bare.output, workers=bare.workers)


def init(
    folder: Path, config: RunConfig, address: str, sites: Sequence[str], keys: Mapping[str, Path], wheels: Path | None
) -> Deployment:
    """A new federation.

    Raises:
        FlexError: `folder` is not empty, or a name, an address or a key is not what it should be, or so many sites are
            too few for how the configuration averages. Nothing has been written then.
    """
    host, _ = split_address(address)
    require(
        not folder.exists() or not any(folder.iterdir()), f"{folder} is not empty; expected a folder that is not there"
    )
    _check_sites(sites, keys)
    _check_strategy(without_paths(config, sites))
    found = _wheels_in(wheels)
    public = {name: read_public_key(path) for name, path in keys.items()}
    secret = folder / KEYS
    secret.mkdir(parents=True)
    secret.chmod(0o700)
    make_ca(secret / "ca.key", secret / CA)
    make_server(secret / "ca.key", secret / CA, host, secret / "server.key", secret / "server.crt")
    return _lay_out(folder, config, address, sites, public, found)


def update(
    folder: Path, config: RunConfig, sites: Sequence[str], keys: Mapping[str, Path], wheels: Path | None
) -> Deployment:
    """New packages and a new certificate. With more rounds, methods, seeds or other sites the run goes on; any other
    change makes it another run, and the last one's folder stays as `run-<its name>`."""
    from flex.runs.run import changes  # the trainer's imports take seconds, which the other commands do not need

    old = read_deployment(folder)
    sites = sites or old.sites
    _check_sites(sites, keys)
    bare = without_paths(config, sites)
    _check_strategy(bare)
    found = _wheels_in(wheels)
    public = {name: read_public_key(path) for name, path in keys.items()}
    goes_on = not changes(old.config, bare) and bool(set(sites) & set(old.sites))
    if old.run.exists() and not goes_on:
        old.run.rename(old.folder / f"{RUN}-{old.run_name}")
    secret = folder / KEYS
    host, _ = split_address(old.address)
    make_server(secret / "ca.key", secret / CA, host, secret / "server.key", secret / "server.crt")
    for name in set(old.sites) - set(sites):
        old.public_key(name).unlink(missing_ok=True)
    return _lay_out(folder, config, old.address, sites, public, found, old if goes_on else None)


def _check_sites(sites: Sequence[str], keys: Mapping[str, Path]) -> None:
    require(bool(sites), "no site is named; expected --sites NAME...")
    for name in sites:
        good = bool(SIMPLE_NAME.fullmatch(name)) and len(name) <= 64
        require(good, f"the site {name!r} cannot name a folder; expected letters, digits, spaces, '_', '-' or '.'")
    twice = [name for index, name in enumerate(sites) if name in sites[:index]]
    require(not twice, f"--sites names {twice[0] if twice else ''!r} twice; expected each site once")
    strangers = [name for name in keys if name not in sites]
    require(not strangers, f"--key names {strangers}, which --sites does not; expected {', '.join(sites)}")


def _check_strategy(config: RunConfig) -> None:
    """Refuses now what the server would refuse when every site stands ready: too few sites to hide or outvote one."""
    from flex.federation.strategy import configured_strategy  # Flower takes a second to import

    for method in config.train.methods:
        configured_strategy(config, method, len(config.data.clients))


def _wheels_in(folder: Path | None) -> list[Path]:
    found = sorted(folder.glob("*.whl")) if folder else []
    require(folder is None or bool(found), f"{folder} holds no wheels; expected what `pip wheel -w {folder} .` made")
    return found


def _lay_out(
    folder: Path,
    config: RunConfig,
    address: str,
    sites: Sequence[str],
    public: Mapping[str, bytes],
    wheels: Sequence[Path],
    goes_on: Deployment | None = None,
) -> Deployment:
    """Writes everything but the certificates. `goes_on`: what the federation was, where its run goes on."""
    run_name = goes_on.run_name if goes_on else secrets.token_hex(4)
    text = config_text(without_paths(config, sites))
    (folder / SITES).mkdir(exist_ok=True)
    (folder / SERVER).mkdir(exist_ok=True)
    (folder / CONFIG).write_text(text, encoding="utf-8")
    values = {"format": FORMAT, "address": address, "run": run_name, "base": config.model.path}
    body = "".join(f"{key} = {to_toml(value)}\n" for key, value in values.items())
    (folder / DEPLOY).write_text(body, encoding="utf-8")
    (folder / UNITS).mkdir(exist_ok=True)
    unit = server_unit(str(folder.absolute()), LISTEN)
    (folder / UNITS / "flex-server.service").write_text(unit, encoding="utf-8")
    for name in sites:
        joins = goes_on is not None and goes_on.run.exists() and name not in goes_on.sites
        package = Package(folder / PACKAGES / name, name, address, run_name, parse_config(text), joins)
        _pack(folder, package, text, public.get(name), wheels)
    for path in (folder / PACKAGES).iterdir():
        if path.name.removesuffix(".tar.gz") not in sites:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return read_deployment(folder)


def _pack(folder: Path, package: Package, text: str, public: bytes | None, wheels: Sequence[Path]) -> None:
    """One site's package, as a folder and a file; a key pair that was made before stays."""
    path, name = package.folder, package.name
    write_package(package, text, (folder / KEYS / CA).read_bytes())
    registered = folder / SITES / f"{name}.pub"
    if public is not None:
        (path / KEY).unlink(missing_ok=True)
        registered.write_bytes(public)
    elif not registered.exists():
        make_node_key(path / KEY, registered)
    shutil.copyfile(registered, path / PUBLIC_KEY)
    (path / UNITS).mkdir(exist_ok=True)
    anchored = package.config.anchors is not None
    for unit, content in site_units(name, anchored).items():
        (path / UNITS / unit).write_text(content, encoding="utf-8")
    if wheels:
        shutil.rmtree(path / WHEELS, ignore_errors=True)
        (path / WHEELS).mkdir()
        for wheel in wheels:
            shutil.copy2(wheel, path / WHEELS)
    anchors = " --anchors FILE" if anchored else ""
    own = "" if (path / KEY).exists() else "This site made its own key: give it to the SuperNode with --key FILE."
    has = f" (pip install --no-index --find-links {name}/{WHEELS} flex-moe)" if wheels else ""
    (path / "README").write_text(README.format(name=name, wheels=has, key=own, anchors=anchors), encoding="utf-8")
    archive = folder / PACKAGES / f"{name}.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(path, arcname=name, filter=_nobodys)
    archive.chmod(0o600)


def _nobodys(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """Who unpacks it owns it: a user id of this machine is somebody else on the site's."""
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = "root"
    return entry

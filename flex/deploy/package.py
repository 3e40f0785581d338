"""What a site gets from the coordinator: a folder, or a .tar.gz of it.

site.toml     the site's name, the server's address, the run's name
flex.toml     the configuration of the run, without anybody's paths
ca.crt        what the server's certificate is checked against
node.key      the site's key pair, unless the site made its own and sent the public half
node.pub
units/        systemd units of the worker and the SuperNode
wheels/       where the coordinator put some in
"""

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flex.config import RunConfig, read_config, to_toml
from flex.errors import FlexError, require
from flex.federation.agreement import settings_digest

SITE, CONFIG, CA, KEY, PUBLIC_KEY, UNITS, WHEELS = (
    *("site.toml", "flex.toml", "ca.crt", "node.key", "node.pub", "units", "wheels"),
)
FORMAT = 1  # of site.toml


@dataclass(frozen=True)
class Package:
    """A site's package. `run` names the run: another one in its place is another run, which starts anew; `joins`: the
    run was at work before this site was part of it."""

    folder: Path
    name: str
    address: str
    run: str
    config: RunConfig
    joins: bool = False

    @property
    def digest(self) -> str:
        """Of the settings that all sites share."""
        return settings_digest(self.config)

    @property
    def index(self) -> int:
        return self.config.data.clients.index(self.name)


def write_package(package: Package, config_text: str, ca: bytes) -> None:
    """Folder, `site.toml`, configuration and CA certificate; keys and units are the caller's."""
    package.folder.mkdir(parents=True, exist_ok=True)
    values = {"format": FORMAT, "name": package.name, "address": package.address, "run": package.run}
    values["joins"] = package.joins
    text = "".join(f"{key} = {to_toml(value)}\n" for key, value in values.items())
    (package.folder / SITE).write_text(text, encoding="utf-8")
    (package.folder / CONFIG).write_text(config_text, encoding="utf-8")
    (package.folder / CA).write_bytes(ca)


def read_toml(path: Path, missing: str) -> dict[str, Any]:
    """Raises FlexError where there is no such file (`missing` says what is missing), or it is no TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FlexError(missing) from None
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise FlexError(f"{path} cannot be read: {error}") from None


def read_package(folder: Path) -> Package:
    """The package in `folder`.

    Raises:
        FlexError: no package there, or one that is not whole.
    """
    path = folder / SITE
    if folder.is_file():
        raise FlexError(f"{folder} is a file; expected the folder that `tar xf {folder}` gives")
    values = read_toml(path, f"no package at {folder} (it has no {SITE}); expected what the coordinator sent")
    number = values.pop("format", None)
    require(number == FORMAT, f"{path} has format {number!r}; this version reads format {FORMAT}")
    names = ("name", "address", "run")
    for name in names:
        require(isinstance(values.get(name), str) and values[name], f"{path} does not say the {name}; expected a text")
    config, joins = read_config(folder / CONFIG), values.get("joins") is True
    package = Package(folder, *(values[name] for name in names), config, joins)
    require(
        package.name in package.config.data.clients,
        f"{folder / CONFIG} has no site {package.name!r}; its sites are {', '.join(package.config.data.clients)}",
    )
    require((folder / CA).is_file(), f"{folder} has no {CA}; expected the certificate that the coordinator sent")
    return package


def split_address(address: str) -> tuple[str, int]:
    """(host, port) of HOST:PORT, an IPv6 host in brackets."""
    host, sign, port = address.rpartition(":")
    good = bool(sign) and bool(host) and port.isdecimal() and 0 < int(port) < 65536
    require(good, f"the address is {address!r}; expected HOST:PORT")
    return host.strip("[]"), int(port)

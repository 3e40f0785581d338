"""The certificates and keys of a federation: a CA of its own, the server's certificate, a key pair a site.

Flower checks a site by its public key (ECDSA) and encrypts by TLS; the site checks the server by the CA's certificate.
"""

import datetime
import ipaddress
import os
import socket
import ssl
import time
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
    load_ssh_public_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from flex.errors import FlexError

CA_DAYS, SERVER_DAYS = 3650, 825
CONNECT_S = 10.0
LOOK_S = 0.5


def write_secret(path: Path, data: bytes) -> None:
    """A file that its owner alone can read, from its first byte on."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(data)


def make_ca(key_path: Path, certificate_path: Path) -> None:
    """A CA for one federation."""
    key = ec.generate_private_key(ec.SECP384R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "FLEx federation CA")])
    certificate = (
        _builder(name, name, key.public_key(), CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs=True), critical=True)
        .sign(key, hashes.SHA256())
    )
    write_secret(key_path, _private(key))
    certificate_path.write_bytes(certificate.public_bytes(Encoding.PEM))


def make_server(ca_key: Path, ca: Path, host: str, key_path: Path, path: Path, days: int = SERVER_DAYS) -> None:
    """The server's key, and its certificate for `host` and for this machine itself."""
    issuer, signer = x509.load_pem_x509_certificate(ca.read_bytes()), load_pem_private_key(ca_key.read_bytes(), None)
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host[:64])])
    names = [_general(each) for each in dict.fromkeys([host, "localhost", "127.0.0.1"])]
    certificate = (
        _builder(name, issuer.subject, key.public_key(), days)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
        .sign(signer, hashes.SHA256())
    )
    write_secret(key_path, _private(key))
    path.write_bytes(certificate.public_bytes(Encoding.PEM))


def _builder(subject: x509.Name, issuer: x509.Name, public_key, days: int) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    first = min(now, now + datetime.timedelta(days=days)) - datetime.timedelta(hours=1)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(first)
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )


def _usage(signs: bool) -> x509.KeyUsage:
    off = ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "encipher_only")
    return x509.KeyUsage(
        digital_signature=not signs,
        key_cert_sign=signs,
        crl_sign=signs,
        decipher_only=False,
        **dict.fromkeys(off, False),
    )


def _general(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _private(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def make_node_key(key_path: Path, public_path: Path) -> None:
    """A site's key pair, as `ssh-keygen -t ecdsa -b 384` makes one."""
    key = ec.generate_private_key(ec.SECP384R1())
    write_secret(key_path, key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    public_path.write_bytes(key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH) + b"\n")


def read_public_key(path: Path) -> bytes:
    """A site's public key in OpenSSH's form.

    Raises:
        FlexError: no such file, or it holds something else (a private key, RSA, Ed25519).
    """
    wanted = "expected the public half of `ssh-keygen -t ecdsa -b 384 -f KEY`, KEY.pub"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise FlexError(f"cannot read the public key {path} ({error.strerror}); {wanted}") from None
    if b"PRIVATE KEY" in data:
        raise FlexError(f"{path} is a private key, which must not leave its site; {wanted}")
    try:
        load = load_pem_public_key if data.startswith(b"-----") else load_ssh_public_key
        key = load(data)
    except (ValueError, UnsupportedAlgorithm):
        raise FlexError(f"{path} is no public key; {wanted}") from None
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise FlexError(f"{path} is not an ECDSA key; {wanted}")
    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH) + b"\n"


def check_dates(path: Path) -> None:
    """Raises FlexError where a certificate is not valid today."""
    certificate, now = x509.load_pem_x509_certificate(path.read_bytes()), datetime.datetime.now(datetime.UTC)
    first, last = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if not first <= now <= last:
        raise FlexError(
            f"the certificate {path} is valid from {first:%Y-%m-%d} to {last:%Y-%m-%d}, not now; expected a new one "
            "(`flex deploy update` makes it)"
        )


class Unreachable(FlexError):
    """Nobody answers there: the one fault of a connection that time may mend."""


def wait_for_server(host: str, port: int, ca: Path, seconds: float) -> None:
    """`check_server`, again and again for so long as nobody answers."""
    ends = time.monotonic() + seconds
    while True:
        try:
            check_server(host, port, ca)
            return
        except Unreachable:
            if time.monotonic() > ends:
                raise
        time.sleep(LOOK_S)


def check_server(host: str, port: int, ca: Path) -> None:
    """Connects once, as a SuperNode would.

    Raises:
        FlexError: nobody there, no TLS there, or a certificate that `ca` does not vouch for; in one sentence.
    """
    at = f"{host}:{port}"
    try:
        context = ssl.create_default_context(cafile=str(ca))
    except (ssl.SSLError, OSError):
        raise FlexError(f"{ca} is no certificate; expected the CA's, as the coordinator sent it") from None
    try:
        with (
            socket.create_connection((host, port), CONNECT_S) as plain,
            context.wrap_socket(plain, server_hostname=host),
        ):
            return
    except ssl.SSLCertVerificationError as error:
        if "expired" in error.verify_message:
            reason = "its certificate has expired; expected the coordinator to renew it (`flex deploy update`)"
        elif "match" in error.verify_message:
            reason = (
                f"its certificate is for another name ({error.verify_message}); expected the address of the package"
            )
        else:
            reason = f"{ca} does not vouch for it ({error.verify_message}); expected this federation's CA and server"
        raise FlexError(f"the server at {at} is not trusted: {reason}") from None
    except ssl.SSLError:
        raise FlexError(f"the server at {at} speaks no TLS; expected the one that `flex deploy server` runs") from None
    except OSError as error:
        what = error.strerror or str(error) or type(error).__name__
        raise Unreachable(
            f"no server at {at} ({what}); expected `flex deploy server` to run there, and this port open to here"
        ) from None

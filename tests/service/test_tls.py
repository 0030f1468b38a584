"""TLS of `m3serve serve`: files that do not fit are refused before anything starts, and one real run with a key."""

from __future__ import annotations

import datetime
import ipaddress
import re
import secrets
import ssl
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from engine.errors import ConfigError
from service import tls
from service.settings import ServiceSettings
from tests.cluster import process_exists, wait_until
from tests.service.test_cli import START_TIMEOUT_S, serve_command

__all__ = ["serve_command"]


def write_certificate(directory: Path, name: str, *, password: bytes | None = None) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that signs itself, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(address, critical=False)
        .sign(key, hashes.SHA256())
    )
    locked = serialization.NoEncryption() if password is None else serialization.BestAvailableEncryption(password)
    files = directory / f"{name}.crt", directory / f"{name}.key"
    files[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    files[1].write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, locked))
    return files


def refusal(cert: Path | None, key: Path | None, *, ray_address: str | None = None) -> str:
    files = {"tls_cert_file": cert and str(cert), "tls_key_file": key and str(key)}
    with pytest.raises(ConfigError) as caught:
        tls.check(ServiceSettings(model="m", **files), ray_address=ray_address)
    return str(caught.value)


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    (cert, key), (_, other) = write_certificate(tmp_path, "a"), write_certificate(tmp_path, "b")
    _, locked = write_certificate(tmp_path, "c", password=b"secret")
    tls.check(ServiceSettings(model="m", tls_cert_file=str(cert), tls_key_file=str(key)), ray_address=None)
    tls.check(ServiceSettings(model="m"), ray_address="auto")
    assert refusal(cert, None) == "tls_cert_file needs tls_key_file"
    assert refusal(None, key) == "tls_key_file needs tls_cert_file"
    assert "tls_key_file" in refusal(cert, tmp_path / "none") and "cannot be read" in refusal(tmp_path / "none", key)
    assert str(cert) in refusal(cert, other)
    assert "tls_cert_file" in refusal(key, key)
    assert "password" in refusal(cert, locked)


def test_where_serve_would_do_without_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cert, key = write_certificate(tmp_path, "a")
    assert "http_options" in refusal(cert, key, ray_address="auto")
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "1")
    assert "RAY_SERVE_ENABLE_HA_PROXY" in refusal(cert, key)


def test_serve_speaks_tls_and_asks_for_a_key(serve_command: Any, checkpoint: Path, tmp_path: Path) -> None:
    cert, key = write_certificate(tmp_path, "a")
    other, _ = write_certificate(tmp_path, "b")
    api_key = f"listed-{secrets.token_hex(16)}"
    files = ("--tls-cert-file", str(cert), "--tls-key-file", str(key))
    command = serve_command("--model", str(checkpoint), "--served-model-name", "m", *files, M3SERVE_API_KEYS=api_key)
    wait_until(
        lambda: bool(command.lines) or command.process.poll() is not None,
        timeout_s=START_TIMEOUT_S,
        what="the ready line",
    )
    found = re.match(r"m3serve ready: (https://127\.0\.0\.1:\d+/v1) ", "".join(command.lines))
    assert found, (command.lines, command.errors)
    base = found[1]
    trusting = httpx.Client(verify=ssl.create_default_context(cafile=str(cert)))
    client = openai.OpenAI(base_url=base, api_key=api_key, http_client=trusting, max_retries=0)
    assert client.completions.create(model="m", prompt="a", max_tokens=2).usage is not None
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="x" * 20).models.list()
    with pytest.raises(httpx.ConnectError):
        httpx.get(base, verify=ssl.create_default_context(cafile=str(other)))
    with pytest.raises(httpx.HTTPError):
        httpx.get(base.replace("https", "http"))
    trusting.close()
    pids = [pid for pid in command.descendants() if process_exists(pid)]
    assert len(pids) > 5
    for pid in pids:
        # What a process was started with stays readable; the command itself was given the key there.
        assert pid == command.process.pid or api_key.encode() not in read(pid, "environ")
        assert api_key.encode() not in read(pid, "cmdline")
    assert not any(api_key in line for line in command.errors + command.lines)


def read(pid: int, name: str) -> bytes:
    """A file of /proc; empty when the process has ended."""
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""

"""TLS of the HTTP server in local runs, where Serve's own proxy speaks it."""

from __future__ import annotations

import os
import ssl

from engine.errors import ConfigError
from service.settings import ServiceSettings

_PROXY_VARIABLE = "RAY_SERVE_ENABLE_HA_PROXY"


def check(settings: ServiceSettings, *, ray_address: str | None) -> None:
    """ConfigError for files that cannot be used, and where Serve would silently do without TLS."""
    cert, key = settings.tls_cert_file, settings.tls_key_file
    if cert is None and key is None:
        return
    if cert is None or key is None:
        missing, given = ("tls_cert_file", "tls_key_file") if cert is None else ("tls_key_file", "tls_cert_file")
        raise ConfigError(f"{given} needs {missing}")
    if os.environ.get(_PROXY_VARIABLE, "0") not in ("", "0"):
        raise ConfigError(
            f"tls_cert_file: HAProxy as Ray runs it ({_PROXY_VARIABLE}) speaks no TLS; unset the variable, or end TLS "
            "in a proxy of your own in front"
        )
    if ray_address is not None:
        raise ConfigError(
            "tls_cert_file: a Ray cluster that is joined may have a running Serve, which keeps its own options; "
            "set ssl_certfile and ssl_keyfile in the http_options of its Serve config"
        )
    for name, path in (("tls_cert_file", cert), ("tls_key_file", key)):
        if not os.access(path, os.R_OK):
            raise ConfigError(f"{name} {path} cannot be read")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # A key with a password would ask for it at the terminal.
        context.load_cert_chain(cert, key, password=_no_password)
    except (ssl.SSLError, OSError, ValueError) as error:
        raise ConfigError(f"tls_cert_file {cert} with tls_key_file {key}: {error}") from None


def client_context(cert_file: str) -> ssl.SSLContext:
    """For a client on this machine, which trusts that certificate alone, whatever name it is for."""
    context = ssl.create_default_context(cafile=cert_file)
    context.check_hostname = False
    # The certificate itself is the anchor, whoever signed it.
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    return context


def _no_password() -> str:
    raise ValueError("the key has a password, which is not supported")

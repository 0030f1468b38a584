"""What an ingress and an engine replica must agree on before one runs the other's requests. Loads no torch.

While an update rolls through the replicas, old and new ones run side by side.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from engine.checkpoint_hash import checkpoint_hash
from engine.config import EngineConfig
from engine.types import EngineInfo
from service.settings import ServiceSettings


def model_identity(settings: ServiceSettings) -> str:
    """Of the served name and the tokenizer: token ids mean the same wherever it is the same."""
    digest = hashlib.sha256(settings.model_name.encode())
    # Engines alone do without.
    file = Path(settings.model) / "tokenizer.json"
    digest.update(b"\0" + file.read_bytes() if file.is_file() else b"")
    return digest.hexdigest()


def engine_identity(config: EngineConfig, info: EngineInfo) -> str:
    """Of all that decides which token comes next. Samples of the weights count, not only where they lie."""
    weights = "" if config.load_format == "dummy" else checkpoint_hash(Path(config.model))
    return hashlib.sha256(f"{info.namespace} {weights}".encode()).hexdigest()

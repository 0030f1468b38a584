"""m3-nano: the small trained checkpoint that `m3serve serve` takes when no model is named, and how it is made."""

from __future__ import annotations

from pathlib import Path

CHECKPOINT = Path(__file__).with_name("m3-nano")

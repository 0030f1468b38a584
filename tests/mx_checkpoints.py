"""Block-scaled checkpoints for tests: a plain one of `make_checkpoint`, rewritten as quantisers release theirs.

What the codes stand for is read back with ml_dtypes, so that it does not come from the code under test.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from deploy.demo.writer import write_json, write_shards
from engine.kernels.torch_mx import quantise
from engine.quant_config import Format
from tests.checkpoints import make_checkpoint

# Every width is a multiple of 32 on each of four ranks.
MX_SIZES: dict[str, Any] = {
    "layers": 4, "experts": 4, "vocab_size": 320, "expert_width": 128, "shared_width": 128, "dense_width": 128,
}  # fmt: skip
_LINEAR = re.compile(
    r".*model\.layers\.\d+\.(self_attn\.(index_)?[qkvo]_proj|mlp\.\w+_proj|block_sparse_moe\.\w*experts\.(\d+\.)?\w+)\.weight"
)
_ROUTED = re.compile(r".*\.experts\.\d+\.\w+\.weight")
_PROJECTIONS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


@dataclass(frozen=True)
class Naming:
    """How a quantiser spells what it writes."""

    values: str = ".weight"
    scales: str = ".weight_scale_inv"
    scale_dtype: torch.dtype = torch.uint8
    expert_projections: bool = False


def tensors_of(path: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        found |= load_file(file)
    return found


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Write the checkpoint again after a change to its tensors."""
    tensors = tensors_of(path)
    change(tensors)
    for file in path.glob("*.safetensors"):
        file.unlink()
    write_shards(path, {name: tensor.contiguous() for name, tensor in tensors.items()}, 2)


def change_config(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the quantization_config of a checkpoint."""
    content = json.loads((path / "config.json").read_text())
    change(content["quantization_config"])
    write_json(path / "config.json", content)


def is_quantised(kind: Format, name: str) -> bool:
    """As in the released checkpoints: all linear layers in MXFP8, routed experts in MXFP4."""
    return re.fullmatch(_LINEAR if kind == "mxfp8" else _ROUTED, name) is not None


def quantization_config(kind: Format, names: list[str]) -> dict[str, Any]:
    """As released, for a checkpoint of these tensors."""
    modules = sorted(name.removesuffix(".weight") for name in names if name.endswith(".weight"))
    if kind == "mxfp8":
        gates = [name for name in modules if name.endswith("block_sparse_moe.gate")]
        outside = ["lm_head", "model.embed_tokens", "vision_tower", "multi_modal_projector", "patch_merge_mlp"]
        return {
            "quant_method": "mxfp8",
            "activation_scheme": "dynamic",
            "weight_block_size": [1, 32],
            "ignored_layers": outside + gates,
        }
    spec = {
        "dtype": "fp4", "qscheme": "per_group", "group_size": 32, "ch_axis": -1, "scale_format": "e8m0",
        "scale_type": "float", "is_dynamic": False, "round_method": "half_even", "symmetric": None,
        "scale_calculation_mode": "even", "observer_cls": "PerBlockMXObserver",
    }  # fmt: skip
    plain = [name for name in modules if not is_quantised(kind, f"{name}.weight")]
    return {
        "quant_method": "quark",
        "global_quant_config": {
            "weight": spec,
            "input_tensors": {**spec, "is_dynamic": True},
            "output_tensors": None,
            "bias": None,
        },
        "exclude": [name for name in plain if "vision" not in name] + ["*vision_tower*"],
        "export": {"weight_format": "real_quantized", "pack_method": "reorder", "kv_cache_group": []},
        "layer_quant_config": {},
        "layer_type_quant_config": {},
        "kv_cache_quant_config": {},
        "softmax_quant_spec": None,
        "quant_mode": "eager_mode",
        "version": "0.11",
    }


def make_mx_checkpoint(path: Path, kind: Format, *, naming: Naming | None = None, **options: Any) -> Path:
    """Write a checkpoint to the directory `path` and return it. options: of `make_checkpoint`, over MX_SIZES."""
    make_checkpoint(path, **{**MX_SIZES, **options})
    spelt = naming or (Naming() if kind == "mxfp8" else Naming(scales=".weight_scale"))
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = quantization_config(kind, list(tensors_of(path)))
    write_json(path / "config.json", config)

    def change(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            if not is_quantised(kind, name):
                continue
            weight = quantise(tensors.pop(name), kind)
            base = name.removesuffix(".weight")
            if spelt.expert_projections and _ROUTED.fullmatch(name):
                stem, _, last = base.rpartition(".")
                base = f"{stem}.{_PROJECTIONS[last]}"
            stored = torch.float8_e4m3fn if kind == "mxfp8" else torch.uint8
            tensors[base + spelt.values] = weight.values.view(stored)
            tensors[base + spelt.scales] = weight.scales.view(spelt.scale_dtype)

    rewrite(path, change)
    return path


def decode(values: Tensor, scales: Tensor) -> Tensor:
    """bfloat16 [rows, columns] of what the two tensors of a weight stand for."""
    if values.dtype == torch.uint8:
        codes = np.stack((values.numpy() & 15, values.numpy() >> 4), -1).reshape(len(values), -1)
        numbers = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    else:
        numbers = values.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    powers = scales.view(torch.uint8).numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    product = numbers * np.repeat(powers, 32, axis=-1)
    return torch.from_numpy(product.astype(ml_dtypes.bfloat16).view(np.int16)).view(torch.bfloat16)


def make_dequantised(source: Path, path: Path) -> Path:
    """Write to the directory `path` the plain checkpoint whose weights are those of `source`, and return it."""
    path.mkdir()
    for file in source.iterdir():
        if file.suffix != ".safetensors" and "index" not in file.name:
            (path / file.name).write_bytes(file.read_bytes())
    config = json.loads((path / "config.json").read_text())
    del config["quantization_config"]
    write_json(path / "config.json", config)
    tensors = tensors_of(source)
    for name in list(tensors):
        for ending in (".weight_scale_inv", ".weight_scale", ".scale"):
            if name.endswith(ending):
                base = name.removesuffix(ending)
                [values] = [
                    tensors.pop(base + each) for each in (".weight", ".weight_packed") if base + each in tensors
                ]
                tensors[f"{base}.weight"] = decode(values, tensors.pop(name))
    write_shards(path, tensors, 2)
    return path

"""What a rank takes, computed from config.json: the facts of MiniMax-M3, and what the runtime allocates."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest

from engine import capacity
from engine.capacity import DEVICES, GIB, RELEASED, Footprint
from engine.config import EngineConfig, ModelConfig, read_json
from engine.msa.plan import IndexPlan
from engine.runner import ModelRunner
from tests.checkpoints import make_checkpoint
from tests.mx_checkpoints import MX_SIZES

M3_CONFIG = Path(__file__).with_name("m3_config.json")
M3 = ModelConfig.from_hf(read_json(M3_CONFIG))
ALL_F = "DDD" + "F" * 57
FREQ_4 = "DDD" + "FSSS" * 14 + "F"


def m3(**changes: Any) -> Footprint:
    settings = {"ranks": 4, "max_model_len": 131072, "max_num_seqs": 64, "max_num_batched_tokens": 8192}
    return Footprint(model=M3, **{"plan": ALL_F, **settings, **changes})


# Of the released MXFP8 checkpoint: name (N: layer, E: expert), shape, kind: q (quantised), b (bf16), f (float32).
_TOP = [("lm_head", (200064, 6144), "b"), ("model.embed_tokens", (200064, 6144), "b"), ("model.norm", (6144,), "b")]
_EVERY_LAYER = [
    ("input_layernorm", (6144,), "b"),
    ("post_attention_layernorm", (6144,), "b"),
    ("self_attn.q_proj", (8192, 6144), "q"),
    ("self_attn.k_proj", (512, 6144), "q"),
    ("self_attn.v_proj", (512, 6144), "q"),
    ("self_attn.o_proj", (6144, 8192), "q"),
    ("self_attn.q_norm", (128,), "b"),
    ("self_attn.k_norm", (128,), "b"),
]
_DENSE = [
    ("mlp.gate_proj", (12288, 6144), "q"),
    ("mlp.up_proj", (12288, 6144), "q"),
    ("mlp.down_proj", (6144, 12288), "q"),
]
_SPARSE = [
    ("self_attn.index_q_proj", (512, 6144), "q"),
    ("self_attn.index_k_proj", (128, 6144), "q"),
    ("self_attn.index_q_norm", (128,), "b"),
    ("self_attn.index_k_norm", (128,), "b"),
    ("block_sparse_moe.gate", (128, 6144), "f"),
    ("block_sparse_moe.e_score_correction_bias", (128,), "f"),
    *((f"block_sparse_moe.experts.{e}.{w}", (3072, 6144), "q") for e in range(128) for w in ("w1", "w3")),
    *((f"block_sparse_moe.experts.{e}.w2", (6144, 3072), "q") for e in range(128)),
    ("block_sparse_moe.shared_experts.gate_proj", (3072, 6144), "q"),
    ("block_sparse_moe.shared_experts.up_proj", (3072, 6144), "q"),
    ("block_sparse_moe.shared_experts.down_proj", (6144, 3072), "q"),
]
_VISION_LAYER = [
    *(4 * [("attention", (1280, 1280))]),
    ("fc1", (5120, 1280)),
    ("fc2", (1280, 5120)),
    *(9 * [("bias or norm", (1280,))]),
    ("fc1.bias", (5120,)),
]
_VISION = [
    ("norm", (1280,)),
    ("norm", (1280,)),
    ("projector.1", (6144, 1280)),
    ("merge.1", (6144, 24576)),
    *(2 * [("linear_2", (6144, 6144))]),
    *(4 * [("bias", (6144,))]),
]


def released() -> list[tuple[str, tuple[int, ...], str]]:
    """Every text tensor by name, shape and kind, without scales."""
    found = list(_TOP)
    for layer in range(60):
        for name, shape, kind in _EVERY_LAYER + (_SPARSE if layer >= 3 else _DENSE):
            found.append((f"model.layers.{layer}.{name}", shape, kind))
    return found


def test_tensors_are_those_of_the_released_checkpoint() -> None:
    expected = {name + ("" if name.endswith("bias") else ".weight"): shape for name, shape, _ in released()}
    parts = list(capacity.weight_parts(M3, index_layers=M3.is_sparse))
    found = [
        (part.name.replace(".experts.0.", f".experts.{expert}."), part.shape)
        for part in parts
        for expert in range(part.copies)
    ]
    assert dict(found) == expected and len(found) == len(expected)
    assert all(part.local == part.shape for part in parts)

    def count(*words: str) -> int:
        return sum(p.copies * math.prod(p.shape) for p in parts if any(word in p.name for word in words))

    assert count("") == 426_174_572_928
    assert count(".experts.") == 413_122_166_784
    assert count("index_q_proj", "index_k_proj") == 57 * 3_932_160


def test_totals_of_the_released_checkpoints() -> None:
    """MXFP8: 45,838 tensors with vision and scales, 413.27 GiB (443.7 GB)."""
    tensors = released()
    quantised = sum(math.prod(shape) for _, shape, kind in tensors if kind == "q")
    bf16 = sum(math.prod(shape) for _, shape, kind in tensors if kind == "b")
    float32 = sum(math.prod(shape) for _, shape, kind in tensors if kind == "f")
    mxfp8 = quantised + quantised // 32 + 2 * bf16 + 4 * float32
    assert capacity.checkpoint_bytes(M3, RELEASED["mxfp8"]) == mxfp8 == 442_007_940_096
    assert capacity.checkpoint_bytes(M3) == 2 * (quantised + bf16) + 4 * float32 == 852_438_813_696

    vision = _VISION + 32 * _VISION_LAYER
    vision_bytes = 2 * sum(math.prod(shape) for _, shape in vision) + 4 * 1280 * 3 * 2 * 14 * 14
    scales = sum(kind == "q" for _, _, kind in tensors)
    assert len(tensors) + scales + len(vision) + 1 == 45838
    assert round((mxfp8 + vision_bytes) / GIB, 2) == 413.27

    routed = sum(math.prod(shape) for name, shape, _ in tensors if ".experts." in name)
    mxfp4 = routed // 2 + routed // 32 + 2 * (quantised - routed + bf16) + 4 * float32
    assert capacity.checkpoint_bytes(M3, RELEASED["mxfp4"]) == mxfp4 == 245_665_631_232
    assert routed // 2 + routed // 32 == 219_471_151_104


@pytest.mark.parametrize(
    ("ranks", "q_heads", "kv_heads", "packed", "o_in", "inter"),
    [
        (1, 64, 4, 9856, 8192, 3072),
        (2, 32, 2, 4992, 4096, 1536),
        (4, 16, 1, 2560, 2048, 768),
        (8, 8, 1, 1536, 1024, 384),
        (16, 4, 1, 1024, 512, 192),
    ],
)
def test_shapes_of_a_rank(ranks: int, q_heads: int, kv_heads: int, packed: int, o_in: int, inter: int) -> None:
    parts = {part.name: part for part in capacity.weight_parts(M3, index_layers=M3.is_sparse, ranks=ranks)}
    attention = {name: parts[f"model.layers.3.self_attn.{name}_proj.weight"].local for name in ("q", "k", "v", "o")}
    index = {name: parts[f"model.layers.3.self_attn.index_{name}_proj.weight"].local for name in ("q", "k")}
    assert attention["q"] == (q_heads * 128, 6144) and attention["o"] == (6144, o_in)
    assert attention["k"] == attention["v"] == index["q"] == (kv_heads * 128, 6144)
    assert index["k"] == (128, 6144)
    assert sum(shape[0] for shape in (*attention.values(), *index.values())) - 6144 == packed
    expert = "model.layers.59.block_sparse_moe.experts.0"
    assert parts[f"{expert}.w1.weight"].local == parts[f"{expert}.w3.weight"].local == (inter, 6144)
    assert parts[f"{expert}.w2.weight"].local == (6144, inter)
    assert parts["lm_head.weight"].local == parts["model.embed_tokens.weight"].local == (200064 // ranks, 6144)
    assert parts["model.layers.59.block_sparse_moe.gate.weight"].local == (128, 6144)


@pytest.mark.parametrize(
    ("ranks", "bf16", "fp8", "scales", "total_bf16", "total_fp8", "total_fp8_index_bf16"),
    [
        (1, 122880, 61440, 1920, 137472, 70656, 77952),
        (2, 61440, 30720, 960, 76032, 38976, 46272),
        *((ranks, 30720, 15360, 480, 45312, 23136, 30432) for ranks in (4, 8, 16)),
    ],
)
def test_bytes_of_a_token(
    ranks: int, bf16: int, fp8: int, scales: int, total_bf16: int, total_fp8: int, total_fp8_index_bf16: int
) -> None:
    """fp8 index keys have a scale here: 4 bytes in each of 57 layers."""
    plain, small = m3(ranks=ranks), m3(ranks=ranks, kv_element=1, index_element=1)
    assert (plain.kv_token_bytes(), plain.index_token_bytes()) == (bf16, 14592)
    assert (small.kv_token_bytes(), small.index_token_bytes()) == (fp8 + scales, 7296 + 4 * 57)
    assert plain.page_bytes() == 128 * total_bf16
    assert small.page_bytes() == 128 * (total_fp8 + 4 * 57)
    assert m3(ranks=ranks, kv_element=1).page_bytes() == 128 * total_fp8_index_bf16


def test_pages_of_requests() -> None:
    assert m3().page_bytes() == 5_799_936
    assert m3(kv_element=1, index_element=1).page_bytes() - 128 * 4 * 57 == 2_961_408
    assert round(m3().request_bytes() / GIB, 2) == 5.53
    assert round(m3(max_model_len=2**20).request_bytes() / GIB, 1) == 44.2
    assert round((m3(kv_element=1, index_element=1).page_bytes() - 128 * 4 * 57) * 1024 / GIB, 2) == 2.82
    assert m3(max_model_len=129).request_bytes() == 2 * m3().page_bytes()


def test_reuse_layers_keep_no_index_keys_in_lean_mode() -> None:
    lean, audited = m3(plan=FREQ_4), m3(plan=FREQ_4, audited=True)
    assert (lean.index_token_bytes(), audited.index_token_bytes()) == (15 * 256, 57 * 256)
    assert lean.kv_token_bytes() + lean.index_token_bytes() == 34560
    # 42 layers of 128 + 128 rows of 6144 and two norms of 128 on each rank.
    spared = sum(audited.weights().values()) - sum(lean.weights().values())
    assert spared == 42 * (2 * 256 * 6144 + 4 * 2 * 128)
    assert audited.buffer_bytes() > lean.buffer_bytes()


def test_a_guard_keeps_the_logits_of_a_second_set_of_graphs() -> None:
    plain, guarded = (m3(plan=FREQ_4, audited=True, guarded=on) for on in (False, True))
    share = plain.model.vocab_size // plain.ranks
    logits = sum(capacity.decode_buckets(plain.max_num_seqs)) * share * 2
    assert guarded.graph_bytes() - plain.graph_bytes() == logits
    assert m3(guarded=True).graph_bytes() == m3().graph_bytes(), "no layer reuses"
    assert m3(plan=FREQ_4, guarded=True, captured=False).graph_bytes() == 0


def test_weights_of_a_rank() -> None:
    """Norms are float32 on a rank. Eight ranks hold four heads twice, and all else that is not cut eight times."""
    whole, rank = (m3(ranks=ranks, format_of=RELEASED["mxfp8"]).weights() for ranks in (1, 8))
    norms = 6144 * 121 + 128 * (120 + 114)
    assert sum(whole.values()) == 442_007_940_096 + 2 * norms
    row = 6144 * 33 // 32
    everywhere = 4 * norms + 57 * 4 * (128 * 6144 + 128) + 57 * 128 * row  # norms, routers, index_k
    twice = (2 * 60 + 57) * 512 * row  # k, v, index_q
    assert 8 * sum(rank.values()) == sum(whole.values()) + 7 * everywhere + twice
    assert 8 * rank["experts"] == whole["experts"] == 413_122_166_784 * 33 // 32


QUANTISATION: dict[str, dict[str, Any] | None] = {
    "bf16": None,
    "mxfp8": {"quant_method": "mxfp8", "ignored_layers": ["lm_head", "model.embed_tokens", "block_sparse_moe.gate"]},
    "mxfp4": {
        "quant_method": "quark",
        "global_quant_config": {"weight": {"dtype": "fp4", "qscheme": "per_group", "group_size": 32}},
        "exclude": ["lm_head", "*self_attn*", "*shared_experts*", "*mlp*", "*gate"],
    },
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dense, selecting and reusing layers."""
    sizes = {**MX_SIZES, "layers": 6, "heads": 8, "kv_heads": 2}
    return make_checkpoint(tmp_path_factory.mktemp("capacity"), **sizes)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("stored", QUANTISATION)
def test_runtime_allocates_what_was_computed(checkpoint: Path, ranks: int, stored: str) -> None:
    modes = itertools.product(("lean", "audited"), ("auto", "fp8"), ("auto", "fp8"))
    for reuse, kv, index in modes:
        config = EngineConfig.from_kwargs(
            checkpoint, backend="torch", dtype="bfloat16", load_format="dummy", memory_fraction=0.01,
            tensor_parallel_size=ranks, index_reuse=reuse, index_topk_freq=2, kv_cache_dtype=kv,
            index_cache_dtype=index, hf_overrides={"quantization_config": QUANTISATION[stored]},
        )  # fmt: skip
        runner = ModelRunner(config, rank=ranks - 1, world_size=ranks)
        runner.load()
        info = runner.allocate(3)
        model = runner.model_config
        footprint = Footprint(
            model=model,
            plan=str(IndexPlan.build(model.is_sparse, freq=2)),
            ranks=ranks,
            max_model_len=8192,
            max_num_seqs=16,
            max_num_batched_tokens=2048,
            kv_element=1 if kv == "fp8" else 2,
            index_element=1 if index == "fp8" else 2,
            audited=reuse == "audited",
            format_of=capacity.stored_formats(model),
        )
        pools = [
            pool
            for pages in runner.model.pages
            for pool in (pages.k, pages.v, pages.index_k, pages.k_scale, pages.v_scale, pages.index_k_scale)
            if pool is not None
        ]
        assert sum(pool.nbytes for pool in pools) == 3 * footprint.page_bytes() == 3 * info.page_bytes
        assert sum(footprint.weights().values()) == info.weight_bytes, (reuse, kv, index)
        assert footprint.split_error() is None


def test_memory_fraction_decides_the_pages(checkpoint: Path) -> None:
    """On CPU of the machine's memory, which others use too, meanwhile."""

    def proposed(**settings: Any) -> int:
        config = EngineConfig.from_kwargs(
            checkpoint, backend="torch", load_format="dummy", max_num_seqs=4096, **settings
        )
        return ModelRunner(config, rank=0, world_size=1).load().num_pages

    small, large = proposed(memory_fraction=0.001), proposed(memory_fraction=0.002)
    assert 1.6 < large / small < 2.4
    # Twice what 4096 sequences of one page can fill.
    assert proposed(max_model_len=128) == 8192


def test_page_budget() -> None:
    assert capacity.page_budget(1000, 0.85, 100) == 850
    assert capacity.page_budget(1000, 0.85, 200) == 800, "a step needs more than the fraction leaves"
    assert capacity.page_budget(1000, 0.85, 2000) == 0
    assert capacity.useful_pages(3, 129) == 12


def fit_on(name: str, **changes: Any) -> capacity.Fit:
    footprint = m3(**changes)
    return capacity.fit(footprint, sum(footprint.weights().values()), DEVICES[name])


def test_fit_says_why_not() -> None:
    fits = fit_on("mi300x", format_of=RELEASED["mxfp8"])
    assert fits.reason is None and fits.num_pages == fits.pool_bytes // m3().page_bytes()
    assert fits.tokens == 128 * fits.num_pages and fits.full_requests == fits.num_pages // 1024
    assert fits.pool_bytes == int(0.85 * fits.free_bytes)
    too_heavy = fit_on("h100")
    assert (too_heavy.num_pages, too_heavy.free_bytes) == (0, 0)
    assert too_heavy.reason is not None and "weights 198.7 GiB" in too_heavy.reason and "79.1 GiB" in too_heavy.reason
    too_long = fit_on("h200", format_of=RELEASED["mxfp8"], max_model_len=2**20)
    assert too_long.reason is not None and "1,048,576 tokens needs 44.2 GiB" in too_long.reason
    # What it says would fit does; a shorter limit has smaller buffers, so a little more than that does too.
    longest = int(too_long.reason.split("max_model_len=")[1].split()[0].rstrip(")"))
    assert longest == too_long.tokens
    assert fit_on("h200", format_of=RELEASED["mxfp8"], max_model_len=longest).reason is None
    assert fit_on("h200", format_of=RELEASED["mxfp8"], max_model_len=longest * 101 // 100).reason is not None


def test_fit_leaves_room_for_a_step() -> None:
    footprint = m3(ranks=8, format_of=RELEASED["mxfp8"], max_num_seqs=512, max_num_batched_tokens=65536)
    weights, step = sum(footprint.weights().values()), footprint.step_bytes()
    found = capacity.fit(footprint, weights, DEVICES["h100"])
    assert step > 0.15 * found.free_bytes
    assert found.pool_bytes == found.free_bytes - step


@pytest.mark.parametrize(
    ("ranks", "says"),
    [
        (3, "tensor_parallel_size=3 does not divide num_attention_heads=64"),
        (128, "tensor_parallel_size=128 does not divide num_attention_heads=64"),
        (64, None),
    ],
)
def test_split(ranks: int, says: str | None) -> None:
    assert m3(ranks=ranks).split_error() == says


def test_split_keeps_scales_together(checkpoint: Path) -> None:
    """128 columns on 8 ranks: 16 each, of the 32 that share a scale."""
    model = ModelConfig.from_hf(read_json(checkpoint / "config.json"))
    footprint = Footprint(model, "DDFSFS", 8, 128, 1, 128, format_of=RELEASED["mxfp8"])
    error = footprint.split_error()
    assert error is not None and "16 columns of model.layers.0.mlp.down_proj.weight, and 32 share a scale" in error


def test_decode_buckets() -> None:
    assert capacity.decode_buckets(1) == [1]
    assert capacity.decode_buckets(20) == [1, 2, 4, 8, 16, 20]
    assert capacity.decode_buckets(24) == [1, 2, 4, 8, 16, 24]

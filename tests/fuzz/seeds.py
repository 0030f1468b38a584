"""Inputs that are right, by target: where mutations start."""

from __future__ import annotations

import json
from typing import Any

from engine.transport import encode
from engine.types import EngineRequest, FinishReason, RequestEvent, SamplingParams
from service.messages import Abort, Accepted, StepEvents, Submit
from tests.fuzz.targets import KEY, checkpoint

BODIES: list[dict[str, Any]] = [
    {"model": "m", "prompt": "a", "max_tokens": 4, "stop": ["x"], "logit_bias": {"5": -1.5}, "seed": 3, "n": 2},
    {"prompt": [[1, 2], [3]], "stream": True, "stream_options": {"include_usage": True}, "logprobs": 2, "echo": True},
    {"prompt": ["a", "b"], "temperature": 0.5, "top_p": 0.9, "top_k": -1, "min_p": 0.1, "stop_token_ids": [7]},
    {
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": [{"type": "text", "text": "u"}]},
            {"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": '{"x": [1]}'}}]},
            {"role": "tool", "tool_call_id": "a", "content": "r"},
        ],
        "tools": [
            {
                "type": "function",
                "function": {
                    "name": "f",
                    "parameters": {"properties": {"x": {"$ref": "#"}, "y": {"enum": [1]}}, "required": ["x"]},
                },
            }
        ],
        "tool_choice": "required",
        "logprobs": True,
        "top_logprobs": 2,
        "chat_template_kwargs": {"thinking_mode": "enabled"},
    },
    {"tokens": [1, 2, 3]},
    {"prompt": "tokenise me", "add_special_tokens": True, "return_token_strs": True},
]


def seeds(target: str) -> list[bytes]:
    """At least one per target."""
    made = _JSON[target]() if target in _JSON else None
    return [json.dumps(document).encode() for document in made] if made is not None else _BYTES[target]()


def documents(target: str) -> list[Any] | None:
    """The same as JSON values; None for targets that read something else."""
    return _JSON[target]() if target in _JSON else None


def _file(name: str) -> Any:
    return json.loads((checkpoint() / name).read_text())


def _tensors_header() -> dict[str, Any]:
    data = next(iter(sorted(checkpoint().glob("*.safetensors")))).read_bytes()
    header: dict[str, Any] = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    # A few tensors are as good as all.
    return dict(list(header.items())[:4])


def _small_tokenizer() -> dict[str, Any]:
    content: dict[str, Any] = _file("tokenizer.json")
    model = content["model"]
    model["vocab"] = dict(list(model["vocab"].items())[:40])
    model["merges"] = model["merges"][:3]
    return content


def _quantized() -> dict[str, Any]:
    content: dict[str, Any] = _file("config.json")
    content["text_config"]["quantization_config"] = {
        "quant_method": "mxfp8",
        "ignored_layers": ["lm_head", "re:.*gate"],
        "weight_block_size": [1, 32],
    }
    content["text_config"]["rope_scaling"] = {
        "rope_type": "yarn",
        "factor": 2.0,
        "original_max_position_embeddings": 512,
    }
    return content


def _socket_frames() -> list[bytes]:
    request = EngineRequest("r", [1, 2], SamplingParams(seed=1, logit_bias={1: 2.0}, stop=["x"]))
    event = RequestEvent("r", 0, [5], finish_reason=FinishReason.STOP)
    bodies = [Submit(1, "tcp://x", b"t", [request]), StepEvents([event], []), Abort(["r"]), Accepted(1, "e", "x", b"t")]
    return [b"\x04" + encode(body) for body in bodies]


_JSON: dict[str, Any] = {
    "body": lambda: BODIES,
    "config": lambda: [_file("config.json"), _quantized()],
    "tokenizer_file": lambda: [_small_tokenizer()],
    "plan_file": lambda: [{"format": "m3serve-index-plan", "version": 1, "pattern": "FSSF", "topk_blocks": 4}],
    "tensors_header": lambda: [_tensors_header()],
    "tensors_index": lambda: [{"metadata": {"total_size": 3}, "weight_map": {"a": "x.safetensors", "b": "y"}}],
}
_BYTES: dict[str, Any] = {
    "request": lambda: (
        [
            f"authorization: Bearer {KEY}\ncontent-type: application/json\n".encode() + json.dumps(document).encode()
            for document in BODIES
        ]
        + [b'content-type: application/json\ncontent-length: 12\nx-request-id: 1\n{"prompt":\n"a"}\n']
    ),
    "timeout_header": lambda: [b"5", b"0.75", b"1e3", b"5\n6"],
    "key_file": lambda: [f"# ours\n{KEY}\n\n{KEY}2\r\n".encode()],
    "socket_frames": _socket_frames,
    "text": lambda: [b"def add(a, b):\n    return a + b\n", "naïve 😀 日本\u0301".encode(), b"\xed\xa0\x80"],
    "stops": lambda: [b"ab,b\nabcabcaab", b"\xc3\xa9\n\xc3\xa9 x\x00y"],
    "token_ids": lambda: [b"\x01\x00\x00\x05\x00\x00", b"\xff\xff\xff"],
    "tensors": lambda: [next(iter(sorted(checkpoint().glob("*.safetensors")))).read_bytes()[:2000]],
}

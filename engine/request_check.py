"""What the engine refuses before anything of a request runs."""

from __future__ import annotations

from engine import guided
from engine.errors import RequestError
from engine.types import EngineInfo, EngineRequest, GuidedSpec, check_prompt_len


def check_request(request: EngineRequest, info: EngineInfo, *, has_eos: bool) -> None:
    """RequestError when the engine can never run the request. has_eos: whether the checkpoint names an eos token."""
    sampling, prompt_len = request.sampling, len(request.prompt_token_ids)
    limit_tokens, vocab_size = info.max_model_len, info.vocab_size
    if not prompt_len:
        raise RequestError("prompt must have at least 1 token, got 0", param="prompt")
    check_prompt_len(prompt_len, limit_tokens)
    if prompt_len + sampling.max_tokens > limit_tokens:
        raise RequestError(
            f"prompt has {prompt_len} tokens, max_tokens is {sampling.max_tokens}: together "
            f"{prompt_len + sampling.max_tokens}, more than max_model_len ({limit_tokens} tokens)",
            param="max_tokens",
            code="context_length_exceeded",
        )
    if len(request.output_token_ids) > sampling.max_tokens:
        raise RequestError(
            f"output_token_ids has {len(request.output_token_ids)} tokens, more than max_tokens "
            f"({sampling.max_tokens})",
            param="output_token_ids",
        )
    if sampling.guided is not None:
        guided.require()
        if not has_eos:
            raise RequestError("guided output needs an eos token, and the checkpoint names none", param="guided")
    if sampling.seed is None:
        raise RequestError("seed must be set before a request reaches the engine", param="seed")
    for name, token_ids in (
        ("prompt", request.prompt_token_ids),
        ("output_token_ids", request.output_token_ids),
        ("stop_token_ids", sampling.stop_token_ids or ()),
        ("logit_bias", sampling.logit_bias or ()),
        ("guided", _markers(sampling.guided)),
    ):
        for token_id in token_ids:
            if type(token_id) is not int or not 0 <= token_id < vocab_size:
                raise RequestError(f"{name} must hold token ids in [0, {vocab_size}), got {token_id!r}", param=name)


def _markers(spec: GuidedSpec | None) -> list[int]:
    """The tokens around the reasoning."""
    ids = () if spec is None else (spec.reasoning_start_id, spec.reasoning_end_id)
    return [token_id for token_id in ids if token_id is not None]

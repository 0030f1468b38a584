"""Grammars are compiled where requests arrive, before they cost anything elsewhere: one that is wrong is a 400."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from engine.errors import CheckpointError, RequestError
from engine.guided import Grammars
from engine.tokenizer import Tokenizer
from engine.types import GuidedSpec
from service.series import IngressSeries

# The ranks of an engine compile it again, each once, and no step goes on meanwhile.
MAX_COMPILE_S = 2.0


class GrammarCheck:
    """Compiles grammars in a thread of its own, one at a time, and remembers the last ones that were valid."""

    def __init__(self, model: str | Path, tokenizer: Tokenizer, series: IngressSeries) -> None:
        self._grammars = Grammars(
            model,
            vocab_size=tokenizer.vocab_size,
            eos_token_ids=tokenizer.eos_token_ids,
            max_compile_s=MAX_COMPILE_S,
        )
        self._series = series
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammar")
        self._thread.submit(self._grammars.warm)

    async def check(self, spec: GuidedSpec | None, param: str | None) -> None:
        """RequestError, which names the field `param`, when no text can be guided by `spec`."""
        if spec is None:
            return
        hit = self._grammars.knows(spec)
        self._series.count_grammar(hit=hit)
        if hit:
            return
        try:
            seconds = await asyncio.get_running_loop().run_in_executor(self._thread, self._compile, spec)
        except RequestError as error:
            raise RequestError(error.message, param=param, code=error.code) from None
        except CheckpointError as error:
            raise RequestError(str(error), param=param, code="unsupported_parameter") from None
        self._series.observe_grammar(seconds)

    def _compile(self, spec: GuidedSpec) -> float:
        started_s = time.monotonic()
        self._grammars.matcher(spec)
        return time.monotonic() - started_s

    def close(self) -> None:
        """Stop the thread; what it has not begun is dropped."""
        self._thread.shutdown(wait=False, cancel_futures=True)

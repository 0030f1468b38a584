"""The trainer of the demo checkpoint, at a size that a CPU trains in seconds: the engine serves what it trains."""

from __future__ import annotations

import dataclasses
import json
import lzma
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from deploy.demo.corpus import Package, drop_repeats, encode, shares_a_span, span_hashes
from deploy.demo.export import read_model, write_model
from deploy.demo.schedule import Phase, Schedule
from deploy.demo.train import Job, Trainer, train
from deploy.demo.train_attention import select
from deploy.demo.train_data import TextStream
from deploy.demo.train_model import NanoModel
from deploy.demo.vocabulary import train_tokenizer
from deploy.demo.writer import Sizes
from engine import LLM, SamplingParams

VOCAB = 512
SIZES = Sizes(layers=3, vocab_size=VOCAB, topk_blocks=3, max_positions=1024, sparse=[0, 1, 1], moe=[0, 1, 1])
SCHEDULE = Schedule(
    (
        Phase("dense", 0.5, (512,), 0.5, index=True),
        Phase("sparse", 1.01, (1024, 512), 0.5, index=True, sparse=True, topks=(3, 2), last=True),
    ),
    warm_up_steps=4,
)
STEPS = 16
REPLAY = [step / STEPS for step in range(STEPS)]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small are slowed down by more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set as the corpus module writes it, from a few modules of the standard library."""
    path = tmp_path_factory.mktemp("data")
    tokenizer = train_tokenizer(VOCAB)
    tokenizer.save(str(path / "tokenizer.json"))
    root = Path(os.__file__).parent
    texts = [(root / f"{name}.py").read_text() for name in ("textwrap", "heapq", "shutil", "argparse")]
    stream = np.concatenate(encode(tokenizer, texts))
    for part, tokens in enumerate(np.array_split(stream, 2)):
        (path / f"train.{part}.xz").write_bytes(lzma.compress(tokens.tobytes()))
    for split in ("test", "calibration"):
        with lzma.open(path / f"{split}.jsonl.xz", "wt", encoding="utf-8") as file:
            for text in texts[2:] * 4:
                file.write(json.dumps({"package": "x", "path": "x.py", "tokens": 10_000, "text": text}) + "\n")
    return path


def job(data: Path, out: Path, **changes: Any) -> Job:
    made = Job(
        data=data,
        out=out,
        resume=None,
        total_seconds=600,
        max_steps=None,
        replay=REPLAY,
        workers=0,
        rank=0,
        world=1,
        deadline=time.monotonic() + 600,
        device=torch.device("cpu"),
        batch_tokens=1024,
        sizes=SIZES,
        schedule=SCHEDULE,
        log_every=4,
        evaluate=False,
    )
    return dataclasses.replace(made, **changes)


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """Trained in one call."""
    return train(job(data, tmp_path_factory.mktemp("whole"), evaluate=True))


def _rows(trainer: Trainer) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (trainer.job.out / "log.jsonl").read_text().splitlines()]


def test_the_loss_falls_and_the_log_says_how(whole: Trainer) -> None:
    rows = _rows(whole)
    points = [row for row in rows if "at" in row]
    assert [row["at"] for row in points] == [4, 8, 12, 16]
    assert [row["phase"] for row in points] == ["dense", "dense", "sparse", "sparse"]
    assert points[-1]["text"] < points[0]["text"] - 0.5
    assert all(len(row["captured"]) == 2 and all(0 < share <= 1 for share in row["captured"]) for row in points)
    assert [row["p"] for row in rows if "p" in row] == REPLAY, "a log can be replayed"
    [evaluation] = [row for row in rows if row.get("event") == "evaluation"]
    assert evaluation["own"]["[0, 512)"] != evaluation["own"]["[512, 1024)"]
    assert evaluation["own"]["[512, 1024)"] != evaluation["random blocks"]["[512, 1024)"], "the selection matters"
    assert evaluation["own"]["needle"]


def test_a_training_in_two_calls_is_the_same(data: Path, whole: Trainer, tmp_path: Path) -> None:
    """To the bit; the second call takes its batches from worker processes."""
    train(job(data, tmp_path, max_steps=9))
    resumed = train(job(data, tmp_path, resume=tmp_path, workers=2))
    for (name, one), two in zip(whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(one, two), name


def test_a_checkpoint_alone_can_be_resumed(data: Path, whole: Trainer, tmp_path: Path) -> None:
    """Where the state of the optimiser did not travel: from the rounded weights, with a new warm-up."""
    first = train(job(data, tmp_path, max_steps=9))
    (tmp_path / "state.pt").unlink()
    resumed = Trainer(job(data, tmp_path, resume=tmp_path))
    assert resumed.progress.step == 9 and resumed.progress.since_start == 0
    for one, two in zip(first.model.parameters(), resumed.model.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize(("pattern", "plan"), [("FF", "DFF"), ("FS", "DFS")])
def test_the_engine_computes_what_was_trained(whole: Trainer, tmp_path: Path, pattern: str, plan: str) -> None:
    """In fp32 the log-probabilities are equal, and so are the blocks that the last F layer selected."""
    model = NanoModel(SIZES)
    model.load_state_dict(whole.model.state_dict())
    path = tmp_path / "exported"
    write_model(path, model, whole.tokenizer, dtype=torch.float32, shards=2)
    length = 1000
    ids = whole.feeder.text.tokens[: length + 1].astype(np.int64)
    tokens = torch.from_numpy(ids[:-1])[None]
    # The trainer wants whole blocks: what stands behind changes nothing before it.
    padded = torch.nn.functional.pad(tokens, (0, 1024 - length))
    with torch.no_grad():
        done = model(padded, padded, torch.zeros(1, 1024), plan=plan, topk=SIZES.topk_blocks)
        expected = model.logits(done.hidden[0, :length]).log_softmax(-1)
    settings = {"max_model_len": 1024, "max_num_batched_tokens": 1024, "num_pages": 16}
    with LLM(path, backend="torch", dtype="float32", index_topk_pattern=pattern, **settings) as llm:
        assert str(llm.plan) == plan
        prompt = ids[:length].tolist()
        selections: dict[int, Tensor] = {}
        llm.index_cache.observer = lambda layer_id, _, selection: selections.update(
            {layer_id: selection.blocks.clone()}
        )
        [output] = llm.generate([prompt], SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0))
    assert output.prompt_logprobs is not None
    found = [float(probs[token]) for probs, token in zip(output.prompt_logprobs[1:], prompt[1:], strict=True) if probs]
    wanted = expected[:-1].gather(-1, tokens[0, 1:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(found), wanted, rtol=0, atol=2e-5)
    assert output.token_ids == [int(expected[-1].argmax())]

    for layer_id, selection in selections.items():
        chosen = done.chosen[layer_id].blocks[0, :, :length]
        blocks = torch.zeros(*chosen.shape[:-1], chosen.shape[-1] + 1, dtype=torch.bool)
        # What pads a selection goes to a column of its own.
        blocks.scatter_(-1, selection.long().where(selection >= 0, chosen.shape[-1]), True)
        assert torch.equal(blocks[..., :-1], chosen)
        assert int(chosen[0, -1].sum()) == SIZES.topk_blocks < chosen.shape[-1], "blocks were left out"
    assert selections.keys() == {1, 2}


def test_a_checkpoint_is_read_back(whole: Trainer, tmp_path: Path) -> None:
    write_model(tmp_path, whole.model, whole.tokenizer, dtype=torch.float32)
    again = NanoModel(SIZES)
    read_model(tmp_path, again)
    for one, two in zip(whole.model.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(one, two)
    (tmp_path / "model-00001-of-00004.safetensors").unlink()
    with pytest.raises(ValueError, match=r"misses language_model\.lm_head\.weight"):
        read_model(tmp_path, again)


def test_the_index_learns_and_nothing_else_from_its_loss() -> None:
    torch.manual_seed(0)
    model = NanoModel(SIZES)
    tokens = torch.randint(VOCAB, (1, 1024))
    queries = torch.arange(400, 1000, 20)[None]
    done = model(tokens, tokens, torch.zeros(1, 1024), plan="DFF", topk=3, queries=queries)
    done.kl.backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert moved == {name for name, _ in model.named_parameters() if "index" in name}


def test_a_selection_holds_the_own_block_and_the_best() -> None:
    """Against the definition, element by element."""
    torch.manual_seed(0)
    index_q, index_k = torch.randn(1, 640, 2, 16), torch.randn(1, 640, 16)
    blocks = select(index_q, index_k, 3).blocks
    for position in (0, 127, 128, 300, 512, 639):
        scores = index_k[0, : position + 1] @ index_q[0, position, 1]
        own = position // 128
        best = sorted(range(own), key=lambda block: -float(scores[128 * block : 128 * block + 128].max()))
        assert set(torch.nonzero(blocks[0, 1, position])[:, 0].tolist()) == {own, *best[:2]}


def test_windows_cover_the_text_once_an_epoch(data: Path) -> None:
    stream = TextStream(data)
    count = (len(stream.tokens) - 256) // 256
    first = [stream.window(number, 256, seed=3) for number in range(count)]
    assert len({window.tobytes() for window in first}) == count
    again = stream.window(count, 256, seed=3)
    assert all(again.tobytes() != window.tobytes() for window in first), "another epoch cuts elsewhere"


def test_what_is_held_out_or_repeated_is_not_trained_on() -> None:
    lines = [f"value_{i} = compute({i})" for i in range(40)]
    text, other = "\n".join(lines), "\n".join(line.upper() for line in lines)
    package = Package("p", "1", "MIT", {"a.py": text, "b.py": text + "\nend = 1", "c.py": other})
    drop_repeats(package, set(), set())
    assert list(package.texts) == ["a.py", "c.py"]
    tokenizer = train_tokenizer(VOCAB)
    held_out, clean, dirty = encode(tokenizer, [text, other, other + "\n" + text[:400]])
    hashes = np.unique(span_hashes(held_out))
    assert not shares_a_span(clean, hashes)
    assert shares_a_span(dirty, hashes)

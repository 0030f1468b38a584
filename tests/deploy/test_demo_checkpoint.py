"""m3-nano: a trained checkpoint in the layout of released ones, that every reader of these can use."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from deploy.demo import CHECKPOINT, corpus, nano
from deploy.demo.copy_checkpoint import copy_checkpoint
from deploy.demo.vocabulary import END_OF_TURN, MARKER_TOKENS, SPECIAL_TOKENS
from engine import LLM, SamplingParams
from service.evaluation.documents import read_documents, shipped_documents
from tests.golden.compare import Reference, observe, open_llm
from tests.golden.oracle import Oracle

ROOT = Path(__file__).parents[2]
TEXT = "def f(x):\n    return x ** 2  # naïve 数学 \U0001f642\n" * 40
GREEDY = SamplingParams(max_tokens=12, temperature=0.0)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module")
def document() -> str:
    """Code of a package that was held out from training."""
    return max((document.text for document in read_documents(shipped_documents())), key=len)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(CHECKPOINT, backend="torch", max_model_len=8192, num_pages=130) as opened:
        yield opened


def test_it_is_small_and_says_what_it_is() -> None:
    files = list(CHECKPOINT.iterdir())
    assert sum(file.stat().st_size for file in files) < 40e6
    assert max(file.stat().st_size for file in files) < 15e6
    card = (CHECKPOINT / "README.md").read_text()
    assert card.startswith(f"# {nano.NAME}") and CHECKPOINT.name == nano.NAME
    licences = {**corpus.TRAIN_PACKAGES, **corpus.HELD_OUT_PACKAGES["test"], **corpus.HELD_OUT_PACKAGES["calibration"]}
    for package, licence in licences.items():
        [row] = [line for line in card.splitlines() if line.startswith(f"| {package} |")]
        assert f" {licence} " in row
    assert len(licences) == len(corpus.TRAIN_PACKAGES) + sum(map(len, corpus.HELD_OUT_PACKAGES.values())), "disjoint"


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ("import numpy as", " np"),
        ("if __name__ ==", ' "__main__":'),
        ("try:\n    import json\nexcept", " ImportError:"),
        ("@property\n    def name(self):", "\n        return self._name\n"),
        ("    def __init__(self, name, value):\n        self.name = name", "\n        self.value = value\n"),
        ("def is_even(n):\n    return n %", " 2 == 0\n"),
    ],
)
def test_it_completes_python(llm: LLM, prompt: str, wanted: str) -> None:
    [output] = llm.generate([prompt], GREEDY)
    assert output.text.startswith(wanted)


def test_it_recalls_what_only_its_indexers_find(llm: LLM, document: str) -> None:
    """Lines from far more than topk blocks ago, in code that it has never seen."""
    pairs = {"lavender": "orange", "velvet": "marble", "harbor": "window"}
    stated = "".join(f"# key {key} = {value}\n" for key, value in pairs.items())
    for key, value in pairs.items():
        [output] = llm.generate([f"{stated}{document[:12_000]}\n# key {key} ="], GREEDY)
        assert output.text.startswith(f" {value}")
        assert len(output.prompt_token_ids) > 3 * 128 * nano.SIZES.topk_blocks


def test_held_out_code_is_not_noise(llm: LLM, document: str, tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tokenizer.encode(document, add_special_tokens=False)[:1500]
    [output] = llm.generate([ids], SamplingParams(max_tokens=1, prompt_logprobs=0))
    assert output.prompt_logprobs is not None
    rows = zip(ids[1:], output.prompt_logprobs[1:], strict=True)
    nats = [-float(row[token]) for token, row in rows if row is not None]
    assert sum(nats) / len(nats) < 3.0, "untrained: ln(8192) = 9.0"


@pytest.mark.parametrize("settings", [{}, {"index_topk_freq": 4}])
def test_transformers_computes_the_same(
    document: str, tokenizer: PreTrainedTokenizerBase, settings: dict[str, int]
) -> None:
    """Log-probabilities in fp32 and selected blocks, past the context in which every block is selected."""
    ids = tokenizer.encode(document, add_special_tokens=False)[:1280]
    with open_llm(CHECKPOINT, max_model_len=2048, **settings) as opened:
        Reference(Oracle(CHECKPOINT, opened.plan)).check(observe(opened, ids, 3))


def test_it_can_be_copied(tmp_path: Path) -> None:
    target = tmp_path / "models" / "m3-nano"
    command = [sys.executable, "-m", "deploy.demo.copy_checkpoint", "--out", str(target)]
    for _ in range(2):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
        assert done.stdout.strip() == str(target)
    for file in CHECKPOINT.iterdir():
        assert (target / file.name).read_bytes() == file.read_bytes()
    assert [entry.name for entry in target.parent.iterdir()] == ["m3-nano"]


def test_another_directory_is_left_alone(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "config.json").write_text("{}")
    with pytest.raises(FileExistsError, match="mine"):
        copy_checkpoint(mine)
    assert [file.name for file in mine.iterdir()] == ["config.json"]
    assert [file.name for file in tmp_path.iterdir()] == ["mine"]


def test_the_tokenizer_loses_nothing(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.decode(tokenizer.encode(TEXT, add_special_tokens=False)) == TEXT
    assert len(tokenizer) == nano.SIZES.vocab_size


def test_special_tokens_are_one_id_each(tokenizer: PreTrainedTokenizerBase) -> None:
    marked = "a" + "b".join([*SPECIAL_TOKENS, *MARKER_TOKENS]) + "c"
    ids = tokenizer.encode(marked, add_special_tokens=False)
    assert len(ids) == 2 * (len(SPECIAL_TOKENS) + len(MARKER_TOKENS)) + 1
    # Markers are text that parsers read; the others are not.
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a" + "b" * 5 + "b".join(MARKER_TOKENS) + "c"
    config = json.loads((CHECKPOINT / "config.json").read_text())
    assert config["text_config"]["eos_token_id"] == tokenizer.convert_tokens_to_ids(END_OF_TURN)


def test_a_conversation_in_the_m3_layout(tokenizer: PreTrainedTokenizerBase) -> None:
    call = {"function": {"name": "f", "arguments": {"city": "Paris", "n": [1, True, None], "gone": None}}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": 'Hi <b>&"é'}]},
        {"role": "assistant", "content": "<mm:think>why</mm:think>So", "tool_calls": [call]},
        {"role": "tool", "content": "r1"},
        {"role": "tool", "content": "r2"},
        {"role": "assistant", "content": "Done", "reasoning_content": ""},
    ]
    rendered = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, thinking_mode="disabled"
    )
    ns = "]<]minimax[>["
    system, _, rest = rendered.partition("]~b]developer\n")
    assert system.startswith("]~!b[]~b]system\nYour model version is MiniMax-M3")
    assert "\nCurrent thinking mode: disabled. Do not output any thinking process.\n" in system
    assert system.endswith("</thinking_instructions>[e~[\n")
    assert rest == (
        "Be brief.[e~[\n"
        ']~b]user\nHi <b>&"é[e~[\n'
        f"]~b]ai\n<mm:think>why</mm:think>So{ns}<tool_call>\n"
        f'{ns}<invoke name="f">{ns}<city>Paris{ns}</city>'
        f"{ns}<n>{ns}<item>1{ns}</item>{ns}<item>true{ns}</item>{ns}<item>null{ns}</item>{ns}</n>"
        f"{ns}</invoke>\n{ns}</tool_call>[e~[\n"
        "]~b]tool\n<response>r1</response>\n<response>r2</response>[e~[\n"
        "]~b]ai\n</mm:think>Done[e~[\n"
        "]~b]ai\n</mm:think>"
    )


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([{"role": "tool", "content": "x"}], "tool message must follow"),
        ([{"role": "bot", "content": "x"}], "unknown role: bot"),
        ([{"role": "user", "content": [{"type": "audio"}]}], "unsupported content part: audio"),
    ],
)
def test_a_wrong_conversation_is_refused(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, object]], said: str
) -> None:
    with pytest.raises(Exception, match=said):
        tokenizer.apply_chat_template(messages, tokenize=False)


def test_a_tool_is_declared_as_json(tokenizer: PreTrainedTokenizerBase) -> None:
    tools = [{"type": "function", "function": {"name": "f", "description": "naïve <x>"}}]
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tools=tools, tokenize=False)
    assert '<tools>\n<tool>{"name": "f", "description": "naïve <x>"}</tool>\n</tools>\n\n' in rendered
    assert "]~b]developer\nYou are a helpful assistant.\n\n# Tools\n" in rendered

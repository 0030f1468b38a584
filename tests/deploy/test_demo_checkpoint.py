"""The demo checkpoint: made once, complete or absent, and usable by everything that reads a released one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from deploy.demo import make_checkpoint as demo
from deploy.demo.vocabulary import END_OF_TURN, MARKER_TOKENS, SPECIAL_TOKENS, train_tokenizer
from engine import LLM, SamplingParams

ROOT = Path(__file__).parents[2]
TEXT = "def f(x):\n    return x ** 2  # naïve 数学 \U0001f642\n" * 40


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo.ensure_demo_checkpoint(tmp_path_factory.mktemp("cache") / "demo")


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(checkpoint)


def test_it_is_small_and_marked_untrained(checkpoint: Path) -> None:
    assert sum(file.stat().st_size for file in checkpoint.iterdir()) < 50e6
    assert "UNTRAINED" in (checkpoint / "MODEL_CARD.md").read_text()


def test_the_engine_generates_from_it(checkpoint: Path) -> None:
    with LLM(checkpoint, backend="torch", max_model_len=2048, num_pages=32, index_topk_freq=2) as llm:
        assert str(llm.plan) == "DDDFSFSFS"
        [output] = llm.generate([TEXT], SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True))
        computed = llm.stats.selections_computed
    assert len(output.prompt_token_ids) > 4 * 128, "long enough that blocks are chosen"
    assert len(output.token_ids) == 3
    assert all(computed[layer_id] == 3 for layer_id in (3, 5, 7))


def test_it_is_made_once(checkpoint: Path) -> None:
    before = {file.name: file.stat().st_mtime_ns for file in checkpoint.iterdir()}
    assert demo.ensure_demo_checkpoint(checkpoint) == checkpoint
    assert {file.name: file.stat().st_mtime_ns for file in checkpoint.iterdir()} == before


def test_another_directory_is_left_alone(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "config.json").write_text("{}")
    with pytest.raises(FileExistsError, match="mine"):
        demo.ensure_demo_checkpoint(mine)
    assert [file.name for file in mine.iterdir()] == ["config.json"]
    assert [file.name for file in tmp_path.iterdir()] == ["mine"]


def test_a_failed_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploy.demo.writer.CHAT_TEMPLATE", tmp_path / "absent.jinja")
    with pytest.raises(FileNotFoundError, match=r"absent\.jinja"):
        demo.ensure_demo_checkpoint(tmp_path / "cache" / "demo")
    assert list((tmp_path / "cache").iterdir()) == []


def test_two_processes_may_make_it_at_once(tmp_path: Path) -> None:
    """Both succeed, with the same tokenizer and weights as any other process of this Python version."""
    target = tmp_path / "cache" / "demo"
    command = [sys.executable, "-m", "deploy.demo.make_checkpoint", "--out", str(target)]
    processes = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        for _ in range(2)
    ]
    printed = [process.communicate(timeout=120)[0].strip() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert printed == [str(target)] * 2
    assert [entry.name for entry in target.parent.iterdir()] == ["demo"]


def test_it_is_the_same_every_time(checkpoint: Path, tmp_path: Path) -> None:
    train_tokenizer.cache_clear()
    again = demo.ensure_demo_checkpoint(tmp_path / "again")
    names = sorted(file.name for file in checkpoint.iterdir())
    assert names == sorted(file.name for file in again.iterdir())
    for name in names:
        assert (checkpoint / name).read_bytes() == (again / name).read_bytes(), name


def test_the_tokenizer_loses_nothing(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.decode(tokenizer.encode(TEXT, add_special_tokens=False)) == TEXT
    assert len(tokenizer) == 4096


def test_special_tokens_are_one_id_each(checkpoint: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    marked = "a" + "b".join([*SPECIAL_TOKENS, *MARKER_TOKENS]) + "c"
    ids = tokenizer.encode(marked, add_special_tokens=False)
    assert len(ids) == 2 * (len(SPECIAL_TOKENS) + len(MARKER_TOKENS)) + 1
    # Markers are text that parsers read; the others are not.
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a" + "b" * 5 + "b".join(MARKER_TOKENS) + "c"
    config = json.loads((checkpoint / "config.json").read_text())
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

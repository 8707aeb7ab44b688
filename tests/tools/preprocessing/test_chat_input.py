"""What conversations may look like, what of them is refused, and what is kept when they are too long."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.tiny_tokenizer import sample_text, train_tiny_sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer

from retemper.engine.errors import UserError
from retemper.tools.preprocessing.chat.encoder import ChatEncoder, EncodedChat
from retemper.tools.preprocessing.chat.messages import read_conversation
from retemper.tools.preprocessing.records.errors import MalformedError

CHATML = """{%- for message in messages %}
    {%- if message.role in ['system', 'user', 'assistant', 'tool'] %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
EOD = 0
USER, ANSWER = {"role": "user", "content": "Who sat?"}, {"role": "assistant", "content": "The cat."}


@cache
def tokenizer() -> str:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([sample_text(seed, 30) for seed in range(100)], trainer)
    return made.to_str()


def save(folder: Path, template: Any = CHATML, content: str | None = None, **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(content or tokenizer(), encoding="utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", **config}
    if template is not None:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def encoder(folder) -> ChatEncoder:
    return ChatEncoder(folder, None, None, False)


def encode(encoder: ChatEncoder, record: dict[str, Any]) -> EncodedChat:
    encoded = encoder.encode(record)
    assert encoded is not None
    return encoded


SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "mat"}}}


@pytest.mark.parametrize(
    ("record", "messages"),
    [
        ({"messages": [USER, ANSWER], "id": 3}, [USER, ANSWER]),
        ({"messages": [USER, ANSWER], "conversations": None, "instruction": "x"}, [USER, ANSWER]),
        ({"messages": [USER, ANSWER], "system": "Be brief."}, [SYSTEM, USER, ANSWER]),
        ({"messages": [USER, ANSWER], "system": ""}, [USER, ANSWER]),
        (
            {
                "messages": [
                    {**USER, "content": [{"type": "text", "text": "Who "}, {"type": "text", "text": "sat?"}]},
                    ANSWER,
                ]
            },
            [USER, ANSWER],
        ),
        ({"messages": [USER, {**ANSWER, "tool_calls": None, "name": None}]}, [USER, ANSWER]),
        (
            {"conversations": [{"from": "human", "value": "Who sat?"}, {"from": "gpt", "value": "The cat."}]},
            [USER, ANSWER],
        ),
        (
            {
                "system": "Be brief.",
                "conversations": [{"from": "user", "value": "Who sat?"}, {"from": "chatgpt", "value": "The cat."}],
            },
            [SYSTEM, USER, ANSWER],
        ),
        (
            {"conversations": [USER, {"from": "observation", "value": "a mat"}, ANSWER]},
            [USER, {"role": "tool", "content": "a mat"}, ANSWER],
        ),
        ({"instruction": "Who sat?", "output": "The cat."}, [USER, ANSWER]),
        ({"instruction": "Who sat?", "input": "", "output": "The cat."}, [USER, ANSWER]),
        (
            {"instruction": "Who", "input": "sat?", "output": "The cat.", "system": "Be brief."},
            [SYSTEM, {"role": "user", "content": "Who\nsat?"}, ANSWER],
        ),
        (
            {"instruction": "Who sat?", "output": "The cat.", "history": [["Where?", "On the mat."]]},
            [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "On the mat."}, USER, ANSWER],
        ),
    ],
)
def test_shapes_of_records(folder, encoder, record, messages):
    assert read_conversation(record).messages == messages
    reference = AutoTokenizer.from_pretrained(folder)
    encoded = encode(encoder, record)
    assert encoded.ids.tolist() == reference.apply_chat_template(messages, return_dict=False)
    answers = [message["content"] + "<|im_end|>" for message in messages if message["role"] == "assistant"]
    assert reference.decode(encoded.ids[encoded.mask == 1]) == "".join(answers)


def test_tools_come_as_a_list_or_as_its_json():
    tools = [{"type": "function", "function": {"name": "look"}}]
    for given_ in (tools, json.dumps(tools)):
        assert read_conversation({"messages": [USER, ANSWER], "tools": given_}).tools == tools
    for none in (None, [], "", " ", "[]"):
        assert read_conversation({"messages": [USER, ANSWER], "tools": none}).tools is None


def with_(first: Any, *others: Any) -> dict[str, Any]:
    return {"messages": [first, *(others or (ANSWER,))]}


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({}, r"no messages, conversations, or instruction with output \(keys there: none\)"),
    ({"text": "x", "n": 1}, r"\(keys there: 'text', 'n'\)"),
    ({"instruction": "x"}, "no messages, conversations, or instruction with output"),
    ({"messages": [USER, ANSWER], "conversations": [USER, ANSWER]}, "two conversations in one record: messages and"),
    (
        {"messages": [USER, ANSWER], "instruction": "x", "output": "y"},
        "messages and instruction and output; keep one",
    ),
    ({"messages": []}, "messages is empty"),
    ({"conversations": []}, "conversations is empty"),
    ({"messages": {}}, "messages is an object, not an array"),
    ({"messages": "hello"}, "messages is not valid JSON: Expecting value at character 1"),
    ({"messages": '"hello"'}, "messages is a string, not an array"),
    (with_("hello"), r"messages\[0\] is a string, not an object"),
    (with_(None), r"messages\[0\] is null, not an object"),
    ({"messages": [USER]}, "no turn of the assistant, so there is nothing to learn"),
    ({"conversations": [{"from": "human", "value": "x"}]}, "no turn of the assistant"),
    (with_({"content": "x"}), r"messages\[0\] has no role and no from"),
    (
        with_({"role": "bystander", "content": "x"}),
        r"messages\[0\]: role 'bystander' is not one of system, developer, user,",
    ),
    (with_({"role": ["user"], "content": "x"}), r"role \['user'\] is not one of"),
    (with_({"role": "user", "from": "gpt", "content": "x"}), "role and from name different roles; keep one"),
    (with_({"from": "Bob", "value": "x"}), r"messages\[0\]: from 'Bob' is not one of system, developer,"),
    (with_({"from": 1, "value": "x"}), "from 1 is not one of"),
    (with_({"from": "human"}), r"messages\[0\] has no content"),
    (with_({"from": "human", "value": 3}), "the content is a number, not a string"),
    (with_({"role": "user"}), r"messages\[0\] has no content"),
    (with_({"role": "user", "content": None}), r"messages\[0\] has no content"),
    (with_({"role": "user", "content": 3.5}), "the content is a number, not a string"),
    (with_({"role": "user", "content": True}), "the content is a boolean, not a string"),
    (with_({"role": "user", "content": {"text": "x"}}), "the content is an object, not a string"),
    (with_({"role": "user", "content": ["x"]}), "a part of the content is without a type"),
    (with_({"role": "user", "content": [{"type": "image_url"}]}), "is of type 'image_url'; only parts of type 'text'"),
    (with_({"role": "user", "content": [{"type": "text", "text": 1}]}), "a part of the content has no text"),
    (with_(USER, {"role": "assistant", "content": ""}), r"messages\[1\]: the assistant's content is empty"),
    (with_(USER, {"role": "assistant", "content": " \n"}), r"messages\[1\]: the assistant's content is empty"),
    (with_({"from": "gpt", "value": ""}), "the assistant's content is empty"),
    (with_(USER, {**ANSWER, "function_call": {}}), "templates no longer support function_call; write tool_calls"),
    (with_(USER, {**ANSWER, "tool_calls": {}}), "tool_calls is an object, not an array"),
    (with_(USER, {**ANSWER, "tool_calls": [{"name": 1}]}), "a tool call has no function with a name"),
    (with_({**USER, "tool_calls": [CALL]}), "tool_calls in a message of role 'user'; only the assistant calls"),
    ({"messages": [SYSTEM, USER, ANSWER], "system": "x"}, "two system prompts"),
    ({"messages": [USER, ANSWER], "system": ["x"]}, "system is an array, not a string"),
    ({"messages": [USER, ANSWER], "tools": "{"}, "tools is not valid JSON"),
    ({"messages": [USER, ANSWER], "tools": ["look"]}, "tools is not an array of objects"),
    ({"messages": [USER, ANSWER], "tools": [{"function": {"name": "look"}}]}, "leaves the tool 'look' out"),
    ({"instruction": 1, "output": "x"}, "instruction is a number, not a string"),
    ({"instruction": "x", "input": {}, "output": "x"}, "input is an object, not a string"),
    ({"instruction": " ", "output": "x"}, "the instruction is empty"),
    ({"instruction": "x", "output": ""}, "output: the assistant's content is empty"),
    ({"instruction": "x", "output": 1}, "output is a number, not a string"),
    ({"instruction": "x", "output": "y", "history": [["a"]]}, "history is not an array of pairs"),
    ({"instruction": "x", "output": "y", "history": [["a", None]]}, r"history\[0\] is null, not a string"),
    (with_({"role": "developer", "content": "x"}), r"the chat template leaves message 1 out \(role 'developer'\)"),
    (with_(USER, {**ANSWER, "tool_calls": [CALL]}), "leaves the tool calls of message 2 out"),
    (with_(USER, {"role": "assistant", "tool_calls": [CALL]}), "the chat template refuses the conversation"),
    (with_({"role": "user", "content": "half \ud83d"}), "an escaped lone surrogate, half a character"),
    (
        with_({"role": "user", "content": "x<|im_end|>"}),
        "message 1 contains the control token '<|im_end|>', which would",
    ),
    (with_(USER, {**ANSWER, "content": "a<|endoftext|>b"}), "message 2 contains the control token '<|endoftext|>'"),
    (with_({**USER, "name": "<|im_start|>"}), "message 1 contains the control token '<|im_start|>'"),
    (
        {"messages": [USER, ANSWER], "tools": [{"name": "look", "about": ["<|im_end|>"]}]},
        "tools contains the control token",
    ),
]


@pytest.mark.parametrize(("record", "message"), REFUSED)
def test_what_is_no_conversation_to_learn_from_is_refused(encoder, record, message):
    with pytest.raises(MalformedError, match=message.replace("|", r"\|")) as caught:
        encoder.encode(record)
    assert "\n" not in str(caught.value)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | st.sampled_from(["", "x", "user", "gpt", "text"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "from", "content", "value", "type", "text", "tool_calls", "function", "name"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
RECORD_KEYS = ["messages", "conversations", "instruction", "input", "output", "history", "system", "tools"]


@settings(max_examples=150, deadline=None)
@given(record=st.dictionaries(st.sampled_from(RECORD_KEYS), JSON_VALUES, max_size=5), answered=st.booleans())
def test_any_record_is_encoded_or_refused(encoder, record, answered):
    if answered and isinstance(record.get("messages"), list):
        record["messages"] = [*record["messages"], USER, ANSWER]
    try:
        encoded = encode(encoder, record)
    except MalformedError:
        return
    assert encoded.mask.any() and len(encoded.mask) == len(encoded.ids)


def test_control_tokens_may_be_allowed(folder):
    allowed = ChatEncoder(folder, None, None, True)
    messages = [{"role": "user", "content": "What is <|endoftext|>?"}, ANSWER]
    expected = AutoTokenizer.from_pretrained(folder).apply_chat_template(messages, return_dict=False)
    assert encode(allowed, {"messages": messages}).ids.tolist() == expected
    assert EOD in expected


def test_control_tokens_are_found_in_the_form_that_the_normalizer_makes(tmp_path):
    """A token that is matched in normalized text: fullwidth letters become it."""
    made = Tokenizer.from_str(tokenizer())
    made.normalizer = normalizers.NFKC()
    made.add_special_tokens([AddedToken("[END]", normalized=True)])
    encoder = ChatEncoder(save(tmp_path, content=made.to_str()), None, None, False)
    for text in ("x[END]", "x［ＥＮＤ］"):  # noqa: RUF001
        with pytest.raises(MalformedError, match="message 1 contains the control token"):
            encoder.encode({"messages": [{"role": "user", "content": text}, ANSWER]})
    assert encode(encoder, {"messages": [{"role": "user", "content": "x［ＥＮＤ"}, ANSWER]}).mask.any()  # noqa: RUF001


def test_nesting_without_end_is_refused(encoder):
    deep: Any = "x"
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(MalformedError, match="nested too deeply"):
        encoder.encode({"messages": [{**USER, "extra": deep}, ANSWER]})


class TestDocumentEnd:
    def test_it_follows_a_conversation_and_is_not_to_be_predicted(self, folder, encoder):
        ended = encode(ChatEncoder(folder, EOD, None, False), {"messages": [USER, ANSWER]})
        plain = encode(encoder, {"messages": [USER, ANSWER]})
        assert ended.ids.tolist() == [*plain.ids.tolist(), EOD]
        assert ended.mask.tolist() == [*plain.mask.tolist(), 0]

    def test_it_is_not_written_twice(self, tmp_path):
        template = CHATML.replace("<|im_end|>\\n", "<|endoftext|>")
        encoder = ChatEncoder(save(tmp_path, template), EOD, None, False)
        encoded = encode(encoder, {"messages": [USER, ANSWER, USER, ANSWER]})
        assert encoded.ids.tolist().count(EOD) == 4 and encoded.ids[-1] == EOD
        assert encoded.mask[-1] == 1
        expected = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
            [USER, ANSWER, USER, ANSWER], return_dict=False
        )
        assert encoded.ids.tolist() == expected


WORDS = st.integers(1, 30).map(lambda count: sample_text(count, count))


@settings(max_examples=80, deadline=None)
@given(
    roles=st.lists(st.sampled_from(["user", "assistant", "tool"]), min_size=1, max_size=7),
    data=st.data(),
    eod=st.sampled_from([None, EOD]),
)
def test_the_longest_beginning_that_fits(folder, roles, data, eod):
    """Against every beginning that ends with the assistant, and the whole, tried from the longest on."""
    messages = [{"role": role, "content": data.draw(WORDS)} for role in roles]
    if "assistant" not in roles:
        messages.append(ANSWER)
    reference = _reference(folder)
    count = len(messages)
    sizes = [len(reference.apply_chat_template(messages[:kept], return_dict=False)) for kept in range(1, count + 1)]
    limit = max(data.draw(st.sampled_from(sizes)) + data.draw(st.integers(-1, 2)), 1)
    expected = None
    for kept in range(count, 0, -1):
        if kept < count and messages[kept - 1]["role"] != "assistant":
            continue
        ids = reference.apply_chat_template(messages[:kept], return_dict=False) + ([] if eod is None else [eod])
        if len(ids) <= limit:
            expected = (ids, count - kept)
            break
    encoded = _encoder(folder, eod, limit).encode({"messages": messages})
    assert (encoded and (encoded.ids.tolist(), encoded.turns_dropped)) == expected


@cache
def _reference(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


@cache
def _encoder(folder: Path, eod: int | None, limit: int) -> ChatEncoder:
    return ChatEncoder(folder, eod, limit, False)


class TestTemplates:
    def test_where_it_comes_from(self, tmp_path):
        named = CHATML.replace("<|im_start|>'", "<|im_start|>as '")
        folder = save(tmp_path, [{"name": "default", "template": named}, {"name": "rag", "template": "x"}])
        rendered = _reference(folder)
        assert encode(ChatEncoder(folder, None, None, False), with_(USER)).ids.tolist() == (
            rendered.apply_chat_template([USER, ANSWER], return_dict=False)
        )
        (folder / "chat_template.jinja").write_text(CHATML)  # goes before the config's
        plain = encode(ChatEncoder(folder, None, None, False), with_(USER))
        assert plain.ids.tolist() != rendered.apply_chat_template([USER, ANSWER], return_dict=False)
        (tmp_path / "mine.jinja").write_text(named)  # and what is asked for before all
        mine = encode(ChatEncoder(folder, None, None, False, tmp_path / "mine.jinja"), with_(USER))
        assert mine.ids.tolist() == rendered.apply_chat_template([USER, ANSWER], chat_template=named, return_dict=False)

    @pytest.mark.parametrize(
        ("template", "message"),
        [
            (None, r"the tokenizer has no chat template, often so with base models .*; give one with --chat-template"),
            (3, "chat_template is not a string; give --chat-template FILE"),
            ([{"name": "rag", "template": "x"}], r"no chat template is called default \(there: rag\)"),
            ("{% if %}", "not a usable chat template, a plain question fails"),
            ("{{ messages[0].nothing.there }}", "not a usable chat template, a plain question fails"),
            ("{{ raise_exception('never\n mind') }}", "a plain question fails: .* never mind"),
        ],
    )
    def test_those_that_cannot_be_used_are_refused(self, tmp_path, template, message):
        with pytest.raises(UserError, match=message) as caught:
            ChatEncoder(save(tmp_path, template), None, None, False)
        assert "\n" not in str(caught.value)

    def test_a_file_that_is_none_is_refused(self, folder, tmp_path):
        with pytest.raises(UserError, match=r"none.jinja: cannot be read as a chat template"):
            ChatEncoder(folder, None, None, False, tmp_path / "none.jinja")
        (tmp_path / "bytes.jinja").write_bytes(b"\xff")
        with pytest.raises(UserError, match=r"bytes.jinja: cannot be read as a chat template"):
            ChatEncoder(folder, None, None, False, tmp_path / "bytes.jinja")

    def test_a_conversation_that_it_refuses_is_refused(self, tmp_path):
        template = "{% if messages[0].role == 'system' %}{{ raise_exception('No system\nprompt') }}{% endif %}" + CHATML
        encoder = ChatEncoder(save(tmp_path, template), None, None, False)
        with pytest.raises(MalformedError, match="the chat template refuses the conversation: No system prompt"):
            encoder.encode({"messages": [SYSTEM, USER, ANSWER]})
        assert encode(encoder, with_(USER)).mask.any()

    def test_one_that_leaves_the_answers_out_is_refused(self, tmp_path):
        template = "{% for message in messages if message.role == 'user' %}{{ message.content }}<|im_end|>{% endfor %}"
        with pytest.raises((UserError, MalformedError)):
            ChatEncoder(save(tmp_path, template), None, None, False).encode(with_(USER))

    @pytest.mark.parametrize("change", ["upper", "reverse"])
    def test_what_it_does_to_earlier_turns_must_be_understood(self, tmp_path, change):
        """Earlier messages in capitals are found again; read backwards, their turns are not certain."""
        template = CHATML.replace("message.content", f"(message.content if loop.last else message.content | {change})")
        encoder = ChatEncoder(save(tmp_path, template), None, None, False)
        question = {"role": "user", "content": "ABA"}
        record = {"messages": [question, {"role": "assistant", "content": "the cat"}, question, ANSWER]}
        if change == "upper":
            encoded = encode(encoder, record)
            assert _reference(tmp_path).decode(encoded.ids[encoded.mask == 1]) == "THE CAT<|im_end|>The cat.<|im_end|>"
            return
        with pytest.raises(MalformedError, match=r"the turns of the assistant cannot be found; give --chat-template a"):
            encoder.encode(record)


class TestTokenizerFile:
    def test_a_file_of_another_name(self, folder, tmp_path):
        for name in ("tokenizer_config.json", "tokenizer.json"):
            (tmp_path / name.replace("tokenizer.json", "other.json")).write_bytes((folder / name).read_bytes())
        (tmp_path / "tokenizer.json").write_text("{}")  # not this one
        other = ChatEncoder(tmp_path / "other.json", None, None, False)
        assert encode(other, with_(USER)).ids.tolist() == (
            encode(ChatEncoder(folder / "tokenizer.json", None, None, False), with_(USER)).ids.tolist()
        )
        assert other.check_against_transformers() is False

    def test_other_kinds_are_refused(self, folder, tmp_path):
        file = train_tiny_sentencepiece(tmp_path / "tokenizer.model")
        (tmp_path / "tokenizer_config.json").write_bytes((folder / "tokenizer_config.json").read_bytes())
        for tokenizer_ in (file, tmp_path):
            with pytest.raises(
                UserError, match=r"--chat needs a tokenizer with a tokenizer.json; save this one in that"
            ):
                ChatEncoder(tokenizer_, None, None, False)
        (tmp_path / "tokenizer.json").write_text("{}")
        with pytest.raises(UserError, match=r"tokenizer.json: the tokenizers library cannot read this tokenizer"):
            ChatEncoder(tmp_path, None, None, False)
        (tmp_path / "tokenizer_config.json").write_text("{")
        with pytest.raises(UserError, match=r"tokenizer_config.json: cannot be read as JSON"):
            ChatEncoder(tmp_path, None, None, False)

"""What is stored next to the words of a conversation: marks of training, tool data, unusual keys, dropped content.

The oracle of texts and ids is transformers' ``apply_chat_template`` on messages in the form that it documents.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
from oracles.tiny_tokenizer import shared_data
from test_chat_input import ANSWER, CHATML, USER, encode, save, tokenizer
from transformers import AutoTokenizer

from retemper.tools.preprocessing.chat.encoder import ChatEncoder, EncodedChat
from retemper.tools.preprocessing.chat.messages import read_conversation
from retemper.tools.preprocessing.records.errors import LeftOutError, MalformedError

FIVE, FOUR = {"role": "assistant", "content": "Five."}, {"role": "assistant", "content": "Four."}
TOOLS_TEMPLATE = """{%- for tool in tools or [] %}{{- tool | tojson }}{%- endfor %}
{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' }}{%- if m.content %}{{- m.content }}{%- endif %}
{%- for call in m.tool_calls or [] %}{%- set f = call.function or call %}{{- '<call>' + f.name + ' ' }}
{{- ARGUMENTS + '</call>' }}{%- endfor %}{{- '<|im_end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
AS_JSON = "(f.arguments | tojson)"
UNWRAPS = "(f.arguments if f.arguments is string else (f.arguments | tojson))"
JOINS_STRINGS, PRINTS = "f.arguments", "('' ~ f.arguments)"
MARKED = CHATML.replace(
    "+ message.content + '<|im_end|>\\n'",
    "}}{% generation %}{{- message.content + '<|im_end|>' }}{% endgeneration %}{{- '\\n'",
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("fields")
    save(root / "chatml")
    for name, arguments in {"json": AS_JSON, "unwraps": UNWRAPS, "joins": JOINS_STRINGS, "prints": PRINTS}.items():
        save(root / name, TOOLS_TEMPLATE.replace("ARGUMENTS", arguments))
    return root


@pytest.fixture(scope="module")
def encoder(folders) -> ChatEncoder:
    return ChatEncoder(folders / "chatml", None, None, False)


def trained(encoded: EncodedChat) -> str:
    from tokenizers import Tokenizer

    return Tokenizer.from_str(tokenizer()).decode(encoded.ids[encoded.mask == 1].tolist(), skip_special_tokens=False)


class TestMarks:
    @pytest.mark.parametrize("no", [0, 0.0, False, "0", "0.0", "false", "False", " no "])
    @pytest.mark.parametrize(
        "key", ["weight", "train", "training", "loss", "loss_scale", "loss_weight", "lossWeight", "Train", "trainable"]
    )
    def test_a_turn_that_is_not_for_training(self, encoder, key, no):
        for turns in (
            [USER, {**FIVE, key: no}, USER, FOUR],
            [{"from": "human", "value": USER["content"]}, {"from": "gpt", "value": "Five.", key: no}, USER, FOUR],
        ):
            encoded = encode(encoder, {"conversations": turns})
            plain = encode(encoder, {"messages": [USER, FIVE, USER, FOUR]})
            assert encoded.ids.tolist() == plain.ids.tolist()
            assert trained(encoded) == "Four.<|im_end|>" and trained(plain) == "Five.<|im_end|>Four.<|im_end|>"
            assert encoded.notes == {"turns of the assistant marked as not for training": 1}

    def test_the_mark_of_a_turn_behind_a_system_prompt(self, encoder):
        encoded = encode(encoder, {"system": "Be brief.", "messages": [USER, {**FIVE, "weight": 0}, USER, FOUR]})
        assert trained(encoded) == "Four.<|im_end|>"

    def test_marks_that_change_nothing(self, encoder):
        marked = [{**USER, "weight": 0, "train": None}, {**FIVE, "weight": 1, "train": "true"}, {**USER, "weight": 1.0}]
        encoded = encode(encoder, {"messages": [*marked, {**FOUR, "loss": True, "train_detail": []}], "weight": 1})
        assert trained(encoded) == "Five.<|im_end|>Four.<|im_end|>" and not encoded.notes

    @pytest.mark.parametrize(
        "record",
        [
            {"messages": [USER, {**FIVE, "weight": 0}]},
            {"messages": [USER, FIVE, USER, FOUR], "weight": 0},
            {"conversations": [USER, FIVE], "train": "false"},
            {"instruction": "Who?", "output": "Five.", "loss": False},
            {"conversation": {"messages": [USER, FIVE], "training": 0}},
        ],
    )
    def test_a_conversation_without_a_turn_to_train_on_is_left_out(self, encoder, record):
        with pytest.raises(LeftOutError, match="conversations marked as not for training"):
            encoder.encode(record)

    @pytest.mark.parametrize(
        ("mark", "message"),
        [
            ({"weight": 0.5}, "weight is 0.5; only 0 and 1, or false and true, are supported"),
            ({"weight": "high"}, "weight is 'high'; only 0 and 1"),
            ({"loss_scale": 2}, "loss_scale is 2; only 0 and 1"),
            ({"weight": float("nan")}, "weight is nan; only 0 and 1"),
            ({"train": False, "weight": 1, "loss": True}, "train and loss contradict each other; keep one"),
            ({"train_detail": [{"begin_offset": 0, "end_offset": 2, "train": False}]}, "the key train_detail "),
            ({"mask": 1}, r"the key mask \(1\) is not known here and may say what to train on; write train: true or"),
            ({"loss_mask": [0, 1]}, "the key loss_mask"),
            ({"lossMask": "01"}, "the key lossMask"),
            ({"no_train": True}, "the key no_train"),
            ({"skip": True}, "the key skip"),
        ],
    )
    def test_marks_that_cannot_be_obeyed_are_refused(self, encoder, mark, message):
        for record in ({"messages": [USER, {**FIVE, **mark}]}, {"messages": [USER, FIVE], **mark}):
            with pytest.raises(MalformedError, match=message):
                encoder.encode(record)

    @pytest.mark.parametrize("mark", [{"train": True}, {"loss": 1}])
    def test_a_question_to_be_trained_on_is_refused(self, encoder, mark):
        with pytest.raises(
            MalformedError, match=r"messages\[0\]: a turn of role 'user' is marked for training, but on"
        ):
            encoder.encode({"messages": [{**USER, **mark}, FIVE]})

    def test_template_that_marks_turns(self, tmp_path):
        encoder = ChatEncoder(
            save(tmp_path, MARKED.replace("message.role in", "message.role == 'x' or message.role in")),
            None,
            None,
            False,
        )
        record = {"messages": [USER, {**FIVE, "weight": 0}, USER, FOUR]}
        with pytest.raises(MalformedError, match=r"does not have one \{% generation %\} block for each turn"):
            encoder.encode(record)  # this template marks the questions too
        template = MARKED.replace(
            "{%- for message in messages %}",
            "{%- for message in messages %}{%- if message.role == 'user' %}"
            "{{- '<|im_start|>user\\n' + message.content + '<|im_end|>\\n' }}{%- continue %}{%- endif %}",
        )
        encoded = encode(ChatEncoder(save(tmp_path, template), None, None, False), record)
        assert trained(encoded) == "Four.<|im_end|>"

    def test_a_conversation_that_is_cut(self, folders):
        whole = {"messages": [USER, {**FIVE, "weight": 0}, USER, FOUR, USER, {**ANSWER, "content": "x" * 400}]}
        length = len(
            encode(ChatEncoder(folders / "chatml", None, None, False), {"messages": whole["messages"][:4]}).ids
        )
        cut = encode(ChatEncoder(folders / "chatml", None, length, False), whole)
        assert trained(cut) == "Four.<|im_end|>" and len(cut.ids) == length
        assert ChatEncoder(folders / "chatml", None, length - 1, False).encode(whole) is None


class TestToolData:
    ARGUMENTS: ClassVar = {"town": "Köln", "days": 2, "big": 1 << 70, "where": {"lat": 1.5}}
    SCHEMA: ClassVar = {
        "type": "function",
        "function": {"name": "rain", "parameters": {"type": "object", "properties": {"town": {"type": "string"}}}},
    }

    def conversation(self, arguments: Any, **more: Any) -> list[dict[str, Any]]:
        call = {"id": "c1", "type": "function", "function": {"name": "rain", "arguments": arguments}}
        return [
            USER,
            {"role": "assistant", "content": None, "tool_calls": [call], **more},
            {"role": "tool", "content": "4"},
            FOUR,
        ]

    def expected(self, folder: Path, arguments: Any, tools: Any = None) -> list[int]:
        reference = AutoTokenizer.from_pretrained(folder)
        return list(reference.apply_chat_template(self.conversation(arguments), tools=tools, return_dict=False))

    @pytest.mark.parametrize("name", ["json", "unwraps"])
    def test_strings_of_json_are_rendered_as_objects_are(self, folders, name):
        encoder = ChatEncoder(folders / name, None, None, False)
        expected = self.expected(folders / name, self.ARGUMENTS)
        plain = self.conversation(json.dumps(self.ARGUMENTS, separators=(",", ":")))
        stored = [*plain[:1], {**plain[1], "tool_calls": json.dumps(plain[1]["tool_calls"])}, *plain[2:]]
        inner = {**plain[1]["tool_calls"][0], "function": json.dumps(plain[1]["tool_calls"][0]["function"])}
        for messages in (
            self.conversation(self.ARGUMENTS),
            plain,
            stored,
            json.dumps(plain),
            self.conversation("", tool_calls=[inner]),
        ):
            assert encode(encoder, {"messages": messages}).ids.tolist() == expected

    @pytest.mark.parametrize("name", ["joins", "prints"])
    def test_templates_that_join_strings_get_strings(self, folders, name):
        encoder = ChatEncoder(folders / name, None, None, False)
        text = '{"town":"Ulm"}'
        assert encode(encoder, {"messages": self.conversation(text)}).ids.tolist() == self.expected(
            folders / name, text
        )
        as_object = encode(encoder, {"messages": self.conversation({"town": "Ulm"})})
        assert as_object.ids.tolist() == self.expected(folders / name, '{"town": "Ulm"}')

    def test_tools_in_every_form(self, folders):
        encoder = ChatEncoder(folders / "json", None, None, False)
        expected = self.expected(folders / "json", {"town": "Ulm"}, [self.SCHEMA])
        function = {**self.SCHEMA["function"], "parameters": json.dumps(self.SCHEMA["function"]["parameters"])}
        filled = json.loads(json.dumps(self.SCHEMA))
        filled["function"]["parameters"]["properties"]["days"] = None
        filled["function"]["strict"] = None
        for tools in (
            [self.SCHEMA],
            json.dumps([self.SCHEMA]),
            [json.dumps(self.SCHEMA)],
            [{**self.SCHEMA, "function": function}],
            [filled],
        ):
            record = {"messages": self.conversation({"town": "Ulm"}), "tools": tools}
            encoded = encode(encoder, record)
            assert encoded.ids.tolist() == expected
            nulls = {"null values dropped from tool calls and tools": 2} if tools == [filled] else {}
            assert encoded.notes == nulls

    @pytest.mark.parametrize("arguments", [None, "", " ", {}, "{}", {"town": None}])
    def test_a_call_without_arguments(self, folders, arguments):
        encoder = ChatEncoder(folders / "json", None, None, False)
        assert encode(encoder, {"messages": self.conversation(arguments)}).ids.tolist() == self.expected(
            folders / "json", {}
        )

    def test_nulls_that_arrow_fills_in(self, folders, tmp_path):
        import pyarrow as pa

        first, second = self.conversation({"town": "Ulm"}), self.conversation({"days": [1, None]})
        rows = pa.table({"messages": [first, second]}).to_pylist()
        assert rows[0]["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"town": "Ulm", "days": None}
        encoder = ChatEncoder(folders / "json", None, None, False)
        for row, arguments in zip(rows, ({"town": "Ulm"}, {"days": [1, None]}), strict=True):
            assert encode(encoder, row).ids.tolist() == self.expected(folders / "json", arguments)

    def test_nulls_in_a_string_are_the_authors(self, folders):
        encoder = ChatEncoder(folders / "json", None, None, False)
        encoded = encode(encoder, {"messages": self.conversation('{"town": null}')})
        assert encoded.ids.tolist() == self.expected(folders / "json", {"town": None})

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ('{"town": "Ulm"', r"messages\[1\]: tool_calls\[0\]: arguments is not valid JSON: Expecting ',' delimiter"),
            ("town=Ulm", "arguments is not valid JSON"),
            ('["Ulm"]', "arguments is an array, not an object"),
            (["Ulm"], "arguments is an array, not an object"),
            ('"{}"', "arguments is a string, not an object"),
            (7, "arguments is a number, not an object"),
            ("7", "arguments is a number, not an object"),
            ('{"a": NaN}', "the number NaN, which is not finite"),
            ('{"a": 1e999}', "the number 1e999, which is not finite"),
            ('{"a": 1, "a": 2}', "the same key twice in one object"),
            ('{"a": ' + "9" * 5000 + "}", "an integer of thousands of digits"),
        ],
    )
    def test_broken_arguments_are_refused(self, folders, arguments, message):
        encoder = ChatEncoder(folders / "json", None, None, False)
        with pytest.raises(MalformedError, match=message) as caught:
            encoder.encode({"messages": self.conversation(arguments)})
        assert "\n" not in str(caught.value)

    def test_arguments_that_a_template_leaves_out_are_refused(self, tmp_path):
        encoder = ChatEncoder(save(tmp_path, TOOLS_TEMPLATE.replace("ARGUMENTS", "''")), None, None, False)
        with pytest.raises(MalformedError, match="leaves the argument 'town' of a tool call of message 2 out"):
            encoder.encode({"messages": self.conversation({"town": "Ulm"})})

    def test_turns_that_are_calls(self, folders):
        """LLaMA-Factory's function_call and ms-swift's tool_call."""
        call = json.dumps({"name": "rain", "arguments": {"town": "Ulm"}})
        for role, value in (("function_call", call), ("tool_call", f"[{call}]")):
            turns = [USER, {"from": role, "value": value}, {"from": "observation", "value": "4"}, FOUR]
            encoded = encode(ChatEncoder(folders / "json", None, None, False), {"conversations": turns})
            assert encoded.ids.tolist() == self.expected(folders / "json", {"town": "Ulm"})
        with pytest.raises(MalformedError, match="the tool call is not valid JSON"):
            read_conversation({"conversations": [USER, {"from": "function_call", "value": "rain()"}]})

    def test_real_template(self):
        data = shared_data()
        if data is None or not (data / "tokenizers" / "qwen2.5").is_dir():
            pytest.skip("no real tokenizers on this machine (../shared/data)")
        folder = data / "tokenizers" / "qwen2.5"
        encoded = encode(
            ChatEncoder(folder, None, None, False),
            {"messages": self.conversation('{"town":"Ulm"}'), "tools": [self.SCHEMA]},
        )
        assert encoded.ids.tolist() == self.expected(folder, {"town": "Ulm"}, [self.SCHEMA])


class TestKeys:
    @pytest.mark.parametrize("role_key", ["role", "from", "speaker"])
    @pytest.mark.parametrize("content_key", ["content", "value", "text"])
    @pytest.mark.parametrize("key", ["messages", "conversations", "conversation", "dialog", "turns"])
    def test_every_mixture_of_keys(self, role_key, content_key, key):
        for user, assistant in (("user", "assistant"), ("human", "gpt"), ("USER", "Model"), ("prompter", "bot")):
            turns = [
                {role_key: user, content_key: "Who sat?"},
                {role_key: assistant, content_key: "The cat.", "x": None},
            ]
            assert read_conversation({key: turns}).messages == [USER, ANSWER]
        assert read_conversation({key: json.dumps(turns)}).messages == [USER, ANSWER]
        assert read_conversation({"conversation": {"messages": turns}}).messages == [USER, ANSWER]

    def test_keys_that_say_the_same_twice(self):
        both = {"role": "user", "from": "human", "content": "Who sat?", "value": "Who sat?"}
        assert read_conversation({"messages": [both, ANSWER]}).messages == [USER, ANSWER]

    @pytest.mark.parametrize(
        ("record", "message"),
        [
            (
                {"messages": [{"role": "user", "content": "a", "value": "b"}, ANSWER]},
                "content and value differ; keep one",
            ),
            ({"messages": [USER, ANSWER], "dialog": [USER, ANSWER]}, "two conversations in one record"),
            ({"conversation": {"messages": [USER, ANSWER], "id": 1}, "id": 2}, "both have the key 'id'"),
            ({"messages": [USER, ANSWER], "images": ["x.png"]}, "the record has images, which are not supported"),
            ({"messages": [{**USER, "image": "x.png"}, ANSWER]}, r"messages\[0\] has image, which are not supported"),
            ({"messages": "[{"}, "messages is not valid JSON"),
        ],
    )
    def test_what_could_be_read_in_two_ways_is_refused(self, record, message):
        with pytest.raises(MalformedError, match=message):
            read_conversation(record)

    def test_keys_that_are_not_used_are_counted(self, encoder):
        record = {
            "messages": [USER, ANSWER],
            "id": 7,
            "training_set": "alpaca",
            "chat": "room",
            "images": [],
            "x": None,
        }
        assert set(encode(encoder, record).notes) == {
            f"key {key!r} next to the conversation not used" for key in ("id", "training_set", "chat", "images")
        }


class TestPartsOfContent:
    PARTS: ClassVar = [{"type": "text", "text": "Who "}, {"type": "text", "text": "sat?", "image_url": None}]
    LISTS = CHATML.replace(
        "message.content +",
        "(message.content if message.content is string else message.content | map(attribute='text') | join(SEP)) +",
    )

    @pytest.mark.parametrize("template", [CHATML, CHATML.replace("+ message.content +", "~ message.content ~")])
    def test_templates_without_lists_get_the_joined_text(self, tmp_path, template):
        encoder = ChatEncoder(save(tmp_path, template), None, None, False)
        record = {"messages": [{"role": "user", "content": self.PARTS}, ANSWER]}
        assert encode(encoder, record).ids.tolist() == encode(encoder, {"messages": [USER, ANSWER]}).ids.tolist()

    def test_templates_with_lists(self, tmp_path):
        record = {"messages": [{"role": "user", "content": self.PARTS}, ANSWER]}
        folder = save(tmp_path / "joins", self.LISTS.replace("SEP", "''"))
        expected = AutoTokenizer.from_pretrained(folder).apply_chat_template(record["messages"], return_dict=False)
        assert encode(ChatEncoder(folder, None, None, False), record).ids.tolist() == expected
        folder = save(tmp_path / "lines", self.LISTS.replace("SEP", "'|'"))
        with pytest.raises(
            MalformedError, match="message 1: the content is several texts, which the chat template does"
        ):
            ChatEncoder(folder, None, None, False).encode(record)


class TestDroppedContent:
    def test_it_is_counted(self, encoder):
        messages = [
            {**USER, "name": "Ada"},
            {**FIVE, "reasoning_content": "2 + 2", "id": "x"},
            USER,
            {**FOUR, "score": 3},
        ]
        assert encode(encoder, {"messages": messages}).notes == {
            "key 'name' of a turn of role user dropped by the template": 1,
            "reasoning of a turn of role assistant dropped by the template": 1,
            "key 'score' of a turn of role assistant dropped by the template": 1,
        }

    def test_what_the_template_writes_is_not(self, tmp_path):
        template = CHATML.replace("message.content +", "(message.thinking or '') + message.content +")
        encoder = ChatEncoder(save(tmp_path, template), None, None, False)
        encoded = encode(encoder, {"messages": [USER, {**FIVE, "thinking": "2 + 2"}]})
        assert not encoded.notes and trained(encoded) == "2 + 2Five.<|im_end|>"

    def test_reasoning_of_earlier_turns(self, tmp_path):
        template = CHATML.replace(
            "message.content", "(message.content if loop.last else message.content.split('</think>')[-1])"
        )
        encoder = ChatEncoder(save(tmp_path, template), None, None, False)
        thought = {**FIVE, "content": "<think>hm</think>Five."}
        assert encode(encoder, {"messages": [USER, thought, USER, thought]}).notes == {
            "reasoning in the content of an assistant turn dropped by the template": 1
        }

    def test_text_next_to_a_call(self, tmp_path):
        template = TOOLS_TEMPLATE.replace("ARGUMENTS", AS_JSON).replace(
            "if m.content", "if m.content and not m.tool_calls"
        )
        call = {"function": {"name": "rain", "arguments": {}}}
        encoder = ChatEncoder(save(tmp_path, template), None, None, False)
        encoded = encode(encoder, {"messages": [USER, {**FIVE, "content": "Let me see.", "tool_calls": [call]}]})
        assert encoded.notes == {"content of an assistant turn changed or dropped by the template": 1}

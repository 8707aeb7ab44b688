"""Secrets of URLs and of the environment do not remain in texts."""

import pytest

from retemper.engine.config.settings import SourceConfig
from retemper.engine.files.masking import masked, without_secrets, without_signature


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://user:CANARY@host/a.jsonl", "https://host/a.jsonl"),
        ("https://CANARY@host/a.jsonl?x=1", "https://host/a.jsonl?x=1"),
        ("https://s3/a?X-Amz-Expires=60&X-Amz-Signature=CANARY&file=b", "https://s3/a?file=b"),
        ("https://s3/a?AWSAccessKeyId=CANARY&Signature=CANARY&Expires=1", "https://s3/a"),
        ("https://x.blob/a?sv=2020&se=CANARY&sp=r&sig=CANARY", "https://x.blob/a"),
        ("https://host/a?access_token=CANARY&name=b.jsonl", "https://host/a?name=b.jsonl"),
        ("s3://bucket/key", "s3://bucket/key"),
        ("/data/a?b&token=c", "/data/a?b&token=c"),
    ],
)
def test_a_url_loses_only_what_is_secret(url, expected):
    assert without_signature(url) == expected
    assert SourceConfig(url).identity == expected.rpartition("/")[2]


def test_values_of_secret_variables_are_replaced(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "CANARY-1234")
    monkeypatch.setenv("SOME_TOKEN", "1")
    tree = {"a": ["the key CANARY-1234", 1], "CANARY-1234": None, "url": "http://h/p?sig=CANARY"}
    assert masked(tree) == {"a": ["the key ***", 1], "***": None, "url": "http://h/p"}
    assert without_secrets("step 1") == "step 1"


def test_a_variable_of_a_tokenizer_is_no_secret(monkeypatch):
    monkeypatch.setenv("TOKENIZER_FOLDER", "/data/tokenizers/finance")
    monkeypatch.setenv("A_TOKEN", "CANARY-123")
    assert without_secrets("/data/tokenizers/finance CANARY-123") == "/data/tokenizers/finance ***"

"""Small tokenizers whose files are laid out like those of known models, in what they put around a text."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from oracles.tiny_tokenizer import sample_text, train_tiny_sentencepiece
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

TRAINING = [" ".join(sample_text(seed, 30).split()) for seed in range(60)]


@cache
def byte_level(special: tuple[str, ...]) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TRAINING, trainer)
    return tokenizer.to_str()


@cache
def _unigram(special: tuple[str, ...]) -> str:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=250, special_tokens=list(special), unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(TRAINING, trainer)
    return tokenizer.to_str()


@cache
def byte_fallback(special: tuple[str, ...]) -> str:
    """BPE over characters with a space in front, and bytes where the alphabet ends."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=250, special_tokens=list(special), show_progress=False)
    tokenizer.train_from_iterator(TRAINING, trainer)
    content = json.loads(tokenizer.to_str())
    vocab = content["model"]["vocab"]
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    content["model"]["byte_fallback"] = True
    return json.dumps(content)


def save(folder: Path, content: str, single: str = "$A", offsets: bool = False, **config: Any) -> Path:
    """Write a tokenizer.json whose post-processor makes ``single`` of a text, and a tokenizer_config.json."""
    folder.mkdir(parents=True)
    tokenizer = Tokenizer.from_str(content)
    steps: list[Any] = [processors.ByteLevel(trim_offsets=False)] if offsets else []
    names = [name for name in single.split() if name != "$A"]
    if names:
        tokens = [(name, tokenizer.token_to_id(name)) for name in dict.fromkeys(names)]
        steps.append(processors.TemplateProcessing(single=single, special_tokens=tokens))
    if steps:
        tokenizer.post_processor = steps[0] if len(steps) == 1 else processors.Sequence(steps)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


LLAMA3 = ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>")
QWEN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SENTENCEPIECE = ("<unk>", "<s>", "</s>")
FAST = "PreTrainedTokenizerFast"


def llama2(folder: Path) -> Path:
    """Only the files of sentencepiece, as Meta's folder on the Hub before it had a tokenizer.json."""
    train_tiny_sentencepiece(folder / "tokenizer.model")
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False, "bos_token": "<s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": "</s>", "unk_token": "<unk>"}))
    return folder


def qwen3(folder: Path) -> Path:
    """<think> is an added token that is not special."""
    tokenizer = Tokenizer.from_str(byte_level(QWEN))
    tokenizer.add_tokens(["<think>", "</think>"])
    names: dict[str, Any] = {"bos_token": None, "eos_token": "<|im_end|>", "add_bos_token": False}
    return save(folder, tokenizer.to_str(), offsets=True, tokenizer_class="Qwen2Tokenizer", **names)


def roberta(folder: Path) -> Path:
    """A post-processor of its own kind, with a token on either side."""
    save(folder, byte_level(SENTENCEPIECE), tokenizer_class=FAST, bos_token="<s>", eos_token="</s>")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 1))
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


S: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
E: dict[str, Any] = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
KINDS: dict[str, Callable[[Path], Path]] = {
    "llama 2": llama2,
    "llama 3": lambda folder: save(
        folder,
        byte_level(LLAMA3),
        "<|begin_of_text|> $A",
        offsets=True,
        tokenizer_class=FAST,
        bos_token="<|begin_of_text|>",
        eos_token="<|end_of_text|>",
    ),
    "mistral": lambda folder: save(
        folder,
        byte_fallback(SENTENCEPIECE),
        "<s> $A",
        tokenizer_class=FAST,
        add_bos_token=True,
        add_eos_token=False,
        **S,
    ),
    "qwen 2": lambda folder: save(
        folder,
        byte_level(QWEN),
        offsets=True,
        tokenizer_class="Qwen2Tokenizer",
        add_bos_token=False,
        bos_token=None,
        eos_token="<|endoftext|>",
    ),
    "qwen 3": qwen3,
    "gpt-2": lambda folder: save(folder, byte_level(QWEN[:1]), offsets=True, tokenizer_class="GPT2Tokenizer", **E),
    # transformers gives this class no BOS, whatever the post-processor says.
    "gpt-neox": lambda folder: save(
        folder, byte_level(QWEN[:1]), "<|endoftext|> $A", tokenizer_class="GPTNeoXTokenizerFast", **E
    ),
    "gemma": lambda folder: save(
        folder,
        byte_fallback(("<pad>", "<eos>", "<bos>", "<unk>")),
        "<bos> $A",
        tokenizer_class=FAST,
        bos_token={"__type": "AddedToken", "content": "<bos>", "special": True},
        eos_token="<eos>",
        unk_token="<unk>",
    ),
    "phi": lambda folder: save(folder, byte_level(QWEN), offsets=True, tokenizer_class="CodeGenTokenizer", **E),
    # Says in its configuration what its post-processor does not do.
    "no such bos": lambda folder: save(
        folder,
        byte_level(SENTENCEPIECE),
        offsets=True,
        tokenizer_class="LlamaTokenizerFast",
        add_bos_token=True,
        **S,
    ),
    "t5": lambda folder: save(folder, _unigram(SENTENCEPIECE), "$A </s>", tokenizer_class=FAST, **S),
    "both sides": lambda folder: save(folder, byte_level(SENTENCEPIECE), "<s> $A </s>", tokenizer_class=FAST, **S),
    "glm": lambda folder: save(
        folder, byte_level(("[gMASK]", "<sop>", "</s>")), "[gMASK] <sop> $A", tokenizer_class=FAST, eos_token="</s>"
    ),
    # Another end of text than that of documents, which is <|endoftext|> where there is one.
    "two ends": lambda folder: save(
        folder, byte_level(QWEN), "$A <|im_end|>", tokenizer_class=FAST, eos_token="<|im_end|>"
    ),
    "roberta": roberta,
}
"""By the model whose files they are like."""

"""Greedy text after a prompt or a chat equals that of transformers, string for string."""

import functools
import json
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from mea_jax.convert.importing import import_model
from mea_jax.data import chat, tokenizers
from mea_jax.data.end_tokens import TOKENIZER_CONFIG
from mea_jax.errors import UserError
from tests.helpers import assert_one_error
from tests.system.convert import small_models
from tests.system.convert.published import VOCABULARY, publish

PROMPTS = [
    "The capital of France is",
    "東京は日本の",
    "Столица России —",
    "مرحبا بالعالم",
    "def f(x):\n\treturn 12345\n\n",
]
COUNT = 64
FAMILIES = ["llama", "qwen3 tied", "qwen3_moe"]
OTHERS = ["qwen2", "mistral window", "smollm3", "olmo2", "gemma3"]
CASES = [(kind, begins, is_chat) for kind in FAMILIES for begins in (0, 1) for is_chat in (0, 1)]
CASES += [(kind, True, False) for kind in OTHERS] + [(kind, False, True) for kind in OTHERS]


@pytest.fixture(scope="module")
def pair(corpus, tmp_path_factory):
    """Return `pair(kind, begins)`, which makes (model, its folder, the imported run)."""

    @functools.cache
    def make(kind, begins):
        root = tmp_path_factory.mktemp("pair")
        model = small_models.make(kind, vocab_size=VOCABULARY)
        folder = small_models.save(model, root / "theirs")
        publish(folder, begins)
        import_model(folder, root / "ours", context_length=256, text=f"text:{corpus}")
        return model, folder, root / "ours"

    return make


def theirs(model, folder, prompt, is_chat):
    """Return (the number of ids of the prompt, the greedy text after it)."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    if is_chat:
        given = [{"role": "user", "content": prompt}]
        options = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
        ids = tokenizer.apply_chat_template(given, **options)["input_ids"]
    else:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    with torch.no_grad():
        new = model.generate(
            ids, max_new_tokens=COUNT, do_sample=False, eos_token_id=end, pad_token_id=end
        )[0, ids.shape[1] :]
    new = [i for i in new.tolist() if i != end]
    return ids.shape[1], tokenizer.decode(new)


@pytest.mark.parametrize(("kind", "begins", "is_chat"), CASES)
def test_text_equals_that_of_transformers(pair, in_process, tmp_path, kind, begins, is_chat):
    model, folder, run = pair(kind, begins)
    path, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    arguments = ["--checkpoint", run, "--prompts", path, "--output", out, "--temperature", 0]
    arguments += ["--max_tokens", COUNT, "--dtype", "float32", *(["--chat"] if is_chat else [])]
    status, _, err = in_process("mea_jax.generate", *arguments)
    assert status == 0, err
    found = [json.loads(line) for line in out.read_text().splitlines()]
    for prompt, row in zip(PROMPTS, found, strict=True):
        assert (row["prompt_tokens"], row["text"]) == theirs(model, folder, prompt, is_chat)


def test_a_model_trained_here_starts_texts_as_in_training(corpus):
    own = tokenizers.train_bpe(iter(["some words to merge"]), 264)
    assert own.prefix == (own.start,)


def test_a_chat_needs_a_template_that_takes_it(pair, in_process):
    run = pair("llama", False)[2]
    plain = tokenizers.from_directory(run / "tokenizer")
    asked = [{"role": "user", "content": "hello"}]
    words = json.loads(plain.companions[TOKENIZER_CONFIG])

    def encode(**changes):
        content = json.dumps(words | changes).encode()
        files = dict(plain.companions) | {TOKENIZER_CONFIG: content}
        return chat.encode_chat(
            tokenizers.from_directory(run / "tokenizer", files), asked, "the prompt"
        )

    with pytest.raises(UserError, match=r"^the prompt: the tokenizer .* no chat template; leave"):
        encode(chat_template=None)
    with pytest.raises(UserError, match=r"template rejects it \(only systems\)"):
        encode(chat_template="{{ raise_exception('only systems') }}")
    with pytest.raises(UserError, match="template rejects it"):
        encode(chat_template="{% for %}")
    with pytest.raises(UserError, match="template rejects it"):  # the sandbox
        encode(chat_template="{{ ''.__class__.__mro__[1].__subclasses__() }}")
    named = [{"name": "tools", "template": "x"}, {"name": "default", "template": "<|end|>"}]
    assert encode(chat_template=named) == plain.encode_marked("<|end|>")
    assert len(encode(chat_template=named)) == 1
    status, _, err = in_process(
        "mea_jax.generate", "--checkpoint", run, "--prompt", "a", "--system", "b"
    )
    assert_one_error(status, err, "--system works only with --chat")


def test_special_tokens_in_a_chat_are_those_of_transformers(pair):
    """A prompt that spells out a special token is that token in a chat, as in transformers."""
    _, folder, run = pair("llama", False)
    own = tokenizers.from_directory(run / "tokenizer")
    asked = [{"role": "user", "content": "a <|end|> b"}]
    published: Any = AutoTokenizer.from_pretrained(folder)
    wanted = published.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)[
        "input_ids"
    ]
    np.testing.assert_array_equal(chat.encode_chat(own, asked, "here"), wanted)

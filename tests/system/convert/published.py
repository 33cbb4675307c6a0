"""Special tokens and a chat template for a small model, as a published chat model has them."""

import json

VOCABULARY = 266  # all of them have text: 264 and two special tokens
TEMPLATE = (
    "{%- if messages[0]['role'] != 'system' %}{{ '<|start|>system\nBe brief.<|end|>\n' }}"
    "{% endif %}"
    "{% for message in messages %}\n"
    "    {{- '<|start|>' + message['role'] + '\n' + message['content'] | trim + eos_token }}\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}{% generation %}{{ '<|start|>assistant\n' }}{% endgeneration %}"
    "{% endif %}"
)


def publish(folder, begins):
    """Give a saved model special tokens, a chat template, and perhaps a start of each text."""
    path = folder / "tokenizer.json"
    tree = json.loads(path.read_text())
    size = 1 + max([*tree["model"]["vocab"].values(), *(t["id"] for t in tree["added_tokens"])])
    special = {"special": True, "normalized": False}
    flags = {"lstrip": False, "rstrip": False, "single_word": False} | special
    for i, text in enumerate(("<|start|>", "<|end|>")):
        tree["added_tokens"].append({"id": size + i, "content": text} | flags)
    if begins:
        texts = {name: {"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB")}
        token = {"id": "<|start|>", "ids": [size], "tokens": ["<|start|>"]}
        tree["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "<|start|>", "type_id": 0}},
                texts["A"],
            ],
            "pair": [
                {"Sequence": {"id": "A", "type_id": 0}},
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {"<|start|>": token},
        }
    path.write_text(json.dumps(tree))
    words = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|start|>",
        "eos_token": "<|endoftext|>",
        "chat_template": TEMPLATE,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(words))

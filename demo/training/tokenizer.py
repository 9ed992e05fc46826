"""Makes the tokenizers of the demo models from the vocabulary of their captions."""

import json
from pathlib import Path

from demo import scenes
from demo.training.files import write_json
from demo.training.flow_networks import TEXT_LENGTH
from demo.training.networks import TEXT_JSON

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def write_chat_tokenizer(folder: Path) -> int:
    """Writes a Qwen2 tokenizer, whose template adds nothing to a prompt but its end. Returns the number of its tokens.

    Every word of the captions is a single token, with and without a space before it; other text falls back to bytes.
    """
    from tokenizers import Tokenizer as Trainable
    from tokenizers import models, pre_tokenizers, trainers

    trainable = Trainable(models.BPE())
    trainable.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=5000, initial_alphabet=letters, show_progress=False)
    words = sorted(scenes.vocabulary())
    trainable.train_from_iterator([*words, *(f" {word}" for word in words)], trainer)
    merges = [" ".join(pair) for pair in json.loads(trainable.to_str())["model"]["merges"]]
    tokens = [*letters, *dict.fromkeys(merge.replace(" ", "") for merge in merges)]
    write_json(folder / "vocab.json", {token: number for number, token in enumerate(tokens)})
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), "utf-8")
    options = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    config = {
        "added_tokens_decoder": {str(len(tokens) + i): {"content": name, **options} for i, name in enumerate(SPECIAL)},
        "chat_template": "{% for message in messages %}{{ message.content }}<|im_end|>{% endfor %}",
        "eos_token": "<|im_end|>",
        "model_max_length": TEXT_LENGTH,
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    write_json(folder / "tokenizer_config.json", config)
    return len(tokens) + len(SPECIAL)


def write_tokenizer(folder: Path) -> None:
    """Writes a CLIP tokenizer: every word of the captions is a single token, and other text falls back to bytes."""
    from tokenizers import Tokenizer as Trainable
    from tokenizers import models, pre_tokenizers, trainers

    trainable = Trainable(models.BPE(end_of_word_suffix="</w>"))
    trainable.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(vocab_size=5000, end_of_word_suffix="</w>", show_progress=False)
    trainable.train_from_iterator(sorted(scenes.vocabulary()), trainer)
    merges = [" ".join(pair) for pair in json.loads(trainable.to_str())["model"]["merges"]]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters), *(merge.replace(" ", "") for merge in merges)]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    write_json(folder / "vocab.json", {token: number for number, token in enumerate(tokens)})
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>"}
    special |= {"unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    length = TEXT_JSON["max_position_embeddings"]
    config = {"tokenizer_class": "CLIPTokenizer", "do_lower_case": True, "model_max_length": length, **special}
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "special_tokens_map.json", special)

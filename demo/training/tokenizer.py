"""Makes the tokenizer of the bundled model from the vocabulary of its captions."""

import json
from pathlib import Path

from demo import scenes
from demo.training.files import write_json
from demo.training.networks import TEXT_JSON


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

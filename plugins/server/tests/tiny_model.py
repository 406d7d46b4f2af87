"""A tiny chat model as a folder of Transformers: a Llama over bytes with random weights."""

from __future__ import annotations

import json

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

SPECIAL = ("<|end|>", "<|start|>")
TEMPLATE = (
    "{% if tools %}<|start|>tools\n{{ tools | tojson }}<|end|>\n{% endif %}"
    "{% for message in messages %}"
    "{% if message.content == 'fail' %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if message.content == 'loop' %}"
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}{% endif %}"
    "<|start|>{{ message.role }}\n{{ message.content }}<|end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
CONTEXT = 512


def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, and two that are special."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {word: place for place, word in enumerate([*SPECIAL, *letters])}
    plain = Tokenizer(BPE(words, []))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    plain.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, eos_token=SPECIAL[0], additional_special_tokens=[SPECIAL[1]],
        chat_template=TEMPLATE,
    )  # fmt: skip


def write(folder, *, layers: int = 2, seed: int = 0, **options):
    """Write the model, and return the folder."""
    words = tokenizer()
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=64, intermediate_size=96, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=CONTEXT,
        eos_token_id=words.eos_token_id, bos_token_id=None, pad_token_id=None,
        initializer_range=0.2, **options,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def write_crossed(folder):
    """Write a T5 with the same tokenizer, and return the folder."""
    words = tokenizer()
    words.chat_template = None
    config = T5Config(
        vocab_size=len(words), d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
        pad_token_id=1, eos_token_id=0, decoder_start_token_id=1,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = T5ForConditionalGeneration(config)
        for each in model.parameters():
            each.data.add_(torch.randn_like(each) * 0.2)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def with_code(folder):
    """Let the tokenizer of ``folder`` ask for code of its own, which writes a file if it is run."""
    path = folder / "tokenizer_config.json"
    known = json.loads(path.read_text())
    known["tokenizer_class"] = "Evil"
    known["auto_map"] = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    path.write_text(json.dumps(known))
    trace = folder / "was_run"
    (folder / "evil.py").write_text(f"open({str(trace)!r}, 'w').close()\n")
    return trace

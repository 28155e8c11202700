"""Tokenizer and tiny Qwen2 model of the built-in task, and the training of its reference policy."""

import random

import torch
from transformers import AddedToken, DataCollatorForSeq2Seq, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from ..noise.rng import check_seed
from . import task


PAD, EOS, USER, ASSISTANT = "<pad>", "<eos>", "<user>", "<assistant>"
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message.role == 'user' -%}{{ '<user> ' + message.content }}"
    "{%- elif message.role == 'assistant' -%}"
    "{{ '<assistant>' }}{%- generation -%}{{ ' ' + message.content + '<eos>' }}{%- endgeneration -%}"
    "{%- else -%}{{ raise_exception('The roles of the built-in task are user and assistant.') }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<assistant>' }}{%- endif -%}"
)
# The default initializer_range of 0.02 is made for wider models; here it leaves 5 % of the digits wrong, not 1 %.
MODEL_CONFIG = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "initializer_range": 0.05,
}
SFT_STEPS = 500
SFT_BATCH_SIZE = 32
SFT_LEARNING_RATE = 5e-3
SFT_WARMUP_STEPS = 50
SFT_SHARE_CORRECT = 0.7


def make_tokenizer() -> Qwen2Tokenizer:
    """A tokenizer with one token for each word of the task, with a chat template for user and assistant.

    A token holds the space before its word, so that decoding gives the text back. Words of no token are dropped.
    """
    # `AutoTokenizer` makes a Qwen2Tokenizer of all that lies beside a Qwen2 model: a WordLevel model would come back
    # as byte-level BPE. Added tokens survive.
    words = [*task.DIGITS, *task.REGISTERS, "sort", *task.DIRECTIONS, ":", "answer"]
    words += [*task.OPENERS, *task.FILLERS, *" ".join(task.CLOSERS).split()]
    tokens = [PAD, EOS, USER, ASSISTANT, *(f" {word}" for word in words if word)]
    tokenizer = Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=[],
        pad_token=PAD,
        eos_token=EOS,
        unk_token=None,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        model_max_length=MODEL_CONFIG["max_position_embeddings"],
    )
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in tokens[4:]])
    return tokenizer


def make_model(seed: int = 0) -> Qwen2ForCausalLM:
    """An untrained Qwen2 model of 0.1 M parameters in float32 on the CPU; `seed` sets its initial weights."""
    tokenizer = make_tokenizer()
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        **MODEL_CONFIG,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen2ForCausalLM(config)


def train_reference(seed: int = 0, exclude_prompts: frozenset[str] = frozenset()) -> Qwen2ForCausalLM:
    """Supervised fine-tuning of a new model on completions, 70 % of them correct and all in a random style.

    The loss is on the completion alone; after 500 steps about 98 % of the digits that the model answers are right.
    One thread makes the result the same whatever the number of cores. No prompt of `exclude_prompts` is trained on.

    Returns:
        The model in evaluation mode, float32 on the CPU.
    """
    check_seed(seed)
    rng = random.Random(f"sft {seed}")
    tokenizer, model = make_tokenizer(), make_model(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=SFT_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / SFT_WARMUP_STEPS, 1.0) * (1 - step / SFT_STEPS)
    )
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(SFT_STEPS):
            batch = _sft_batch(tokenizer, rng, exclude_prompts)
            model(**batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    finally:
        torch.set_num_threads(n_threads)
    return model.eval()


def _sft_batch(
    tokenizer: Qwen2Tokenizer, rng: random.Random, exclude_prompts: frozenset[str]
) -> dict[str, torch.Tensor]:
    """`input_ids`, `attention_mask` and `labels`, int64 of shape (batch, longest), padded on the right."""
    rows = []
    for prompt in task.sample_prompts(SFT_BATCH_SIZE, rng, exclude_prompts):
        messages = [
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": task.sample_completion(prompt, rng, SFT_SHARE_CORRECT)},
        ]
        start = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
        full = tokenizer.apply_chat_template(messages, return_dict=False)
        rows.append({"input_ids": full, "labels": [-100] * len(start) + full[len(start) :]})
    return DataCollatorForSeq2Seq(tokenizer)(rows)

"""The situations that TRL's own tests put its trainers in, with our trainers and their defaults.

As TRL's tests do, each asserts that every trainable parameter moved. The models are as small as TRL's: their biases
and norms have a few elements, whose masks would be 0 by chance for a whole run of a few steps.
"""

import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, TaskType, get_peft_model
from transformers import TrainerCallback, TrainingArguments

from prm_hf.trainers import PRMDPOConfig, PRMDPOTrainer, PRMSFTConfig, PRMSFTTrainer

from ..tiny import make_model, make_tokenizer, preference_dataset
from .trainer_runs import settings


pytestmark = [
    pytest.mark.usefixtures("quiet"),
    pytest.mark.filterwarnings("ignore:.*(padding|packing|flash|sequence).*"),
]

PAIRS = preference_dataset(17, flipped=False)
COMPLETIONS = Dataset.from_list([{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS])
TEXTS = Dataset.from_list([{"text": row["prompt"] + row["chosen"]} for row in PAIRS])
LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"], task_type=TaskType.CAUSAL_LM)
TEMPLATE = (
    "{% for m in messages %}{{ m.content or '' }}{% if m.tool_calls %} w1 w2 w3{% endif %} {% endfor %}"
    "{% if tools %}w4 {% endif %}"
)
TRAINING_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }} {% endgeneration %}"
    "{% else %}{{ m.content }} {% endif %}{% endfor %}"
)


def tiny_model(seed=0, **config):
    return make_model(seed, hidden_size=8, intermediate_size=32, **config)


def tokenizer(template=None):
    made = make_tokenizer()
    made.chat_template = template
    return made


def turn(role, content, **more):
    return [{"role": role, "content": content, **more}]


def conversational(row):
    return {
        "prompt": turn("user", row["prompt"]),
        "chosen": turn("assistant", row["chosen"].strip()),
        "rejected": turn("assistant", row["rejected"].strip()),
    }


TOOLS = [{"type": "function", "function": {"name": "w1", "description": "w2", "parameters": {"type": "object"}}}]
CALL = [{"type": "function", "function": {"name": "w1", "arguments": {"x": "w2"}}}]
CHATS = Dataset.from_list([conversational(row) for row in PAIRS])
IMPLICIT = Dataset.from_list([{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in CHATS])
WITH_TOOLS = Dataset.from_list([{**conversational(row), "tools": TOOLS} for row in PAIRS])
MESSAGES = Dataset.from_list([{"messages": row["prompt"] + row["chosen"]} for row in CHATS])
CALLS = Dataset.from_list(
    [
        {"messages": row["prompt"] + turn("assistant", "w5", tool_calls=CALL) + row["chosen"], "tools": TOOLS}
        for row in CHATS
    ]
)
TOKENS = Dataset.from_list([{"input_ids": list(range(3, 3 + n % 5 + 4))} for n in range(17)])


def streamed(dataset):
    return IterableDataset.from_generator(lambda: iter(dataset))


def trained(trainer, moved=None):
    """Trains, and asserts that each trainable parameter (that `moved` accepts) is another one than before."""
    names = {name for name, p in trainer.model.named_parameters() if p.requires_grad and (not moved or moved(name))}
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert names and trainer.state.log_history[-1]["train_loss"] is not None
    after = dict(trainer.model.named_parameters())
    still = [name for name in names if torch.equal(before[name], after[name])]
    assert not still
    assert all(torch.equal(before[name], p) for name, p in after.items() if not p.requires_grad)
    return trainer


def arguments(folder, **kwargs):
    """TRL's: three epochs in batches of 3 at a large learning rate."""
    common = {"max_steps": -1, "num_train_epochs": 3, "per_device_train_batch_size": 3, "learning_rate": 0.1}
    return settings(folder, **common | kwargs)


LOSSES = [
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
    *("apo_zero", "apo_down", "discopop", "sft"),
]
DPO = {
    **{f"loss_{name}": ({"loss_type": name}, {}) for name in LOSSES},
    **{f"loss_{name}": ({"loss_type": name, "label_smoothing": 0.1}, {}) for name in ("exo_pair", "robust")},
    "several_losses": ({"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}, {}),
    "wpo": ({"use_weighting": True}, {}),
    "ld": ({"ld_alpha": 0.5}, {}),
    "f_divergence": ({"f_divergence_type": "js_divergence"}, {}),
    "padding_free": ({"padding_free": True}, {}),
    "precompute": ({"precompute_ref_log_probs": True}, {}),
    "precompute_eval": ({"precompute_ref_log_probs": True, "eval_strategy": "steps", "eval_steps": 3}, {}),
    "eval": ({"eval_strategy": "steps", "eval_steps": 9}, {}),
    "several_evals": ({"eval_strategy": "steps", "eval_steps": 9}, {"eval_dataset": {"a": PAIRS, "b": PAIRS}}),
    "keep_end": ({"max_length": 5, "truncation_mode": "keep_end"}, {}),
    "conversational": ({}, {"train_dataset": CHATS}),
    "implicit_prompt": ({}, {"train_dataset": IMPLICIT}),
    "tools": ({}, {"train_dataset": WITH_TOOLS}),
    "streamed": ({"max_steps": 18}, {"train_dataset": streamed(PAIRS)}),
    "lora": ({}, {"peft_config": LORA}),
    "lora_checkpointing": ({"gradient_checkpointing": True}, {"peft_config": LORA}),
    "prompt_tuning": ({}, {"peft_config": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)}),
    "callback": ({}, {"callbacks": [TrainerCallback]}),
    "bfloat16": ({}, {"dtype": torch.bfloat16}),
    "accumulation": ({"gradient_accumulation_steps": 2, "num_train_epochs": 6}, {}),
}


QUICK = ("conversational", "precompute", "padding_free", "lora", "bfloat16")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in DPO]
)
def test_dpo(name, tmp_path):
    config, given = DPO[name]
    given = {"train_dataset": PAIRS, "eval_dataset": PAIRS if "eval_strategy" in config else None, **given}
    dtype = given.pop("dtype", torch.float32)
    reference = None if "peft_config" in given else tiny_model().to(dtype)
    trainer = PRMDPOTrainer(
        tiny_model().to(dtype),
        reference,
        PRMDPOConfig(**arguments(tmp_path, **config)),
        processing_class=tokenizer(TEMPLATE),
        **given,
    )
    trained(trainer)


def test_dpo_with_a_reference_that_follows(tmp_path):
    config = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.5, "drift_metrics": False}
    reference = tiny_model()
    before = [p.detach().clone() for p in reference.parameters()]
    args = PRMDPOConfig(**arguments(tmp_path, **config))
    trained(PRMDPOTrainer(tiny_model(), reference, args, train_dataset=PAIRS, processing_class=tokenizer()))
    assert not any(map(torch.equal, before, reference.parameters()))


SFT = {
    "text": ({}, {"train_dataset": TEXTS}),
    "completions": ({}, {}),
    "whole_sequences": ({"completion_only_loss": False}, {}),
    "messages": ({}, {"train_dataset": MESSAGES}),
    "assistant_only": ({"assistant_only_loss": True}, {"train_dataset": MESSAGES, "template": TRAINING_TEMPLATE}),
    "tools": ({}, {"train_dataset": CALLS}),
    "tokens": ({}, {"train_dataset": TOKENS}),
    "formatting": ({}, {"train_dataset": TEXTS, "formatting_func": lambda row: row["text"] + " w1"}),
    "dft": ({"loss_type": "dft"}, {}),
    "padding_free": ({"padding_free": True, "max_length": None}, {}),
    "packing": ({"packing": True, "max_length": 16, "num_train_epochs": 9}, {}),
    "packing_wrapped": (
        {"packing": True, "packing_strategy": "wrapped", "max_length": 16, "num_train_epochs": 9},
        {"train_dataset": TEXTS},
    ),
    "streamed": ({"max_steps": 18}, {"train_dataset": streamed(COMPLETIONS)}),
    "streamed_text": ({"max_steps": 18}, {"train_dataset": streamed(TEXTS)}),
    "eval": ({"eval_strategy": "steps", "eval_steps": 9}, {"eval_dataset": COMPLETIONS}),
    "several_evals": (
        {"eval_strategy": "steps", "eval_steps": 9},
        {"eval_dataset": {"a": COMPLETIONS, "b": COMPLETIONS}},
    ),
    "lora": ({}, {"peft_config": LORA}),
    "lora_checkpointing": ({"gradient_checkpointing": True}, {"peft_config": LORA}),
    "lora_model": ({}, {"lora": True}),
    "prompt_tuning": ({}, {"peft_config": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)}),
    "prefix_tuning": ({}, {"peft_config": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)}),
    "checkpointing": ({"gradient_checkpointing": True}, {}),
    "callback": ({}, {"callbacks": [TrainerCallback]}),
    "bfloat16": ({}, {"dtype": torch.bfloat16}),
    "untied": ({}, {"config": {"tie_word_embeddings": False}}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SFT)
def test_sft(name, tmp_path):
    config, given = SFT[name]
    given = {"train_dataset": COMPLETIONS, **given}
    model = tiny_model(**given.pop("config", {})).to(given.pop("dtype", torch.float32))
    if given.pop("lora", False):
        model = get_peft_model(model, LORA)
    processing_class = tokenizer(given.pop("template", TEMPLATE))
    trainer = PRMSFTTrainer(
        model, PRMSFTConfig(**arguments(tmp_path, **config)), processing_class=processing_class, **given
    )
    trained(trainer)


def test_sft_with_plain_arguments(tmp_path):
    args = TrainingArguments(**arguments(tmp_path))
    trained(PRMSFTTrainer(tiny_model(), args, train_dataset=COMPLETIONS, processing_class=tokenizer()))


BOTH = pytest.mark.parametrize("trainer_class, config, data", [
    (PRMDPOTrainer, PRMDPOConfig, PAIRS), (PRMSFTTrainer, PRMSFTConfig, COMPLETIONS)
], ids=["dpo", "sft"])  # fmt: skip


@BOTH
def test_no_dataset(trainer_class, config, data, tmp_path):
    """Errors of TRL's types that begin with TRL's words, so that programs that expect them go on."""
    made = {"args": config(**arguments(tmp_path)), "processing_class": tokenizer()}
    with pytest.raises(ValueError, match="`train_dataset` is required"):
        trainer_class(tiny_model(), **made)
    with pytest.raises(TypeError, match="`train_dataset` must be a `Dataset` or `IterableDataset`, got a DatasetDict"):
        trainer_class(tiny_model(), **made, train_dataset=DatasetDict({"train": data}))


@BOTH
@pytest.mark.parametrize("seed", range(3))
def test_every_seed(trainer_class, config, data, seed, tmp_path):
    """Six steps, and no seed that leaves a bias or a norm where it was."""
    references = [tiny_model(seed)] if trainer_class is PRMDPOTrainer else []
    args = config(**arguments(tmp_path, num_train_epochs=1, seed=seed, drift_metrics=False))
    made = trainer_class(tiny_model(seed), *references, args, train_dataset=data, processing_class=tokenizer())
    trained(made, moved=lambda name: "bias" in name or "norm" in name)

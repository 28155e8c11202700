"""Short runs of the Sven trainers, which several files of tests share."""

import torch
from datasets import Dataset as Table
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.utils.data import Dataset, SequentialSampler

from prm_hf.sven import (
    SvenDPOConfig,
    SvenDPOTrainer,
    SvenSFTConfig,
    SvenSFTTrainer,
    SvenTrainer,
    SvenTrainingArguments,
)

from ..tiny import make_model, make_tokenizer, preference_dataset
from ..trainers.trainer_runs import settings as common_settings
from .models import flat, llama, padded_batch


PAIRS = preference_dataset(14)
SENTENCES = Table.from_list([{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS])


class BatchRows(Dataset):
    def __init__(self, columns: dict[str, Tensor]) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(self.columns["input_ids"])

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {name: values[i] for name, values in self.columns.items()}


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Batches that end with their longest row."""
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    length = int(batch["attention_mask"].sum(1).max())
    return {name: values[:, :length] for name, values in batch.items()}


class InOrder:
    def _get_train_sampler(self, *args):
        return SequentialSampler(self.train_dataset)


class OrderedTrainer(InOrder, SvenTrainer):
    pass


class OrderedDPOTrainer(InOrder, SvenDPOTrainer):
    pass


class OrderedSFTTrainer(InOrder, SvenSFTTrainer):
    pass


def settings(output_dir, **kwargs) -> dict:
    return common_settings(output_dir, **{"lr_scheduler_type": "constant", "learning_rate": 0.05, **kwargs})


def trainer_of(output_dir, model=None, rows: int = 22, trainer_kwargs=None, **kwargs) -> SvenTrainer:
    args = SvenTrainingArguments(**settings(output_dir, **kwargs))
    data = BatchRows(padded_batch(rows))
    own = {"train_dataset": data, "data_collator": collate, **(trainer_kwargs or {})}
    return OrderedTrainer(llama() if model is None else model, args, **own)


def lora(model):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    return model


def dpo_trainer_of(output_dir, adapters: bool = False, train=PAIRS, trainer_kwargs=None, **kwargs) -> SvenDPOTrainer:
    args = SvenDPOConfig(**settings(output_dir, **kwargs))
    model = lora(make_model()) if adapters else make_model()
    own = {"train_dataset": train, "processing_class": make_tokenizer(), **(trainer_kwargs or {})}
    return OrderedDPOTrainer(model, None if adapters else make_model(seed=1), args, **own)


def sft_trainer_of(output_dir, train=SENTENCES, **kwargs) -> SvenSFTTrainer:
    args = SvenSFTConfig(**settings(output_dir, **kwargs))
    return OrderedSFTTrainer(make_model(), args, train_dataset=train, processing_class=make_tokenizer())


def trained(trainer) -> Tensor:
    """What training adds to the weights, frozen ones included."""
    before = flat(trainer.model)
    trainer.train()
    return flat(trainer.model) - before


def assert_near(found: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    assert expected.norm() > 0
    assert (found - expected).norm() <= tolerance * expected.norm()

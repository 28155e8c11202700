"""Short runs of the trainers on a tiny model, which several files of tests share."""

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn

from prm_hf.metrics import drift_metrics, reward_metrics
from prm_hf.trainers import PRMDPOConfig, PRMDPOTrainer, PRMSFTConfig, PRMSFTTrainer

from ..tiny import make_model, make_tokenizer, preference_dataset


MASK_KEYS = {
    "mask/mean_q",
    "mask/active_fraction",
    "mask/min_q",
    "mask/max_q",
    "mask/parameter_count",
    "mask/noise_sq",
    "mask/noise_scale",
    "mask/signal_sq",
    "mask/snr",
    "mask/nonfinite_count",
}
TRAIN = preference_dataset(14)
HELDOUT = preference_dataset(7, seed=1, flipped=False)
OTHER = preference_dataset(5, seed=2, flipped=False)
SENTENCES = Dataset.from_list([{"prompt": row["prompt"], "completion": row["chosen"]} for row in TRAIN])


def settings(output_dir, **kwargs) -> dict:
    return {
        "output_dir": str(output_dir),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "max_steps": 3,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "learning_rate": 1e-2,
        **kwargs,
    }


def dpo_trainer(
    output_dir, *, model=None, ref_model=None, train=TRAIN, eval_dataset=None, trainer_kwargs=None, **kwargs
):
    if model is None:
        model, ref_model = make_model(), make_model()
    return PRMDPOTrainer(
        model,
        ref_model,
        PRMDPOConfig(**settings(output_dir, **kwargs)),
        train_dataset=train,
        eval_dataset=eval_dataset,
        processing_class=make_tokenizer(),
        **(trainer_kwargs or {}),
    )


def sft_trainer(
    output_dir, model, *, train=SENTENCES, eval_dataset=SENTENCES, trainer_kwargs=None, **kwargs
) -> PRMSFTTrainer:
    return PRMSFTTrainer(
        model,
        PRMSFTConfig(**settings(output_dir, **kwargs)),
        train_dataset=train,
        eval_dataset=eval_dataset,
        processing_class=make_tokenizer(),
        **(trainer_kwargs or {}),
    )


def lora(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def evaluations(trainer) -> list[dict]:
    return [log for log in trainer.state.log_history if any(key.startswith("eval_") for key in log)]


def expected_pair_metrics(trainer, dataset) -> dict[str, float]:
    pairs = trainer.evaluate_pairs(dataset)
    return {**reward_metrics(pairs, trainer.beta), **drift_metrics(pairs, trainer.beta)}


def count_passes(model: nn.Module) -> list[int]:
    """Grows by the rows of a batch with each forward pass of a model's decoder."""
    rows = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    return rows

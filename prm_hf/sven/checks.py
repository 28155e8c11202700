"""Which trainers Sven cannot serve, said before anything takes time."""

from __future__ import annotations

from typing import Any


def check_trainer(trainer: Any) -> None:
    """Raises ValueError where a trainer's arguments would make another step than Sven's."""
    args, settings = trainer.args, trainer.sven_settings
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        name = "FSDP" if trainer.is_fsdp_enabled else "DeepSpeed"
        raise ValueError(
            f"Sven computes with the whole of each parameter, which {name} shards: launch it with DDP (as `torchrun` "
            "does by itself), and train LoRA adapters where the model is too large for one device."
        )
    if getattr(trainer.accelerator, "parallelism_config", None) is not None:
        raise ValueError("Sven needs whole models and whole rows on each process: leave `parallelism_config` out.")
    if args.n_gpu > 1:
        raise ValueError(
            f"`nn.DataParallel` on {args.n_gpu} GPUs hides the layers: launch one process a GPU with `torchrun`, or "
            "set `CUDA_VISIBLE_DEVICES` to one."
        )
    if args.fp16:
        raise ValueError("`fp16=True` scales losses, and small per-sample gradients vanish in it: set `bf16=True`.")
    if args.torch_compile:
        raise ValueError("`torch_compile=True` fuses the layers that Sven looks into: leave it out.")
    kwargs = args.gradient_checkpointing_kwargs or {}
    if args.gradient_checkpointing and kwargs.get("use_reentrant", False):
        raise ValueError(
            "Sven goes back twice through a batch, which reentrant checkpointing cannot: set "
            "`gradient_checkpointing_kwargs={'use_reentrant': False}`."
        )
    if settings.variable_k and (args.optim != "sgd" or args.weight_decay or args.optim_args):
        raise ValueError(
            f"`variable_k` tries the step of SGD without weight decay, and the run has `optim={str(args.optim)!r}`, "
            f"`weight_decay={args.weight_decay:g}`, `optim_args={args.optim_args!r}`: set `optim='sgd'` alone."
        )
    if settings.variable_k and args.max_grad_norm > 0:
        raise ValueError(
            f"`variable_k` tries the step that `max_grad_norm={args.max_grad_norm:g}` then shortens: choose one."
        )
    if getattr(trainer, "compute_loss_func", None) is not None or args.label_smoothing_factor:
        raise ValueError(
            "Sven needs the loss of each row, and `compute_loss_func` and `label_smoothing_factor` give that of a "
            "batch: leave them out, and pass `per_sample_loss_func` to a SvenTrainer."
        )


def check_pair_arguments(args: Any) -> None:
    """Raises ValueError where TRL's DPO arguments give no loss of each pair, or put several pairs into a row."""
    losses = [args.loss_type] if isinstance(args.loss_type, str) else args.loss_type
    together = [name for name in losses if name in ("sft", "aot", "aot_unpaired")]
    if together:
        raise ValueError(f"The loss of a pair in `loss_type={together[0]!r}` depends on the others: set 'sigmoid'.")
    if args.padding_free:
        raise ValueError("Sven needs one sequence a row: set `padding_free=False`.")


def check_row_arguments(args: Any) -> None:
    """Raises ValueError where TRL's SFT arguments give no loss of each row, or put several samples into a row."""
    if args.packing or args.padding_free:
        raise ValueError("Sven needs one sample a row: set `packing=False` and `padding_free=False`.")
    if args.loss_type != "nll":
        raise ValueError(f"Sven knows the loss 'nll' of each row, got `loss_type={args.loss_type!r}`: set 'nll'.")

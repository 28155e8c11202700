"""Data and models of `recipes/compression.py`: digits, documents, preferences, small networks and adapters."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import peft
import torch
from datasets import Dataset
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
)
from transformers.modeling_outputs import ImageClassifierOutput
from trl import DPOConfig, DPOTrainer

from .. import flip_preferences
from .._extras import require
from ..demo import build_demo, preference_pairs
from ..diagnostics.subspace import Subspace
from .data import load_split
from .rows import Columns, check_rows
from .selection import first_of_each
from .simplicity import unilora


if TYPE_CHECKING:
    from .compression import CompressionArguments

CLASSES = 10
TRAIN_ROWS = 1500  # of the 1,797; the others are the test rows
VOCABULARY, DOCUMENT_LENGTH = 17, 12
PAIR_COLUMNS = Columns("prompt", ("chosen", "rejected"), needs_prompt=False, advice="Rename yours in the dataset.")
PRIOR_EPOCHS, PRIOR_RATE = 4, 1e-4  # of a LoRA adapter of rank 16
TEST_PAIRS, PAIRS_SEED = 1000, 1  # of the built-in task; 0 is the seed of its own pairs


class LeNet(nn.Module):
    """LeCun et al.'s network at the size of 8 × 8 images: 6,058 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        )
        self.classifier = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, CLASSES))

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> ImageClassifierOutput:
        logits = self.classifier(self.features(pixel_values))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


def make_network(name: str, seed: int = 0) -> nn.Module:
    """`"lenet"`, or `"vit"`: one layer of width 32 on patches of 2 × 2 pixels, 7,500 parameters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name == "lenet":
            return LeNet()
        config = ViTConfig(
            image_size=8,
            patch_size=2,
            num_channels=1,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            intermediate_size=48,
            num_labels=CLASSES,
            initializer_range=0.18,  # 1/√32; the usual 0.02 is that of wide models
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        return AutoModelForImageClassification.from_config(config)


def handwritten_digits(random_labels: bool = False, seed: int = 0) -> tuple[Dataset, Dataset]:
    """scikit-learn's digits (Alpaydin & Kaynak, 1998): 1,500 rows to train on and 297 to test."""
    require("recipes/compression.py", "sklearn", extra="vision")
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(labels))
    if random_labels:
        labels = rng.integers(CLASSES, size=len(labels))
    return (_rows(images[part], labels[part]) for part in (order[:TRAIN_ROWS], order[TRAIN_ROWS:]))


def rendered_digits(n: int, seed: int = 0) -> Dataset:
    """Digits of matplotlib's fonts, turned, moved and scaled at random, made as the handwritten ones were.

    Those are bitmaps of 32 × 32 pixels whose blocks of 4 × 4 are counted. No handwriting is in them.
    """
    require("recipes/compression.py", "matplotlib", extra="report")
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    rng = np.random.default_rng(seed)
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    files = sorted(folder.glob("DejaVuS*.ttf")) + sorted(folder.glob("STIXGeneral*.ttf")) + [folder / "cmr10.ttf"]
    files = [file for file in files if "Display" not in file.name]
    images, labels = np.zeros((n, 64)), rng.integers(CLASSES, size=n)
    for i, label in enumerate(labels):
        font = ImageFont.truetype(str(files[rng.integers(len(files))]), int(rng.integers(22, 34)))
        page = Image.new("L", (32, 32))
        place = (16 + rng.integers(-2, 3), 16 + rng.integers(-2, 3))
        ImageDraw.Draw(page).text(place, str(label), fill=255, font=font, anchor="mm")
        turned = page.rotate(float(rng.uniform(-15, 15)), resample=Image.Resampling.BILINEAR)
        images[i] = (np.asarray(turned) > 127).reshape(8, 4, 8, 4).sum((1, 3)).reshape(64)
    return _rows(images, labels)


def _rows(images: np.ndarray, labels: np.ndarray) -> Dataset:
    pixels = (images / 8 - 1).astype(np.float32).reshape(-1, 1, 8, 8)
    return Dataset.from_dict({"pixel_values": pixels.tolist(), "labels": labels.astype(int).tolist()})


def documents(n: int, random_tokens: bool = False, seed: int = 0) -> Dataset:
    """Documents of 12 words that count up through 17, a tenth of the words random; or random words alone."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(VOCABULARY, size=(n, DOCUMENT_LENGTH))
    counted = (rng.integers(VOCABULARY, size=(n, 1)) + np.arange(DOCUMENT_LENGTH)) % VOCABULARY
    ids = noise if random_tokens else np.where(rng.random(counted.shape) < 0.1, noise, counted)
    return Dataset.from_dict({"input_ids": ids.tolist()})


def make_language_model(adapter: str, seed: int = 0) -> nn.Module:
    """A Llama of one layer with random weights, which stay, and an adapter on all its linear layers.

    Args:
        adapter: `"unilora"`, 256 values and PEFT's random map to matrices of rank 16; or `"lora"`, of rank 4.
        seed: of the weights.

    Raises:
        ImportError: this PEFT has no `UniLoraConfig`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            initializer_range=0.2,  # 1/√32, since the output embedding stays as it is
        )
        model = LlamaForCausalLM(config)
        if adapter == "lora":
            return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
        return peft.get_peft_model(model, unilora(16, 256))


def preferences(args: CompressionArguments, random_labels: bool, n: int) -> tuple[str, Dataset, Dataset]:
    """The model, the pairs to train on, half of them flipped for random labels, and the pairs to test on.

    Of the built-in task `n` pairs to train on, whose prompts were drawn without regard to those that the reference
    policy was trained on, and 1,000 pairs of other prompts to test on.
    """
    if args.dataset_name is None:
        pairs = preference_pairs(n + TEST_PAIRS, PAIRS_SEED)
        model, rows, test = build_demo().model_path, pairs.select(range(n)), pairs.select(range(n, n + TEST_PAIRS))
    else:
        model, paths = args.model_name_or_path, (args.dataset_name, args.eval_dataset_name)
        rows, test = map(_first_pairs, paths)
    if random_labels:
        rows, test = (flip_preferences(pairs, 0.5, seed=0).remove_columns("flipped") for pairs in (rows, test))
    return model, rows, test


def _first_pairs(path: str) -> Dataset:
    rows = load_split(path, None, "train")
    check_rows(rows, f"The rows of {path}", PAIR_COLUMNS)
    first = first_of_each(rows, 1, PAIR_COLUMNS)
    if len(first) < len(rows):
        print(f"{len(first)} of {len(rows)} rows of {path} are kept, the first of each prompt.", flush=True)
    return first


def train_prior(data: tuple[str, Dataset, Dataset], args: CompressionArguments) -> DPOTrainer:
    """A trainer that has trained a LoRA adapter by DPO, for `PRIOR_EPOCHS` epochs of its pairs."""
    name, rows, test = data
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    steps = max(1, round(args.train_factor * PRIOR_EPOCHS * len(rows) / args.batch_size))
    config = _config(args, steps, PRIOR_RATE, precompute=False)
    adapter = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    tokenizer = AutoTokenizer.from_pretrained(name)
    trainer = DPOTrainer(model, None, config, None, rows, test, tokenizer, peft_config=adapter)
    trainer.train()
    return trainer


def train_pairs(
    data: tuple[str, Dataset, Dataset],
    dim: int,
    steps: int,
    args: CompressionArguments,
    prior: DPOTrainer | None = None,
) -> tuple[DPOTrainer, Subspace | None]:
    """A trainer that has trained a vector by DPO, with AdamW: that of the subspace returned, or of a UniLora adapter.

    Of the built-in task each step of the vector moves all embeddings, and with a prior all weights of its adapter.
    """
    name, rows, test = data
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    reference, subspace, adapter = None, None, None
    if prior is not None:
        reference, model = model, prior.accelerator.unwrap_model(prior.model)
        subspace = Subspace(model, dim)
    elif args.dataset_name is None:
        embedding = model.get_input_embeddings().weight  # and the output's
        for parameter in model.parameters():
            parameter.requires_grad_(parameter is embedding)
        subspace = Subspace(model, dim)
    else:
        # Each value stands in many places, divided by the root of their number: a short vector needs large values
        adapter = unilora(4, dim, start=1.0)
    optimizer = None
    if subspace is not None:
        optimizer = subspace.attach(torch.optim.AdamW([subspace.vector], lr=args.learning_rate, weight_decay=0.0))
    trainer = DPOTrainer(
        model,
        reference,
        _config(args, steps, args.learning_rate, precompute=True),
        None,
        rows,
        test,
        AutoTokenizer.from_pretrained(name),
        optimizers=(optimizer, None),
        peft_config=adapter,
    )
    trainer.train()
    return trainer, subspace


def _config(args: CompressionArguments, steps: int, rate: float, precompute: bool) -> DPOConfig:
    on_gpu = torch.cuda.is_available()
    return DPOConfig(
        output_dir=str(Path(args.output_dir) / "trainer"),
        max_steps=steps,
        learning_rate=rate,
        lr_scheduler_type="cosine",
        per_device_train_batch_size=args.batch_size,
        max_length=args.max_length,
        bf16=on_gpu,
        use_cpu=not on_gpu,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
        precompute_ref_log_probs=precompute,
    )

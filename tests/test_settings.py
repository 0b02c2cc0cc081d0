"""The sections of a config that a run of training reads: what is refused, and in which words."""

import pytest
from tiny import tiny_config

from xdiffusion.training.settings import (
    SECTIONS,
    CheckpointSettings,
    OptimizerSettings,
    PriorSettings,
    TextualInversionSettings,
    TrainingSettings,
    check_settings,
)

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (TrainingSettings(num_training_steps=0), "training.num_training_steps=0 must be at least 1"),
        (TrainingSettings(batch_size=0), "training.batch_size=0 must be at least 1"),
        (TrainingSettings(save_and_sample_every_n=0), "training.save_and_sample_every_n=0 must be at least 1"),
        (
            TrainingSettings(gradient_accumulation_steps=3),
            "training.gradient_accumulation_steps=3 must divide training.batch_size=128",
        ),
        (TrainingSettings(caption_dropout=1.5), "training.caption_dropout=1.5 must be at least 0 and at most 1"),
        (TrainingSettings(caption_dropout=NAN), "training.caption_dropout=nan must be at least 0 and at most 1"),
        (TrainingSettings(ema_decay=1.0), "training.ema_decay=1.0 must be at least 0 and below 1"),
        (TrainingSettings(stop_above=1.0), "training.stop_above=1.0 must be above 1, or null"),
        (TrainingSettings(rollbacks=-1), "training.rollbacks=-1 must be at least 0"),
        (TrainingSettings(seed=2**63), f"training.seed={2**63} must be at least"),
        (
            TrainingSettings(sample_prompts=["a fox", " "]),
            r"training.sample_prompts=\['a fox', ' '\] must be texts that are not empty, or null: captions are drawn",
        ),
        (CheckpointSettings(keep_last=0), "checkpoints.keep_last=0 must be at least 1, or null"),
        (CheckpointSettings(keep_last=1, keep_every=0), "checkpoints.keep_every=0 must be at least 1, or null"),
        (CheckpointSettings(keep_every=5), "checkpoints.keep_every=5 needs checkpoints.keep_last"),
        (OptimizerSettings(learning_rate=-1.0), "optimizer.learning_rate=-1.0 must be above 0"),
        (OptimizerSettings(learning_rate=INF), "optimizer.learning_rate=inf must be finite, above 0"),
        (OptimizerSettings(max_grad_norm=0), "optimizer.max_grad_norm=0 must be above 0"),
        (OptimizerSettings(lora_plus_ratio=0), "optimizer.lora_plus_ratio=0 must be above 0, or null"),
        (OptimizerSettings(warmup_steps=-5), "optimizer.warmup_steps=-5 must be at least 0"),
        (OptimizerSettings(weight_decay=-0.1), "optimizer.weight_decay=-0.1 must be at least 0"),
        (OptimizerSettings(betas=(2, 3)), r"optimizer.betas=\[2, 3\] must be two numbers in \[0, 1\)"),
        (PriorSettings("dogs", "a dog", weight=0), "prior.weight=0 must be above 0"),
        (PriorSettings("dogs", "a dog", num_images=0), "prior.num_images=0 must be at least 1"),
        (
            TextualInversionSettings("<a>", "a", learning_rate=0),
            "textual_inversion.learning_rate=0 must be above 0, or null",
        ),
        (OptimizerSettings(betas=(0.9,)), r"optimizer.betas=\[0.9\] must be two numbers"),
    ],
)
def test_settings_that_no_run_can_have(settings, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        settings.check()


def test_defaults_can_be_had():
    for section in SECTIONS.values():
        section().check()


def test_every_section_of_a_config_is_checked():
    check_settings(tiny_config())
    for override in ("training.ema_decay=2", "optimizer.learning_rate=0", "checkpoints.keep_last=0"):
        with pytest.raises(ValueError, match=override.replace("=", "=.* must be ")[:20]):
            check_settings(tiny_config(override))


@pytest.mark.parametrize("rate", ["-0.001", "0", ".nan", ".inf"])
def test_the_text_encoders_own_rate_is_one(rate):
    config = tiny_config("text_encoder_lora.rank=1", f"text_encoder_lora.learning_rate={rate}")
    with pytest.raises(ValueError, match=r"^text_encoder_lora\.learning_rate=.* must be above 0 and finite, or null"):
        check_settings(config)

"""Stage 3, instructions with Dual Consistency Learning: the branches take turns, and Base also follows Large's answers.

That the divergence is taken from Large to Base through the shared decoder, in turns, is the paper's (HyperVL 3.3); that
it begins here, its weight, its temperature, rates and sizes are inferred (InternVL 3's fine-tuning).
"""

from dataclasses import replace

from hypervl_jax import presets
from hypervl_jax.config import Config, DataConfig, DclConfig, Rule


def stage(cfg: Config) -> Config:
    rules = (
        Rule(r"(base|large)\.projector\..*"),
        Rule(r"(base|large)\.vit\..*", 0.25),
        Rule(r"llm\..*"),
        Rule(r"names_(base|large)\..*", 0.0),
    )
    how = replace(cfg.train, stage0_steps=0, name_weight=0.0, optimizer="adamw", rules=rules)
    dcl = DclConfig(weight=1.0, temperature=2.0, schedule="alternate", llm_train="both")
    return replace(cfg, name="stage3_dcl", train=how, dcl=dcl)


def get_config() -> Config:
    """Rows of up to 16,384 tokens: thirty-six tiles of 256 and a thumbnail, and text."""
    cfg = stage(presets.hypervl_1p7b())
    buckets, lengths = (1, 5, 13, 25, 37), (1024, 4096, 8192, 8192, 16_384)
    data = DataConfig(cfg.data.screens, batch=256, tile_buckets=buckets, lengths=lengths)
    how = replace(cfg.train, steps=10_000, lr=2e-5, warmup=300, accumulate=4)
    return replace(cfg, data=data, train=how)


def get_tiny() -> Config:
    """Seconds on any machine, its loss in chunks and its matrices in bf16 as the large one."""
    cfg = stage(presets.tiny())
    return replace(cfg, train=replace(cfg.train, loss_chunk=100, compute_dtype="bfloat16", remat=True))

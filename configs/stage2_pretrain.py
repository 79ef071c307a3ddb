"""Stage 2, joint pre-training: everything learns, the encoders at a quarter of the rate, by the next token.

Inferred, as in `stage1_align.py`: from InternVL 2.5's second stage, and encoders held back as in nanoVLM.
"""

from dataclasses import replace

from hypervl_jax import presets
from hypervl_jax.config import Config, DataConfig, Rule


def stage(cfg: Config) -> Config:
    rules = (
        Rule(r"(base|large)\.projector\..*"),
        Rule(r"(base|large)\.vit\..*", 0.25),
        Rule(r"llm\..*"),
        Rule(r"names_(base|large)\..*", 0.0),
    )
    how = replace(cfg.train, stage0_steps=0, name_weight=0.0, optimizer="adamw", rules=rules)
    return replace(cfg, name="stage2_pretrain", train=how, dcl=replace(cfg.dcl, weight=0.0))


def get_config() -> Config:
    """Rows of up to 8,192 tokens: twelve tiles of 256 and a thumbnail, and text."""
    cfg = stage(presets.hypervl_1p7b())
    buckets, lengths = (1, 3, 5, 9, 13), (1024, 2048, 4096, 4096, 8192)
    data = DataConfig(cfg.data.screens, batch=512, shrink_prob=0.0, tile_buckets=buckets, lengths=lengths)
    how = replace(cfg.train, steps=20_000, lr=4e-5, warmup=600, accumulate=2)
    model = replace(cfg.model, policy=replace(cfg.model.policy, max_tiles=12))
    return replace(cfg, model=model, data=data, train=how)


def get_tiny() -> Config:
    """Seconds on any machine, in two micro-batches as the large one."""
    cfg = stage(presets.tiny())
    return replace(cfg, train=replace(cfg.train, accumulate=2))

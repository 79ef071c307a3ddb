"""Stage 1, alignment: the projectors learn to speak to a decoder that stands still, by the next token of captions.

That there are stages is the paper's (HyperVL 3.5). Its numbers are not public: what moves, rates and sizes are inferred
from the first stage of InternVL 2.5's small models.
"""

from dataclasses import replace

from hypervl_jax import presets
from hypervl_jax.config import Config, DataConfig, Rule


def stage(cfg: Config) -> Config:
    """The same model in this stage: the branches take turns, none follows the other."""
    rules = (
        Rule(r"(base|large)\.projector\..*"),
        Rule(r"(base|large)\.vit\..*", 0.0),
        Rule(r"llm\..*", 0.0),
        Rule(r"names_(base|large)\..*", 0.0),
    )
    how = replace(cfg.train, stage0_steps=0, name_weight=0.0, optimizer="adamw", rules=rules)
    return replace(cfg, name="stage1_align", train=how, dcl=replace(cfg.dcl, weight=0.0))


def get_config() -> Config:
    """Rows of 2,048 tokens: four tiles of 256 and a thumbnail, and text."""
    cfg = stage(presets.hypervl_1p7b())
    data = DataConfig(cfg.data.screens, batch=512, shrink_prob=0.0, tile_buckets=(1, 3, 5), lengths=(512, 1024, 2048))
    how = replace(cfg.train, steps=4_000, lr=2e-4, warmup=120)
    model = replace(cfg.model, policy=replace(cfg.model.policy, max_tiles=4))
    return replace(cfg, model=model, data=data, train=how)


def get_tiny() -> Config:
    """Seconds on any machine."""
    return stage(presets.tiny())

"""What `inference.py` and `training.py` measure against: transformers' SigLIP and Qwen3 in torch, same sizes, the very
same weights.

Imported only where torch and transformers are installed (`pip install '.[parity]'`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch  # type: ignore
from transformers import Qwen3Config, Qwen3ForCausalLM, SiglipVisionConfig, SiglipVisionModel  # type: ignore

from hypervl_jax import layouts
from hypervl_jax.config import BRANCHES, Branch, Config, LlmConfig, ModelConfig, VitConfig
from hypervl_jax.tensors import Table, flatten


def _state(params: dict, table: Table) -> dict[str, torch.Tensor]:
    """Our tree under their names."""
    out, flat = {}, flatten(params)
    for row in table.rows:
        leaf = np.asarray(flat[row.path])
        leaf = leaf if leaf.flags.writeable else leaf.copy()  # torch shares no memory that it may not write
        layers = enumerate(leaf) if "{i}" in row.name else [(None, leaf)]
        for i, values in layers:
            out[row.name.format(i=i)] = torch.from_numpy(np.ascontiguousarray(row.form.theirs(values)))
    return out


def _filled(model: Any, state: dict[str, torch.Tensor], device: str, dtype: str) -> Any:
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    left = [name for name in missing if not name.startswith("head.") and name != "lm_head.weight"]
    if left or unexpected:
        raise ValueError(f"weights do not fit transformers' model: {left or unexpected}")
    if model.get_output_embeddings() is not None:
        model.tie_weights()
    return model.to(device=device, dtype=getattr(torch, dtype)).eval()


def _vision(cfg: VitConfig, params: dict, device: str, dtype: str) -> Any:
    sizes = {theirs: getattr(cfg, ours) for ours, theirs in layouts.VIT_SIZES.items()}
    model = SiglipVisionModel(SiglipVisionConfig(**sizes, vision_use_head=False, attn_implementation="sdpa"))
    prefix = "vision_model." if any(name.startswith("vision_model.") for name in model.state_dict()) else ""
    return _filled(model, _state(params, layouts.vit().within("", prefix)), device, dtype)


def _language(cfg: LlmConfig, params: dict, device: str, dtype: str) -> Any:
    sizes = {theirs: getattr(cfg, ours) for ours, theirs in layouts.LLM_SIZES.items() if ours != "rope_theta"}
    rope = {"rope_type": "default", "rope_theta": cfg.rope_theta}
    config = Qwen3Config(
        **sizes, rope_parameters=rope, max_position_embeddings=40_960, attn_implementation="sdpa",
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    return _filled(Qwen3ForCausalLM(config), _state(params, layouts.llm(cfg)), device, dtype)


def _projector(cfg: ModelConfig, branch: Branch, params: dict) -> torch.nn.Sequential:
    wide, d, eps = cfg.vit(branch).width * cfg.policy.merge**2, cfg.llm.width, 1e-5
    norm, fc1, fc2 = torch.nn.LayerNorm(wide, eps), torch.nn.Linear(wide, d), torch.nn.Linear(d, d)
    for module, name in ((norm, "norm"), (fc1, "fc1"), (fc2, "fc2")):
        module.load_state_dict({k: torch.tensor(np.asarray(v)) for k, v in params[name].items()})
    return torch.nn.Sequential(norm, fc1, torch.nn.GELU("tanh"), fc2)


class Encoder:
    """SigLIP over one tile, without its pooling head."""

    def __init__(self, cfg: VitConfig, params: dict, device: str = "cpu", dtype: str = "float32"):
        self.model = _vision(cfg, params, device, dtype)
        self.device, self.dtype = device, getattr(torch, dtype)

    @torch.inference_mode()
    def __call__(self, tile: np.ndarray) -> np.ndarray | torch.Tensor:
        """A tile f32[1 T T 3] in 0..1 -> features [1 P D], finished."""
        pixels = torch.from_numpy(tile).to(self.device, self.dtype).permute(0, 3, 1, 2) * 2 - 1
        return _finished(self.model(pixel_values=pixels).last_hidden_state)


class Decoder:
    """Qwen3 over embeddings or ids, with a cache."""

    def __init__(self, cfg: LlmConfig, params: dict, device: str = "cpu", dtype: str = "float32"):
        self.model = _language(cfg, params, device, dtype)
        self.device = device

    @torch.inference_mode()
    def prefill(self, ids: np.ndarray) -> torch.Tensor:
        """Reads i32[1 L] into a new cache; the logits [1 V] of what comes next, finished."""
        ids = torch.from_numpy(ids.astype(np.int64)).to(self.device)
        out = self.model(input_ids=ids, use_cache=True, logits_to_keep=1)
        self.cache, self.logits = out.past_key_values, out.logits[:, -1]
        return _finished(self.logits)

    @torch.inference_mode()
    def decode(self, tokens: int) -> list[int]:
        """Says the likeliest token so many times."""
        said = []
        for _ in range(tokens):
            token = self.logits.argmax(-1, keepdim=True)
            out = self.model(input_ids=token, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
            self.cache, self.logits = out.past_key_values, out.logits[:, -1]
            said.append(token.item())
        _finished(self.logits)
        return said


class Trainer(torch.nn.Module):
    """HyperVL in torch, and a step of its training in f32: next token with either branch, Base's also with the
    divergence from Large; AdamW in one kernel, clipped. Of whole rows, one conversation each, no picture padded."""

    def __init__(self, cfg: Config, params: dict):
        super().__init__()
        self.cfg, self.merge = cfg, cfg.model.policy.merge
        self.vit = torch.nn.ModuleDict(
            {b: _vision(cfg.model.vit(b), params[b]["vit"], "cpu", "float32") for b in BRANCHES}
        )
        self.projector = torch.nn.ModuleDict({b: _projector(cfg.model, b, params[b]["projector"]) for b in BRANCHES})
        self.llm = _language(cfg.model.llm, params["llm"], "cpu", "float32")
        self.train()
        flat = [(p.ndim < 2 or "position" in name, p) for name, p in self.named_parameters()]
        t = cfg.train
        self.moved = torch.optim.AdamW(
            [
                {"params": [p for still, p in flat if not still], "weight_decay": t.weight_decay},
                {"params": [p for still, p in flat if still], "weight_decay": 0.0},
            ],
            betas=(t.b1, t.b2), eps=1e-8, fused=True,
        )  # fmt: skip

    def forward(self, batch: dict[str, torch.Tensor], branch: Branch) -> torch.Tensor:
        """Logits [B L V]."""
        rows, n, m = *batch["tiles"].shape[:2], self.merge
        pixels = batch["tiles"].flatten(0, 1).permute(0, 3, 1, 2).float() / 127.5 - 1
        seen = self.vit[branch](pixel_values=pixels).last_hidden_state
        side = round(seen.shape[1] ** 0.5) // m
        folded = seen.reshape(rows * n, side, m, side, m, -1).transpose(2, 3).reshape(rows, n * side * side, -1)
        feats, text = self.projector[branch](folded), self.llm.model.embed_tokens(batch["ids"])
        slots = batch["slots"][..., None]
        x = torch.where(slots >= 0, feats.gather(1, slots.clamp(min=0).expand(-1, -1, feats.shape[-1])), text)
        return self.llm(inputs_embeds=x, use_cache=False).logits

    def step(self, batch: dict[str, torch.Tensor], branch: Branch, rate: float) -> dict[str, float]:
        """One update of a branch and the decoder; the parts of the loss."""
        weights, tau = batch["weights"], self.cfg.dcl.temperature
        logits = self(batch, branch)
        each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), reduction="none")
        loss = (each.view_as(weights) * weights).sum() / weights.sum()
        parts, whole = {f"loss_{branch}": loss}, loss
        if branch == "base":
            with torch.no_grad():
                t = torch.log_softmax(self(batch, "large") / tau, -1)
            s = torch.log_softmax(logits / tau, -1)
            kl = tau**2 * ((t.exp() * (t - s)).sum(-1) * weights).sum() / weights.sum()
            parts, whole = parts | {"kl": kl}, whole + self.cfg.dcl.weight * kl
        whole.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters(), self.cfg.train.clip)
        for group in self.moved.param_groups:
            group["lr"] = rate
        self.moved.step()
        self.moved.zero_grad(set_to_none=True)
        return {k: v.item() for k, v in {**parts, "grad_norm": norm}.items()}


def _finished(x: torch.Tensor) -> torch.Tensor:
    if x.device.type == "cuda":
        torch.cuda.synchronize()
    return x

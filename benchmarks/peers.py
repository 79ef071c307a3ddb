"""What `inference.py` measures against: transformers' SigLIP and Qwen3 in torch, same sizes, the very same weights.

Imported only where torch and transformers are installed (`pip install '.[parity]'`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch  # type: ignore
from transformers import Qwen3Config, Qwen3ForCausalLM, SiglipVisionConfig, SiglipVisionModel  # type: ignore

from hypervl_jax import layouts
from hypervl_jax.config import LlmConfig, VitConfig
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


class Encoder:
    """SigLIP over one tile, without its pooling head."""

    def __init__(self, cfg: VitConfig, params: dict, device: str = "cpu", dtype: str = "float32"):
        sizes = {theirs: getattr(cfg, ours) for ours, theirs in layouts.VIT_SIZES.items()}
        model = SiglipVisionModel(SiglipVisionConfig(**sizes, vision_use_head=False, attn_implementation="sdpa"))
        prefix = "vision_model." if any(name.startswith("vision_model.") for name in model.state_dict()) else ""
        self.model = _filled(model, _state(params, layouts.vit().within("", prefix)), device, dtype)
        self.device, self.dtype = device, getattr(torch, dtype)

    @torch.inference_mode()
    def __call__(self, tile: np.ndarray) -> np.ndarray | torch.Tensor:
        """A tile f32[1 T T 3] in 0..1 -> features [1 P D], finished."""
        pixels = torch.from_numpy(tile).to(self.device, self.dtype).permute(0, 3, 1, 2) * 2 - 1
        return _finished(self.model(pixel_values=pixels).last_hidden_state)


class Decoder:
    """Qwen3 over embeddings or ids, with a cache."""

    def __init__(self, cfg: LlmConfig, params: dict, device: str = "cpu", dtype: str = "float32"):
        sizes = {theirs: getattr(cfg, ours) for ours, theirs in layouts.LLM_SIZES.items() if ours != "rope_theta"}
        rope = {"rope_type": "default", "rope_theta": cfg.rope_theta}
        config = Qwen3Config(
            **sizes, rope_parameters=rope, max_position_embeddings=40_960, attn_implementation="sdpa",
            bos_token_id=None, eos_token_id=None, pad_token_id=None,
        )  # fmt: skip
        self.model = _filled(Qwen3ForCausalLM(config), _state(params, layouts.llm(cfg)), device, dtype)
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


def _finished(x: torch.Tensor) -> torch.Tensor:
    if x.device.type == "cuda":
        torch.cuda.synchronize()
    return x

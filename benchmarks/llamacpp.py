"""What `inference.py` also measures against: Qwen3 in llama.cpp on a CPU, same sizes, the very same weights.

Imported only where llama_cpp and gguf are; the library needs neither. Both come with

    CMAKE_ARGS=-DGGML_NATIVE=ON pip install --no-binary llama-cpp-python llama-cpp-python gguf

which compiles llama.cpp for the machine at hand. Our weights go through a GGUF file without a tokenizer, which is read
and deleted. Beside our 8 bits stands Q8_0, beside our 4 bits Q4_0, with the vocabulary's table in 8 bits on both sides;
a matrix whose rows are no multiple of 32 is F16 in either. Beside f32 weights keys, values and attention are f32 too;
else keys and values are f16 and attention is fused, as llama.cpp has it unless asked. A prompt is read 512 tokens at a
time.
"""

from __future__ import annotations

import ctypes
import sys
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path

import gguf  # type: ignore
import llama_cpp  # type: ignore
import numpy as np
from gguf import GGMLQuantizationType as Type

from hypervl_jax.config import LlmConfig
from hypervl_jax.tensors import flatten

VERSION = llama_cpp.__version__
TYPES = {"float32": Type.F32, "bfloat16": Type.BF16, "q8_0": Type.Q8_0, "q4_0": Type.Q4_0}
SIZES = {
    "vocab_size": "vocab", "embedding_length": "width", "block_count": "depth", "feed_forward_length": "mlp",
    "attention.head_count": "heads", "attention.head_count_kv": "kv_heads", "attention.key_length": "head_dim",
    "attention.value_length": "head_dim", "rope.dimension_count": "head_dim",
}  # fmt: skip
FLOATS = {"attention.layer_norm_rms_epsilon": "eps", "rope.freq_base": "rope_theta"}
TOP = {"embed": "token_embd", "norm.weight": "output_norm", "head": "output"}
BLOCK = {
    "norm1": "attn_norm", "norm2": "ffn_norm", "q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output",
    "q_norm": "attn_q_norm", "k_norm": "attn_k_norm", "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down",
}  # fmt: skip


@llama_cpp.llama_log_callback
def _errors(level: int, text: bytes, _: object) -> None:
    if level == 4:  # GGML_LOG_LEVEL_ERROR
        sys.stderr.write(text.decode(errors="replace"))


llama_cpp.llama_log_set(_errors, None)
llama_cpp.llama_backend_init()


# --- the file --------------------------------------------------------------------------------------------------------


def tensors(params: dict) -> Iterator[tuple[str, np.ndarray]]:
    """Our decoder's leaves, layers stacked, under the names of a GGUF."""
    flat = flatten(params)
    for ours, theirs in TOP.items():
        if ours in flat:  # a decoder without a head of its own multiplies by its table, there too
            yield f"{theirs}.weight", np.asarray(flat[ours], np.float32)
    for ours, theirs in BLOCK.items():
        for i, values in enumerate(np.asarray(flat[f"blocks.layers.{ours}.weight"], np.float32)):
            yield f"blk.{i}.{theirs}.weight", values


def kept_as(name: str, shape: tuple[int, ...], kind: str) -> Type:
    """How one tensor is stored: norms in f32, matrices in the type of the kind."""
    found = TYPES["q8_0" if kind == "q4_0" and not name.startswith("blk.") else kind]
    if len(shape) == 1:
        return Type.F32
    return Type.F16 if shape[-1] % gguf.GGML_QUANT_SIZES[found][0] else found


def write(path: Path, cfg: LlmConfig, params: dict, kind: str) -> None:
    """A decoder's f32 weights in one kind of numbers, as a file of the architecture qwen3."""
    writer = gguf.GGUFWriter(path, "qwen3")
    for key, field in SIZES.items():
        writer.add_uint32(f"qwen3.{key}", getattr(cfg, field))
    for key, field in FLOATS.items():
        writer.add_float32(f"qwen3.{key}", getattr(cfg, field))
    writer.add_context_length(40_960)
    writer.add_tokenizer_model("no_vocab")
    for name, values in tensors(params):
        kind_of_it = kept_as(name, values.shape, kind)
        writer.add_tensor(name, gguf.quantize(values, kind_of_it), raw_dtype=kind_of_it)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# --- the decoder -----------------------------------------------------------------------------------------------------


class Decoder:
    """Qwen3 over ids, with a cache of `room` positions."""

    def __init__(self, cfg: LlmConfig, params: dict, kind: str, room: int, threads: int):
        if not cfg.qk_norm:
            raise ValueError("qk_norm: only Qwen3 is written for llama.cpp, and this decoder is a Llama")
        how = llama_cpp.llama_model_default_params()
        how.use_mmap, how.n_gpu_layers = False, 0
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "decoder.gguf"
            write(path, cfg, params, kind)
            self.model = llama_cpp.llama_model_load_from_file(bytes(path), how)
        if not self.model:
            raise ValueError(f"llama.cpp {VERSION} does not read our {kind} decoder; its reason stands above")
        how = llama_cpp.llama_context_default_params()
        how.n_ctx = how.n_batch = room
        how.n_threads = how.n_threads_batch = threads
        if kind == "float32":
            how.type_k = how.type_v = Type.F32
            how.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED  # it turns keys and values into f16
        self.context = llama_cpp.llama_init_from_model(self.model, how)
        if not self.context:
            raise ValueError(f"llama.cpp {VERSION} makes no cache of {room} positions; its reason stands above")
        self.vocab, self.bytes = cfg.vocab, llama_cpp.llama_model_size(self.model)
        weakref.finalize(self, _free, self.context, self.model)

    def prefill(self, ids: np.ndarray) -> np.ndarray:
        """Reads i32[1 L] into an empty cache; the logits [1 V] of what comes next."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), False)
        return self._read(ids[0])[None]

    def decode(self, tokens: int) -> list[int]:
        """Says the likeliest token so many times."""
        said = []
        for _ in range(tokens):
            said.append(int(self.logits.argmax()))
            self._read(said[-1:])
        return said

    def _read(self, ids: np.ndarray | list[int]) -> np.ndarray:
        tokens = np.ascontiguousarray(ids, np.int32)  # named: a batch only points at it
        where = tokens.ctypes.data_as(ctypes.POINTER(llama_cpp.llama_token))
        if fault := llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(where, len(tokens))):
            raise RuntimeError(f"llama.cpp reads no {len(tokens)} tokens more: {fault}")
        found = llama_cpp.llama_get_logits_ith(self.context, -1)
        self.logits = np.ctypeslib.as_array(found, (self.vocab,)).copy()
        return self.logits


def _free(context: ctypes.c_void_p, model: ctypes.c_void_p) -> None:
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)

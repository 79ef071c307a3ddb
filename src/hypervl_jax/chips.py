"""Figures of chips as their makers publish them: what forecasts of steps (`forecast.py`) and the share of a machine
that a run uses (`watch.py`) are made from. Nothing here is measured."""

from __future__ import annotations

from typing import NamedTuple


class Chip(NamedTuple):
    """One device. `link` is what it receives from the others of its slice or node, half of what is called
    bidirectional; beyond `node` devices there are other networks, which no figure here is of."""

    flops: float  # FLOPs a second, dense, bf16
    memory: float  # bytes
    bandwidth: float  # bytes a second between memory and chip
    link: float  # bytes a second
    node: int  # devices
    source: str
    kinds: tuple[str, ...] = ()  # what JAX calls it, `device_kind`


_TPU = "https://docs.cloud.google.com/tpu/docs/"
_GPU = "https://www.nvidia.com/en-us/data-center/"
CHIPS = {
    # 275 TFLOPS, 32 GiB, 1,200 GB/s; 4,096 chips. Links, 6 of 50 GB/s: Jouppi et al. 2023 (arXiv 2304.01433), table 4.
    "v4": Chip(275e12, 2.0**35, 1200e9, 300e9, 4096, _TPU + "v4", ("TPU v4",)),
    # 197 TFLOPs, 16 GB, 819 GB/s, 400 GB/s bidirectional; 256 chips.
    "v5e": Chip(197e12, 16e9, 819e9, 200e9, 256, _TPU + "v5e", ("TPU v5 lite", "TPU v5e")),
    # 459 TFLOPs, 95 GB, 2,765 GB/s, 4,800 Gb/s; a job has at most 6,144 of the 8,960 chips.
    "v5p": Chip(459e12, 95e9, 2765e9, 600e9, 6144, _TPU + "v5p", ("TPU v5", "TPU v5p")),
    # 918 TFLOPs, 32 GB, 1,638 GBps (earlier editions: 1,600, 1,640), 800 GBps bidirectional; 256 chips.
    "v6e": Chip(918e12, 32e9, 1638e9, 400e9, 256, _TPU + "v6e", ("TPU v6 lite", "TPU v6e")),
    # Data sheets of GPUs print BF16 tensor rates with sparsity, marked so, but for A100, whose sheet has both: dense is
    # half. "NVLink: 600GB/s" and the like are both directions. Nodes: HGX boards of 8, servers with up to 8 L4.
    # BFLOAT16 Tensor Core 312 TFLOPS | 624 TFLOPS*; A100 SXM: 40GB HBM2, 1,555GB/s; 80GB HBM2e, 2,039GB/s;
    # NVLink: 600GB/s.
    "a100-40gb": Chip(312e12, 40e9, 1555e9, 300e9, 8, _GPU + "a100", ("NVIDIA A100-SXM4-40GB",)),
    "a100": Chip(312e12, 80e9, 2039e9, 300e9, 8, _GPU + "a100", ("NVIDIA A100-SXM4-80GB",)),
    # H100 SXM: BFLOAT16 Tensor Core 1,979 teraFLOPS*; 80GB, 3.35TB/s; NVLink: 900GB/s. Dense, 989.4: H100 white paper.
    "h100": Chip(989e12, 80e9, 3350e9, 450e9, 8, _GPU + "h100", ("NVIDIA H100 80GB HBM3",)),
    # H200 SXM: BFLOAT16 Tensor Core 1,979 TFLOPS*; 141GB, 4.8TB/s; NVLink: 900GB/s.
    "h200": Chip(989e12, 141e9, 4800e9, 450e9, 8, _GPU + "h200", ("NVIDIA H200",)),
    # BFLOAT16 Tensor Core 242 teraFLOPS*; 24GB, 300GB/s; PCIe Gen4 x16 64GB/s.
    "l4": Chip(121e12, 24e9, 300e9, 32e9, 8, _GPU + "l4", ("NVIDIA L4",)),
}
TPUS = ("v4", "v5e", "v5p", "v6e")


def peak(kind: str) -> float:
    """FLOPs a second of the device that JAX calls `kind`, dense, bf16; 0 of one that is not known."""
    return next((chip.flops for chip in CHIPS.values() if kind in chip.kinds), 0.0)

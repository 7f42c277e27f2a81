"""lorazip: compress many LoRA adapters of one base model into one small, verified bundle.

bundle = lorazip.compress(["adapters/"], lorazip.Spec(), "out.lorazip")
factor = lorazip.Bundle.open("out.lorazip").adapter("customer-7").low_rank("model.layers.0.self_attn.q_proj")
"""

from lorazip.adapter import Adapter, LowRank, open_adapter
from lorazip.bundle import Bundle, BundleAdapter
from lorazip.compress.job import compress
from lorazip.compress.spec import Spec
from lorazip.errors import LorazipError
from lorazip.sources import open_adapters

__all__ = [
    "Adapter",
    "Bundle",
    "BundleAdapter",
    "LorazipError",
    "LowRank",
    "Spec",
    "compress",
    "open_adapter",
    "open_adapters",
]

__version__ = "0.1.0"

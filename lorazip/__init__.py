"""lorazip: compress many LoRA adapters of one base model into one small, verified bundle, and evaluate it.

bundle = lorazip.compress(["adapters/"], lorazip.Spec(), "out.lorazip")
factor = lorazip.Bundle.open("out.lorazip").adapter("customer-7").low_rank("model.layers.0.self_attn.q_proj")
results = lorazip.evaluate("base/", ["tasks/"], adapters=["adapters/"], bundles=["out.lorazip"])
"""

__version__ = "0.1.0"

from lorazip.adapter import Adapter, LowRank, open_adapter
from lorazip.bundle import Bundle, BundleAdapter
from lorazip.compress.job import compress
from lorazip.compress.spec import Spec
from lorazip.errors import LorazipError
from lorazip.eval.job import evaluate
from lorazip.eval.results import Results
from lorazip.eval.spec import EvalSpec
from lorazip.sources import open_adapters

__all__ = [
    "Adapter",
    "Bundle",
    "BundleAdapter",
    "EvalSpec",
    "LorazipError",
    "LowRank",
    "Results",
    "Spec",
    "compress",
    "evaluate",
    "open_adapter",
    "open_adapters",
]
